//! One growing blob: bytes come in once, many read along.
//!
//! A fill belongs to no client, and there is one for each digest, registry and [`Side`]. It hashes in order, writes, and lets readers follow up to the last
//! 64 KiB, which it holds until the digest agrees. Whoever asks for the same digest meanwhile
//! joins it.

mod feed;
mod passage;
mod piece;
mod reader;
mod write;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

pub use self::feed::{Feed, Sources};
pub use self::passage::Passage;
pub use self::reader::Reader;
use crate::metrics::Metrics;
use crate::oci::{BLOB_MEDIA_TYPE, Digest, Registry, Span};
use crate::registries::Place;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Draft, Found, Kind, NoSpace, Proof, SMALL_BYTES, SmallObject, Store};

/// Bytes at the end of a blob that no reader gets before the digest agrees.
pub const HELD_BYTES: u64 = 64 * 1024;

/// Large blobs written at the same time; more pass through uncached. Each takes a thread.
const MAX_FILLS: usize = 256;

/// Fills of any size that run at the same time, in all and for one registry; more are refused.
const MAX_RUNNING: usize = 1024;
const MAX_OF_REGISTRY: usize = 256;

/// A small object has to be here whole within this time.
const SMALL_TIME: Duration = Duration::from_secs(10);

/// Memory for small objects on their way in, in KiB.
const SMALL_KIB: usize = 64 * 1024;

/// Files being proven at the same time. Each takes a thread and the disk.
const MAX_PROOFS: usize = 8;

/// For how long a digest that did not match is distrusted.
const DISTRUST: Duration = Duration::from_secs(600);

/// All running fills.
pub struct Fills {
    running: Mutex<HashMap<FillKey, Arc<Fill>>>,
    distrusted: moka::sync::Cache<(Digest, Registry), ()>,
    permits: Arc<Semaphore>,
    proofs: Arc<Semaphore>,
    small: Semaphore,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    gauge: IntGauge,
}

/// Whom a fill may follow.
///
/// Two nodes that disagree about the owner must not wait for each other: what a peer asks for is
/// never joined to a fill that follows a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// It goes to the origin, for whoever asks.
    Owner,
    /// It follows the owner first.
    Follower,
}

/// Which requests share a fill: those for the same bytes of the same registry. Another registry's
/// bytes are proven only at their end, so nobody waits for them or reads them before.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FillKey {
    pub digest: Digest,
    pub registry: Registry,
    pub side: Side,
}

/// One blob on its way in.
pub struct Fill {
    key: FillKey,
    /// Whose request started it.
    pub place: Place,
    opened: OnceLock<Result<Opened, SourceError>>,
    progress: watch::Sender<Progress>,
}

/// What a fill turned out to be once its source answered.
#[derive(Clone)]
pub enum Opened {
    /// A small object, whole and verified.
    Small { object: SmallObject, from: ServedFrom },
    /// A file that grows to its length.
    Growing { blob: Arc<Blob>, from: ServedFrom },
    /// It cannot be kept. The first reader may have the feed that was opened.
    Uncached { total: u64, from: ServedFrom, feed: Arc<Mutex<Option<Feed>>> },
}

/// How far a fill is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    /// Bytes from the start that may be read.
    released: u64,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Opening,
    Growing,
    Verified,
    Failed,
}

// === impl Fills ===

impl Fills {
    pub fn new(store: Arc<Store>, metrics: Arc<Metrics>) -> Self {
        Self {
            running: Mutex::default(),
            distrusted: moka::sync::Cache::builder().max_capacity(100_000).time_to_live(DISTRUST).build(),
            permits: Arc::new(Semaphore::new(MAX_FILLS)),
            proofs: Arc::new(Semaphore::new(MAX_PROOFS)),
            small: Semaphore::new(SMALL_KIB),
            store,
            gauge: metrics.fills.with_label_values(&["running"]),
            metrics,
        }
    }

    /// The running fill of a digest.
    pub fn running(&self, key: &FillKey) -> Option<Arc<Fill>> {
        self.lock().get(key).cloned()
    }

    /// Whether this digest lately came with wrong bytes from this registry: a client may hold a bad
    /// beginning, which a good end must not complete.
    pub fn is_distrusted(&self, digest: &Digest, registry: &Registry) -> bool {
        self.distrusted.contains_key(&(digest.clone(), registry.clone()))
    }

    /// Remembers that a registry sent wrong bytes.
    pub fn distrust(&self, digest: &Digest, place: &Place) {
        self.metrics.mismatches.inc();
        tracing::error!(%digest, %place, "the bytes do not match their digest");
        self.distrusted.insert((digest.clone(), place.registry.clone()), ());
    }

    /// Joins the running fill of a digest, or starts one from these sources.
    pub fn join(self: &Arc<Self>, key: &FillKey, place: &Place, sources: Arc<dyn Sources>) -> Arc<Fill> {
        let (fill, started) = self.enter(key, place);
        if started {
            let (fills, fill) = (self.clone(), fill.clone());
            tokio::spawn(async move {
                let running = Running { fills: &fills, fill: &fill };
                running.fill_from(sources).await;
            });
        }
        fill
    }

    /// Proves a file on disk by hashing it, while readers follow.
    pub fn prove(self: &Arc<Self>, key: &FillKey, place: &Place, blob: Arc<Blob>) -> Arc<Fill> {
        let (fill, started) = self.enter(key, place);
        if started {
            let (fills, fill) = (self.clone(), fill.clone());
            tokio::spawn(async move {
                // Readers of what is proven already need threads as well.
                let permit = fills.proofs.clone().acquire_owned().await;
                let proving = tokio::task::spawn_blocking(move || {
                    let running = Running { fills: &fills, fill: &fill };
                    running.prove(&blob);
                });
                let _ = proving.await;
                drop(permit);
            });
        }
        fill
    }

    fn enter(&self, key: &FillKey, place: &Place) -> (Arc<Fill>, bool) {
        let mut running = self.lock();
        if let Some(fill) = running.get(key)
            && fill.progress.borrow().phase != Phase::Failed
        {
            return (fill.clone(), false);
        }
        let fill = Arc::new(Fill::new(key.clone(), place.clone()));
        let of_registry = running.keys().filter(|other| other.registry == key.registry).count();
        if running.len() >= MAX_RUNNING || of_registry >= MAX_OF_REGISTRY {
            fill.open(Err(SourceError::Busy));
            return (fill, false);
        }
        running.insert(key.clone(), fill.clone());
        self.gauge.inc();
        (fill, true)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FillKey, Arc<Fill>>> {
        // Only looked up and changed under the lock, never across an await.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Fill ===

impl Fill {
    fn new(key: FillKey, place: Place) -> Self {
        let progress = watch::Sender::new(Progress { released: 0, phase: Phase::Opening });
        Self { key, place, opened: OnceLock::new(), progress }
    }

    /// Waits until a source has answered, or none does.
    pub async fn opened(&self) -> Result<Opened, SourceError> {
        let mut progress = self.progress.subscribe();
        // An error means that the fill ended without a word, which the fallback below says.
        let _ = progress.wait_for(|progress| progress.phase != Phase::Opening).await;
        self.opened.get().cloned().unwrap_or_else(|| Err(SourceError::Unreachable("the fill ended".into())))
    }

    pub fn side(&self) -> Side {
        self.key.side
    }

    /// Bytes from the start that may be read by now.
    pub fn released(&self) -> u64 {
        self.progress.borrow().released
    }

    /// Reads a span of a growing file.
    pub fn reader(&self, blob: Arc<Blob>, span: Span) -> Reader {
        Reader::of_fill(blob, self.progress.subscribe(), span)
    }

    fn open(&self, opened: Result<Opened, SourceError>) {
        let phase = match &opened {
            Ok(Opened::Growing { .. }) => Phase::Growing,
            Ok(_) => Phase::Verified,
            Err(_) => Phase::Failed,
        };
        if self.opened.set(opened).is_ok() {
            self.progress.send_modify(|progress| progress.phase = phase);
        }
    }

    fn end(&self, phase: Phase, released: u64) {
        self.progress.send_replace(Progress { released, phase });
    }
}

impl Opened {
    /// The blob's length, and where its bytes come from.
    pub fn length(&self) -> (u64, ServedFrom) {
        match self {
            Self::Small { object, from } => (object.bytes.len() as u64, *from),
            Self::Growing { blob, from } => (blob.len, *from),
            Self::Uncached { total, from, .. } => (*total, *from),
        }
    }
}

impl Progress {
    fn is_over(self) -> bool {
        matches!(self.phase, Phase::Verified | Phase::Failed)
    }
}

/// A fill while it runs; dropping it, also by a panic, takes it off the list and wakes its readers.
struct Running<'a> {
    fills: &'a Fills,
    fill: &'a Fill,
}

impl Running<'_> {
    async fn fill_from(&self, sources: Arc<dyn Sources>) {
        // An earlier fill may have ended between our request's look-up and our start. What came from
        // another registry was not given to that request either.
        let kept = self.fills.store.find(&self.fill.key.digest, Kind::Blob).await;
        let registry = self.fill.key.registry.as_str();
        match kept.filter(|found| found.provenance().is_some_and(|known| known.registry == registry)) {
            Some(Found::Small { object, .. }) => {
                return self.fill.open(Ok(Opened::Small { object, from: ServedFrom::Memory }));
            }
            Some(Found::Large { blob, proof: Proof::Verified }) => {
                self.fill.open(Ok(Opened::Growing { blob: blob.clone(), from: ServedFrom::Disk }));
                return self.fill.end(Phase::Verified, blob.len);
            }
            _ => {}
        }
        let feed = match Feed::open(sources, 0, None).await {
            Ok(feed) => feed,
            Err(error) => return self.fill.open(Err(error)),
        };
        if feed.total() <= SMALL_BYTES {
            let whole = timeout(SMALL_TIME, self.small(feed)).await;
            self.fill.open(whole.unwrap_or(Err(SourceError::TimedOut)));
        } else {
            self.large(feed).await;
        }
    }

    /// Takes a small object whole, and verifies it before anybody sees it.
    async fn small(&self, mut feed: Feed) -> Result<Opened, SourceError> {
        let kib = u32::try_from(feed.total() / 1024 + 1).unwrap_or(u32::MAX);
        let _memory = self.fills.small.acquire_many(kib).await.map_err(|_| SourceError::Busy)?;
        let mut bytes = bytes::BytesMut::with_capacity(usize::try_from(feed.total()).unwrap_or(0));
        while let Some(piece) = feed.next().await? {
            bytes.extend_from_slice(&piece);
        }
        let (bytes, place) = (bytes.freeze(), &self.fill.place);
        if !self.fill.key.digest.matches(&bytes) {
            self.fills.distrust(&self.fill.key.digest, place);
            return Err(SourceError::Malformed("the bytes do not match their digest".into()));
        }
        let provenance = Arc::new(place.provenance());
        let object = SmallObject { media_type: BLOB_MEDIA_TYPE.into(), provenance, bytes };
        self.fills.store.small.insert(&self.fill.key.digest, Kind::Blob, object.clone());
        Ok(Opened::Small { object, from: feed.served_from() })
    }

    async fn large(&self, mut feed: Feed) {
        let (total, from) = (feed.total(), feed.served_from());
        let Ok(permit) = self.fills.permits.clone().try_acquire_owned() else {
            return self.pass(feed, "busy");
        };
        let (large, provenance) = (self.fills.store.large.clone(), self.fill.place.provenance());
        let draft = tokio::task::spawn_blocking(move || large.draft(total, provenance)).await.unwrap_or(Err(NoSpace));
        let Ok(draft) = draft else {
            return self.pass(feed, "no_space");
        };
        self.fill.open(Ok(Opened::Growing { blob: draft.blob.clone(), from }));
        let (pieces, writing) = write::start(self.fill, &draft);
        let fed = async {
            while let Some(piece) = feed.next().await? {
                if pieces.send(piece).await.is_err() {
                    return Err(SourceError::Unreachable("the disk refuses to write".into()));
                }
            }
            Ok(())
        };
        let fed = fed.await;
        drop(pieces);
        let written = writing.await;
        drop(permit);
        match (fed, written) {
            (Ok(()), Ok(write::Written::Verified)) => self.publish(draft, total).await,
            (Ok(()), Ok(write::Written::Mismatch)) => {
                self.fills.distrust(&self.fill.key.digest, &self.fill.place);
                self.fill.end(Phase::Failed, 0);
            }
            (fed, written) => {
                if fed.as_ref().is_err_and(|error| *error == SourceError::NotFound) && self.fill.released() > 0 {
                    // The owner will not let us go on: what we have from it proved wrong there.
                    self.fills.distrust(&self.fill.key.digest, &self.fill.place);
                }
                let error = fed.err().map_or_else(|| format!("{written:?}"), |error| error.to_string());
                tracing::warn!(digest = %self.fill.key.digest, error, "a fill failed");
                // What was released stays readable, so that a resume loses nothing.
                self.fill.progress.send_modify(|progress| progress.phase = Phase::Failed);
            }
        }
    }

    /// Leaves it to each reader to fetch for itself.
    fn pass(&self, feed: Feed, reason: &str) {
        self.fills.metrics.uncached.with_label_values(&[reason]).inc();
        tracing::warn!(digest = %self.fill.key.digest, total = feed.total(), reason, "passing through uncached");
        let (total, from) = (feed.total(), feed.served_from());
        self.fill.open(Ok(Opened::Uncached { total, from, feed: Arc::new(Mutex::new(Some(feed))) }));
    }

    /// Lets the readers have the tail, then makes the file durable.
    async fn publish(&self, draft: Draft, total: u64) {
        self.fills.store.large.announce(&draft, &self.fill.key.digest);
        self.fill.end(Phase::Verified, total);
        let (large, digest) = (self.fills.store.large.clone(), self.fill.key.digest.clone());
        let published = tokio::task::spawn_blocking(move || large.publish(draft, &digest)).await;
        if let Ok(Err(error)) = published {
            tracing::warn!(digest = %self.fill.key.digest, %error, "a blob could not be kept");
        }
    }

    fn prove(&self, blob: &Arc<Blob>) {
        self.fill.open(Ok(Opened::Growing { blob: blob.clone(), from: ServedFrom::Disk }));
        let digest = &self.fill.key.digest;
        if write::hash_file(self.fill, blob) {
            self.fills.store.large.prove(digest);
            self.fill.end(Phase::Verified, blob.len);
        } else {
            tracing::warn!(%digest, "a cached blob was damaged when the machine went down");
            self.fills.store.large.forget(digest, blob);
            self.fills.distrust(digest, &self.fill.place);
            self.fill.end(Phase::Failed, 0);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut running = self.fills.lock();
        // A failed fill may have been replaced by now.
        let key = &self.fill.key;
        if running.get(key).is_some_and(|fill| std::ptr::eq(&raw const **fill, self.fill)) {
            running.remove(key);
        }
        drop(running);
        self.fills.gauge.dec();
        self.fill.open(Err(SourceError::Unreachable("the fill ended".into())));
        self.fill.progress.send_if_modified(|progress| {
            let unfinished = !progress.is_over();
            if unfinished {
                progress.phase = Phase::Failed;
            }
            unfinished
        });
    }
}
