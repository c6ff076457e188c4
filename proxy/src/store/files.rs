//! Large blobs as files: their records, times, and what lies in the directory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::Timestamps;
use serde::{Deserialize, Serialize};

use crate::oci::{Algorithm, Digest};
use crate::provenance::Provenance;

/// What is known of a blob, in a file beside it.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) provenance: Provenance,
    /// When its hash agreed last.
    #[serde(default)]
    pub(super) epoch: String,
}

/// A file that was found.
pub(super) struct FoundFile {
    pub(super) digest: Digest,
    pub(super) len: u64,
    pub(super) modified: SystemTime,
}

/// Lists the blobs on disk.
pub(super) fn scan(blobs: &Path) -> io::Result<Vec<FoundFile>> {
    let mut found = Vec::new();
    for algorithm in Algorithm::ALL {
        for shard in fs::read_dir(blobs.join(algorithm.as_str()))? {
            let shard = shard?.path();
            if !shard.is_dir() {
                continue;
            }
            for file in fs::read_dir(shard)? {
                let file = file?;
                let name = file.file_name();
                let digest =
                    name.to_str().and_then(|hex| format!("{}:{hex}", algorithm.as_str()).parse::<Digest>().ok());
                let (Some(digest), Ok(meta)) = (digest, file.metadata()) else {
                    continue;
                };
                let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push(FoundFile { digest, len: meta.size(), modified });
            }
        }
    }
    Ok(found)
}

/// Opens a blob of this length, with its record if it has one.
pub(super) fn open(path: &Path, len: u64) -> io::Result<(File, Option<Record>)> {
    let file = File::open(path)?;
    if file.metadata()?.size() != len {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its length changed"));
    }
    let record = fs::read(record_path(path)).ok();
    Ok((file, record.and_then(|json| serde_json::from_slice(&json).ok())))
}

pub(super) fn record_path(blob: &Path) -> PathBuf {
    blob.with_extension("json")
}

/// Keeps when a blob was used, for the next start.
pub(super) fn touch(file: &File, now: SystemTime) {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = rustix::fs::Timespec { tv_sec: i64::try_from(since.as_secs()).unwrap_or_default(), tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    let _ = rustix::fs::futimens(file, &times);
}
