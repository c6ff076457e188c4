//! Sets `config_path` in somebody's config.toml, and puts the file back; comments and order stay.

use std::io;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, Table, TomlError, Value};

use super::hosts_dir::Mode;
use super::tree;

/// A config.toml.
pub struct ConfigFile {
    path: PathBuf,
}

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Patched {
    Nothing,
    /// Its text before and after.
    Changed {
        before: String,
        after: String,
    },
    /// It was edited since, and stays as it is.
    Edited,
}

/// Kept where there was no file.
const NONE: &str = "# There was no file before `dray containerd install --patch-config`.\n";

#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{0}: not valid TOML: {1}")]
    NotToml(PathBuf, TomlError),
    #[error("{0}: \"{1}\" is no table, so nothing can be set in it")]
    NoTable(PathBuf, String),
}

impl ConfigFile {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Sets the directory in a plugin's section. A new file gets `version` as well.
    pub fn set(&self, section: &str, version: i64, dir: &str) -> Result<Patched, PatchError> {
        let before = self.read(&self.path)?;
        let text = before.clone().unwrap_or_default();
        let after = self.with_path(&text, section, version, dir)?;
        if before.as_deref() == Some(&after) {
            return Ok(Patched::Nothing);
        }
        let is_ours = match self.read(&self.kept())? {
            Some(kept) => self.is_patched(&kept, &text, section, version)?,
            None => false,
        };
        let written = match before {
            // For another directory: what was there before dray stays kept.
            Some(_) if is_ours => tree::write(&self.path, &after),
            Some(_) => tree::exchange(&self.path, &self.kept(), &after),
            None => tree::write(&self.kept(), NONE).and_then(|()| tree::write(&self.path, &after)),
        };
        written.map_err(|e| PatchError::Io(self.path.clone(), e))?;
        Ok(Patched::Changed { before: text, after })
    }

    /// What `set` would do.
    pub fn plan(&self, section: &str, version: i64, dir: &str) -> Result<Patched, PatchError> {
        let before = self.read(&self.path)?.unwrap_or_default();
        let after = self.with_path(&before, section, version, dir)?;
        Ok(if before == after { Patched::Nothing } else { Patched::Changed { before, after } })
    }

    /// Puts the file back that `set` has kept, unless it was edited since.
    pub fn restore(&self, section: &str, version: i64, dir: &str, mode: Mode) -> Result<Patched, PatchError> {
        let Some(kept) = self.read(&self.kept())? else { return Ok(Patched::Nothing) };
        let present = self.read(&self.path)?.unwrap_or_default();
        if kept != NONE
            && kept != present
            && self.with_path(&present, section, version, dir)? == kept
            && !self.is_patched(&kept, &present, section, version)?
        {
            // Killed before the two were exchanged: what is kept is what should have taken the file's place.
            if mode == Mode::Apply {
                tree::remove(&self.kept()).map_err(|e| PatchError::Io(self.kept(), e))?;
            }
            return Ok(Patched::Nothing);
        }
        if self.with_path(original(&kept), section, version, dir)? != present {
            return Ok(Patched::Edited);
        }
        let restored = match (mode, &*kept) {
            (Mode::DryRun, _) => Ok(()),
            (Mode::Apply, NONE) => tree::remove(&self.path).and_then(|()| tree::remove(&self.kept())),
            (Mode::Apply, _) => tree::restore(&self.path, &self.kept()),
        };
        restored.map_err(|e| PatchError::Io(self.path.clone(), e))?;
        Ok(Patched::Changed { before: present, after: original(&kept).to_owned() })
    }

    /// Whether a text is what `set` has made of the file that it kept.
    fn is_patched(&self, kept: &str, text: &str, section: &str, version: i64) -> Result<bool, PatchError> {
        let document: DocumentMut = text.parse().map_err(|error| PatchError::NotToml(self.path.clone(), error))?;
        let mut at = ["plugins", section, "registry", "config_path"].into_iter();
        let path = at.try_fold(document.as_item(), |at, name| at.get(name)).and_then(Item::as_str);
        path.map_or(Ok(false), |dir| Ok(self.with_path(original(kept), section, version, dir)? == text))
    }

    /// Where the file is while another one stands in its place.
    pub fn kept(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".before-dray");
        self.path.with_file_name(name)
    }

    fn with_path(&self, text: &str, section: &str, version: i64, dir: &str) -> Result<String, PatchError> {
        let mut document: DocumentMut = text.parse().map_err(|error| PatchError::NotToml(self.path.clone(), error))?;
        if document.is_empty() {
            document["version"] = toml_edit::value(version);
        }
        let no_table = |name: &str| PatchError::NoTable(self.path.clone(), name.to_owned());
        let mut at = document.as_table_mut() as &mut dyn toml_edit::TableLike;
        for name in ["plugins", section, "registry"] {
            let mut made = Table::new();
            // Only the innermost needs a header of its own.
            made.set_implicit(true);
            at = at.entry(name).or_insert(Item::Table(made)).as_table_like_mut().ok_or_else(|| no_table(name))?;
        }
        match at.get_mut("config_path").and_then(Item::as_value_mut) {
            Some(present) => {
                let mut value = Value::from(dir);
                *value.decor_mut() = present.decor().clone();
                *present = value;
            }
            None => drop(at.insert("config_path", toml_edit::value(dir))),
        }
        Ok(document.to_string())
    }

    fn read(&self, path: &Path) -> Result<Option<String>, PatchError> {
        tree::read(path).map_err(|e| PatchError::Io(path.to_owned(), e))
    }
}

/// What there was before, by what was kept of it.
fn original(kept: &str) -> &str {
    if kept == NONE { "" } else { kept }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CRI: &str = "io.containerd.cri.v1.images";

    #[test]
    fn everything_else_stays_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        for (text, want) in [
            ("", "version = 3\n\n[plugins.\"io.containerd.cri.v1.images\".registry]\nconfig_path = \"/certs\"\n"),
            (
                "# head\nversion = 3\n\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '/a:/b' # two\n",
                "# head\nversion = 3\n\n[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = \"/certs\" # two\n",
            ),
            (
                "version = 3\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'x' # keep\n[debug]\n",
                "version = 3\n[plugins]\n  [plugins.'io.containerd.cri.v1.images']\n    snapshotter = 'x' # keep\n\n\
                 [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"\n[debug]\n",
            ),
        ] {
            fs::write(&file.path, text).unwrap();
            assert!(matches!(file.plan(CRI, 3, "/certs"), Ok(Patched::Changed { .. })));
            assert_eq!(fs::read_to_string(&file.path).unwrap(), text);
            file.set(CRI, 3, "/certs").unwrap();
            assert_eq!(fs::read_to_string(&file.path).unwrap(), want);
            assert_eq!(file.set(CRI, 3, "/certs").unwrap(), Patched::Nothing);
            // Another directory, and back: what was there before is still known.
            file.set(CRI, 3, "/others").unwrap();
            file.set(CRI, 3, "/certs").unwrap();
            assert!(matches!(file.restore(CRI, 3, "/certs", Mode::DryRun), Ok(Patched::Changed { .. })));
            assert!(matches!(file.restore(CRI, 3, "/certs", Mode::Apply), Ok(Patched::Changed { .. })));
            assert_eq!(fs::read_to_string(&file.path).unwrap(), text);
            assert!(!file.kept().exists());
        }
    }

    #[test]
    fn a_file_that_was_not_there_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        file.set(CRI, 3, "/certs").unwrap();
        assert!(fs::read_to_string(&file.path).unwrap().starts_with("version = 3\n"));
        file.restore(CRI, 3, "/certs", Mode::Apply).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn kill_before_the_exchange_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        fs::write(&file.path, "version = 3\n").unwrap();
        let Patched::Changed { after, .. } = file.plan(CRI, 3, "/certs").unwrap() else { panic!("nothing to do") };
        fs::write(file.kept(), after).unwrap();
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::DryRun).unwrap(), Patched::Nothing);
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::Apply).unwrap(), Patched::Nothing);
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "version = 3\n");
        assert!(!file.kept().exists());
        // What looks the same is not: a file that named another directory, which uninstall is told instead of the new one.
        fs::write(&file.path, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a\"\n")
            .unwrap();
        file.set(CRI, 3, "/b").unwrap();
        assert_eq!(file.restore(CRI, 3, "/a", Mode::Apply).unwrap(), Patched::Edited);
        assert!(file.kept().exists());
    }

    #[test]
    fn what_was_edited_since_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        fs::write(&file.path, "version = 3\n").unwrap();
        file.set(CRI, 3, "/certs").unwrap();
        fs::write(&file.path, "version = 3\n# mine\n").unwrap();
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::Apply).unwrap(), Patched::Edited);
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "version = 3\n# mine\n");
        fs::write(&file.path, "plugins = 1").unwrap();
        assert!(file.set(CRI, 3, "/certs").unwrap_err().to_string().contains("\"plugins\" is no table"));
        fs::write(&file.path, "plugins = ").unwrap();
        assert!(file.set(CRI, 3, "/certs").unwrap_err().to_string().contains("config.toml"));
    }
}
