//! Something that all registries share, or all clients, of which none gets all: nobody keeps the others waiting.

use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What is left, for all and for each.
pub struct Shares<Who> {
    all: Arc<Semaphore>,
    each: moka::sync::Cache<Who, Arc<Semaphore>>,
    of_one: usize,
}

/// A part of it, for as long as it is held.
pub struct Share {
    _of_one: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

const MAX_KNOWN: u64 = 10_000;

/// Whoever has not asked for so long; who holds a share is still known by it.
const IDLE: Duration = Duration::from_secs(3600);

impl<Who: Clone + Eq + Hash + Send + Sync + 'static> Shares<Who> {
    /// So much for all, of which one gets so much.
    pub fn new(all: usize, of_one: usize) -> Self {
        let each = moka::sync::Cache::builder().max_capacity(MAX_KNOWN).time_to_idle(IDLE).build();
        Self { all: Arc::new(Semaphore::new(all)), each, of_one }
    }

    /// So many, if there are as many left.
    pub fn take(&self, who: &Who, count: u32) -> Option<Share> {
        let of_one = self.of(who).try_acquire_many_owned(count).ok()?;
        Some(Share { _of_one: of_one, _of_all: self.all.clone().try_acquire_many_owned(count).ok()? })
    }

    /// Waits for so many, at most as many as one gets.
    pub async fn wait(&self, who: &Who, count: usize) -> Share {
        let count = u32::try_from(count.min(self.of_one)).unwrap_or(u32::MAX);
        // Only those whose own turn it is wait among all.
        let of_one = self.of(who).acquire_many_owned(count).await;
        let of_all = self.all.clone().acquire_many_owned(count).await;
        let open = "these semaphores are never closed";
        Share { _of_one: of_one.expect(open), _of_all: of_all.expect(open) }
    }

    fn of(&self, who: &Who) -> Arc<Semaphore> {
        self.each.get_with_by_ref(who, || Arc::new(Semaphore::new(self.of_one)))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn one_leaves_some_for_the_others() {
        let shares = Shares::new(64, 24);
        let take = |name: &'static str| std::iter::from_fn(|| shares.take(&name, 1)).collect::<Vec<_>>();
        let first = take("ghcr.io");
        let others = ["quay.io", "docker.io", "gcr.io"].map(take);
        assert_eq!((first.len(), others.each_ref().map(Vec::len)), (24, [24, 16, 0]));
        drop(first);
        assert_eq!(take("ghcr.io").len(), 24);
    }

    #[test]
    fn who_waits_for_its_own_share_holds_nothing_of_the_others() {
        let shares = Shares::new(30, 10);
        let wait = |name: &'static str, count| shares.wait(&name, count).now_or_never();
        let held = wait("ghcr.io", 10);
        assert!(held.is_some() && wait("ghcr.io", 1).is_none());
        let others = [wait("quay.io", 10), wait("docker.io", 999)];
        assert!(others.iter().all(Option::is_some), "more than its share is its share");
        drop(held);
        assert!(wait("ghcr.io", 10).is_some());
    }
}
