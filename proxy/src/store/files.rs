//! Large blobs as files: their records, times, and what lies in the directory.

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
                if !meta.is_file() {
                    clear_away(&file.path());
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
    // Of a pipe, which somebody has put there, nobody waits for the other end.
    let file: File = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?.into();
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no file"));
    }
    if meta.size() != len {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its length changed"));
    }
    let record = fs::read(record_path(path)).ok();
    Ok((file, record.and_then(|json| serde_json::from_slice(&json).ok())))
}

/// Removes whatever has the name of a blob and is no file.
pub(super) fn clear_away(path: &Path) {
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    if meta.is_file() {
        return;
    }
    tracing::warn!(path = %path.display(), "something else has the name of a blob, it is removed");
    let removed = if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "it cannot be removed");
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_is_cleared_away_and_never_waited_for() {
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
