//! Something that many parties share, such as memory or connections: whoever uses it may have much while it is idle, and
//! nobody takes what the next one needs.
//!
//! A party may take something if it then holds no more than is left for the others (dynamic thresholds, as switches share
//! their packet memory). So one alone has half of all, one that comes then half of the rest, and each leaves as much as it
//! has to the next. No limit for each party has to be chosen, and only those who hold something are remembered.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// What there is, and who has how much of it.
pub struct Shares<Party>(Arc<Pool<Party>>);

/// A part of it, for as long as it is held.
pub struct Share<Party: Eq + Hash> {
    pool: Arc<Pool<Party>>,
    party: Party,
    count: usize,
}

struct Pool<Party> {
    all: usize,
    state: Mutex<PoolState<Party>>,
    given_back: Notify,
}

struct PoolState<Party> {
    left: usize,
    /// Whoever holds nothing is not in it.
    held: HashMap<Party, usize>,
}

impl<Party: Clone + Eq + Hash> Shares<Party> {
    pub fn new(all: usize) -> Self {
        let state = Mutex::new(PoolState { left: all, held: HashMap::new() });
        Self(Arc::new(Pool { all, state, given_back: Notify::new() }))
    }

    /// Nothing yet, to grow.
    pub fn nothing(&self, party: &Party) -> Share<Party> {
        Share { pool: self.0.clone(), party: party.clone(), count: 0 }
    }

    /// So many, if the party may have as many.
    pub fn take(&self, party: &Party, count: usize) -> Option<Share<Party>> {
        let mut share = self.nothing(party);
        share.grow(count).then_some(share)
    }

    /// Waits for so many, at most as many as one alone may have. Whoever waits holds nothing.
    pub async fn wait(&self, party: &Party, count: usize) -> Share<Party> {
        let count = count.min(self.0.all / 2);
        loop {
            let mut given_back = std::pin::pin!(self.0.given_back.notified());
            given_back.as_mut().enable();
            if let Some(share) = self.take(party, count) {
                return share;
            }
            given_back.await;
        }
    }

    /// Whether a party holds anything.
    pub fn is_holding(&self, party: &Party) -> bool {
        self.0.state.lock().held.contains_key(party)
    }

    /// What nobody holds.
    pub fn left(&self) -> usize {
        self.0.state.lock().left
    }
}

impl<Party: Clone + Eq + Hash> Share<Party> {
    /// Takes what is missing to hold so many.
    pub fn cover(&mut self, count: usize) -> bool {
        self.grow(count.saturating_sub(self.count))
    }

    /// Takes more of the same, if the party may have as much.
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

impl<Party> Pool<Party> {}

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
        self.pool.given_back.notify_waiters();
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
    fn each_party_leaves_as_much_as_it_has() {
        let shares = Shares::new(120);
        let parties = ["a", "b", "c", "d"].map(|party| take_all(&shares, party));
        assert_eq!(parties.each_ref().map(Vec::len), [60, 30, 15, 8]);
        assert_eq!(shares.left(), 7);
        assert!(shares.take(&"e", 7).is_some() && shares.take(&"e", 8).is_none());
        drop(parties);
        assert_eq!(shares.left(), 120);
        assert!(shares.0.state.lock().held.is_empty(), "whoever holds nothing costs nothing");
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
    async fn who_waits_goes_on_when_something_is_given_back() {
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
