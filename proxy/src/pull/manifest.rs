//! Serves a manifest by tag or by digest. It is verified before its first byte is sent.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout};

use super::negative_cache::NegativeKind;
use super::owners::request_from_owners;
use super::sources::outage_scope;
use super::{Pull, PullError, RequestContext, Requester, fetch_ended, flight_keys, is_personal};
use crate::blocking::parsed;
use crate::oci::{Digest, ErrorCode, Reference, manifest};
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode, PeerTrust};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Found, SmallKind, SmallObject};
use crate::times::{ALTERNATIVE_TIMEOUT, CONFIRM_TIMEOUT, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// A manifest and its source.
#[derive(Clone)]
pub struct ManifestResponse {
    pub digest: Digest,
    pub object: SmallObject,
    pub from: ServedFrom,
    /// For a tag: the time since it was last revalidated.
    pub age: Option<Duration>,
}

pub(super) type FetchedManifest = Result<(SmallObject, ServedFrom), SourceError>;

impl Pull {
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
                let response = match reference {
                    Reference::Digest(digest) => {
                        let found = self.manifest_by_digest(repo_ref, digest, accept, request_context).await;
                        found.map(|(object, from)| ManifestResponse { digest: digest.clone(), object, from, age: None })
                    }
                    Reference::Tag(tag) => self.manifest_by_tag(repo_ref, tag, accept, request_context).await,
                };
                // After a timeout, or a late error of a cache in front of the upstream, the upstream may only be slow:
                // requests in progress will tell. An early error is returned at once: podman then tries its next
                // mirror.
                let is_slow = match &response {
                    Err(SourceError::TimedOut) => true,
                    // A rate limit is not slowness: the client gets the time of its end at once.
                    Err(SourceError::Limited { .. }) => false,
                    Err(error) => error.is_transient_outage() && begun.elapsed() > CONFIRM_TIMEOUT,
                    Ok(_) => false,
                };
                if !is_slow || !request_context.has_no_fallback() {
                    return response;
                }
                sleep(ALTERNATIVE_TIMEOUT).await;
            }
        };
        // After a timeout the flights continue for later requests.
        let response = timeout(request_context.time_limit, response).await.unwrap_or(Err(SourceError::TimedOut));
        let response = response.map_err(|error| PullError::of(&error, ErrorCode::ManifestUnknown))?;
        let ManifestResponse { digest, object, .. } = &response;
        let is_held =
            || matches!(reference, Reference::Tag(_)) || self.is_known_at(repo_ref, digest, &object.provenance);
        if request_context.requester == Requester::Client && !is_held() {
            let confirmed = self.confirm_manifest(repo_ref, &response, accept);
            let left = request_context.after(begun.elapsed()).time_limit;
            if let Ok(Err(error)) = timeout(left.min(CONFIRM_TIMEOUT), confirmed).await {
                return Err(PullError::of(&error, ErrorCode::ManifestUnknown));
            }
        }
        self.registry_hints.record_manifest(repo_ref, digest, &object.bytes, is_held).await;
        Ok(response)
    }

    pub(super) async fn manifest_by_digest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        request_context: RequestContext,
    ) -> FetchedManifest {
        if let Some(found) = self.cached_manifest(repo_ref, digest, request_context.requester).await {
            return Ok(found);
        }
        if request_context.fetch_policy == FetchPolicy::CacheOnly {
            return Err(SourceError::NotCached);
        }
        if let Some(error) = self.negative_cache.get(repo_ref, NegativeKind::Manifest, digest.as_str()) {
            return Err(error);
        }
        let role = self.role(repo_ref, digest, request_context);
        self.manifest_flight(repo_ref, digest, accept, RequestContext { role, ..request_context }).await
    }

    /// Fetches a manifest. Concurrent requests share one flight.
    fn manifest_flight<'a>(
        self: &'a Arc<Self>,
        repo_ref: &'a RepositoryRef,
        digest: &'a Digest,
        accept: &'a str,
        request_context: RequestContext,
    ) -> BoxFuture<'a, FetchedManifest> {
        let key = |principal_id| (repo_ref.rule_key(), digest.clone(), request_context.role, principal_id);
        let (shared, own) = flight_keys(repo_ref, key);
        let result = self.manifest_flights.join_or_own(
            shared,
            own,
            |fetched| is_personal(repo_ref, fetched),
            move || {
                let (pull, repo_ref, digest, accept) =
                    (self.clone(), repo_ref.clone(), digest.clone(), accept.to_owned());
                async move {
                    let fetched = pull.fetch_manifest(&repo_ref, &digest, &accept, request_context).await;
                    if let Err(error) = &fetched {
                        pull.negative_cache.put(&repo_ref, NegativeKind::Manifest, digest.as_str(), error);
                    }
                    fetched
                }
            },
        );
        async move { result.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    async fn fetch_manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        request_context: RequestContext,
    ) -> FetchedManifest {
        // Another flight may have cached it meanwhile. Peers may join this flight, so only what peers may have is used.
        if let Some(found) = self.cached_manifest(repo_ref, digest, Requester::Peer(PeerTrust::Authenticated)).await {
            return Ok(found);
        }
        if let Some(object) = self.manifest_of_peers(repo_ref, digest, request_context).await? {
            return Ok((object, ServedFrom::Peer));
        }
        if request_context.role != Role::Global {
            // No owner is reachable: this node acts as the owner, also for peers that turn to it.
            return self
                .manifest_flight(repo_ref, digest, accept, RequestContext { role: Role::Global, ..request_context })
                .await;
        }
        let deadline = Instant::now() + UPSTREAM_TIMEOUT;
        let reference = Reference::Digest(digest.clone());
        let response = match self.upstream.manifest(repo_ref, &reference, accept, deadline).await {
            Err(error) if error.is_outage() => {
                let manifest = self.manifest_of_any_peer(repo_ref, digest).await;
                return manifest.map(|object| (object, ServedFrom::Peer)).ok_or(error);
            }
            response => response?,
        };
        if !digest.matches(&response.bytes) {
            return Err(self.corrupt_manifest(repo_ref, digest));
        }
        self.check_reachability(repo_ref, &response.bytes).await?;
        Ok((self.cache_manifest(repo_ref, digest, &response.media_type, response.bytes).await, ServedFrom::Upstream))
    }

    /// A manifest from a peer that has or fetches it. None: this node has to fetch it.
    async fn manifest_of_peers(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        request_context: RequestContext,
    ) -> Result<Option<SmallObject>, SourceError> {
        let Some(peers) = self.peers_for(repo_ref) else { return Ok(None) };
        let (scope, downstream) = (self.scope(repo_ref), request_context.downstream);
        let query = |mode| {
            let deadline = Instant::now() + UPSTREAM_TIMEOUT;
            PeerQuery { scope, downstream, ..PeerQuery::about(repo_ref, digest, mode, deadline) }
        };
        let lead = peers.owner_route(digest, request_context.role, scope);
        if request_context.role == Role::Global || lead.owners.is_empty() {
            let kept = peers.successor_manifests(&query(PeerRequestMode::OnlyIfCached)).await;
            return Ok(self.cache_first_match(repo_ref, digest, kept).await);
        }
        // The owner of the digest waits for this node, which resolves the tag: a request to it would be a circle.
        if lead.owners.first().is_some_and(|owner| downstream.contains(owner)) {
            return Ok(None);
        }
        request_from_owners(lead, digest, |owner, mode| async move {
            let sent = peers.manifest(owner, &query(mode)).await?;
            self.cache_first_match(repo_ref, digest, vec![sent]).await.ok_or_else(|| {
                peers.eject(owner);
                SourceError::Malformed("the peer's manifest does not match its digest".into())
            })
        })
        .await
    }

    /// A manifest from any peer that has it, if the upstream is down.
    async fn manifest_of_any_peer(&self, repo_ref: &RepositoryRef, digest: &Digest) -> Option<SmallObject> {
        let deadline = Instant::now() + STALL_TIMEOUT;
        let query = PeerQuery {
            scope: outage_scope(repo_ref),
            ..PeerQuery::about(repo_ref, digest, PeerRequestMode::OnlyIfCached, deadline)
        };
        let kept = self.peers_for(repo_ref)?.last_resort_manifests(&query).await;
        self.cache_first_match(repo_ref, digest, kept).await
    }

    /// Caches the first of the peers' manifests that matches the digest.
    async fn cache_first_match(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        sent: Vec<(String, bytes::Bytes)>,
    ) -> Option<SmallObject> {
        let (stated, bytes) = sent.into_iter().find(|(_, bytes)| digest.matches(bytes))?;
        let media_type = parsed(&bytes, manifest::media_type).await.unwrap_or(stated);
        Some(self.cache_manifest(repo_ref, digest, &media_type, bytes).await)
    }

    pub(super) async fn cached_manifest(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        requester: Requester,
    ) -> Option<(SmallObject, ServedFrom)> {
        match self.store.find(digest, SmallKind::Manifest).await? {
            Found::Small { object, tier } if self.may_serve(digest, Some(&object.provenance), requester, repo_ref) => {
                Some((object, tier.into()))
            }
            _ => None,
        }
    }

    pub(super) async fn cache_manifest(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        media_type: &str,
        bytes: bytes::Bytes,
    ) -> SmallObject {
        self.authorizations.mark_sent(repo_ref, digest);
        self.remember_subject(repo_ref, &bytes, media_type).await;
        // A revalidated tag mostly has the same digest: then nothing is written.
        if let Some((object, _)) =
            self.cached_manifest(repo_ref, digest, Requester::Peer(PeerTrust::Authenticated)).await
            && *object.media_type == *media_type
        {
            return object;
        }
        let provenance = Arc::new(repo_ref.provenance());
        let object = SmallObject::new(media_type, provenance, &bytes);
        self.store.small.insert(digest, SmallKind::Manifest, object.clone()).await;
        object
    }

    pub(super) fn corrupt_manifest(&self, repo_ref: &RepositoryRef, digest: &Digest) -> SourceError {
        self.metrics.mismatches.inc();
        tracing::error!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, "manifest digest mismatch");
        SourceError::Malformed("the manifest does not match its digest".into())
    }
}
