//! Failover of a request through a rule's upstreams: healthy ones first, the next one if an upstream fails or is slow.
//! An upstream that is down or rate limited gets no request.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use reqwest::Response;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::UpstreamClient;
use super::health::{Admission, DownCause, FailureEffect, UpstreamHealth};
use super::http::{ConnectTimeout, UpstreamRef};
use super::request::{RequestKind, UpstreamRequest};
use super::retry::{ATTEMPTS, RetryBudget};
use crate::config::Upstream;
use crate::registries::{RepositoryRef, UpstreamTrust};
use crate::source::SourceError;
use crate::times::{ALTERNATIVE_TIMEOUT, REACH_TIMEOUT, STALL_TIMEOUT};

/// Requests that waited for the end of a rate limit are spread over this time. Longer: clients wait longer. Shorter:
/// their burst causes the next limit.
const LIMIT_END_SPREAD_MILLIS: u64 = 250;

/// One step of the failover.
#[derive(Clone, Copy)]
struct UpstreamTurn<'a> {
    upstream: &'a Upstream,
    trust: UpstreamTrust,
    connect_timeout: ConnectTimeout,
    deadline: Instant,
}

#[derive(PartialEq, Eq)]
enum AfterResponse {
    Done,
    /// The upstream limits its requests: repeat after the limit ends, or give up.
    Retry,
}

impl UpstreamClient {
    /// Sends a request to the upstreams in order until one responds with 200 or 206.
    pub(super) async fn send(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let mut upstreams = repo_ref.rule.upstreams(&repo_ref.registry);
        let (now, principal_id) = (Instant::now(), repo_ref.principal.principal_id());
        upstreams.sort_by_cached_key(|(upstream, _)| {
            self.health.of(repo_ref, upstream).lock().rank(request.kind, principal_id, now)
        });
        // The last upstream that admits the request gets the whole deadline, and so do those after it.
        let is_admitted = |(upstream, _): &(Upstream, UpstreamTrust)| {
            self.health.of(repo_ref, upstream).lock().admit(request.kind, principal_id, now) == Admission::Allowed
        };
        let last = upstreams.iter().rposition(is_admitted).unwrap_or(0);
        let mut turns = upstreams.iter().enumerate().map(|(nth, (upstream, trust))| UpstreamTurn {
            upstream,
            trust: *trust,
            connect_timeout: if nth >= last { ConnectTimeout::LastResort } else { ConnectTimeout::OthersFollow },
            deadline: if nth >= last { deadline } else { deadline.min(Instant::now() + REACH_TIMEOUT) },
        });
        let send = |turn| async move { (turn, self.send_to_upstream(turn, repo_ref, request).await) };
        let mut pending = FuturesUnordered::new();
        let mut waiting: Vec<UpstreamTurn<'_>> = Vec::new();
        let mut worst: Option<SourceError> = None;
        // Not for blobs: both upstreams would send the whole blob.
        let may_hedge = !request.kind.is_blob();
        loop {
            if pending.is_empty() {
                let Some(turn) = turns.next() else { return Err(worst.unwrap_or_else(SourceError::not_found)) };
                waiting.push(turn);
                pending.push(send(turn));
            }
            let (by, result) = tokio::select! {
                Some(finished) = pending.next() => finished,
                () = sleep(ALTERNATIVE_TIMEOUT), if may_hedge && turns.len() > 0 => {
                    waiting.extend(turns.next());
                    pending.extend(waiting.last().copied().map(send));
                    continue;
                }
            };
            let position = waiting.iter().position(|turn| std::ptr::eq(turn.upstream, by.upstream));
            match result {
                Ok(response) => {
                    // Upstreams that got the request earlier and have not responded yet.
                    for turn in &waiting[..position.unwrap_or(0)] {
                        self.health.of(repo_ref, turn.upstream).lock().mark_degraded(Instant::now());
                    }
                    return Ok(response);
                }
                Err(error) => {
                    worst = Some(match worst {
                        Some(worst) => worst.more_severe(error),
                        None => error,
                    });
                }
            }
            position.map(|nth| waiting.remove(nth));
        }
    }

    /// Why the egress policy blocks a registry without a configured upstream, as far as its name shows.
    pub fn refusal(&self, repo_ref: &RepositoryRef) -> Option<SourceError> {
        let session = self.session(repo_ref);
        let upstreams = repo_ref.rule.upstreams(&repo_ref.registry);
        let mut derived = upstreams.iter().filter(|(_, trust)| *trust == UpstreamTrust::Derived);
        let refused = derived.find_map(|(upstream, _)| session.http.check_literal(upstream).err())?;
        Some(SourceError::Blocked(refused.to_string()))
    }

    /// Why a request would fail now, as far as is known without sending one.
    pub fn trouble(&self, repo_ref: &RepositoryRef) -> Option<SourceError> {
        let now = Instant::now();
        let mut worst = None;
        for (upstream, _) in repo_ref.rule.upstreams(&repo_ref.registry) {
            let known = self.health.known(repo_ref, &upstream)?;
            let mut health = known.lock();
            let error = match health.admit(RequestKind::ManifestHead, repo_ref.principal.principal_id(), now) {
                Admission::Allowed => return None,
                Admission::Limited(until) => SourceError::Limited { again: Some(until - now) },
                Admission::Down(cause) => down_error(cause, &upstream, &health),
            };
            worst = Some(worst.map_or(error.clone(), |worst: SourceError| worst.more_severe(error)));
        }
        worst
    }

    /// Waits until a request to the upstreams of this repository would fail.
    pub async fn until_unavailable(&self, repo_ref: &RepositoryRef) -> SourceError {
        loop {
            let mut became_unavailable = std::pin::pin!(self.became_unavailable.notified());
            became_unavailable.as_mut().enable();
            if let Some(trouble) = self.trouble(repo_ref) {
                return trouble;
            }
            became_unavailable.await;
        }
    }

    /// Sends a request to one upstream and records what the result says about its health.
    async fn send_to_upstream(
        self: &Arc<Self>,
        turn: UpstreamTurn<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
    ) -> Result<Response, SourceError> {
        let health = self.health.of(repo_ref, turn.upstream);
        let mut attempts = 0;
        let limits_end = turn.deadline.min(Instant::now() + STALL_TIMEOUT);
        loop {
            let now = Instant::now();
            let admission = health.lock().admit(request.kind, repo_ref.principal.principal_id(), now);
            match admission {
                Admission::Allowed => {}
                Admission::Down(cause) => return Err(down_error(cause, turn.upstream, &health.lock())),
                Admission::Limited(until) => {
                    let after = until + Duration::from_millis(fastrand::u64(..LIMIT_END_SPREAD_MILLIS));
                    // If another upstream follows, it gets the request instead.
                    if turn.connect_timeout == ConnectTimeout::OthersFollow
                        || after >= limits_end
                        || attempts >= ATTEMPTS
                    {
                        return Err(SourceError::Limited { again: Some(until - now) });
                    }
                    sleep_until(after).await;
                    continue;
                }
            }
            let upstream_ref = UpstreamRef {
                upstream: turn.upstream,
                trust: turn.trust,
                tls: &repo_ref.rule.tls,
                connect_timeout: turn.connect_timeout,
            };
            let mut attempt =
                std::pin::pin!(self.send_with_retries(upstream_ref, repo_ref, request, turn.deadline, &mut attempts));
            let result = match timeout(STALL_TIMEOUT, &mut attempt).await {
                Ok(result) => result,
                // Other requests fail fast from now on. This one stays open: its response marks the upstream as up.
                Err(_) => {
                    self.record_timeout(turn, repo_ref, request, now);
                    attempt.await
                }
            };
            let result = match result {
                Ok(response) => request.validate(response, turn.deadline).await,
                error => error,
            };
            let outcome = result.as_ref().map_or_else(SourceError::as_str, |_| "ok");
            self.metrics
                .upstream_requests
                .with_label_values(&[repo_ref.rule.name(), request.kind.as_str(), outcome])
                .inc();
            if result.is_ok() {
                let first_byte = self.metrics.upstream_first_byte.with_label_values(&[repo_ref.rule.name()]);
                first_byte.observe(now.elapsed().as_secs_f64());
            }
            if let Err(error) = &result {
                let (upstream, kind) = (turn.upstream.base(), request.kind.as_str());
                tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, upstream, kind, %error, "upstream request failed");
            }
            if self.record_outcome(&result, &health, turn, repo_ref, request, now) == AfterResponse::Retry {
                continue;
            }
            return result;
        }
    }

    /// Records what a result says about the upstream's health.
    fn record_outcome(
        self: &Arc<Self>,
        result: &Result<Response, SourceError>,
        health: &Mutex<UpstreamHealth>,
        turn: UpstreamTurn<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        sent_at: Instant,
    ) -> AfterResponse {
        match result {
            Err(SourceError::TimedOut) if sent_at.elapsed() < ALTERNATIVE_TIMEOUT => {}
            Err(SourceError::TimedOut) => self.record_timeout(turn, repo_ref, request, sent_at),
            Err(error @ SourceError::Unreachable(_)) => {
                if health.lock().mark_unresponsive(request.kind, DownCause::Unreachable, sent_at, Instant::now())
                    == FailureEffect::WentDown
                {
                    self.probe_until_up(repo_ref, turn.upstream, turn.trust, error);
                }
            }
            Err(SourceError::Limited { again }) => {
                let mut health = health.lock();
                health.mark_responding(Instant::now());
                health.mark_rate_limited(request.kind, repo_ref.principal.principal_id(), *again, Instant::now());
                self.became_unavailable.notify_waiters();
                let upstream = turn.upstream.base();
                tracing::info!(registry = %repo_ref.registry, repository = %repo_ref.repository, upstream, retry_after_seconds = again.map(|again| again.as_secs()), "upstream rate limited");
                // If there were too many limits to remember this one, the response is final.
                if health.admit(request.kind, repo_ref.principal.principal_id(), Instant::now()) != Admission::Allowed {
                    return AfterResponse::Retry;
                }
            }
            Ok(_) => {
                let mut health = health.lock();
                health.mark_responding(Instant::now());
                health.clear_limit(request.kind, repo_ref.principal.principal_id());
            }
            // The upstream got no request, or its token was not available. A broken connection may be due to a filter
            // for one path and says nothing about others.
            Err(SourceError::NoCredentials(_) | SourceError::Busy | SourceError::Interrupted(_)) => {}
            Err(SourceError::Blocked(error)) => {
                self.blocked.insert((repo_ref.rule.name().to_owned(), turn.upstream.base()), error.clone());
            }
            Err(_) => {
                health.lock().mark_responding(Instant::now());
            }
        }
        AfterResponse::Done
    }

    /// A request got no response in time.
    fn record_timeout(
        self: &Arc<Self>,
        turn: UpstreamTurn<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        sent_at: Instant,
    ) {
        let health = self.health.of(repo_ref, turn.upstream);
        if health.lock().mark_unresponsive(request.kind, DownCause::Silent, sent_at, Instant::now())
            == FailureEffect::WentDown
        {
            self.probe_until_up(repo_ref, turn.upstream, turn.trust, &SourceError::TimedOut);
        }
    }

    /// Repeats a request after a transient error, within the deadline and the retry budget.
    async fn send_with_retries(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        deadline: Instant,
        attempts: &mut u32,
    ) -> Result<Response, SourceError> {
        let retries = self.retries.get_with_by_ref(&repo_ref.registry, || Arc::new(RetryBudget::new()));
        retries.earn();
        loop {
            *attempts += 1;
            let sent_at = Instant::now();
            match self.send_once(upstream_ref, repo_ref, request, deadline).await {
                // A slow failure is likely to be slow again, while the client waits.
                Err(error) if error.is_transient() && sent_at.elapsed() < ALTERNATIVE_TIMEOUT => {
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

fn down_error(cause: DownCause, upstream: &Upstream, health: &UpstreamHealth) -> SourceError {
    match cause {
        DownCause::Unreachable => SourceError::Unreachable(health.describe_down(&upstream.base(), Instant::now())),
        DownCause::Silent => SourceError::TimedOut,
    }
}
