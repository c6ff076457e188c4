//! Rate limits of upstreams, as their responses state them. Background work waits while few pulls remain.

use std::sync::Arc;
use std::time::Duration;

use ::http::HeaderMap;
use tokio::time::Instant;

use crate::metrics::Metrics;
use crate::times::{DAY, HOUR};

/// By rule and upstream, since rules may use different credentials.
pub(super) struct RateLimits {
    known: moka::sync::Cache<(String, String), RateLimit>,
    metrics: Arc<Metrics>,
}

#[derive(Clone, Copy)]
struct RateLimit {
    remaining: i64,
    limit: Option<i64>,
    updated: Instant,
    /// Pulls are counted over this time.
    window: Duration,
}

const LIMIT: &str = "ratelimit-limit";
const REMAINING: &str = "ratelimit-remaining";

/// A limit is low if less than one in this many remains. Larger: background work uses more of the limit. Smaller: it
/// waits earlier.
const LOW_LIMIT_DIVISOR: i64 = 4;

/// Upstreams whose limits are known: clients choose the registries. More: more series in the metrics. Fewer: limits are
/// forgotten.
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
                        // An error means that the series is gone already.
                        let _ = gauge.remove_label_values(&[&key.0, &key.1]);
                    }
                }
            })
            .build();
        Self { known, metrics }
    }

    /// Reads the rate limit headers of a response, if it has any.
    pub(super) fn update(&self, rule: &str, upstream: &str, headers: &HeaderMap, now: Instant) {
        let Some((remaining, _)) = number(headers, REMAINING) else { return };
        let (limit, window) = number(headers, LIMIT).unzip();
        // Set before the insert: an eviction that came first would leave the series behind.
        self.metrics.upstream_rate_limit_remaining.with_label_values(&[rule, upstream]).set(remaining);
        if let Some(limit) = limit {
            self.metrics.upstream_rate_limit.with_label_values(&[rule, upstream]).set(limit);
        }
        let left = RateLimit { remaining, limit, updated: now, window: window.flatten().unwrap_or(HOUR).min(DAY) };
        self.known.insert((rule.to_owned(), upstream.to_owned()), left);
    }

    /// From the last response with rate limit headers.
    pub(super) fn remaining(&self, rule: &str, upstream: &str) -> Option<i64> {
        Some(self.left(rule, upstream)?.remaining)
    }

    /// Whether few pulls remain. After a quarter of the window this is false, since some are available again.
    pub(super) fn is_rate_limit_low(&self, rule: &str, upstream: &str, now: Instant) -> bool {
        let Some(left) = self.left(rule, upstream) else { return false };
        let is_low = left.limit.is_some_and(|limit| left.remaining.saturating_mul(LOW_LIMIT_DIVISOR) < limit);
        is_low && now < left.updated + left.window / 4
    }

    fn left(&self, rule: &str, upstream: &str) -> Option<RateLimit> {
        self.known.get(&(rule.to_owned(), upstream.to_owned()))
    }
}

/// A number, optionally with its window in seconds, as in Docker Hub's `ratelimit-remaining: 76;w=21600`.
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

    fn rate_limits() -> RateLimits {
        RateLimits::new(Arc::new(Metrics::new()))
    }

    #[test]
    fn low_limit_lasts_a_quarter_of_the_window() {
        let (rate_limits, start) = (rate_limits(), Instant::now());
        let update = |limit, remaining| rate_limits.update("hub", HUB, &headers(limit, remaining), start);
        let is_rate_limit_low =
            |upstream, seconds| rate_limits.is_rate_limit_low("hub", upstream, start + Duration::from_secs(seconds));
        update("100;w=21600", "25;w=21600");
        assert!(!is_rate_limit_low(HUB, 0), "exactly a quarter");
        update("100;w=21600", "24;w=21600");
        assert!(is_rate_limit_low(HUB, 0) && !is_rate_limit_low("https://other.io", 0));
        assert!(is_rate_limit_low(HUB, 5399));
        assert!(!is_rate_limit_low(HUB, 5400), "a part is available again");
        update("100", "1");
        assert!(!is_rate_limit_low(HUB, HOUR.as_secs() / 4));
    }

    #[test]
    fn limit_is_parsed_with_and_without_window() {
        let (rate_limits, now) = (rate_limits(), Instant::now());
        let update = |limit, remaining| {
            rate_limits.update("hub", HUB, &headers(limit, remaining), now);
            rate_limits.remaining("hub", HUB)
        };
        assert_eq!(update("5", "x;w=1"), None);
        assert_eq!(update("5 ; w=60", "-3"), Some(-3));
        rate_limits.update("hub", HUB, &HeaderMap::new(), now);
        assert!(rate_limits.is_rate_limit_low("hub", HUB, now), "a response without the headers changes nothing");
        update(&i64::MAX.to_string(), &i64::MAX.to_string());
    }

    #[test]
    fn evicted_limit_has_no_metric() {
        let metrics = Arc::new(Metrics::new());
        let rate_limits = RateLimits::new(metrics.clone());
        for nth in 0..3 * MAX_UPSTREAMS {
            rate_limits.update("*", &format!("https://{nth}.io"), &headers("100", "1"), Instant::now());
        }
        rate_limits.known.run_pending_tasks();
        let families = metrics.upstream_rate_limit_remaining.collect();
        let shown: Vec<&str> = families[0].get_metric().iter().map(|metric| metric.get_label()[1].value()).collect();
        assert_eq!(shown.len() as u64, MAX_UPSTREAMS);
        assert!(shown.iter().all(|upstream| rate_limits.remaining("*", upstream) == Some(1)));
    }
}
