//! Secrets that were found, for as long as their sources say, and for a moment that one could not be had.

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
    /// Which were asked for anew a moment ago.
    renewed: moka::future::Cache<SecretKey, ()>,
    outside: Arc<ExternalCredentials>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct SecretKey {
    rule: String,
    upstream: String,
    /// Where the source may have another secret for each.
    repository: Option<(String, String)>,
}

#[derive(Clone)]
struct SecretLookup(Result<FoundCredentials, CredentialsError>);

/// Whatever a source promises.
const MAX_LIFE: Duration = Duration::from_secs(12 * 3600);

impl Secrets {
    pub(in crate::upstream) fn new(outside: ExternalCredentials) -> Self {
        Self {
            known: moka::future::Cache::builder().max_capacity(10_000).expire_after(ByLifetime).build(),
            renewed: moka::future::Cache::builder().max_capacity(10_000).time_to_live(RETRY_INTERVAL).build(),
            outside: Arc::new(outside),
        }
    }

    pub(in crate::upstream) fn is_known(&self, home: UpstreamRef<'_>, place: &RepositoryRef) -> bool {
        self.known.contains_key(&SecretKey::new(home, place))
    }

    /// It may have ended, or may not have what was asked for: one that its source does not give anew is kept.
    pub(in crate::upstream) async fn look_again(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Instant,
    ) {
        let key = SecretKey::new(home, place);
        let before = self.known.get(&key).await;
        self.forget(home, place).await;
        if let (Err(_), Some(before)) = (self.of(home, place, deadline).await, before) {
            self.known.insert(key, before).await;
        }
    }

    /// It was refused, and may have been changed since it was read.
    pub(in crate::upstream) async fn forget(&self, home: UpstreamRef<'_>, place: &RepositoryRef) {
        let key = SecretKey::new(home, place);
        // Docker's configuration may name a program.
        let is_of_file = match &place.rule.credentials {
            Some(Credentials::Static { .. }) => true,
            Some(Credentials::DockerConfig { .. }) => {
                let of_file =
                    |SecretLookup(found)| found.is_ok_and(|found: FoundCredentials| found.life == DEFAULT_TTL);
                self.known.get(&key).await.is_some_and(of_file)
            }
            _ => false,
        };
        if !is_of_file {
            if self.renewed.contains_key(&key) {
                return;
            }
            self.renewed.insert(key.clone(), ()).await;
        }
        self.known.invalidate(&key).await;
    }

    /// The secret for an upstream: asked for once by all who need it at the same time.
    pub(in crate::upstream) async fn of(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Instant,
    ) -> Result<FoundCredentials, SourceError> {
        let Some(source) = place.rule.credentials.clone() else {
            return Ok(FoundCredentials { secret: None, life: MAX_LIFE });
        };
        let (key, known, upstream, trust) =
            (SecretKey::new(home, place), self.known.clone(), home.upstream.clone(), home.trust);
        let outside = self.outside.clone();
        let (place, repository) = (place.clone(), place.repository_at(home.upstream));
        // A task of its own: a source that takes longer than this question has time answers the next one.
        let asked = tokio::spawn(async move {
            let ask = async {
                let base = upstream.base();
                let (registry, name) = (place.registry.as_str(), place.repository.as_str());
                let authority = &upstream.authority;
                let whom = CredentialScope { base: &base, authority, trust, repository: &repository, registry, name };
                let found = find(&source, whom, &outside).await;
                if let Err(error) = &found {
                    tracing::error!(rule = place.rule.name(), %error, "no credentials");
                }
                SecretLookup(found)
            };
            known.get_with(key, ask).await
        });
        let late = || SourceError::NoCredentials("their source takes too long".into());
        let answer = timeout_at(deadline, asked).await.map_err(|_| late())?;
        let SecretLookup(found) = answer.map_err(|error| SourceError::NoCredentials(error.to_string()))?;
        found.map_err(|error| SourceError::NoCredentials(error.to_string()))
    }
}

impl SecretKey {
    fn new(home: UpstreamRef<'_>, place: &RepositoryRef) -> Self {
        let by_repository = place.rule.credentials.as_ref().is_some_and(Credentials::may_differ_by_repository);
        let repository = by_repository.then(|| (place.to_string(), place.repository_at(home.upstream)));
        Self { rule: place.rule.name().to_owned(), upstream: home.upstream.base(), repository }
    }
}

impl Lifetime for SecretLookup {
    fn life(&self) -> Duration {
        self.0.as_ref().map_or(RETRY_INTERVAL, |found| found.life.min(MAX_LIFE))
    }
}
