//! How many secrets a registry is shown at a time: nobody can guess here at a rate that it would not take from one
//! address, and nobody's guesses keep others waiting.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use crate::oci::Registry;
use crate::shares::{Share, Shares};
use crate::source::SourceError;
use crate::times::SERVICE_TIMEOUT;

/// Turns to show registries a secret.
pub(super) struct LoginThrottle {
    of_registry: moka::sync::Cache<Registry, Arc<Shares<Option<IpAddr>>>>,
    of_client: moka::sync::Cache<(Registry, Option<IpAddr>), Arc<Semaphore>>,
}

/// Held while it is not known whether a secret is right.
pub(super) struct LoginPermit {
    of_client: OwnedSemaphorePermit,
    _of_registry: Share<Option<IpAddr>>,
}

/// Secrets that one registry is shown at a time, and those of one client.
const OF_REGISTRY: usize = 48;
const OF_CLIENT: usize = 16;

/// A wrong one holds its client's turn for so long, and nobody else's.
const WRONG: Duration = Duration::from_secs(1);

const MAX_REGISTRIES: u64 = 10_000;
const MAX_CLIENTS: u64 = 100_000;

impl LoginThrottle {
    pub(super) fn new() -> Self {
        Self { of_registry: moka::sync::Cache::new(MAX_REGISTRIES), of_client: moka::sync::Cache::new(MAX_CLIENTS) }
    }

    /// Waits until another secret may be shown to a registry.
    pub(super) async fn take(&self, registry: &Registry, client: Option<IpAddr>) -> Result<LoginPermit, SourceError> {
        let of_client = self.of_client.get_with((registry.clone(), client), || Arc::new(Semaphore::new(OF_CLIENT)));
        let of_registry = self.of_registry.get_with_by_ref(registry, || Arc::new(Shares::new(OF_REGISTRY)));
        let taken = timeout(SERVICE_TIMEOUT, async {
            // Only those whose own turn it is wait among all.
            let own = of_client.acquire_owned().await.ok()?;
            Some(LoginPermit { of_client: own, _of_registry: of_registry.wait(&client, 1).await })
        });
        taken.await.ok().flatten().ok_or(SourceError::Busy)
    }
}

impl LoginPermit {
    /// The secret was wrong.
    pub(super) fn was_wrong(self) {
        let of_client = self.of_client;
        tokio::spawn(async move {
            sleep(WRONG).await;
            drop(of_client);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_guesses_waits_and_others_do_not() {
        let (turns, registry) = (LoginThrottle::new(), "docker.io".parse().unwrap());
        let from = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        for _ in 0..OF_CLIENT {
            turns.take(&registry, from(1)).await.ok().unwrap().was_wrong();
        }
        let asked = tokio::time::Instant::now();
        drop(turns.take(&registry, from(2)).await.ok().unwrap());
        assert_eq!(asked.elapsed(), Duration::ZERO, "another client");
        // Many who guess at once keep nobody else waiting either.
        for nth in 3..23 {
            for _ in 0..OF_CLIENT {
                turns.take(&registry, from(nth)).await.ok().unwrap().was_wrong();
            }
        }
        assert_eq!(asked.elapsed(), Duration::ZERO, "others");
        drop(turns.take(&registry, from(1)).await.ok().unwrap());
        assert_eq!(asked.elapsed(), WRONG);
    }

    #[tokio::test(start_paused = true)]
    async fn registry_that_says_nothing_for_long_has_turns_for_those_who_come() {
        let (turns, registry) = (LoginThrottle::new(), "docker.io".parse().unwrap());
        let from = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let mut held = Vec::new();
        for nth in 1..=3 {
            while let Ok(turn) = turns.take(&registry, from(nth)).await {
                held.push(turn);
            }
        }
        assert!(turns.take(&registry, from(4)).await.is_ok(), "{} are held", held.len());
    }
}
