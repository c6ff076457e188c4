//! The circuit breaker of an upstream. Decisions only: the clock, requests and probes come from outside.
//!
//! | state | breaker | requests |
//! |---|---|---|
//! | unknown | closed | allowed; no response yet, or none for `OBSERVATION_TTL` |
//! | healthy | closed | allowed |
//! | degraded | closed | allowed, other upstreams come first |
//! | rate limited | open for one request kind and principal | rejected until the limit ends |
//! | down | open; probes are the half-open requests | rejected |
//!
//! | event | from | to |
//! |---|---|---|
//! | response with any status, also to a probe | any | healthy; rate limits stay |
//! | status 200 or 206 | rate limited | this limit and its backoff end |
//! | 429, or 503 with `Retry-After` | any | rate limited for `Retry-After`, else 5 s, 10 s ... 60 s |
//! | no response to a manifest request | all but down | down; unchanged if another response came meanwhile |
//! | no response to a blob or list request | all but down | degraded for `PAUSE`; unchanged likewise |
//! | another upstream responded first | any | degraded for `PAUSE` |
//! | a day without a request (60 s for a host that never responded), or no probe possible | down | unknown |
//!
//! A connection that breaks during a request changes nothing: a filter may do so for one path.

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
use crate::times::{DEFAULT_TTL, FIRST_RETRY_DELAY, HOUR, OBSERVATION_TTL, PAUSE};

/// Health by rule and upstream, since rules may use different credentials. Entries without use for `OBSERVATION_TTL`
/// are dropped.
pub(super) struct UpstreamStates(moka::sync::Cache<HealthKey, Arc<Mutex<UpstreamHealth>>>);

#[derive(Clone, PartialEq, Eq, Hash)]
struct HealthKey {
    /// A rule that a reload has changed may have other credentials or roots: it starts anew.
    rule_id: u64,
    rule: String,
    upstream: String,
}

#[derive(Default)]
pub(super) struct UpstreamHealth {
    /// Set while the breaker is open.
    down: Option<DownState>,
    last_response: Option<Instant>,
    /// When it responded for the first time, or again after it was down.
    up_since: Option<Instant>,
    /// Why it last went down, and when.
    last_error: Option<(String, Instant)>,
    /// Until then other upstreams come first.
    degraded_until: Option<Instant>,
    /// By principal too, since registries count requests by account.
    limits: HashMap<(RequestKind, PrincipalId), RateLimited>,
}

struct DownState {
    cause: DownCause,
    since: Instant,
    /// When a request last needed the upstream.
    last_needed: Instant,
    next_probe: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DownCause {
    /// It accepts requests but does not respond in time; it may only be slow.
    Silent,
    /// No connection can be opened.
    Unreachable,
}

/// The rate limit of one request kind and principal.
#[derive(Clone, Copy)]
struct RateLimited {
    until: Instant,
    /// Limits without a usable `Retry-After` since the last success.
    strikes: u32,
}

/// Whether a request may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Admission {
    Allowed,
    /// The rate limit ends then.
    Limited(Instant),
    /// Its breaker is open.
    Down(DownCause),
}

/// The effect of a request without a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureEffect {
    /// The breaker has opened.
    WentDown,
    /// It was open already, the upstream has responded since, or it is only degraded.
    Unchanged,
}

/// Rate limits that are remembered for one upstream. More: more memory. Fewer: requests of further principals are sent
/// although the upstream rejects them.
const MAX_LIMITS: usize = 1_000;

/// Upstreams whose health is remembered. More: more memory. Fewer: requests to a forgotten one find out again.
const MAX_UPSTREAMS: u64 = 10_000;

/// Duration of a limit without `Retry-After`; it doubles up to `DEFAULT_TTL`. Longer: clients wait longer than needed.
/// Shorter: more requests that the upstream rejects.
const FIRST_LIMIT_DURATION: Duration = Duration::from_secs(5);

/// The state of an upstream for operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpstreamView {
    /// The rule that uses it.
    pub rule: String,
    pub upstream: String,
    /// A state of the table at the head; `rate_limited` if any limit is active; `blocked` by the egress policy.
    pub state: String,
    /// How long it has been in the state, if that is `healthy` or `down`.
    pub since_seconds: Option<u64>,
    /// Until its longest rate limit ends.
    pub rate_limited_seconds: Option<u64>,
    /// Until the next probe, if it is down.
    pub next_probe_seconds: Option<f64>,
    /// Why it last went down, or why the host is blocked.
    pub last_error: Option<String>,
    /// How long ago that was.
    pub last_error_seconds: Option<u64>,
    /// From its last response with rate limit headers.
    pub rate_limit_remaining: Option<i64>,
    /// Valid tokens that dray holds for it.
    #[serde(default)]
    pub tokens: usize,
}

/// Values of an `UpstreamView` that other modules know.
pub(super) struct KnownHealth {
    pub(super) remaining: Option<i64>,
    pub(super) tokens: usize,
}

impl UpstreamView {
    /// A host that the egress policy blocks.
    pub(super) fn blocked(rule: &str, upstream: &str, error: &str) -> Self {
        Self {
            rule: rule.to_owned(),
            upstream: upstream.to_owned(),
            state: "blocked".to_owned(),
            since_seconds: None,
            rate_limited_seconds: None,
            next_probe_seconds: None,
            last_error: Some(error.to_owned()),
            last_error_seconds: None,
            rate_limit_remaining: None,
            tokens: 0,
        }
    }
}

impl UpstreamStates {
    /// All upstreams with recent requests, sorted by rule and URL.
    pub(super) fn views(
        &self,
        is_current: impl Fn(u64) -> bool,
        known: impl Fn(&str, &str) -> KnownHealth,
    ) -> Vec<UpstreamView> {
        let now = Instant::now();
        let view = |(key, health): (Arc<HealthKey>, Arc<Mutex<UpstreamHealth>>)| {
            let health = health.lock();
            let (state, limited) = health.state(now);
            // A host that was blocked or has never responded is not listed: clients can invent names.
            if state == "unknown" || !is_current(key.rule_id) {
                return None;
            }
            let known = known(&key.rule, &key.upstream);
            Some(UpstreamView {
                rate_limit_remaining: known.remaining,
                tokens: known.tokens,
                rule: key.rule.clone(),
                upstream: key.upstream.clone(),
                state: state.to_owned(),
                since_seconds: health.since(state).map(|since| now.saturating_duration_since(since).as_secs()),
                rate_limited_seconds: limited.map(|limited| limited.as_secs()),
                next_probe_seconds: health.next_probe().map(|at| at.saturating_duration_since(now).as_secs_f64()),
                last_error: health.last_error.as_ref().map(|(error, _)| error.clone()),
                last_error_seconds: health
                    .last_error
                    .as_ref()
                    .map(|(_, at)| now.saturating_duration_since(*at).as_secs()),
            })
        };
        let mut views: Vec<UpstreamView> = self.0.iter().filter_map(view).collect();
        views.sort_by(|a, b| (&a.rule, &a.upstream).cmp(&(&b.rule, &b.upstream)));
        views
    }

    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(MAX_UPSTREAMS).time_to_idle(OBSERVATION_TTL).build())
    }

    pub(super) fn of(&self, repo_ref: &RepositoryRef, upstream: &Upstream) -> Arc<Mutex<UpstreamHealth>> {
        self.0.get_with(HealthKey::new(repo_ref, upstream), Arc::default)
    }

    /// None: the upstream got no request recently.
    pub(super) fn known(&self, repo_ref: &RepositoryRef, upstream: &Upstream) -> Option<Arc<Mutex<UpstreamHealth>>> {
        self.0.get(&HealthKey::new(repo_ref, upstream))
    }
}

impl HealthKey {
    fn new(repo_ref: &RepositoryRef, upstream: &Upstream) -> Self {
        Self { rule_id: repo_ref.rule.id, rule: repo_ref.rule.name().to_owned(), upstream: upstream.base() }
    }
}

impl UpstreamHealth {
    pub(super) fn has_responded(&self) -> bool {
        self.last_response.is_some()
    }

    /// Whether a request may be sent. A rejected request keeps the probes running.
    pub(super) fn admit(&mut self, kind: RequestKind, principal_id: PrincipalId, now: Instant) -> Admission {
        if let Some(down) = &mut self.down {
            down.last_needed = now;
            return Admission::Down(down.cause);
        }
        match self.limits.get(&(kind, principal_id)) {
            Some(limit) if limit.until > now => Admission::Limited(limit.until),
            _ => Admission::Allowed,
        }
    }

    /// The state for operators, with the time until the longest rate limit ends.
    fn state(&self, now: Instant) -> (&'static str, Option<Duration>) {
        let limited = self.limits.values().filter_map(|limit| limit.until.checked_duration_since(now)).max();
        let limited = limited.filter(|left| !left.is_zero());
        let is_degraded = self.degraded_until.is_some_and(|until| until > now);
        let state = match (&self.down, limited) {
            (Some(_), _) => "down",
            (None, Some(_)) => "rate_limited",
            (None, None) if is_degraded => "degraded",
            (None, None) if self.last_response.is_none_or(|at| at + OBSERVATION_TTL <= now) => "unknown",
            (None, None) => "healthy",
        };
        (state, limited)
    }

    fn since(&self, state: &str) -> Option<Instant> {
        match state {
            "down" => self.down.as_ref().map(|down| down.since),
            "healthy" => self.up_since,
            _ => None,
        }
    }

    fn next_probe(&self) -> Option<Instant> {
        self.down.as_ref()?.next_probe
    }

    /// For clients and operators: since when, why, and when dray tries again.
    pub(super) fn describe_down(&self, upstream: &str, now: Instant) -> String {
        let Some(down) = &self.down else { return format!("{upstream} is down") };
        let since = now.saturating_duration_since(down.since).as_secs();
        let error = self.last_error.as_ref().map_or(String::new(), |(error, _)| format!(" ({error})"));
        let probe = down.next_probe.map_or(0, |at| at.saturating_duration_since(now).as_secs() + 1);
        format!("{upstream} has been down for {since} s{error}; next probe in {probe} s")
    }

    /// The breaker has opened, and the upstream is probed.
    pub(super) fn record_probe(&mut self, error: Option<String>, next: Instant, now: Instant) {
        if let Some(error) = error {
            self.last_error = Some((error, now));
        }
        if let Some(down) = &mut self.down {
            down.next_probe = Some(next);
        }
    }

    /// The sort key of failover: upstreams that are likely to respond come first.
    pub(super) fn rank(&mut self, kind: RequestKind, principal_id: PrincipalId, now: Instant) -> (Admission, bool) {
        (self.admit(kind, principal_id, now), self.degraded_until.is_some_and(|until| until > now))
    }

    /// The upstream responded, with any status. Returns how long it was down.
    pub(super) fn mark_responding(&mut self, now: Instant) -> Option<Duration> {
        let down = self.down.take();
        if down.is_some() || self.last_response.is_none() {
            self.up_since = Some(now);
        }
        self.degraded_until = None;
        self.last_response = Some(now);
        down.map(|down| now.saturating_duration_since(down.since))
    }

    /// A request succeeded, so its rate limit is over.
    pub(super) fn clear_limit(&mut self, kind: RequestKind, principal_id: PrincipalId) {
        self.limits.remove(&(kind, principal_id));
    }

    /// A `retry_after` below one second counts as missing: a retry at once would meet the same limit.
    pub(super) fn mark_rate_limited(
        &mut self,
        kind: RequestKind,
        principal_id: PrincipalId,
        retry_after: Option<Duration>,
        now: Instant,
    ) {
        let retry_after = retry_after.filter(|retry_after| *retry_after >= FIRST_RETRY_DELAY);
        let strikes = self.limits.get(&(kind, principal_id)).map_or(0, |limit| limit.strikes);
        let backoff = (FIRST_LIMIT_DURATION * (1 << strikes.min(8))).min(DEFAULT_TTL);
        let until = now + retry_after.map_or(backoff, |retry_after| retry_after.min(HOUR));
        if self.limits.len() >= MAX_LIMITS {
            self.limits.retain(|_, limit| limit.until > now);
        }
        if self.limits.len() < MAX_LIMITS || self.limits.contains_key(&(kind, principal_id)) {
            self.limits.insert(
                (kind, principal_id),
                RateLimited { until, strikes: strikes + u32::from(retry_after.is_none()) },
            );
        }
    }

    /// Another upstream responded first.
    pub(super) fn mark_degraded(&mut self, now: Instant) {
        self.degraded_until = Some(now + PAUSE);
    }

    /// A request that was sent at `sent` got no response.
    pub(super) fn mark_unresponsive(
        &mut self,
        kind: RequestKind,
        cause: DownCause,
        sent: Instant,
        now: Instant,
    ) -> FailureEffect {
        if self.last_response.is_some_and(|at| at >= sent) || self.down.is_some() {
            return FailureEffect::Unchanged;
        }
        if !kind.silence_means_down() {
            self.degraded_until = Some(now + PAUSE);
            return FailureEffect::Unchanged;
        }
        self.down = Some(DownState { cause, since: now, last_needed: now, next_probe: None });
        FailureEffect::WentDown
    }

    /// Whether the upstream is down and a request has needed it within this time.
    pub(super) fn is_needed_within(&self, time: Duration, now: Instant) -> bool {
        self.down.as_ref().is_some_and(|down| now < down.last_needed + time)
    }

    pub(super) fn is_down(&self) -> bool {
        self.down.is_some()
    }

    /// No probe runs: the next request has to find out. Nothing is known until then.
    pub(super) fn clear_down(&mut self) {
        // Another request may have found out meanwhile that it responds.
        if self.down.take().is_some() {
            (self.last_response, self.up_since) = (None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn silent_upstream_is_down_until_it_responds() {
        let (mut health, start) = (UpstreamHealth::default(), Instant::now());
        assert_eq!(
            health.mark_unresponsive(RequestKind::ManifestHead, DownCause::Silent, start, start + seconds(3)),
            FailureEffect::WentDown
        );
        assert_eq!(
            health.mark_unresponsive(RequestKind::Manifest, DownCause::Silent, start, start + seconds(4)),
            FailureEffect::Unchanged,
            "it is down already"
        );
        assert_eq!(
            health.admit(RequestKind::Blob, PrincipalId::ANONYMOUS, start + seconds(50)),
            Admission::Down(DownCause::Silent)
        );
        let needed = |now: u64| health.is_needed_within(seconds(60), start + seconds(now));
        assert!(needed(109) && !needed(110), "a rejected request needs it as well");
        health.mark_responding(start + seconds(60));
        assert_eq!(health.admit(RequestKind::Blob, PrincipalId::ANONYMOUS, start + seconds(60)), Admission::Allowed);
        let (before, after) = (start + seconds(59), start + seconds(70));
        assert_eq!(
            health.mark_unresponsive(RequestKind::Manifest, DownCause::Silent, before, after),
            FailureEffect::Unchanged,
            "another request got a response meanwhile"
        );
    }

    #[test]
    fn silent_blobs_and_lists_only_degrade() {
        for kind in [RequestKind::Blob, RequestKind::BlobHead, RequestKind::List] {
            let (mut health, start) = (UpstreamHealth::default(), Instant::now());
            assert_eq!(health.mark_unresponsive(kind, DownCause::Silent, start, start), FailureEffect::Unchanged);
            assert_eq!(health.rank(RequestKind::Manifest, PrincipalId::ANONYMOUS, start), (Admission::Allowed, true));
            assert_eq!(
                health.rank(RequestKind::Manifest, PrincipalId::ANONYMOUS, start + PAUSE),
                (Admission::Allowed, false)
            );
        }
    }

    #[test]
    fn rate_limit_covers_one_kind_until_retry_after() {
        let (mut health, start) = (UpstreamHealth::default(), Instant::now());
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, Some(seconds(7)), start);
        assert_eq!(
            health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, start + seconds(6)),
            Admission::Limited(start + seconds(7))
        );
        assert_eq!(health.admit(RequestKind::ManifestHead, PrincipalId::ANONYMOUS, start), Admission::Allowed);
        assert_eq!(health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, start + seconds(7)), Admission::Allowed);
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, Some(seconds(1_000_000)), start);
        assert_eq!(
            health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, start + HOUR),
            Admission::Allowed,
            "a limit is at most an hour"
        );
    }

    #[test]
    fn rate_limit_covers_one_principal() {
        let (mut health, start) = (UpstreamHealth::default(), Instant::now());
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, Some(seconds(7)), start);
        assert_eq!(health.admit(RequestKind::Manifest, PrincipalId([7; 16]), start), Admission::Allowed);
        let principal_id = |nth: usize| PrincipalId(u128::try_from(nth).unwrap().to_be_bytes());
        (0..2 * MAX_LIMITS).for_each(|nth| {
            health.mark_rate_limited(RequestKind::Manifest, principal_id(nth), Some(seconds(7)), start);
        });
        assert_eq!(health.limits.len(), MAX_LIMITS);
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId([9; 16]), Some(seconds(7)), start + seconds(8));
        assert_eq!(health.limits.len(), 1, "expired limits make room");
    }

    #[test]
    fn down_lasts_until_a_response_and_an_idle_upstream_is_unknown() {
        let (mut health, start) = (UpstreamHealth::default(), Instant::now());
        let at = |minutes: u64| start + seconds(60 * minutes);
        assert_eq!(health.mark_responding(start), None);
        assert_eq!((health.state(at(9)).0, health.since("healthy")), ("healthy", Some(start)));
        assert_eq!(health.state(at(10)).0, "unknown", "no response for ten minutes");
        health.mark_unresponsive(RequestKind::Manifest, DownCause::Unreachable, at(11), at(11));
        health.record_probe(Some("no route".into()), at(12), at(11));
        assert_eq!((health.state(at(500)).0, health.since("down")), ("down", Some(at(11))));
        assert_eq!(health.next_probe(), Some(at(12)));
        assert_eq!(health.mark_responding(at(500)), Some(seconds(60 * 489)));
        assert_eq!((health.state(at(501)).0, health.since("healthy")), ("healthy", Some(at(500))));
        assert_eq!(health.last_error, Some(("no route".into(), at(11))), "still known after the recovery");
        health.mark_unresponsive(RequestKind::Manifest, DownCause::Silent, at(502), at(502));
        health.clear_down();
        assert_eq!(health.state(at(502)).0, "unknown", "no probe has shown that it responds");
    }

    #[test]
    fn state_shows_the_worst_condition() {
        let (mut health, now) = (UpstreamHealth::default(), Instant::now());
        assert_eq!(health.state(now), ("unknown", None));
        health.mark_degraded(now);
        assert_eq!(health.state(now), ("degraded", None));
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, Some(seconds(7)), now);
        assert_eq!(health.state(now), ("rate_limited", Some(seconds(7))));
        health.mark_unresponsive(RequestKind::Manifest, DownCause::Silent, now, now);
        assert_eq!(health.state(now).0, "down");
    }

    #[test]
    fn retry_after_below_a_second_is_ignored() {
        let (mut health, start) = (UpstreamHealth::default(), Instant::now());
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, Some(Duration::ZERO), start);
        assert_eq!(
            health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, start),
            Admission::Limited(start + FIRST_LIMIT_DURATION)
        );
        health.mark_rate_limited(
            RequestKind::Manifest,
            PrincipalId::ANONYMOUS,
            Some(Duration::from_millis(999)),
            start,
        );
        assert_eq!(
            health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, start),
            Admission::Limited(start + FIRST_LIMIT_DURATION * 2)
        );
    }

    #[test]
    fn rate_limit_without_retry_after_backs_off() {
        let (mut health, mut now) = (UpstreamHealth::default(), Instant::now());
        let lasts = [5, 10, 20, 40, 60, 60].map(|lasts| {
            health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, None, now);
            let is_limited = health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, now + seconds(lasts - 1))
                != Admission::Allowed;
            now += seconds(lasts);
            is_limited && health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, now) == Admission::Allowed
        });
        assert_eq!(lasts, [true; 6]);
        health.clear_limit(RequestKind::Manifest, PrincipalId::ANONYMOUS);
        health.mark_rate_limited(RequestKind::Manifest, PrincipalId::ANONYMOUS, None, now);
        assert_eq!(
            health.admit(RequestKind::Manifest, PrincipalId::ANONYMOUS, now + FIRST_LIMIT_DURATION),
            Admission::Allowed,
            "the backoff starts again"
        );
    }
}
