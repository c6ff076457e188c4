//! Files of large blobs: their records, their times, and the scan of the directory.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags, Timestamps};
use serde::{Deserialize, Serialize};

use crate::oci::{Algorithm, Digest};
use crate::provenance::Provenance;

/// The record of a blob, in a file beside it.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) provenance: Provenance,
    /// The epoch in which the hash matched last.
    #[serde(default)]
    pub(super) epoch: String,
}

/// A blob file that the scan found.
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
                if !meta.is_file() {
                    remove_foreign(&file.path());
                    continue;
                }
                let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push(FoundFile { digest, len: meta.size(), modified });
            }
        }
    }
    Ok(found)
}

/// Opens a blob of this length, with its record if it has one.
pub(super) fn open(path: &Path, len: u64) -> io::Result<(File, Option<Record>)> {
    // `NONBLOCK`: opening a named pipe would otherwise wait for a writer.
    let file: File = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?.into();
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    if meta.size() != len {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the length of the file changed"));
    }
    let record = fs::read(record_path(path)).ok();
    Ok((file, record.and_then(|json| serde_json::from_slice(&json).ok())))
}

/// The record of a blob, if it has one.
pub(super) fn provenance(path: &Path) -> Option<Provenance> {
    let record: Record = serde_json::from_slice(&fs::read(record_path(path)).ok()?).ok()?;
    Some(record.provenance)
}

/// Removes anything at the path of a blob that is not a regular file.
pub(super) fn remove_foreign(path: &Path) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if meta.is_file() {
        return;
    }
    tracing::warn!(path = %path.display(), "foreign entry at a blob path");
    let removed = if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "foreign entry removal failed");
    }
}

pub(super) fn record_path(blob: &Path) -> PathBuf {
    blob.with_extension("json")
}

/// Stores the time of use in the times of the file, for the next start.
pub(super) fn touch(file: &File, now: SystemTime) {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = rustix::fs::Timespec { tv_sec: i64::try_from(since.as_secs()).unwrap_or_default(), tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    let _ = rustix::fs::futimens(file, &times);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scan_removes_foreign_entries_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let shard = dir.path().join("sha256/ab");
        Algorithm::ALL.iter().for_each(|it| fs::create_dir_all(dir.path().join(it.as_str())).unwrap());
        fs::create_dir_all(&shard).unwrap();
        let [directory, pipe, file] = ["aa", "bb", "cc"].map(|hex| shard.join(hex.repeat(32)));
        fs::create_dir_all(directory.join("x")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        fs::write(&file, "four").unwrap();
        assert_eq!(open(&pipe, 0).err().unwrap().kind(), io::ErrorKind::InvalidData);
        let found = scan(dir.path()).unwrap();
        assert_eq!(found.iter().map(|found| found.len).collect::<Vec<_>>(), [4]);
        assert_eq!([&directory, &pipe, &file].map(|path| path.exists()), [false, false, true]);
    }
}
