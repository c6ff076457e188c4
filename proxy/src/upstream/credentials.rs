//! Reads a rule's secrets when they are needed, so that a rotated one is used without a restart.

#[cfg(feature = "aws")]
mod aws;
mod azure;
mod cloud;
mod docker;
mod google;
mod helper;
mod here;
mod program;
mod provider;
mod secrets;

use std::path::Path;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use self::here::check;
pub(super) use self::secrets::Secrets;
use crate::blocking::on_thread;
use crate::config::{Cloud, Credentials, PasswordSource, host_matches};
use crate::registries::UpstreamTrust;
use crate::secret::Secret;
use crate::times::{DEFAULT_TTL, OBSERVATION_TTL, STALL_TIMEOUT};

/// The result of a source, and for how long it is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundCredentials {
    /// None: requests are anonymous.
    pub(super) secret: Option<Secret>,
    pub(super) life: Duration,
}

/// What sources outside of this process share. They are limited, because clients may name any number of registries. One for
/// each session: programs that still run for old rules do not delay those of the new rules.
pub(super) struct ExternalCredentials {
    /// Client of the clouds' token services.
    http: reqwest::Client,
    /// Separate permits: programs that hang hold theirs for `STALL_TIMEOUT`, and must not delay token services.
    programs: Semaphore,
    services: Semaphore,
}

/// Programs that run at the same time, and as many requests to token services. More: programs use more memory. Fewer:
/// pulls from registries with different secrets wait for each other.
const MAX_CONCURRENT_SOURCES: usize = 8;

impl ExternalCredentials {
    pub(super) fn new(http: reqwest::Client) -> Self {
        Self {
            http,
            programs: Semaphore::new(MAX_CONCURRENT_SOURCES),
            services: Semaphore::new(MAX_CONCURRENT_SOURCES),
        }
    }
}

/// Why credentials are not available. Names the source, never its content.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum CredentialsError {
    #[error("credentials file {0} cannot be read: {1}")]
    File(String, String),
    #[error("credentials file {0} is not a valid Docker config.json: {1}")]
    Docker(String, String),
    #[error("the environment variable {0} with the password is not set")]
    Variable(String),
    #[error("credential program {0}")]
    Program(String),
    #[error("{0} is not a valid CredentialProviderConfig: {1}")]
    Provider(String, String),
    #[error("{0}: {1}")]
    Cloud(&'static str, String),
}

/// The upstream and repository that a secret is for.
#[derive(Clone, Copy)]
pub(super) struct CredentialScope<'a> {
    /// `https://host`
    pub(super) base: &'a str,
    /// `host` or `host:port`
    pub(super) authority: &'a str,
    pub(super) trust: UpstreamTrust,
    /// The repository's name at the upstream.
    pub(super) repository: &'a str,
    /// The registry that the upstream serves, and the repository's name there.
    pub(super) registry: &'a str,
    pub(super) name: &'a str,
}

/// The secret for an upstream.
pub(super) async fn find(
    source: &Credentials,
    scope: CredentialScope<'_>,
    external: &ExternalCredentials,
) -> Result<FoundCredentials, CredentialsError> {
    let CredentialScope { authority, trust, repository, .. } = scope;
    let lasting = |life| move |secret| FoundCredentials { secret, life };
    match source {
        Credentials::Static { username, password } => {
            let password = match password {
                PasswordSource::File(path) => {
                    let path = path.clone();
                    on_thread(move || read_file(&path)).await?.trim_end_matches(['\r', '\n']).to_owned()
                }
                PasswordSource::Variable(name) => {
                    std::env::var(name).map_err(|_| CredentialsError::Variable(name.clone()))?
                }
            };
            let secret = Secret::Password { username: username.clone(), password };
            Ok(FoundCredentials { secret: Some(secret), life: DEFAULT_TTL })
        }
        Credentials::DockerConfig { file } => match docker::find(file, scope).await? {
            docker::DockerEntry::Secret(secret) => Ok(FoundCredentials { secret, life: DEFAULT_TTL }),
            docker::DockerEntry::Helper(name) => {
                let _permit = external.programs.acquire().await;
                helper::get(&name, authority).await.map(lasting(OBSERVATION_TTL))
            }
        },
        Credentials::Helper { name } => {
            let _permit = external.programs.acquire().await;
            helper::get(name, authority).await.map(lasting(OBSERVATION_TTL))
        }
        Credentials::Provider { config, bin_dir } => {
            let _permit = external.programs.acquire().await;
            provider::find(config, bin_dir, authority, repository).await
        }
        // A token for all permissions of the machine goes only to the cloud's own registries and to configured
        // upstreams.
        Credentials::Cloud(cloud) if trust == UpstreamTrust::Derived && !is_registry_of(*cloud, authority) => {
            Ok(FoundCredentials::nothing())
        }
        Credentials::Cloud(cloud) => {
            let _permit = external.services.acquire().await;
            timeout(STALL_TIMEOUT, cloud_token(*cloud, scope, &external.http)).await.unwrap_or_else(|_| {
                Err(CredentialsError::Cloud("the cloud's token service", "no response in time".into()))
            })
        }
    }
}

async fn cloud_token(
    cloud: Cloud,
    scope: CredentialScope<'_>,
    http: &reqwest::Client,
) -> Result<FoundCredentials, CredentialsError> {
    match cloud {
        #[cfg(feature = "aws")]
        Cloud::Aws => aws::fetch(http, scope.authority).await,
        Cloud::Azure => azure::fetch(http, scope.base, scope.authority).await,
        Cloud::Gcp => google::fetch(http).await,
    }
}

fn is_registry_of(cloud: Cloud, authority: &str) -> bool {
    match cloud {
        #[cfg(feature = "aws")]
        Cloud::Aws => aws::is_registry(authority),
        Cloud::Azure => azure::is_registry(authority),
        Cloud::Gcp => google::is_registry(authority),
    }
}

impl FoundCredentials {
    fn nothing() -> Self {
        Self { secret: None, life: DEFAULT_TTL }
    }
}

/// The most specific matching key, such as `*.example.com/team`: the longest path, then a host without stars.
fn best_key<'a>(keys: impl Iterator<Item = &'a str>, authority: &str, repository: &str) -> Option<&'a str> {
    let matching = keys.filter_map(|key| {
        let (host, path) = parts(key);
        let is_host = host_matches(host, authority) || (is_docker_hub(host) && is_docker_hub(authority));
        let is_path = path.is_empty() || repository == path || below(path, repository);
        (is_host && is_path).then_some(((path.len(), !host.contains('*'), host.len()), key))
    });
    matching.max().map(|(_, key)| key)
}

/// The host and the path of a key. URLs of the v1 and v2 API have no path.
fn parts(key: &str) -> (&str, &str) {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://");
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let path = path.trim_end_matches('/');
    (host, if matches!(path, "v1" | "v2") { "" } else { path })
}

fn below(parent: &str, name: &str) -> bool {
    name.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/'))
}

fn is_docker_hub(host: &str) -> bool {
    matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

/// Blocks on the disk.
#[expect(clippy::disallowed_methods, reason = "blocks")]
fn read_file(path: &Path) -> Result<String, CredentialsError> {
    std::fs::read_to_string(path).map_err(|e| CredentialsError::File(path.display().to_string(), e.to_string()))
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::upstream::tls;

    fn of(source: &Credentials, authority: &str, repository: &str) -> Result<Option<Secret>, CredentialsError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let base = format!("https://{authority}");
        let (registry, name) = (authority, repository);
        let scope =
            CredentialScope { base: &base, authority, trust: UpstreamTrust::Derived, repository, registry, name };
        let tls = tls::config(&[], Vec::new(), None).unwrap();
        let http = reqwest::Client::builder().tls_backend_preconfigured(tls).build().unwrap();
        runtime.block_on(find(source, scope, &ExternalCredentials::new(http))).map(|found| found.secret)
    }

    fn docker(json: &str, authority: &str) -> Result<Option<Secret>, CredentialsError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, json).unwrap();
        of(&Credentials::DockerConfig { file }, authority, "team/app")
    }

    #[test]
    fn most_specific_key_wins() {
        let keys =
            ["*.corp", "reg.corp", "reg.corp/team", "reg.corp/team/app", "https://index.docker.io/v1/", "*.corp/te"];
        let best = |authority: &str, repository: &str| best_key(keys.into_iter(), authority, repository);
        assert_eq!(best("reg.corp", "team/app"), Some("reg.corp/team/app"));
        assert_eq!(best("reg.corp", "team/apple"), Some("reg.corp/team"));
        assert_eq!(best("reg.corp", "teams/app"), Some("reg.corp"));
        assert_eq!(best("other.corp", "team/app"), Some("*.corp"));
        assert_eq!(best("registry-1.docker.io", "library/a"), Some("https://index.docker.io/v1/"));
        assert_eq!([best("reg.corp:5000", "a"), best("evil.reg.corp", "a"), best("ghcr.io", "a")], [None; 3]);
    }

    #[test]
    fn cloud_token_goes_only_to_its_own_registries() {
        assert!(["gcr.io", "eu.gcr.io", "europe-docker.pkg.dev"].into_iter().all(google::is_registry));
        assert!(!["gcr.io.evil.example", "notgcr.io", "pkg.dev.example"].into_iter().any(google::is_registry));
        assert!(["team.azurecr.io", "team.azurecr.cn"].into_iter().all(azure::is_registry));
        assert!(!["azurecr.io", "team.azurecr.io.evil.example"].into_iter().any(azure::is_registry));
        let clouds = [
            Cloud::Gcp,
            Cloud::Azure,
            #[cfg(feature = "aws")]
            Cloud::Aws,
        ];
        for cloud in clouds {
            assert_eq!(of(&Credentials::Cloud(cloud), "evil.example", "a").unwrap(), None);
        }
    }

    #[test]
    fn docker_config_is_parsed() {
        let json = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{}"}},
                "reg.corp:5000": {{"username": "u", "password": "p"}},
                "id.corp": {{"identitytoken": "t"}}}}}}"#,
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
    fn docker_config_is_parsed_leniently() {
        let password = |password: &str| Some(Secret::Password { username: "me".into(), password: password.into() });
        let encoded = STANDARD.encode("me:secrets");
        let (first, second) = encoded.split_at(5);
        for (json, wanted) in [
            (serde_json::json!({"auths": {"a.io": {"auth": format!("{first}\n  {second}\n")}}}), password("secrets")),
            (serde_json::json!({"auths": {"a.io": {"auth": encoded.trim_end_matches('=')}}}), password("secrets")),
            (serde_json::json!({"auths": {"a.io": {"auth": STANDARD.encode("me:s\0\0")}}}), password("s")),
            (serde_json::json!({"a.io": {"auth": encoded, "email": "me@a.io"}}), password("secrets")),
            (
                serde_json::json!({"auths": {"a.io": {"auth": encoded}, "b.io": {"auth": 7}, "c.io": "x"}}),
                password("secrets"),
            ),
            (serde_json::json!({"auths": {"a.io": {"auth": null, "username": "me", "password": "p"}}}), password("p")),
            (serde_json::json!({"auths": {"a.io": {"registrytoken": "t"}}}), Some(Secret::Bearer("t".into()))),
            (
                serde_json::json!({"auths": {"a.io": {"auth": encoded, "identitytoken": "i"}}}),
                Some(Secret::Identity("i".into())),
            ),
            (serde_json::json!({}), None),
            (serde_json::json!({"auths": null, "credHelpers": null, "credsStore": null}), None),
            (serde_json::json!({"auths": {}, "HttpHeaders": {"x": "y"}}), None),
        ] {
            assert_eq!(docker(&json.to_string(), "a.io").unwrap(), wanted, "{json}");
        }
    }

    #[test]
    fn registry_secret_is_found_for_configured_mirror() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let entry = |text: &str| serde_json::json!({"auth": STANDARD.encode(text)});
        let json = serde_json::json!({"auths": {"quay.io/team": entry("quay:1"), "harbor.corp": entry("harbor:2")}});
        std::fs::write(&file, json.to_string()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let of = |authority, trust| {
            let (base, repository) = ("https://x", "proxy/team/app");
            let scope = CredentialScope { base, authority, trust, repository, registry: "quay.io", name: "team/app" };
            match runtime.block_on(docker::find(&file, scope)).unwrap() {
                docker::DockerEntry::Secret(Some(Secret::Password { username, .. })) => Some(username),
                _ => None,
            }
        };
        assert_eq!(of("mirror.corp", UpstreamTrust::Configured).as_deref(), Some("quay"));
        assert_eq!(
            of("harbor.corp", UpstreamTrust::Configured).as_deref(),
            Some("harbor"),
            "the upstream's own entry comes first"
        );
        assert_eq!(
            of("elsewhere.example", UpstreamTrust::Derived),
            None,
            "no secret goes to a host that is not configured"
        );
    }

    #[test]
    fn docker_config_error_hides_the_secret() {
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
    fn password_file_newline_is_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        std::fs::write(&path, "hush\n").unwrap();
        let credentials = Credentials::Static { username: "u".into(), password: PasswordSource::File(path) };
        let secret = of(&credentials, "anything", "a").unwrap().unwrap();
        assert_eq!(secret.basic().unwrap(), format!("Basic {}", STANDARD.encode("u:hush")));
        let credentials =
            Credentials::Static { username: "u".into(), password: PasswordSource::Variable("DRAY_TEST_UNSET".into()) };
        assert!(of(&credentials, "x", "a").unwrap_err().to_string().contains("DRAY_TEST_UNSET"));
    }
}
