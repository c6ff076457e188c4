//! The readers of a fill, and the byte that each waits for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::oci::Span;

/// The readers of one fill.
#[derive(Default)]
pub(super) struct Readers {
    slots: Mutex<ReaderSlots>,
    /// A reader waits for another byte than before.
    pub(super) waiting: Notify,
    /// Bytes were written. Wakes peer requests, which wait without being readers.
    pub(super) written: Notify,
}

#[derive(Default)]
struct ReaderSlots {
    next: u64,
    taken: HashMap<u64, ReaderWait>,
    /// Since when there are no readers.
    empty_since: Option<Instant>,
    /// No reader is admitted any more.
    is_closed: bool,
}

/// The byte that a reader waits for; None: it is being served.
struct ReaderWait {
    position: Option<u64>,
    arrived: Arc<Notify>,
}

/// The registration of one reader, removed when dropped.
pub(super) struct ReaderSlot {
    id: u64,
    readers: Arc<Readers>,
    arrived: Arc<Notify>,
}

impl Readers {
    pub(super) fn register(self: &Arc<Self>) -> ReaderSlot {
        let mut slots = self.slots.lock();
        slots.next += 1;
        let id = slots.next;
        let arrived = Arc::new(Notify::new());
        slots.taken.insert(id, ReaderWait { position: None, arrived: arrived.clone() });
        slots.empty_since = None;
        ReaderSlot { id, readers: self.clone(), arrived }
    }

    /// A source has responded: the grace period for the first reader begins.
    pub(super) fn begin(&self) {
        let mut slots = self.slots.lock();
        if slots.taken.is_empty() {
            slots.empty_since = Some(Instant::now());
        }
    }

    /// A peer sent a request that may be redirected: the fill is still needed in the cluster, so the grace period
    /// begins again.
    pub(super) fn extend_grace(&self) {
        let mut slots = self.slots.lock();
        if let Some(since) = &mut slots.empty_since {
            *since = Instant::now();
        }
    }

    /// A reader is about to register. False: the fill is being abandoned.
    pub(super) fn admit(&self) -> bool {
        self.extend_grace();
        !self.slots.lock().is_closed
    }

    /// Admits no more readers if there was none for `grace`. Returns whether that is so.
    pub(super) fn close_after(&self, grace: Duration) -> bool {
        let mut slots = self.slots.lock();
        slots.is_closed |= slots.empty_since.is_some_and(|since| since.elapsed() > grace);
        slots.is_closed
    }

    /// Wakes only the readers that wait for one of these bytes.
    pub(super) fn notify_written(&self, span: Span) {
        self.written.notify_waiters();
        let waits = |waiting: &&ReaderWait| waiting.position.is_some_and(|at| span.contains(at));
        self.slots.lock().taken.values().filter(waits).for_each(|waiting| waiting.arrived.notify_one());
    }

    /// The bytes that readers wait for, in order.
    pub(super) fn wanted(&self) -> Vec<u64> {
        let mut wanted: Vec<u64> = self.slots.lock().taken.values().filter_map(|waiting| waiting.position).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Whether there was ever a reader.
    pub(super) fn had_readers(&self) -> bool {
        self.slots.lock().next > 0
    }
}

impl ReaderSlot {
    /// The reader waits for this byte.
    pub(super) fn wait_for(&self, position: u64) {
        self.set(Some(position));
        self.readers.waiting.notify_one();
    }

    /// The byte has arrived.
    pub(super) fn served(&self) {
        self.set(None);
    }

    /// Returns when the byte that is waited for has arrived, also if that was before the call.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    fn set(&self, position: Option<u64>) {
        if let Some(waiting) = self.readers.slots.lock().taken.get_mut(&self.id) {
            waiting.position = position;
        }
    }
}

impl Drop for ReaderSlot {
    fn drop(&mut self) {
        let mut slots = self.readers.slots.lock();
        slots.taken.remove(&self.id);
        if slots.taken.is_empty() {
            slots.empty_since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE_PERIOD: Duration = Duration::from_secs(5);

    async fn advance(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn written_bytes_wake_only_their_readers() {
        let readers = Arc::new(Readers::default());
        let (first, second) = (readers.register(), readers.register());
        first.wait_for(7);
        second.wait_for(3);
        assert_eq!(readers.wanted(), [3, 7]);
        readers.notify_written(Span { start: 4, end: 8 });
        first.arrived().await;
        assert!(futures_util::FutureExt::now_or_never(second.arrived()).is_none(), "another byte was written");
        first.served();
        drop(second);
        assert!(readers.wanted().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn readers_after_grace_period_are_closed() {
        let readers = Arc::new(Readers::default());
        advance(60).await;
        assert!(!readers.close_after(GRACE_PERIOD), "no source has responded yet");
        let (first, second) = (readers.register(), readers.register());
        drop(first);
        advance(60).await;
        assert!(!readers.close_after(GRACE_PERIOD), "one reader is left");
        drop(second);
        advance(4).await;
        assert!(!readers.close_after(GRACE_PERIOD));
        assert!(readers.admit(), "a request joins");
        advance(4).await;
        assert!(!readers.close_after(GRACE_PERIOD), "its reader may register");
        drop(readers.register());
        advance(6).await;
        assert!(readers.close_after(GRACE_PERIOD));
        assert!(!readers.admit(), "the fill is being abandoned");
    }
}
