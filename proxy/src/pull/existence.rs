//! Whether a repository holds what is cached from another one.
//!
//! Bytes are the same wherever they came from, but tools that push ask first what is there: "200" from the cache for a
//! repository that does not have the blob makes their push fail (`MANIFEST_BLOB_UNKNOWN`), and a tool that copies expects
//! the "404" of a direct pull. So the upstream is asked once for each repository and digest, by HEAD, before the first
//! response from another repository's copy; in an outage the cache answers. An image whose manifest came through dray needs
//! no such request: the manifest names its blobs.

use std::sync::Arc;

use tokio::time::{Instant, timeout};

use super::blob::Fetch;
use super::negative_cache::NegativeKind;
use super::{BlobRequest, ManifestResponse, Pull, PullError, Requester, fetch_ended};
use crate::oci::{Digest, Reference};
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::source::SourceError;
use crate::store::Found;
use crate::times::UPSTREAM_TIMEOUT;

impl Pull {
    /// Whether a repository is known to hold what is cached: it came from there, a manifest that was served from there
    /// names it, or the upstream has said so. A rule that leaves authorization to the upstream has asked it before.
    pub(super) fn is_known_at(&self, place: &RepositoryRef, digest: &Digest, from: &Provenance) -> bool {
        place.rule.asks_who() || place.is_source_of(from) || self.homes.length_of(place, digest).is_some()
    }

    /// Whether a repository holds a blob that is cached from another one. The upstream is asked once.
    pub(super) async fn confirm_blob(
        self: &Arc<Self>,
        request: &BlobRequest,
        kept: Option<&Found>,
        places: &[RepositoryRef],
    ) -> Result<(), PullError> {
        let from = kept.and_then(Found::provenance).filter(|_| request.asking.asker == Requester::Client);
        let Some(from) = from else { return Ok(()) };
        if places.iter().any(|place| self.is_known_at(place, &request.digest, from)) {
            return Ok(());
        }
        let (place, digest) = (&request.place, request.digest.as_str());
        let known = self.negatives.get(place, NegativeKind::Blob, digest);
        let error = match known {
            Some(error) => error,
            None if self.upstream.trouble(place).is_some() => return Ok(()),
            None => match timeout(request.asking.patience, self.find_length(request)).await {
                Ok(Err(error)) => {
                    self.negatives.put(place, NegativeKind::Blob, digest, &error);
                    error
                }
                Ok(Ok(_)) | Err(_) => return Ok(()),
            },
        };
        if error.is_outage() { Ok(()) } else { Err(Fetch::Source(error).into_refusal()) }
    }

    /// Asks the upstream once whether a repository holds a manifest that is cached from elsewhere.
    pub(super) async fn confirm_manifest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        answer: &ManifestResponse,
        accept: &str,
    ) -> Result<(), SourceError> {
        let (digest, bytes) = (&answer.digest, &answer.object.bytes);
        if let Some(error) = self.negatives.get(place, NegativeKind::Manifest, digest.as_str()) {
            return if error.is_outage() { Ok(()) } else { Err(error) };
        }
        if self.upstream.trouble(place).is_some() {
            return Ok(());
        }
        let landed = self.confirmations.join((place.to_string(), digest.clone()), || {
            let (pull, place, digest, accept) = (self.clone(), place.clone(), digest.clone(), accept.to_owned());
            let bytes = bytes.clone();
            async move {
                let (deadline, reference) = (Instant::now() + UPSTREAM_TIMEOUT, Reference::Digest(digest.clone()));
                let confirmed = match pull.upstream.manifest_digest(&place, &reference, &accept, deadline).await {
                    Ok(Some(_)) => Ok(()),
                    Ok(None) => pull.upstream.manifest(&place, &reference, &accept, deadline).await.map(|_| ()),
                    Err(error) => Err(error),
                };
                match confirmed {
                    Ok(()) => pull.homes.served(&place, &digest, &bytes, || true).await,
                    Err(error) if error.is_outage() => {}
                    Err(error) => {
                        pull.negatives.put(&place, NegativeKind::Manifest, digest.as_str(), &error);
                        return Err(error);
                    }
                }
                Ok(())
            }
        });
        landed.await.unwrap_or_else(fetch_ended)
    }
}
