//! Resolves a tag: from the cache while it is fresh, then by the tag's owner, then by the upstream.
//!
//! Authenticated peers request the tag's owner, so that all nodes resolve it to the same digest. Each resolution
//! carries its age: of several the youngest wins, and the TTL ends on all nodes at the same time.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout};

use super::negative_cache::NegativeKind;
use super::owners::request_from_owners;
use super::sources::outage_scope;
use super::{ManifestResponse, Pull, RequestContext, Requester, fetch_ended, flight_keys, is_personal};
use crate::oci::{Digest, Reference, Tag};
use crate::peers::{Downstream, FetchPolicy, PeerQuery, PeerRequestMode, PeerTag, PeerTagResolution, PeerTrust, Peers};
use crate::registries::RepositoryRef;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::tags::Resolved;
use crate::times::{ALTERNATIVE_TIMEOUT, UPSTREAM_TIMEOUT};

/// What a tag resolves to.
pub(super) type TagResolution = Result<ManifestResponse, SourceError>;

/// How long a revalidation stays open while clients get the stale tag. Longer: a request that an upstream has lost
/// keeps the tag stale for longer. Shorter: tags of slower upstreams are never revalidated.
const REVALIDATION_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client waits before it gets a stale tag of an upstream that was slow lately. Longer: each pull is
/// delayed. Shorter: a recovered upstream is noticed later.
const SLOW_UPSTREAM_TIMEOUT: Duration = Duration::from_millis(20);

impl Pull {
    pub(super) async fn manifest_by_tag(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        request_context: RequestContext,
    ) -> TagResolution {
        let now = SystemTime::now();
        let mut expired = None;
        if let Some(cached) = self.tags.resolution(repo_ref, tag).await
            && let Some((object, from)) =
                self.cached_manifest(repo_ref, &cached.digest, request_context.requester).await
        {
            let age = Some(cached.age(now));
            let response = ManifestResponse { digest: cached.digest.clone(), object, from, age };
            // A requester of cached tags judges their age itself.
            if request_context.fetch_policy == FetchPolicy::CacheOnly || cached.is_fresh(repo_ref, tag, now) {
                return Ok(response);
            }
            if cached.age(now) < repo_ref.rule.stale_if_error {
                expired = Some(response);
            }
        }
        if request_context.fetch_policy == FetchPolicy::CacheOnly {
            return Err(SourceError::NotCached);
        }
        let peers = self.peers_for_tags().filter(|_| repo_ref.principal.may_be_forwarded());
        let role = peers.map_or(Role::Global, |peers| {
            peers.owner_route(&in_ring(repo_ref, tag), request_context.role, self.scope(repo_ref)).role
        });
        let asked = self.resolve_once(repo_ref, tag, accept, RequestContext { role, ..request_context });
        let Some(expired) = expired else {
            return match asked.await {
                Err(error) if error.is_transient_outage() && self.tags.was_absent(repo_ref, tag).await => {
                    Err(SourceError::not_found())
                }
                resolution => self.count_stale(repo_ref, tag, resolution, "peer"),
            };
        };
        let time_limit = if self.slow_upstreams.contains_key(&repo_ref.registry) {
            SLOW_UPSTREAM_TIMEOUT
        } else {
            ALTERNATIVE_TIMEOUT
        };
        let asked = tokio::select! {
            biased;
            // An upstream that is down is probed in the background, and a rate-limited one gets no request.
            trouble = self.upstream.until_unavailable(repo_ref), if role == Role::Global => {
                return self.count_stale(repo_ref, tag, Ok(stale(expired)), trouble.as_str());
            }
            asked = timeout(time_limit, asked) => asked,
        };
        match asked {
            Ok(Ok(response)) if response.from != ServedFrom::Stale || response.age < expired.age => {
                self.count_stale(repo_ref, tag, Ok(response), "peer")
            }
            Ok(Ok(_)) => self.count_stale(repo_ref, tag, Ok(stale(expired)), "peer"),
            Ok(Err(error)) if error.is_outage() => self.count_stale(repo_ref, tag, Ok(stale(expired)), error.as_str()),
            Ok(Err(error)) => Err(error),
            // The flight continues and revalidates the tag for later requests.
            Err(_) => {
                if time_limit == ALTERNATIVE_TIMEOUT {
                    self.slow_upstreams.insert(repo_ref.registry.clone(), ());
                }
                self.count_stale(repo_ref, tag, Ok(stale(expired)), "slow")
            }
        }
    }

    fn count_stale(
        &self,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        resolution: TagResolution,
        reason: &str,
    ) -> TagResolution {
        if is_stale(&resolution) {
            self.metrics.stale.with_label_values(&[reason]).inc();
            tracing::info!(registry = %repo_ref.registry, repository = %repo_ref.repository, %tag, reason, "stale tag served");
        }
        resolution
    }

    /// Resolves a tag that is not fresh. Concurrent requests share one flight.
    fn resolve_once<'a>(
        self: &'a Arc<Self>,
        repo_ref: &'a RepositoryRef,
        tag: &'a Tag,
        accept: &'a str,
        request_context: RequestContext,
    ) -> BoxFuture<'a, TagResolution> {
        if let Some(error) = self.negative_cache.get(repo_ref, NegativeKind::Manifest, tag.as_str()) {
            return std::future::ready(Err(error)).boxed();
        }
        let key = |principal_id| (repo_ref.rule_key(), tag.clone(), request_context.role, principal_id);
        let (shared, own) = flight_keys(repo_ref, key);
        let result = self.tag_flights.join_or_own(
            shared,
            own,
            // With upstream authorization a stale tag may result from one principal's missing credential.
            |resolution| is_personal(repo_ref, resolution) || (repo_ref.rule.is_passthrough() && is_stale(resolution)),
            move || {
                let (pull, repo_ref, tag, accept) = (self.clone(), repo_ref.clone(), tag.clone(), accept.to_owned());
                async move {
                    // Another flight may have resolved the tag since this request looked it up.
                    if let Some(response) = pull.just_resolved(&repo_ref, &tag).await {
                        return Ok(response);
                    }
                    let resolution = pull.resolve(&repo_ref, &tag, &accept, request_context).await;
                    pull.remember(&repo_ref, &tag, &resolution, request_context.client).await;
                    resolution
                }
            },
        );
        async move { result.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    /// The resolution of a tag in memory, if it is fresh.
    async fn just_resolved(&self, repo_ref: &RepositoryRef, tag: &Tag) -> Option<ManifestResponse> {
        let now = SystemTime::now();
        let cached = self.tags.in_memory(repo_ref, tag).filter(|cached| cached.is_fresh(repo_ref, tag, now))?;
        let (object, from) =
            self.cached_manifest(repo_ref, &cached.digest, Requester::Peer(PeerTrust::Authenticated)).await?;
        Some(ManifestResponse { age: Some(cached.age(now)), digest: cached.digest, object, from })
    }

    async fn remember(&self, repo_ref: &RepositoryRef, tag: &Tag, resolution: &TagResolution, client: Option<IpAddr>) {
        // After a reload that changes the rule, its upstream no longer decides what tags resolve to.
        if self.registries.rule(&repo_ref.registry, &repo_ref.repository).id != repo_ref.rule.id {
            return;
        }
        match resolution {
            Ok(response) => {
                if response.from != ServedFrom::Stale {
                    self.slow_upstreams.invalidate(&repo_ref.registry);
                }
                let age = response.age.unwrap_or_default();
                let checked_at = SystemTime::now().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
                self.tags.renew(Resolved { repo_ref, tag, digest: &response.digest, checked_at, client }).await;
            }
            Err(error) => {
                self.negative_cache.put_tag(repo_ref, tag, error);
                if error.is_not_found() {
                    self.tags.forget(repo_ref, tag);
                }
            }
        }
    }

    async fn resolve(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        request_context: RequestContext,
    ) -> TagResolution {
        let downstream = request_context.downstream;
        let Some(peers) = self.peers_for_tags() else {
            return self.revalidate(repo_ref, tag, accept, downstream).await;
        };
        if request_context.role != Role::Global {
            return match self.tag_of_owners(peers, repo_ref, tag, accept, request_context).await? {
                Some(response) => Ok(response),
                // No owner is reachable: this node acts as the owner, also for peers that turn to it.
                None => {
                    self.resolve_once(repo_ref, tag, accept, RequestContext { role: Role::Global, ..request_context })
                        .await
                }
            };
        }
        // The upstream is the authority for its tags, and a HEAD is cheap: peers are requested only in an outage.
        let in_ring = in_ring(repo_ref, tag);
        let of_any_peer =
            PeerQuery { scope: outage_scope(repo_ref), ..query(repo_ref, &in_ring, PeerRequestMode::OnlyIfCached) };
        match self.revalidate(repo_ref, tag, accept, downstream).await {
            Err(error) if error.is_outage() => match peers.last_resort_tag(&of_any_peer, tag, accept).await {
                Some(response) => {
                    let (age, ttl) = (response.meaning.age, repo_ref.rule.ttl_of(tag));
                    match self.cache_tag(repo_ref, response).await {
                        fresh if age < ttl => Ok(fresh),
                        old if age < repo_ref.rule.stale_if_error => Ok(stale(old)),
                        _ => Err(error),
                    }
                }
                _ => Err(error),
            },
            resolution => resolution,
        }
    }

    /// None: no owner can be reached.
    async fn tag_of_owners(
        &self,
        peers: &Peers,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        request_context: RequestContext,
    ) -> Result<Option<ManifestResponse>, SourceError> {
        let in_ring = &in_ring(repo_ref, tag);
        let lead = peers.owner_route(in_ring, request_context.role, self.scope(repo_ref));
        request_from_owners(lead, format!("{repo_ref}:{tag}"), |owner, mode| async move {
            let query = PeerQuery { downstream: request_context.downstream, ..query(repo_ref, in_ring, mode) };
            self.tag_of_owner(peers, owner, &query, tag, accept).await
        })
        .await
    }

    /// Resolves a tag at its owner. Mostly the digest has not changed: then the manifest is not sent again.
    async fn tag_of_owner(
        &self,
        peers: &Peers,
        owner: SocketAddr,
        query: &PeerQuery<'_>,
        tag: &Tag,
        accept: &str,
    ) -> Result<ManifestResponse, SourceError> {
        let repo_ref = query.repo_ref;
        if let Some(known) = self.tags.resolution(repo_ref, tag).await
            && let Some((object, _)) =
                self.cached_manifest(repo_ref, &known.digest, Requester::Peer(PeerTrust::Authenticated)).await
        {
            match peers.tag_resolution(owner, query, tag, accept).await {
                Ok(PeerTagResolution { digest, age, from }) if digest == known.digest => {
                    return Ok(ManifestResponse { digest, object, from, age: Some(age) });
                }
                // It has moved, or only a GET brings the body of the upstream's error.
                Ok(_) => {}
                Err(SourceError::NotFound(_) | SourceError::Denied(_) | SourceError::Failed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.cache_tag(repo_ref, peers.tag(owner, query, tag, accept).await?).await)
    }

    async fn cache_tag(&self, repo_ref: &RepositoryRef, response: PeerTag) -> ManifestResponse {
        let PeerTag { meaning: PeerTagResolution { digest, age, from }, media_type, bytes } = response;
        let object = self.cache_manifest(repo_ref, &digest, &media_type, bytes).await;
        ManifestResponse { digest, object, from, age: Some(age) }
    }

    /// Resolves a tag at the upstream. Rate limits do not count a HEAD, and a GET follows only if the digest is not
    /// cached.
    async fn revalidate(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        downstream: Downstream,
    ) -> TagResolution {
        let is_known = self.tags.resolution(repo_ref, tag).await.is_some();
        let deadline = Instant::now() + if is_known { REVALIDATION_TIMEOUT } else { UPSTREAM_TIMEOUT };
        let reference = Reference::Tag(tag.clone());
        // A HEAD can spare the body where the manifest may be cached: the tag was resolved before, or peers may have
        // it. A tag that is new to a single node is requested at once, which takes half the time.
        let may_be_cached = is_known || self.peers_for_tags().is_some() || repo_ref.rule.is_passthrough();
        let head = match may_be_cached {
            true => self.upstream.manifest_digest(repo_ref, &reference, accept, deadline).await?,
            false => None,
        };
        if let Some(digest) = head {
            // Peers may join this flight, so only what peers may have is served from the cache.
            let request_context = RequestContext {
                requester: Requester::Peer(PeerTrust::Authenticated),
                downstream,
                ..RequestContext::CLIENT
            };
            match self.manifest_by_digest(repo_ref, &digest, accept, request_context).await {
                Ok((object, from)) => return Ok(ManifestResponse { digest, object, from, age: Some(Duration::ZERO) }),
                // The tag may have moved meanwhile, or the HEAD was wrong: the GET of the tag decides.
                Err(SourceError::NotFound(_) | SourceError::Malformed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // The tag's digest is computed from the bytes. `Docker-Content-Digest` is wrong at many registries, and
        // go-containerregistry ignores it for tags as well. A header that matches is used: it may be of another
        // algorithm.
        let response = self.upstream.manifest(repo_ref, &reference, accept, deadline).await?;
        let digest = response.claimed.filter(|claimed| claimed.matches(&response.bytes));
        let digest = digest.unwrap_or_else(|| Digest::of(&response.bytes));
        self.check_reachability(repo_ref, &response.bytes).await?;
        let object = self.cache_manifest(repo_ref, &digest, &response.media_type, response.bytes).await;
        Ok(ManifestResponse { digest, object, from: ServedFrom::Upstream, age: Some(Duration::ZERO) })
    }

    /// Authenticated peers only: no digest proves what a tag resolves to.
    fn peers_for_tags(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref().filter(|peers| peers.are_authenticated())
    }
}

/// The key that selects a tag's owner.
pub(super) fn in_ring(repo_ref: &RepositoryRef, tag: &Tag) -> Digest {
    Digest::of(format!("{repo_ref}:{tag}").as_bytes())
}

fn query<'a>(repo_ref: &'a RepositoryRef, in_ring: &'a Digest, mode: PeerRequestMode) -> PeerQuery<'a> {
    PeerQuery::about(repo_ref, in_ring, mode, Instant::now() + UPSTREAM_TIMEOUT)
}

fn is_stale(resolution: &TagResolution) -> bool {
    resolution.as_ref().is_ok_and(|response| response.from == ServedFrom::Stale)
}

fn stale(response: ManifestResponse) -> ManifestResponse {
    ManifestResponse { from: ServedFrom::Stale, ..response }
}
