//! File systems of a fixed size.

use std::path::Path;
use std::process::Command;

use crate::process::run;

/// A file system that is unmounted when dropped.
pub struct Mount(tempfile::TempDir);

impl Mount {
    /// In memory, such as "90m". Needs root.
    pub fn tmpfs(size: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(dir.path()));
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
