//! One question to one upstream: where the blob was last time, with the token that was granted last time, and what
//! the upstream asks for beyond that.

use ::http::header::WWW_AUTHENTICATE;
use ::http::{HeaderValue, Method};
use reqwest::Response;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::UpstreamClient;
use super::challenge::Challenge;
use super::http::{ReplayableRequest, UpstreamRef};
use super::request::{RequestKind, UpstreamRequest, checked};
use crate::principal::Principal;
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::times::REACH_TIMEOUT;

/// What came of asking where an earlier redirect led.
enum KnownRedirect {
    Answered(Response),
    /// None is known.
    Nothing,
    /// It did not lead there any more.
    Expired,
}

/// What of authentication a question has used: each way is taken once.
#[derive(Default)]
struct AuthAttempts {
    /// What was shown last.
    shown: Option<HeaderValue>,
    challenge: bool,
    other_secret: bool,
    stranger: bool,
}

impl UpstreamClient {
    pub(super) async fn ask_once(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let url = question.url(home.upstream, place)?;
        // Held until the registry has told where the blob is now.
        let mut _turn = None;
        if question.blob.is_some() {
            match self.ask_remembered(home, question, &url, deadline).await {
                KnownRedirect::Answered(response) => return Ok(response),
                KnownRedirect::Nothing if !self.redirects.is_redirector(&url) => {}
                KnownRedirect::Nothing | KnownRedirect::Expired => {
                    _turn = timeout_at(deadline, self.redirects.turn(&url)).await.ok();
                    if let KnownRedirect::Answered(response) = self.ask_remembered(home, question, &url, deadline).await
                    {
                        return Ok(response);
                    }
                }
            }
        }
        let shown = match &place.caller {
            Principal::Holder(holder) => match &holder.authorization {
                Some(authorization) => Some(authorization.clone()),
                None => return Err(SourceError::NoCredentials("the caller's could not be exchanged".into())),
            },
            Principal::Everyone | Principal::Unknown | Principal::Anonymous => self.known(home, place, deadline).await,
        };
        let (mut target, mut tried) = (url.clone(), AuthAttempts { shown, ..AuthAttempts::default() });
        loop {
            let ask = ReplayableRequest {
                method: question.method.clone(),
                url: target.clone(),
                headers: &question.headers,
                authorization: tried.shown.clone(),
                form: None,
            };
            let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
            let is_own = answered_by.origin() == url.origin();
            // A redirect's target says nothing of the registry's limits.
            if is_own {
                self.scarcity.heard(place.rule.name(), &home.upstream.base(), response.headers(), Instant::now());
            }
            // A login of the upstream's, wherever it stands, where a stranger asks for content.
            let is_login = question.may_be_page(&response);
            let grant = match is_own || is_login {
                true => self.own_grant(home, place, question, &response, &mut tried, deadline).await?,
                false => self.strangers_grant(home, place, &response, &answered_by, &mut tried, deadline).await?,
            };
            if let Some(grant) = grant {
                tried.shown = Some(grant);
                target = if is_own || is_login { url.clone() } else { answered_by };
                continue;
            }
            if response.status() == 401 && is_own && tried.challenge {
                self.tokens.tell_of_refusal(home, place).await;
            }
            if question.blob.is_some() && answered_by != url && target == url && response.status().is_success() {
                self.redirects.remember(&url, answered_by).await;
            }
            return checked(response, deadline).await;
        }
    }

    /// What to show to the upstream after this response. None: the response stands.
    async fn own_grant(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        question: &UpstreamRequest,
        response: &Response,
        tried: &mut AuthAttempts,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, SourceError> {
        let status = response.status().as_u16();
        if place.caller.holder().is_some() {
            return Ok(None);
        }
        if status == 403
            && !tried.other_secret
            && let Some(refused) = tried.shown.clone()
        {
            tried.other_secret = true;
            if let Some(other) = self.tokens.instead_of(&refused, &self.http, home, place, deadline).await {
                return Ok(Some(other));
            }
        }
        if tried.challenge {
            return Ok(None);
        }
        let challenge = match challenge(response) {
            Some(challenge) if status == 401 => Some(challenge),
            // Registries that hide from strangers what they have: `/v2/` tells whether they know anybody.
            _ if (matches!(status, 401 | 403 | 404) || question.may_be_page(response))
                && tried.shown.is_none()
                && place.rule.credentials.is_some() =>
            {
                self.challenge_of_api(home, place, deadline).await
            }
            _ => None,
        };
        let Some(challenge) = challenge else { return Ok(None) };
        tried.challenge = true;
        self.tokens.answer(&self.http, home, place, challenge, tried.shown.as_ref(), deadline).await
    }

    /// An anonymous token of another registry to which the upstream has redirected. The rule's credentials never go there.
    async fn strangers_grant(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        response: &Response,
        answered_by: &Url,
        tried: &mut AuthAttempts,
        deadline: Instant,
    ) -> Result<Option<HeaderValue>, SourceError> {
        if response.status() != 401 || std::mem::replace(&mut tried.stranger, true) {
            return Ok(None);
        }
        match challenge(response) {
            // The upstream's own token endpoint grants nothing for others, who could be shown what it gives to this host.
            Some(Challenge::Bearer { realm, .. }) if is_of(&realm, home) => Ok(None),
            Some(challenge @ Challenge::Bearer { .. }) => {
                self.tokens.anonymous(&self.http, home, place, &challenge, answered_by, deadline).await
            }
            Some(Challenge::Basic) | None => Ok(None),
        }
    }

    /// What the upstream asks of everybody who wants to use its API. None also where that cannot be found out soon: the
    /// response that led here stands.
    async fn challenge_of_api(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Instant,
    ) -> Option<Challenge> {
        let deadline = deadline.min(Instant::now() + REACH_TIMEOUT);
        let ask = async {
            let question = UpstreamRequest::is_anybody_there();
            let url = question.url(home.upstream, place)?;
            let (method, headers) = (Method::GET, &question.headers);
            let ask = ReplayableRequest { method, url: url.clone(), headers, authorization: None, form: None };
            let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
            if response.status().is_server_error() {
                return Err(SourceError::failed(response.status().as_u16()));
            }
            let is_own = answered_by.origin() == url.origin();
            Ok(challenge(&response).filter(|_| response.status() == 401 && is_own))
        };
        self.tokens.challenge_of_api(home, ask).await
    }

    /// What is shown at once, where an earlier question learned what is asked for.
    async fn known(&self, home: UpstreamRef<'_>, place: &RepositoryRef, deadline: Instant) -> Option<HeaderValue> {
        match self.tokens.known(&self.http, home, place, deadline).await {
            Ok(authorization) => authorization,
            Err(error) => {
                tracing::debug!(%place, %error, "the remembered challenge leads nowhere, asking anew");
                self.tokens.forget(home, place).await;
                None
            }
        }
    }

    /// What an upstream asks of whoever pulls from a repository. None: nothing.
    pub(super) async fn ask_for_challenge(
        &self,
        home: UpstreamRef<'_>,
        place: &RepositoryRef,
        deadline: Instant,
    ) -> Result<Option<Challenge>, SourceError> {
        let question = UpstreamRequest::new(RequestKind::List, "tags/list".to_owned()).query(Some("n=1"));
        let (url, headers) = (question.url(home.upstream, place)?, &question.headers);
        let ask = ReplayableRequest { method: Method::GET, url: url.clone(), headers, authorization: None, form: None };
        let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
        match response.status().as_u16() {
            // The target of a redirect must not say where the secret goes.
            401 if answered_by.origin() != url.origin() => Err(SourceError::denied()),
            401 if let Some(challenge) = challenge(&response) => Ok(Some(challenge)),
            200 if !question.may_be_page(&response) => Ok(None),
            200 | 401 | 403 | 404 => Ok(self.challenge_of_api(home, place, deadline).await),
            429 | 500.. => checked(response, deadline).await.map(|_| None),
            _ => Ok(None),
        }
    }

    /// Asks where an earlier redirect led.
    async fn ask_remembered(
        &self,
        home: UpstreamRef<'_>,
        question: &UpstreamRequest,
        url: &Url,
        deadline: Instant,
    ) -> KnownRedirect {
        let Some(target) = self.redirects.target(url).await.filter(|_| question.blob.is_some()) else {
            return KnownRedirect::Nothing;
        };
        let ask = ReplayableRequest {
            method: question.method.clone(),
            url: target.clone(),
            headers: &question.headers,
            authorization: None,
            form: None,
        };
        let soon = deadline.min(Instant::now() + REACH_TIMEOUT);
        let answer = match self.http.send(home, &ask, soon).await {
            Ok(response) => checked(response, soon).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(response) => KnownRedirect::Answered(response),
            Err(error) => {
                tracing::debug!(%error, "a remembered redirect no longer works");
                self.redirects.expired(url, &target).await;
                KnownRedirect::Expired
            }
        }
    }
}

fn is_of(url: &Url, home: UpstreamRef<'_>) -> bool {
    Url::parse(&home.upstream.base()).is_ok_and(|base| base.origin() == url.origin())
}

fn challenge(response: &Response) -> Option<Challenge> {
    Challenge::pick(response.headers().get_all(WWW_AUTHENTICATE).iter().map(HeaderValue::as_bytes))
}
