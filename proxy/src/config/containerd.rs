//! `[containerd]`: the runtime on this machine whose mirror this process is while it is ready.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use url::Url;

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContainerdConfig {
    /// containerd's `config_path`, in which dray writes `_default/hosts.toml`. None: dray leaves containerd alone.
    pub hosts_dir: Option<PathBuf>,
    /// The address at which containerd reaches this process. None: that of `listen`.
    pub mirror: Option<Mirror>,
    /// containerd's configuration: only read, to log what is wrong with it. None: it is not checked.
    pub config_file: Option<PathBuf>,
}

/// The URL of a mirror: `http://host:port` or `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Mirror(String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("mirror \"{0}\": write it as http://host:port, without a path")]
pub struct WrongMirror(String);

impl ContainerdConfig {
    /// A key that has no effect without a hosts directory.
    pub(super) fn is_useless(&self) -> Option<&'static str> {
        match (&self.hosts_dir, &self.mirror, &self.config_file) {
            (None, Some(_), _) => Some("containerd.mirror"),
            (None, None, Some(_)) => Some("containerd.config_file"),
            _ => None,
        }
    }
}

impl Mirror {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Without the scheme.
    pub fn host(&self) -> &str {
        self.0.split_once("://").map_or(&*self.0, |(_, host)| host)
    }

    pub fn is_plain(&self) -> bool {
        self.0.starts_with("http://")
    }
}

impl FromStr for Mirror {
    type Err = WrongMirror;

    fn from_str(text: &str) -> Result<Self, WrongMirror> {
        let wrong = || WrongMirror(text.to_owned());
        let url = Url::parse(text).map_err(|_| wrong())?;
        let plain = matches!(url.scheme(), "http" | "https")
            && url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        if !plain || url.host().is_none() {
            return Err(wrong());
        }
        Ok(Self(url.origin().ascii_serialization()))
    }
}

impl TryFrom<String> for Mirror {
    type Error = WrongMirror;

    fn try_from(text: String) -> Result<Self, WrongMirror> {
        text.parse()
    }
}

impl std::fmt::Display for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_in_a_mirror_are_explained() {
        for mirror in ["127.0.0.1:5050", "http://h/v2/docker.io", "ftp://h", "http://u:p@h", "", "http://h?x=1"] {
            let error = mirror.parse::<Mirror>().unwrap_err().to_string();
            assert!(error.contains("http://host:port"), "{error}");
        }
        let mirror: Mirror = "http://127.0.0.1:5050/".parse().unwrap();
        assert_eq!(
            (mirror.as_str(), mirror.host(), mirror.is_plain()),
            ("http://127.0.0.1:5050", "127.0.0.1:5050", true)
        );
    }
}
