//! How many pulls registries still allow, as they last said. What nobody waits for is put off while few are left.

use std::sync::Arc;
use std::time::Duration;

use ::http::HeaderMap;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::times::{DAY, HOUR};

/// By rule and upstream, since a rule says with which credentials is asked.
pub(super) struct RateLimits {
    known: moka::sync::Cache<(String, String), RateLimit>,
    metrics: Arc<Metrics>,
}

#[derive(Clone, Copy)]
struct RateLimit {
    remaining: i64,
    limit: Option<i64>,
    said: Instant,
    /// Pulls are counted over this time.
    window: Duration,
}

const LIMIT: &str = "ratelimit-limit";
const REMAINING: &str = "ratelimit-remaining";

/// Few: less than one in so many.
const FEW: i64 = 4;

/// Whoever pulls chooses the registries, each of which may say something: no more are shown.
const MAX_UPSTREAMS: u64 = 100;

impl RateLimits {
    pub(super) fn new(metrics: Arc<Metrics>) -> Self {
        let shown = metrics.clone();
        let known = moka::sync::Cache::builder()
            .max_capacity(MAX_UPSTREAMS)
            .time_to_live(DAY)
            .eviction_listener(move |key: Arc<(String, String)>, _, cause| {
                if cause.was_evicted() {
                    for gauge in [&shown.upstream_rate_limit, &shown.upstream_rate_limit_remaining] {
                        // An error: it is gone already.
                        let _ = gauge.remove_label_values(&[&key.0, &key.1]);
                    }
                }
            })
            .build();
        Self { known, metrics }
    }

    /// An answer of an upstream, which may say what is left of its limit.
    pub(super) fn heard(&self, rule: &str, upstream: &str, headers: &HeaderMap, now: Instant) {
        let Some((remaining, _)) = number(headers, REMAINING) else { return };
        let (limit, window) = number(headers, LIMIT).unzip();
        // Before it is remembered, so that what is forgotten is not shown afterwards.
        self.metrics.upstream_rate_limit_remaining.with_label_values(&[rule, upstream]).set(remaining);
        if let Some(limit) = limit {
            self.metrics.upstream_rate_limit.with_label_values(&[rule, upstream]).set(limit);
        }
        let left = RateLimit { remaining, limit, said: now, window: window.flatten().unwrap_or(HOUR).min(DAY) };
        self.known.insert((rule.to_owned(), upstream.to_owned()), left);
    }

    /// What is left, as it last said.
    pub(super) fn remaining(&self, rule: &str, upstream: &str) -> Option<i64> {
        Some(self.left(rule, upstream)?.remaining)
    }

    /// Whether few are left. Some come back with time, so that after a part of the window one may ask again.
    pub(super) fn is_scarce(&self, rule: &str, upstream: &str, now: Instant) -> bool {
        let Some(left) = self.left(rule, upstream) else { return false };
        let is_few = left.limit.is_some_and(|limit| left.remaining.saturating_mul(FEW) < limit);
        is_few && now < left.said + left.window / 4
    }

    fn left(&self, rule: &str, upstream: &str) -> Option<RateLimit> {
        self.known.get(&(rule.to_owned(), upstream.to_owned()))
    }
}

/// A number that may be followed by its window in seconds, as in Docker Hub's `ratelimit-remaining: 76;w=21600`.
fn number(headers: &HeaderMap, name: &str) -> Option<(i64, Option<Duration>)> {
    let mut parts = headers.get(name)?.to_str().ok()?.split(';').map(str::trim);
    let number = parts.next()?.parse().ok()?;
    let window = parts.find_map(|part| part.strip_prefix("w=")?.parse().ok());
    Some((number, window.map(Duration::from_secs)))
}

#[cfg(test)]
mod tests {
    use prometheus::core::Collector;

    use super::*;

    fn headers(limit: &str, remaining: &str) -> HeaderMap {
        let header = |name: &'static str, value: &str| (name.parse().unwrap(), value.parse().unwrap());
        HeaderMap::from_iter([header(LIMIT, limit), header(REMAINING, remaining)])
    }

    const HUB: &str = "https://hub.io";

    fn scarcity() -> RateLimits {
        RateLimits::new(Arc::new(Metrics::new()))
    }

    #[test]
    fn few_are_left_for_a_part_of_the_window() {
        let (scarcity, start) = (scarcity(), Instant::now());
        let hear = |limit, remaining| scarcity.heard("hub", HUB, &headers(limit, remaining), start);
        let is_scarce = |upstream, seconds| scarcity.is_scarce("hub", upstream, start + Duration::from_secs(seconds));
        hear("100;w=21600", "25;w=21600");
        assert!(!is_scarce(HUB, 0), "a quarter");
        hear("100;w=21600", "24;w=21600");
        assert!(is_scarce(HUB, 0) && !is_scarce("https://other.io", 0));
        assert!(is_scarce(HUB, 5399));
        assert!(!is_scarce(HUB, 5400), "it may be asked again");
        hear("100", "1");
        assert!(!is_scarce(HUB, HOUR.as_secs() / 4));
    }

    #[test]
    fn limits_are_read_with_or_without_their_window() {
        let (scarcity, now) = (scarcity(), Instant::now());
        let heard = |limit, remaining| {
            scarcity.heard("hub", HUB, &headers(limit, remaining), now);
            scarcity.remaining("hub", HUB)
        };
        assert_eq!(heard("5", "x;w=1"), None);
        assert_eq!(heard("5 ; w=60", "-3"), Some(-3));
        scarcity.heard("hub", HUB, &HeaderMap::new(), now);
        assert!(scarcity.is_scarce("hub", HUB, now), "an answer that says nothing changes nothing");
        heard(&i64::MAX.to_string(), &i64::MAX.to_string());
    }

    #[test]
    fn what_is_forgotten_is_not_shown() {
        let metrics = Arc::new(Metrics::new());
        let scarcity = RateLimits::new(metrics.clone());
        for nth in 0..3 * MAX_UPSTREAMS {
            scarcity.heard("*", &format!("https://{nth}.io"), &headers("100", "1"), Instant::now());
        }
        scarcity.known.run_pending_tasks();
        let families = metrics.upstream_rate_limit_remaining.collect();
        let shown: Vec<&str> = families[0].get_metric().iter().map(|metric| metric.get_label()[1].value()).collect();
        assert_eq!(shown.len() as u64, MAX_UPSTREAMS);
        assert!(shown.iter().all(|upstream| scarcity.remaining("*", upstream) == Some(1)));
    }
}
