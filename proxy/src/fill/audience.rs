//! Who reads a fill, and which byte each waits for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::Instant;

/// The readers of one fill.
#[derive(Default)]
pub(super) struct Audience {
    seats: Mutex<Seats>,
    /// Somebody waits for another byte than before.
    pub(super) waiting: Notify,
}

#[derive(Default)]
struct Seats {
    next: u64,
    /// What each reader waits for; None: it is being served.
    taken: HashMap<u64, Option<u64>>,
    /// Since when nobody reads any more.
    empty_since: Option<Instant>,
}

/// One reader's place, given up when dropped.
pub(super) struct Seat {
    id: u64,
    audience: Arc<Audience>,
}

impl Audience {
    pub(super) fn sit(self: &Arc<Self>) -> Seat {
        let mut seats = self.seats();
        seats.next += 1;
        let id = seats.next;
        seats.taken.insert(id, None);
        seats.empty_since = None;
        Seat { id, audience: self.clone() }
    }

    /// The bytes that are waited for, first ones first.
    pub(super) fn wanted(&self) -> Vec<u64> {
        let mut wanted: Vec<u64> = self.seats().taken.values().flatten().copied().collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted
    }

    /// Since when all readers have left; None where some read, or none ever did.
    pub(super) fn empty_since(&self) -> Option<Instant> {
        self.seats().empty_since
    }

    /// Whether anybody ever read.
    pub(super) fn had_readers(&self) -> bool {
        self.seats().next > 0
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        // Only looked up and changed under the lock.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// The reader can go no further before this byte comes.
    pub(super) fn wait_for(&self, position: u64) {
        self.audience.seats().taken.insert(self.id, Some(position));
        self.audience.waiting.notify_one();
    }

    /// It came.
    pub(super) fn served(&self) {
        self.audience.seats().taken.insert(self.id, None);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.audience.seats();
        seats.taken.remove(&self.id);
        if seats.taken.is_empty() {
            seats.empty_since = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn knows_who_waits_and_when_the_last_one_left() {
        let audience = Arc::new(Audience::default());
        assert_eq!(audience.empty_since(), None, "nobody has come yet");
        let (first, second) = (audience.sit(), audience.sit());
        first.wait_for(7);
        second.wait_for(3);
        assert_eq!(audience.wanted(), [3, 7]);
        first.served();
        drop(second);
        assert_eq!((audience.wanted(), audience.empty_since()), (vec![], None));
        drop(first);
        assert_eq!(audience.empty_since(), Some(Instant::now()));
        let _third = audience.sit();
        assert_eq!(audience.empty_since(), None);
    }
}
