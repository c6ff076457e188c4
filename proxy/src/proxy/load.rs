//! How much is being answered at a time, and what memory that may take.

use std::net::IpAddr;
use std::sync::Arc;

use crate::memory::{ClientBytes, Memory};
use crate::shares::{Share, Shares};

/// Requests being answered, and the memory that their answers take.
pub struct Load {
    requests: Shares<Option<IpAddr>>,
    memory: Arc<Memory>,
}

/// There is no memory for another answer.
pub(super) struct Overloaded;

/// A request's place in the load.
pub(super) type RequestPermit = Share<Option<IpAddr>>;

/// More requests than this at once are refused.
const MAX_REQUESTS: usize = 10_000;

/// Answers that hold less memory than this, in bytes, need no leave for it.
const SMALL_ANSWER: usize = 64 * 1024;

impl Load {
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { requests: Shares::new(MAX_REQUESTS), memory }
    }

    /// Takes memory for an answer that its client has yet to read; small ones need none.
    pub(super) fn hold(&self, bytes: usize, client: Option<IpAddr>) -> Result<Option<ClientBytes>, Overloaded> {
        if bytes < SMALL_ANSWER {
            return Ok(None);
        }
        self.memory.of_clients.take(&client, bytes).map(Some).ok_or(Overloaded)
    }

    /// Counts a request, if there is room for it beside those of others.
    pub(super) fn enter(&self, client: Option<IpAddr>) -> Option<RequestPermit> {
        self.requests.take(&client, 1)
    }

    /// How many requests are being answered.
    pub fn current(&self) -> usize {
        MAX_REQUESTS - self.requests.left()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_reads_slowly_leaves_memory_for_the_others() {
        let load = Load::new(Arc::new(Memory::new(240 << 20)));
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let take = |nth| std::iter::from_fn(|| load.hold(1 << 20, client(nth)).ok()).take(1000).collect::<Vec<_>>();
        let held = [1, 2, 3].map(take);
        assert_eq!(held.each_ref().map(Vec::len), [60, 30, 15]);
        assert!(load.hold(SMALL_ANSWER - 1, client(1)).is_ok_and(|held| held.is_none()), "small ones need none");
    }

    #[test]
    fn client_with_many_requests_leaves_room_for_the_others() {
        let load = Load::new(Arc::new(Memory::new(0)));
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let seats: Vec<_> = std::iter::from_fn(|| load.enter(client(1))).collect();
        assert_eq!((seats.len(), load.current()), (MAX_REQUESTS / 2, MAX_REQUESTS / 2));
        assert!(load.enter(client(2)).is_some());
        drop(seats);
        assert_eq!(load.current(), 0);
    }
}
