//! Connections beyond the first of each blob: bounded in all and for each registry.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::oci::Registry;

/// Connections of one blob.
pub(super) const MAX_OF_BLOB: usize = 8;

/// Beyond the first of each blob.
const MAX_OF_REGISTRY: usize = 24;
const MAX_IN_ALL: usize = 64;

/// What is left of the further connections.
pub(super) struct Allowance {
    all: Arc<Semaphore>,
    registries: moka::sync::Cache<Registry, Arc<Semaphore>>,
}

/// Leave to open one more, for as long as it is held.
pub(super) struct Leave {
    _of_all: OwnedSemaphorePermit,
    _of_registry: OwnedSemaphorePermit,
}

impl Allowance {
    pub(super) fn new() -> Self {
        // Idle means that nobody has asked for a while; who holds a leave holds the semaphore.
        let registries = moka::sync::Cache::builder().max_capacity(10_000).time_to_idle(Duration::from_secs(3600));
        Self { all: Arc::new(Semaphore::new(MAX_IN_ALL)), registries: registries.build() }
    }

    pub(super) fn take(&self, registry: &Registry) -> Option<Leave> {
        let registry = self.registries.get_with_by_ref(registry, || Arc::new(Semaphore::new(MAX_OF_REGISTRY)));
        let of_registry = registry.try_acquire_owned().ok()?;
        let of_all = self.all.clone().try_acquire_owned().ok()?;
        Some(Leave { _of_all: of_all, _of_registry: of_registry })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_registry_leaves_some_for_the_others() {
        let allowance = Allowance::new();
        let take = |name: &str| std::iter::from_fn(|| allowance.take(&name.parse().unwrap())).collect::<Vec<_>>();
        let first = take("ghcr.io");
        let others = ["quay.io", "docker.io", "gcr.io"].map(take);
        assert_eq!((first.len(), others.each_ref().map(Vec::len)), (24, [24, 16, 0]));
        drop(first);
        assert_eq!(take("ghcr.io").len(), 24);
    }
}
