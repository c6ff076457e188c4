//! What is known of an upstream from asking it: whether anybody is there, and what it limits. Decisions only; the
//! clock comes from outside.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::request::RequestKind;
use crate::config::Upstream;
use crate::principal::PrincipalId;
use crate::registries::RepositoryRef;
use crate::times::{DEFAULT_TTL, FIRST_PAUSE, HOUR, OBSERVATION_TTL, PAUSE};

/// The upstreams that were asked lately, each under the rule by whose credentials it is asked.
pub(super) struct UpstreamStates(moka::sync::Cache<HealthKey, Arc<Mutex<UpstreamHealth>>>);

#[derive(Clone, PartialEq, Eq, Hash)]
struct HealthKey {
    rule: String,
    upstream: String,
}

/// What is known of one upstream.
#[derive(Default)]
pub(super) struct UpstreamHealth {
    /// Nobody is there: it is looked after until somebody is.
    down: Option<DownState>,
    answered: Option<Instant>,
    /// Somebody got no answer, or not soon: others are asked first until then.
    doubted: Option<Instant>,
    /// Registries count by account: whom one limits says nothing of others.
    limits: HashMap<(RequestKind, PrincipalId), RateLimited>,
}

struct DownState {
    cause: DownCause,
    /// When somebody last wanted something from it.
    wanted: Instant,
}

/// Why an upstream counts as down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DownCause {
    /// It takes requests and does not answer in time: it may be slow.
    Silent,
    /// No connection to it can be had.
    Unreachable,
}

/// It said "later" to one kind of questions.
#[derive(Clone, Copy)]
struct RateLimited {
    until: Instant,
    /// How often in a row it did not say how much later.
    strikes: u32,
}

/// Whether to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Admission {
    Ask,
    /// It asks to be left alone until then.
    Limited(Instant),
    /// Nobody is there.
    Down(DownCause),
}

/// What a question without an answer means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// Nobody is there, which was not known before.
    Found,
    /// It was known, or others were answered meanwhile.
    Nothing,
}

/// Limits of one upstream; of more each question finds out by itself.
const MAX_LIMITS: usize = 1_000;

const MAX_UPSTREAMS: u64 = 10_000;

/// A limit that comes without a time lasts so long, then twice as long, and so on.
const FIRST_LIMIT: Duration = Duration::from_secs(5);

/// An upstream as it is shown to people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpstreamView {
    /// By which rule it is asked.
    pub rule: String,
    pub upstream: String,
    /// `well`, `slow`: others are asked first, `limited`: it said "later", `down`: nobody answers, and it is asked
    /// again all the time.
    pub state: String,
    /// Until a limit ends.
    pub limited_seconds: Option<u64>,
    /// Pulls that it still allows, as it last said.
    pub rate_limit_remaining: Option<i64>,
    /// That it has granted and that are good for a while.
    #[serde(default)]
    pub tokens: usize,
}

/// What others know of an upstream, by rule and name.
pub(super) struct KnownHealth {
    pub(super) remaining: Option<i64>,
    pub(super) tokens: usize,
}

impl UpstreamStates {
    /// Those that were asked lately, by rule and name.
    pub(super) fn views(&self, known: impl Fn(&str, &str) -> KnownHealth) -> Vec<UpstreamView> {
        let now = Instant::now();
        let view = |(key, condition): (Arc<HealthKey>, Arc<Mutex<UpstreamHealth>>)| {
            let (has_answered, (state, limited)) = {
                let condition = condition.lock();
                (condition.has_answered(), condition.state(now))
            };
            // A host that was blocked, or that has never answered, says nothing: clients can invent names.
            if !has_answered && state == "well" {
                return None;
            }
            let known = known(&key.rule, &key.upstream);
            Some(UpstreamView {
                rate_limit_remaining: known.remaining,
                tokens: known.tokens,
                rule: key.rule.clone(),
                upstream: key.upstream.clone(),
                state: state.to_owned(),
                limited_seconds: limited.map(|limited| limited.as_secs()),
            })
        };
        let mut views: Vec<UpstreamView> = self.0.iter().filter_map(view).collect();
        views.sort_by(|a, b| (&a.rule, &a.upstream).cmp(&(&b.rule, &b.upstream)));
        views
    }

    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(MAX_UPSTREAMS).time_to_idle(OBSERVATION_TTL).build())
    }

    pub(super) fn of(&self, place: &RepositoryRef, upstream: &Upstream) -> Arc<Mutex<UpstreamHealth>> {
        self.0.get_with(HealthKey::new(place, upstream), Arc::default)
    }

    /// What is known, if it was ever asked.
    pub(super) fn known(&self, place: &RepositoryRef, upstream: &Upstream) -> Option<Arc<Mutex<UpstreamHealth>>> {
        self.0.get(&HealthKey::new(place, upstream))
    }
}

impl HealthKey {
    fn new(place: &RepositoryRef, upstream: &Upstream) -> Self {
        Self { rule: place.rule.name().to_owned(), upstream: upstream.base() }
    }
}

impl UpstreamHealth {
    /// Whether it has ever said anything.
    pub(super) fn has_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Whether a question may be asked. One that may not still wants it.
    pub(super) fn admit(&mut self, kind: RequestKind, who: PrincipalId, now: Instant) -> Admission {
        if let Some(down) = &mut self.down {
            down.wanted = now;
            return Admission::Down(down.cause);
        }
        match self.limits.get(&(kind, who)) {
            Some(limit) if limit.until > now => Admission::Limited(limit.until),
            _ => Admission::Ask,
        }
    }

    /// As it is shown, with the time to the end of its longest limit.
    fn state(&self, now: Instant) -> (&'static str, Option<Duration>) {
        let limited = self.limits.values().filter_map(|limit| limit.until.checked_duration_since(now)).max();
        let limited = limited.filter(|left| !left.is_zero());
        let is_doubted = self.doubted.is_some_and(|until| until > now);
        let state = match (&self.down, limited) {
            (Some(_), _) => "down",
            (None, Some(_)) => "limited",
            (None, None) if is_doubted => "slow",
            (None, None) => "well",
        };
        (state, limited)
    }

    /// In which order upstreams are asked: those first that are likely to answer.
    pub(super) fn rank(&mut self, kind: RequestKind, who: PrincipalId, now: Instant) -> (Admission, bool) {
        (self.admit(kind, who, now), self.doubted.is_some_and(|until| until > now))
    }

    /// Somebody is there, whatever was said.
    pub(super) fn answered(&mut self, now: Instant) {
        self.down = None;
        self.doubted = None;
        self.answered = Some(now);
    }

    /// It gave what was asked for, so it does not limit that any more.
    pub(super) fn gave(&mut self, kind: RequestKind, who: PrincipalId) {
        self.limits.remove(&(kind, who));
    }

    /// It said "later", and maybe how much.
    pub(super) fn limited(&mut self, kind: RequestKind, who: PrincipalId, again: Option<Duration>, now: Instant) {
        let again = again.filter(|again| *again >= FIRST_PAUSE);
        let strikes = self.limits.get(&(kind, who)).map_or(0, |limit| limit.strikes);
        let unsaid = (FIRST_LIMIT * (1 << strikes.min(8))).min(DEFAULT_TTL);
        let until = now + again.map_or(unsaid, |again| again.min(HOUR));
        if self.limits.len() >= MAX_LIMITS {
            self.limits.retain(|_, limit| limit.until > now);
        }
        if self.limits.len() < MAX_LIMITS || self.limits.contains_key(&(kind, who)) {
            self.limits.insert((kind, who), RateLimited { until, strikes: strikes + u32::from(again.is_none()) });
        }
    }

    /// Another upstream has answered, and this one not yet.
    pub(super) fn overtaken(&mut self, now: Instant) {
        self.doubted = Some(now + PAUSE);
    }

    /// Nothing came back to a question of then.
    pub(super) fn silent(&mut self, kind: RequestKind, cause: DownCause, asked: Instant, now: Instant) -> Unanswered {
        if self.answered.is_some_and(|answered| answered >= asked) || self.down.is_some() {
            return Unanswered::Nothing;
        }
        if !kind.tells_who_is_there() {
            self.doubted = Some(now + PAUSE);
            return Unanswered::Nothing;
        }
        self.down = Some(DownState { cause, wanted: now });
        Unanswered::Found
    }

    /// Whether somebody still wants something of an upstream that is down.
    pub(super) fn is_wanted(&self, now: Instant) -> bool {
        self.down.as_ref().is_some_and(|down| now < down.wanted + DEFAULT_TTL)
    }

    /// Nobody looks after it: the next question has to find out.
    pub(super) fn forget(&mut self) {
        self.down = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_is_silent_is_down_until_it_answers() {
        let (mut condition, start) = (UpstreamHealth::default(), Instant::now());
        assert_eq!(
            condition.silent(RequestKind::ManifestHead, DownCause::Silent, start, start + seconds(3)),
            Unanswered::Found
        );
        assert_eq!(
            condition.silent(RequestKind::Manifest, DownCause::Silent, start, start + seconds(4)),
            Unanswered::Nothing,
            "it is known"
        );
        assert_eq!(
            condition.admit(RequestKind::Blob, PrincipalId::NOBODY, start + seconds(50)),
            Admission::Down(DownCause::Silent)
        );
        assert!(condition.is_wanted(start + seconds(109)) && !condition.is_wanted(start + seconds(110)));
        condition.answered(start + seconds(60));
        assert_eq!(condition.admit(RequestKind::Blob, PrincipalId::NOBODY, start + seconds(60)), Admission::Ask);
        let (before, after) = (start + seconds(59), start + seconds(70));
        assert_eq!(
            condition.silent(RequestKind::Manifest, DownCause::Silent, before, after),
            Unanswered::Nothing,
            "others were answered meanwhile"
        );
    }

    #[test]
    fn blobs_and_lists_only_raise_doubts() {
        for kind in [RequestKind::Blob, RequestKind::BlobHead, RequestKind::List] {
            let (mut condition, start) = (UpstreamHealth::default(), Instant::now());
            assert_eq!(condition.silent(kind, DownCause::Silent, start, start), Unanswered::Nothing);
            assert_eq!(condition.rank(RequestKind::Manifest, PrincipalId::NOBODY, start), (Admission::Ask, true));
            assert_eq!(
                condition.rank(RequestKind::Manifest, PrincipalId::NOBODY, start + PAUSE),
                (Admission::Ask, false)
            );
        }
    }

    #[test]
    fn a_limit_is_of_one_kind_and_lasts_as_long_as_it_says() {
        let (mut condition, start) = (UpstreamHealth::default(), Instant::now());
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(seconds(7)), start);
        assert_eq!(
            condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, start + seconds(6)),
            Admission::Limited(start + seconds(7))
        );
        assert_eq!(condition.admit(RequestKind::ManifestHead, PrincipalId::NOBODY, start), Admission::Ask);
        assert_eq!(condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, start + seconds(7)), Admission::Ask);
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(seconds(1_000_000)), start);
        assert_eq!(
            condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, start + HOUR),
            Admission::Ask,
            "whatever it says"
        );
    }

    #[test]
    fn whom_one_limits_says_nothing_of_others() {
        let (mut condition, start) = (UpstreamHealth::default(), Instant::now());
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(seconds(7)), start);
        assert_eq!(condition.admit(RequestKind::Manifest, PrincipalId([7; 16]), start), Admission::Ask);
        let who = |nth: usize| PrincipalId(u128::try_from(nth).unwrap().to_be_bytes());
        (0..2 * MAX_LIMITS).for_each(|nth| condition.limited(RequestKind::Manifest, who(nth), Some(seconds(7)), start));
        assert_eq!(condition.limits.len(), MAX_LIMITS);
        condition.limited(RequestKind::Manifest, PrincipalId([9; 16]), Some(seconds(7)), start + seconds(8));
        assert_eq!(condition.limits.len(), 1, "those that are over make room");
    }

    #[test]
    fn people_are_shown_what_is_wrong() {
        let (mut condition, now) = (UpstreamHealth::default(), Instant::now());
        assert_eq!(condition.state(now), ("well", None));
        condition.overtaken(now);
        assert_eq!(condition.state(now), ("slow", None));
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(seconds(7)), now);
        assert_eq!(condition.state(now), ("limited", Some(seconds(7))));
        condition.silent(RequestKind::Manifest, DownCause::Silent, now, now);
        assert_eq!(condition.state(now).0, "down");
    }

    #[test]
    fn at_once_is_no_time() {
        let (mut condition, start) = (UpstreamHealth::default(), Instant::now());
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(Duration::ZERO), start);
        assert_eq!(
            condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, start),
            Admission::Limited(start + FIRST_LIMIT)
        );
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, Some(Duration::from_millis(999)), start);
        assert_eq!(
            condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, start),
            Admission::Limited(start + FIRST_LIMIT * 2)
        );
    }

    #[test]
    fn a_limit_without_a_time_lasts_longer_each_time() {
        let (mut condition, mut now) = (UpstreamHealth::default(), Instant::now());
        let lasts = [5, 10, 20, 40, 60, 60].map(|lasts| {
            condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, None, now);
            let is_limited =
                condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, now + seconds(lasts - 1)) != Admission::Ask;
            now += seconds(lasts);
            is_limited && condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, now) == Admission::Ask
        });
        assert_eq!(lasts, [true; 6]);
        condition.gave(RequestKind::Manifest, PrincipalId::NOBODY);
        condition.limited(RequestKind::Manifest, PrincipalId::NOBODY, None, now);
        assert_eq!(
            condition.admit(RequestKind::Manifest, PrincipalId::NOBODY, now + FIRST_LIMIT),
            Admission::Ask,
            "from the beginning"
        );
    }
}
