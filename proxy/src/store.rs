//! The cache: small objects in memory and on disk, large blobs as files, and small records of tags and lists.
//!
//! The directory may vanish and the process may be killed at any moment, so content is checked before use:
//! - small objects are hashed at each read from disk;
//! - large blobs are hashed once in each epoch (`layout.rs`), otherwise only their length is compared.

mod budget;
mod draft;
mod draft_record;
mod evict;
mod files;
mod inventory;
mod large;
mod layout;
pub mod ownership;
mod partial;
mod piece_memory;
mod purges;
mod records;
mod relayed;
mod small;
mod thinning;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use prometheus::IntGauge;

use crate::config::DiskShare;
use crate::metrics::Metrics;
use crate::oci::{Digest, Registry};
use crate::provenance::Provenance;
pub use budget::NoSpace;
pub use draft::{Draft, MIN_DOWNLOAD_RATE};
pub use draft_record::DraftRecorder;
pub use evict::HOUSEKEEPING_INTERVAL;
pub use inventory::StoredBlob;
use large::BlobLocation;
pub use large::{Blob, Large, Verification};
pub use layout::LayoutError;
pub use partial::Partial;
pub use piece_memory::{Piece, PieceMemory};
pub use records::{ListRecord, Records, ReferrersRecord, RepositoryRecord, TagRecord};
pub use small::{Small, SmallKind, SmallObject};

/// Largest object of the small tier, in bytes. Larger: single blobs displace many others from memory. Smaller: more
/// blobs take a file and a record each.
pub const SMALL_BYTES: u64 = 256 * 1024;

/// The cache directory and its memory tier.
pub struct Store {
    pub small: Small,
    pub large: Arc<Large>,
    pub records: Records,
    layout: layout::Layout,
    blobs: IntGauge,
}

/// Files for small objects take at most one part in this many of the free space. Larger: fewer small objects on disk.
/// Smaller: less space for large blobs.
const SMALL_FILES_SHARE: u64 = 4;

/// Where the bytes of a digest were found.
pub enum Found {
    Small { object: SmallObject, tier: Tier },
    Large { blob: Arc<Blob>, proof: Verification },
}

/// The tier of the cache that held an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    Memory,
    Disk,
}

/// Why the cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("the cache directory cannot be scanned: {0}; check its permissions and its disk")]
    Scan(std::io::Error),
    #[error("the small-object cache cannot be opened: {0}; check the permissions and the disk of the cache directory")]
    Small(String),
}

impl Found {
    /// None: the record of the blob was lost.
    pub fn provenance(&self) -> Option<&Provenance> {
        match self {
            Self::Small { object, .. } => Some(&object.provenance),
            Self::Large { blob, .. } => blob.provenance.as_ref(),
        }
    }
}

impl Store {
    /// Opens or creates a cache directory and locks it. `memory` in bytes.
    pub async fn open(
        dir: &Path,
        disk: DiskShare,
        min_free: DiskShare,
        memory: u64,
        metrics: &Metrics,
    ) -> Result<Self, StoreError> {
        let layout = layout::Layout::open(dir)?;
        let file_system = evict::FileSystem::of(dir).unwrap_or(evict::FileSystem { total: 0, available: u64::MAX });
        let disk = disk.of(file_system.total);
        let spare = file_system.available.saturating_sub(min_free.of(file_system.total));
        let small = Small::open(&layout.small(), disk, spare / SMALL_FILES_SHARE, memory, metrics)
            .await
            .map_err(StoreError::Small)?;
        let for_blobs = disk.saturating_sub(small.disk_bytes());
        let large = Large::open(&layout, for_blobs, metrics).map_err(StoreError::Scan)?;
        metrics.cache_bytes.with_label_values(&["small"]).set(i64::try_from(small.disk_bytes()).unwrap_or(i64::MAX));
        metrics.cache_limit.with_label_values(&["small"]).set(i64::try_from(small.disk_bytes()).unwrap_or(i64::MAX));
        let records = Records::new(layout.records(), layout.lists());
        let blobs = metrics.cache_blobs.clone();
        let store = Self { small, large: Arc::new(large), records, layout, blobs };
        store.measure();
        Ok(store)
    }

    /// Finds an object in any tier.
    pub async fn find(&self, digest: &Digest, kind: SmallKind) -> Option<Found> {
        if let Some((object, tier)) = self.small.get(digest, kind).await {
            return Some(Found::Small { object, tier });
        }
        match kind {
            SmallKind::Manifest => None,
            SmallKind::Blob => {
                let found = match self.large.lookup(digest) {
                    BlobLocation::Open(blob, proof) => Some((blob, proof)),
                    BlobLocation::Nowhere => None,
                    BlobLocation::OnDisk => {
                        let (large, digest) = (self.large.clone(), digest.clone());
                        tokio::task::spawn_blocking(move || large.get(&digest)).await.ok().flatten()
                    }
                };
                found.map(|(blob, proof)| Found::Large { blob, proof })
            }
        }
    }

    /// Removes everything that was cached from a registry. Returns the sizes of its large blobs, and how many records of
    /// tags and lists are gone. Blocks on the disk.
    pub fn purge_registry(&self, registry: &Registry) -> io::Result<(Vec<u64>, usize)> {
        // First: what is cached from now on stays.
        let recorded = self.small.purges.record(registry, SystemTime::now());
        let is_of = |from: &Provenance| from.registry == registry.as_str();
        let named = self.large.inventory().into_iter().filter(|blob| blob.provenance.as_ref().is_some_and(is_of));
        let mut sizes: Vec<u64> = named.filter_map(|blob| self.large.purge(&blob.digest)).collect();
        sizes.extend(self.large.purge_unnamed(is_of));
        let records = self.records.purge(registry);
        recorded.map(|()| (sizes, records))
    }

    /// Updates the gauges of the cache.
    pub fn measure(&self) {
        self.small.measure();
        self.blobs.set(i64::try_from(self.large.count()).unwrap_or(i64::MAX));
    }

    /// Ends publication, so that the final flush covers every published blob. Drafts stay for the next process.
    pub fn seal(&self) {
        self.large.seal();
    }

    /// Flushes, and marks the directory as clean. Call after [`Self::seal`]. Blocks on the disk.
    pub async fn close(&self) {
        self.small.close().await;
        self.layout.mark_clean();
    }
}

impl Drop for Store {
    /// Also after a start that fails, drafts stay for the next process.
    fn drop(&mut self) {
        self.seal();
    }
}
