//! One request to one upstream: the remembered redirect target and token first, then the response to a challenge.

use ::http::header::WWW_AUTHENTICATE;
use ::http::{HeaderValue, Method};
use reqwest::Response;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::challenge::Challenge;
use super::http::{ReplayableRequest, UpstreamRef};
use super::request::{RequestKind, UpstreamRequest, checked};
use super::{UpstreamClient, UpstreamSession};
use crate::principal::Principal;
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::times::REACH_TIMEOUT;

/// The result of a request to a remembered redirect target.
enum KnownRedirect {
    Response(Response),
    /// No target is remembered.
    Unknown,
    /// The remembered target failed.
    Expired,
}

/// The authentication steps that a request has used. Each is taken at most once.
#[derive(Default)]
struct AuthAttempts {
    /// The last `Authorization` that was sent.
    authorization: Option<HeaderValue>,
    challenge: bool,
    other_secret: bool,
    redirect_target: bool,
}

impl UpstreamClient {
    pub(super) async fn send_once(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let session = self.session(repo_ref);
        let url = request.url(upstream_ref.upstream, repo_ref)?;
        // Held until the upstream's redirect is known: parallel requests then look it up once.
        let mut _lookup = None;
        if request.blob.is_some() {
            match self.send_to_known_redirect(&session, upstream_ref, request, &url, deadline).await {
                KnownRedirect::Response(response) => return Ok(response),
                KnownRedirect::Unknown if !session.redirects.is_redirector(&url) => {}
                KnownRedirect::Unknown | KnownRedirect::Expired => {
                    _lookup = timeout_at(deadline, session.redirects.lock_lookup(&url)).await.ok();
                    if let KnownRedirect::Response(response) =
                        self.send_to_known_redirect(&session, upstream_ref, request, &url, deadline).await
                    {
                        return Ok(response);
                    }
                }
            }
        }
        let authorization = match &repo_ref.principal {
            Principal::Verified(holder) => match &holder.authorization {
                Some(authorization) => Some(authorization.clone()),
                None => {
                    return Err(SourceError::NoCredentials(
                        "the client's credentials could not be exchanged for a token".into(),
                    ));
                }
            },
            Principal::Shared | Principal::Unauthorized | Principal::Anonymous => {
                self.known_grant(upstream_ref, repo_ref, deadline).await
            }
        };
        let (mut target, mut tried) = (url.clone(), AuthAttempts { authorization, ..AuthAttempts::default() });
        loop {
            let replayable = ReplayableRequest {
                method: request.method.clone(),
                url: target.clone(),
                headers: &request.headers,
                authorization: tried.authorization.clone(),
                form: None,
            };
            let (response, final_url) = session.http.follow(upstream_ref, replayable, deadline).await?;
            let is_own = final_url.origin() == url.origin();
            // The headers of a redirect target say nothing about the registry's rate limit.
            if is_own {
                self.rate_limits.update(
                    repo_ref.rule.name(),
                    &upstream_ref.upstream.base(),
                    response.headers(),
                    Instant::now(),
                );
            }
            // A login page is the upstream's denial of an anonymous request, also if it is on another host.
            let is_login = request.may_be_page(&response);
            let grant = match is_own || is_login {
                true => self.own_grant(upstream_ref, repo_ref, request, &response, &mut tried, deadline).await?,
                false => {
                    self.redirect_grant(upstream_ref, repo_ref, &response, &final_url, &mut tried, deadline).await?
                }
            };
            if let Some(grant) = grant {
                tried.authorization = Some(grant);
                target = if is_own || is_login { url.clone() } else { final_url };
                continue;
            }
            if response.status() == 401 && is_own && tried.challenge {
                session.tokens.log_denial(upstream_ref, repo_ref).await;
            }
            if request.blob.is_some() && final_url != url && target == url && response.status().is_success() {
                session.redirects.remember(&url, final_url).await;
            }
            return checked(response, deadline).await;
        }
    }

    /// The `Authorization` to repeat the request with. None: the response is final.
    async fn own_grant(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        request: &UpstreamRequest,
        response: &Response,
        tried: &mut AuthAttempts,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let session = self.session(repo_ref);
        let status = response.status().as_u16();
        if repo_ref.principal.holder().is_some() {
            return Ok(None);
        }
        if status == 403
            && !tried.other_secret
            && let Some(denied) = tried.authorization.clone()
        {
            tried.other_secret = true;
            if let Some(other) =
                session.tokens.replacement_for(&denied, &session.http, upstream_ref, repo_ref, deadline).await
            {
                return Ok(Some(other));
            }
        }
        if tried.challenge {
            return Ok(None);
        }
        let challenge = match challenge(response) {
            Some(challenge) if status == 401 => Some(challenge),
            // Some registries hide content from anonymous clients. `/v2/` shows whether they support authentication.
            _ if (matches!(status, 401 | 403 | 404) || request.may_be_page(response))
                && tried.authorization.is_none()
                && repo_ref.rule.credentials.is_some() =>
            {
                self.api_challenge(upstream_ref, repo_ref, deadline).await
            }
            _ => None,
        };
        let Some(challenge) = challenge else { return Ok(None) };
        tried.challenge = true;
        session
            .tokens
            .grant_for(&session.http, upstream_ref, repo_ref, challenge, tried.authorization.as_ref(), deadline)
            .await
    }

    /// An anonymous token for another registry that the upstream redirected to. The rule's credentials never go there.
    async fn redirect_grant(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        response: &Response,
        final_url: &Url,
        tried: &mut AuthAttempts,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let session = self.session(repo_ref);
        if response.status() != 401 || std::mem::replace(&mut tried.redirect_target, true) {
            return Ok(None);
        }
        match challenge(response) {
            // Not from the upstream's own token endpoint: the redirect target would receive a token for the upstream.
            Some(Challenge::Bearer { realm, .. }) if is_of(&realm, upstream_ref) => Ok(None),
            Some(challenge @ Challenge::Bearer { .. }) => {
                session.tokens.anonymous(&session.http, upstream_ref, repo_ref, &challenge, final_url, deadline).await
            }
            Some(Challenge::Basic) | None => Ok(None),
        }
    }

    /// The challenge of `GET /v2/`. None also if the request fails or exceeds `REACH_TIMEOUT`: the earlier response is
    /// final then.
    async fn api_challenge(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Instant,
    ) -> Option<Challenge> {
        let session = self.session(repo_ref);
        let deadline = deadline.min(Instant::now() + REACH_TIMEOUT);
        let lookup = async {
            let request = UpstreamRequest::ping();
            let url = request.url(upstream_ref.upstream, repo_ref)?;
            let (method, headers) = (Method::GET, &request.headers);
            let replayable = ReplayableRequest { method, url: url.clone(), headers, authorization: None, form: None };
            let (response, final_url) = session.http.follow(upstream_ref, replayable, deadline).await?;
            if response.status().is_server_error() {
                return Err(SourceError::failed(response.status().as_u16()));
            }
            let is_own = final_url.origin() == url.origin();
            Ok(challenge(&response).filter(|_| response.status() == 401 && is_own))
        };
        session.tokens.api_challenge(upstream_ref, lookup).await
    }

    /// The header for the challenge of an earlier request, which saves a 401.
    async fn known_grant(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Instant,
    ) -> Option<HeaderValue> {
        let session = self.session(repo_ref);
        match session.tokens.known_grant(&session.http, upstream_ref, repo_ref, deadline).await {
            Ok(authorization) => authorization,
            Err(error) => {
                tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, %error, "remembered challenge failed");
                session.tokens.forget(upstream_ref, repo_ref).await;
                None
            }
        }
    }

    /// The challenge for pulls from a repository. None: the upstream sends none.
    pub(super) async fn discover_challenge(
        &self,
        upstream_ref: UpstreamRef<'_>,
        repo_ref: &RepositoryRef,
        deadline: Instant,
    ) -> Result<Option<Challenge>, SourceError> {
        let session = self.session(repo_ref);
        let request = UpstreamRequest::new(RequestKind::List, "tags/list".to_owned()).query(Some("n=1"));
        let (url, headers) = (request.url(upstream_ref.upstream, repo_ref)?, &request.headers);
        let replayable =
            ReplayableRequest { method: Method::GET, url: url.clone(), headers, authorization: None, form: None };
        let (response, final_url) = session.http.follow(upstream_ref, replayable, deadline).await?;
        match response.status().as_u16() {
            // A redirect target must not choose where the secret is sent.
            401 if final_url.origin() != url.origin() => Err(SourceError::denied()),
            401 if let Some(challenge) = challenge(&response) => Ok(Some(challenge)),
            200 if !request.may_be_page(&response) => Ok(None),
            200 | 401 | 403 | 404 => Ok(self.api_challenge(upstream_ref, repo_ref, deadline).await),
            429 | 500.. => checked(response, deadline).await.map(|_| None),
            _ => Ok(None),
        }
    }

    /// Sends a request to the remembered redirect target.
    async fn send_to_known_redirect(
        &self,
        session: &UpstreamSession,
        upstream_ref: UpstreamRef<'_>,
        request: &UpstreamRequest,
        url: &Url,
        deadline: Instant,
    ) -> KnownRedirect {
        let Some(target) = session.redirects.target(url).await.filter(|_| request.blob.is_some()) else {
            return KnownRedirect::Unknown;
        };
        let replayable = ReplayableRequest {
            method: request.method.clone(),
            url: target.clone(),
            headers: &request.headers,
            authorization: None,
            form: None,
        };
        let soon = deadline.min(Instant::now() + REACH_TIMEOUT);
        let result = match session.http.send(upstream_ref, &replayable, soon).await {
            Ok(response) => checked(response, soon).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(response) => KnownRedirect::Response(response),
            Err(error) => {
                tracing::debug!(%error, "remembered redirect failed");
                session.redirects.forget_expired(url, &target).await;
                KnownRedirect::Expired
            }
        }
    }
}

fn is_of(url: &Url, upstream_ref: UpstreamRef<'_>) -> bool {
    Url::parse(&upstream_ref.upstream.base()).is_ok_and(|base| base.origin() == url.origin())
}

fn challenge(response: &Response) -> Option<Challenge> {
    Challenge::pick(response.headers().get_all(WWW_AUTHENTICATE).iter().map(HeaderValue::as_bytes))
}
