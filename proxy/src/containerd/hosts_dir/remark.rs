//! Remarks on changes that were not made.

use std::path::PathBuf;

use crate::containerd::hosts_toml::{self, UnsupportedFile};

/// A directory or file that was not changed, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remark {
    /// The directory hides `_default`, and `install` was not to extend it.
    Shadows(PathBuf),
    /// The directory is for a registry on this machine, for which containerd does not use a mirror.
    Local(PathBuf),
    Unsupported(PathBuf, UnsupportedFile),
    /// dray's block in the file was edited.
    Edited(PathBuf),
}

impl Remark {
    /// Whether the command did less than requested.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Shadows(_) | Self::Local(_) | Self::Unsupported(_, UnsupportedFile::AlreadyThere(_)) => false,
            Self::Unsupported(..) | Self::Edited(_) => true,
        }
    }
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shadows(dir) => {
                let registry = hosts_toml::registry_of(dir).unwrap_or_default();
                write!(
                    f,
                    "{} hides _default: {registry} is not pulled through dray. To change that, run install with --extend",
                    dir.display()
                )
            }
            Self::Local(dir) => write!(f, "{}: not changed: the registry is on this machine", dir.display()),
            Self::Unsupported(path, error) => write!(f, "{}: not changed: {error}", path.display()),
            Self::Edited(path) => write!(
                f,
                "{}: not changed: dray's lines in it were edited. Remove them by hand, from \"# dray> begin\" to \"# dray> end\"",
                path.display()
            ),
        }
    }
}
