//! Writes small objects to disk no faster than the disk takes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foyer::HybridCache;
use moka::policy::EvictionPolicy;
use prometheus::IntCounter;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{PAGE, SmallObject};
use crate::times::FAREWELL;

/// Objects that wait to be written; whoever inserts more waits as well.
const QUEUE: usize = 32;

/// Where an object that is used is written again: when this part of the ring was written since.
/// foyer gives up what was written first, used or not.
const FAR_BEHIND: u64 = 4;

/// Positions that are remembered; each takes some 350 bytes. More: a node whose content moves grows for hours. Fewer: of a large
/// cache more of what is used is written again than has to be.
const MAX_POSITIONS: u64 = 100_000;

/// The way to one cache's disk.
pub(super) struct SmallWriter {
    queue: mpsc::Sender<(String, SmallObject)>,
    /// What is used and has to be written again: before what is new, which only queues up.
    again: mpsc::Sender<(String, SmallObject)>,
    task: JoinHandle<()>,
    ring: Arc<RingPositions>,
    dropped: IntCounter,
}

/// Where on the ring each object was written last.
struct RingPositions {
    bytes: u64,
    written: AtomicU64,
    positions: moka::sync::Cache<String, u64>,
}

impl SmallWriter {
    /// For a cache of `bytes` on disk, which takes `batch` bytes at once. What waits in vain is
    /// counted as `dropped`.
    pub(super) fn start(cache: HybridCache<String, SmallObject>, bytes: u64, batch: u64, dropped: IntCounter) -> Self {
        let (queue, mut waiting) = mpsc::channel::<(String, SmallObject)>(QUEUE);
        let (again, mut used) = mpsc::channel::<(String, SmallObject)>(QUEUE);
        let ring = Arc::new(RingPositions::new(bytes));
        let writing = ring.clone();
        let task = tokio::spawn(async move {
            let mut taken = 0;
            loop {
                let next = tokio::select! {
                    biased;
                    Some(used) = used.recv() => Some(used),
                    new = waiting.recv() => new,
                };
                let Some((key, object)) = next else { break };
                let size = object.bytes.len() as u64;
                if taken + size > batch {
                    cache.storage().wait().await;
                    taken = 0;
                }
                taken += size;
                writing.wrote(&key, size);
                cache.insert(key, object);
            }
            cache.storage().wait().await;
        });
        Self { queue, again, task, ring, dropped }
    }

    pub(super) async fn write(&self, key: String, object: SmallObject) {
        // A disk that hangs must not hold up who has the object in memory.
        if timeout(FAREWELL, self.queue.send((key, object))).await.is_err() {
            self.dropped.inc();
        }
    }

    /// An object was used: it is written again before the ring comes round to it.
    pub(super) fn used(&self, key: &str, object: &SmallObject) {
        if self.ring.is_far_behind(key) && self.again.try_send((key.to_owned(), object.clone())).is_ok() {
            self.ring.positions.insert(key.to_owned(), self.ring.written.load(Ordering::Relaxed));
        }
    }

    /// Writes what waits.
    pub(super) async fn close(self) {
        drop((self.queue, self.again));
        let _ = self.task.await;
    }
}

impl RingPositions {
    /// Remembers the positions of what the disk can hold, and of what was written last: the others count as far behind.
    fn new(bytes: u64) -> Self {
        let most = (bytes / PAGE).min(MAX_POSITIONS);
        let positions = moka::sync::Cache::builder().max_capacity(most).eviction_policy(EvictionPolicy::lru()).build();
        Self { bytes, written: AtomicU64::new(0), positions }
    }

    fn wrote(&self, key: &str, size: u64) {
        let position = self.written.fetch_add(size, Ordering::Relaxed);
        self.positions.insert(key.to_owned(), position);
    }

    fn is_far_behind(&self, key: &str) -> bool {
        let written = self.written.load(Ordering::Relaxed);
        // What an earlier process wrote lies behind all that this one wrote.
        let position = self.positions.get(key).unwrap_or(0);
        written - position.min(written) > self.bytes / FAR_BEHIND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_bounded_by_what_the_disk_holds() {
        let ring = RingPositions::new(64 * PAGE);
        (0..1_000).for_each(|nth| ring.wrote(&nth.to_string(), PAGE));
        ring.positions.run_pending_tasks();
        assert!(ring.positions.entry_count() <= 64, "{}", ring.positions.entry_count());
        assert!(!ring.is_far_behind("999"));
        assert!(ring.is_far_behind("980") && ring.is_far_behind("0"));
    }
}
