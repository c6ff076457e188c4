//! Authentication at upstreams: Basic, and Bearer with a token from the challenge's realm. Requests that need the same
//! token share one request for it, and it is renewed before it expires.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use tokio::time::{Instant as Deadline, timeout_at};
use url::Url;

use super::challenge::Challenge;
use super::credentials::{ExternalCredentials, Secrets};
use super::http::{UpstreamHttp, UpstreamRef};
use super::token_endpoint::{PULL, UpstreamGrant, fetch_token, repository_of, scopes, sensitive};
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::registries::RepositoryRef;
use crate::secret::Secret;
use crate::source::SourceError;
use crate::times::{AUTHORIZATION_TTL, DAY, OBSERVATION_TTL};
use crate::trace;

/// Remembered challenges and grants.
pub(super) struct TokenCache {
    /// By upstream and repository: saves the 401 of the next request.
    challenges: moka::future::Cache<(String, String), Challenge>,
    /// Challenges of `GET /v2/`, by upstream. None: it needs no authentication.
    api_challenges: moka::future::Cache<String, Option<Challenge>>,
    grants: moka::future::Cache<GrantKey, UpstreamGrant>,
    secrets: Secrets,
    /// Upstreams whose secret was read again after a 403: a repository that stays forbidden must not cause a read each
    /// time.
    reread: moka::future::Cache<(String, String), ()>,
    /// Upstreams whose denial was logged recently.
    logged: moka::future::Cache<(String, String), ()>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct GrantKey {
    /// For a registry that the upstream redirected to: the rule's own grants are never sent there.
    is_redirect_target: bool,
    rule: String,
    upstream: String,
    realm: String,
    service: Option<String>,
    scope: String,
}

pub struct ExchangedSecret {
    /// None: the registry needs no authentication.
    pub authorization: Option<HeaderValue>,
    /// How long the grant is valid.
    pub life: Duration,
}

/// The realm in the key of a Basic grant.
const BASIC: &str = "basic";

/// Memory for tokens, most of which have 1 to 2 KiB. Smaller: more token requests.
const MAX_GRANTS_BYTES: u64 = 32 * 1024 * 1024;

fn weight(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl GrantKey {
    fn bytes(&self) -> u32 {
        let service = self.service.as_ref().map_or(0, String::len);
        weight(self.rule.len() + self.upstream.len() + self.realm.len() + service + self.scope.len())
    }
}

impl UpstreamGrant {
    fn bytes(&self) -> u32 {
        weight(size_of::<Self>() + self.header.as_ref().map_or(0, HeaderValue::len))
    }
}

/// A set of rules and upstreams, whose entries expire.
fn expiring_set(life: Duration) -> moka::future::Cache<(String, String), ()> {
    moka::future::Cache::builder().max_capacity(10_000).time_to_live(life).build()
}

impl TokenCache {
    pub(super) fn new(external: ExternalCredentials) -> Self {
        Self {
            challenges: moka::future::Cache::builder()
                .max_capacity(10_000)
                .time_to_live(Duration::from_secs(3600))
                .build(),
            api_challenges: moka::future::Cache::builder().max_capacity(10_000).time_to_live(OBSERVATION_TTL).build(),
            grants: moka::future::Cache::builder()
                .max_capacity(MAX_GRANTS_BYTES)
                .weigher(|key: &GrantKey, grant: &UpstreamGrant| key.bytes() + grant.bytes())
                .expire_after(ByLifetime)
                .build(),
            secrets: Secrets::new(external),
            reread: expiring_set(Duration::from_secs(60)),
            logged: expiring_set(Duration::from_secs(600)),
        }
    }

    /// The number of tokens by rule and upstream.
    pub(super) fn counts(&self) -> HashMap<(String, String), usize> {
        let mut counts = HashMap::new();
        for (key, grant) in &self.grants {
            if grant.header.is_some() && key.realm != BASIC {
                *counts.entry((key.rule.clone(), key.upstream.clone())).or_default() += 1;
            }
        }
        counts
    }

    /// The header for the challenge of an earlier request.
    pub(super) async fn known_grant(
        &self,
        http: &Arc<UpstreamHttp>,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        match self.challenges.get(&challenge_key(upstream_ref, repo_ref)).await {
            Some(challenge) => self.grant(http, upstream_ref, repo_ref, challenge, deadline).await,
            None => Ok(None),
        }
    }

    /// Forgets the challenge for a repository, which the upstream may have changed.
    pub(super) async fn forget(&self, upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) {
        self.challenges.invalidate(&challenge_key(upstream_ref, repo_ref)).await;
    }

    /// The header for a challenge. `rejected` is the header that the upstream has just denied.
    pub(super) async fn grant_for(
        &self,
        http: &Arc<UpstreamHttp>,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        challenge: Challenge,
        rejected: Option<&HeaderValue>,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let key = grant_key(upstream_ref, repo_ref, &challenge);
        if let Some(known) = self.grants.get(&key).await
            && rejected.is_some()
            && known.header.as_ref() == rejected
        {
            self.grants.invalidate(&key).await;
            // The grant may come from a secret that has changed.
            self.secrets.forget(upstream_ref, repo_ref).await;
        }
        self.challenges.insert(challenge_key(upstream_ref, repo_ref), challenge.clone()).await;
        let granted = self.grant(http, upstream_ref, repo_ref, challenge, deadline).await;
        if granted.as_ref().is_err_and(SourceError::is_denied) {
            self.log_denial(upstream_ref, repo_ref).await;
        }
        granted
    }

    /// Logs a denial of a rule's credentials, which may contain a wrong password, at most every 10 minutes.
    pub(super) async fn log_denial(&self, upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) {
        let (rule, upstream) = (repo_ref.rule.name().to_owned(), upstream_ref.upstream.base());
        let key = (rule.clone(), upstream.clone());
        if repo_ref.rule.credentials.is_some() && !self.logged.contains_key(&key) {
            self.logged.insert(key, ()).await;
            tracing::warn!(rule, upstream, "upstream denied credentials");
        }
    }

    /// Replaces a Basic secret that a registry denied with 403, as some do once it has expired (ECR: after twelve
    /// hours). None: its source has no other secret, or was read again recently.
    pub(super) async fn replacement_for(
        &self,
        denied: &HeaderValue,
        http: &Arc<UpstreamHttp>,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Deadline,
    ) -> Option<HeaderValue> {
        if repo_ref.rule.credentials.is_none() || !denied.as_bytes().starts_with(b"Basic ") {
            return None;
        }
        let key = grant_key(upstream_ref, repo_ref, &Challenge::Basic);
        let current = self.grants.get(&key).await.and_then(|known| known.header);
        if current.as_ref().is_some_and(|current| current != denied) {
            return current;
        }
        let upstream = (key.rule.clone(), key.upstream.clone());
        if !self.reread.contains_key(&upstream) {
            self.reread.insert(upstream, ()).await;
            self.secrets.refresh(upstream_ref, repo_ref, deadline).await;
        }
        // Also if a request for another repository has already read the new secret.
        self.grants.invalidate(&key).await;
        let found = self.grant(http, upstream_ref, repo_ref, Challenge::Basic, deadline).await;
        found.ok().flatten().filter(|found| found != denied)
    }

    /// The challenge of `GET /v2/`. Concurrent requests share one `lookup`, and its errors are not remembered.
    pub(super) async fn api_challenge(
        &self,
        upstream_ref: UpstreamRef<'_>,
        lookup: impl Future<Output = Result<Option<Challenge>, SourceError>>,
    ) -> Option<Challenge> {
        self.api_challenges.try_get_with(upstream_ref.upstream.to_string(), lookup).await.ok().flatten()
    }

    /// An anonymous token for a registry that the upstream redirected to.
    pub(super) async fn anonymous(
        &self,
        http: &Arc<UpstreamHttp>,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        challenge: &Challenge,
        final_url: &Url,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let Challenge::Bearer { realm, service, scope } = challenge else { return Ok(None) };
        let scopes: Vec<String> = match scope.as_deref().map(str::trim).filter(|scope| !scope.is_empty()) {
            Some(scope) => scope.split_whitespace().map(str::to_owned).collect(),
            None => repository_of(final_url).map(|name| format!("repository:{name}:{PULL}")).into_iter().collect(),
        };
        let key = GrantKey {
            is_redirect_target: true,
            rule: repo_ref.rule.name().to_owned(),
            upstream: final_url.origin().ascii_serialization(),
            realm: realm.to_string(),
            service: service.clone(),
            scope: scopes.join(" "),
        };
        let fetch = fetch_token(http, upstream_ref, challenge, &scopes, None, deadline);
        let granted = timeout_at(deadline, self.grants.try_get_with(key, fetch)).await;
        let granted = granted.map_err(|_| SourceError::Busy)?;
        granted.map(|grant| grant.header).map_err(|error| (*error).clone())
    }

    /// The remembered challenge for a repository.
    pub(super) async fn challenge(&self, upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) -> Option<Challenge> {
        self.challenges.get(&challenge_key(upstream_ref, repo_ref)).await
    }

    pub(super) async fn remember_challenge(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        challenge: Challenge,
    ) {
        self.challenges.insert(challenge_key(upstream_ref, repo_ref), challenge).await;
    }

    /// Exchanges a client's secret for a grant, which is not remembered.
    pub(super) async fn exchange(
        &self,
        http: &UpstreamHttp,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        challenge: &Challenge,
        secret: Secret,
        deadline: Deadline,
    ) -> Result<ExchangedSecret, SourceError> {
        let grant = match challenge {
            // Each request sends the secret itself.
            Challenge::Basic => {
                let header = secret.basic().and_then(|value| sensitive(&value)).ok_or_else(SourceError::denied)?;
                UpstreamGrant { header: Some(header), life: DAY }
            }
            Challenge::Bearer { .. } => {
                let scopes = scopes(upstream_ref, repo_ref, challenge);
                fetch_token(http, upstream_ref, challenge, &scopes, Some(secret), deadline).await?
            }
        };
        Ok(ExchangedSecret { authorization: grant.header, life: grant.life })
    }

    async fn grant(
        &self,
        http: &Arc<UpstreamHttp>,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        challenge: Challenge,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let key = grant_key(upstream_ref, repo_ref, &challenge);
        let (http, repo_ref, upstream) = (http.clone(), repo_ref.clone(), upstream_ref.upstream.clone());
        let (trust, connect_timeout, secrets) =
            (upstream_ref.trust, upstream_ref.connect_timeout, self.secrets.clone());
        // A task of its own: if the first client disconnects, the others still wait for the token.
        let fetch = async move {
            let task = tokio::spawn(trace::carried(async move {
                let upstream_ref = UpstreamRef { upstream: &upstream, trust, tls: &repo_ref.rule.tls, connect_timeout };
                fetch(&http, &secrets, upstream_ref, &repo_ref, &challenge, deadline).await
            }));
            task.await.unwrap_or_else(|e| Err(SourceError::Unreachable(e.to_string())))
        };
        // The shared fetch may have a later deadline than this request.
        let granted = timeout_at(deadline, self.grants.try_get_with(key, fetch)).await;
        let granted = granted.map_err(|_| SourceError::Busy)?;
        granted.map(|grant| grant.header).map_err(|error| (*error).clone())
    }
}

async fn fetch(
    http: &UpstreamHttp,
    secrets: &Secrets,
    upstream_ref: UpstreamRef<'_>,
    repo_ref: &RepositoryRef,
    challenge: &Challenge,
    deadline: Deadline,
) -> Result<UpstreamGrant, SourceError> {
    let was_known = secrets.is_known(upstream_ref, repo_ref);
    let found = secrets.get(upstream_ref, repo_ref, deadline).await?;
    match challenge {
        Challenge::Basic => {
            let header = found.secret.as_ref().and_then(Secret::basic).and_then(|value| sensitive(&value));
            Ok(UpstreamGrant { header, life: found.life })
        }
        Challenge::Bearer { .. } => {
            let scopes = scopes(upstream_ref, repo_ref, challenge);
            let granted = match fetch_token(http, upstream_ref, challenge, &scopes, found.secret, deadline).await {
                // The secret may have been changed or revoked since it was read.
                Err(SourceError::Denied(_)) if was_known => {
                    secrets.forget(upstream_ref, repo_ref).await;
                    let found = secrets.get(upstream_ref, repo_ref, deadline).await?;
                    fetch_token(http, upstream_ref, challenge, &scopes, found.secret, deadline).await
                }
                granted => granted,
            };
            // If clients are authorized one by one, anonymous access is checked again as often as theirs.
            let longest = if repo_ref.rule.is_passthrough() { AUTHORIZATION_TTL } else { DAY };
            granted.map(|grant| UpstreamGrant { life: grant.life.min(longest), ..grant })
        }
    }
}

fn challenge_key(upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef) -> (String, String) {
    (upstream_ref.upstream.to_string(), repo_ref.to_string())
}

fn grant_key(upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef, challenge: &Challenge) -> GrantKey {
    let (realm, service) = match challenge {
        Challenge::Basic => (BASIC.to_owned(), None),
        Challenge::Bearer { realm, service, .. } => (realm.to_string(), service.clone()),
    };
    let scope = match challenge {
        Challenge::Basic => repo_ref.repository.to_string(),
        Challenge::Bearer { .. } => scopes(upstream_ref, repo_ref, challenge).join(" "),
    };
    let (rule, upstream) = (repo_ref.rule.name().to_owned(), upstream_ref.upstream.base());
    GrantKey { is_redirect_target: false, rule, upstream, realm, service, scope }
}

impl Lifetime for UpstreamGrant {
    fn life(&self) -> Duration {
        self.life
    }
}
