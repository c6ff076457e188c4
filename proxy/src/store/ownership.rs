//! Ownership of a cache directory: given to the user that dray runs as; removal of its content.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;
use std::time::{Duration, Instant};

use super::layout;
use crate::times::TICK;

/// How long a draining process may hold the directory. Shorter: removal fails while dray drains. Longer: removal waits
/// longer for a process that does not end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Changes the owner of a cache directory and its content. False: it had this owner. A directory with foreign files is
/// refused, because it was probably configured by mistake.
pub fn own(dir: &Path, to: (u32, u32)) -> io::Result<bool> {
    if has_owner(dir, to)? {
        return Ok(false);
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        // Part of every new ext4 file system.
        if !layout::is_layout_dir(&name) && name != "lost+found" {
            let message =
                format!("holds {}, which dray did not write: choose a directory that only dray uses", name.display());
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, message));
        }
    }
    chown_all(dir, to)?;
    Ok(true)
}

/// Removes the content that dray wrote, once no process uses it. False: there was none.
pub fn empty(dir: &Path) -> io::Result<bool> {
    let mut found = false;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if layout::is_layout_dir(&entry.file_name()) && entry.file_type()?.is_dir() {
            let _lock = lock_when_free(&entry.path())?;
            fs::remove_dir_all(entry.path())?;
            found = true;
        }
    }
    Ok(found)
}

fn lock_when_free(layout: &Path) -> io::Result<File> {
    let (lock, until) = (File::create(layout.join(layout::LOCK))?, Instant::now() + DRAIN_TIMEOUT);
    while lock.try_lock().is_err() {
        if Instant::now() > until {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "another dray process uses it: stop that process first",
            ));
        }
        std::thread::sleep(TICK);
    }
    Ok(lock)
}

fn chown_all(dir: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            lchown(entry.path(), Some(uid), Some(gid))?;
        } else if !has_owner(&entry.path(), (uid, gid))? {
            chown_all(&entry.path(), (uid, gid))?;
        }
    }
    // The directory comes last, so that an interrupted change is repeated.
    lchown(dir, Some(uid), Some(gid))
}

fn has_owner(dir: &Path, to: (u32, u32)) -> io::Result<bool> {
    let metadata = fs::symlink_metadata(dir)?;
    Ok((metadata.uid(), metadata.gid()) == to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, path: &str) {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }

    #[test]
    fn directory_with_foreign_files_keeps_its_owner() {
        if !rustix::process::geteuid().is_root() {
            return; // Only root may change owners.
        }
        let (dir, to) = (tempfile::tempdir().unwrap(), (65532, 65532));
        put(dir.path(), "v1/blobs/x");
        put(dir.path(), "library/photo");
        let refused = own(dir.path(), to).unwrap_err().to_string();
        assert!(refused.contains("holds library"), "{refused}");
        assert!(!has_owner(&dir.path().join("v1"), to).unwrap());
        fs::remove_dir_all(dir.path().join("library")).unwrap();
        put(dir.path(), "v2/of-a-later-release");
        put(dir.path(), "lost+found/x");
        assert!(own(dir.path(), to).unwrap());
        assert!(has_owner(&dir.path().join("v1/blobs"), to).unwrap() && has_owner(&dir.path().join("v2"), to).unwrap());
        put(dir.path(), "core.1234");
        assert!(!own(dir.path(), to).unwrap(), "the owner is right already");
    }

    #[test]
    fn content_in_use_is_removed_after_its_release() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "v1/blobs/x");
        put(dir.path(), "library/photo");
        let held = File::create(dir.path().join("v1").join(layout::LOCK)).unwrap();
        held.lock().unwrap();
        let emptied = std::thread::scope(|scope| {
            let emptying = scope.spawn(|| empty(dir.path()));
            std::thread::sleep(TICK * 3);
            assert!(dir.path().join("v1/blobs/x").exists(), "it is in use");
            drop(held);
            emptying.join().unwrap()
        });
        assert!(emptied.unwrap());
        assert!(!dir.path().join("v1").exists() && dir.path().join("library/photo").exists());
        assert!(!empty(dir.path()).unwrap(), "nothing is left");
    }
}
