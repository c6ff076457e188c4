//! Caches secrets for the lifetime that their source states, and failures for `RETRY_INTERVAL`.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{CredentialScope, CredentialsError, ExternalCredentials, FoundCredentials, find};
use crate::config::Credentials;
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::times::{DEFAULT_TTL, RETRY_INTERVAL};
use crate::upstream::http::UpstreamRef;

#[derive(Clone)]
pub(in crate::upstream) struct Secrets {
    known: moka::future::Cache<SecretKey, SecretLookup>,
    /// Secrets that were dropped within the last `RETRY_INTERVAL`.
    recently_dropped: moka::future::Cache<SecretKey, ()>,
    external: Arc<ExternalCredentials>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct SecretKey {
    rule: String,
    upstream: String,
    /// Set if the source may have a different secret for each repository.
    repository: Option<(String, String)>,
}

#[derive(Clone)]
struct SecretLookup(Result<FoundCredentials, CredentialsError>);

/// Bounds the lifetime that a source states. Longer: a revoked secret is used longer. Shorter: sources are used more
/// often.
const MAX_SECRET_TTL: Duration = Duration::from_secs(12 * 3600);

impl Secrets {
    pub(in crate::upstream) fn new(external: ExternalCredentials) -> Self {
        Self {
            known: moka::future::Cache::builder().max_capacity(10_000).expire_after(ByLifetime).build(),
            recently_dropped: moka::future::Cache::builder().max_capacity(10_000).time_to_live(RETRY_INTERVAL).build(),
            external: Arc::new(external),
        }
    }

    pub(in crate::upstream) fn is_known(&self, upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) -> bool {
        self.known.contains_key(&SecretKey::new(upstream_ref, repo_ref))
    }

    /// Reads again a secret that may have expired. If its source fails, the old one is kept.
    pub(in crate::upstream) async fn refresh(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Instant,
    ) {
        let key = SecretKey::new(upstream_ref, repo_ref);
        let before = self.known.get(&key).await;
        self.forget(upstream_ref, repo_ref).await;
        if let (Err(_), Some(before)) = (self.get(upstream_ref, repo_ref, deadline).await, before) {
            self.known.insert(key, before).await;
        }
    }

    /// Drops a denied secret, which may have changed since it was read. Programs and services run at most once per
    /// `RETRY_INTERVAL`.
    pub(in crate::upstream) async fn forget(&self, upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) {
        let key = SecretKey::new(upstream_ref, repo_ref);
        // Docker's configuration may name a program, whose secrets have another lifetime.
        let is_of_file = match &repo_ref.rule.credentials {
            Some(Credentials::Static { .. }) => true,
            Some(Credentials::DockerConfig { .. }) => {
                let of_file =
                    |SecretLookup(found)| found.is_ok_and(|found: FoundCredentials| found.life == DEFAULT_TTL);
                self.known.get(&key).await.is_some_and(of_file)
            }
            _ => false,
        };
        if !is_of_file {
            if self.recently_dropped.contains_key(&key) {
                return;
            }
            self.recently_dropped.insert(key.clone(), ()).await;
        }
        self.known.invalidate(&key).await;
    }

    /// The secret for an upstream. Concurrent requests share one lookup.
    pub(in crate::upstream) async fn get(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Instant,
    ) -> Result<FoundCredentials, SourceError> {
        let Some(source) = repo_ref.rule.credentials.clone() else {
            return Ok(FoundCredentials { secret: None, life: MAX_SECRET_TTL });
        };
        let (key, known, upstream, trust) = (
            SecretKey::new(upstream_ref, repo_ref),
            self.known.clone(),
            upstream_ref.upstream.clone(),
            upstream_ref.trust,
        );
        let external = self.external.clone();
        let (repo_ref, repository) = (repo_ref.clone(), repo_ref.repository_at(upstream_ref.upstream));
        // A task of its own: if the source is slower than the deadline, the next request gets its result.
        let task = tokio::spawn(async move {
            let lookup = async {
                let base = upstream.base();
                let (registry, name) = (repo_ref.registry.as_str(), repo_ref.repository.as_str());
                let authority = &upstream.authority;
                let scope = CredentialScope { base: &base, authority, trust, repository: &repository, registry, name };
                let found = find(&source, scope, &external).await;
                if let Err(error) = &found {
                    tracing::error!(rule = repo_ref.rule.name(), %error, "credentials unavailable");
                }
                SecretLookup(found)
            };
            known.get_with(key, lookup).await
        });
        let late = || SourceError::NoCredentials("their source did not respond in time".into());
        let result = timeout_at(deadline, task).await.map_err(|_| late())?;
        let SecretLookup(found) = result.map_err(|error| SourceError::NoCredentials(error.to_string()))?;
        found.map_err(|error| SourceError::NoCredentials(error.to_string()))
    }
}

impl SecretKey {
    fn new(upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) -> Self {
        let by_repository = repo_ref.rule.credentials.as_ref().is_some_and(Credentials::may_differ_by_repository);
        let repository = by_repository.then(|| (repo_ref.to_string(), repo_ref.repository_at(upstream_ref.upstream)));
        Self { rule: repo_ref.rule.name().to_owned(), upstream: upstream_ref.upstream.base(), repository }
    }
}

impl Lifetime for SecretLookup {
    fn life(&self) -> Duration {
        self.0.as_ref().map_or(RETRY_INTERVAL, |found| found.life.min(MAX_SECRET_TTL))
    }
}
