//! Where a rule's credentials come from. The secrets themselves are read later, and re-read.

use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, Error};

/// `credentials = { ... }` of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A Docker `config.json`; the upstream's host selects the entry.
    DockerConfig { file: PathBuf },
    /// One user name for all upstreams of the rule.
    Static { username: String, password: PasswordSource },
}

/// Where a password stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordSource {
    File(PathBuf),
    Variable(String),
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    file: Option<PathBuf>,
    username: Option<String>,
    password_file: Option<PathBuf>,
    password_env: Option<String>,
}

impl<'de> Deserialize<'de> for Credentials {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Raw::deserialize(deserializer)?;
        match (raw.file, raw.username, raw.password_file, raw.password_env) {
            (Some(file), None, None, None) => Ok(Self::DockerConfig { file }),
            (None, Some(username), Some(path), None) => {
                Ok(Self::Static { username, password: PasswordSource::File(path) })
            }
            (None, Some(username), None, Some(name)) => {
                Ok(Self::Static { username, password: PasswordSource::Variable(name) })
            }
            _ => Err(D::Error::custom(
                "credentials take either file (a Docker config.json), or username with password_file or password_env",
            )),
        }
    }
}
