//! How many secrets a registry is shown at a time: nobody can guess here at a rate that it would not take from one
//! address, and nobody's guesses keep others waiting.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use crate::connections::client;
use crate::oci::Registry;
use crate::source::SourceError;

/// Turns to show registries a secret.
pub(super) struct Turns {
    of_registry: moka::sync::Cache<Registry, Arc<Semaphore>>,
    of_client: moka::sync::Cache<(Registry, Option<IpAddr>), Arc<Semaphore>>,
}

/// Held while it is not known whether a secret is right.
pub(super) struct Turn {
    of_client: OwnedSemaphorePermit,
    _of_registry: OwnedSemaphorePermit,
}

/// Secrets that one registry is shown at a time, and those of one client.
const OF_REGISTRY: usize = 48;
const OF_CLIENT: usize = 16;

/// A wrong one holds its client's turn for so long. All others go on.
const WRONG: Duration = Duration::from_secs(1);

/// Whoever waits longer can ask the registry itself.
const PATIENCE: Duration = Duration::from_secs(5);

const MAX_REGISTRIES: u64 = 10_000;
const MAX_CLIENTS: u64 = 100_000;

impl Turns {
    pub(super) fn new() -> Self {
        Self { of_registry: moka::sync::Cache::new(MAX_REGISTRIES), of_client: moka::sync::Cache::new(MAX_CLIENTS) }
    }

    /// Waits until another secret may be shown to a registry.
    pub(super) async fn take(&self, registry: &Registry, from: Option<IpAddr>) -> Result<Turn, SourceError> {
        let turns = |count| Arc::new(Semaphore::new(count));
        let from = from.map(|from| client(from.to_canonical()));
        let of_client = self.of_client.get_with((registry.clone(), from), || turns(OF_CLIENT));
        let of_registry = self.of_registry.get_with(registry.clone(), || turns(OF_REGISTRY));
        let taken = timeout(PATIENCE, async {
            // Only those whose own turn it is wait among all.
            let own = of_client.acquire_owned().await.ok()?;
            Some(Turn { of_client: own, _of_registry: of_registry.acquire_owned().await.ok()? })
        });
        taken.await.ok().flatten().ok_or(SourceError::Busy)
    }
}

impl Turn {
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
        let (turns, registry) = (Turns::new(), "docker.io".parse().unwrap());
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
        let held = turns.take(&registry, from(1)).await.ok().unwrap();
        assert_eq!(asked.elapsed(), WRONG);
        let mut all = vec![held];
        for nth in 0..u8::try_from(OF_REGISTRY - 1).unwrap() {
            all.push(turns.take(&registry, from(100 + nth)).await.ok().unwrap());
        }
        assert_eq!(turns.take(&registry, from(200)).await.err(), Some(SourceError::Busy));
    }
}
