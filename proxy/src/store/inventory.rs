//! What the cache holds, for operators.

use std::time::SystemTime;

use super::files;
use super::large::Large;
use crate::oci::Digest;
use crate::provenance::Provenance;

/// A large blob on disk.
#[derive(Clone, Debug)]
pub struct StoredBlob {
    pub digest: Digest,
    pub bytes: u64,
    pub last_used: SystemTime,
    /// Whether it is evicted last.
    pub is_pinned: bool,
    /// None: its record is lost.
    pub provenance: Option<Provenance>,
}

impl Large {
    /// All large blobs. Reads the record of each one: blocks on the disk.
    pub fn inventory(&self) -> Vec<StoredBlob> {
        let stored = self.entries().into_iter().map(|(digest, bytes, last_used)| StoredBlob {
            is_pinned: self.is_pinned(&digest),
            provenance: files::provenance(&self.path(&digest)),
            digest,
            bytes,
            last_used,
        });
        stored.collect()
    }
}
