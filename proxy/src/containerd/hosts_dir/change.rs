//! The steps of what a command does, each whole or not at all.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::io;
use std::path::{Path, PathBuf};

use similar::TextDiff;

use super::HOSTS;
use super::marker::{MARKER, Marker};
use crate::containerd::tree::{self, FileOwner};

/// One step of what a command does or would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub path: PathBuf,
    pub action: Action,
    pub(super) before: String,
    pub(super) after: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A new directory with a hosts.toml.
    MakeDir,
    /// A file where none was, or one of dray's own again.
    Write,
    /// dray's lines go into somebody's file, which is kept beside it.
    Extend {
        kept: PathBuf,
    },
    /// The kept file takes its place again.
    Restore {
        kept: PathBuf,
    },
    /// dray's lines go out of a file that was edited since.
    TakeOut {
        kept: Option<PathBuf>,
    },
    Remove,
    RemoveDir,
    /// What an earlier process that was stopped half-way left.
    Discard,
    /// A directory goes to the user that dray runs as.
    HandOver {
        to: (u32, u32),
        known: Option<Marker>,
    },
    /// The hosts directory lets that user's group in.
    LetIn {
        gid: u32,
        before: FileOwner,
    },
    /// The hosts directory lets in whom it let in before.
    Close(FileOwner),
    /// A directory goes back to whose it was.
    GiveBack(FileOwner),
}

impl Change {
    pub(super) fn carry_out(&self) -> io::Result<()> {
        let path = &self.path;
        match &self.action {
            Action::MakeDir => {
                let marker = Marker { before: None, handed_over: false };
                tree::make_dir(path, &[(HOSTS, &self.after), (MARKER, &marker.to_text())], None)
            }
            Action::Write => tree::write(path, &self.after),
            Action::Extend { kept } => tree::exchange(path, kept, &self.after),
            Action::Restore { kept } => tree::restore(path, kept),
            Action::TakeOut { kept } => {
                tree::write(path, &self.after)?;
                kept.as_ref().map_or(Ok(()), |kept| tree::remove(kept))
            }
            Action::Remove | Action::Discard => tree::remove(path),
            Action::RemoveDir => tree::remove_dir(path),
            Action::HandOver { to, known } => hand_over(path, *to, *known),
            Action::LetIn { gid, before } => {
                let marker = Marker { before: Some(*before), handed_over: true };
                tree::write(&path.join(MARKER), &marker.to_text())?;
                before.letting_in(*gid).give(path)
            }
            Action::Close(before) => {
                let now = FileOwner::of(path)?;
                // Somebody may have decided otherwise since.
                if now == before.letting_in(now.gid) {
                    before.give(path)?;
                }
                tree::remove(&path.join(MARKER))
            }
            Action::GiveBack(owner) => {
                owner.give(path)?;
                tree::remove(&path.join(MARKER))
            }
        }
    }

    /// What becomes of the file, line by line.
    pub fn diff(&self) -> String {
        if self.before == self.after {
            return String::new();
        }
        let name = self.path.display().to_string();
        let name = if self.action == Action::MakeDir { format!("{name}/{HOSTS}") } else { name };
        let diff = TextDiff::from_lines(&self.before, &self.after);
        diff.unified_diff().header(&name, &name).to_string()
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        match &self.action {
            Action::MakeDir => write!(f, "{path}: a new directory, with {HOSTS}"),
            Action::Write => write!(f, "{path}: written"),
            Action::Extend { kept } => write!(f, "{path}: dray comes first; the file as it was is {}", kept.display()),
            Action::Restore { .. } => write!(f, "{path}: as it was before"),
            Action::TakeOut { .. } => write!(f, "{path}: dray's lines are out; the rest, edited since, stays"),
            Action::Remove | Action::RemoveDir => write!(f, "{path}: removed"),
            Action::Discard => write!(f, "{path}: removed, a leftover"),
            Action::HandOver { to, .. } => write!(f, "{path}: belongs to {}:{} now", to.0, to.1),
            Action::LetIn { gid, .. } => write!(f, "{path}: lets group {gid} in"),
            Action::Close(before) => {
                write!(f, "{path}: belongs to {}:{} again, mode {:04o}", before.uid, before.gid, before.mode)
            }
            Action::GiveBack(owner) => {
                write!(f, "{path}: belongs to {}:{} again, mode {:04o}", owner.uid, owner.gid, owner.mode)
            }
        }
    }
}

fn hand_over(path: &Path, to: (u32, u32), known: Option<Marker>) -> io::Result<()> {
    if path.is_symlink() {
        let why = "a symbolic link: whoever owns what it leads to would change; make it a directory";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    if !path.exists() {
        let marker = Marker { before: None, handed_over: true };
        return tree::make_dir(path, &[(MARKER, &marker.to_text())], Some(to));
    }
    let owner = FileOwner::of(path)?;
    let before = known.map_or(Some(owner), |known| known.before);
    tree::write(&path.join(MARKER), &Marker { before, handed_over: true }.to_text())?;
    FileOwner { uid: to.0, gid: to.1, mode: owner.mode | 0o700 }.give(path)
}
