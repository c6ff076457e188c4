//! What dray keeps: small objects in memory and on disk, large blobs as verified files, and tiny
//! records of tags.
//!
//! The directory may vanish at any moment, and a process may be killed at any moment: whatever is
//! found afterwards is checked before it is believed: small objects are hashed whenever they are read from
//! disk, large blobs once in each epoch (`layout.rs`), and otherwise by their length.

mod budget;
mod draft;
mod evict;
mod files;
mod large;
mod layout;
pub mod ownership;
mod partial;
mod piece_memory;
mod records;
mod relayed;
mod small;
mod thinning;

use std::path::Path;
use std::sync::Arc;

use prometheus::IntGauge;

use crate::config::DiskShare;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::provenance::Provenance;
pub use budget::NoSpace;
pub use draft::{Draft, LEAST_RATE};
pub use evict::HOUSEKEEPING;
use large::BlobLocation;
pub use large::{Blob, Large, Verification};
pub use layout::LayoutError;
pub use partial::Partial;
pub use piece_memory::{Piece, PieceMemory};
pub use records::{ListRecord, Records, ReferrersRecord, RepositoryRecord, TagRecord};
pub use small::{Small, SmallKind, SmallObject};

/// Objects up to this many bytes are kept in the small tier, whole.
pub const SMALL_BYTES: u64 = 256 * 1024;

/// Everything on disk, and its memory tier.
pub struct Store {
    pub small: Small,
    pub large: Arc<Large>,
    pub records: Records,
    layout: layout::Layout,
    blobs: IntGauge,
}

/// Files for small objects take at most this part of what is free.
const SMALL_PART: u64 = 4;

/// Where the bytes of a digest were found.
pub enum Found {
    Small { object: SmallObject, tier: Tier },
    Large { blob: Arc<Blob>, proof: Verification },
}

/// Which tier of the cache answered.
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
    #[error("the cache directory cannot be read: {0}")]
    Scan(std::io::Error),
    #[error("the small-object cache cannot be opened: {0}")]
    Small(String),
}

impl Found {
    /// None: its record was lost.
    pub fn provenance(&self) -> Option<&Provenance> {
        match self {
            Self::Small { object, .. } => Some(&object.provenance),
            Self::Large { blob, .. } => blob.provenance.as_ref(),
        }
    }
}

impl Store {
    /// Opens or creates a cache directory and takes its lock. `memory` in bytes.
    pub async fn open(
        dir: &Path,
        disk: DiskShare,
        keep_free: DiskShare,
        memory: u64,
        metrics: &Metrics,
    ) -> Result<Self, StoreError> {
        let layout = layout::Layout::open(dir)?;
        let file_system = evict::FileSystem::of(dir).unwrap_or(evict::FileSystem { total: 0, available: u64::MAX });
        let disk = disk.of(file_system.total);
        let spare = file_system.available.saturating_sub(keep_free.of(file_system.total));
        let small =
            Small::open(&layout.small(), disk, spare / SMALL_PART, memory, metrics).await.map_err(StoreError::Small)?;
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

    /// Finds an object by its digest, wherever it is kept.
    pub async fn find(&self, digest: &Digest, kind: SmallKind) -> Option<Found> {
        if let Some((object, tier)) = self.small.get(digest, kind).await {
            return Some(Found::Small { object, tier });
        }
        match kind {
            SmallKind::Manifest => None,
            SmallKind::Blob => {
                let found = match self.large.look(digest) {
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

    /// Tells how much is kept.
    pub fn measure(&self) {
        self.small.measure();
        self.blobs.set(i64::try_from(self.large.count()).unwrap_or(i64::MAX));
    }

    /// Flushes, and marks the directory as left in order. Blocks on the disk.
    pub async fn close(&self) {
        self.small.close().await;
        self.large.seal();
        self.layout.mark_clean();
    }
}
