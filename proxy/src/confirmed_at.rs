//! Records of what upstreams said: of responses that end in any order, the one that was requested last has the last word.

use std::hash::Hash;
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use parking_lot::Mutex;

/// When the upstream said what each record says.
pub struct ConfirmedAt<K, T> {
    said: Mutex<Cache<K, T>>,
}

/// Records whose last word is remembered. Fewer: an older response that ends late may undo a younger one.
const MAX_RECORDS: u64 = 10_000;

impl<K, T> ConfirmedAt<K, T>
where
    K: Eq + Hash + Send + Sync + 'static,
    T: Copy + PartialOrd + Send + Sync + 'static,
{
    /// `lifetime`: for how long after a response an older one may still end.
    pub fn new(lifetime: Duration) -> Self {
        // By age alone: the newest must not be refused because others are asked for more often.
        let cache = Cache::builder().max_capacity(MAX_RECORDS).eviction_policy(EvictionPolicy::lru());
        Self { said: Mutex::new(cache.time_to_live(lifetime).build()) }
    }

    /// Writes what was said at that time, unless a younger word was written. One record is written at a time: this blocks, also
    /// on the disk.
    pub fn record(&self, key: K, said_at: T, write: impl FnOnce()) {
        let said = self.said.lock();
        if said.get(&key).is_some_and(|known| known > said_at) {
            return;
        }
        said.insert(key, said_at);
        write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_word_is_not_recorded_after_a_younger_one() {
        let words = ConfirmedAt::new(Duration::from_secs(60));
        let says = |key: &'static str, said_at: u32| {
            let mut is_recorded = false;
            words.record(key, said_at, || is_recorded = true);
            is_recorded
        };
        let recorded = [says("1", 20), says("1", 10), says("1", 20), says("1", 30), says("2", 10)];
        assert_eq!(recorded, [true, false, true, true, true]);
    }
}
