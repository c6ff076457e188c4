//! Measured speeds of upstreams and cross-zone peers, for rules with `cross_zone_peers = "unless-slower"`.

use std::time::Duration;

use crate::times::OBSERVATION_TTL;

/// Measured speeds by the name of a rule. They expire, so that a source that was slow is tried again.
pub(super) struct ThroughputEstimates {
    upstream: moka::sync::Cache<String, Average>,
    cross_zone: moka::sync::Cache<String, Average>,
}

/// The source of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Upstream,
    /// Cross-zone peers, mostly the owner of all zones.
    CrossZone,
}

/// Moving average in bytes a second.
#[derive(Clone, Copy)]
struct Average {
    rate: f64,
    count: u32,
}

/// Smallest blob that is measured, in bytes. Larger: fewer measurements. Smaller: the time is mostly latency.
const MIN_MEASURED_BYTES: u64 = 1024 * 1024;

/// Blobs that have to be measured from each source. More: a faster upstream is used later. Fewer: one outlier decides.
const MIN_SAMPLES: u32 = 3;

/// How many times faster the upstream has to be. Larger: slow peers are used for longer. Smaller: more traffic leaves
/// the cluster for little.
const MIN_SPEEDUP: f64 = 2.0;

/// Weight of the latest blob. Larger: one outlier counts more. Smaller: changes are noticed later.
const LATEST_WEIGHT: f64 = 0.3;

/// Rules whose speeds are in memory. Fewer: further rules are never measured enough.
const MAX_RULES: u64 = 1000;

impl ThroughputEstimates {
    pub(super) fn new() -> Self {
        let cache = || moka::sync::Cache::builder().max_capacity(MAX_RULES).time_to_live(OBSERVATION_TTL).build();
        Self { upstream: cache(), cross_zone: cache() }
    }

    /// Records that a blob came in this time.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    pub(super) fn record(&self, rule: &str, sender: Sender, bytes: u64, time: Duration) {
        if bytes < MIN_MEASURED_BYTES || time.is_zero() {
            return;
        }
        let rate = bytes as f64 / time.as_secs_f64();
        let cache = match sender {
            Sender::Upstream => &self.upstream,
            Sender::CrossZone => &self.cross_zone,
        };
        cache.entry_by_ref(rule).and_upsert_with(|known| match known.map(moka::Entry::into_value) {
            Some(Average { rate: before, count }) => {
                Average { rate: before + (rate - before) * LATEST_WEIGHT, count: count.saturating_add(1) }
            }
            None => Average { rate, count: 1 },
        });
    }

    /// Whether the upstream is known to be faster than cross-zone peers.
    pub(super) fn upstream_is_faster(&self, rule: &str) -> bool {
        let known =
            |cache: &moka::sync::Cache<String, Average>| cache.get(rule).filter(|known| known.count >= MIN_SAMPLES);
        matches!(
            (known(&self.upstream), known(&self.cross_zone)),
            (Some(upstream), Some(cross_zone)) if upstream.rate > cross_zone.rate * MIN_SPEEDUP
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_is_faster_only_after_several_samples() {
        let throughput = ThroughputEstimates::new();
        let measure = |sender, mib: u64| throughput.record("r", sender, mib << 20, Duration::from_secs(1));
        for _ in 0..3 {
            assert!(!throughput.upstream_is_faster("r"));
            measure(Sender::Upstream, 30);
            measure(Sender::CrossZone, 10);
        }
        assert!(throughput.upstream_is_faster("r") && !throughput.upstream_is_faster("another"));
        (0..5).for_each(|_| measure(Sender::CrossZone, 20));
        assert!(!throughput.upstream_is_faster("r"), "the speedup is too small");
    }

    #[test]
    fn small_blobs_are_not_measured() {
        let throughput = ThroughputEstimates::new();
        for _ in 0..9 {
            throughput.record("r", Sender::Upstream, MIN_MEASURED_BYTES - 1, Duration::from_millis(1));
            throughput.record("r", Sender::CrossZone, MIN_MEASURED_BYTES - 1, Duration::from_secs(9));
        }
        assert!(!throughput.upstream_is_faster("r"));
    }
}
