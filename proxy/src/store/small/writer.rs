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
use crate::times::CLOSE_TIMEOUT;

/// Objects that wait to be written. When the queue is full, inserts wait. Larger: more memory with a slow disk.
/// Smaller: bursts wait for the disk.
const QUEUE_LENGTH: usize = 32;

/// An object in use is written again once one part in this many of the ring was written since. foyer evicts in write
/// order, used or not. Larger: more is written again. Smaller: objects in use are evicted before they are written
/// again.
const REWRITE_SHARE: u64 = 4;

/// Positions that are remembered, at some 350 bytes each. Larger: the memory of a node with changing content grows for
/// hours. Smaller: a large cache writes objects in use again more often than needed.
const MAX_POSITIONS: u64 = 100_000;

/// Writes the objects of one cache to its disk.
pub(super) struct SmallWriter {
    queue: mpsc::Sender<(String, SmallObject)>,
    /// Objects in use that must be written again. They precede new objects, which only queue up.
    rewrites: mpsc::Sender<(String, SmallObject)>,
    task: JoinHandle<()>,
    ring: Arc<RingPositions>,
    dropped: IntCounter,
}

/// Where on the ring each object was last written.
struct RingPositions {
    bytes: u64,
    written: AtomicU64,
    positions: moka::sync::Cache<String, u64>,
}

impl SmallWriter {
    /// For a cache of `bytes` on disk, which takes `batch` bytes at once. Objects that wait in vain are counted as
    /// `dropped`.
    pub(super) fn start(cache: HybridCache<String, SmallObject>, bytes: u64, batch: u64, dropped: IntCounter) -> Self {
        let (queue, mut waiting) = mpsc::channel::<(String, SmallObject)>(QUEUE_LENGTH);
        let (rewrites, mut used) = mpsc::channel::<(String, SmallObject)>(QUEUE_LENGTH);
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
                writing.note_write(&key, size);
                cache.insert(key, object);
            }
            cache.storage().wait().await;
        });
        Self { queue, rewrites, task, ring, dropped }
    }

    pub(super) async fn write(&self, key: String, object: SmallObject) {
        // A hanging disk must not hold up a request that has the object in memory.
        if timeout(CLOSE_TIMEOUT, self.queue.send((key, object))).await.is_err() {
            self.dropped.inc();
        }
    }

    /// Whether objects wait to be written.
    pub(super) fn is_busy(&self) -> bool {
        self.queue.capacity() < QUEUE_LENGTH || self.rewrites.capacity() < QUEUE_LENGTH
    }

    /// An object in use is written again before the ring overwrites it.
    pub(super) fn note_use(&self, key: &str, object: &SmallObject) {
        if self.ring.is_rewrite_due(key) && self.rewrites.try_send((key.to_owned(), object.clone())).is_ok() {
            self.ring.positions.insert(key.to_owned(), self.ring.written.load(Ordering::Relaxed));
        }
    }

    /// Writes the queued objects.
    pub(super) async fn close(self) {
        drop((self.queue, self.rewrites));
        let _ = self.task.await;
    }
}

impl RingPositions {
    /// Remembers as many positions as the disk holds objects, the latest ones. All others count as due for a rewrite.
    fn new(bytes: u64) -> Self {
        let most = (bytes / PAGE).min(MAX_POSITIONS);
        let positions = moka::sync::Cache::builder().max_capacity(most).eviction_policy(EvictionPolicy::lru()).build();
        Self { bytes, written: AtomicU64::new(0), positions }
    }

    fn note_write(&self, key: &str, size: u64) {
        let position = self.written.fetch_add(size, Ordering::Relaxed);
        self.positions.insert(key.to_owned(), position);
    }

    fn is_rewrite_due(&self, key: &str) -> bool {
        let written = self.written.load(Ordering::Relaxed);
        // Objects of an earlier process precede all that this one wrote.
        let position = self.positions.get(key).unwrap_or(0);
        written - position.min(written) > self.bytes / REWRITE_SHARE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_bounded_by_what_the_disk_holds() {
        let ring = RingPositions::new(64 * PAGE);
        (0..1_000).for_each(|nth| ring.note_write(&nth.to_string(), PAGE));
        ring.positions.run_pending_tasks();
        assert!(ring.positions.entry_count() <= 64, "{}", ring.positions.entry_count());
        assert!(!ring.is_rewrite_due("999"));
        assert!(ring.is_rewrite_due("980") && ring.is_rewrite_due("0"));
    }
}
