//! Limits the credentials that a registry verifies at a time. dray must not help a client to guess faster than the
//! registry allows one address, and one client's guesses must not delay other clients.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use crate::oci::Registry;
use crate::shares::{Share, Shares};
use crate::source::SourceError;
use crate::times::SERVICE_TIMEOUT;

/// Permits to have a registry verify a credential.
pub(super) struct LoginThrottle {
    per_registry: moka::sync::Cache<Registry, Arc<Shares<Option<IpAddr>>>>,
    per_client: moka::sync::Cache<(Registry, Option<IpAddr>), Arc<Semaphore>>,
}

/// Held until the registry has accepted or rejected the credential.
pub(super) struct LoginPermit {
    per_client: OwnedSemaphorePermit,
    _per_registry: Share<Option<IpAddr>>,
}

/// Credentials in verification at one registry, for all clients and for one. Larger: faster guessing. Smaller: clients
/// that start together wait for a slow registry.
const MAX_CHECKS_PER_REGISTRY: usize = 48;
const MAX_CHECKS_PER_CLIENT: usize = 16;

/// A rejected credential keeps its client's permit for this long. Larger: a client with a wrong password waits longer
/// for its right one. Smaller: faster guessing.
const REJECTED_HOLD: Duration = Duration::from_secs(1);

/// Bound the registries and clients with a limit. Smaller: one that is evicted starts with all its permits again.
const MAX_REGISTRIES: u64 = 10_000;
const MAX_CLIENTS: u64 = 100_000;

impl LoginThrottle {
    pub(super) fn new() -> Self {
        Self { per_registry: moka::sync::Cache::new(MAX_REGISTRIES), per_client: moka::sync::Cache::new(MAX_CLIENTS) }
    }

    /// Waits until the registry may verify another credential.
    pub(super) async fn acquire(
        &self,
        registry: &Registry,
        client: Option<IpAddr>,
    ) -> Result<LoginPermit, SourceError> {
        let per_client =
            self.per_client.get_with((registry.clone(), client), || Arc::new(Semaphore::new(MAX_CHECKS_PER_CLIENT)));
        let per_registry =
            self.per_registry.get_with_by_ref(registry, || Arc::new(Shares::new(MAX_CHECKS_PER_REGISTRY)));
        let acquired = timeout(SERVICE_TIMEOUT, async {
            // The client's own permit comes first: a client over its limit must not wait in the registry's queue.
            let own = per_client.acquire_owned().await.ok()?;
            Some(LoginPermit { per_client: own, _per_registry: per_registry.wait(&client, 1).await })
        });
        acquired.await.ok().flatten().ok_or(SourceError::Busy)
    }
}

impl LoginPermit {
    /// The registry rejected the credential.
    pub(super) fn mark_rejected(self) {
        let per_client = self.per_client;
        tokio::spawn(async move {
            sleep(REJECTED_HOLD).await;
            drop(per_client);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn guessing_client_waits_and_others_do_not() {
        let (throttle, registry) = (LoginThrottle::new(), "docker.io".parse().unwrap());
        let from = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        for _ in 0..MAX_CHECKS_PER_CLIENT {
            throttle.acquire(&registry, from(1)).await.ok().unwrap().mark_rejected();
        }
        let started = tokio::time::Instant::now();
        drop(throttle.acquire(&registry, from(2)).await.ok().unwrap());
        assert_eq!(started.elapsed(), Duration::ZERO, "another client");
        // Many guessing clients do not delay the others either.
        for nth in 3..23 {
            for _ in 0..MAX_CHECKS_PER_CLIENT {
                throttle.acquire(&registry, from(nth)).await.ok().unwrap().mark_rejected();
            }
        }
        assert_eq!(started.elapsed(), Duration::ZERO, "others");
        drop(throttle.acquire(&registry, from(1)).await.ok().unwrap());
        assert_eq!(started.elapsed(), REJECTED_HOLD);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_registry_has_permits_for_new_clients() {
        let (throttle, registry) = (LoginThrottle::new(), "docker.io".parse().unwrap());
        let from = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let mut held = Vec::new();
        for nth in 1..=3 {
            while let Ok(permit) = throttle.acquire(&registry, from(nth)).await {
                held.push(permit);
            }
        }
        assert!(throttle.acquire(&registry, from(4)).await.is_ok(), "{} are held", held.len());
    }
}
