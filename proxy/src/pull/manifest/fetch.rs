//! Fetches manifests by digest: from the cache, a peer or the upstream. A manifest is verified before its first byte is
//! sent.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::blocking::parsed;
use crate::metrics::Metrics;
use crate::oci::{Digest, Reference, manifest};
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode, Peers};
use crate::principal::PrincipalId;
use crate::pull::RequestContext;
use crate::pull::authorization::AuthorizationCache;
use crate::pull::cached_content::CachedContent;
use crate::pull::flights::{fetch_ended, flight_keys, is_personal};
use crate::pull::negative_cache::{NegativeCache, NegativeKind};
use crate::pull::peer_routing::{PeerRouting, outage_scope};
use crate::pull::reachability::Reachability;
use crate::pull::referrers::Referrers;
use crate::pull::source_search::{
    HolderStep, ObjectSource, SearchResult, Source, SourceFailure, SourceSearch, WithoutOwner, search,
};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::single_flight::SingleFlight;
use crate::source::{ServedFrom, SourceError};
use crate::store::SmallObject;
use crate::times::{STALL_TIMEOUT, UPSTREAM_TIMEOUT};
use crate::upstream::{UpstreamClient, UpstreamManifest};

pub(in crate::pull) struct ManifestFetcher {
    content: Arc<CachedContent>,
    routing: Arc<PeerRouting>,
    upstream: Arc<UpstreamClient>,
    authorizations: Arc<AuthorizationCache>,
    negative_cache: Arc<NegativeCache>,
    reachability: Reachability,
    referrers: Arc<Referrers>,
    metrics: Arc<Metrics>,
    // The principal is None where all clients share a flight, and set where an earlier response was about rights.
    flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), FetchedManifest>,
}

pub(in crate::pull) type FetchedManifest = Result<(SmallObject, ServedFrom), SourceError>;

/// The sources of one manifest.
struct ManifestSources<'a> {
    fetcher: &'a ManifestFetcher,
    repo_ref: &'a RepositoryRef,
    digest: &'a Digest,
    accept: &'a str,
    request_context: RequestContext,
}

impl ManifestFetcher {
    pub(in crate::pull) fn new(
        content: Arc<CachedContent>,
        routing: Arc<PeerRouting>,
        upstream: Arc<UpstreamClient>,
        authorizations: Arc<AuthorizationCache>,
        negative_cache: Arc<NegativeCache>,
        referrers: Arc<Referrers>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (reachability, flights) = (Reachability::new(), SingleFlight::default());
        Self { content, routing, upstream, authorizations, negative_cache, reachability, referrers, metrics, flights }
    }

    /// A manifest that is cached, or that another node or the upstream has.
    pub(in crate::pull) async fn manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        request_context: RequestContext,
    ) -> FetchedManifest {
        if let Some(found) = self.content.manifest(repo_ref, digest, request_context.requester).await {
            return Ok(found);
        }
        if request_context.fetch_policy == FetchPolicy::CacheOnly {
            return Err(SourceError::NotCached);
        }
        if let Some(error) = self.negative_cache.get(repo_ref, NegativeKind::Manifest, digest.as_str()) {
            return Err(error);
        }
        let role = self.routing.role(repo_ref, digest, request_context);
        self.fetch_once(repo_ref, digest, accept, RequestContext { role, ..request_context }).await
    }

    /// Fetches a manifest. Concurrent requests share one flight.
    fn fetch_once<'a>(
        self: &'a Arc<Self>,
        repo_ref: &'a RepositoryRef,
        digest: &'a Digest,
        accept: &'a str,
        request_context: RequestContext,
    ) -> BoxFuture<'a, FetchedManifest> {
        let key = |principal_id| (repo_ref.rule_key(), digest.clone(), request_context.role, principal_id);
        let (shared, own) = flight_keys(repo_ref, key);
        let result = self.flights.join_or_own(
            shared,
            own,
            |fetched| is_personal(repo_ref, fetched),
            move || {
                let (fetcher, repo_ref, digest, accept) =
                    (self.clone(), repo_ref.clone(), digest.clone(), accept.to_owned());
                async move {
                    let fetched = fetcher.fetch(&repo_ref, &digest, &accept, request_context).await;
                    if let Err(error) = &fetched {
                        fetcher.negative_cache.put(&repo_ref, NegativeKind::Manifest, digest.as_str(), error);
                    }
                    fetched
                }
            },
        );
        async move { result.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    async fn fetch(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        request_context: RequestContext,
    ) -> FetchedManifest {
        // Another flight may have cached it meanwhile. Peers may join this flight, so only what peers may have is used.
        if let Some(found) = self.content.shared_manifest(repo_ref, digest).await {
            return Ok(found);
        }
        let sources = ManifestSources { fetcher: self, repo_ref, digest, accept, request_context };
        match search(sources.search(), &sources).await? {
            SearchResult::Found(found) => Ok(found),
            // Peers may turn to this node: all of them share its flight.
            SearchResult::ActAsOwner => {
                self.fetch_once(repo_ref, digest, accept, RequestContext { role: Role::Global, ..request_context })
                    .await
            }
        }
    }

    /// Caches what the upstream sent, if its blobs can be downloaded too.
    pub(in crate::pull) async fn accept(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        response: UpstreamManifest,
    ) -> Result<SmallObject, SourceError> {
        self.reachability.check(&self.upstream, repo_ref, &response.bytes).await?;
        Ok(self.cache(repo_ref, digest, &response.media_type, response.bytes).await)
    }

    pub(in crate::pull) async fn cache(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        media_type: &str,
        bytes: Bytes,
    ) -> SmallObject {
        self.authorizations.mark_sent(repo_ref, digest);
        self.referrers.remember(repo_ref, &bytes, media_type).await;
        self.content.put_manifest(repo_ref, digest, media_type, &bytes).await
    }

    /// Caches the first of the peers' manifests that matches the digest.
    async fn cache_first_match(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        sent: Vec<(String, Bytes)>,
    ) -> Result<SmallObject, SourceError> {
        let matching = sent.into_iter().find(|(_, bytes)| digest.matches(bytes));
        let (stated, bytes) = matching.ok_or(SourceError::NotCached)?;
        let media_type = parsed(&bytes, manifest::media_type).await.unwrap_or(stated);
        Ok(self.cache(repo_ref, digest, &media_type, bytes).await)
    }
}

impl ManifestSources<'_> {
    fn search(&self) -> SourceSearch {
        let Some(peers) = self.peers() else { return SourceSearch::upstream_only() };
        let (role, scope) = (self.request_context.role, self.fetcher.routing.scope(self.repo_ref));
        let route = peers.owner_route(self.digest, role, scope);
        // A node that acts as the owner first requests its successors: they may have been the owners.
        let holders = if route.owners.is_empty() { HolderStep::First } else { HolderStep::Skipped };
        SourceSearch::new(role, route, holders, WithoutOwner::ActAsOwner)
            .for_downstream(&self.request_context.downstream)
    }

    fn peers(&self) -> Option<&Arc<Peers>> {
        self.fetcher.routing.peers_for(self.repo_ref)
    }

    fn query(&self, mode: PeerRequestMode) -> PeerQuery<'_> {
        PeerQuery {
            scope: self.fetcher.routing.scope(self.repo_ref),
            downstream: self.request_context.downstream,
            ..PeerQuery::about(self.repo_ref, self.digest, mode, Instant::now() + UPSTREAM_TIMEOUT)
        }
    }

    async fn of_upstream(&self) -> Result<SmallObject, SourceFailure> {
        let Self { fetcher, repo_ref, digest, accept, .. } = self;
        let reference = Reference::Digest((*digest).clone());
        let response =
            fetcher.upstream.manifest(repo_ref, &reference, accept, Instant::now() + UPSTREAM_TIMEOUT).await?;
        if !digest.matches(&response.bytes) {
            fetcher.metrics.mismatches.inc();
            tracing::error!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, "manifest digest mismatch");
            // A peer would hide from the operator what the upstream serves.
            let error = SourceError::Malformed("the manifest does not match its digest".into());
            return Err(SourceFailure::Final(error));
        }
        // A copy of a peer would not help: this node cannot download the blobs.
        fetcher.accept(repo_ref, digest, response).await.map_err(SourceFailure::Final)
    }
}

#[async_trait]
impl ObjectSource for ManifestSources<'_> {
    type Object = (SmallObject, ServedFrom);

    async fn request(&self, source: Source) -> Result<Self::Object, SourceFailure> {
        let Self { fetcher, repo_ref, digest, .. } = self;
        let peers = || self.peers().ok_or(SourceError::NotCached);
        let object = match source {
            Source::Holders => {
                let sent = peers()?.successor_manifests(&self.query(PeerRequestMode::OnlyIfCached)).await;
                fetcher.cache_first_match(repo_ref, digest, sent).await?
            }
            Source::Owner { peer, role } => {
                let peers = peers()?;
                let sent = peers.manifest(peer, &self.query(PeerRequestMode::As(role))).await?;
                fetcher.cache_first_match(repo_ref, digest, vec![sent]).await.map_err(|_| {
                    peers.eject(peer);
                    SourceError::Malformed("the peer's manifest does not match its digest".into())
                })?
            }
            Source::Upstream => return Ok((self.of_upstream().await?, ServedFrom::Upstream)),
            Source::AnyPeer => {
                let deadline = Instant::now() + STALL_TIMEOUT;
                let query = PeerQuery {
                    scope: outage_scope(repo_ref),
                    ..PeerQuery::about(repo_ref, digest, PeerRequestMode::OnlyIfCached, deadline)
                };
                let sent = peers()?.last_resort_manifests(&query).await;
                fetcher.cache_first_match(repo_ref, digest, sent).await?
            }
        };
        Ok((object, ServedFrom::Peer))
    }

    fn name(&self) -> impl fmt::Display + Send {
        self.digest
    }
}
