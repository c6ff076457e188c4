//! Token endpoints: a challenge is exchanged for a token (the distribution project's token specification).

use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method};
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;
use url::form_urlencoded::Serializer;

use super::challenge::Challenge;
use super::http::{ReplayableRequest, UpstreamHttp, UpstreamRef, is_redirect, redirect_target};
use super::read_limited;
use super::request::checked;
use crate::registries::RepositoryRef;
use crate::secret::Secret;
use crate::source::SourceError;
use crate::times::{DAY, DEFAULT_TTL, STALL_TIMEOUT};

/// The value of an `Authorization` header. None: requests are anonymous.
#[derive(Clone)]
pub(super) struct UpstreamGrant {
    pub(super) header: Option<HeaderValue>,
    pub(super) life: Duration,
}

/// Share of its lifetime in which a token is used. More: a token may expire before the upstream checks it. Less: more
/// token requests.
const USED_PERCENT: u32 = 80;

/// Redirects of a token endpoint that are followed, all on its own host. More: redirect loops last longer.
const MAX_TOKEN_REDIRECTS: usize = 10;

pub(super) const PULL: &str = "pull";

/// Largest response of a token endpoint. Larger: more memory. Smaller: large tokens are an error.
const MAX_TOKEN_BYTES: usize = 64 * 1024;

/// A token for these scopes; without a secret an anonymous one.
pub(super) async fn fetch_token(
    http: &UpstreamHttp,
    upstream_ref: UpstreamRef<'_>,
    challenge: &Challenge,
    scopes: &[String],
    secret: Option<Secret>,
    deadline: Instant,
) -> Result<UpstreamGrant, SourceError> {
    let Challenge::Bearer { realm, service, .. } = challenge else {
        return Err(SourceError::denied());
    };
    let deadline = deadline.min(Instant::now() + STALL_TIMEOUT);
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
        ReplayableRequest { method: Method::GET, url, headers: &headers, authorization, form: None }
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
        ReplayableRequest {
            method: Method::POST,
            url,
            headers: &headers,
            authorization: None,
            form: Some(form.finish()),
        }
    };
    // An identity token can only be sent by POST. A password is sent by GET, which every registry supports, and by POST
    // if the endpoint requires it.
    match &secret {
        Some(Secret::Bearer(token)) => {
            let header = sensitive(&format!("Bearer {token}")).ok_or_else(SourceError::denied)?;
            Ok(UpstreamGrant { header: Some(header), life: DEFAULT_TTL })
        }
        Some(secret @ Secret::Identity(_)) => token(http, upstream_ref, &by_post(secret), deadline).await,
        Some(secret @ Secret::Password { .. }) => match token(http, upstream_ref, &by_get, deadline).await {
            Err(error) if error.failed_status() == Some(405) => {
                token(http, upstream_ref, &by_post(secret), deadline).await
            }
            other => other,
        },
        None => token(http, upstream_ref, &by_get, deadline).await,
    }
}

/// A token endpoint's response, as leniently as clients parse it: a null is a missing value.
#[derive(Deserialize)]
struct TokenResponse {
    token: Option<String>,
    access_token: Option<String>,
    #[serde(default)]
    expires_in: serde_json::Value,
}

impl TokenResponse {
    fn token(self) -> Option<String> {
        [self.token, self.access_token].into_iter().flatten().find(|token| !token.is_empty())
    }

    /// `expires_in` is in seconds. A value that is not a number of at least 1 counts as missing.
    fn life(&self) -> Duration {
        let text = self.expires_in.as_str().and_then(|text| text.trim().parse().ok());
        let seconds = self.expires_in.as_f64().or(text).filter(|seconds: &f64| *seconds >= 1.0);
        seconds.map_or(DEFAULT_TTL, |seconds| Duration::from_secs_f64(seconds.min(DAY.as_secs_f64())))
    }
}

async fn token(
    http: &UpstreamHttp,
    upstream_ref: UpstreamRef<'_>,
    replayable: &ReplayableRequest<'_>,
    deadline: Instant,
) -> Result<UpstreamGrant, SourceError> {
    let response = send_within_host(http, upstream_ref, replayable, deadline).await?;
    let response = match checked(response, deadline).await {
        Ok(response) => response,
        // A 404 would mean a missing image to the client, and a 401 a request for credentials.
        Err(SourceError::NotFound(error) | SourceError::Denied(error)) => {
            return Err(SourceError::Denied(error.with_status(403)));
        }
        Err(SourceError::Failed(error)) if error.status == 400 => {
            return Err(SourceError::Denied(error.with_status(403)));
        }
        Err(error) => return Err(error),
    };
    let malformed = |what: &str| SourceError::Malformed(format!("the token endpoint: {what}"));
    let body = read_limited(response, MAX_TOKEN_BYTES, deadline, None).await?;
    let response: TokenResponse =
        serde_json::from_slice(&body).map_err(|_| malformed("the response is not JSON with a token"))?;
    let life = response.life();
    let token = response.token().ok_or_else(|| malformed("the response has no token"))?;
    let header =
        sensitive(&format!("Bearer {token}")).ok_or_else(|| malformed("the token is not a valid header value"))?;
    Ok(UpstreamGrant { header: Some(header), life: life * USED_PERCENT / 100 })
}

/// Sends a request to a token endpoint and follows its redirects, only on the same host because it carries the secret.
async fn send_within_host(
    http: &UpstreamHttp,
    upstream_ref: UpstreamRef<'_>,
    replayable: &ReplayableRequest<'_>,
    deadline: Instant,
) -> Result<reqwest::Response, SourceError> {
    let mut url = replayable.url.clone();
    for _ in 0..=MAX_TOKEN_REDIRECTS {
        let (method, headers) = (replayable.method.clone(), replayable.headers);
        let (authorization, form) = (replayable.authorization.clone(), replayable.form.clone());
        let response = http
            .send(upstream_ref, &ReplayableRequest { method, url: url.clone(), headers, authorization, form }, deadline)
            .await?;
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

/// The challenge's scopes, with pull access to this repository. A list may need other actions than a pull (ACR:
/// `metadata_read`), and one token serves both.
pub(super) fn scopes(upstream_ref: UpstreamRef<'_>, repo_ref: &RepositoryRef, challenge: &Challenge) -> Vec<String> {
    let Challenge::Bearer { scope, .. } = challenge else { return Vec::new() };
    let named = format!("repository:{}:", repo_ref.repository_at(upstream_ref.upstream));
    with_pull(&named, scope.as_deref().unwrap_or_default())
}

/// Adds the pull action to the scopes of a challenge. `named` is `repository:<name>:`.
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

/// The repository in a URL of the registry API.
pub(super) fn repository_of(url: &Url) -> Option<&str> {
    let below = url.path().strip_prefix("/v2/")?;
    ["/manifests/", "/blobs/", "/tags/", "/referrers/"]
        .iter()
        .find_map(|part| below.rsplit_once(part))
        .map(|(name, _)| name)
}

/// A header value that logs do not show.
pub(super) fn sensitive(value: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(value).ok()?;
    header.set_sensitive(true);
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> (Option<String>, u64) {
        let response: TokenResponse = serde_json::from_str(json).unwrap();
        let life = response.life().as_secs();
        (response.token(), life)
    }

    #[test]
    fn token_response_is_parsed_leniently() {
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
            assert_eq!(parse(json), (token.map(str::to_owned), life), "{json}");
        }
    }

    #[test]
    fn challenge_scopes_are_kept() {
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
