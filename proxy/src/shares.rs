//! Something that all registries share, of which none gets all: whoever can be asked by a name of its own must not keep
//! the others waiting.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::oci::Registry;

/// What is left, for all and for each.
pub struct Shares {
    all: Arc<Semaphore>,
    each: moka::sync::Cache<Registry, Arc<Semaphore>>,
    of_one: usize,
}

/// A part of it, for as long as it is held.
pub struct Share {
    _of_one: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

const MAX_REGISTRIES: u64 = 10_000;

/// Nobody has asked for so long; who holds a share holds the registry's as well.
const IDLE: Duration = Duration::from_secs(3600);

impl Shares {
    /// So much for all, of which one registry gets so much.
    pub fn new(all: usize, of_one: usize) -> Self {
        let each = moka::sync::Cache::builder().max_capacity(MAX_REGISTRIES).time_to_idle(IDLE).build();
        Self { all: Arc::new(Semaphore::new(all)), each, of_one }
    }

    /// One, if there is one left.
    pub fn take(&self, registry: &Registry) -> Option<Share> {
        let of_one = self.of(registry).try_acquire_owned().ok()?;
        Some(Share { _of_one: of_one, _of_all: self.all.clone().try_acquire_owned().ok()? })
    }

    /// Waits for so many, at most as many as one registry gets.
    pub async fn wait(&self, registry: &Registry, count: usize) -> Share {
        let count = u32::try_from(count.min(self.of_one)).unwrap_or(u32::MAX);
        // Only those whose own turn it is wait among all.
        let of_one = self.of(registry).acquire_many_owned(count).await;
        let of_all = self.all.clone().acquire_many_owned(count).await;
        let open = "these semaphores are never closed";
        Share { _of_one: of_one.expect(open), _of_all: of_all.expect(open) }
    }

    fn of(&self, registry: &Registry) -> Arc<Semaphore> {
        self.each.get_with_by_ref(registry, || Arc::new(Semaphore::new(self.of_one)))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn one_registry_leaves_some_for_the_others() {
        let shares = Shares::new(64, 24);
        let take = |name: &str| std::iter::from_fn(|| shares.take(&name.parse().unwrap())).collect::<Vec<_>>();
        let first = take("ghcr.io");
        let others = ["quay.io", "docker.io", "gcr.io"].map(take);
        assert_eq!((first.len(), others.each_ref().map(Vec::len)), (24, [24, 16, 0]));
        drop(first);
        assert_eq!(take("ghcr.io").len(), 24);
    }

    #[test]
    fn who_waits_for_its_own_registry_holds_nothing_of_the_others() {
        let shares = Shares::new(30, 10);
        let wait = |name: &str, count| shares.wait(&name.parse().unwrap(), count).now_or_never();
        let held = wait("ghcr.io", 10);
        assert!(held.is_some() && wait("ghcr.io", 1).is_none());
        let others = [wait("quay.io", 10), wait("docker.io", 999)];
        assert!(others.iter().all(Option::is_some), "more than its share is its share");
        drop(held);
        assert!(wait("ghcr.io", 10).is_some());
    }
}
