//! The way of a question through a rule's upstreams: those that are well first, the next one where one gives
//! nothing or takes long, and nobody who is not there or said "later".

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use reqwest::Response;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::UpstreamClient;
use super::health::{Admission, DownCause, Unanswered, UpstreamHealth};
use super::http::{ConnectTimeout, UpstreamRef};
use super::request::{RequestKind, UpstreamRequest};
use super::retry::{ATTEMPTS, RetryBudget};
use crate::config::Upstream;
use crate::registries::{RepositoryRef, UpstreamTrust};
use crate::source::SourceError;
use crate::times::{ALTERNATIVE_TIMEOUT, REACH_TIMEOUT, STALL_TIMEOUT};

/// Requests that waited for the end of a limit are spread over this time.
const SPREAD_MILLIS: u64 = 250;

/// Where a question goes, and whether another upstream follows.
#[derive(Clone, Copy)]
struct UpstreamTurn<'a> {
    upstream: &'a Upstream,
    trust: UpstreamTrust,
    patience: ConnectTimeout,
    deadline: Instant,
}

/// What to do after an answer.
#[derive(PartialEq, Eq)]
enum AfterResponse {
    Done,
    /// The upstream limits its requests: when that is over, or not at all.
    AskAgain,
}

impl UpstreamClient {
    /// Asks the upstreams in order until one answers with 200 or 206.
    pub(super) async fn ask(
        self: &Arc<Self>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let mut upstreams = place.rule.upstreams(&place.registry);
        let (now, who) = (Instant::now(), place.caller.who());
        upstreams.sort_by_cached_key(|(upstream, _)| {
            self.conditions.of(place, upstream).lock().rank(question.kind, who, now)
        });
        // The last one that may be asked has all the time, and so have those that may not be asked yet.
        let may_be_asked = |(upstream, _): &(Upstream, UpstreamTrust)| {
            self.conditions.of(place, upstream).lock().admit(question.kind, who, now) == Admission::Ask
        };
        let last = upstreams.iter().rposition(may_be_asked).unwrap_or(0);
        let mut turns = upstreams.iter().enumerate().map(|(nth, (upstream, trust))| UpstreamTurn {
            upstream,
            trust: *trust,
            patience: if nth >= last { ConnectTimeout::LastResort } else { ConnectTimeout::OthersFollow },
            deadline: if nth >= last { deadline } else { deadline.min(Instant::now() + REACH_TIMEOUT) },
        });
        let ask = |turn| async move { (turn, self.ask_upstream(turn, place, question).await) };
        let mut asked = FuturesUnordered::new();
        let mut waiting: Vec<UpstreamTurn<'_>> = Vec::new();
        let mut worst: Option<SourceError> = None;
        // A blob is fetched from one upstream at a time: both would send it.
        let may_hedge = !question.kind.is_blob();
        loop {
            if asked.is_empty() {
                let Some(turn) = turns.next() else { return Err(worst.unwrap_or_else(SourceError::not_found)) };
                waiting.push(turn);
                asked.push(ask(turn));
            }
            let (by, answer) = tokio::select! {
                Some(answered) = asked.next() => answered,
                () = sleep(ALTERNATIVE_TIMEOUT), if may_hedge && turns.len() > 0 => {
                    waiting.extend(turns.next());
                    asked.extend(waiting.last().copied().map(ask));
                    continue;
                }
            };
            let place_in_line = waiting.iter().position(|turn| std::ptr::eq(turn.upstream, by.upstream));
            match answer {
                Ok(response) => {
                    // Those who were asked earlier and still say nothing.
                    for turn in &waiting[..place_in_line.unwrap_or(0)] {
                        self.conditions.of(place, turn.upstream).lock().overtaken(Instant::now());
                    }
                    return Ok(response);
                }
                Err(error) => {
                    worst = Some(match worst {
                        Some(worst) => worst.severer(error),
                        None => error,
                    });
                }
            }
            place_in_line.map(|nth| waiting.remove(nth));
        }
    }

    /// Why a registry that no rule brings an upstream for is not asked, as far as its name tells.
    pub fn refusal(&self, place: &RepositoryRef) -> Option<SourceError> {
        let upstreams = place.rule.upstreams(&place.registry);
        let mut derived = upstreams.iter().filter(|(_, trust)| *trust == UpstreamTrust::Derived);
        let refused = derived.find_map(|(upstream, _)| self.http.refuses_literally(upstream).err())?;
        Some(SourceError::Guarded(refused.to_string()))
    }

    /// Why nothing would come of a question now, as far as that is known without asking.
    pub fn trouble(&self, place: &RepositoryRef) -> Option<SourceError> {
        let now = Instant::now();
        let mut worst = None;
        for (upstream, _) in place.rule.upstreams(&place.registry) {
            let known = self.conditions.known(place, &upstream)?;
            let error = match known.lock().admit(RequestKind::ManifestHead, place.caller.who(), now) {
                Admission::Ask => return None,
                Admission::Limited(until) => SourceError::Limited { again: Some(until - now) },
                Admission::Down(cause) => is_down(cause),
            };
            worst = Some(worst.map_or(error.clone(), |worst: SourceError| worst.severer(error)));
        }
        worst
    }

    /// Waits until nothing would come of a request to a place's upstreams.
    pub async fn trouble_begins(&self, place: &RepositoryRef) -> SourceError {
        loop {
            let mut in_trouble = std::pin::pin!(self.in_trouble.notified());
            in_trouble.as_mut().enable();
            if let Some(trouble) = self.trouble(place) {
                return trouble;
            }
            in_trouble.await;
        }
    }

    /// Asks one upstream, when it is its turn, and remembers what that tells of it.
    async fn ask_upstream(
        self: &Arc<Self>,
        turn: UpstreamTurn<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
    ) -> Result<Response, SourceError> {
        let condition = self.conditions.of(place, turn.upstream);
        let mut attempts = 0;
        let limits_end = turn.deadline.min(Instant::now() + STALL_TIMEOUT);
        loop {
            let now = Instant::now();
            let admission = condition.lock().admit(question.kind, place.caller.who(), now);
            match admission {
                Admission::Ask => {}
                Admission::Down(cause) => return Err(is_down(cause)),
                Admission::Limited(until) => {
                    let after = until + Duration::from_millis(fastrand::u64(..SPREAD_MILLIS));
                    // Where another follows it is asked instead.
                    if turn.patience == ConnectTimeout::OthersFollow || after >= limits_end || attempts >= ATTEMPTS {
                        return Err(SourceError::Limited { again: Some(until - now) });
                    }
                    sleep_until(after).await;
                    continue;
                }
            }
            let home = UpstreamRef {
                upstream: turn.upstream,
                trust: turn.trust,
                tls: &place.rule.tls,
                patience: turn.patience,
            };
            let mut asking = std::pin::pin!(self.ask_patiently(home, place, question, turn.deadline, &mut attempts));
            let answer = match timeout(STALL_TIMEOUT, &mut asking).await {
                Ok(answer) => answer,
                // Others need not find out; this request stays open, and its answer is proof of life.
                Err(_) => {
                    self.found_silent(turn, place, question, now);
                    asking.await
                }
            };
            let answer = match answer {
                Ok(response) => question.believe(response, turn.deadline).await,
                error => error,
            };
            let outcome = answer.as_ref().map_or_else(SourceError::as_str, |_| "ok");
            self.metrics
                .upstream_requests
                .with_label_values(&[place.rule.name(), question.kind.as_str(), outcome])
                .inc();
            if answer.is_ok() {
                let first_byte = self.metrics.upstream_first_byte.with_label_values(&[place.rule.name()]);
                first_byte.observe(now.elapsed().as_secs_f64());
            }
            if let Err(error) = &answer {
                let (upstream, kind) = (turn.upstream.base(), question.kind.as_str());
                tracing::debug!(%place, upstream, kind, %error, "upstream gave nothing");
            }
            if self.learn_from(&answer, &condition, turn, place, question, now) == AfterResponse::AskAgain {
                continue;
            }
            return answer;
        }
    }

    /// What an answer to a request of this time says of the upstream.
    fn learn_from(
        self: &Arc<Self>,
        answer: &Result<Response, SourceError>,
        condition: &Mutex<UpstreamHealth>,
        turn: UpstreamTurn<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        asked: Instant,
    ) -> AfterResponse {
        match answer {
            Err(SourceError::TimedOut) if asked.elapsed() < ALTERNATIVE_TIMEOUT => {}
            Err(SourceError::TimedOut) => self.found_silent(turn, place, question, asked),
            Err(error @ SourceError::Unreachable(_)) => {
                if condition.lock().silent(question.kind, DownCause::Unreachable, asked, Instant::now())
                    == Unanswered::Found
                {
                    self.look_after(place, turn.upstream, turn.trust, error);
                }
            }
            Err(SourceError::Limited { again }) => {
                let mut condition = condition.lock();
                condition.answered(Instant::now());
                condition.limited(question.kind, place.caller.who(), *again, Instant::now());
                self.in_trouble.notify_waiters();
                tracing::info!(%place, upstream = turn.upstream.base(), ?again, "the upstream limits its requests");
                // Where there are too many limits to remember another one, the answer stands.
                if condition.admit(question.kind, place.caller.who(), Instant::now()) != Admission::Ask {
                    return AfterResponse::AskAgain;
                }
            }
            Ok(_) => {
                let mut condition = condition.lock();
                condition.answered(Instant::now());
                condition.gave(question.kind, place.caller.who());
            }
            // It was not asked, or its token server was not to be had. Of a connection that breaks nobody knows whose
            // doing it is: it says nothing of other paths.
            Err(
                SourceError::NoCredentials(_)
                | SourceError::Busy
                | SourceError::Guarded(_)
                | SourceError::Interrupted(_),
            ) => {}
            Err(_) => condition.lock().answered(Instant::now()),
        }
        AfterResponse::Done
    }

    /// A request was not answered in time.
    fn found_silent(
        self: &Arc<Self>,
        turn: UpstreamTurn<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        asked: Instant,
    ) {
        let condition = self.conditions.of(place, turn.upstream);
        if condition.lock().silent(question.kind, DownCause::Silent, asked, Instant::now()) == Unanswered::Found {
            self.look_after(place, turn.upstream, turn.trust, &SourceError::TimedOut);
        }
    }

    /// Repeats what is likely to pass, within the deadline and the budget.
    async fn ask_patiently(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        deadline: Instant,
        attempts: &mut u32,
    ) -> Result<Response, SourceError> {
        let retries = self.retries.get_with_by_ref(&place.registry, || Arc::new(RetryBudget::new()));
        retries.earn();
        loop {
            *attempts += 1;
            let asked = Instant::now();
            match self.ask_once(home, place, question, deadline).await {
                // What took long to fail will take long again, and the client waits.
                Err(error) if error.is_passing() && asked.elapsed() < ALTERNATIVE_TIMEOUT => {
                    match retries.pause(*attempts, deadline) {
                        Some(pause) => sleep(pause).await,
                        None => return Err(error),
                    }
                }
                other => return other,
            }
        }
    }
}

fn is_down(cause: DownCause) -> SourceError {
    match cause {
        DownCause::Unreachable => {
            SourceError::Unreachable("it has not answered lately, and is asked again all the time".into())
        }
        DownCause::Silent => SourceError::TimedOut,
    }
}
