//! Reads a rule's secrets when they are needed, so that a rotated file heals by itself.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::config::{Credentials, PasswordSource};

/// A secret for one upstream. Its debug form does not show it.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Secret {
    Password {
        username: String,
        password: String,
    },
    /// Docker's `identitytoken`: an OAuth2 refresh token.
    Identity(String),
}

/// Why credentials cannot be had. Says which source, never what it holds.
#[derive(Debug, thiserror::Error)]
pub(super) enum CredentialsError {
    #[error("credentials file {0} cannot be read: {1}")]
    File(String, std::io::Error),
    #[error("credentials file {0} is no Docker config.json: {1}")]
    Docker(String, String),
    #[error("the variable {0} with the password is not set")]
    Variable(String),
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

/// The secret for an upstream (`host` or `host:port`). None: it is asked anonymously.
pub(super) fn read(credentials: &Credentials, authority: &str) -> Result<Option<Secret>, CredentialsError> {
    match credentials {
        Credentials::Static { username, password } => {
            let password = match password {
                PasswordSource::File(path) => read_file(path)?.trim_end_matches(['\r', '\n']).to_owned(),
                PasswordSource::Variable(name) => {
                    std::env::var(name).map_err(|_| CredentialsError::Variable(name.clone()))?
                }
            };
            Ok(Some(Secret::Password { username: username.clone(), password }))
        }
        Credentials::DockerConfig { file } => {
            let text = read_file(file)?;
            let wrong = |problem: String| CredentialsError::Docker(file.display().to_string(), problem);
            let mut config: DockerConfig =
                serde_json::from_str(&text).map_err(|e| wrong(format!("line {}, column {}", e.line(), e.column())))?;
            let key = config.auths.keys().find(|key| names_upstream(key, authority)).cloned();
            match key.and_then(|key| config.auths.remove(&key).map(|entry| (key, entry))) {
                Some((key, entry)) => entry.secret().map_err(|problem| wrong(format!("auths[\"{key}\"]: {problem}"))),
                None => Ok(None),
            }
        }
    }
}

fn read_file(path: &Path) -> Result<String, CredentialsError> {
    std::fs::read_to_string(path).map_err(|e| CredentialsError::File(path.display().to_string(), e))
}

/// Keys are hosts, or URLs from the days of the v1 API; Docker Hub's is `https://index.docker.io/v1/`.
fn names_upstream(key: &str, authority: &str) -> bool {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://");
    let host = bare.split('/').next().unwrap_or_default();
    let hub = |name: &str| matches!(name, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    host.eq_ignore_ascii_case(authority) || (hub(host) && hub(authority))
}

impl DockerAuth {
    fn secret(self) -> Result<Option<Secret>, String> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Secret::Identity(self.identitytoken)));
        }
        if self.auth.is_empty() {
            let (username, password) = (self.username, self.password);
            return Ok((!username.is_empty()).then_some(Secret::Password { username, password }));
        }
        let decoded = STANDARD.decode(self.auth.trim()).map_err(|_| "auth is not base64")?;
        let text = String::from_utf8(decoded).map_err(|_| "auth is not UTF-8")?;
        let (username, password) = text.split_once(':').ok_or("auth is not base64 of user:password")?;
        Ok(Some(Secret::Password { username: username.to_owned(), password: password.to_owned() }))
    }
}

impl Secret {
    /// The value of an `Authorization: Basic` header, if there is a password.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Self::Password { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            Self::Identity(_) => None,
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn docker(json: &str, authority: &str) -> Result<Option<Secret>, CredentialsError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, json).unwrap();
        read(&Credentials::DockerConfig { file }, authority)
    }

    #[test]
    fn docker_configs_are_understood() {
        let json = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{}"}},
                "reg.corp:5000": {{"username": "u", "password": "p"}},
                "id.corp": {{"identitytoken": "t"}}}}, "credsStore": "x"}}"#,
            STANDARD.encode("me:s:ecret")
        );
        let password = |username: &str, password: &str| {
            Some(Secret::Password { username: username.into(), password: password.into() })
        };
        assert_eq!(docker(&json, "registry-1.docker.io").unwrap(), password("me", "s:ecret"));
        assert_eq!(docker(&json, "reg.corp:5000").unwrap(), password("u", "p"));
        assert_eq!(docker(&json, "id.corp").unwrap(), Some(Secret::Identity("t".into())));
        assert_eq!(docker(&json, "other.corp").unwrap(), None);
    }

    #[test]
    fn mistakes_are_named_without_the_secret() {
        for json in [r#"{"auths": {"a": {"auth": "c2VjcmV0"}}}"#, r#"{"auths": {"a": "secret"}}"#, "{"] {
            let message = docker(json, "a").unwrap_err().to_string();
            assert!(message.contains("config.json") && !message.contains("secret"), "{message}");
        }
        assert!(
            !format!("{:?}", docker(r#"{"auths": {"a": {"username": "u", "password": "secret"}}}"#, "a"))
                .contains("secret")
        );
    }

    #[test]
    fn a_password_file_may_end_in_a_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        std::fs::write(&path, "hush\n").unwrap();
        let credentials = Credentials::Static { username: "u".into(), password: PasswordSource::File(path) };
        let secret = read(&credentials, "anything").unwrap().unwrap();
        assert_eq!(secret.basic().unwrap(), format!("Basic {}", STANDARD.encode("u:hush")));
        let credentials =
            Credentials::Static { username: "u".into(), password: PasswordSource::Variable("DRAY_TEST_UNSET".into()) };
        assert!(read(&credentials, "x").unwrap_err().to_string().contains("DRAY_TEST_UNSET"));
    }
}
