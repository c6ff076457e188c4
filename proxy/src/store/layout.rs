//! The cache directory: `<dir>/v1/{lock,state,blobs,fills,small,records}`.
//!
//! The version stands in the path, so that another version of dray neither trips over these files
//! nor serves them wrongly.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::oci::Algorithm;

/// A locked cache directory.
pub(super) struct Layout {
    root: PathBuf,
    left_in_order: bool,
    /// Held for as long as the process lives.
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

impl Layout {
    pub(super) fn open(dir: &Path) -> Result<Self, LayoutError> {
        let unusable = |source| LayoutError::Unusable { dir: dir.to_owned(), source };
        let root = dir.join("v1");
        // What is cached may be private: nobody else on the machine has to read it.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(unusable)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        let lock = File::create(root.join("lock")).map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LayoutError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        let state = fs::read_to_string(root.join("state")).unwrap_or_default();
        let left_in_order = state == CLEAN || (!state.is_empty() && state == boot_id());
        let layout = Self { root, left_in_order, _lock: lock };
        // Unfinished fills belong to a process that is gone.
        let _ = fs::remove_dir_all(layout.fills());
        layout.create_dirs().map_err(unusable)?;
        fs::write(layout.root.join("state"), boot_id()).map_err(unusable)?;
        Ok(layout)
    }

    fn create_dirs(&self) -> io::Result<()> {
        for algorithm in Algorithm::ALL {
            fs::create_dir_all(self.blobs().join(algorithm.as_str()))?;
        }
        for dir in [self.fills(), self.small(), self.records()] {
            fs::create_dir_all(dir)?;
        }
        Ok(())
    }

    /// Whether the last process stopped in order, or was killed while the kernel lived on. After a
    /// crash of the machine, files may hold less than was written to them.
    pub(super) fn left_in_order(&self) -> bool {
        self.left_in_order
    }

    pub(super) fn mark_clean(&self) {
        if let Err(error) = fs::write(self.root.join("state"), CLEAN) {
            tracing::debug!(%error, "the cache directory is gone");
        }
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
}

const CLEAN: &str = "clean";

/// The kernel's id of this boot: the page cache has survived if it is the same.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = Layout::open(dir.path()).unwrap();
        assert!(matches!(Layout::open(dir.path()), Err(LayoutError::InUse { .. })));
        drop(first);
        assert!(Layout::open(dir.path()).is_ok());
    }

    #[test]
    fn a_crash_of_the_machine_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let order = || Layout::open(dir.path()).unwrap().left_in_order();
        assert!(!order(), "nothing is known of a new directory");
        assert!(order(), "killed, but the kernel lives");
        fs::write(dir.path().join("v1/state"), "another boot").unwrap();
        assert!(!order());
        Layout::open(dir.path()).unwrap().mark_clean();
        assert!(order());
    }

    #[test]
    fn an_unusable_directory_is_named() {
        let error = Layout::open(Path::new("/proc/nowhere")).err().unwrap().to_string();
        assert!(error.contains("/proc/nowhere") && error.contains("--cache-dir"), "{error}");
    }
}
