//! How much is being answered at a time, and what memory that may take.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::connections;
use crate::shares::{Share, Shares};

/// Requests being answered, and the memory that their answers take.
pub struct Load {
    requests: AtomicUsize,
    /// KiB for answers that are sent whole: large manifests and lists.
    memory: Shares<Option<IpAddr>>,
}

/// There is no memory for another answer.
pub(super) struct Overloaded;

/// A request's place in the load.
pub(super) struct Seat(Arc<Load>);

/// More requests than this at once are refused.
const MAX_REQUESTS: usize = 10_000;

/// Answers sent whole that are at least this large share this much memory: who reads slowly holds it for long.
const SMALL_ANSWER: usize = 64 * 1024;
const WHOLE_ANSWERS_KIB: usize = 128 * 1024;
const KIB_OF_CLIENT: usize = 64 * 1024;

impl Default for Load {
    fn default() -> Self {
        Self { requests: AtomicUsize::new(0), memory: Shares::new(WHOLE_ANSWERS_KIB, KIB_OF_CLIENT) }
    }
}

impl Load {
    /// Takes memory for an answer that is sent whole; small ones need none.
    pub(super) fn hold(&self, bytes: usize, client: Option<IpAddr>) -> Result<Option<Share>, Overloaded> {
        if bytes < SMALL_ANSWER {
            return Ok(None);
        }
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        let client = client.map(|address| connections::client(address.to_canonical()));
        self.memory.take(&client, kib).map(Some).ok_or(Overloaded)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_reads_slowly_leaves_memory_for_the_others() {
        let load = Load::default();
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let take = |nth| std::iter::from_fn(|| load.hold(1 << 20, client(nth)).ok()).take(1000).collect::<Vec<_>>();
        let first = take(1);
        assert_eq!((first.len(), take(2).len()), (64, 64));
        let _second = take(2);
        assert!(take(3).is_empty() && load.hold(SMALL_ANSWER - 1, client(3)).is_ok(), "small ones need none");
        drop(first);
        assert_eq!(take(3).len(), 64);
    }
}
