//! Serves the length of a blob, for HEAD requests.

use std::sync::Arc;
use tokio::time::{Instant, timeout};

use super::blob::{BlobError, more_severe};
use super::owners::request_from_owners;
use super::sources::outage_scope;
use super::{BlobRequest, Pull, PullError, fetch_ended, flight_keys, is_personal};
use crate::oci::Digest;
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::Found;
use crate::times::{CONFIRM_TIMEOUT, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// The length of a blob, and its source.
pub(super) type Length = Result<(u64, ServedFrom), SourceError>;

impl Pull {
    /// `HEAD blobs/<digest>`: the blob's length, and where the blob would come from.
    pub async fn blob_length(self: &Arc<Self>, request: &BlobRequest) -> Result<(u64, ServedFrom), PullError> {
        let length = timeout(request.request_context.time_limit, self.find_length(request)).await;
        length.unwrap_or(Err(SourceError::TimedOut)).map_err(|error| BlobError::Source(error).into_pull_error())
    }

    pub(super) async fn find_length(self: &Arc<Self>, request: &BlobRequest) -> Length {
        let repo_refs = self.candidates(request).await;
        let mut cached = None;
        match self.cached_blob(request).await {
            Some(found) => {
                let kept = match &found {
                    Found::Small { object, tier } => (object.bytes.len() as u64, (*tier).into()),
                    Found::Large { blob, .. } => (blob.len, ServedFrom::Disk),
                };
                let from = found.provenance();
                let is_known = |repo_ref| from.is_some_and(|from| self.is_known_at(repo_ref, &request.digest, from));
                if request.request_context.fetch_policy == FetchPolicy::CacheOnly || repo_refs.iter().any(is_known) {
                    return Ok(kept);
                }
                cached = Some(kept);
            }
            None if request.request_context.fetch_policy == FetchPolicy::CacheOnly => {
                let running = self.fills.running(&self.fill_key(request)).filter(|fill| !fill.written().is_empty());
                let length = running.and_then(|fill| fill.known_length()).ok_or(SourceError::NotCached)?;
                return Ok((length, ServedFrom::Peer));
            }
            None => {}
        }
        // A fill of another repository does not show that this one holds the blob. A fill in a lower role may wait for
        // the requester.
        if let Some(fill) = self.fills.running(&self.fill_key(request))
            && fill.role() >= self.role_of(request)
            && (fill.repo_ref == request.repo_ref
                || self.registry_hints.length_of(&request.repo_ref, &request.digest).is_some())
            && let Ok(opened) = fill.opened().await
        {
            return Ok(opened.length());
        }
        let mut last = None;
        for repo_ref in repo_refs {
            let elsewhere = BlobRequest { repo_ref: repo_ref.clone(), ..request.clone() };
            let length = self.length_from_sources(&elsewhere);
            // A cached length is served in time, whatever the upstream does.
            let limit = if cached.is_some() {
                CONFIRM_TIMEOUT.min(request.request_context.time_limit / 2)
            } else {
                UPSTREAM_TIMEOUT
            };
            match timeout(limit, length).await.unwrap_or(Err(SourceError::TimedOut)) {
                Ok((length, from)) => {
                    self.registry_hints.record_held(&repo_ref, &request.digest, length);
                    return Ok(cached.unwrap_or((length, from)));
                }
                Err(error) => last = Some(more_severe(last, error)),
            }
        }
        let error = last.unwrap_or_else(SourceError::not_found);
        cached.filter(|_| error.is_outage()).ok_or(error)
    }

    /// The length of a blob that is not cached, from its owner or the upstream. Concurrent requests share one lookup.
    pub(super) async fn length_from_sources(self: &Arc<Self>, request: &BlobRequest) -> Length {
        let (repo_ref, digest) = (&request.repo_ref, &request.digest);
        let lengths_key = (repo_ref.rule_key(), digest.clone());
        // With upstream authorization a length also shows a right, so one principal's length is not served to others.
        if let Some(length) = self.lengths.get(&lengths_key).filter(|_| !repo_ref.rule.is_passthrough()) {
            // Only the length is cached: the blob itself would come from the upstream.
            return Ok((length, ServedFrom::Upstream));
        }
        let role = self.role(repo_ref, digest, request.request_context);
        let key = |principal_id| (repo_ref.rule_key(), digest.clone(), role, principal_id);
        let (shared, own) = flight_keys(repo_ref, key);
        let result = self.length_flights.join_or_own(
            shared,
            own,
            |length| is_personal(repo_ref, length),
            || {
                let (pull, repo_ref, digest, key) =
                    (self.clone(), repo_ref.clone(), digest.clone(), lengths_key.clone());
                async move {
                    if let Some(length) = pull.length_of_owners(&repo_ref, &digest, role).await? {
                        return Ok((length, ServedFrom::Peer));
                    }
                    let known = pull.registry_hints.length_of(&repo_ref, &digest);
                    match pull.upstream.blob_length(&repo_ref, &digest, known, Instant::now() + UPSTREAM_TIMEOUT).await
                    {
                        Ok(length) => {
                            pull.lengths.insert(key, length);
                            Ok((length, ServedFrom::Upstream))
                        }
                        Err(error) => {
                            let length = pull.length_of_any_peer(&repo_ref, &digest, &error).await;
                            length.map(|length| (length, ServedFrom::Peer)).ok_or(error)
                        }
                    }
                }
            },
        );
        result.await.unwrap_or_else(fetch_ended)
    }

    /// None: this node is the owner, or no owner can be reached.
    async fn length_of_owners(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        role: Role,
    ) -> Result<Option<u64>, SourceError> {
        let Some(peers) = self.peers_for(repo_ref).filter(|_| role != Role::Global) else { return Ok(None) };
        let lead = peers.owner_route(digest, role, self.scope(repo_ref));
        request_from_owners(lead, digest, |owner, mode| async move {
            // Half the time, so that the next owner has some if this one hangs.
            let deadline = Instant::now() + UPSTREAM_TIMEOUT / 2;
            peers.blob_length(owner, &PeerQuery::about(repo_ref, digest, mode, deadline)).await
        })
        .await
    }

    /// The length from any peer that has the blob, if the upstream is down.
    async fn length_of_any_peer(&self, repo_ref: &RepositoryRef, digest: &Digest, error: &SourceError) -> Option<u64> {
        let peers = self.peers_for(repo_ref).filter(|_| error.is_outage())?;
        let query = PeerQuery::about(repo_ref, digest, PeerRequestMode::OnlyIfCached, Instant::now() + STALL_TIMEOUT);
        peers.last_resort_length(&PeerQuery { scope: outage_scope(repo_ref), ..query }).await
    }
}
