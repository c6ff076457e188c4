//! The source of a rule's credentials. The secrets themselves are read later, and again when they change.

use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, Error};

/// `credentials = { ... }` of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A Docker `config.json`; the upstream's host and the repository select the entry.
    DockerConfig { file: PathBuf },
    /// One user name for all upstreams of the rule.
    Static { username: String, password: PasswordSource },
    /// A Docker credential helper: the program `docker-credential-<name>`.
    Helper { name: String },
    /// The kubelet's plugins: a `CredentialProviderConfig`, and the directory with its programs.
    Provider { config: PathBuf, bin_dir: PathBuf },
    /// The identity of the machine or pod.
    Cloud(Cloud),
}

/// The cloud that knows the identity of the machine or pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cloud {
    /// Amazon's, for its private registries (ECR).
    #[cfg(feature = "aws")]
    Aws,
    /// Azure's, for its Container Registry.
    Azure,
    /// Google's, for its Artifact Registry and Container Registry.
    Gcp,
}

impl Cloud {
    pub fn as_str(self) -> &'static str {
        match self {
            #[cfg(feature = "aws")]
            Self::Aws => "aws",
            Self::Azure => "azure",
            Self::Gcp => "gcp",
        }
    }
}

/// The source of a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PasswordSource {
    File(PathBuf),
    Variable(String),
}

#[derive(Default, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    file: Option<PathBuf>,
    username: Option<String>,
    password_file: Option<PathBuf>,
    password_env: Option<String>,
    helper: Option<String>,
    provider: Option<PathBuf>,
    bin_dir: Option<PathBuf>,
    cloud: Option<Cloud>,
}

impl Credentials {
    /// Whether every upstream of a rule gets the same secret.
    pub fn is_one_secret(&self) -> bool {
        matches!(self, Self::Static { .. })
    }

    /// Whether two repositories of one upstream may have different credentials.
    pub fn may_differ_by_repository(&self) -> bool {
        matches!(self, Self::DockerConfig { .. } | Self::Provider { .. })
    }
}

impl<'de> Deserialize<'de> for Credentials {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut raw = Raw::deserialize(deserializer)?;
        let password = match (raw.password_file.take(), raw.password_env.take()) {
            (Some(path), None) => Some(PasswordSource::File(path)),
            (None, Some(name)) => Some(PasswordSource::Variable(name)),
            (None, None) => None,
            (Some(_), Some(_)) => return Err(D::Error::custom("password_file or password_env, not both")),
        };
        let found = if let Some(file) = raw.file.take() {
            Self::DockerConfig { file }
        } else if let Some(username) = raw.username.take() {
            let password =
                password.clone().ok_or_else(|| D::Error::custom("username needs password_file or password_env"))?;
            return only(&raw, Self::Static { username, password });
        } else if let Some(name) = raw.helper.take() {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if name.is_empty() || !name.chars().all(is_plain) {
                return Err(D::Error::custom(format!(
                    "helper \"{name}\": write what follows docker-credential- in the program's name, such as \"ecr-login\""
                )));
            }
            Self::Helper { name }
        } else if let Some(config) = raw.provider.take() {
            let bin_dir = raw.bin_dir.take().ok_or_else(|| D::Error::custom("provider needs bin_dir"))?;
            Self::Provider { config, bin_dir }
        } else if let Some(cloud) = raw.cloud.take() {
            Self::Cloud(cloud)
        } else {
            return Err(D::Error::custom(WAYS));
        };
        if password.is_some() {
            return Err(D::Error::custom("a password needs a username"));
        }
        only(&raw, found)
    }
}

const WAYS: &str = "credentials take one of: file (a Docker config.json); username with password_file or password_env; \
                    helper (a Docker credential helper); provider with bin_dir (the kubelet's plugins); cloud";

/// With several sources at once, all but one would be ignored.
fn only<E: Error>(left: &Raw, found: Credentials) -> Result<Credentials, E> {
    if *left == Raw::default() { Ok(found) } else { Err(E::custom(WAYS)) }
}
