//! Serves the length of a blob, for HEAD requests.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::{Instant, timeout};

use super::{BlobContext, BlobError, BlobRequest, BlobService, more_severe};
use crate::oci::Digest;
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode};
use crate::principal::PrincipalId;
use crate::pull::PullError;
use crate::pull::flights::{fetch_ended, flight_keys, is_personal};
use crate::pull::peer_routing::outage_scope;
use crate::pull::source_search::{
    HolderStep, ObjectSource, SearchResult, Source, SourceFailure, SourceSearch, WithoutOwner, search,
};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::single_flight::SingleFlight;
use crate::source::{ServedFrom, SourceError};
use crate::store::Found;
use crate::times::{CONFIRM_TIMEOUT, DEFAULT_TTL, STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// Looks up lengths of blobs that are not cached on this node.
pub(super) struct LengthLookup {
    context: Arc<BlobContext>,
    cached: moka::sync::Cache<(String, Digest), u64>,
    // The principal is None where all clients share a flight, and set where an earlier response was about rights.
    flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), Length>,
}

/// The length of a blob, and its source.
type Length = Result<(u64, ServedFrom), SourceError>;

/// Lengths in memory. Fewer: more requests to upstreams.
const MAX_LENGTHS: u64 = 50_000;

impl BlobService {
    /// `HEAD blobs/<digest>`: the blob's length, and where the blob would come from.
    pub async fn length(&self, request: &BlobRequest) -> Result<(u64, ServedFrom), PullError> {
        let length = timeout(request.request_context.time_limit, self.find_length(request)).await;
        length.unwrap_or(Err(SourceError::TimedOut)).map_err(|error| BlobError::Source(error).into_pull_error())
    }

    pub(super) async fn find_length(&self, request: &BlobRequest) -> Length {
        let repo_refs = self.candidates(request).await;
        let mut cached = None;
        match self.content.blob(request).await {
            Some(found) => {
                let kept = match &found {
                    Found::Small { object, tier } => (object.bytes.len() as u64, (*tier).into()),
                    Found::Large { blob, .. } => (blob.len, ServedFrom::Disk),
                };
                let from = found.provenance();
                let is_known = |repo_ref| {
                    from.is_some_and(|from| self.context.registry_hints.is_known_at(repo_ref, &request.digest, from))
                };
                if request.request_context.fetch_policy == FetchPolicy::CacheOnly || repo_refs.iter().any(is_known) {
                    return Ok(kept);
                }
                cached = Some(kept);
            }
            None if request.request_context.fetch_policy == FetchPolicy::CacheOnly => {
                let running = self.fills().running(&self.fill_key(request)).filter(|fill| !fill.written().is_empty());
                let length = running.and_then(|fill| fill.known_length()).ok_or(SourceError::NotCached)?;
                return Ok((length, ServedFrom::Peer));
            }
            None => {}
        }
        // A fill of another repository does not show that this one holds the blob. A fill in a lower role may wait for
        // the requester.
        if let Some(fill) = self.fills().running(&self.fill_key(request))
            && fill.role() >= self.role_of(request)
            && (fill.repo_ref == request.repo_ref
                || self.context.registry_hints.length_of(&request.repo_ref, &request.digest).is_some())
            && let Ok(opened) = fill.opened().await
        {
            return Ok(opened.length());
        }
        let mut last = None;
        for repo_ref in repo_refs {
            let elsewhere = BlobRequest { repo_ref: repo_ref.clone(), ..request.clone() };
            let length = self.lengths.of_sources(&elsewhere);
            // A cached length is served in time, whatever the upstream does.
            let limit = if cached.is_some() {
                CONFIRM_TIMEOUT.min(request.request_context.time_limit / 2)
            } else {
                UPSTREAM_TIMEOUT
            };
            match timeout(limit, length).await.unwrap_or(Err(SourceError::TimedOut)) {
                Ok((length, from)) => {
                    self.context.registry_hints.record_held(&repo_ref, &request.digest, length);
                    return Ok(cached.unwrap_or((length, from)));
                }
                Err(error) => last = Some(more_severe(last, error)),
            }
        }
        let error = last.unwrap_or_else(SourceError::not_found);
        cached.filter(|_| error.is_outage()).ok_or(error)
    }
}

impl LengthLookup {
    pub(super) fn new(context: Arc<BlobContext>) -> Self {
        let cached = moka::sync::Cache::builder().max_capacity(MAX_LENGTHS).time_to_live(DEFAULT_TTL).build();
        Self { context, cached, flights: SingleFlight::default() }
    }

    /// The length of a blob that is not cached, from its owner or the upstream. Concurrent requests share one lookup.
    pub(super) async fn of_sources(self: &Arc<Self>, request: &BlobRequest) -> Length {
        let (repo_ref, digest) = (&request.repo_ref, &request.digest);
        // With upstream authorization a length also shows a right, so one principal's length is not served to others.
        let cached = self.cached.get(&(repo_ref.rule_key(), digest.clone()));
        if let Some(length) = cached.filter(|_| !repo_ref.rule.is_passthrough()) {
            // Only the length is cached: the blob itself would come from the upstream.
            return Ok((length, ServedFrom::Upstream));
        }
        let role = self.context.routing.role(repo_ref, digest, request.request_context);
        let key = |principal_id| (repo_ref.rule_key(), digest.clone(), role, principal_id);
        let (shared, own) = flight_keys(repo_ref, key);
        let result = self.flights.join_or_own(
            shared,
            own,
            |length| is_personal(repo_ref, length),
            || {
                let (lookup, repo_ref, digest) = (self.clone(), repo_ref.clone(), digest.clone());
                async move {
                    let sources = LengthSources { lookup: &lookup, repo_ref: &repo_ref, digest: &digest };
                    match search(sources.search(role), &sources).await? {
                        SearchResult::Found(length) => Ok(length),
                        SearchResult::ActAsOwner => unreachable!("each node may request a length from the upstream"),
                    }
                }
            },
        );
        result.await.unwrap_or_else(fetch_ended)
    }
}

/// The sources of one length.
struct LengthSources<'a> {
    lookup: &'a LengthLookup,
    repo_ref: &'a RepositoryRef,
    digest: &'a Digest,
}

impl LengthSources<'_> {
    fn search(&self, role: Role) -> SourceSearch {
        let routing = &self.lookup.context.routing;
        let Some(peers) = routing.peers_for(self.repo_ref) else { return SourceSearch::upstream_only() };
        let route = peers.owner_route(self.digest, role, routing.scope(self.repo_ref));
        SourceSearch::new(role, route, HolderStep::Skipped, WithoutOwner::RequestUpstream)
    }
}

#[async_trait]
impl ObjectSource for LengthSources<'_> {
    type Object = (u64, ServedFrom);

    async fn request(&self, source: Source) -> Result<Self::Object, SourceFailure> {
        let Self { lookup, repo_ref, digest } = self;
        let query = |mode, time| PeerQuery::about(repo_ref, digest, mode, Instant::now() + time);
        match (source, lookup.context.routing.peers_for(repo_ref)) {
            (Source::Upstream, _) => {
                let (known, deadline) =
                    (lookup.context.registry_hints.length_of(repo_ref, digest), Instant::now() + UPSTREAM_TIMEOUT);
                let length = lookup.context.upstream.blob_length(repo_ref, digest, known, deadline).await?;
                lookup.cached.insert((repo_ref.rule_key(), (*digest).clone()), length);
                Ok((length, ServedFrom::Upstream))
            }
            (Source::Owner { peer, role }, Some(peers)) => {
                // Half the time, so that the next owner has some if this one hangs.
                let query = query(PeerRequestMode::As(role), UPSTREAM_TIMEOUT / 2);
                Ok((peers.blob_length(peer, &query).await?, ServedFrom::Peer))
            }
            (Source::AnyPeer, Some(peers)) => {
                let query =
                    PeerQuery { scope: outage_scope(repo_ref), ..query(PeerRequestMode::OnlyIfCached, STALL_TIMEOUT) };
                let length = peers.last_resort_length(&query).await.ok_or(SourceError::NotCached)?;
                Ok((length, ServedFrom::Peer))
            }
            (Source::Holders | Source::Owner { .. } | Source::AnyPeer, _) => Err(SourceError::NotCached.into()),
        }
    }

    fn name(&self) -> impl fmt::Display + Send {
        self.digest
    }
}
