//! Checks at the upstream whether a principal may pull. Each check is a new request, never to a remembered redirect
//! target.

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
    /// Checks that the upstream serves an endpoint to the principal of `repo_ref`. `kept` is the length of dray's copy.
    pub async fn check_access(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        kept: Option<u64>,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let requests = match endpoint {
            Endpoint::Manifest(reference) => [RequestKind::ManifestHead, RequestKind::Manifest]
                .map(|kind| UpstreamRequest::new(kind, format!("manifests/{reference}")).accept(accept))
                .map(|request| {
                    request.expect(if let Reference::Digest(digest) = reference { Some(digest) } else { None })
                }),
            Endpoint::Blob(digest) => [RequestKind::BlobHead, RequestKind::Blob]
                .map(|kind| UpstreamRequest::new(kind, format!("blobs/{digest}")).expect(Some(digest))),
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => return Ok(()),
        };
        let [head, mut get] = requests;
        let mut is_denied = false;
        match self.send(repo_ref, &head, deadline).await {
            Ok(response) => return is_content(&response, endpoint, kept),
            Err(error) => match (&error, get.kind.is_blob()) {
                // Some signed URLs are valid for GET only.
                (SourceError::Denied(_), true) => is_denied = true,
                // Some registries do not support HEAD, and a HEAD of a manifest is only a hint.
                (SourceError::Failed(error), _) if error.status == 405 => {}
                (SourceError::Denied(error), false) if error.status != 401 => is_denied = true,
                (SourceError::NotFound(_) | SourceError::Failed(_) | SourceError::Malformed(_), false) => {}
                // A login page is a denial as well.
                (SourceError::Malformed(_), true) => return Err(SourceError::denied()),
                _ => return Err(error),
            },
        }
        if get.kind.is_blob() {
            get.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        }
        match self.send(repo_ref, &get, deadline).await {
            Ok(response) => is_content(&response, endpoint, kept),
            // HEAD was denied and GET failed: enough to reject an earlier authorization, too little to remember a
            // denial.
            Err(error) if is_denied && error.is_transient_outage() => Err(SourceError::failed(403)),
            Err(SourceError::Malformed(_)) => Err(SourceError::denied()),
            Err(error) => Err(error),
        }
    }

    /// Exchanges a client's secret for a grant at the repository's first upstream.
    pub async fn exchange(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        secret: Secret,
        deadline: Instant,
    ) -> Result<ExchangedSecret, SourceError> {
        let session = self.session(repo_ref);
        let Some((upstream, trust)) = repo_ref.rule.upstreams(&repo_ref.registry).into_iter().next() else {
            return Err(SourceError::denied());
        };
        let upstream_ref = UpstreamRef {
            upstream: &upstream,
            trust,
            tls: &repo_ref.rule.tls,
            connect_timeout: ConnectTimeout::LastResort,
        };
        let challenge = match session.tokens.challenge(upstream_ref, repo_ref).await {
            Some(challenge) => Some(challenge),
            None => {
                let discovered = self.discover_challenge(upstream_ref, repo_ref, deadline).await?;
                if let Some(challenge) = &discovered {
                    session.tokens.remember_challenge(upstream_ref, repo_ref, challenge.clone()).await;
                }
                discovered
            }
        };
        match challenge {
            Some(challenge) => {
                session.tokens.exchange(&session.http, upstream_ref, repo_ref, &challenge, secret, deadline).await
            }
            // The registry needs no authentication.
            None => Ok(ExchangedSecret { authorization: None, life: crate::times::DAY }),
        }
    }
}

/// Rejects a success that is not the content, such as a login or maintenance page: it would authorize the whole
/// repository.
fn is_content(response: &Response, endpoint: &Endpoint, kept: Option<u64>) -> Result<(), SourceError> {
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    let total = || header(CONTENT_RANGE)?.parse::<ContentRange>().ok().map(|range| range.total);
    let length = || total().or_else(|| header(CONTENT_LENGTH)?.trim().parse().ok());
    let of_type = |known: fn(&str) -> bool| media_type(response).is_some_and(|media_type| known(&media_type));
    let is_it = match (endpoint, kept) {
        // A response with another digest than the requested one was rejected before.
        _ if claimed_digest(response).is_some() => true,
        (_, Some(kept)) => length() == Some(kept),
        (Endpoint::Manifest(_), None) => of_type(manifest::is_manifest_type),
        (_, None) => of_type(is_of_blobs),
    };
    if is_it { Ok(()) } else { Err(SourceError::denied()) }
}

/// Media types of object stores and registries for blobs.
fn is_of_blobs(media_type: &str) -> bool {
    media_type.ends_with("/octet-stream") || media_type.starts_with("application/vnd.") || media_type.ends_with("gzip")
}
