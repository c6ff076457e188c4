//! Changes to somebody else's directory: each takes effect at once or not at all, also when the process or the
//! machine stops half-way.
//!
//! New directories are made under another name and renamed. A file that is replaced for a while is exchanged
//! with its successor, so that it comes back with its owner, its mode and its times.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

/// Whose a directory or file is, and who may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileOwner {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

/// Keeps other dray processes from the same directory for as long as it is held.
pub(super) struct Lock {
    _file: File,
}

/// Whoever waits for another process looks this often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What has not yet its own name begins so.
const UNFINISHED: &str = ".dray-unfinished";

impl Lock {
    /// Waits so long for others that change the same directory: whoever can read it can hold this for ever.
    pub(super) fn of(dir: &Path, patience: Duration) -> io::Result<Self> {
        let (file, until) = (File::open(dir)?, Instant::now() + patience);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(LOOK_AGAIN),
                Err(Errno::WOULDBLOCK) => {
                    let why = "another process holds a lock on it: what changes it takes no such time";
                    return Err(io::Error::new(io::ErrorKind::WouldBlock, why));
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
        // A link lets everybody do everything; what counts is the file that it leads to.
        let mode = if known.is_symlink() { fs::metadata(path)?.mode() } else { known.mode() };
        Ok(Self { uid: known.uid(), gid: known.gid(), mode: mode & 0o7777 })
    }

    /// Whether a user and a group may list the directory, and get to what is in it.
    pub fn lets_in(&self, (uid, gid): (u32, u32)) -> bool {
        let needed = match (self.uid == uid, self.gid == gid) {
            (true, _) => 0o500,
            (false, true) => 0o050,
            (false, false) => 0o005,
        };
        uid == 0 || self.mode & needed == needed
    }

    /// The same where a group may list it, and get to what is in it.
    pub fn letting_in(self, gid: u32) -> Self {
        Self { gid, mode: self.mode & !0o070 | 0o050, ..self }
    }

    /// Makes it so.
    pub fn give(&self, path: &Path) -> io::Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))?;
        fs::set_permissions(path, Permissions::from_mode(self.mode))
    }
}

/// A file's text. None: there is no such file. What is no text is invalid data.
pub(super) fn read(path: &Path) -> io::Result<Option<String>> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    // A pipe that nobody writes into would never be opened.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let mut file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(invalid("it is no file"));
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    String::from_utf8(content).map(Some).map_err(|_| invalid("it is not UTF-8 text"))
}

/// A directory with files in it, all at once. With an owner it becomes that one's.
pub(super) fn make_dir(dir: &Path, files: &[(&str, &str)], owner: Option<(u32, u32)>) -> io::Result<()> {
    let unfinished = beside(dir);
    fs::create_dir(&unfinished)?;
    let made = fill_dir(&unfinished, files, owner)
        .and_then(|()| Ok(renameat_with(CWD, &unfinished, CWD, dir, RenameFlags::NOREPLACE)?));
    if made.is_err() {
        let _ = fs::remove_dir_all(&unfinished);
    }
    made?;
    sync_parent(dir)
}

fn fill_dir(unfinished: &Path, files: &[(&str, &str)], owner: Option<(u32, u32)>) -> io::Result<()> {
    fs::set_permissions(unfinished, Permissions::from_mode(0o755))?;
    for (name, content) in files {
        write_new(&unfinished.join(name), content, 0o644)?;
    }
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::chown(unfinished, Some(uid), Some(gid))?;
    }
    File::open(unfinished)?.sync_all()
}

/// The opposite: the directory is gone at once.
pub(super) fn remove_dir(dir: &Path) -> io::Result<()> {
    let unfinished = beside(dir);
    fs::rename(dir, &unfinished)?;
    sync_parent(dir)?;
    fs::remove_dir_all(unfinished)
}

/// A file of our own, written anew or for the first time.
pub(super) fn write(path: &Path, content: &str) -> io::Result<()> {
    let owner = FileOwner::of(path).ok();
    let unfinished = beside(path);
    write_new(&unfinished, content, owner.map_or(0o644, |owner| owner.mode))?;
    if let Some(owner) = owner {
        keep_owner(&unfinished, owner)?;
    }
    fs::rename(&unfinished, path)?;
    sync_parent(path)
}

/// Somebody else's file gets a new content, and is itself kept as `kept`.
pub(super) fn exchange(path: &Path, kept: &Path, content: &str) -> io::Result<()> {
    let owner = FileOwner::of(path)?;
    let _ = fs::remove_file(kept);
    write_new(kept, content, owner.mode)?;
    keep_owner(kept, owner)?;
    renameat_with(CWD, kept, CWD, path, RenameFlags::EXCHANGE)?;
    sync_parent(path)
}

/// The kept file takes its place again.
pub(super) fn restore(path: &Path, kept: &Path) -> io::Result<()> {
    fs::rename(kept, path)?;
    sync_parent(path)
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_parent(path)
}

/// Removes what a process that was killed has left in a directory.
pub(super) fn sweep(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        }
    }
    Ok(())
}

/// Only who may give files away keeps the owner of one that it replaces.
fn keep_owner(path: &Path, owner: FileOwner) -> io::Result<()> {
    match owner.give(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            fs::set_permissions(path, Permissions::from_mode(owner.mode))
        }
        given => given,
    }
}

fn write_new(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_all()
}

/// The name under which something is made that is to be `path`.
fn beside(path: &Path) -> PathBuf {
    path.with_file_name(format!("{UNFINISHED}-{}", std::process::id()))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
