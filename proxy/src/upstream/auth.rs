//! Authorization towards origins: Basic, and Bearer with a token from the realm that the origin
//! names. Tokens are fetched once for all who need one and renewed before they expire.

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
use crate::times::{DAY, OBSERVATION_TTL, RIGHTS_TTL};
use crate::trace;

/// Remembered challenges and grants.
pub(super) struct TokenCache {
    /// What an upstream asked for, by upstream and repository: saves the 401 next time.
    challenges: moka::future::Cache<(String, String), Challenge>,
    /// What an upstream asks of everybody (`GET /v2/`), by upstream. None: nothing.
    of_api: moka::future::Cache<String, Option<Challenge>>,
    grants: moka::future::Cache<GrantKey, UpstreamGrant>,
    secrets: Secrets,
    /// Whose secret was read again since it was refused with 403: what it may not have is no reason to read it each time.
    looked_again: moka::future::Cache<(String, String), ()>,
    /// Of whose refusal the log has told.
    told: moka::future::Cache<(String, String), ()>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct GrantKey {
    /// Of a registry that the upstream has redirected to: the rule's own grants are never shown there.
    is_strangers: bool,
    rule: String,
    upstream: String,
    realm: String,
    service: Option<String>,
    scope: String,
}

/// What a caller's secret opens.
pub struct ExchangedSecret {
    /// What the registry is shown; None: it asks nobody.
    pub authorization: Option<HeaderValue>,
    /// For how long that is good.
    pub life: Duration,
}

/// What stands for a realm where nobody grants tokens.
const BASIC: &str = "basic";

/// All tokens that are remembered: most have one or two KiB.
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

/// By rule and upstream, for so long.
fn lately(life: Duration) -> moka::future::Cache<(String, String), ()> {
    moka::future::Cache::builder().max_capacity(10_000).time_to_live(life).build()
}

impl TokenCache {
    pub(super) fn new(outside: ExternalCredentials) -> Self {
        Self {
            challenges: moka::future::Cache::builder()
                .max_capacity(10_000)
                .time_to_live(Duration::from_secs(3600))
                .build(),
            of_api: moka::future::Cache::builder().max_capacity(10_000).time_to_live(OBSERVATION_TTL).build(),
            grants: moka::future::Cache::builder()
                .max_capacity(MAX_GRANTS_BYTES)
                .weigher(|key: &GrantKey, grant: &UpstreamGrant| key.bytes() + grant.bytes())
                .expire_after(ByLifetime)
                .build(),
            secrets: Secrets::new(outside),
            looked_again: lately(Duration::from_secs(60)),
            told: lately(Duration::from_secs(600)),
        }
    }

    /// How many tokens each rule has of each upstream.
    pub(super) fn counts(&self) -> HashMap<(String, String), usize> {
        let mut counts = HashMap::new();
        for (key, grant) in &self.grants {
            if grant.header.is_some() && key.realm != BASIC {
                *counts.entry((key.rule.clone(), key.upstream.clone())).or_default() += 1;
            }
        }
        counts
    }

    /// The header to send at once, where an earlier request learned what is asked for.
    pub(super) async fn known(
        &self,
        http: &Arc<UpstreamHttp>,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        match self.challenges.get(&challenge_key(home, place)).await {
            Some(challenge) => self.grant(http, home, place, challenge, deadline).await,
            None => Ok(None),
        }
    }

    /// Forgets what an upstream asked for: it may have changed its mind.
    pub(super) async fn forget(&self, home: UpstreamRef<'_>, place: &RepositoryRef) {
        self.challenges.invalidate(&challenge_key(home, place)).await;
    }

    /// Answers a challenge. `rejected` is the header that the origin has just refused.
    pub(super) async fn answer(
        &self,
        http: &Arc<UpstreamHttp>,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        challenge: Challenge,
        rejected: Option<&HeaderValue>,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let key = grant_key(home, place, &challenge);
        if let Some(known) = self.grants.get(&key).await
            && rejected.is_some()
            && known.header.as_ref() == rejected
        {
            self.grants.invalidate(&key).await;
            // It may come from a secret that was changed.
            self.secrets.forget(home, place).await;
        }
        self.challenges.insert(challenge_key(home, place), challenge.clone()).await;
        let granted = self.grant(http, home, place, challenge, deadline).await;
        if granted.as_ref().is_err_and(SourceError::is_denied) {
            self.tell_of_refusal(home, place).await;
        }
        granted
    }

    /// Who wrote a wrong password finds out by the log.
    pub(super) async fn tell_of_refusal(&self, home: UpstreamRef<'_>, place: &RepositoryRef) {
        let (rule, upstream) = (place.rule.name().to_owned(), home.upstream.base());
        let key = (rule.clone(), upstream.clone());
        if place.rule.credentials.is_some() && !self.told.contains_key(&key) {
            self.told.insert(key, ()).await;
            tracing::warn!(
                rule,
                upstream,
                "a registry refuses the credentials of its rule, or what is asked for with them"
            );
        }
    }

    /// What to show instead of a secret that was refused with 403, as some registries do when it has ended (ECR's after
    /// twelve hours). None: there is nothing else, or that was looked for lately.
    pub(super) async fn instead_of(
        &self,
        refused: &HeaderValue,
        http: &Arc<UpstreamHttp>,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Deadline,
    ) -> Option<HeaderValue> {
        if place.rule.credentials.is_none() || !refused.as_bytes().starts_with(b"Basic ") {
            return None;
        }
        let key = grant_key(home, place, &Challenge::Basic);
        let shown = self.grants.get(&key).await.and_then(|known| known.header);
        if shown.as_ref().is_some_and(|shown| shown != refused) {
            return shown;
        }
        let upstream = (key.rule.clone(), key.upstream.clone());
        if !self.looked_again.contains_key(&upstream) {
            self.looked_again.insert(upstream, ()).await;
            self.secrets.look_again(home, place, deadline).await;
        }
        // For this repository as well, where another one's question has found another secret.
        self.grants.invalidate(&key).await;
        let found = self.grant(http, home, place, Challenge::Basic, deadline).await;
        found.ok().flatten().filter(|found| found != refused)
    }

    /// What an upstream asks of everybody: `ask` finds out, once for all who need it. An error is not remembered.
    pub(super) async fn challenge_of_api(
        &self,
        home: UpstreamRef<'_>,
        ask: impl Future<Output = Result<Option<Challenge>, SourceError>>,
    ) -> Option<Challenge> {
        self.of_api.try_get_with(home.upstream.to_string(), ask).await.ok().flatten()
    }

    /// An anonymous token of a registry to which the upstream has redirected.
    pub(super) async fn anonymous(
        &self,
        http: &Arc<UpstreamHttp>,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        challenge: &Challenge,
        answered_by: &Url,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let Challenge::Bearer { realm, service, scope } = challenge else { return Ok(None) };
        let scopes: Vec<String> = match scope.as_deref().map(str::trim).filter(|scope| !scope.is_empty()) {
            Some(scope) => scope.split_whitespace().map(str::to_owned).collect(),
            None => repository_of(answered_by).map(|name| format!("repository:{name}:{PULL}")).into_iter().collect(),
        };
        let key = GrantKey {
            is_strangers: true,
            rule: place.rule.name().to_owned(),
            upstream: answered_by.origin().ascii_serialization(),
            realm: realm.to_string(),
            service: service.clone(),
            scope: scopes.join(" "),
        };
        let fetch = fetch_token(http, home, challenge, &scopes, None, deadline);
        let granted = timeout_at(deadline, self.grants.try_get_with(key, fetch)).await;
        let granted = granted.map_err(|_| SourceError::Busy)?;
        granted.map(|grant| grant.header).map_err(|error| (*error).clone())
    }

    /// What an upstream asked for, if that is known.
    pub(super) async fn challenge(&self, home: UpstreamRef<'_>, place: &RepositoryRef) -> Option<Challenge> {
        self.challenges.get(&challenge_key(home, place)).await
    }

    /// Remembers what an upstream asks for.
    pub(super) async fn learn(&self, home: UpstreamRef<'_>, place: &RepositoryRef, challenge: Challenge) {
        self.challenges.insert(challenge_key(home, place), challenge).await;
    }

    /// What a caller's secret opens. Nothing of it is remembered here.
    pub(super) async fn exchange(
        &self,
        http: &UpstreamHttp,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        challenge: &Challenge,
        secret: Secret,
        deadline: Deadline,
    ) -> Result<ExchangedSecret, SourceError> {
        let grant = match challenge {
            // It is the secret itself that is shown, each time.
            Challenge::Basic => {
                let header = secret.basic().and_then(|value| sensitive(&value)).ok_or_else(SourceError::denied)?;
                UpstreamGrant { header: Some(header), life: DAY }
            }
            Challenge::Bearer { .. } => {
                let scopes = scopes(home, place, challenge);
                fetch_token(http, home, challenge, &scopes, Some(secret), deadline).await?
            }
        };
        Ok(ExchangedSecret { authorization: grant.header, life: grant.life })
    }

    async fn grant(
        &self,
        http: &Arc<UpstreamHttp>,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        challenge: Challenge,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let key = grant_key(home, place, &challenge);
        let (http, place, upstream) = (http.clone(), place.clone(), home.upstream.clone());
        let (trust, patience, secrets) = (home.trust, home.patience, self.secrets.clone());
        // A task of its own: the first caller may leave, the others still wait for the token.
        let fetch = async move {
            let task = tokio::spawn(trace::carried(async move {
                let home = UpstreamRef { upstream: &upstream, trust, tls: &place.rule.tls, patience };
                fetch(&http, &secrets, home, &place, &challenge, deadline).await
            }));
            task.await.unwrap_or_else(|e| Err(SourceError::Unreachable(e.to_string())))
        };
        // Somebody else's fetch may have more time than this one.
        let granted = timeout_at(deadline, self.grants.try_get_with(key, fetch)).await;
        let granted = granted.map_err(|_| SourceError::Busy)?;
        granted.map(|grant| grant.header).map_err(|error| (*error).clone())
    }
}

async fn fetch(
    http: &UpstreamHttp,
    secrets: &Secrets,
    home: UpstreamRef<'_>,
    place: &RepositoryRef,
    challenge: &Challenge,
    deadline: Deadline,
) -> Result<UpstreamGrant, SourceError> {
    let was_known = secrets.is_known(home, place);
    let found = secrets.of(home, place, deadline).await?;
    match challenge {
        Challenge::Basic => {
            let header = found.secret.as_ref().and_then(Secret::basic).and_then(|value| sensitive(&value));
            Ok(UpstreamGrant { header, life: found.life })
        }
        Challenge::Bearer { .. } => {
            let scopes = scopes(home, place, challenge);
            let granted = match fetch_token(http, home, challenge, &scopes, found.secret, deadline).await {
                // It may have been changed or revoked since it was read.
                Err(SourceError::Denied(_)) if was_known => {
                    secrets.forget(home, place).await;
                    let found = secrets.of(home, place, deadline).await?;
                    fetch_token(http, home, challenge, &scopes, found.secret, deadline).await
                }
                granted => granted,
            };
            // What everybody may have today is looked at again as soon as what somebody may.
            let longest = if place.rule.asks_who() { RIGHTS_TTL } else { DAY };
            granted.map(|grant| UpstreamGrant { life: grant.life.min(longest), ..grant })
        }
    }
}

fn challenge_key(home: UpstreamRef<'_>, place: &RepositoryRef) -> (String, String) {
    (home.upstream.to_string(), place.to_string())
}

fn grant_key(home: UpstreamRef<'_>, place: &RepositoryRef, challenge: &Challenge) -> GrantKey {
    let (realm, service) = match challenge {
        Challenge::Basic => (BASIC.to_owned(), None),
        Challenge::Bearer { realm, service, .. } => (realm.to_string(), service.clone()),
    };
    let scope = match challenge {
        Challenge::Basic => place.repository.to_string(),
        Challenge::Bearer { .. } => scopes(home, place, challenge).join(" "),
    };
    let (rule, upstream) = (place.rule.name().to_owned(), home.upstream.base());
    GrantKey { is_strangers: false, rule, upstream, realm, service, scope }
}

impl Lifetime for UpstreamGrant {
    fn life(&self) -> Duration {
        self.life
    }
}
