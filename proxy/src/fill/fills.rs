//! All running fills: requests for the same key share a fill, and the number of fills is bounded.

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
use crate::bandwidth::{CurrentPriority, Priority};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::oci::{Digest, Registry, Repository};
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::shares::{Share, Shares};
use crate::source::SourceError;
use crate::store::{Blob, Store};
use crate::times::{MAX_RETRY_DELAY, OBSERVATION_TTL, PAUSE};
use crate::trace;

/// Running fills, and recent failures.
pub struct Fills {
    running: Mutex<HashMap<FillKey, Arc<Fill>>>,
    distrusted: moka::sync::Cache<ContentSource, ()>,
    /// Blobs that were found corrupt on the disk. Clients may have read their beginning, whatever the repository.
    corrupt: moka::sync::Cache<Digest, ()>,
    /// Present if a disk write failed recently.
    pub(super) disk_failed: moka::sync::Cache<(), ()>,
    /// Blobs that could not be cached recently.
    pub(super) no_space: moka::sync::Cache<FillKey, ()>,
    of_registries: Shares<Registry>,
    of_clients: Shares<IpAddr>,
    pub(super) large: Shares<Registry>,
    verifications: Arc<Semaphore>,
    /// KiB that may wait for the disk or the hash.
    pub(super) waiting_kib: Arc<Semaphore>,
    pub(super) memory: Arc<Memory>,
    pub(super) connections: Shares<Registry>,
    pub(super) store: Arc<Store>,
    pub(super) metrics: Arc<Metrics>,
    gauge: IntGauge,
}

/// Requests with an equal key share a fill. The key includes the registry: content of another registry is verified only
/// at its end, and a reader must not wait for it or see it before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FillKey {
    pub digest: Digest,
    pub registry: Registry,
    /// The ID of the rule: other rules may have other credentials, and serve other clients.
    pub rule: u64,
    /// Set if clients are authorized with their own credentials: access to one repository does not imply access to
    /// another.
    pub repository: Option<Repository>,
}

/// A blob as a registry or repository serves it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContentSource {
    digest: Digest,
    registry: Registry,
    /// Set if each repository authorizes its own clients. Otherwise repositories share their fills.
    repository: Option<Repository>,
}

impl ContentSource {
    pub fn new(repo_ref: &RepositoryRef, digest: &Digest) -> Self {
        let repository = repo_ref.rule.is_passthrough().then(|| repo_ref.repository.clone());
        Self { digest: digest.clone(), registry: repo_ref.registry.clone(), repository }
    }
}

impl FillKey {
    pub fn content(&self) -> ContentSource {
        let Self { digest, registry, repository, .. } = self.clone();
        ContentSource { digest, registry, repository }
    }

    pub fn new(repo_ref: &RepositoryRef, digest: &Digest) -> Self {
        let ContentSource { digest, registry, repository } = ContentSource::new(repo_ref, digest);
        Self { digest, registry, rule: repo_ref.rule.id, repository }
    }
}

/// Whether a client may have read a corrupt blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exposure {
    Never,
    Maybe,
}

/// The fill that a request reads.
enum FillEntry {
    Joined(Arc<Fill>),
    /// A new fill. The earlier one is being abandoned.
    Started {
        fill: Arc<Fill>,
        earlier: Option<Arc<Fill>>,
        permit: FillPermit,
    },
}

/// The shares of common limits that a fill holds until it ends.
pub(super) struct FillPermit {
    _of_registry: Share<Registry>,
    _of_client: Option<Share<IpAddr>>,
}

/// Large blobs written at the same time, half of them from one registry; more bypass the cache. Larger: more threads,
/// two for each blob. Smaller: more blobs bypass the cache under load.
const MAX_FILLS: usize = 512;

/// Fills of any size that run at the same time, half of them from one registry; more are rejected. Larger: more memory
/// and sockets for registries that do not respond. Smaller: fewer blobs at a time.
const MAX_RUNNING: usize = 1024;

/// Fills started by clients, half of them (three quarters of [`MAX_RUNNING`]) by one client. One client with one silent
/// registry can still use others, and leaves some fills to other clients. Larger: one client can use up all fills.
/// Smaller: one client downloads fewer blobs at a time.
const MAX_STARTED_BY_CLIENTS: usize = 1536;

/// Connections to upstreams beyond the first of each blob, half of them to one registry. Larger: more sockets, and
/// registries may limit dray. Smaller: large blobs take longer under load.
const MAX_CONNECTIONS: usize = 128;

/// Cached files verified at the same time. Each takes a thread and the disk. Larger: readers of verified files wait for
/// threads. Smaller: after a crash, the first request of each blob waits longer.
const MAX_VERIFICATIONS: usize = 8;

impl Fills {
    pub fn new(store: Arc<Store>, memory: Arc<Memory>, metrics: Arc<Metrics>) -> Self {
        Self {
            running: Mutex::default(),
            distrusted: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(OBSERVATION_TTL).build(),
            corrupt: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(OBSERVATION_TTL).build(),
            disk_failed: moka::sync::Cache::builder().time_to_live(MAX_RETRY_DELAY).build(),
            no_space: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(PAUSE).build(),
            of_registries: Shares::new(MAX_RUNNING),
            of_clients: Shares::new(MAX_STARTED_BY_CLIENTS),
            large: Shares::new(MAX_FILLS),
            verifications: Arc::new(Semaphore::new(MAX_VERIFICATIONS)),
            waiting_kib: Arc::new(Semaphore::new(MAX_WAITING_KIB)),
            memory,
            connections: Shares::new(MAX_CONNECTIONS),
            store,
            gauge: metrics.downloads.clone(),
            metrics,
        }
    }

    /// The running fills, the oldest first.
    pub fn views(&self) -> Vec<FillView> {
        let mut running: Vec<Arc<Fill>> = self.running.lock().values().cloned().collect();
        running.sort_by_key(|fill| fill.started);
        running.iter().map(|fill| fill.view()).collect()
    }

    /// How many of the running fills have such a key.
    pub fn count(&self, is_counted: impl Fn(&FillKey) -> bool) -> u64 {
        self.running.lock().keys().filter(|key| is_counted(key)).count() as u64
    }

    /// The running fill of a key.
    pub fn running(&self, key: &FillKey) -> Option<Arc<Fill>> {
        self.running.lock().get(key).cloned()
    }

    /// Whether this content was corrupt recently. A client may hold its beginning, which the end of a good copy must
    /// not complete.
    pub fn is_distrusted(&self, content: &ContentSource) -> bool {
        self.corrupt.contains_key(&content.digest) || self.distrusted.contains_key(content)
    }

    /// Whether there was no room for it recently.
    pub fn has_no_space(&self, key: &FillKey) -> bool {
        self.no_space.contains_key(key)
    }

    /// Remembers that bytes did not match their digest.
    pub fn distrust(&self, content: ContentSource) {
        self.metrics.mismatches.inc();
        tracing::error!(digest = %content.digest, registry = %content.registry, "digest mismatch");
        self.distrusted.insert(content, ());
    }

    /// Drops a cached blob that no longer matches its digest.
    pub(super) fn drop_corrupt(&self, digest: &Digest, blob: &Blob, seen: Exposure) {
        tracing::warn!(%digest, "cached blob corrupt");
        self.metrics.corrupt_blobs.inc();
        self.store.large.forget(digest, blob);
        // A client that has read the beginning must not get the end of another copy.
        if seen == Exposure::Maybe {
            self.corrupt.insert(digest.clone(), ());
        }
    }

    /// Joins the running fill of a key, or starts one from these sources for a client that reads at `from`. A fill in a
    /// lower role is promoted to the role of `sources`.
    pub fn join(
        self: &Arc<Self>,
        key: &FillKey,
        repo_ref: &RepositoryRef,
        client: Option<IpAddr>,
        sources: Arc<dyn FillSources>,
        from: u64,
    ) -> Arc<Fill> {
        let (fill, earlier, permit) = match self.enter(key, repo_ref, client, sources.role(), sources.priority()) {
            FillEntry::Joined(fill) => return fill,
            FillEntry::Started { fill, earlier, permit } => (fill, earlier, permit),
        };
        let (fills, new) = (self.clone(), fill.clone());
        tokio::spawn(trace::carried(async move {
            let mut span = trace::begin("download", trace::TraceSpanKind::Internal);
            let running = RunningFill { fills: &fills, fill: &new, _permit: permit };
            // The partial of the abandoned fill is resumed.
            if let Some(earlier) = earlier {
                earlier.ended().await;
            }
            span.within(running.fill_from(sources, from)).await;
            new.record_in(&mut span);
        }));
        fill
    }

    /// Verifies a file on disk by hashing it, while readers follow.
    pub fn prove(self: &Arc<Self>, key: &FillKey, repo_ref: &RepositoryRef, role: Role, blob: Arc<Blob>) -> Arc<Fill> {
        let (fill, permit) =
            match self.enter(key, repo_ref, None, CurrentRole::new(role), CurrentPriority::new(Priority::Background)) {
                FillEntry::Joined(fill) => return fill,
                FillEntry::Started { fill, permit, .. } => (fill, permit),
            };
        let (fills, new) = (self.clone(), fill.clone());
        tokio::spawn(async move {
            // The limit leaves threads to the readers of verified files.
            let slot = fills.verifications.clone().acquire_owned().await;
            let proving = tokio::task::spawn_blocking(move || {
                let running = RunningFill { fills: &fills, fill: &new, _permit: permit };
                running.prove(&blob);
            });
            let _ = proving.await;
            drop(slot);
        });
        fill
    }

    fn enter(
        &self,
        key: &FillKey,
        repo_ref: &RepositoryRef,
        client: Option<IpAddr>,
        role: CurrentRole,
        priority: CurrentPriority,
    ) -> FillEntry {
        let mut running = self.running.lock();
        let earlier = running.get(key).filter(|fill| fill.progress.borrow().phase() != Phase::Failed).cloned();
        if let Some(fill) = &earlier
            && fill.readers.admit()
        {
            if repo_ref.principal.authorization().is_some() {
                *fill.latest_principal.lock() = repo_ref.principal.clone();
            }
            fill.role.promote(role.get());
            fill.priority.raise(priority.get());
            return FillEntry::Joined(fill.clone());
        }
        let fill = Arc::new(Fill::new(key.clone(), repo_ref.clone(), role, priority));
        let Some(permit) = self.permit(key, client) else {
            fill.open(Err(SourceError::Busy));
            return FillEntry::Joined(fill);
        };
        running.insert(key.clone(), fill.clone());
        self.gauge.inc();
        FillEntry::Started { fill, earlier, permit }
    }

    /// A permit for another fill of this registry for this client.
    fn permit(&self, key: &FillKey, client: Option<IpAddr>) -> Option<FillPermit> {
        let of_registry = self.of_registries.take(&key.registry, 1)?;
        let of_client = match client {
            Some(client) => Some(self.of_clients.take(&client, 1)?),
            None => None,
        };
        Some(FillPermit { _of_registry: of_registry, _of_client: of_client })
    }

    /// Removes a fill that has ended.
    pub(super) fn remove(&self, over: &Fill) {
        let mut running = self.running.lock();
        // A new fill may have replaced a failed one.
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

    /// Sends the first MiB of a long blob to each request at offset 0, and nothing to others.
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
    async fn request_during_abandonment_resumes_its_partial() {
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
        let repo_ref = RepositoryRef::new(registries.rule(&registry, &repository), registry, repository);
        let key = FillKey::new(&repo_ref, &Digest::of(b"long"));
        let sources = Arc::new(Stalling::default());

        let first = fills.join(&key, &repo_ref, None, sources.clone(), 0);
        assert!(first.reaches(0).await);
        let reader = first.readers.register();
        assert!(Arc::ptr_eq(&first, &fills.join(&key, &repo_ref, None, sources.clone(), 0)), "requests share the fill");
        drop(reader);
        assert!(first.readers.close_after(Duration::ZERO));
        let second = fills.join(&key, &repo_ref, None, sources.clone(), 0);
        assert!(!Arc::ptr_eq(&first, &second), "no reader is admitted any more");
        assert!(second.opened().await.is_ok());
        assert!(first.progress.borrow().is_over());
        assert!(second.reaches(0).await);
        assert_eq!(sources.beginnings.load(Ordering::Relaxed), 1, "the partial is reused");
        assert!(
            Arc::ptr_eq(&second, &fills.running(&key).unwrap()),
            "the end of the first fill does not remove the second"
        );
    }
}
