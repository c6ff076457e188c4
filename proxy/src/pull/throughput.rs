//! Whether a registry or the peers of other zones are faster: measured, and only where a rule wants to know.

use std::time::Duration;

use crate::times::OBSERVATION_TTL;

/// How fast blobs came, by the name of a rule. Forgotten after a while, so that whoever was slow is tried again.
pub(super) struct ThroughputEstimates {
    upstream: moka::sync::Cache<String, Average>,
    far: moka::sync::Cache<String, Average>,
}

/// Who sent a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Upstream,
    /// Peers, the owner of all zones before all.
    Far,
}

/// Bytes a second, the latest counting most.
#[derive(Clone, Copy)]
struct Average {
    rate: f64,
    count: u32,
}

/// Smaller blobs tell of round trips.
const LARGE: u64 = 1024 * 1024;

/// So many blobs have to be measured from either, and the registry has to be so much faster.
const ENOUGH: u32 = 3;
const FASTER: f64 = 2.0;

const LATEST: f64 = 0.3;
const MAX_RULES: u64 = 1000;

impl ThroughputEstimates {
    pub(super) fn new() -> Self {
        let cache = || moka::sync::Cache::builder().max_capacity(MAX_RULES).time_to_live(OBSERVATION_TTL).build();
        Self { upstream: cache(), far: cache() }
    }

    /// A blob came in this time.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    pub(super) fn measured(&self, rule: &str, sender: Sender, bytes: u64, time: Duration) {
        if bytes < LARGE || time.is_zero() {
            return;
        }
        let rate = bytes as f64 / time.as_secs_f64();
        let cache = match sender {
            Sender::Upstream => &self.upstream,
            Sender::Far => &self.far,
        };
        cache.entry_by_ref(rule).and_upsert_with(|known| match known.map(moka::Entry::into_value) {
            Some(Average { rate: before, count }) => {
                Average { rate: before + (rate - before) * LATEST, count: count.saturating_add(1) }
            }
            None => Average { rate, count: 1 },
        });
    }

    /// Whether the registry is known to be faster than the peers of other zones.
    pub(super) fn upstream_is_faster(&self, rule: &str) -> bool {
        let known = |cache: &moka::sync::Cache<String, Average>| cache.get(rule).filter(|known| known.count >= ENOUGH);
        matches!((known(&self.upstream), known(&self.far)), (Some(upstream), Some(far)) if upstream.rate > far.rate * FASTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_some_blobs_to_know_who_is_faster() {
        let speeds = ThroughputEstimates::new();
        let measure = |sender, mib: u64| speeds.measured("r", sender, mib << 20, Duration::from_secs(1));
        for _ in 0..3 {
            assert!(!speeds.upstream_is_faster("r"));
            measure(Sender::Upstream, 30);
            measure(Sender::Far, 10);
        }
        assert!(speeds.upstream_is_faster("r") && !speeds.upstream_is_faster("another"));
        (0..5).for_each(|_| measure(Sender::Far, 20));
        assert!(!speeds.upstream_is_faster("r"), "half as fast is near enough");
    }

    #[test]
    fn small_blobs_tell_nothing() {
        let speeds = ThroughputEstimates::new();
        for _ in 0..9 {
            speeds.measured("r", Sender::Upstream, LARGE - 1, Duration::from_millis(1));
            speeds.measured("r", Sender::Far, LARGE - 1, Duration::from_secs(9));
        }
        assert!(!speeds.upstream_is_faster("r"));
    }
}
