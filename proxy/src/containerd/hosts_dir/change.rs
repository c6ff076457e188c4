//! The changes of a command. Each is atomic.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::io;
use std::path::{Path, PathBuf};

use similar::TextDiff;

use super::HOSTS_FILE;
use super::marker::{MARKER_FILE, Marker};
use crate::containerd::tree::{self, FileOwner};

/// One change that a command made or planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub path: PathBuf,
    pub action: Action,
    pub(super) before: String,
    pub(super) after: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Create a directory with a hosts.toml.
    CreateDir,
    /// Write a new file, or replace one that dray wrote.
    Write,
    /// Insert dray's block into a foreign file, and keep its original as `backup`.
    Extend {
        backup: PathBuf,
    },
    /// Rename the backup over the file.
    Restore {
        backup: PathBuf,
    },
    /// Remove dray's block from a file that was edited after `install`.
    StripBlock {
        backup: Option<PathBuf>,
    },
    Remove,
    RemoveDir,
    /// Remove a leftover of a process that was killed.
    Discard,
    /// Give a directory to the user that dray runs as.
    ChangeOwner {
        to: (u32, u32),
        marker: Option<Marker>,
    },
    /// Let the group of that user read the hosts directory.
    AllowGroup {
        gid: u32,
        before: FileOwner,
    },
    /// Revert `AllowGroup`.
    RestoreAccess(FileOwner),
    /// Revert `ChangeOwner`.
    RestoreOwner(FileOwner),
}

impl Change {
    pub(super) fn apply(&self) -> io::Result<()> {
        let path = &self.path;
        match &self.action {
            Action::CreateDir => {
                let marker = Marker { before: None, is_prepared: false };
                tree::create_dir(path, &[(HOSTS_FILE, &self.after), (MARKER_FILE, &marker.to_text())], None)
            }
            Action::Write => tree::write(path, &self.after),
            Action::Extend { backup } => tree::exchange(path, backup, &self.after),
            Action::Restore { backup } => tree::restore(path, backup),
            Action::StripBlock { backup } => {
                tree::write(path, &self.after)?;
                backup.as_ref().map_or(Ok(()), |backup| tree::remove(backup))
            }
            Action::Remove | Action::Discard => tree::remove(path),
            Action::RemoveDir => tree::remove_dir(path),
            Action::ChangeOwner { to, marker } => change_owner(path, *to, *marker),
            Action::AllowGroup { gid, before } => {
                let marker = Marker { before: Some(*before), is_prepared: true };
                tree::write(&path.join(MARKER_FILE), &marker.to_text())?;
                before.with_group_access(*gid).apply_to(path)
            }
            Action::RestoreAccess(before) => {
                let now = FileOwner::of(path)?;
                // An operator may have changed the permissions after `prepare`: they stay.
                if now == before.with_group_access(now.gid) {
                    before.apply_to(path)?;
                }
                tree::remove(&path.join(MARKER_FILE))
            }
            Action::RestoreOwner(owner) => {
                owner.apply_to(path)?;
                tree::remove(&path.join(MARKER_FILE))
            }
        }
    }

    /// The change of the file as a unified diff.
    pub fn diff(&self) -> String {
        if self.before == self.after {
            return String::new();
        }
        let name = self.path.display().to_string();
        let name = if self.action == Action::CreateDir { format!("{name}/{HOSTS_FILE}") } else { name };
        let diff = TextDiff::from_lines(&self.before, &self.after);
        diff.unified_diff().header(&name, &name).to_string()
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match &self.action {
            Action::CreateDir => write!(f, "{path}: directory created, with {HOSTS_FILE}"),
            Action::Write => write!(f, "{path}: written"),
            Action::Extend { backup } => {
                write!(f, "{path}: dray is the first host; the original file is {}", backup.display())
            }
            Action::Restore { .. } => write!(f, "{path}: restored"),
            Action::StripBlock { .. } => write!(f, "{path}: dray's lines removed; the rest was edited and stays"),
            Action::Remove | Action::RemoveDir => write!(f, "{path}: removed"),
            Action::Discard => write!(f, "{path}: removed, a leftover of an interrupted install"),
            Action::ChangeOwner { to, .. } => write!(f, "{path}: owner changed to {}:{}", to.0, to.1),
            Action::AllowGroup { gid, .. } => write!(f, "{path}: group {gid} can read it"),
            Action::RestoreAccess(owner) | Action::RestoreOwner(owner) => {
                write!(f, "{path}: owner restored to {}:{}, mode {:04o}", owner.uid, owner.gid, owner.mode)
            }
        }
    }
}

fn change_owner(path: &Path, to: (u32, u32), marker: Option<Marker>) -> io::Result<()> {
    if path.is_symlink() {
        let message = "it is a symbolic link, and the owner of its target would change: replace it with a directory";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    if !path.exists() {
        let marker = Marker { before: None, is_prepared: true };
        return tree::create_dir(path, &[(MARKER_FILE, &marker.to_text())], Some(to));
    }
    let owner = FileOwner::of(path)?;
    let before = marker.map_or(Some(owner), |marker| marker.before);
    tree::write(&path.join(MARKER_FILE), &Marker { before, is_prepared: true }.to_text())?;
    FileOwner { uid: to.0, gid: to.1, mode: owner.mode | 0o700 }.apply_to(path)
}
