//! What a registry gives to a caller: asked anew each time, and never by what an earlier redirect led to.

use std::sync::Arc;

use ::http::HeaderValue;
use ::http::header::{CONTENT_TYPE, RANGE};
use reqwest::Response;
use tokio::time::Instant;

use super::Origin;
use super::auth::Exchanged;
use super::http::{Home, Patience};
use super::question::{Kind, Question};
use crate::oci::Endpoint;
use crate::registries::Place;
use crate::secret::Secret;
use crate::source::SourceError;

impl Origin {
    /// Whether the registry gives something to whoever asks.
    pub async fn gives(
        self: &Arc<Self>,
        place: &Place,
        endpoint: &Endpoint,
        accept: &str,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let questions = match endpoint {
            Endpoint::Manifest(reference) => [Kind::ManifestHead, Kind::Manifest]
                .map(|kind| Question::new(kind, format!("manifests/{reference}")).accept(accept)),
            Endpoint::Blob(digest) => {
                [Kind::BlobHead, Kind::Blob].map(|kind| Question::new(kind, format!("blobs/{digest}")))
            }
            Endpoint::Tags | Endpoint::Referrers(_) => return Ok(()),
        };
        let [head, mut get] = questions;
        match self.ask(place, &head, deadline).await {
            Ok(response) => return is_content(&response),
            // Not by HEAD: some registries know none, and some signed URLs are for GET only.
            Err(SourceError::Failed(405)) => {}
            Err(SourceError::Denied) if get.kind.is_blob() => {}
            Err(error) => return Err(error),
        }
        if get.kind.is_blob() {
            get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        }
        is_content(&self.ask(place, &get, deadline).await?)
    }

    /// What a secret opens at a place's registry.
    pub async fn exchange(
        self: &Arc<Self>,
        place: &Place,
        secret: Secret,
        deadline: Instant,
    ) -> Result<Exchanged, SourceError> {
        let Some((upstream, trust)) = place.rule.upstreams(&place.registry).into_iter().next() else {
            return Err(SourceError::Denied);
        };
        let home = Home { upstream: &upstream, trust, ca: place.rule.ca.as_deref(), patience: Patience::LastResort };
        let challenge = match self.tokens.challenge(home, place).await {
            Some(challenge) => Some(challenge),
            None => {
                let asked = self.ask_for_challenge(home, place, deadline).await?;
                if let Some(challenge) = &asked {
                    self.tokens.learn(home, place, challenge.clone()).await;
                }
                asked
            }
        };
        match challenge {
            Some(challenge) => self.tokens.exchange(&self.http, home, place, &challenge, secret, deadline).await,
            // It asks nobody who they are.
            None => Ok(Exchanged { authorization: None, life: super::auth::MAX_LIFE }),
        }
    }
}

/// A page on which somebody is to log in is no content.
fn is_content(response: &Response) -> Result<(), SourceError> {
    let is_page = response.headers().get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"text/html"));
    if is_page { Err(SourceError::Denied) } else { Ok(()) }
}
