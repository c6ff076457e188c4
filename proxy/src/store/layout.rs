//! The cache directory: `<dir>/v1/{lock,state,blobs,fills,small,records,lists}`.
//!
//! The version is part of the path, so that another version of dray neither fails on these files nor serves them
//! wrongly.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::oci::Algorithm;

/// A locked cache directory.
pub(super) struct Layout {
    root: PathBuf,
    epoch: String,
    /// Open from the start: `syncfs` on it reports every write error since then.
    directory: File,
    /// Held while the process lives.
    _lock: File,
}

/// Why a directory cannot hold the cache.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error("cache directory {dir} cannot be used: {source}; choose another with [cache] dir or --cache-dir")]
    Unusable { dir: PathBuf, source: io::Error },
    #[error(
        "cache directory {dir} is in use by another dray; give each process its own with [cache] dir or --cache-dir"
    )]
    InUse { dir: PathBuf },
}

/// The directory of this layout. An incompatible layout needs another name.
const LAYOUT: &str = "v1";

/// Locked by the process that uses the directory.
pub(super) const LOCK: &str = "lock";

/// Whether an entry of a cache directory is this layout, or that of another release.
pub(super) fn is_layout_dir(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix('v'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Layout {
    pub(super) fn open(dir: &Path) -> Result<Self, LayoutError> {
        let unusable = |source| LayoutError::Unusable { dir: dir.to_owned(), source };
        let root = dir.join(LAYOUT);
        // Cached content may be private: other users of the machine must not read it.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(unusable)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        let lock = File::create(root.join(LOCK)).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LayoutError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        let state = fs::read_to_string(root.join("state")).unwrap_or_default();
        let directory = File::open(&root).map_err(unusable)?;
        let layout = Self { root, epoch: epoch_after(&state), directory, _lock: lock };
        layout.create_dirs().map_err(unusable)?;
        // Before any blob changes: after a crash of the machine, the state must not be "clean".
        match layout.write_state(&boot_id(), &layout.epoch) {
            // Without the file, the next start begins a new epoch.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                tracing::warn!("disk full, cached blobs will be hashed after the next start");
                fs::remove_file(layout.root.join("state")).or_else(ignore_missing).map_err(unusable)?;
            }
            written => written.map_err(unusable)?,
        }
        Ok(layout)
    }

    fn create_dirs(&self) -> io::Result<()> {
        for algorithm in Algorithm::ALL {
            fs::create_dir_all(self.blobs().join(algorithm.as_str()))?;
        }
        for dir in [self.fills(), self.small(), self.records(), self.lists()] {
            fs::create_dir_all(dir)?;
        }
        Ok(())
    }

    /// Blobs verified in this epoch are served without hashing. A crash of the machine begins a new epoch: files may
    /// then hold less than was written to them.
    pub(super) fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Flushes everything to the disk, then marks the directory as clean. Blocks on the disk.
    pub(super) fn mark_clean(&self) {
        let written = match rustix::fs::syncfs(&self.directory) {
            Ok(()) => self.write_state(CLEAN, &self.epoch),
            Err(error) => {
                tracing::warn!(%error, "cache flush failed, cached blobs will be hashed after the next start");
                self.write_state(CLEAN, &new_epoch())
            }
        };
        if let Err(error) = written {
            tracing::debug!(%error, "cache state write failed");
        }
    }

    fn write_state(&self, mark: &str, epoch: &str) -> io::Result<()> {
        let new = self.root.join("state.new");
        let mut file = File::create(&new)?;
        file.write_all(format!("{mark} {epoch}").as_bytes())?;
        file.sync_all()?;
        fs::rename(new, self.root.join("state"))?;
        File::open(&self.root)?.sync_all()
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    pub(super) fn fills(&self) -> PathBuf {
        self.root.join("fills")
    }

    pub(super) fn small(&self) -> PathBuf {
        self.root.join("small")
    }

    pub(super) fn records(&self) -> PathBuf {
        self.root.join("records")
    }

    pub(super) fn lists(&self) -> PathBuf {
        self.root.join("lists")
    }
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

const CLEAN: &str = "clean";

/// The id of this boot. If it is unchanged, the page cache has survived.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The old epoch, if the last process stopped cleanly, or was killed while the kernel kept running.
fn epoch_after(state: &str) -> String {
    match state.split_once(' ') {
        Some((mark, epoch)) if mark == CLEAN || (!mark.is_empty() && mark == boot_id()) => epoch.to_owned(),
        _ => new_epoch(),
    }
}

fn new_epoch() -> String {
    format!("{:016x}", fastrand::u64(..))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_in_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = Layout::open(dir.path()).unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(LayoutError::InUse { .. })));
        drop(first);
        assert!(Layout::open(dir.path()).is_ok());
    }

    #[test]
    fn machine_crash_begins_an_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let epoch = || Layout::open(dir.path()).unwrap().epoch().to_owned();
        let first = epoch();
        assert_eq!(epoch(), first, "killed, but the kernel lives");
        Layout::open(dir.path()).unwrap().mark_clean();
        assert_eq!(epoch(), first, "stopped in order");
        for state in ["another-boot 0123456789abcdef", "clean", "", " x"] {
            fs::write(dir.path().join("v1/state"), state).unwrap();
            assert_ne!(epoch(), first, "{state}");
        }
    }

    #[test]
    fn unusable_directory_is_named_in_the_error() {
        let error = Layout::open(Path::new("/proc/nowhere")).err().unwrap().to_string();
        assert!(error.contains("/proc/nowhere") && error.contains("--cache-dir"), "{error}");
    }
}
