//! Checks whether a repository holds what is cached from another one.
//!
//! A digest names the same bytes in each repository, but clients rely on the "404" of a direct pull:
//!
//! - A tool that pushes skips blobs that exist. A false "200" makes its push fail (`MANIFEST_BLOB_UNKNOWN`).
//! - A tool that copies expects "404" for a missing object.
//!
//! So dray sends one HEAD for each repository and digest, before the first response from another repository's copy. In
//! an outage the copy is served without. If the manifest came through dray, its blobs need no HEAD: it names them.

use std::sync::Arc;

use tokio::time::{Instant, timeout};

use super::blob::BlobError;
use super::negative_cache::NegativeKind;
use super::{BlobRequest, ManifestResponse, Pull, PullError, Requester, fetch_ended};
use crate::oci::{Digest, Reference};
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::store::Found;
use crate::times::UPSTREAM_TIMEOUT;

impl Pull {
    /// Whether a repository is known to hold a cached object: it came from there, a manifest that was served from there
    /// names it, or a HEAD confirmed it. With upstream authorization, that check has confirmed it before.
    pub(super) fn is_known_at(&self, repo_ref: &RepositoryRef, digest: &Digest, from: &Provenance) -> bool {
        repo_ref.rule.is_passthrough()
            || repo_ref.is_source_of(from)
            || self.registry_hints.length_of(repo_ref, digest).is_some()
    }

    /// Checks whether a repository holds a blob that is cached from another one, by one upstream request.
    pub(super) async fn confirm_blob(
        self: &Arc<Self>,
        request: &BlobRequest,
        kept: Option<&Found>,
        repo_refs: &[RepositoryRef],
    ) -> Result<(), PullError> {
        let from = kept.and_then(Found::provenance).filter(|_| request.request_context.requester == Requester::Client);
        let Some(from) = from else { return Ok(()) };
        if repo_refs.iter().any(|repo_ref| self.is_known_at(repo_ref, &request.digest, from)) {
            return Ok(());
        }
        let (repo_ref, digest) = (&request.repo_ref, request.digest.as_str());
        let known = self.negative_cache.get(repo_ref, NegativeKind::Blob, digest);
        let error = match known {
            Some(error) => error,
            None if self.upstream.trouble(repo_ref).is_some() => return Ok(()),
            None => match timeout(request.request_context.time_limit, self.find_length(request)).await {
                Ok(Err(error)) => {
                    self.negative_cache.put(repo_ref, NegativeKind::Blob, digest, &error);
                    error
                }
                Ok(Ok(_)) | Err(_) => return Ok(()),
            },
        };
        if error.is_outage() { Ok(()) } else { Err(BlobError::Source(error).into_pull_error()) }
    }

    /// Checks whether a repository holds a manifest that is cached from another one, by one upstream request.
    pub(super) async fn confirm_manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        response: &ManifestResponse,
        accept: &str,
    ) -> Result<(), SourceError> {
        let (digest, bytes) = (&response.digest, &response.object.bytes);
        if let Some(error) = self.negative_cache.get(repo_ref, NegativeKind::Manifest, digest.as_str()) {
            return if error.is_outage() { Ok(()) } else { Err(error) };
        }
        if self.upstream.trouble(repo_ref).is_some() {
            return Ok(());
        }
        let result = self.confirmations.join((repo_ref.rule_key(), digest.clone()), || {
            let (pull, repo_ref, digest, accept) = (self.clone(), repo_ref.clone(), digest.clone(), accept.to_owned());
            let bytes = bytes.clone();
            async move {
                let (deadline, reference) = (Instant::now() + UPSTREAM_TIMEOUT, Reference::Digest(digest.clone()));
                let confirmed = match pull.upstream.manifest_digest(&repo_ref, &reference, &accept, deadline).await {
                    Ok(Some(_)) => Ok(()),
                    Ok(None) => pull.upstream.manifest(&repo_ref, &reference, &accept, deadline).await.map(|_| ()),
                    Err(error) => Err(error),
                };
                match confirmed {
                    Ok(()) => pull.registry_hints.record_manifest(&repo_ref, &digest, &bytes, || true).await,
                    Err(error) if error.is_outage() => {}
                    Err(error) => {
                        pull.negative_cache.put(&repo_ref, NegativeKind::Manifest, digest.as_str(), &error);
                        return Err(error);
                    }
                }
                Ok(())
            }
        });
        result.await.unwrap_or_else(fetch_ended)
    }
}
