//! Looks after an upstream that is down until somebody answers, so that no client has to find out.

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
use crate::times::{RETRY_INTERVAL, UPSTREAM_TIMEOUT};

/// It is asked again after this long, then twice as long, and so on.
const FIRST_LOOK: Duration = Duration::from_millis(250);

/// One that swallows questions is asked anew meanwhile: it may answer those that come later.
const MOST_LOOKS: usize = 4;

impl UpstreamClient {
    /// Asks whether anybody is there, token endpoint included, again and again until somebody is.
    pub(super) fn look_after(
        self: &Arc<Self>,
        place: &RepositoryRef,
        upstream: &Upstream,
        trust: UpstreamTrust,
        why: &SourceError,
    ) {
        self.in_trouble.notify_waiters();
        let condition = self.conditions.of(place, upstream);
        // Hosts that never were there are nobody's outage.
        let is_known = trust == UpstreamTrust::Written || condition.lock().has_answered();
        let (origin, place, upstream, why) = (self.clone(), place.clone(), upstream.clone(), why.clone());
        tokio::spawn(async move {
            // Clients can invent names.
            let may_exist = is_known || origin.http.resolves(&upstream).await;
            let watches = if is_known { &origin.watches } else { &origin.of_strangers };
            let Some(_watch) = may_exist.then(|| watches.clone().try_acquire_owned().ok()).flatten() else {
                condition.lock().forget();
                return;
            };
            tracing::warn!(rule = place.rule.name(), upstream = upstream.base(), %why, "an upstream does not answer");
            let down = is_known.then(|| origin.metrics.upstream_down.with_label_values(&[place.rule.name()]));
            down.iter().for_each(IntGauge::inc);
            let question = UpstreamRequest::is_anybody_there();
            let home =
                UpstreamRef { upstream: &upstream, trust, tls: &place.rule.tls, patience: ConnectTimeout::LastResort };
            let (mut looks, mut pause) = (FuturesUnordered::new(), FIRST_LOOK);
            let mut next = Instant::now() + pause;
            loop {
                tokio::select! {
                    Some(answer) = looks.next() => {
                        if !matches!(answer, Err(SourceError::TimedOut | SourceError::Unreachable(_) | SourceError::Interrupted(_))) {
                            condition.lock().answered(Instant::now());
                            tracing::info!(rule = place.rule.name(), upstream = upstream.base(), "an upstream answers again");
                            break;
                        }
                    }
                    () = sleep_until(next) => {
                        if !condition.lock().is_wanted(Instant::now()) {
                            condition.lock().forget();
                            break;
                        }
                        if looks.len() < MOST_LOOKS {
                            looks.push(origin.ask_once(home, &place, &question, Instant::now() + UPSTREAM_TIMEOUT));
                        }
                        pause = (pause * 2).min(RETRY_INTERVAL);
                        next = Instant::now() + pause;
                    }
                }
            }
            down.iter().for_each(IntGauge::dec);
        });
    }
}
