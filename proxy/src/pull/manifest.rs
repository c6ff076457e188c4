//! Serves manifests by tag and by digest, within the time limit of the request.

mod fetch;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

pub(super) use self::fetch::ManifestFetcher;
use super::flights::fetch_ended;
use super::negative_cache::{NegativeCache, NegativeKind};
use super::registry_hints::RegistryHints;
use super::tag::TagService;
use super::{PullError, RequestContext, Requester};
use crate::oci::{Digest, ErrorCode, Reference};
use crate::registries::RepositoryRef;
use crate::single_flight::SingleFlight;
use crate::source::{ServedFrom, SourceError};
use crate::store::SmallObject;
use crate::times::{ALTERNATIVE_TIMEOUT, CONFIRM_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::upstream::UpstreamClient;

/// Serves manifests.
pub struct ManifestService {
    fetcher: Arc<ManifestFetcher>,
    tags: Arc<TagService>,
    upstream: Arc<UpstreamClient>,
    negative_cache: Arc<NegativeCache>,
    registry_hints: Arc<RegistryHints>,
    /// Checks whether repositories hold manifests that were cached from other repositories.
    confirmations: SingleFlight<(String, Digest), Result<(), SourceError>>,
}

/// A manifest and its source.
#[derive(Clone)]
pub struct ManifestResponse {
    pub digest: Digest,
    pub object: SmallObject,
    pub from: ServedFrom,
    /// For a tag: the time since it was last revalidated.
    pub age: Option<Duration>,
}

impl ManifestService {
    pub(super) fn new(
        fetcher: Arc<ManifestFetcher>,
        tags: Arc<TagService>,
        upstream: Arc<UpstreamClient>,
        negative_cache: Arc<NegativeCache>,
        registry_hints: Arc<RegistryHints>,
    ) -> Self {
        Self { fetcher, tags, upstream, negative_cache, registry_hints, confirmations: SingleFlight::default() }
    }

    /// `GET` or `HEAD manifests/<reference>`.
    pub async fn manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        request_context: RequestContext,
    ) -> Result<ManifestResponse, PullError> {
        let begun = Instant::now();
        let response = async {
            loop {
                let response = self.find(repo_ref, reference, accept, request_context).await;
                let may_repeat =
                    request_context.has_no_fallback() && response.as_ref().is_err_and(|e| is_slow(e, begun.elapsed()));
                if !may_repeat {
                    return response;
                }
                sleep(ALTERNATIVE_TIMEOUT).await;
            }
        };
        // After a timeout the flights continue for later requests.
        let response = timeout(request_context.time_limit, response).await.unwrap_or(Err(SourceError::TimedOut));
        let response = response.map_err(|error| PullError::of(&error, ErrorCode::ManifestUnknown))?;
        let ManifestResponse { digest, object, .. } = &response;
        let is_held = || {
            matches!(reference, Reference::Tag(_))
                || self.registry_hints.is_known_at(repo_ref, digest, &object.provenance)
        };
        if request_context.requester == Requester::Client && !is_held() {
            let confirmed = self.confirm(repo_ref, &response, accept);
            let left = request_context.after(begun.elapsed()).time_limit;
            if let Ok(Err(error)) = timeout(left.min(CONFIRM_TIMEOUT), confirmed).await {
                return Err(PullError::of(&error, ErrorCode::ManifestUnknown));
            }
        }
        self.registry_hints.record_manifest(repo_ref, digest, &object.bytes, is_held).await;
        Ok(response)
    }

    async fn find(
        &self,
        repo_ref: &RepositoryRef,
        reference: &Reference,
        accept: &str,
        request_context: RequestContext,
    ) -> Result<ManifestResponse, SourceError> {
        match reference {
            Reference::Tag(tag) => self.tags.manifest(repo_ref, tag, accept, request_context).await,
            Reference::Digest(digest) => {
                let (object, from) = self.fetcher.manifest(repo_ref, digest, accept, request_context).await?;
                Ok(ManifestResponse { digest: digest.clone(), object, from, age: None })
            }
        }
    }

    /// Checks whether a repository holds a manifest that is cached from another one, by one upstream request; see
    /// [`RegistryHints::is_known_at`].
    async fn confirm(
        &self,
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
            let (upstream, hints, negative_cache) =
                (self.upstream.clone(), self.registry_hints.clone(), self.negative_cache.clone());
            let (repo_ref, digest, accept) = (repo_ref.clone(), digest.clone(), accept.to_owned());
            let bytes = bytes.clone();
            async move {
                let (deadline, reference) = (Instant::now() + UPSTREAM_TIMEOUT, Reference::Digest(digest.clone()));
                let confirmed = match upstream.manifest_digest(&repo_ref, &reference, &accept, deadline).await {
                    Ok(Some(_)) => Ok(()),
                    Ok(None) => upstream.manifest(&repo_ref, &reference, &accept, deadline).await.map(|_| ()),
                    Err(error) => Err(error),
                };
                match confirmed {
                    Ok(()) => hints.record_manifest(&repo_ref, &digest, &bytes, || true).await,
                    Err(error) if error.is_outage() => {}
                    Err(error) => {
                        negative_cache.put(&repo_ref, NegativeKind::Manifest, digest.as_str(), &error);
                        return Err(error);
                    }
                }
                Ok(())
            }
        });
        result.await.unwrap_or_else(fetch_ended)
    }
}

/// After a timeout, or a late error of a cache in front of the upstream, the upstream may only be slow: requests in
/// progress will tell. An early error is returned at once: podman then tries its next mirror.
fn is_slow(error: &SourceError, elapsed: Duration) -> bool {
    match error {
        SourceError::TimedOut => true,
        // A rate limit is not slowness: the client gets the time of its end at once.
        SourceError::Limited { .. } => false,
        error => error.is_transient_outage() && elapsed > CONFIRM_TIMEOUT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_is_slow_after_a_timeout_or_a_late_error() {
        let (early, late) = (Duration::from_secs(1), CONFIRM_TIMEOUT + Duration::from_secs(1));
        let cases = [
            (SourceError::TimedOut, [true, true]),
            (SourceError::failed(503), [false, true]),
            (SourceError::Limited { again: None }, [false, false]),
            (SourceError::not_found(), [false, false]),
        ];
        for (error, want) in cases {
            assert_eq!([early, late].map(|elapsed| is_slow(&error, elapsed)), want, "{error}");
        }
    }
}
