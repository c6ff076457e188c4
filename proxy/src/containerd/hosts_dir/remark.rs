//! What a person ought to know of what was not done.

use std::path::PathBuf;

use crate::containerd::hosts_toml::{self, UnsupportedFile};

/// What a person ought to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remark {
    /// It hides `_default`, and was not to be extended.
    Shadows(PathBuf),
    /// It is of a registry on this machine, which no mirror reaches.
    Local(PathBuf),
    Unfit(PathBuf, UnsupportedFile),
    /// dray's lines in it were edited by hand, and stay.
    Edited(PathBuf),
}

impl Remark {
    /// Whether something was not done that was asked for.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Shadows(_) | Self::Local(_) | Self::Unfit(_, UnsupportedFile::AlreadyThere(_)) => false,
            Self::Unfit(..) | Self::Edited(_) => true,
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
                    "{} hides _default: {registry} is not pulled through dray. With --extend dray comes first there as well",
                    dir.display()
                )
            }
            Self::Local(dir) => write!(f, "{}: left alone, a registry on this machine", dir.display()),
            Self::Unfit(path, unfit) => write!(f, "{}: left alone: {unfit}", path.display()),
            Self::Edited(path) => write!(
                f,
                "{}: left alone: dray's lines in it were edited by hand. Take them out yourself, from \"# dray> begin\" to \"# dray> end\"",
                path.display()
            ),
        }
    }
}
