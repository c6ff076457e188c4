//! Points containerd at dray: `_default/hosts.toml` in its hosts directory, and takes it back.
//!
//! containerd reads the file anew for every pull, so neither needs a restart.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use url::Url;

/// A containerd hosts directory (its `config_path`).
pub struct HostsDir {
    root: PathBuf,
}

/// What a command did or would do.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    Nothing,
    Wrote { path: PathBuf, content: String, backup: Option<PathBuf> },
    Restored(PathBuf),
    Removed(PathBuf),
}

/// Whether to touch files or only say what would be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Apply,
    DryRun,
}

#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    #[error("mirror \"{0}\": write it as http://host:port, without a path")]
    Mirror(String),
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{0} does not exist: is it containerd's config_path? Create it first, or give another --hosts-dir")]
    Missing(PathBuf),
}

/// The first line of every file that dray writes: how it knows its own.
const MARK: &str = "# Written by `dray containerd install`; `dray containerd uninstall` takes it back.";

const BACKUP: &str = "hosts.toml.before-dray";

impl HostsDir {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Writes `_default/hosts.toml`. A foreign file there is kept beside it.
    pub fn install(&self, mirror: &str, mode: Mode) -> Result<Change, HostsError> {
        if !self.root.is_dir() {
            return Err(HostsError::Missing(self.root.clone()));
        }
        let content = hosts_toml(mirror)?;
        let path = self.hosts_toml();
        let present = read(&path)?;
        if present.as_deref() == Some(content.as_bytes()) {
            return Ok(Change::Nothing);
        }
        let foreign = present.filter(|present| !is_ours(present));
        let backup = foreign.is_some().then(|| self.backup());
        if mode == Mode::Apply {
            let dir = self.default_dir();
            fs::create_dir_all(&dir).map_err(|e| HostsError::Io(dir.clone(), e))?;
            if let (Some(foreign), Some(backup)) = (foreign, &backup) {
                write_atomically(backup, &foreign)?;
            }
            write_atomically(&path, content.as_bytes())?;
        }
        Ok(Change::Wrote { path, content, backup })
    }

    /// Takes back what install wrote, and nothing else.
    pub fn uninstall(&self, mode: Mode) -> Result<Change, HostsError> {
        let (path, backup) = (self.hosts_toml(), self.backup());
        match read(&path)? {
            Some(present) if is_ours(&present) => {}
            _ => return Ok(Change::Nothing),
        }
        if backup.exists() {
            if mode == Mode::Apply {
                fs::rename(&backup, &path).map_err(|e| HostsError::Io(backup, e))?;
            }
            return Ok(Change::Restored(path));
        }
        if mode == Mode::Apply {
            fs::remove_file(&path).map_err(|e| HostsError::Io(path.clone(), e))?;
            // Only if nothing else is in it.
            let _ = fs::remove_dir(self.default_dir());
        }
        Ok(Change::Removed(path))
    }

    fn default_dir(&self) -> PathBuf {
        self.root.join("_default")
    }

    fn hosts_toml(&self) -> PathBuf {
        self.default_dir().join("hosts.toml")
    }

    fn backup(&self) -> PathBuf {
        self.default_dir().join(BACKUP)
    }
}

/// What every containerd since 1.6 understands: a `[host]` table always, `skip_verify` never (on
/// http it makes containerd try TLS first), `referrers` never (before 2.2 it voids the file).
fn hosts_toml(mirror: &str) -> Result<String, HostsError> {
    let wrong = || HostsError::Mirror(mirror.to_owned());
    let url = Url::parse(mirror).map_err(|_| wrong())?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    if !plain || url.host().is_none() {
        return Err(wrong());
    }
    let origin = url.origin().ascii_serialization();
    Ok(format!("{MARK}\n\n[host.\"{origin}\"]\n  capabilities = [\"pull\", \"resolve\"]\n  dial_timeout = \"1s\"\n"))
}

fn is_ours(content: &[u8]) -> bool {
    content.starts_with(MARK.as_bytes())
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, HostsError> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HostsError::Io(path.to_owned(), error)),
    }
}

fn write_atomically(path: &Path, content: &[u8]) -> Result<(), HostsError> {
    let temporary = path.with_extension("dray-new");
    let write = || {
        fs::write(&temporary, content)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o644))?;
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        HostsError::Io(path.to_owned(), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIRROR: &str = "http://127.0.0.1:5050";

    fn content(dir: &Path) -> Option<String> {
        fs::read_to_string(dir.join("_default/hosts.toml")).ok()
    }

    #[test]
    fn installs_once_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = HostsDir::new(dir.path());
        assert!(matches!(hosts.install(MIRROR, Mode::DryRun), Ok(Change::Wrote { .. })));
        assert_eq!(content(dir.path()), None);
        assert!(matches!(hosts.install(MIRROR, Mode::Apply), Ok(Change::Wrote { backup: None, .. })));
        assert!(content(dir.path()).unwrap().contains("[host.\"http://127.0.0.1:5050\"]"));
        assert!(matches!(hosts.install(MIRROR, Mode::Apply), Ok(Change::Nothing)));
        assert!(matches!(hosts.uninstall(Mode::Apply), Ok(Change::Removed(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(matches!(hosts.uninstall(Mode::Apply), Ok(Change::Nothing)));
    }

    #[test]
    fn a_foreign_file_comes_back_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = "# mine\r\nserver = \"https://x\"\n\n";
        fs::create_dir(dir.path().join("_default")).unwrap();
        fs::write(dir.path().join("_default/hosts.toml"), foreign).unwrap();
        let hosts = HostsDir::new(dir.path());
        assert!(matches!(hosts.uninstall(Mode::Apply), Ok(Change::Nothing)));
        hosts.install(MIRROR, Mode::Apply).unwrap();
        hosts.install("http://127.0.0.1:6060", Mode::Apply).unwrap();
        assert!(matches!(hosts.uninstall(Mode::Apply), Ok(Change::Restored(_))));
        assert_eq!(content(dir.path()).as_deref(), Some(foreign));
    }

    #[test]
    fn mistakes_are_explained() {
        let dir = tempfile::tempdir().unwrap();
        for mirror in ["127.0.0.1:5050", "http://h/v2/docker.io", "ftp://h", "http://u:p@h"] {
            let error = HostsDir::new(dir.path()).install(mirror, Mode::Apply).unwrap_err().to_string();
            assert!(error.contains("http://host:port"), "{error}");
        }
        let error = HostsDir::new("/nowhere").install(MIRROR, Mode::Apply).unwrap_err().to_string();
        assert!(error.contains("config_path"), "{error}");
    }
}
