//! One question to one upstream: where the blob was last time, with the token that was granted last time, and what
//! the upstream asks for beyond that.

use ::http::header::WWW_AUTHENTICATE;
use reqwest::Response;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::Origin;
use super::asking::OTHERS_FOLLOW;
use super::challenge::Challenge;
use super::http::{Ask, Home};
use super::question::{Question, checked, rate_limit};
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
        let mut authorization = match self.tokens.known(&self.http, home, place, deadline).await {
            Ok(authorization) => authorization,
            Err(error) => {
                tracing::debug!(%place, %error, "the remembered challenge leads nowhere, asking anew");
                self.tokens.forget(home, place).await;
                None
            }
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
            self.note_limits(place, &response);
            // Only the upstream itself is given credentials, never the target of its redirect.
            let challenged = response.status().as_u16() == 401 && answered_by == url && !last_try;
            if !challenged {
                if question.blob.is_some() && answered_by != url && response.status().is_success() {
                    self.redirects.remember(&url, answered_by).await;
                }
                return checked(response);
            }
            let lines = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
            let challenge = Challenge::pick(lines).ok_or(SourceError::Denied)?;
            let answer =
                self.tokens.answer(&self.http, home, place, challenge, authorization.as_ref(), deadline).await?;
            if answer.is_none() {
                return Err(SourceError::Denied);
            }
            authorization = answer;
        }
        Err(SourceError::Denied)
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

    /// What an upstream says of its limits, for whoever watches them.
    fn note_limits(&self, place: &Place, response: &Response) {
        let gauges = [
            ("ratelimit-limit", &self.metrics.origin_rate_limit),
            ("ratelimit-remaining", &self.metrics.origin_rate_limit_remaining),
        ];
        for (name, gauge) in gauges {
            if let Some(number) = rate_limit(response.headers(), name) {
                gauge.with_label_values(&[place.rule.name()]).set(number);
            }
        }
    }
}
