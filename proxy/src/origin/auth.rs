//! Authorization towards origins: Basic, and Bearer with a token from the realm that the origin
//! names. Tokens are fetched once for all who need one and renewed before they expire.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method};
use serde::Deserialize;
use tokio::time::{Instant as Deadline, timeout_at};
use url::Url;
use url::form_urlencoded::Serializer;

use super::challenge::Challenge;
use super::credentials::Secrets;
use super::http::{Ask, Home, Http, is_redirect, redirect_target};
use super::question::checked;
use crate::lifetimes::{ByLifetime, Lifetime};
use crate::registries::Place;
use crate::secret::Secret;
use crate::source::SourceError;
use crate::trace;

/// Remembered challenges and grants.
pub(super) struct Tokens {
    /// What an upstream asked for, by upstream and repository: saves the 401 next time.
    challenges: moka::future::Cache<(String, String), Challenge>,
    /// What an upstream asks of everybody (`GET /v2/`), by upstream. None: nothing.
    of_api: moka::future::Cache<String, Option<Challenge>>,
    grants: moka::future::Cache<GrantKey, Grant>,
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

/// The value of an `Authorization` header; None where the upstream is asked anonymously.
#[derive(Clone)]
struct Grant {
    header: Option<HeaderValue>,
    life: Duration,
}

/// What a caller's secret opens.
pub struct Exchanged {
    /// What the registry is shown; None: it asks nobody.
    pub authorization: Option<HeaderValue>,
    /// For how long that is good.
    pub life: Duration,
}

/// A token's share of its lifetime during which it is used: it is renewed well before its end.
const USED_PERCENT: u32 = 80;

/// The specification's default where `expires_in` is missing.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);

/// Whatever a token endpoint promises.
pub(super) const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);

/// Where a rule leaves to the registry who may have what, what it grants to anybody is used so long: as long as rights that
/// somebody has shown (`pull/entitlement.rs`).
const LIFE_FOR_ALL: Duration = Duration::from_secs(300);

/// How long `/v2/` of an upstream is not requested again. Longer: a registry that begins to want a login is found out later.
const API_CHALLENGE_TTL: Duration = Duration::from_secs(600);

/// Time for a token endpoint. It sends a few hundred bytes; a request that it has lost must not hold up all others.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Redirects of a token endpoint that are followed, all on its own host.
const MAX_TOKEN_REDIRECTS: usize = 10;

/// What stands for a realm where nobody grants tokens.
const BASIC: &str = "basic";

const PULL: &str = "pull";

const MAX_TOKEN_BYTES: usize = 64 * 1024;

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

impl Grant {
    fn bytes(&self) -> u32 {
        weight(size_of::<Self>() + self.header.as_ref().map_or(0, HeaderValue::len))
    }
}

/// By rule and upstream, for so long.
fn lately(life: Duration) -> moka::future::Cache<(String, String), ()> {
    moka::future::Cache::builder().max_capacity(10_000).time_to_live(life).build()
}

impl Tokens {
    pub(super) fn new() -> Self {
        Self {
            challenges: moka::future::Cache::builder()
                .max_capacity(10_000)
                .time_to_live(Duration::from_secs(3600))
                .build(),
            of_api: moka::future::Cache::builder().max_capacity(10_000).time_to_live(API_CHALLENGE_TTL).build(),
            grants: moka::future::Cache::builder()
                .max_capacity(MAX_GRANTS_BYTES)
                .weigher(|key: &GrantKey, grant: &Grant| key.bytes() + grant.bytes())
                .expire_after(ByLifetime)
                .build(),
            secrets: Secrets::new(),
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
        http: &Arc<Http>,
        home: Home<'_>,
        place: &Place,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        match self.challenges.get(&challenge_key(home, place)).await {
            Some(challenge) => self.grant(http, home, place, challenge, deadline).await,
            None => Ok(None),
        }
    }

    /// Forgets what an upstream asked for: it may have changed its mind.
    pub(super) async fn forget(&self, home: Home<'_>, place: &Place) {
        self.challenges.invalidate(&challenge_key(home, place)).await;
    }

    /// Answers a challenge. `rejected` is the header that the origin has just refused.
    pub(super) async fn answer(
        &self,
        http: &Arc<Http>,
        home: Home<'_>,
        place: &Place,
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
    pub(super) async fn tell_of_refusal(&self, home: Home<'_>, place: &Place) {
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
        http: &Arc<Http>,
        home: Home<'_>,
        place: &Place,
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
        home: Home<'_>,
        ask: impl Future<Output = Result<Option<Challenge>, SourceError>>,
    ) -> Option<Challenge> {
        self.of_api.try_get_with(home.upstream.to_string(), ask).await.ok().flatten()
    }

    /// An anonymous token of a registry to which the upstream has redirected.
    pub(super) async fn anonymous(
        &self,
        http: &Arc<Http>,
        home: Home<'_>,
        place: &Place,
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
    pub(super) async fn challenge(&self, home: Home<'_>, place: &Place) -> Option<Challenge> {
        self.challenges.get(&challenge_key(home, place)).await
    }

    /// Remembers what an upstream asks for.
    pub(super) async fn learn(&self, home: Home<'_>, place: &Place, challenge: Challenge) {
        self.challenges.insert(challenge_key(home, place), challenge).await;
    }

    /// What a caller's secret opens. Nothing of it is remembered here.
    pub(super) async fn exchange(
        &self,
        http: &Http,
        home: Home<'_>,
        place: &Place,
        challenge: &Challenge,
        secret: Secret,
        deadline: Deadline,
    ) -> Result<Exchanged, SourceError> {
        let grant = match challenge {
            // It is the secret itself that is shown, each time.
            Challenge::Basic => {
                let header = secret.basic().and_then(|value| sensitive(&value)).ok_or_else(SourceError::denied)?;
                Grant { header: Some(header), life: MAX_LIFE }
            }
            Challenge::Bearer { .. } => {
                let scopes = scopes(home, place, challenge);
                fetch_token(http, home, challenge, &scopes, Some(secret), deadline).await?
            }
        };
        Ok(Exchanged { authorization: grant.header, life: grant.life })
    }

    async fn grant(
        &self,
        http: &Arc<Http>,
        home: Home<'_>,
        place: &Place,
        challenge: Challenge,
        deadline: Deadline,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let key = grant_key(home, place, &challenge);
        let (http, place, upstream) = (http.clone(), place.clone(), home.upstream.clone());
        let (trust, patience, secrets) = (home.trust, home.patience, self.secrets.clone());
        // A task of its own: the first caller may leave, the others still wait for the token.
        let fetch = async move {
            let task = tokio::spawn(trace::carried(async move {
                let home = Home { upstream: &upstream, trust, tls: &place.rule.tls, patience };
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
    http: &Http,
    secrets: &Secrets,
    home: Home<'_>,
    place: &Place,
    challenge: &Challenge,
    deadline: Deadline,
) -> Result<Grant, SourceError> {
    let was_known = secrets.is_known(home, place);
    let found = secrets.of(home, place, deadline).await?;
    match challenge {
        Challenge::Basic => {
            let header = found.secret.as_ref().and_then(Secret::basic).and_then(|value| sensitive(&value));
            Ok(Grant { header, life: found.life })
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
            let longest = if place.rule.asks_who() { LIFE_FOR_ALL } else { MAX_LIFE };
            granted.map(|grant| Grant { life: grant.life.min(longest), ..grant })
        }
    }
}

async fn fetch_token(
    http: &Http,
    home: Home<'_>,
    challenge: &Challenge,
    scopes: &[String],
    secret: Option<Secret>,
    deadline: Deadline,
) -> Result<Grant, SourceError> {
    let Challenge::Bearer { realm, service, .. } = challenge else {
        return Err(SourceError::denied());
    };
    let deadline = deadline.min(Deadline::now() + TOKEN_TIMEOUT);
    let headers = HeaderMap::new();
    let by_get = {
        let mut url = realm.clone();
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", service);
        }
        for scope in scopes {
            url.query_pairs_mut().append_pair("scope", scope);
        }
        let authorization = secret.as_ref().and_then(Secret::basic).and_then(|value| sensitive(&value));
        Ask { method: Method::GET, url, headers: &headers, authorization, form: None }
    };
    let by_post = |secret: &Secret| {
        let mut form = Serializer::new(String::new());
        form.append_pair("client_id", "dray").append_pair("scope", &scopes.join(" "));
        if let Some(service) = service {
            form.append_pair("service", service);
        }
        match secret {
            Secret::Identity(token) | Secret::Bearer(token) => {
                form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token);
            }
            Secret::Password { username, password } => {
                form.append_pair("grant_type", "password")
                    .append_pair("username", username)
                    .append_pair("password", password);
            }
        }
        let url = realm.clone();
        Ask { method: Method::POST, url, headers: &headers, authorization: None, form: Some(form.finish()) }
    };
    // An identity token can only be posted. A password is sent as GET, which every registry knows;
    // some endpoints only take a POST.
    match &secret {
        Some(Secret::Bearer(token)) => {
            let header = sensitive(&format!("Bearer {token}")).ok_or_else(SourceError::denied)?;
            Ok(Grant { header: Some(header), life: DEFAULT_LIFE })
        }
        Some(secret @ Secret::Identity(_)) => token(http, home, &by_post(secret), deadline).await,
        Some(secret @ Secret::Password { .. }) => match token(http, home, &by_get, deadline).await {
            Err(error) if error.failed_status() == Some(405) => token(http, home, &by_post(secret), deadline).await,
            other => other,
        },
        None => token(http, home, &by_get, deadline).await,
    }
}

/// A token endpoint's response, as leniently as clients read it: a null is a missing value.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    #[serde(default)]
    expires_in: serde_json::Value,
}

impl TokenAnswer {
    fn token(self) -> Option<String> {
        [self.token, self.access_token].into_iter().flatten().find(|token| !token.is_empty())
    }

    /// In seconds. What is no positive number counts as missing.
    fn life(&self) -> Duration {
        let text = self.expires_in.as_str().and_then(|text| text.trim().parse().ok());
        let seconds = self.expires_in.as_f64().or(text).filter(|seconds: &f64| *seconds >= 1.0);
        seconds.map_or(DEFAULT_LIFE, |seconds| Duration::from_secs_f64(seconds.min(MAX_LIFE.as_secs_f64())))
    }
}

async fn token(http: &Http, home: Home<'_>, ask: &Ask<'_>, deadline: Deadline) -> Result<Grant, SourceError> {
    let response = send_within_host(http, home, ask, deadline).await?;
    let response = match checked(response, deadline).await {
        Ok(response) => response,
        // "Not found" would be taken for the image, and 401 for a question to the client.
        Err(SourceError::NotFound(error) | SourceError::Denied(error)) => {
            return Err(SourceError::Denied(error.with_status(403)));
        }
        Err(SourceError::Failed(error)) if error.status == 400 => {
            return Err(SourceError::Denied(error.with_status(403)));
        }
        Err(error) => return Err(error),
    };
    let malformed = |what: &str| SourceError::Malformed(format!("the token endpoint: {what}"));
    let body = super::read_limited(response, MAX_TOKEN_BYTES, deadline, None).await?;
    let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| malformed("no JSON with a token"))?;
    let life = answer.life();
    let token = answer.token().ok_or_else(|| malformed("an empty token"))?;
    let header = sensitive(&format!("Bearer {token}")).ok_or_else(|| malformed("a token that fits no header"))?;
    Ok(Grant { header: Some(header), life: life * USED_PERCENT / 100 })
}

/// Sends a request to a token endpoint and follows its redirects, on the same host only: it carries the secret.
async fn send_within_host(
    http: &Http,
    home: Home<'_>,
    ask: &Ask<'_>,
    deadline: Deadline,
) -> Result<reqwest::Response, SourceError> {
    let mut url = ask.url.clone();
    for _ in 0..=MAX_TOKEN_REDIRECTS {
        let (method, headers) = (ask.method.clone(), ask.headers);
        let (authorization, form) = (ask.authorization.clone(), ask.form.clone());
        let response =
            http.send(home, &Ask { method, url: url.clone(), headers, authorization, form }, deadline).await?;
        if !is_redirect(&response) {
            return Ok(response);
        }
        let target = redirect_target(&url, response.headers())?;
        if target.origin() != url.origin() {
            return Err(SourceError::Malformed("the token endpoint: a redirect to another host".into()));
        }
        url = target;
    }
    Err(SourceError::Malformed("the token endpoint: too many redirects".into()))
}

/// The challenge's scopes, with the one that pulling from this repository needs. A list may need other rights than a
/// pull (ACR: `metadata_read`): the same token is used for both.
fn scopes(home: Home<'_>, place: &Place, challenge: &Challenge) -> Vec<String> {
    let Challenge::Bearer { scope, .. } = challenge else { return Vec::new() };
    let named = format!("repository:{}:", place.repository_at(home.upstream));
    with_pull(&named, scope.as_deref().unwrap_or_default())
}

/// Adds the right to pull to the scopes of a challenge. `named` is `repository:<name>:`.
fn with_pull(named: &str, scope: &str) -> Vec<String> {
    let mut scopes: Vec<String> = scope.split_whitespace().map(str::to_owned).collect();
    if scopes.is_empty() {
        return vec![format!("{named}{PULL}")];
    }
    for scope in &mut scopes {
        if let Some(actions) = scope.strip_prefix(named)
            && !actions.split(',').any(|action| action == PULL)
        {
            *scope = format!("{named}{actions},{PULL}");
        }
    }
    scopes
}

/// The repository that a URL of the registry API is about.
fn repository_of(url: &Url) -> Option<&str> {
    let below = url.path().strip_prefix("/v2/")?;
    ["/manifests/", "/blobs/", "/tags/", "/referrers/"]
        .iter()
        .find_map(|part| below.rsplit_once(part))
        .map(|(name, _)| name)
}

fn challenge_key(home: Home<'_>, place: &Place) -> (String, String) {
    (home.upstream.to_string(), place.to_string())
}

fn grant_key(home: Home<'_>, place: &Place, challenge: &Challenge) -> GrantKey {
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

fn sensitive(value: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(value).ok()?;
    header.set_sensitive(true);
    Some(header)
}

impl Lifetime for Grant {
    fn life(&self) -> Duration {
        self.life
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(json: &str) -> (Option<String>, u64) {
        let answer: TokenAnswer = serde_json::from_str(json).unwrap();
        let life = answer.life().as_secs();
        (answer.token(), life)
    }

    #[test]
    fn token_response_is_read_leniently() {
        for (json, token, life) in [
            (r#"{"token": "t", "expires_in": 300}"#, Some("t"), 300),
            (r#"{"token": null, "access_token": "a"}"#, Some("a"), 60),
            (r#"{"token": "t", "access_token": null, "expires_in": null}"#, Some("t"), 60),
            (r#"{"token": "", "access_token": "a", "expires_in": -1}"#, Some("a"), 60),
            (r#"{"token": "t", "expires_in": 0}"#, Some("t"), 60),
            (r#"{"token": "t", "expires_in": "120"}"#, Some("t"), 120),
            (r#"{"token": "t", "expires_in": 90.5}"#, Some("t"), 90),
            (r#"{"token": "t", "expires_in": 1e300}"#, Some("t"), 24 * 3600),
            (r#"{"token": null, "access_token": null}"#, None, 60),
        ] {
            assert_eq!(answer(json), (token.map(str::to_owned), life), "{json}");
        }
    }

    #[test]
    fn scopes_of_a_challenge_stay_several() {
        let scopes = |scope: &str| with_pull("repository:a/b:", scope);
        assert_eq!(scopes(""), ["repository:a/b:pull"]);
        assert_eq!(scopes("repository:a/b:metadata_read"), ["repository:a/b:metadata_read,pull"]);
        let several = ["repository:a/b:pull,push", "repository:c/d:pull", "aws"];
        assert_eq!(scopes(&several.join(" ")), several);
    }

    #[test]
    fn repository_of_a_url_is_found() {
        let of = |url: &str| repository_of(&Url::parse(url).unwrap()).map(str::to_owned);
        assert_eq!(of("https://ghcr.io/v2/team/app/manifests/1").as_deref(), Some("team/app"));
        assert_eq!(of("https://ghcr.io/v2/a/blobs/sha256:00?x=y").as_deref(), Some("a"));
        assert_eq!(of("https://cdn.io/x"), None);
    }
}
