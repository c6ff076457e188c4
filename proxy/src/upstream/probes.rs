//! Probes an upstream that is down until it responds, so that no client request has to find out.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use prometheus::IntGauge;
use tokio::time::{Instant, sleep_until};

use super::UpstreamClient;
use super::http::{ConnectTimeout, UpstreamRef};
use super::request::UpstreamRequest;
use crate::config::Upstream;
use crate::registries::{RepositoryRef, UpstreamTrust};
use crate::source::SourceError;
use crate::times::{DAY, DEFAULT_TTL, HOUR, RETRY_INTERVAL, UPSTREAM_TIMEOUT};

/// The first interval between probes; it doubles up to `RETRY_INTERVAL`. Longer: recovery is noticed later. Shorter:
/// more requests to an upstream that has just failed.
const FIRST_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Probes in flight to one upstream. More: a silent upstream holds more connections. Fewer: unanswered probes block a
/// new one that would succeed.
const MAX_CONCURRENT_PROBES: usize = 4;

impl UpstreamClient {
    /// Probes until the upstream, its token endpoint included, responds, or no request has needed it for a while: a day for a
    /// configured upstream, an hour for a host that a client named, a minute for one that has never responded.
    pub(super) fn probe_until_up(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        upstream: &Upstream,
        trust: UpstreamTrust,
        error: &SourceError,
    ) {
        self.became_unavailable.notify_waiters();
        let health = self.health.of(repo_ref, upstream);
        // A host that has never responded is not an outage.
        let is_known = trust == UpstreamTrust::Configured || health.lock().has_responded();
        let (client, repo_ref, upstream, error) = (self.clone(), repo_ref.clone(), upstream.clone(), error.clone());
        tokio::spawn(async move {
            // Clients can invent names: one without an address is not probed.
            // A request that began before a reload has no say about the upstreams of now.
            if !client.registries.is_current(&repo_ref.rule) {
                health.lock().clear_down();
                return;
            }
            let may_exist = is_known || client.session(&repo_ref).http.resolves(&upstream).await;
            let probe_permits = if is_known { &client.probe_permits } else { &client.unknown_host_permits };
            let Some(_permit) = may_exist.then(|| probe_permits.clone().try_acquire_owned().ok()).flatten() else {
                health.lock().clear_down();
                return;
            };
            // A host that a client named, and that responds once, must not hold a permit for a day.
            let lasts = match (trust, is_known) {
                (UpstreamTrust::Configured, _) => DAY,
                (UpstreamTrust::Derived, true) => HOUR,
                (UpstreamTrust::Derived, false) => DEFAULT_TTL,
            };
            let (rule, base) = (repo_ref.rule.name().to_owned(), upstream.base());
            tracing::warn!(rule, upstream = base, %error, "upstream down");
            let down = is_known.then(|| client.metrics.upstream_down.with_label_values(&[repo_ref.rule.name()]));
            down.iter().for_each(IntGauge::inc);
            let request = UpstreamRequest::ping();
            let upstream_ref = UpstreamRef {
                upstream: &upstream,
                trust,
                tls: &repo_ref.rule.tls,
                connect_timeout: ConnectTimeout::LastResort,
            };
            let begun = Instant::now();
            let (mut probes, mut interval) = (FuturesUnordered::new(), FIRST_PROBE_INTERVAL);
            let (mut next, mut probed) = (begun + interval, begun);
            health.lock().record_probe(Some(error.to_string()), next, Instant::now());
            loop {
                tokio::select! {
                    Some(result) = probes.next() => {
                        if !matches!(result, Err(SourceError::TimedOut | SourceError::Unreachable(_) | SourceError::Interrupted(_))) {
                            let down = health.lock().mark_responding(Instant::now()).unwrap_or(begun.elapsed());
                            tracing::info!(rule, upstream = base, down_seconds = down.as_secs(), "upstream up");
                            break;
                        }
                    }
                    () = sleep_until(next) => {
                        let now = Instant::now();
                        // Keeps the entry of a down upstream: without use it would be dropped, and the state with it.
                        let health = client.health.of(&repo_ref, &upstream);
                        let mut health = health.lock();
                        if !health.is_down() {
                            // Another request got a response.
                            tracing::info!(rule, upstream = base, down_seconds = begun.elapsed().as_secs(), "upstream up");
                            break;
                        }
                        let is_current = client.registries.is_current(&repo_ref.rule);
                        if !is_current || !health.is_needed_within(lasts, now) {
                            health.clear_down();
                            break;
                        }
                        // Without a waiting request, a probe is sent only now and then; a new one finds out at the next tick.
                        let is_waited_for = health.is_needed_within(DEFAULT_TTL, now);
                        if probes.len() < MAX_CONCURRENT_PROBES && (is_waited_for || now >= probed + DEFAULT_TTL) {
                            probed = now;
                            probes.push(client.send_once(upstream_ref, &repo_ref, &request, Instant::now() + UPSTREAM_TIMEOUT));
                        }
                        interval = (interval * 2).min(RETRY_INTERVAL);
                        next = now + interval;
                        health.record_probe(None, next, now);
                    }
                }
            }
            down.iter().for_each(IntGauge::dec);
        });
    }
}
