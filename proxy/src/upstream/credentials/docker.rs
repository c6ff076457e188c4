//! Docker's `config.json`, also from a Secret of the type `kubernetes.io/dockerconfigjson`, and the older `.dockercfg`.
//! Parsed as leniently as Docker and the kubelet do.

use std::collections::HashMap;
use std::path::Path;

use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, Engine};
use serde::{Deserialize, Deserializer};

use super::{CredentialScope, CredentialsError, best_key, read_file};
use crate::blocking::on_thread;
use crate::registries::UpstreamTrust;
use crate::secret::Secret;

/// The entry of a file for an upstream.
pub(super) enum DockerEntry {
    /// None: the file has no entry.
    Secret(Option<Secret>),
    /// The name of a credential helper.
    Helper(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default, deserialize_with = "or_null")]
    auths: Entries,
    #[serde(default, deserialize_with = "or_null")]
    cred_helpers: HashMap<String, String>,
    #[serde(default, deserialize_with = "or_null")]
    creds_store: String,
}

/// A null is a missing value, as in Go.
fn or_null<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Each entry is parsed when it is needed, so that a mistake in one does not affect the others.
type Entries = HashMap<String, serde_json::Value>;

/// As Docker and the kubelet parse it: a null is a missing value, and unknown keys are ignored.
#[derive(Deserialize, Default)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Base64 as Docker's clients accept it, with or without padding.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The most specific entry for a repository at the upstream, else for the registry that it serves. As for Docker, a
/// helper comes before the entries of the file, and the store after them.
pub(super) async fn find(file: &Path, scope: CredentialScope<'_>) -> Result<DockerEntry, CredentialsError> {
    let path = file.to_owned();
    let mut config = on_thread(move || read(&path)).await?;
    let helper = key_for(&config.cred_helpers, scope);
    if let Some(name) = helper.and_then(|key| config.cred_helpers.remove(&key)) {
        return Ok(DockerEntry::Helper(name));
    }
    let key = key_for(&config.auths, scope);
    let entry = key.and_then(|key| config.auths.remove(&key).map(|entry| (key, entry)));
    let secret = match entry {
        Some((key, entry)) => {
            let problem = |problem: &str| wrong(file, format!("auths[\"{key}\"]: {problem}"));
            let entry: DockerAuth =
                serde_json::from_value(entry).map_err(|_| problem("is not a valid Docker auth entry"))?;
            entry.secret().map_err(problem)?
        }
        None => None,
    };
    match secret {
        // Docker leaves an empty entry for a secret in the store.
        None if !config.creds_store.is_empty() => Ok(DockerEntry::Helper(config.creds_store)),
        secret => Ok(DockerEntry::Secret(secret)),
    }
}

fn key_for<T>(entries: &HashMap<String, T>, scope: CredentialScope<'_>) -> Option<String> {
    let best = |authority, repository| best_key(entries.keys().map(String::as_str), authority, repository);
    let of_upstream = best(scope.authority, scope.repository);
    // Pull secrets are keyed by the registry's name, also if a rule uses another upstream.
    let of_registry = || best(scope.registry, scope.name).filter(|_| scope.trust == UpstreamTrust::Configured);
    of_upstream.or_else(of_registry).map(str::to_owned)
}

/// All helpers that a file names.
pub(super) fn helpers(file: &Path) -> Result<Vec<String>, CredentialsError> {
    let config = read(file)?;
    let store = Some(config.creds_store).filter(|store| !store.is_empty());
    Ok(config.cred_helpers.into_values().chain(store).collect())
}

fn read(file: &Path) -> Result<DockerConfig, CredentialsError> {
    let text = read_file(file)?;
    let unreadable =
        |error: serde_json::Error| wrong(file, format!("line {}, column {}", error.line(), error.column()));
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).map_err(unreadable)?;
    let is_config = ["auths", "credHelpers", "credsStore"].iter().any(|key| json.contains_key(*key));
    // The older form, `.dockercfg` and kubernetes.io/dockercfg, consists of the entries alone.
    if !is_config && !json.is_empty() && json.values().all(serde_json::Value::is_object) {
        let auths = json.into_iter().collect();
        return Ok(DockerConfig { auths, cred_helpers: HashMap::new(), creds_store: String::new() });
    }
    serde_json::from_str(&text).map_err(unreadable)
}

fn wrong(file: &Path, problem: String) -> CredentialsError {
    CredentialsError::Docker(file.display().to_string(), problem)
}

impl DockerAuth {
    fn secret(self) -> Result<Option<Secret>, &'static str> {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = given(self.registrytoken) {
            return Ok(Some(Secret::Bearer(token)));
        }
        if let Some(token) = given(self.identitytoken) {
            return Ok(Some(Secret::Identity(token)));
        }
        let Some(auth) = given(self.auth) else {
            let password = self.password.unwrap_or_default();
            return Ok(given(self.username).map(|username| Secret::Password { username, password }));
        };
        // Tools wrap lines, and Docker itself has padded with NULs.
        let encoded: String = auth.chars().filter(|c| !c.is_whitespace()).collect();
        let decoded = LENIENT.decode(encoded).map_err(|_| "auth is not base64")?;
        let text = String::from_utf8(decoded).map_err(|_| "auth is not UTF-8")?;
        let (username, password) = text.split_once(':').ok_or("auth is not base64 of user:password")?;
        let password = password.trim_matches('\0').to_owned();
        Ok(Some(Secret::Password { username: username.to_owned(), password }))
    }
}
