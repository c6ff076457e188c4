//! Small objects, whole, in foyer's hybrid cache: memory in front of disk.
//!
//! Manifests have their own instance: foyer's disk evicts blocks in write order, so that a churn of small blobs would
//! displace them. Only this module uses foyer.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

mod overflow;
mod writer;

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Code, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    HybridCacheProperties, Location, PsyncIoEngineConfig, RecoverMode, Source, Spawner,
};
use parking_lot::RwLock;
use prometheus::{IntCounter, IntGauge};
use rustix::fs::FallocateFlags;
use serde::Deserialize;

use self::overflow::Overflow;
use self::writer::SmallWriter;
use super::purges::{RegistryPurges, seconds_since_epoch};
use super::{SMALL_BYTES, Tier};
use crate::metrics::Metrics;
use crate::oci::{Digest, MAX_MANIFEST_BYTES};
use crate::provenance::Provenance;

/// Both instances.
pub struct Small {
    manifests: Instance,
    blobs: Instance,
    pub(super) purges: Arc<RegistryPurges>,
}

/// Which instance an object belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmallKind {
    Manifest,
    Blob,
}

/// A verified object, and what a response says about it.
#[derive(Clone, Debug, PartialEq)]
pub struct SmallObject {
    pub media_type: Arc<str>,
    pub provenance: Arc<Provenance>,
    /// Seconds since 1970.
    pub cached_at: u64,
    pub bytes: Bytes,
}

struct Instance {
    cache: HybridCache<String, SmallObject>,
    disk_bytes: u64,
    lookups: Lookups,
    memory: IntGauge,
    /// None: closed, or no disk for small objects.
    writer: RwLock<Option<Arc<SmallWriter>>>,
}

/// Lookups by result.
struct Lookups {
    memory: IntCounter,
    disk: IntCounter,
    misses: IntCounter,
}

/// Layout of an instance on disk.
struct InstanceLayout {
    name: &'static str,
    largest_entry: u64,
    entries_per_block: u64,
    blocks: u64,
    memory: u64,
}

const PAGE: u64 = 4096;

/// Blocks of an instance on disk at least. Smaller: the engine has no block to write to while it reclaims one.
const MIN_BLOCKS: u64 = 3;

// === impl Small ===

impl Small {
    /// `spare`: bytes of the file system for new files, beside those that exist.
    pub(super) async fn open(
        dir: &Path,
        disk: u64,
        spare: u64,
        memory: u64,
        metrics: &Metrics,
    ) -> Result<Self, String> {
        // 1/8 of the disk, at most 1 GiB, is enough: a manifest has a few KiB.
        let share = (disk / 8).min(1 << 30);
        let manifests = InstanceLayout::new("manifests", MAX_MANIFEST_BYTES, 1, share / 4, memory / 2);
        let blobs = InstanceLayout::new("blobs", SMALL_BYTES, 16, share - share / 4, memory / 2);
        let manifests = manifests.open(dir, spare / 4, metrics).await?;
        let blobs = blobs.open(dir, spare - spare / 4, metrics).await?;
        Ok(Self { manifests, blobs, purges: Arc::new(RegistryPurges::load(dir)) })
    }

    /// Bytes that both instances take on disk, in use or not.
    pub fn disk_bytes(&self) -> u64 {
        self.manifests.disk_bytes + self.blobs.disk_bytes
    }

    pub async fn get(&self, digest: &Digest, kind: SmallKind) -> Option<(SmallObject, Tier)> {
        let found = self.lookup(digest, kind).await;
        let lookups = &self.of(kind).lookups;
        match found {
            Some((_, Tier::Memory)) => lookups.memory.inc(),
            Some((_, Tier::Disk)) => lookups.disk.inc(),
            None => lookups.misses.inc(),
        }
        found
    }

    /// Updates the gauges of memory.
    pub(super) fn measure(&self) {
        for instance in [&self.manifests, &self.blobs] {
            instance.memory.set(i64::try_from(instance.cache.memory().usage()).unwrap_or(i64::MAX));
        }
    }

    /// A cached object, unless its registry was purged since.
    async fn lookup(&self, digest: &Digest, kind: SmallKind) -> Option<(SmallObject, Tier)> {
        let found = self.stored(digest, kind).await.filter(|(object, _)| !object.is_tombstone())?;
        if self.purges.covers(&found.0) {
            self.of(kind).cache.remove(&digest.to_string());
            return None;
        }
        Some(found)
    }

    async fn stored(&self, digest: &Digest, kind: SmallKind) -> Option<(SmallObject, Tier)> {
        let cache = &self.of(kind).cache;
        let key = digest.to_string();
        let entry = match cache.get(&key).await {
            Ok(entry) => entry?,
            Err(error) => {
                tracing::warn!(%digest, %error, "small object read failed");
                return None;
            }
        };
        let object = entry.value().clone();
        if entry.source() != Source::Disk {
            self.of(kind).note_use(&key, &object);
            return Some((object, Tier::Memory));
        }
        // Bytes from disk are hashed before use.
        if !object.is_tombstone() && !digest.matches(&object.bytes) {
            tracing::warn!(%digest, "small object corrupt on disk");
            cache.remove(&key);
            return None;
        }
        self.of(kind).note_use(&key, &object);
        Some((object, Tier::Disk))
    }

    /// Caches a verified object: in memory at once, on disk through the queue. Waits while the queue is full, for
    /// [`CLOSE_TIMEOUT`](crate::times::CLOSE_TIMEOUT) at most.
    pub async fn insert(&self, digest: &Digest, kind: SmallKind, object: SmallObject) {
        let instance = self.of(kind);
        let in_memory = HybridCacheProperties::default().with_location(Location::InMem);
        instance.cache.insert_with_properties(digest.to_string(), object.clone(), in_memory);
        if let Some(writer) = instance.writer() {
            writer.write(digest.to_string(), object).await;
        }
    }

    /// Removes an object of this digest of either kind. Returns the sizes of what was found.
    ///
    /// A later entry of the same key replaces it: foyer finds what it has only removed from its index again at the next
    /// start.
    pub async fn purge(&self, digest: &Digest) -> Vec<u64> {
        let mut sizes = Vec::new();
        for kind in [SmallKind::Manifest, SmallKind::Blob] {
            let found = self.lookup(digest, kind).await;
            let waits = self.of(kind).writer().is_some_and(|writer| writer.is_busy());
            if found.is_some() || waits {
                self.insert(digest, kind, SmallObject::tombstone()).await;
            }
            sizes.extend(found.map(|(object, _)| object.bytes.len() as u64));
        }
        sizes
    }

    pub(super) async fn close(&self) {
        for instance in [&self.manifests, &self.blobs] {
            let writer = instance.writer.write().take();
            if let Some(writer) = writer.and_then(Arc::into_inner) {
                writer.close().await;
            }
            let cache = instance.cache.clone();
            // A writer of foyer that died on a full disk makes `close` panic, which must not end this task.
            let closed = tokio::spawn(async move { cache.close().await }).await;
            if !matches!(closed, Ok(Ok(()))) {
                tracing::warn!("small-object cache close failed");
            }
        }
    }

    fn of(&self, kind: SmallKind) -> &Instance {
        match kind {
            SmallKind::Manifest => &self.manifests,
            SmallKind::Blob => &self.blobs,
        }
    }
}

// === impl Instance ===

impl Instance {
    fn writer(&self) -> Option<Arc<SmallWriter>> {
        self.writer.read().clone()
    }

    fn note_use(&self, key: &str, object: &SmallObject) {
        if let Some(writer) = &*self.writer.read() {
            writer.note_use(key, object);
        }
    }
}

// === impl InstanceLayout ===

impl InstanceLayout {
    fn new(name: &'static str, largest: u64, entries_per_block: u64, share: u64, memory: u64) -> Self {
        // Room for key, media type and provenance beside the bytes.
        let largest_entry = largest + PAGE;
        let block = Self { name, largest_entry, entries_per_block, blocks: 0, memory };
        let blocks = (share / block.block_bytes()).max(MIN_BLOCKS);
        Self { blocks, ..block }
    }

    /// Entries are aligned to pages and a block begins with an index page.
    fn block_bytes(&self) -> u64 {
        self.entries_per_block * (self.largest_entry + PAGE) + PAGE
    }

    async fn open(mut self, dir: &Path, spare: u64, metrics: &Metrics) -> Result<Instance, String> {
        let dir = dir.join(self.name);
        let dropped = &metrics.small_dropped;
        let found = |found| metrics.small_lookups.with_label_values(&[self.name, found]);
        let lookups = Lookups { memory: found("memory_hit"), disk: found("disk_hit"), misses: found("miss") };
        let in_memory = metrics.small_memory.with_label_values(&[self.name]);
        let builder = HybridCacheBuilder::new()
            .with_name(self.name)
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .with_flush_on_close(false)
            .with_metrics_registry(Box::new(Overflow(dropped.clone())))
            .memory(usize::try_from(self.memory).unwrap_or(usize::MAX))
            .with_shards(2)
            .with_weighter(|key: &String, object: &SmallObject| key.len() + object.bytes.len() + 256)
            .storage()
            .with_spawner(Spawner::current())
            .with_io_engine_config(PsyncIoEngineConfig::new())
            .with_recover_mode(RecoverMode::Quiet);
        if let Err(error) = self.allocate(&dir, spare) {
            tracing::warn!(%error, cache = self.name, "small-object disk cache disabled");
            let cache = builder.build().await.map_err(|e| e.to_string())?;
            let writer = RwLock::default();
            return Ok(Instance { cache, disk_bytes: 0, lookups, memory: in_memory, writer });
        }
        let device = FsDeviceBuilder::new(&dir)
            .with_capacity(usize::try_from(self.blocks * self.block_bytes()).unwrap_or(usize::MAX))
            .build()
            .map_err(|e| e.to_string())?;
        let block_bytes = usize::try_from(self.block_bytes()).unwrap_or(usize::MAX);
        // foyer drops an entry larger than the buffer of the flusher without an error.
        let buffer = block_bytes.max(4 << 20);
        let engine = BlockEngineConfig::new(device)
            .with_block_size(block_bytes)
            .with_flushers(1)
            .with_reclaimers(1)
            .with_buffer_pool_size(buffer)
            .with_indexer_shards(16)
            .with_recover_concurrency(4);
        let cache = builder.with_engine_config(engine).build().await.map_err(|e| e.to_string())?;
        let disk_bytes = self.blocks * self.block_bytes();
        // Half of the buffer: the engine has two halves, one of them in flight.
        let writer = SmallWriter::start(
            cache.clone(),
            disk_bytes,
            buffer as u64 / 2,
            dropped.with_label_values(&[self.name, "queue"]),
        );
        let writer = RwLock::new(Some(Arc::new(writer)));
        Ok(Instance { cache, disk_bytes, lookups, memory: in_memory, writer })
    }

    /// Allocates the blocks of the files before foyer opens them, because foyer's writer dies on a full disk. Creates
    /// fewer files if `spare` is too small for all.
    fn allocate(&mut self, dir: &Path, mut spare: u64) -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        for block in 0..self.blocks {
            let path = dir.join(format!("foyer-storage-direct-fs-{block:08}"));
            if !path.exists() {
                match spare.checked_sub(self.block_bytes()) {
                    Some(left) => spare = left,
                    None if block < MIN_BLOCKS => {
                        return Err(std::io::Error::new(
                            std::io::ErrorKind::StorageFull,
                            "cache.min_free leaves no room",
                        ));
                    }
                    None => {
                        self.blocks = block;
                        break;
                    }
                }
            }
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.block_bytes()) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

// === impl SmallObject ===

impl SmallObject {
    /// Copies the bytes into memory of their own. A slice of a connection's read buffer keeps the whole buffer (142 KiB
    /// on average, measured) for as long as the object is cached, which the weigher does not see.
    pub fn new(media_type: &str, provenance: Arc<Provenance>, bytes: &[u8]) -> Self {
        let cached_at = seconds_since_epoch(SystemTime::now());
        Self { media_type: media_type.into(), provenance, cached_at, bytes: Bytes::copy_from_slice(bytes) }
    }
}

/// The media type of an entry that stands for a purged object.
const TOMBSTONE: &str = "dray/purged";

impl SmallObject {
    fn tombstone() -> Self {
        let provenance = Provenance { rule: String::new(), registry: String::new(), repository: String::new() };
        Self::new(TOMBSTONE, Arc::new(provenance), &[])
    }

    fn is_tombstone(&self) -> bool {
        self.bytes.is_empty() && *self.media_type == *TOMBSTONE
    }
}

/// Releases before the third element wrote the first two.
#[derive(Deserialize)]
struct ObjectHead(String, Provenance, #[serde(default)] u64);

/// A JSON head with its length in front, then the bytes.
impl Code for SmallObject {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        let head =
            serde_json::to_vec(&(&*self.media_type, &*self.provenance, self.cached_at)).map_err(std::io::Error::from);
        let head = head.map_err(foyer::Error::io_error)?;
        let head_len = u32::try_from(head.len()).unwrap_or(u32::MAX);
        writer.write_all(&head_len.to_le_bytes()).map_err(foyer::Error::io_error)?;
        writer.write_all(&head).map_err(foyer::Error::io_error)?;
        self.bytes.encode(writer)
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let mut len = [0; 4];
        reader.read_exact(&mut len).map_err(foyer::Error::io_error)?;
        let mut head = Vec::new();
        reader.take(u64::from(u32::from_le_bytes(len))).read_to_end(&mut head).map_err(foyer::Error::io_error)?;
        let ObjectHead(media_type, provenance, cached_at) =
            serde_json::from_slice(&head).map_err(std::io::Error::from).map_err(foyer::Error::io_error)?;
        let bytes = Bytes::decode(reader)?;
        Ok(Self { media_type: media_type.into(), provenance: Arc::new(provenance), cached_at, bytes })
    }

    fn estimated_size(&self) -> usize {
        512 + self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn small_files_take_no_more_than_spare() {
        let dir = tempfile::tempdir().unwrap();
        let open = async |spare| Small::open(dir.path(), 1 << 29, spare, 1 << 22, &Metrics::new()).await.unwrap();
        assert_eq!(open(0).await.disk_bytes(), 0, "in memory only");
        let some = open(64 << 20).await.disk_bytes();
        assert!((32 << 20..=64 << 20).contains(&some), "{some}");
        assert_eq!(open(0).await.disk_bytes(), some, "what is there stays");
    }

    fn object(bytes: &[u8]) -> SmallObject {
        let provenance = Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "a/b".into() };
        SmallObject::new("application/vnd.oci.image.index.v1+json", Arc::new(provenance), bytes)
    }

    #[test]
    fn object_does_not_hold_its_read_buffer() {
        struct ReadBuffer {
            bytes: Vec<u8>,
            _alive: Arc<()>,
        }
        impl AsRef<[u8]> for ReadBuffer {
            fn as_ref(&self) -> &[u8] {
                &self.bytes
            }
        }
        let alive = Arc::new(());
        let buffer = Bytes::from_owner(ReadBuffer { bytes: vec![7; 1 << 20], _alive: alive.clone() });
        let kept = object(&buffer.slice(5..9));
        drop(buffer);
        assert_eq!(Arc::strong_count(&alive), 1, "the read buffer is still held");
        assert_eq!(&kept.bytes[..], [7; 4]);
    }

    async fn open(dir: &Path, disk: u64) -> Small {
        Small::open(dir, disk, u64::MAX, 1 << 22, &Metrics::new()).await.unwrap()
    }

    #[tokio::test]
    async fn objects_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let largest = vec![7; usize::try_from(MAX_MANIFEST_BYTES).unwrap()];
        let small = open(dir.path(), 1 << 28).await;
        let mut digests = Vec::new();
        for bytes in [&largest[..], b"tiny"] {
            small.insert(&Digest::of(bytes), SmallKind::Manifest, object(bytes)).await;
            digests.push(Digest::of(bytes));
        }
        assert!(small.get(&digests[1], SmallKind::Manifest).await.is_some());
        assert!(small.get(&digests[1], SmallKind::Blob).await.is_none());
        small.close().await;
        drop(small);
        let small = open(dir.path(), 1 << 28).await;
        for (digest, bytes) in digests.iter().zip([&largest[..], b"tiny"]) {
            let (found, tier) = small.get(digest, SmallKind::Manifest).await.unwrap();
            assert_eq!((found, tier), (object(bytes), Tier::Disk));
        }
    }

    /// A distinct blob of `len` bytes.
    fn blob(nth: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        fastrand::Rng::with_seed(nth).fill(&mut bytes);
        bytes
    }

    #[tokio::test]
    async fn manifests_and_hot_blobs_survive_churn() {
        let dir = tempfile::tempdir().unwrap();
        let small = open(dir.path(), 1 << 29).await;
        let ring = small.blobs.disk_bytes;
        let manifests: Vec<_> = (0..50).map(|nth| blob(nth, 3000)).collect();
        for manifest in &manifests {
            small.insert(&Digest::of(manifest), SmallKind::Manifest, object(manifest)).await;
        }
        let hot = blob(999, 5000);
        small.insert(&Digest::of(&hot), SmallKind::Blob, object(&hot)).await;
        let len = 200 * 1024;
        for nth in 0..10 * ring / len as u64 {
            let cold = blob(1000 + nth, len);
            small.insert(&Digest::of(&cold), SmallKind::Blob, object(&cold)).await;
            if nth % 20 == 0 {
                assert!(small.get(&Digest::of(&hot), SmallKind::Blob).await.is_some(), "after {nth}");
            }
        }
        small.close().await;
        drop(small);
        let small = open(dir.path(), 1 << 29).await;
        for manifest in &manifests {
            assert!(small.get(&Digest::of(manifest), SmallKind::Manifest).await.is_some());
        }
        assert!(small.get(&Digest::of(&hot), SmallKind::Blob).await.is_some());
    }

    #[tokio::test]
    async fn burst_of_inserts_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let small = Small::open(dir.path(), 1 << 29, u64::MAX, 1 << 22, &metrics).await.unwrap();
        let burst: Vec<_> = (0..200).map(|nth| blob(nth, 200 * 1024)).collect();
        for bytes in &burst {
            small.insert(&Digest::of(bytes), SmallKind::Blob, object(bytes)).await;
        }
        small.close().await;
        drop(small);
        let small = Small::open(dir.path(), 1 << 29, u64::MAX, 1 << 22, &metrics).await.unwrap();
        for bytes in &burst {
            assert!(small.get(&Digest::of(bytes), SmallKind::Blob).await.is_some());
        }
        let lost: u64 = ["buffer", "channel"]
            .map(|queue| metrics.small_dropped.with_label_values(&["blobs", queue]).get())
            .iter()
            .sum();
        assert_eq!(lost, 0);
    }
}
