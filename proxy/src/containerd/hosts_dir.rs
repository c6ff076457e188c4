//! A containerd hosts directory (its `config_path`): dray's lines go into its files and out again.
//!
//! containerd reads the files anew for every pull, so neither needs a restart. For a registry it takes the first
//! of the directories `host_port_`, `host:port` and `_default` that exists, and no other: a directory for one
//! registry hides `_default` from it.

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
use self::marker::MARKER;
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

/// Which registries are sent to the mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirroredRegistries {
    /// All that have no directory of their own.
    Default,
    /// All: also those that have a directory of their own.
    Every,
    /// These.
    Named(Vec<String>),
}

/// Whether to touch files or only say what would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    DryRun,
}

/// What a command did or would do.
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
        "{0} does not exist: is it containerd's config_path? `dray containerd check` tells; or create it first, or give another --hosts-dir"
    )]
    Missing(PathBuf),
    #[error(
        "{0} belongs to {uid}:{gid} with mode {mode:04o}: {to}, as which dray runs, does not get to its own directory there. Let others in (chmod o+rx)", uid = .1.uid, gid = .1.gid, mode = .1.mode, to = .2.0
    )]
    Closed(PathBuf, FileOwner, (u32, u32)),
    #[error("{0} is a registry on this machine: containerd asks it itself, and no mirror reaches it")]
    Local(String),
    #[error("\"{0}\" is no registry host such as docker.io or registry.corp:5000")]
    Registry(String),
}

const SHORT: Duration = Duration::from_millis(500);

const HOSTS: &str = "hosts.toml";
const KEPT: &str = "hosts.toml.before-dray";
const DEFAULT: &str = "_default";

impl HostsDir {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// What lets a user write here who may not.
    pub fn remedy(&self, error: &HostsError, (uid, gid): (u32, u32)) -> Option<String> {
        let HostsError::Io(_, error) = error else { return None };
        let is_closed = error.kind() == io::ErrorKind::PermissionDenied && uid != 0;
        is_closed.then(|| format!("once: sudo dray hand-over --to {uid}:{gid} --hosts-dir {}", self.root.display()))
    }

    /// Sends containerd to the mirrors first. What is there stays there, after them.
    pub fn install(
        &self,
        mirrors: &Mirrors,
        registries: &MirroredRegistries,
        mode: Mode,
    ) -> Result<Changes, HostsError> {
        let _lock = self.lock(mode)?;
        let mut outcome = Changes::default();
        for dir in self.wanted(registries)? {
            self.install_in(&dir, mirrors, &mut outcome)?;
        }
        if *registries == MirroredRegistries::Default {
            for dir in self.others()? {
                let text = match read(&dir.join(HOSTS)) {
                    // Others' secrets may stand in it: whoever may not read it can say that much.
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
        outcome.carry_out(mode)
    }

    /// Takes back what install wrote, and nothing else.
    pub fn uninstall(&self, mode: Mode) -> Result<Changes, HostsError> {
        if !self.root.is_dir() {
            return Ok(Changes::default());
        }
        let _lock = self.lock(mode)?;
        let mut outcome = Changes::default();
        for dir in self.directories()? {
            self.uninstall_in(&dir, &mut outcome)?;
            self.give_back(&dir, &mut outcome)?;
        }
        if let Some(before) = Marker::of(&self.root)?.and_then(|marker| marker.before) {
            outcome.add(self.root.clone(), Action::Close(before), String::new(), String::new());
        }
        outcome.carry_out(mode)
    }

    /// Takes back the lines for all registries, for as long as the mirror is not there. A directory that was
    /// handed over stays as it is.
    pub fn withdraw(&self) -> Result<Changes, HostsError> {
        let dir = self.root.join(DEFAULT);
        if !dir.is_dir() {
            return Ok(Changes::default());
        }
        // Whoever holds the lock, or has closed the hosts directory since: nobody may be left with a dead mirror.
        let is_in_the_way =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied);
        let _lock = match self.lock_within(Mode::Apply, SHORT) {
            Err(HostsError::Io(_, error)) if is_in_the_way(&error) => None,
            lock => Some(lock?),
        };
        let mut outcome = Changes::default();
        self.uninstall_in(&dir, &mut outcome)?;
        if Marker::of(&dir)?.is_some_and(|marker| !marker.handed_over) {
            self.give_back(&dir, &mut outcome)?;
        }
        outcome.carry_out(Mode::Apply)
    }

    /// Gives `_default` to the user that dray runs as, who then needs no other right than to get there.
    pub fn hand_over(&self, to: (u32, u32), mode: Mode) -> Result<Changes, HostsError> {
        let _lock = self.lock(mode)?;
        let path = self.root.join(DEFAULT);
        let known = if path.is_dir() { Marker::of(&path)? } else { None };
        let root = FileOwner::of(&self.root).map_err(|e| HostsError::Io(self.root.clone(), e))?;
        // What an earlier one was let into was closed before that.
        let before = Marker::of(&self.root)?.and_then(|marker| marker.before).unwrap_or(root);
        let mut outcome = Changes::default();
        let is_done = known.is_some_and(|known| known.handed_over)
            && FileOwner::of(&path).is_ok_and(|owner| (owner.uid, owner.gid) == to);
        if !is_done {
            outcome.add(path, Action::HandOver { to, known }, String::new(), String::new());
        }
        if !root.lets_in(to) {
            if before.mode & 0o070 != 0 && before.gid != 0 {
                return Err(HostsError::Closed(self.root.clone(), before, to));
            }
            outcome.add(self.root.clone(), Action::LetIn { gid: to.1, before }, String::new(), String::new());
        }
        outcome.carry_out(mode)
    }

    /// Everything in it that containerd may take for a registry's directory.
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

    /// Those that hide `_default`.
    pub fn others(&self) -> Result<Vec<PathBuf>, HostsError> {
        Ok(self.directories()?.into_iter().filter(|dir| hosts_toml::registry_of(dir).is_some()).collect())
    }

    pub fn default_file(&self) -> PathBuf {
        self.root.join(DEFAULT).join(HOSTS)
    }

    fn lock(&self, mode: Mode) -> Result<Lock, HostsError> {
        self.lock_within(mode, SERVICE_TIMEOUT)
    }

    fn lock_within(&self, mode: Mode, patience: Duration) -> Result<Lock, HostsError> {
        if !self.root.is_dir() {
            return Err(HostsError::Missing(self.root.clone()));
        }
        let lock = Lock::of(&self.root, patience).map_err(|e| HostsError::Io(self.root.clone(), e))?;
        if mode == Mode::Apply {
            for dir in self.directories()?.iter().chain([&self.root]) {
                match tree::sweep(dir) {
                    // What is nobody's business here holds nothing of dray's either.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    swept => swept.map_err(|e| HostsError::Io(dir.clone(), e))?,
                }
            }
        }
        Ok(lock)
    }

    fn wanted(&self, registries: &MirroredRegistries) -> Result<Vec<PathBuf>, HostsError> {
        let default = self.root.join(DEFAULT);
        match registries {
            MirroredRegistries::Default => Ok(vec![default]),
            MirroredRegistries::Every => Ok([default].into_iter().chain(self.others()?).collect()),
            MirroredRegistries::Named(names) => {
                // Docker Hub may be named twice.
                let dirs: Result<BTreeSet<_>, _> = names.iter().map(|name| self.dir_of(name)).collect();
                Ok(dirs?.into_iter().collect())
            }
        }
    }

    /// Where containerd looks for a registry: there already, or where it would be.
    fn dir_of(&self, registry: &str) -> Result<PathBuf, HostsError> {
        // By the name that containerd looks for: Docker Hub has several.
        let parsed = registry.parse::<Registry>().map_err(|_| HostsError::Registry(registry.to_owned()))?;
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

    fn install_in(&self, dir: &Path, mirrors: &Mirrors, outcome: &mut Changes) -> Result<(), HostsError> {
        if dir.is_symlink() && !dir.exists() {
            let why = io::Error::new(io::ErrorKind::NotFound, "a symbolic link that leads nowhere: remove it");
            return Err(HostsError::Io(dir.to_owned(), why));
        }
        if !dir.exists() {
            let block = mirrors.block(None, &Certificates::default());
            outcome.add(dir.to_owned(), Action::MakeDir, String::new(), block);
            return Ok(());
        }
        if is_local(dir) {
            outcome.remarks.push(Remark::Local(dir.to_owned()));
            return Ok(());
        }
        let (path, kept) = (dir.join(HOSTS), dir.join(KEPT));
        let present = read(&path)?;
        let earlier = present.as_deref().and_then(hosts_toml::without);
        if earlier.as_ref().is_some_and(|earlier| earlier.state == EditState::Edited) {
            outcome.remarks.push(Remark::Edited(path));
            return Ok(());
        }
        let base = earlier.as_ref().map_or_else(|| present.clone().unwrap_or_default(), |earlier| earlier.rest.clone());
        // Beside a file that says something containerd looks for no certificates.
        let certificates = if base.is_empty() { certificates(dir)? } else { Certificates::default() };
        let block = mirrors.block(hosts_toml::registry_of(dir).as_deref(), &certificates);
        let wanted = match hosts_toml::with(&base, &block, mirrors) {
            Ok(wanted) => wanted,
            Err(unfit) => {
                outcome.remarks.push(Remark::Unfit(path, unfit));
                return Ok(());
            }
        };
        match present {
            Some(present) if present == wanted => {}
            // Somebody's own, even an empty one.
            Some(present) if earlier.is_none() => outcome.add(path, Action::Extend { kept }, present, wanted),
            present => outcome.add(path, Action::Write, present.unwrap_or_default(), wanted),
        }
        Ok(())
    }

    fn uninstall_in(&self, dir: &Path, outcome: &mut Changes) -> Result<(), HostsError> {
        let (path, kept) = (dir.join(HOSTS), dir.join(KEPT));
        // dray wrote text: what is none is somebody else's.
        let (was, present) = (readable(&kept)?, readable(&path)?);
        let Some(present) = present else { return Ok(()) };
        let Some(earlier) = hosts_toml::without(&present) else {
            // Prepared to be exchanged with a file that never was.
            if was.is_some_and(|was| hosts_toml::without(&was).is_some()) {
                outcome.add(kept, Action::Discard, String::new(), String::new());
            }
            return Ok(());
        };
        if earlier.state == EditState::Edited {
            outcome.remarks.push(Remark::Edited(path));
            return Ok(());
        }
        match was {
            Some(was) if present == extended(&was, &earlier.block) => {
                outcome.add(path, Action::Restore { kept }, present, was);
            }
            None if earlier.rest.trim().is_empty() => outcome.add(path, Action::Remove, present, String::new()),
            was => {
                let kept = was.map(|_| kept);
                outcome.add(path, Action::TakeOut { kept }, present, earlier.rest);
            }
        }
        Ok(())
    }

    /// A directory that dray made goes if nothing else is in it, one that it was handed goes back.
    fn give_back(&self, dir: &Path, outcome: &mut Changes) -> Result<(), HostsError> {
        let Some(marker) = Marker::of(dir)? else { return Ok(()) };
        let going = |name: &Path| {
            outcome.changes.iter().any(|change| {
                change.path == *name && matches!(change.action, Action::Remove | Action::Discard | Action::RemoveDir)
            })
        };
        let listed = fs::read_dir(dir).map_err(|e| HostsError::Io(dir.to_owned(), e))?;
        let left = listed.flatten().filter(|entry| entry.file_name() != MARKER && !going(&entry.path())).count();
        let (path, nothing) = (dir.to_owned(), String::new());
        match marker.before {
            None if left == 0 => {
                // Nothing of it is needed one by one.
                outcome.changes.retain(|change| !change.path.starts_with(dir));
                outcome.add(path, Action::RemoveDir, nothing.clone(), nothing);
            }
            // Somebody has put something there since.
            None => {
                let owner = FileOwner::of(&self.root).map_err(|e| HostsError::Io(self.root.clone(), e))?;
                outcome.add(path, Action::GiveBack(owner), nothing.clone(), nothing);
            }
            Some(owner) => outcome.add(path, Action::GiveBack(owner), nothing.clone(), nothing),
        }
        Ok(())
    }
}

/// The text that install made of a file that was there.
fn extended(was: &str, block: &str) -> String {
    let urls = hosts_toml::hosts(block);
    let mirrors = Mirrors { hosts: urls.iter().filter_map(|url| url.parse().ok()).collect(), ca: None };
    hosts_toml::with(was, block, &mirrors).unwrap_or_default()
}

impl Changes {
    fn add(&mut self, path: PathBuf, action: Action, before: String, after: String) {
        self.changes.push(Change { path, action, before, after });
    }

    fn carry_out(self, mode: Mode) -> Result<Self, HostsError> {
        if mode == Mode::Apply {
            for change in &self.changes {
                change.carry_out().map_err(|e| HostsError::Io(change.path.clone(), e))?;
            }
        }
        Ok(self)
    }
}

/// Certificates that containerd finds by their names, as Docker has it: `*.crt` are authorities, `*.cert` with
/// `*.key` are the client's.
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

/// A file's text, if it has any.
fn readable(path: &Path) -> Result<Option<String>, HostsError> {
    match tree::read(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        read => read.map_err(|e| HostsError::Io(path.to_owned(), e)),
    }
}

#[cfg(test)]
mod tests;
