//! The installer of dray's mirror configuration in a containerd hosts directory (its `config_path`).
//!
//! containerd reads the files for every pull, so it does not need a restart. For a registry it uses the first existing
//! directory of `host_port_`, `host:port` and `_default`, and no other: a directory for a registry hides `_default`.
//!
//! States of a registry's directory. "Block" means dray's lines, "backup" means `hosts.toml.before-dray`:
//!
//! | state | on disk | `install` | `uninstall` |
//! |---|---|---|---|
//! | absent | no directory | created | absent |
//! | empty | a directory without hosts.toml | written | empty |
//! | foreign | a hosts.toml without block | extended | foreign |
//! | created | only the block; marker `made` | created | absent; if files were added: foreign or empty |
//! | written | only the block | written | empty |
//! | extended | the block before the original; a backup | extended | foreign: the backup is renamed over the file |
//! | extended, rest edited | the block, and a rest that is not the backup | same | foreign: the edited rest stays |
//! | interrupted | a foreign hosts.toml; a backup with the block | extended | foreign: the backup is removed |
//! | block edited | the checksum of the block is wrong | unchanged, with a remark | unchanged, with a remark |
//! | unsupported | a hosts.toml that cannot be extended | unchanged, with a remark | unchanged |
//! | local | a directory of a registry on this machine | unchanged, with a remark | unchanged |
//!
//! `withdraw` does to `_default` what `uninstall` does, but keeps the owner of a prepared directory.
//!
//! Owners. `prepare` runs as root; the marker file `.dray` has the previous owner:
//!
//! | directory | `prepare` | `uninstall` |
//! |---|---|---|
//! | `_default`, absent | created for dray's user | removed; with other files: given to the hosts directory's owner |
//! | `_default`, existing | given to dray's user | previous owner restored |
//! | hosts directory, readable for dray | unchanged | unchanged |
//! | hosts directory, not readable | dray's group can read it | previous group restored, unless it was changed again |
//! | hosts directory, readable for another group only | refused | unchanged |

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

mod change;
mod marker;
mod remark;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::change::{Action, Change};
use self::marker::MARKER_FILE;
pub use self::marker::Marker;
pub use self::remark::Remark;
use super::hosts_toml::{self, Certificates, EditState, Mirrors};
use super::tree::{self, FileOwner, Lock};
use crate::oci::Registry;
use crate::times::SERVICE_TIMEOUT;

/// A hosts directory.
pub struct HostsDir {
    root: PathBuf,
}

/// The registries to mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirroredRegistries {
    /// All registries without a directory of their own.
    Default,
    /// All registries, also those with a directory of their own.
    Every,
    Named(Vec<String>),
}

/// Whether to change files, or only to plan the changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    DryRun,
}

/// The changes that a command made or planned.
#[derive(Debug, Default)]
pub struct Changes {
    pub changes: Vec<Change>,
    pub remarks: Vec<Remark>,
}

#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error(
        "{0} does not exist: create it if it is containerd's config_path (`dray containerd check` prints that), or pass another --hosts-dir"
    )]
    Missing(PathBuf),
    #[error(
        "{0} belongs to {uid}:{gid} with mode {mode:04o}, so user {to}, as which dray runs, cannot read it: allow others to read it (chmod o+rx)", uid = .1.uid, gid = .1.gid, mode = .1.mode, to = .2.0
    )]
    NotReadable(PathBuf, FileOwner, (u32, u32)),
    #[error("{0} is a registry on this machine: containerd contacts it directly, without a mirror")]
    Local(String),
    #[error("\"{0}\" is not a valid registry host: expected one such as docker.io or registry.corp:5000")]
    InvalidRegistry(String),
}

/// Timeout for the lock when dray stops. Longer: Kubernetes may kill dray before it has removed the mirror
/// configuration. Shorter: dray writes while another process holds the lock.
const WITHDRAW_LOCK_TIMEOUT: Duration = Duration::from_millis(500);

const HOSTS_FILE: &str = "hosts.toml";
const BACKUP_FILE: &str = "hosts.toml.before-dray";
const DEFAULT_DIR: &str = "_default";

impl HostsDir {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The command that gives the user the missing write permission. None: for root, which has all permissions, and for other
    /// errors.
    pub fn remedy(&self, error: &HostsError, (uid, gid): (u32, u32)) -> Option<String> {
        let HostsError::Io(_, error) = error else { return None };
        let is_denied = error.kind() == io::ErrorKind::PermissionDenied && uid != 0;
        is_denied.then(|| {
            format!("run once: sudo dray containerd prepare --to {uid}:{gid} --hosts-dir {}", self.root.display())
        })
    }

    /// Makes the mirrors the first that containerd tries. Existing hosts stay, after them.
    pub fn install(
        &self,
        mirrors: &Mirrors,
        registries: &MirroredRegistries,
        mode: Mode,
    ) -> Result<Changes, HostsError> {
        let _lock = self.lock(mode)?;
        let mut outcome = Changes::default();
        for dir in self.target_dirs(registries)? {
            self.plan_install(&dir, mirrors, &mut outcome)?;
        }
        if *registries == MirroredRegistries::Default {
            for dir in self.registry_dirs()? {
                let text = match read(&dir.join(HOSTS_FILE)) {
                    // The file of another program may contain secrets and be unreadable; it then counts as hiding
                    // `_default`.
                    Err(HostsError::Io(_, error)) if error.kind() == io::ErrorKind::PermissionDenied => None,
                    text => text?,
                };
                let hosts = hosts_toml::hosts(&text.unwrap_or_default());
                if !is_local(&dir)
                    && !mirrors.hosts.iter().any(|mirror| hosts.iter().any(|host| host == mirror.as_str()))
                {
                    outcome.remarks.push(Remark::Shadows(dir));
                }
            }
        }
        outcome.apply(mode)
    }

    /// Removes what `install` and `prepare` wrote, and nothing else.
    pub fn uninstall(&self, mode: Mode) -> Result<Changes, HostsError> {
        if !self.root.is_dir() {
            return Ok(Changes::default());
        }
        let _lock = self.lock(mode)?;
        let mut outcome = Changes::default();
        for dir in self.directories()? {
            self.plan_uninstall(&dir, &mut outcome)?;
            self.plan_restore_owner(&dir, &mut outcome)?;
        }
        if let Some(before) = Marker::of(&self.root)?.and_then(|marker| marker.before) {
            outcome.add(self.root.clone(), Action::RestoreAccess(before), String::new(), String::new());
        }
        outcome.apply(mode)
    }

    /// Removes the block in `_default` while the mirror is not available. Does not restore the owner of a prepared
    /// directory: dray needs it at its next start.
    pub fn withdraw(&self) -> Result<Changes, HostsError> {
        let dir = self.root.join(DEFAULT_DIR);
        if !dir.is_dir() {
            return Ok(Changes::default());
        }
        // Continues without the lock: a process that holds it, or new permissions of the hosts directory, must not
        // leave containerd with a mirror that is down.
        let is_lock_unavailable =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied);
        let _lock = match self.lock_within(Mode::Apply, WITHDRAW_LOCK_TIMEOUT) {
            Err(HostsError::Io(_, error)) if is_lock_unavailable(&error) => None,
            lock => Some(lock?),
        };
        let mut outcome = Changes::default();
        self.plan_uninstall(&dir, &mut outcome)?;
        if Marker::of(&dir)?.is_some_and(|marker| !marker.is_prepared) {
            self.plan_restore_owner(&dir, &mut outcome)?;
        }
        outcome.apply(Mode::Apply)
    }

    /// Gives `_default` to the user that dray runs as, and lets its group read the hosts directory if necessary.
    pub fn prepare(&self, to: (u32, u32), mode: Mode) -> Result<Changes, HostsError> {
        let _lock = self.lock(mode)?;
        let path = self.root.join(DEFAULT_DIR);
        let marker = if path.is_dir() { Marker::of(&path)? } else { None };
        let root = FileOwner::of(&self.root).map_err(|e| HostsError::Io(self.root.clone(), e))?;
        // A previous `prepare` may have changed the owner: its marker has the original one.
        let before = Marker::of(&self.root)?.and_then(|marker| marker.before).unwrap_or(root);
        let mut outcome = Changes::default();
        let is_done = marker.is_some_and(|marker| marker.is_prepared)
            && FileOwner::of(&path).is_ok_and(|owner| (owner.uid, owner.gid) == to);
        if !is_done {
            outcome.add(path, Action::ChangeOwner { to, marker }, String::new(), String::new());
        }
        if !root.can_read(to) {
            if before.mode & 0o070 != 0 && before.gid != 0 {
                return Err(HostsError::NotReadable(self.root.clone(), before, to));
            }
            outcome.add(self.root.clone(), Action::AllowGroup { gid: to.1, before }, String::new(), String::new());
        }
        outcome.apply(mode)
    }

    /// The subdirectories that containerd may read as the directory of a registry, `_default` included.
    pub fn directories(&self) -> Result<Vec<PathBuf>, HostsError> {
        let listed = fs::read_dir(&self.root).map_err(|e| HostsError::Io(self.root.clone(), e))?;
        let mut dirs: Vec<_> = listed
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.is_dir() && !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
            })
            .collect();
        dirs.sort();
        Ok(dirs)
    }

    /// The subdirectories of single registries, which hide `_default`.
    pub fn registry_dirs(&self) -> Result<Vec<PathBuf>, HostsError> {
        Ok(self.directories()?.into_iter().filter(|dir| hosts_toml::registry_of(dir).is_some()).collect())
    }

    pub fn default_file(&self) -> PathBuf {
        self.root.join(DEFAULT_DIR).join(HOSTS_FILE)
    }

    fn lock(&self, mode: Mode) -> Result<Lock, HostsError> {
        self.lock_within(mode, SERVICE_TIMEOUT)
    }

    fn lock_within(&self, mode: Mode, timeout: Duration) -> Result<Lock, HostsError> {
        if !self.root.is_dir() {
            return Err(HostsError::Missing(self.root.clone()));
        }
        let lock = Lock::acquire(&self.root, timeout).map_err(|e| HostsError::Io(self.root.clone(), e))?;
        if mode == Mode::Apply {
            for dir in self.directories()?.iter().chain([&self.root]) {
                match tree::remove_unfinished(dir) {
                    // A directory that dray cannot read cannot have unfinished files of dray.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    removed => removed.map_err(|e| HostsError::Io(dir.clone(), e))?,
                }
            }
        }
        Ok(lock)
    }

    fn target_dirs(&self, registries: &MirroredRegistries) -> Result<Vec<PathBuf>, HostsError> {
        let default = self.root.join(DEFAULT_DIR);
        match registries {
            MirroredRegistries::Default => Ok(vec![default]),
            MirroredRegistries::Every => Ok([default].into_iter().chain(self.registry_dirs()?).collect()),
            MirroredRegistries::Named(names) => {
                // A set, because Docker Hub has several names.
                let dirs: Result<BTreeSet<_>, _> = names.iter().map(|name| self.dir_of(name)).collect();
                Ok(dirs?.into_iter().collect())
            }
        }
    }

    /// The directory that containerd reads for a registry; it may not exist yet.
    fn dir_of(&self, registry: &str) -> Result<PathBuf, HostsError> {
        // Parsing normalizes the several names of Docker Hub to the one that containerd uses.
        let parsed = registry.parse::<Registry>().map_err(|_| HostsError::InvalidRegistry(registry.to_owned()))?;
        let registry = parsed.as_str();
        if is_local(Path::new(registry)) {
            return Err(HostsError::Local(registry.to_owned()));
        }
        let (host, port) = match registry.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => (host, Some(port)),
            _ => (registry, None),
        };
        let underscored = port.map(|port| self.root.join(format!("{host}_{port}_"))).filter(|dir| dir.is_dir());
        Ok(underscored.unwrap_or_else(|| self.root.join(registry)))
    }

    fn plan_install(&self, dir: &Path, mirrors: &Mirrors, outcome: &mut Changes) -> Result<(), HostsError> {
        if dir.is_symlink() && !dir.exists() {
            let error = io::Error::new(
                io::ErrorKind::NotFound,
                "the target of this symbolic link does not exist: remove the link",
            );
            return Err(HostsError::Io(dir.to_owned(), error));
        }
        if !dir.exists() {
            let block = mirrors.block(None, &Certificates::default());
            outcome.add(dir.to_owned(), Action::CreateDir, String::new(), block);
            return Ok(());
        }
        if is_local(dir) {
            outcome.remarks.push(Remark::Local(dir.to_owned()));
            return Ok(());
        }
        let (path, backup) = (dir.join(HOSTS_FILE), dir.join(BACKUP_FILE));
        let present = read(&path)?;
        let earlier = present.as_deref().and_then(hosts_toml::strip_block);
        if earlier.as_ref().is_some_and(|earlier| earlier.state == EditState::Edited) {
            outcome.remarks.push(Remark::Edited(path));
            return Ok(());
        }
        let base = earlier.as_ref().map_or_else(|| present.clone().unwrap_or_default(), |earlier| earlier.rest.clone());
        // containerd finds certificates by their names only if hosts.toml is missing or empty.
        let certificates = if base.is_empty() { certificates(dir)? } else { Certificates::default() };
        let block = mirrors.block(hosts_toml::registry_of(dir).as_deref(), &certificates);
        let wanted = match hosts_toml::insert_block(&base, &block, mirrors) {
            Ok(wanted) => wanted,
            Err(error) => {
                outcome.remarks.push(Remark::Unsupported(path, error));
                return Ok(());
            }
        };
        match present {
            Some(present) if present == wanted => {}
            // A foreign file, even if empty.
            Some(present) if earlier.is_none() => outcome.add(path, Action::Extend { backup }, present, wanted),
            present => outcome.add(path, Action::Write, present.unwrap_or_default(), wanted),
        }
        Ok(())
    }

    fn plan_uninstall(&self, dir: &Path, outcome: &mut Changes) -> Result<(), HostsError> {
        let (path, backup) = (dir.join(HOSTS_FILE), dir.join(BACKUP_FILE));
        // dray writes text: a file that is not text is foreign.
        let (original, present) = (read_if_text(&backup)?, read_if_text(&path)?);
        let Some(present) = present else { return Ok(()) };
        let Some(earlier) = hosts_toml::strip_block(&present) else {
            // `install` was killed before it exchanged the two files: the backup has dray's block.
            if original.is_some_and(|original| hosts_toml::strip_block(&original).is_some()) {
                outcome.add(backup, Action::Discard, String::new(), String::new());
            }
            return Ok(());
        };
        if earlier.state == EditState::Edited {
            outcome.remarks.push(Remark::Edited(path));
            return Ok(());
        }
        match original {
            Some(original) if present == extended(&original, &earlier.block) => {
                outcome.add(path, Action::Restore { backup }, present, original);
            }
            None if earlier.rest.trim().is_empty() => outcome.add(path, Action::Remove, present, String::new()),
            original => {
                let backup = original.map(|_| backup);
                outcome.add(path, Action::StripBlock { backup }, present, earlier.rest);
            }
        }
        Ok(())
    }

    /// Removes a directory that dray created, if it has no other files. Otherwise restores its owner.
    fn plan_restore_owner(&self, dir: &Path, outcome: &mut Changes) -> Result<(), HostsError> {
        let Some(marker) = Marker::of(dir)? else { return Ok(()) };
        let is_removed = |name: &Path| {
            outcome.changes.iter().any(|change| {
                change.path == *name && matches!(change.action, Action::Remove | Action::Discard | Action::RemoveDir)
            })
        };
        let listed = fs::read_dir(dir).map_err(|e| HostsError::Io(dir.to_owned(), e))?;
        let left =
            listed.flatten().filter(|entry| entry.file_name() != MARKER_FILE && !is_removed(&entry.path())).count();
        let (path, nothing) = (dir.to_owned(), String::new());
        match marker.before {
            None if left == 0 => {
                // The removal of the directory replaces the changes within it.
                outcome.changes.retain(|change| !change.path.starts_with(dir));
                outcome.add(path, Action::RemoveDir, nothing.clone(), nothing);
            }
            // Another program has added files to it.
            None => {
                let owner = FileOwner::of(&self.root).map_err(|e| HostsError::Io(self.root.clone(), e))?;
                outcome.add(path, Action::RestoreOwner(owner), nothing.clone(), nothing);
            }
            Some(owner) => outcome.add(path, Action::RestoreOwner(owner), nothing.clone(), nothing),
        }
        Ok(())
    }
}

/// The text that `install` writes for a file with this original.
fn extended(original: &str, block: &str) -> String {
    let urls = hosts_toml::hosts(block);
    let mirrors = Mirrors { hosts: urls.iter().filter_map(|url| url.parse().ok()).collect(), ca: None };
    hosts_toml::insert_block(original, block, &mirrors).unwrap_or_default()
}

impl Changes {
    fn add(&mut self, path: PathBuf, action: Action, before: String, after: String) {
        self.changes.push(Change { path, action, before, after });
    }

    fn apply(self, mode: Mode) -> Result<Self, HostsError> {
        if mode == Mode::Apply {
            for change in &self.changes {
                change.apply().map_err(|e| HostsError::Io(change.path.clone(), e))?;
            }
        }
        Ok(self)
    }
}

/// Certificates that containerd finds by their file names, with Docker's convention: `*.crt` are certificate
/// authorities, `*.cert` with `*.key` are client certificates.
fn certificates(dir: &Path) -> Result<Certificates, HostsError> {
    let listed = fs::read_dir(dir).map_err(|e| HostsError::Io(dir.to_owned(), e))?;
    let mut names: Vec<_> = listed.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let clients = names.iter().filter_map(|name| {
        let key = format!("{}.key", name.strip_suffix(".cert")?);
        Some((name.clone(), names.contains(&key).then_some(key)))
    });
    let clients = clients.collect();
    let authorities = names.iter().filter(|name| name.ends_with(".crt")).cloned().collect();
    Ok(Certificates { authorities, clients })
}

fn is_local(dir: &Path) -> bool {
    let Some(registry) = hosts_toml::registry_of(dir) else { return false };
    let host = registry.rsplit_once(':').map_or(registry.as_str(), |(host, _)| host);
    host == "localhost" || host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn read(path: &Path) -> Result<Option<String>, HostsError> {
    tree::read(path).map_err(|e| HostsError::Io(path.to_owned(), e))
}

/// The text of a file; None if it does not exist or is not text.
fn read_if_text(path: &Path) -> Result<Option<String>, HostsError> {
    match tree::read(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        read => read.map_err(|e| HostsError::Io(path.to_owned(), e)),
    }
}

#[cfg(test)]
mod tests;
