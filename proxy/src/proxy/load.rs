//! How much is being answered at a time, and what memory that may take.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests being answered, and the memory that their answers take.
pub struct Load {
    requests: AtomicUsize,
    /// KiB for answers that are sent whole: large manifests and lists.
    memory: Arc<Semaphore>,
}

/// There is no memory for another answer.
pub(super) struct Overloaded;

/// A request's place in the load.
pub(super) struct Seat(Arc<Load>);

/// More requests than this at once are refused.
const MAX_REQUESTS: usize = 10_000;

/// Answers sent whole that are at least this large share this much memory.
const SMALL_ANSWER: usize = 64 * 1024;
const WHOLE_ANSWERS_KIB: usize = 128 * 1024;

impl Default for Load {
    fn default() -> Self {
        Self { requests: AtomicUsize::new(0), memory: Arc::new(Semaphore::new(WHOLE_ANSWERS_KIB)) }
    }
}

impl Load {
    /// Takes memory for an answer that is sent whole; small ones need none.
    pub(super) fn hold(&self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, Overloaded> {
        if bytes < SMALL_ANSWER {
            return Ok(None);
        }
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        self.memory.clone().try_acquire_many_owned(kib).map(Some).map_err(|_| Overloaded)
    }

    /// Counts a request, if there is room for it.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Seat> {
        let before = self.requests.fetch_add(1, Ordering::AcqRel);
        let seat = Seat(self.clone());
        (before < MAX_REQUESTS).then_some(seat)
    }

    /// How many requests are being answered.
    pub fn current(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}
