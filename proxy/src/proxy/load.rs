//! Limits the requests in progress, and the memory of their responses.

use std::net::IpAddr;
use std::sync::Arc;

use crate::memory::{ClientBytes, Memory};
use crate::shares::{Share, Shares};

/// Requests in progress, and the memory of their responses.
pub struct Load {
    requests: Shares<Option<IpAddr>>,
    memory: Arc<Memory>,
}

/// There is no memory for another response.
pub(super) struct Overloaded;

/// Counts a request as in progress while it is held.
pub(super) type RequestPermit = Share<Option<IpAddr>>;

/// More requests than this at once are rejected. Larger: more memory. Smaller: a burst of pulls gets errors.
const MAX_REQUESTS: usize = 10_000;

/// A smaller response, in bytes, is not counted: [`MAX_REQUESTS`] bounds these. Larger: more memory is not accounted.
const SMALL_RESPONSE_BYTES: usize = 64 * 1024;

impl Load {
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { requests: Shares::new(MAX_REQUESTS), memory }
    }

    /// Reserves memory for a response until its client has read it. Small responses need none.
    pub(super) fn reserve(&self, bytes: usize, client: Option<IpAddr>) -> Result<Option<ClientBytes>, Overloaded> {
        if bytes < SMALL_RESPONSE_BYTES {
            return Ok(None);
        }
        self.memory.of_clients.take(&client, bytes).map(Some).ok_or(Overloaded)
    }

    /// Admits a request if its client's fair share allows it.
    pub(super) fn admit(&self, client: Option<IpAddr>) -> Option<RequestPermit> {
        self.requests.take(&client, 1)
    }

    /// How many requests are in progress.
    pub fn current(&self) -> usize {
        MAX_REQUESTS - self.requests.left()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_client_leaves_memory_for_other_clients() {
        let load = Load::new(Arc::new(Memory::new(240 << 20)));
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let take = |nth| std::iter::from_fn(|| load.reserve(1 << 20, client(nth)).ok()).take(1000).collect::<Vec<_>>();
        let held = [1, 2, 3].map(take);
        assert_eq!(held.each_ref().map(Vec::len), [60, 30, 15]);
        assert!(
            load.reserve(SMALL_RESPONSE_BYTES - 1, client(1)).is_ok_and(|held| held.is_none()),
            "small ones need none"
        );
    }

    #[test]
    fn client_with_many_requests_leaves_room_for_others() {
        let load = Load::new(Arc::new(Memory::new(0)));
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let permits: Vec<_> = std::iter::from_fn(|| load.admit(client(1))).collect();
        assert_eq!((permits.len(), load.current()), (MAX_REQUESTS / 2, MAX_REQUESTS / 2));
        assert!(load.admit(client(2)).is_some());
        drop(permits);
        assert_eq!(load.current(), 0);
    }
}
