//! Small objects, whole, in foyer's hybrid cache: memory in front of disk.
//!
//! Manifests have an instance of their own, because foyer's disk evicts by block in order of
//! writing, and a churn of small blobs would sweep them out. This is the only file that knows foyer.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, Code, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    PsyncIoEngineConfig, RecoverMode, Source, Spawner,
};
use rustix::fs::FallocateFlags;

use super::{SMALL_BYTES, Tier};
use crate::oci::{Digest, MAX_MANIFEST_BYTES};
use crate::provenance::Provenance;

/// Both instances.
pub struct Small {
    manifests: Instance,
    blobs: Instance,
}

/// Which instance an object belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Manifest,
    Blob,
}

/// A verified object and what an answer needs to know of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SmallObject {
    pub media_type: Arc<str>,
    pub provenance: Arc<Provenance>,
    pub bytes: Bytes,
}

struct Instance {
    cache: HybridCache<String, SmallObject>,
    disk_bytes: u64,
}

/// How an instance lies on disk.
struct Shape {
    name: &'static str,
    largest_entry: u64,
    entries_per_block: u64,
    blocks: u64,
    memory: u64,
}

const PAGE: u64 = 4096;

/// With fewer blocks the engine has nothing to write to while it reclaims.
const MIN_BLOCKS: u64 = 3;

// === impl Small ===

impl Small {
    pub(super) async fn open(dir: &Path, disk: u64, memory: u64) -> Result<Self, String> {
        // An eighth of a disk, at most 1 GiB, is plenty: a manifest has a few KiB.
        let share = (disk / 8).min(1 << 30);
        let manifests = Shape::new("manifests", MAX_MANIFEST_BYTES, 1, share / 4, memory / 2);
        let blobs = Shape::new("blobs", SMALL_BYTES, 16, share - share / 4, memory / 2);
        Ok(Self { manifests: manifests.open(dir).await?, blobs: blobs.open(dir).await? })
    }

    /// Bytes that both instances take on disk, always.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.manifests.disk_bytes + self.blobs.disk_bytes
    }

    pub async fn get(&self, digest: &Digest, kind: Kind) -> Option<(SmallObject, Tier)> {
        let cache = &self.of(kind).cache;
        let key = digest.to_string();
        let entry = match cache.get(&key).await {
            Ok(entry) => entry?,
            Err(error) => {
                tracing::warn!(%digest, %error, "small object unreadable");
                return None;
            }
        };
        let object = entry.value().clone();
        if entry.source() != Source::Disk {
            return Some((object, Tier::Memory));
        }
        // What comes from disk is checked before it is believed.
        if !digest.matches(&object.bytes) {
            tracing::warn!(%digest, "small object damaged on disk");
            cache.remove(&key);
            return None;
        }
        Some((object, Tier::Disk))
    }

    /// Keeps a verified object.
    pub fn insert(&self, digest: &Digest, kind: Kind, object: SmallObject) {
        self.of(kind).cache.insert(digest.to_string(), object);
    }

    pub(super) async fn close(&self) {
        for instance in [&self.manifests, &self.blobs] {
            let cache = instance.cache.clone();
            // A writer that died on a full disk makes close() panic: it must not take us along.
            let closed = tokio::spawn(async move { cache.close().await }).await;
            if !matches!(closed, Ok(Ok(()))) {
                tracing::warn!("the small-object cache did not close in order");
            }
        }
    }

    fn of(&self, kind: Kind) -> &Instance {
        match kind {
            Kind::Manifest => &self.manifests,
            Kind::Blob => &self.blobs,
        }
    }
}

// === impl Shape ===

impl Shape {
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

    async fn open(self, dir: &Path) -> Result<Instance, String> {
        let dir = dir.join(self.name);
        let builder = HybridCacheBuilder::new()
            .with_name(self.name)
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .with_flush_on_close(false)
            .memory(usize::try_from(self.memory).unwrap_or(usize::MAX))
            .with_shards(2)
            .with_weighter(|key: &String, object: &SmallObject| key.len() + object.bytes.len() + 256)
            .storage()
            .with_spawner(Spawner::current())
            .with_io_engine_config(PsyncIoEngineConfig::new())
            .with_recover_mode(RecoverMode::Quiet);
        if let Err(error) = self.allocate(&dir) {
            tracing::warn!(%error, cache = self.name, "no disk for small objects, they stay in memory");
            let cache = builder.build().await.map_err(|e| e.to_string())?;
            return Ok(Instance { cache, disk_bytes: 0 });
        }
        let device = FsDeviceBuilder::new(&dir)
            .with_capacity(usize::try_from(self.blocks * self.block_bytes()).unwrap_or(usize::MAX))
            .build()
            .map_err(|e| e.to_string())?;
        let block_bytes = usize::try_from(self.block_bytes()).unwrap_or(usize::MAX);
        // An entry that does not fit into the flusher's buffer is dropped without a word.
        let buffer = block_bytes.max(4 << 20);
        let engine = BlockEngineConfig::new(device)
            .with_block_size(block_bytes)
            .with_flushers(1)
            .with_reclaimers(1)
            .with_buffer_pool_size(buffer)
            .with_indexer_shards(16)
            .with_recover_concurrency(4);
        let cache = builder.with_engine_config(engine).build().await.map_err(|e| e.to_string())?;
        Ok(Instance { cache, disk_bytes: self.blocks * self.block_bytes() })
    }

    /// foyer's writer dies on a full disk, so its files get their blocks before it sees them.
    fn allocate(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        for block in 0..self.blocks {
            let path = dir.join(format!("foyer-storage-direct-fs-{block:08}"));
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

/// A JSON head with its length in front, then the bytes.
impl Code for SmallObject {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        let head = serde_json::to_vec(&(&*self.media_type, &*self.provenance)).map_err(std::io::Error::from);
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
        let (media_type, provenance): (String, Provenance) =
            serde_json::from_slice(&head).map_err(std::io::Error::from).map_err(foyer::Error::io_error)?;
        let bytes = Bytes::decode(reader)?;
        Ok(Self { media_type: media_type.into(), provenance: Arc::new(provenance), bytes })
    }

    fn estimated_size(&self) -> usize {
        512 + self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(bytes: &[u8]) -> SmallObject {
        let provenance = Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "a/b".into() };
        SmallObject {
            media_type: "application/vnd.oci.image.index.v1+json".into(),
            provenance: Arc::new(provenance),
            bytes: Bytes::copy_from_slice(bytes),
        }
    }

    #[tokio::test]
    async fn objects_survive_a_restart_whole() {
        let dir = tempfile::tempdir().unwrap();
        let largest = vec![7; usize::try_from(MAX_MANIFEST_BYTES).unwrap()];
        let small = Small::open(dir.path(), 1 << 28, 1 << 22).await.unwrap();
        let digests = [&largest[..], b"tiny"].map(|bytes| {
            small.insert(&Digest::of(bytes), Kind::Manifest, object(bytes));
            Digest::of(bytes)
        });
        assert!(small.get(&digests[1], Kind::Manifest).await.is_some());
        assert!(small.get(&digests[1], Kind::Blob).await.is_none());
        small.close().await;
        drop(small);
        let small = Small::open(dir.path(), 1 << 28, 1 << 22).await.unwrap();
        for (digest, bytes) in digests.iter().zip([&largest[..], b"tiny"]) {
            let (found, tier) = small.get(digest, Kind::Manifest).await.unwrap();
            assert_eq!((found, tier), (object(bytes), Tier::Disk));
        }
    }
}
