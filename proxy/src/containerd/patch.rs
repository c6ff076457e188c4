//! Sets `config_path` in an existing config.toml, and restores the file. Comments and order are preserved.
//!
//! | file | backup (`.before-dray`) | meaning |
//! |---|---|---|
//! | any | none | not patched |
//! | patched | the original | patched; `restore` renames the backup over the file |
//! | patched | `NO_FILE` | patched; there was no file, so `restore` removes both |
//! | the original | patched | `set` was killed before it exchanged the two; `restore` removes the backup |
//! | other | the original or `NO_FILE` | edited after `set`, or set to another directory; `restore` changes nothing |

use std::io;
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, Table, TomlError, Value};

use super::hosts_dir::Mode;
use super::tree;

/// A config.toml.
pub struct ConfigFile {
    path: PathBuf,
}

/// The result of a change.
#[derive(Debug, PartialEq, Eq)]
pub enum Patched {
    Nothing,
    /// The text before and after.
    Changed {
        before: String,
        after: String,
    },
    /// Not changed, because it was edited after `set`.
    Edited,
}

/// The backup if there was no file before.
const NO_FILE: &str = "# There was no file before `dray containerd install --patch-config`.\n";

#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{0}: not valid TOML: {1}")]
    NotToml(PathBuf, TomlError),
    #[error("{0}: \"{1}\" is not a table, so config_path cannot be set in it")]
    NotATable(PathBuf, String),
}

impl ConfigFile {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Sets `config_path` in a plugin section. A new file also gets `version`.
    pub fn set(&self, section: &str, version: i64, dir: &str) -> Result<Patched, PatchError> {
        let before = self.read(&self.path)?;
        let text = before.clone().unwrap_or_default();
        let after = self.with_path(&text, section, version, dir)?;
        if before.as_deref() == Some(&after) {
            return Ok(Patched::Nothing);
        }
        let is_patched = match self.read(&self.backup_path())? {
            Some(backup) => self.is_patched(&backup, &text, section, version)?,
            None => false,
        };
        let written = match before {
            // Patched before with another directory: the backup already has the original.
            Some(_) if is_patched => tree::write(&self.path, &after),
            Some(_) => tree::exchange(&self.path, &self.backup_path(), &after),
            None => tree::write(&self.backup_path(), NO_FILE).and_then(|()| tree::write(&self.path, &after)),
        };
        written.map_err(|e| PatchError::Io(self.path.clone(), e))?;
        Ok(Patched::Changed { before: text, after })
    }

    /// The change that `set` would make.
    pub fn plan(&self, section: &str, version: i64, dir: &str) -> Result<Patched, PatchError> {
        let before = self.read(&self.path)?.unwrap_or_default();
        let after = self.with_path(&before, section, version, dir)?;
        Ok(if before == after { Patched::Nothing } else { Patched::Changed { before, after } })
    }

    /// Restores the backup that `set` made, unless the file was edited after it.
    pub fn restore(&self, section: &str, version: i64, dir: &str, mode: Mode) -> Result<Patched, PatchError> {
        let Some(backup) = self.read(&self.backup_path())? else { return Ok(Patched::Nothing) };
        let present = self.read(&self.path)?.unwrap_or_default();
        if backup != NO_FILE
            && backup != present
            && self.with_path(&present, section, version, dir)? == backup
            && !self.is_patched(&backup, &present, section, version)?
        {
            // `set` was killed before the exchange: the backup has the patched text, and the file is the original.
            if mode == Mode::Apply {
                tree::remove(&self.backup_path()).map_err(|e| PatchError::Io(self.backup_path(), e))?;
            }
            return Ok(Patched::Nothing);
        }
        if self.with_path(original(&backup), section, version, dir)? != present {
            return Ok(Patched::Edited);
        }
        let restored = match (mode, &*backup) {
            (Mode::DryRun, _) => Ok(()),
            (Mode::Apply, NO_FILE) => tree::remove(&self.path).and_then(|()| tree::remove(&self.backup_path())),
            (Mode::Apply, _) => tree::restore(&self.path, &self.backup_path()),
        };
        restored.map_err(|e| PatchError::Io(self.path.clone(), e))?;
        Ok(Patched::Changed { before: present, after: original(&backup).to_owned() })
    }

    /// Whether `set` made this text from the original of this backup.
    fn is_patched(&self, backup: &str, text: &str, section: &str, version: i64) -> Result<bool, PatchError> {
        let document: DocumentMut = text.parse().map_err(|error| PatchError::NotToml(self.path.clone(), error))?;
        let mut at = ["plugins", section, "registry", "config_path"].into_iter();
        let path = at.try_fold(document.as_item(), |at, name| at.get(name)).and_then(Item::as_str);
        path.map_or(Ok(false), |dir| Ok(self.with_path(original(backup), section, version, dir)? == text))
    }

    /// The path of the original while the file is patched.
    pub fn backup_path(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".before-dray");
        self.path.with_file_name(name)
    }

    fn with_path(&self, text: &str, section: &str, version: i64, dir: &str) -> Result<String, PatchError> {
        let mut document: DocumentMut = text.parse().map_err(|error| PatchError::NotToml(self.path.clone(), error))?;
        if document.is_empty() {
            document["version"] = toml_edit::value(version);
        }
        let not_a_table = |name: &str| PatchError::NotATable(self.path.clone(), name.to_owned());
        let mut at = document.as_table_mut() as &mut dyn toml_edit::TableLike;
        for name in ["plugins", section, "registry"] {
            let mut table = Table::new();
            // Implicit: only the innermost table needs a header.
            table.set_implicit(true);
            at = at.entry(name).or_insert(Item::Table(table)).as_table_like_mut().ok_or_else(|| not_a_table(name))?;
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

/// The original text, which is empty if there was no file.
fn original(backup: &str) -> &str {
    if backup == NO_FILE { "" } else { backup }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CRI: &str = "io.containerd.cri.v1.images";

    #[test]
    fn set_keeps_other_settings_and_restore_reverts_it() {
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
            // Set to another directory and back: the backup still has the original.
            file.set(CRI, 3, "/others").unwrap();
            file.set(CRI, 3, "/certs").unwrap();
            assert!(matches!(file.restore(CRI, 3, "/certs", Mode::DryRun), Ok(Patched::Changed { .. })));
            assert!(matches!(file.restore(CRI, 3, "/certs", Mode::Apply), Ok(Patched::Changed { .. })));
            assert_eq!(fs::read_to_string(&file.path).unwrap(), text);
            assert!(!file.backup_path().exists());
        }
    }

    #[test]
    fn new_file_is_removed_by_restore() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        file.set(CRI, 3, "/certs").unwrap();
        assert!(fs::read_to_string(&file.path).unwrap().starts_with("version = 3\n"));
        file.restore(CRI, 3, "/certs", Mode::Apply).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn set_killed_before_exchange_is_cleaned_up() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        fs::write(&file.path, "version = 3\n").unwrap();
        let Patched::Changed { after, .. } = file.plan(CRI, 3, "/certs").unwrap() else { panic!("nothing to do") };
        fs::write(file.backup_path(), after).unwrap();
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::DryRun).unwrap(), Patched::Nothing);
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::Apply).unwrap(), Patched::Nothing);
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "version = 3\n");
        assert!(!file.backup_path().exists());
        // Looks the same, but was not killed: the file had another directory before, and restore is called with that
        // directory.
        fs::write(&file.path, "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a\"\n")
            .unwrap();
        file.set(CRI, 3, "/b").unwrap();
        assert_eq!(file.restore(CRI, 3, "/a", Mode::Apply).unwrap(), Patched::Edited);
        assert!(file.backup_path().exists());
    }

    #[test]
    fn edited_file_is_not_restored() {
        let dir = tempfile::tempdir().unwrap();
        let file = ConfigFile::new(dir.path().join("config.toml"));
        fs::write(&file.path, "version = 3\n").unwrap();
        file.set(CRI, 3, "/certs").unwrap();
        fs::write(&file.path, "version = 3\n# mine\n").unwrap();
        assert_eq!(file.restore(CRI, 3, "/certs", Mode::Apply).unwrap(), Patched::Edited);
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "version = 3\n# mine\n");
        fs::write(&file.path, "plugins = 1").unwrap();
        assert!(file.set(CRI, 3, "/certs").unwrap_err().to_string().contains("\"plugins\" is not a table"));
        fs::write(&file.path, "plugins = ").unwrap();
        assert!(file.set(CRI, 3, "/certs").unwrap_err().to_string().contains("config.toml"));
    }
}
