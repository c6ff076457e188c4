//! One question to one upstream: where the blob was last time, with the token that was granted last time, and what
//! the upstream asks for beyond that.

use ::http::header::WWW_AUTHENTICATE;
use ::http::{HeaderValue, Method};
use reqwest::Response;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::Origin;
use super::asking::OTHERS_FOLLOW;
use super::challenge::Challenge;
use super::http::{Ask, Home};
use super::question::{Kind, Question, checked};
use crate::caller::Caller;
use crate::registries::Place;
use crate::source::SourceError;

/// What came of asking where an earlier redirect led.
enum Remembered {
    Answered(Response),
    /// None is known.
    Nothing,
    /// It did not lead there any more.
    Expired,
}

impl Origin {
    pub(super) async fn ask_once(
        &self,
        home: Home<'_>,
        place: &Place,
        question: &Question,
        deadline: Instant,
    ) -> Result<Response, SourceError> {
        let url = question.url(home.upstream, place)?;
        // Held until the registry has told where the blob is now.
        let mut _turn = None;
        if question.blob.is_some() {
            match self.ask_remembered(home, question, &url, deadline).await {
                Remembered::Answered(response) => return Ok(response),
                Remembered::Nothing if !self.redirects.is_redirector(&url) => {}
                Remembered::Nothing | Remembered::Expired => {
                    _turn = timeout_at(deadline, self.redirects.turn(&url)).await.ok();
                    if let Remembered::Answered(response) = self.ask_remembered(home, question, &url, deadline).await {
                        return Ok(response);
                    }
                }
            }
        }
        let mut authorization = match &place.caller {
            Caller::Holder(holder) => match &holder.authorization {
                Some(authorization) => Some(authorization.clone()),
                None => return Err(SourceError::NoCredentials("the caller's could not be exchanged".into())),
            },
            Caller::Everyone | Caller::Unknown | Caller::Anonymous => self.known(home, place, deadline).await,
        };
        for last_try in [false, true] {
            let ask = Ask {
                method: question.method.clone(),
                url: url.clone(),
                headers: &question.headers,
                authorization: authorization.clone(),
                form: None,
            };
            let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
            let (status, is_own) = (response.status().as_u16(), answered_by == url);
            // A redirect's target says nothing of the registry's limits.
            if is_own {
                self.scarcity.heard(place.rule.name(), &home.upstream.base(), response.headers(), Instant::now());
            }
            // Only the upstream itself is given credentials, never the target of its redirect.
            let challenged = status == 401 && is_own && !last_try;
            if challenged && place.caller.holder().is_some() {
                return Err(SourceError::Denied);
            }
            let may_have_ended = status == 403 && is_own && !last_try;
            if may_have_ended
                && let Some(refused) = &authorization
                && let Some(other) = self.tokens.instead_of(refused, &self.http, home, place, deadline).await
            {
                authorization = Some(other);
                continue;
            }
            if status == 401 && is_own && last_try {
                self.tokens.tell_of_refusal(home, place).await;
            }
            if !challenged {
                if question.blob.is_some() && !is_own && response.status().is_success() {
                    self.redirects.remember(&url, answered_by).await;
                }
                return checked(response);
            }
            let challenge = challenge(&response).ok_or(SourceError::Denied)?;
            let answer =
                self.tokens.answer(&self.http, home, place, challenge, authorization.as_ref(), deadline).await?;
            if answer.is_none() {
                return Err(SourceError::Denied);
            }
            authorization = answer;
        }
        Err(SourceError::Denied)
    }

    /// What is shown at once, where an earlier question learned what is asked for.
    async fn known(&self, home: Home<'_>, place: &Place, deadline: Instant) -> Option<HeaderValue> {
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
        home: Home<'_>,
        place: &Place,
        deadline: Instant,
    ) -> Result<Option<Challenge>, SourceError> {
        let question = Question::new(Kind::List, "tags/list".to_owned()).query(Some("n=1"));
        let (url, headers) = (question.url(home.upstream, place)?, &question.headers);
        let ask = Ask { method: Method::GET, url: url.clone(), headers, authorization: None, form: None };
        let (response, answered_by) = self.http.follow(home, ask, deadline).await?;
        match response.status().as_u16() {
            // Whoever it redirects to must not say where the secret goes.
            401 if answered_by != url => Err(SourceError::Denied),
            401 => challenge(&response).map(Some).ok_or(SourceError::Denied),
            429 | 500.. => checked(response).map(|_| None),
            _ => Ok(None),
        }
    }

    /// Asks where an earlier redirect led.
    async fn ask_remembered(&self, home: Home<'_>, question: &Question, url: &Url, deadline: Instant) -> Remembered {
        let Some(target) = self.redirects.target(url).await.filter(|_| question.blob.is_some()) else {
            return Remembered::Nothing;
        };
        let ask = Ask {
            method: question.method.clone(),
            url: target.clone(),
            headers: &question.headers,
            authorization: None,
            form: None,
        };
        let soon = deadline.min(Instant::now() + OTHERS_FOLLOW);
        match self.http.send(home, &ask, soon).await.and_then(checked) {
            Ok(response) => Remembered::Answered(response),
            Err(error) => {
                tracing::debug!(%error, "a remembered redirect no longer works");
                self.redirects.expired(url, &target).await;
                Remembered::Expired
            }
        }
    }
}

fn challenge(response: &Response) -> Option<Challenge> {
    let lines = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    Challenge::pick(lines)
}
