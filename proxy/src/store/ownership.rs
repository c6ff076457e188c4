//! A cache directory as it changes hands: to the user that dray runs as, and back to nobody.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;
use std::time::{Duration, Instant};

use super::layout;
use crate::times::TICK;

/// A process that was told to end is gone after this time.
const DRAINED: Duration = Duration::from_secs(30);

/// Gives a cache directory with all that is in it to a user and a group. False: it was theirs. One with something else in
/// it is somebody's, by mistake.
pub fn own(dir: &Path, to: (u32, u32)) -> io::Result<bool> {
    if is_of(dir, to)? {
        return Ok(false);
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        // A file system of its own has this from the beginning.
        if !layout::is_one(&name) && name != "lost+found" {
            let why = format!("holds {}, which dray did not write: give it a directory of its own", name.display());
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, why));
        }
    }
    own_all(dir, to)?;
    Ok(true)
}

/// Removes what dray keeps in a cache directory, once no process has it any more. False: there was nothing.
pub fn empty(dir: &Path) -> io::Result<bool> {
    let mut found = false;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if layout::is_one(&entry.file_name()) && entry.file_type()?.is_dir() {
            let _lock = wait_for(&entry.path())?;
            fs::remove_dir_all(entry.path())?;
            found = true;
        }
    }
    Ok(found)
}

fn wait_for(layout: &Path) -> io::Result<File> {
    let (lock, until) = (File::create(layout.join(layout::LOCK))?, Instant::now() + DRAINED);
    while lock.try_lock().is_err() {
        if Instant::now() > until {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "a dray is using it"));
        }
        std::thread::sleep(TICK);
    }
    Ok(lock)
}

fn own_all(dir: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            lchown(entry.path(), Some(uid), Some(gid))?;
        } else if !is_of(&entry.path(), (uid, gid))? {
            own_all(&entry.path(), (uid, gid))?;
        }
    }
    // The last one: whoever is stopped half-way begins again.
    lchown(dir, Some(uid), Some(gid))
}

fn is_of(dir: &Path, to: (u32, u32)) -> io::Result<bool> {
    let known = fs::symlink_metadata(dir)?;
    Ok((known.uid(), known.gid()) == to)
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
    fn what_is_in_a_directory_of_somebody_else_stays_theirs() {
        if !rustix::process::geteuid().is_root() {
            return; // Only root gives files away.
        }
        let (dir, to) = (tempfile::tempdir().unwrap(), (65532, 65532));
        put(dir.path(), "v1/blobs/x");
        put(dir.path(), "library/photo");
        let refused = own(dir.path(), to).unwrap_err().to_string();
        assert!(refused.contains("holds library"), "{refused}");
        assert!(!is_of(&dir.path().join("v1"), to).unwrap());
        fs::remove_dir_all(dir.path().join("library")).unwrap();
        put(dir.path(), "v2/of-a-later-release");
        put(dir.path(), "lost+found/x");
        assert!(own(dir.path(), to).unwrap());
        assert!(is_of(&dir.path().join("v1/blobs"), to).unwrap() && is_of(&dir.path().join("v2"), to).unwrap());
        put(dir.path(), "core.1234");
        assert!(!own(dir.path(), to).unwrap(), "it is theirs, whatever else came into it");
    }

    #[test]
    fn what_dray_keeps_goes_once_nobody_has_it() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "v1/blobs/x");
        put(dir.path(), "library/photo");
        let held = File::create(dir.path().join("v1").join(layout::LOCK)).unwrap();
        held.lock().unwrap();
        let emptied = std::thread::scope(|scope| {
            let emptying = scope.spawn(|| empty(dir.path()));
            std::thread::sleep(TICK * 3);
            assert!(dir.path().join("v1/blobs/x").exists(), "somebody has it");
            drop(held);
            emptying.join().unwrap()
        });
        assert!(emptied.unwrap());
        assert!(!dir.path().join("v1").exists() && dir.path().join("library/photo").exists());
        assert!(!empty(dir.path()).unwrap(), "there is nothing any more");
    }
}
