//! What a registry gives to a caller: asked anew each time, and never by what an earlier redirect led to.

use std::sync::Arc;

use ::http::HeaderValue;
use ::http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use reqwest::Response;
use tokio::time::Instant;

use super::UpstreamClient;
use super::auth::ExchangedSecret;
use super::http::{ConnectTimeout, UpstreamRef};
use super::media_type;
use super::request::{RequestKind, UpstreamRequest, claimed_digest};
use crate::oci::{ContentRange, Endpoint, Reference, manifest};
use crate::registries::RepositoryRef;
use crate::secret::Secret;
use crate::source::SourceError;

impl UpstreamClient {
    /// Whether the registry gives something to whoever asks. What is kept of it here has that many bytes.
    pub async fn gives(
        self: &Arc<Self>,
        place: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        kept: Option<u64>,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let questions = match endpoint {
            Endpoint::Manifest(reference) => [RequestKind::ManifestHead, RequestKind::Manifest]
                .map(|kind| UpstreamRequest::new(kind, format!("manifests/{reference}")).accept(accept))
                .map(|question| {
                    question.expect(if let Reference::Digest(digest) = reference { Some(digest) } else { None })
                }),
            Endpoint::Blob(digest) => [RequestKind::BlobHead, RequestKind::Blob]
                .map(|kind| UpstreamRequest::new(kind, format!("blobs/{digest}")).expect(Some(digest))),
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => return Ok(()),
        };
        let [head, mut get] = questions;
        let mut refused = false;
        match self.ask(place, &head, deadline).await {
            Ok(response) => return is_content(&response, endpoint, kept),
            Err(error) => match (&error, get.kind.is_blob()) {
                // Some signed URLs are for GET only.
                (SourceError::Denied(_), true) => refused = true,
                // Some registries know no HEAD, and a HEAD of a manifest is only a hint.
                (SourceError::Failed(told), _) if told.status == 405 => {}
                (SourceError::Denied(told), false) if told.status != 401 => refused = true,
                (SourceError::NotFound(_) | SourceError::Failed(_) | SourceError::Malformed(_), false) => {}
                // A page on which somebody is to log in is a no as well.
                (SourceError::Malformed(_), true) => return Err(SourceError::denied()),
                _ => return Err(error),
            },
        }
        if get.kind.is_blob() {
            get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        }
        match self.ask(place, &get, deadline).await {
            Ok(response) => is_content(&response, endpoint, kept),
            // Half a no: enough not to let in who was let in before, and too little to remember.
            Err(error) if refused && error.is_passing_outage() => Err(SourceError::failed(403)),
            Err(SourceError::Malformed(_)) => Err(SourceError::denied()),
            Err(error) => Err(error),
        }
    }

    /// What a secret opens at a place's registry.
    pub async fn exchange(
        self: &Arc<Self>,
        place: &RepositoryRef,
        secret: Secret,
        deadline: Instant,
    ) -> Result<ExchangedSecret, SourceError> {
        let Some((upstream, trust)) = place.rule.upstreams(&place.registry).into_iter().next() else {
            return Err(SourceError::denied());
        };
        let home =
            UpstreamRef { upstream: &upstream, trust, tls: &place.rule.tls, patience: ConnectTimeout::LastResort };
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
            None => Ok(ExchangedSecret { authorization: None, life: crate::times::DAY }),
        }
    }
}

/// Whether an answer is what was asked for. A page on which somebody is to log in, or that tells of repairs, is not,
/// whatever its status: the whole repository opens by this.
fn is_content(response: &Response, endpoint: &Endpoint, kept: Option<u64>) -> Result<(), SourceError> {
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let total = || header(CONTENT_RANGE)?.parse::<ContentRange>().ok().map(|range| range.total);
    let length = || total().or_else(|| header(CONTENT_LENGTH)?.trim().parse().ok());
    let of_type = |known: fn(&str) -> bool| media_type(response).is_some_and(|media_type| known(&media_type));
    let is_it = match (endpoint, kept) {
        // Another digest than was asked for is no answer at all.
        _ if claimed_digest(response).is_some() => true,
        (_, Some(kept)) => length() == Some(kept),
        (Endpoint::Manifest(_), None) => of_type(manifest::is_manifest_type),
        (_, None) => of_type(is_of_blobs),
    };
    if is_it { Ok(()) } else { Err(SourceError::denied()) }
}

/// As object stores call what they do not know.
fn is_of_blobs(media_type: &str) -> bool {
    media_type.ends_with("/octet-stream") || media_type.starts_with("application/vnd.") || media_type.ends_with("gzip")
}
