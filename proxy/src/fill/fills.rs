//! All fills that run: who asks for the same joins the same one, and there are never too many.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::sync::Semaphore;

use super::progress::Phase;
use super::run::RunningFill;
use super::span_stream::FillSources;
use super::write::MAX_WAITING_KIB;
use super::{Fill, FillView};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::oci::{Digest, Registry, Repository};
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::shares::{Share, Shares};
use crate::source::SourceError;
use crate::store::{Blob, Store};
use crate::times::{LONGEST_PAUSE, OBSERVATION_TTL, PAUSE};
use crate::trace;

/// What runs, and what is remembered of what went wrong.
pub struct Fills {
    running: Mutex<HashMap<FillKey, Arc<Fill>>>,
    distrusted: moka::sync::Cache<ContentSource, ()>,
    /// What was damaged here, and so may have been read by whoever asked for it anywhere.
    damaged: moka::sync::Cache<Digest, ()>,
    /// The disk refused to write lately.
    pub(super) disk_failed: moka::sync::Cache<(), ()>,
    /// What lately could not be kept.
    pub(super) no_room: moka::sync::Cache<FillKey, ()>,
    of_registries: Shares<Registry>,
    of_clients: Shares<IpAddr>,
    pub(super) large: Shares<Registry>,
    proofs: Arc<Semaphore>,
    /// KiB that may wait for the disk or the hash.
    pub(super) waiting_kib: Arc<Semaphore>,
    pub(super) memory: Arc<Memory>,
    pub(super) connections: Shares<Registry>,
    pub(super) store: Arc<Store>,
    pub(super) metrics: Arc<Metrics>,
    gauge: IntGauge,
}

/// Which requests share a fill: those for the same bytes of the same registry. Another registry's
/// bytes are proven only at their end, so nobody waits for them or reads them before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FillKey {
    pub digest: Digest,
    pub registry: Registry,
    /// Which rule it is fetched by: others may have other credentials, and be for other people.
    pub rule: usize,
    /// Where callers come with their own rights: those at one repository are none at another.
    pub repository: Option<Repository>,
}

/// A blob as it comes from somewhere.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContentSource {
    digest: Digest,
    registry: Registry,
    /// Where each repository has readers of its own. Otherwise repositories share their fills.
    repository: Option<Repository>,
}

impl ContentSource {
    pub fn new(place: &RepositoryRef, digest: &Digest) -> Self {
        let repository = place.rule.asks_who().then(|| place.repository.clone());
        Self { digest: digest.clone(), registry: place.registry.clone(), repository }
    }
}

impl FillKey {
    pub fn content(&self) -> ContentSource {
        let Self { digest, registry, repository, .. } = self.clone();
        ContentSource { digest, registry, repository }
    }

    pub fn new(place: &RepositoryRef, digest: &Digest) -> Self {
        let ContentSource { digest, registry, repository } = ContentSource::new(place, digest);
        Self { digest, registry, rule: place.rule.nth, repository }
    }
}

/// Whether somebody may have read what is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exposure {
    Never,
    Maybe,
}

/// Which fill somebody comes to read.
enum FillEntry {
    Joined(Arc<Fill>),
    /// A new one. The earlier one is being given up.
    Begun {
        fill: Arc<Fill>,
        earlier: Option<Arc<Fill>>,
        turn: FillPermit,
    },
}

/// What a fill has of what all fills share, until it ends.
pub(super) struct FillPermit {
    _of_registry: Share<Registry>,
    _of_client: Option<Share<IpAddr>>,
}

/// Large blobs written at the same time, half of them of one registry alone; more pass through uncached. Each takes two
/// threads.
const MAX_FILLS: usize = 512;

/// Fills of any size that run at the same time, half of them of one registry alone; more are refused. Larger: more
/// memory and sockets for registries that do not answer. Smaller: fewer blobs at a time.
const MAX_RUNNING: usize = 1024;

/// Fills that clients have begun, half of them by one alone: three quarters of all that run, so that one client with one
/// silent registry can go on with others, and leaves some to other clients.
const BEGUN_BY_CLIENTS: usize = 1536;

/// Connections beyond the first of each blob.
const MAX_CONNECTIONS: usize = 128;

/// Files being proven at the same time. Each takes a thread and the disk.
const MAX_PROOFS: usize = 8;

impl Fills {
    pub fn new(store: Arc<Store>, memory: Arc<Memory>, metrics: Arc<Metrics>) -> Self {
        Self {
            running: Mutex::default(),
            distrusted: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(OBSERVATION_TTL).build(),
            damaged: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(OBSERVATION_TTL).build(),
            disk_failed: moka::sync::Cache::builder().time_to_live(LONGEST_PAUSE).build(),
            no_room: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(PAUSE).build(),
            of_registries: Shares::new(MAX_RUNNING),
            of_clients: Shares::new(BEGUN_BY_CLIENTS),
            large: Shares::new(MAX_FILLS),
            proofs: Arc::new(Semaphore::new(MAX_PROOFS)),
            waiting_kib: Arc::new(Semaphore::new(MAX_WAITING_KIB)),
            memory,
            connections: Shares::new(MAX_CONNECTIONS),
            store,
            gauge: metrics.fills.with_label_values(&["running"]),
            metrics,
        }
    }

    /// What runs, the oldest first.
    pub fn views(&self) -> Vec<FillView> {
        let mut running: Vec<Arc<Fill>> = self.running.lock().values().cloned().collect();
        running.sort_by_key(|fill| fill.started);
        running.iter().map(|fill| fill.view()).collect()
    }

    /// The running fill of a digest.
    pub fn running(&self, key: &FillKey) -> Option<Arc<Fill>> {
        self.running.lock().get(key).cloned()
    }

    /// Whether this lately came with wrong bytes: a client may hold a bad beginning, which a good end must not complete.
    pub fn is_distrusted(&self, content: &ContentSource) -> bool {
        self.damaged.contains_key(&content.digest) || self.distrusted.contains_key(content)
    }

    /// Whether there lately was no room for it.
    pub fn has_no_room(&self, key: &FillKey) -> bool {
        self.no_room.contains_key(key)
    }

    /// Remembers that wrong bytes came.
    pub fn distrust(&self, content: ContentSource) {
        self.metrics.mismatches.inc();
        tracing::error!(digest = %content.digest, registry = %content.registry, "the bytes do not match their digest");
        self.distrusted.insert(content, ());
    }

    /// Drops a cached blob that does not match any more.
    pub(super) fn damaged(&self, digest: &Digest, blob: &Blob, seen: Exposure) {
        tracing::warn!(%digest, "a cached blob was damaged on disk");
        self.metrics.damaged.inc();
        self.store.large.forget(digest, blob);
        // Who has read its beginning must not get the end of another copy.
        if seen == Exposure::Maybe {
            self.damaged.insert(digest.clone(), ());
        }
    }

    /// Joins the running fill of a digest, or starts one from these sources, for a reader of this client who begins at
    /// `from`. A fill in a lower role is promoted to theirs.
    pub fn join(
        self: &Arc<Self>,
        key: &FillKey,
        place: &RepositoryRef,
        client: Option<IpAddr>,
        sources: Arc<dyn FillSources>,
        from: u64,
    ) -> Arc<Fill> {
        let (fill, earlier, turn) = match self.enter(key, place, client, sources.role()) {
            FillEntry::Joined(fill) => return fill,
            FillEntry::Begun { fill, earlier, turn } => (fill, earlier, turn),
        };
        let (fills, new) = (self.clone(), fill.clone());
        tokio::spawn(trace::carried(async move {
            let mut span = trace::begin("fill", trace::TraceSpanKind::Internal);
            let running = RunningFill { fills: &fills, fill: &new, _turn: turn };
            // What that one leaves behind is gone on with.
            if let Some(earlier) = earlier {
                earlier.ended().await;
            }
            span.within(running.fill_from(sources, from)).await;
            new.tell(&mut span);
        }));
        fill
    }

    /// Proves a file on disk by hashing it, while readers follow.
    pub fn prove(self: &Arc<Self>, key: &FillKey, place: &RepositoryRef, role: Role, blob: Arc<Blob>) -> Arc<Fill> {
        let (fill, turn) = match self.enter(key, place, None, CurrentRole::new(role)) {
            FillEntry::Joined(fill) => return fill,
            FillEntry::Begun { fill, turn, .. } => (fill, turn),
        };
        let (fills, new) = (self.clone(), fill.clone());
        tokio::spawn(async move {
            // Readers of what is proven already need threads as well.
            let permit = fills.proofs.clone().acquire_owned().await;
            let proving = tokio::task::spawn_blocking(move || {
                let running = RunningFill { fills: &fills, fill: &new, _turn: turn };
                running.prove(&blob);
            });
            let _ = proving.await;
            drop(permit);
        });
        fill
    }

    fn enter(&self, key: &FillKey, place: &RepositoryRef, client: Option<IpAddr>, role: CurrentRole) -> FillEntry {
        let mut running = self.running.lock();
        let earlier = running.get(key).filter(|fill| fill.progress.borrow().phase() != Phase::Failed).cloned();
        if let Some(fill) = &earlier
            && fill.audience.welcome()
        {
            if place.caller.authorization().is_some() {
                *fill.newest.lock() = place.caller.clone();
            }
            fill.role.promote(role.get());
            return FillEntry::Joined(fill.clone());
        }
        let fill = Arc::new(Fill::new(key.clone(), place.clone(), role));
        let Some(turn) = self.turn(key, client) else {
            fill.open(Err(SourceError::Busy));
            return FillEntry::Joined(fill);
        };
        running.insert(key.clone(), fill.clone());
        self.gauge.inc();
        FillEntry::Begun { fill, earlier, turn }
    }

    /// Leave to fill another blob of this registry for this client.
    fn turn(&self, key: &FillKey, client: Option<IpAddr>) -> Option<FillPermit> {
        let of_registry = self.of_registries.take(&key.registry, 1)?;
        let of_client = match client {
            Some(client) => Some(self.of_clients.take(&client, 1)?),
            None => None,
        };
        Some(FillPermit { _of_registry: of_registry, _of_client: of_client })
    }

    /// A fill is over.
    pub(super) fn leave(&self, over: &Fill) {
        let mut running = self.running.lock();
        // A failed one may have been replaced by now.
        if running.get(&over.key).is_some_and(|fill| std::ptr::eq(&raw const **fill, over)) {
            running.remove(&over.key);
        }
        self.gauge.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use async_trait::async_trait;
    use bytes::Bytes;
    use futures_util::stream::{self, StreamExt};

    use super::*;
    use crate::config::{Config, Size};
    use crate::fill::ConnectionMode;
    use crate::oci::Span;
    use crate::registries::Registries;
    use crate::source::{Incoming, ServedFrom};

    const MIB: u64 = 1 << 20;

    /// Gives the first MiB of a long blob to whoever asks for it, and then nothing.
    #[derive(Default)]
    struct Stalling {
        beginnings: AtomicU32,
    }

    #[async_trait]
    impl FillSources for Stalling {
        async fn open(&self, from: u64, end: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
            let total = 64 * MIB;
            let beginning = (from == 0).then(|| Ok(Bytes::from(vec![7; 1 << 20])));
            self.beginnings.fetch_add(u32::from(beginning.is_some()), Ordering::Relaxed);
            let span = Span { start: from, end: end.unwrap_or(total).min(total) };
            Ok((Incoming::new(span, total, stream::iter(beginning).chain(stream::pending())), ServedFrom::Upstream))
        }

        fn connections(&self) -> ConnectionMode {
            ConnectionMode::Chosen(1)
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_comes_while_a_fill_is_given_up_goes_on_with_what_it_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::new());
        let store = Store::open(
            dir.path(),
            crate::config::DiskShare::Size(Size(1 << 30)),
            crate::config::DiskShare::Percent(0),
            1 << 20,
            &metrics,
        )
        .await
        .unwrap();
        let fills = Arc::new(Fills::new(Arc::new(store), Arc::new(Memory::new(1 << 20)), metrics));
        let registries = Registries::new(&Config::default());
        let (registry, repository): (Registry, Repository) =
            ("docker.io".parse().unwrap(), "library/a".parse().unwrap());
        let place = RepositoryRef::new(registries.rule(&registry, &repository).clone(), registry, repository);
        let key = FillKey::new(&place, &Digest::of(b"long"));
        let sources = Arc::new(Stalling::default());

        let first = fills.join(&key, &place, None, sources.clone(), 0);
        assert!(first.reaches(0).await);
        let reader = first.audience.sit();
        assert!(Arc::ptr_eq(&first, &fills.join(&key, &place, None, sources.clone(), 0)), "it is joined");
        drop(reader);
        assert!(first.audience.close_after(Duration::ZERO));
        let second = fills.join(&key, &place, None, sources.clone(), 0);
        assert!(!Arc::ptr_eq(&first, &second), "nobody is let in any more");
        assert!(second.opened().await.is_ok());
        assert!(first.progress.borrow().is_over());
        assert!(second.reaches(0).await);
        assert_eq!(sources.beginnings.load(Ordering::Relaxed), 1, "the beginning is kept");
        assert!(Arc::ptr_eq(&second, &fills.running(&key).unwrap()), "the end of the first one is not its end");
    }
}
