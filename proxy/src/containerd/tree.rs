//! Atomic changes in directories of other programs: each takes effect completely or not at all, also if the process or
//! the machine crashes.
//!
//! A new directory is created under a temporary name and renamed. A foreign file is exchanged with its replacement, so
//! that `restore` brings it back with its owner, mode and times.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

/// Owner and mode of a directory or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileOwner {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

/// Excludes other dray processes from a directory until it is dropped.
pub(super) struct Lock {
    _file: File,
}

/// Interval between attempts to get the lock: flock has no timeout. Longer: commands wait longer than necessary.
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Prefix of temporary names.
const TEMPORARY_PREFIX: &str = ".dray-unfinished";

impl Lock {
    /// Waits for the lock. The timeout is necessary: any process that can read the directory can hold the lock for
    /// ever.
    pub(super) fn acquire(dir: &Path, timeout: Duration) -> io::Result<Self> {
        let (file, deadline) = (File::open(dir)?, Instant::now() + timeout);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL_INTERVAL),
                Err(Errno::WOULDBLOCK) => {
                    let message = "timed out: another process holds the lock on it; find and stop that process";
                    return Err(io::Error::new(io::ErrorKind::WouldBlock, message));
                }
                locked => break locked?,
            }
        }
        Ok(Self { _file: file })
    }
}

impl FileOwner {
    pub fn of(path: &Path) -> io::Result<Self> {
        let known = fs::symlink_metadata(path)?;
        // A symbolic link itself has mode 0777; the mode of its target counts.
        let mode = if known.is_symlink() { fs::metadata(path)?.mode() } else { known.mode() };
        Ok(Self { uid: known.uid(), gid: known.gid(), mode: mode & 0o7777 })
    }

    /// Whether a user with this group can list the directory and access its entries.
    pub fn can_read(&self, (uid, gid): (u32, u32)) -> bool {
        let needed = match (self.uid == uid, self.gid == gid) {
            (true, _) => 0o500,
            (false, true) => 0o050,
            (false, false) => 0o005,
        };
        uid == 0 || self.mode & needed == needed
    }

    /// The same owner and mode, but a group can list the directory and access its entries.
    pub fn with_group_access(self, gid: u32) -> Self {
        Self { gid, mode: self.mode & !0o070 | 0o050, ..self }
    }

    /// Sets owner and mode of a directory or file.
    pub fn apply_to(&self, path: &Path) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, Permissions::from_mode(self.mode))
    }
}

/// The text of a file. None: the file does not exist. A file that is not regular or not UTF-8 is `InvalidData`.
pub(super) fn read(path: &Path) -> io::Result<Option<String>> {
    let invalid = |message| io::Error::new(io::ErrorKind::InvalidData, message);
    // Non-blocking, because opening a pipe without a writer blocks for ever.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    String::from_utf8(content).map(Some).map_err(|_| invalid("it is not UTF-8 text"))
}

/// Creates a directory with files atomically, for an owner if given.
pub(super) fn create_dir(dir: &Path, files: &[(&str, &str)], owner: Option<(u32, u32)>) -> io::Result<()> {
    let temporary = temporary_path(dir);
    fs::create_dir(&temporary)?;
    let created = fill_dir(&temporary, files, owner)
        .and_then(|()| Ok(renameat_with(CWD, &temporary, CWD, dir, RenameFlags::NOREPLACE)?));
    if created.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    created?;
    sync_parent(dir)
}

fn fill_dir(dir: &Path, files: &[(&str, &str)], owner: Option<(u32, u32)>) -> io::Result<()> {
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    for (name, content) in files {
        write_new(&dir.join(name), content, 0o644)?;
    }
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::chown(dir, Some(uid), Some(gid))?;
    }
    File::open(dir)?.sync_all()
}

/// Removes a directory atomically.
pub(super) fn remove_dir(dir: &Path) -> io::Result<()> {
    let temporary = temporary_path(dir);
    fs::rename(dir, &temporary)?;
    sync_parent(dir)?;
    fs::remove_dir_all(temporary)
}

/// Writes a file of dray atomically; an existing file keeps its owner and mode.
pub(super) fn write(path: &Path, content: &str) -> io::Result<()> {
    let owner = FileOwner::of(path).ok();
    let temporary = temporary_path(path);
    write_new(&temporary, content, owner.map_or(0o644, |owner| owner.mode))?;
    if let Some(owner) = owner {
        keep_owner(&temporary, owner)?;
    }
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

/// Replaces a foreign file with a new one, and keeps the original as `backup`.
pub(super) fn exchange(path: &Path, backup: &Path, content: &str) -> io::Result<()> {
    let owner = FileOwner::of(path)?;
    let _ = fs::remove_file(backup);
    write_new(backup, content, owner.mode)?;
    keep_owner(backup, owner)?;
    renameat_with(CWD, backup, CWD, path, RenameFlags::EXCHANGE)?;
    sync_parent(path)
}

/// Renames the backup over the file.
pub(super) fn restore(path: &Path, backup: &Path) -> io::Result<()> {
    fs::rename(backup, path)?;
    sync_parent(path)
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_parent(path)
}

/// Removes the temporary files and directories of a process that was killed.
pub(super) fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
    Ok(())
}

/// Sets owner and mode of the file that is replaced. Without the permission to change owners, sets only the mode.
fn keep_owner(path: &Path, owner: FileOwner) -> io::Result<()> {
    match owner.apply_to(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::set_permissions(path, Permissions::from_mode(owner.mode))
        }
        applied => applied,
    }
}

fn write_new(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// A temporary path in the same directory, for a rename to `path`.
fn temporary_path(path: &Path) -> PathBuf {
    path.with_file_name(format!("{TEMPORARY_PREFIX}-{}", std::process::id()))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
