//! Docker's `config.json`, also as a Secret of the type `kubernetes.io/dockerconfigjson` holds it.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{CredentialsError, best_key, read_file};
use crate::secret::Secret;

/// What a file says of an upstream.
pub(super) enum Entry {
    /// None: nothing.
    Secret(Option<Secret>),
    /// A credential helper knows.
    Helper(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    #[serde(default)]
    creds_store: String,
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

/// The entry that says most of a repository at an upstream. A helper comes before what stands in the file, as for
/// Docker itself; the store of all others after it.
pub(super) fn find(file: &Path, authority: &str, repository: &str) -> Result<Entry, CredentialsError> {
    let mut config = read(file)?;
    let helper = best_key(config.cred_helpers.keys().map(String::as_str), authority, repository).map(str::to_owned);
    if let Some(name) = helper.and_then(|key| config.cred_helpers.remove(&key)) {
        return Ok(Entry::Helper(name));
    }
    let key = best_key(config.auths.keys().map(String::as_str), authority, repository).map(str::to_owned);
    let entry = key.and_then(|key| config.auths.remove(&key).map(|entry| (key, entry)));
    let secret = match entry {
        Some((key, entry)) => entry.secret().map_err(|problem| wrong(file, format!("auths[\"{key}\"]: {problem}")))?,
        None => None,
    };
    match secret {
        // Docker leaves an empty entry beside what the store has.
        None if !config.creds_store.is_empty() => Ok(Entry::Helper(config.creds_store)),
        secret => Ok(Entry::Secret(secret)),
    }
}

/// All helpers that a file names.
pub(super) fn helpers(file: &Path) -> Result<Vec<String>, CredentialsError> {
    let config = read(file)?;
    let store = Some(config.creds_store).filter(|store| !store.is_empty());
    Ok(config.cred_helpers.into_values().chain(store).collect())
}

fn read(file: &Path) -> Result<DockerConfig, CredentialsError> {
    serde_json::from_str(&read_file(file)?)
        .map_err(|error| wrong(file, format!("line {}, column {}", error.line(), error.column())))
}

fn wrong(file: &Path, problem: String) -> CredentialsError {
    CredentialsError::Docker(file.display().to_string(), problem)
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
