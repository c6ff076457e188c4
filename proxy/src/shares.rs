//! A resource that many parties share, such as memory or connections. A party can use much of an idle resource, and
//! always leaves some for the next party.
//!
//! A party may take more if it then holds no more than what is left (dynamic thresholds, as switches share their packet
//! memory). The first party can hold half of the resource, the second half of the rest, and so on. No limit per party
//! has to be configured, and only parties that hold something are remembered.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// A shared resource, and how much of it each party holds.
pub struct Shares<Party>(Arc<Pool<Party>>);

/// A part of the resource, held until dropped.
pub struct Share<Party: Eq + Hash> {
    pool: Arc<Pool<Party>>,
    party: Party,
    count: usize,
}

struct Pool<Party> {
    all: usize,
    state: Mutex<PoolState<Party>>,
    released: Notify,
}

struct PoolState<Party> {
    left: usize,
    /// Contains only parties that hold something.
    held: HashMap<Party, usize>,
}

impl<Party: Clone + Eq + Hash> Shares<Party> {
    pub fn new(all: usize) -> Self {
        let state = Mutex::new(PoolState { left: all, held: HashMap::new() });
        Self(Arc::new(Pool { all, state, released: Notify::new() }))
    }

    /// An empty share, to grow.
    pub fn nothing(&self, party: &Party) -> Share<Party> {
        Share { pool: self.0.clone(), party: party.clone(), count: 0 }
    }

    /// A share of `count`, if the party may hold that much more.
    pub fn take(&self, party: &Party, count: usize) -> Option<Share<Party>> {
        let mut share = self.nothing(party);
        share.grow(count).then_some(share)
    }

    /// Waits for a share of `count`, or of half of the resource if that is less: one party never gets more. The waiting
    /// task must not hold another share, or it may wait for itself.
    pub async fn wait(&self, party: &Party, count: usize) -> Share<Party> {
        let count = count.min(self.0.all / 2);
        loop {
            let mut released = std::pin::pin!(self.0.released.notified());
            released.as_mut().enable();
            if let Some(share) = self.take(party, count) {
                return share;
            }
            released.await;
        }
    }

    /// Whether a party holds anything.
    pub fn is_holding(&self, party: &Party) -> bool {
        self.0.state.lock().held.contains_key(party)
    }

    /// How much no party holds.
    pub fn left(&self) -> usize {
        self.0.state.lock().left
    }
}

impl<Party: Clone + Eq + Hash> Share<Party> {
    /// Grows the share to `count`. False: the party may not hold as much.
    pub fn cover(&mut self, count: usize) -> bool {
        self.grow(count.saturating_sub(self.count))
    }

    /// Adds `count`. False: the party may not hold as much.
    pub fn grow(&mut self, count: usize) -> bool {
        if count == 0 {
            return true;
        }
        let mut state = self.pool.state.lock();
        let held = state.held.get(&self.party).copied().unwrap_or(0);
        if held + count > state.left {
            return false;
        }
        state.left -= count;
        *state.held.entry(self.party.clone()).or_default() += count;
        self.count += count;
        true
    }
}

impl<Party: Eq + Hash> Drop for Share<Party> {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        let mut state = self.pool.state.lock();
        state.left += self.count;
        if let Some(held) = state.held.get_mut(&self.party) {
            *held -= self.count;
            if *held == 0 {
                state.held.remove(&self.party);
            }
        }
        drop(state);
        self.pool.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn take_all(shares: &Shares<&'static str>, party: &'static str) -> Vec<Share<&'static str>> {
        std::iter::from_fn(|| shares.take(&party, 1)).collect()
    }

    #[test]
    fn each_party_leaves_as_much_as_it_holds() {
        let shares = Shares::new(120);
        let parties = ["a", "b", "c", "d"].map(|party| take_all(&shares, party));
        assert_eq!(parties.each_ref().map(Vec::len), [60, 30, 15, 8]);
        assert_eq!(shares.left(), 7);
        assert!(shares.take(&"e", 7).is_some() && shares.take(&"e", 8).is_none());
        drop(parties);
        assert_eq!(shares.left(), 120);
        assert!(shares.0.state.lock().held.is_empty(), "a party without a share is forgotten");
    }

    #[test]
    fn share_grows_while_others_leave_room() {
        let shares = Shares::new(100);
        let mut share = shares.nothing(&"a");
        assert!(share.grow(40) && !share.grow(21) && share.grow(10) && !share.grow(1));
        assert!(shares.take(&"b", 25).is_some() && shares.nothing(&"a").grow(0));
        drop(share);
        assert_eq!(shares.left(), 100);
    }

    #[tokio::test]
    async fn waiting_party_continues_after_a_release() {
        let shares = Shares::new(2);
        let held = shares.take(&"a", 1).unwrap();
        assert!(shares.wait(&"a", 1).now_or_never().is_none(), "its own share is taken");
        assert!(shares.wait(&"b", 1).now_or_never().is_some(), "others do not wait for it");
        let waiting = shares.wait(&"a", 9);
        let (_share, ()) = tokio::join!(waiting, async {
            tokio::task::yield_now().await;
            drop(held);
        });
    }
}
