//! The kubelet's credential provider plugins: the same configuration, the same programs.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

use super::{CredentialsError, FoundCredentials, best_key, program, read_file};
use crate::blocking::on_thread;
use crate::secret::Secret;

#[derive(Deserialize)]
struct ProviderConfig {
    kind: String,
    #[serde(default)]
    providers: Vec<Provider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProviderResponse {
    kind: String,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: HashMap<String, Login>,
}

#[derive(Deserialize)]
struct Login {
    username: String,
    password: String,
}

/// The secret of the plugins for a repository of an upstream.
pub(super) async fn find(
    file: &Path,
    bin_dir: &Path,
    authority: &str,
    repository: &str,
) -> Result<FoundCredentials, CredentialsError> {
    let (mut nothing, mut failed) = (FoundCredentials::nothing(), None);
    let path = file.to_owned();
    for provider in &on_thread(move || read(&path)).await?.providers {
        let patterns = provider.match_images.iter().map(String::as_str);
        if best_key(patterns, authority, repository).is_none() {
            continue;
        }
        if provider.token_attributes.is_some() {
            let problem = format!("{}: tokenAttributes need a token of a pod, which dray does not have", provider.name);
            return Err(wrong(file, problem));
        }
        // If a plugin fails or has no secret, the next one that matches runs.
        match provider.run(bin_dir, authority, repository).await {
            Ok(found) if found.secret.is_some() => return Ok(found),
            Ok(none) => nothing = FoundCredentials { life: nothing.life.min(none.life), ..none },
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(nothing), Err)
}

/// The names of all plugins.
pub(super) fn programs(file: &Path) -> Result<Vec<String>, CredentialsError> {
    Ok(read(file)?.providers.into_iter().map(|provider| provider.name).collect())
}

fn read(file: &Path) -> Result<ProviderConfig, CredentialsError> {
    // JSON is valid YAML.
    let config: ProviderConfig =
        serde_yaml_ng::from_str(&read_file(file)?).map_err(|error| wrong(file, error.to_string()))?;
    if config.kind != "CredentialProviderConfig" {
        return Err(wrong(file, format!("kind is {}, not CredentialProviderConfig", config.kind)));
    }
    Ok(config)
}

fn wrong(file: &Path, problem: String) -> CredentialsError {
    CredentialsError::Provider(file.display().to_string(), problem)
}

impl Provider {
    async fn run(
        &self,
        bin_dir: &Path,
        authority: &str,
        repository: &str,
    ) -> Result<FoundCredentials, CredentialsError> {
        let failed = |why: &str| CredentialsError::Program(format!("{}: {why}", self.name));
        if self.name.is_empty() || self.name.contains('/') {
            return Err(failed("the name must be that of a program in bin_dir"));
        }
        let program = bin_dir.join(&self.name);
        let mut command = Command::new(&program);
        command.args(&self.args).envs(self.env.iter().map(|variable| (&variable.name, &variable.value)));
        let request = json!({
            "kind": "CredentialProviderRequest",
            "apiVersion": self.api_version,
            "image": format!("{authority}/{repository}"),
        });
        let output = program::run(command, &program, request.to_string().as_bytes()).await;
        let output = output.map_err(CredentialsError::Program)?;
        if !output.status.success() {
            return Err(failed(&output.status.to_string()));
        }
        let response: ProviderResponse = serde_json::from_slice(&output.stdout)
            .map_err(|_| failed("its response is not a valid CredentialProviderResponse"))?;
        if response.kind != "CredentialProviderResponse" {
            return Err(failed("the kind of its response is not CredentialProviderResponse"));
        }
        let life = response.cache_duration.as_ref().or(self.default_cache_duration.as_ref());
        let life = life.map_or(Ok(Duration::ZERO), |text| humantime::parse_duration(text));
        let life = life.map_err(|_| failed("its cacheDuration is not a valid duration"))?;
        let key = best_key(response.auth.keys().map(String::as_str), authority, repository).map(str::to_owned);
        let login = key.and_then(|key| response.auth.into_iter().find(|(known, _)| *known == key));
        let secret = login.map(|(_, login)| Secret::Password { username: login.username, password: login.password });
        Ok(FoundCredentials { secret, life })
    }
}
