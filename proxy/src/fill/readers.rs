//! Who reads a fill, and which byte each waits for.

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
    seats: Mutex<ReaderSlots>,
    /// Somebody waits for another byte than before.
    pub(super) waiting: Notify,
    /// Bytes have come. Wakes peer requests, which wait without being readers.
    pub(super) came: Notify,
}

#[derive(Default)]
struct ReaderSlots {
    next: u64,
    taken: HashMap<u64, ReaderWait>,
    /// Since when nobody reads any more.
    empty_since: Option<Instant>,
    /// Nobody is let in any more.
    is_closed: bool,
}

/// What a reader waits for; None: it is being served.
struct ReaderWait {
    position: Option<u64>,
    came: Arc<Notify>,
}

/// One reader's place, given up when dropped.
pub(super) struct ReaderSlot {
    id: u64,
    audience: Arc<Readers>,
    came: Arc<Notify>,
}

impl Readers {
    pub(super) fn sit(self: &Arc<Self>) -> ReaderSlot {
        let mut seats = self.seats.lock();
        seats.next += 1;
        let id = seats.next;
        let came = Arc::new(Notify::new());
        seats.taken.insert(id, ReaderWait { position: None, came: came.clone() });
        seats.empty_since = None;
        ReaderSlot { id, audience: self.clone(), came }
    }

    /// A source has answered: whoever wants to read comes now.
    pub(super) fn begin(&self) {
        let mut seats = self.seats.lock();
        if seats.taken.is_empty() {
            seats.empty_since = Some(Instant::now());
        }
    }

    /// Somebody asked, who may read elsewhere what this fill brings into the cluster.
    pub(super) fn noticed(&self) {
        let mut seats = self.seats.lock();
        if let Some(since) = &mut seats.empty_since {
            *since = Instant::now();
        }
    }

    /// Somebody is about to read. False: it is too late for that.
    pub(super) fn welcome(&self) -> bool {
        self.noticed();
        !self.seats.lock().is_closed
    }

    /// Lets nobody in any more, if nobody has read for so long. Whether that is so.
    pub(super) fn close_after(&self, patience: Duration) -> bool {
        let mut seats = self.seats.lock();
        seats.is_closed |= seats.empty_since.is_some_and(|since| since.elapsed() > patience);
        seats.is_closed
    }

    /// These bytes are there: wakes those that wait for one of them, and nobody else.
    pub(super) fn came(&self, span: Span) {
        self.came.notify_waiters();
        let waits = |waiting: &&ReaderWait| waiting.position.is_some_and(|at| span.contains(at));
        self.seats.lock().taken.values().filter(waits).for_each(|waiting| waiting.came.notify_one());
    }

    /// The bytes that are waited for, first ones first.
    pub(super) fn wanted(&self) -> Vec<u64> {
        let mut wanted: Vec<u64> = self.seats.lock().taken.values().filter_map(|waiting| waiting.position).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Whether anybody ever read.
    pub(super) fn had_readers(&self) -> bool {
        self.seats.lock().next > 0
    }
}

impl ReaderSlot {
    /// The reader can go no further before this byte comes.
    pub(super) fn wait_for(&self, position: u64) {
        self.set(Some(position));
        self.audience.waiting.notify_one();
    }

    /// It came.
    pub(super) fn served(&self) {
        self.set(None);
    }

    /// Ends when the byte that is waited for has come, or had come before.
    pub(super) async fn came(&self) {
        self.came.notified().await;
    }

    fn set(&self, position: Option<u64>) {
        if let Some(waiting) = self.audience.seats.lock().taken.get_mut(&self.id) {
            waiting.position = position;
        }
    }
}

impl Drop for ReaderSlot {
    fn drop(&mut self) {
        let mut seats = self.audience.seats.lock();
        seats.taken.remove(&self.id);
        if seats.taken.is_empty() {
            seats.empty_since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn knows_who_waits() {
        let audience = Arc::new(Readers::default());
        let (first, second) = (audience.sit(), audience.sit());
        first.wait_for(7);
        second.wait_for(3);
        assert_eq!(audience.wanted(), [3, 7]);
        audience.came(Span { start: 4, end: 8 });
        first.came().await;
        assert!(futures_util::FutureExt::now_or_never(second.came()).is_none(), "that was not for it");
        first.served();
        drop(second);
        assert!(audience.wanted().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn closes_some_time_after_the_last_one_left() {
        let audience = Arc::new(Readers::default());
        pass(60).await;
        assert!(!audience.close_after(PATIENCE), "nobody has come yet");
        let (first, second) = (audience.sit(), audience.sit());
        drop(first);
        pass(60).await;
        assert!(!audience.close_after(PATIENCE), "one still reads");
        drop(second);
        pass(4).await;
        assert!(!audience.close_after(PATIENCE));
        assert!(audience.welcome(), "somebody comes");
        pass(4).await;
        assert!(!audience.close_after(PATIENCE), "and is waited for");
        drop(audience.sit());
        pass(6).await;
        assert!(audience.close_after(PATIENCE));
        assert!(!audience.welcome(), "it is over");
    }
}
