//! Orders writes of upstream responses, which end in any order: the response that was requested last wins.

use std::hash::Hash;
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use parking_lot::Mutex;

/// The time of the response in each record.
pub struct ConfirmedAt<K, T> {
    times: Mutex<Cache<K, T>>,
}

/// Records whose time is remembered. More: more memory. Fewer: an older response that ends late may replace a younger
/// one.
const MAX_RECORDS: u64 = 10_000;

impl<K, T> ConfirmedAt<K, T>
where
    K: Eq + Hash + Send + Sync + 'static,
    T: Copy + PartialOrd + Send + Sync + 'static,
{
    /// `lifetime`: for how long after a response an older one may still end.
    pub fn new(lifetime: Duration) -> Self {
        // LRU: moka's default policy does not admit a new entry while others are read more often.
        let cache = Cache::builder().max_capacity(MAX_RECORDS).eviction_policy(EvictionPolicy::lru());
        Self { times: Mutex::new(cache.time_to_live(lifetime).build()) }
    }

    /// Writes a response of this time, unless a younger one was written. Records are written one at a time: this blocks
    /// on other writes and on the disk.
    pub fn record(&self, key: K, confirmed_at: T, write: impl FnOnce()) {
        let times = self.times.lock();
        if times.get(&key).is_some_and(|known| known > confirmed_at) {
            return;
        }
        times.insert(key, confirmed_at);
        write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_response_is_not_recorded_after_a_younger_one() {
        let records = ConfirmedAt::new(Duration::from_secs(60));
        let write = |key: &'static str, confirmed_at: u32| {
            let mut is_recorded = false;
            records.record(key, confirmed_at, || is_recorded = true);
            is_recorded
        };
        let recorded = [write("1", 20), write("1", 10), write("1", 20), write("1", 30), write("2", 10)];
        assert_eq!(recorded, [true, false, true, true, true]);
    }
}
