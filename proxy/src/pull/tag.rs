//! Resolves a tag: from the cache while it is fresh, then by the tag's owner, then by the upstream.
//!
//! Authenticated peers request the tag's owner, so that all nodes resolve it to the same digest. Each resolution
//! carries its age: of several the youngest wins, and the TTL ends on all nodes at the same time.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout};

use super::cached_content::CachedContent;
use super::flights::{fetch_ended, flight_keys, is_personal};
use super::manifest::ManifestFetcher;
use super::negative_cache::{NegativeCache, NegativeKind};
use super::peer_routing::{PeerRouting, outage_scope, tag_key};
use super::slow_upstreams::SlowUpstreams;
use super::source_search::{
    HolderStep, ObjectSource, SearchResult, Source, SourceFailure, SourceSearch, WithoutOwner, search,
};
use super::{ManifestResponse, RequestContext, Requester};
use crate::metrics::Metrics;
use crate::oci::{Digest, Reference, Tag};
use crate::peers::{FetchPolicy, PeerQuery, PeerRequestMode, PeerTag, PeerTagResolution, PeerTrust, Peers};
use crate::principal::PrincipalId;
use crate::registries::{Registries, RepositoryRef};
use crate::role::Role;
use crate::single_flight::SingleFlight;
use crate::source::{ServedFrom, SourceError};
use crate::tags::{Resolved, Tags};
use crate::times::{ALTERNATIVE_TIMEOUT, UPSTREAM_TIMEOUT, WallClock};
use crate::upstream::UpstreamClient;

/// Resolves tags.
pub(super) struct TagService {
    pub(super) tags: Arc<Tags>,
    pub(super) registries: Arc<Registries>,
    pub(super) manifests: Arc<ManifestFetcher>,
    pub(super) content: Arc<CachedContent>,
    pub(super) routing: Arc<PeerRouting>,
    pub(super) upstream: Arc<UpstreamClient>,
    pub(super) negative_cache: Arc<NegativeCache>,
    pub(super) slow_upstreams: SlowUpstreams,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: WallClock,
    // The principal is None where all clients share a flight, and set where an earlier response was about rights.
    pub(super) flights: SingleFlight<(String, Tag, Role, Option<PrincipalId>), TagResolution>,
}

/// What a tag resolves to.
pub(super) type TagResolution = Result<ManifestResponse, SourceError>;

/// What is served when a tag was to be revalidated.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Result,
    /// The expired resolution, and why.
    Expired(&'static str),
}

/// How long a revalidation stays open while clients get the stale tag. Longer: a request that an upstream has lost
/// keeps the tag stale for longer. Shorter: tags of slower upstreams are never revalidated.
const REVALIDATION_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client waits before it gets a stale tag of an upstream that was slow lately. Longer: each pull is
/// delayed. Shorter: a recovered upstream is noticed later.
const SLOW_UPSTREAM_TIMEOUT: Duration = Duration::from_millis(20);

impl TagService {
    /// The manifest of a tag.
    pub(super) async fn manifest(
        self: &Arc<Self>,
        repo_ref: &RepositoryRef,
        tag: &Tag,
        accept: &str,
        request_context: RequestContext,
    ) -> TagResolution {
        let now = (self.clock)();
        let mut expired = None;
        if let Some(cached) = self.tags.resolution(repo_ref, tag).await
            && let Some((object, from)) =
                self.content.manifest(repo_ref, &cached.digest, request_context.requester).await
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
        let role = self.routing.tag_role(repo_ref, tag, request_context);
        let asked = self.resolve_once(repo_ref, tag, accept, RequestContext { role, ..request_context });
        let Some(expired) = expired else {
            return match asked.await {
                Err(error) if error.is_transient_outage() && self.tags.was_absent(repo_ref, tag).await => {
                    Err(SourceError::not_found())
                }
                resolution => self.count_stale(repo_ref, tag, resolution, "peer"),
            };
        };
        let time_limit =
            if self.slow_upstreams.contains(&repo_ref.registry) { SLOW_UPSTREAM_TIMEOUT } else { ALTERNATIVE_TIMEOUT };
        let asked = tokio::select! {
            biased;
            // An upstream that is down is probed in the background, and a rate-limited one gets no request.
            trouble = self.upstream.until_unavailable(repo_ref), if role == Role::Global => {
                return self.count_stale(repo_ref, tag, Ok(stale(expired)), trouble.as_str());
            }
            asked = timeout(time_limit, asked) => asked,
        };
        if asked.is_err() && time_limit == ALTERNATIVE_TIMEOUT {
            self.slow_upstreams.mark_slow(&repo_ref.registry);
        }
        let choice = choose(asked.as_ref().ok(), expired.age);
        match (choice, asked) {
            (Choice::Expired(reason), _) => self.count_stale(repo_ref, tag, Ok(stale(expired)), reason),
            (Choice::Result, Ok(resolution)) => self.count_stale(repo_ref, tag, resolution, "peer"),
            (Choice::Result, Err(_)) => Err(SourceError::TimedOut),
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
        let result = self.flights.join_or_own(
            shared,
            own,
            // With upstream authorization a stale tag may result from one principal's missing credential.
            |resolution| is_personal(repo_ref, resolution) || (repo_ref.rule.is_passthrough() && is_stale(resolution)),
            move || {
                let (service, repo_ref, tag, accept) = (self.clone(), repo_ref.clone(), tag.clone(), accept.to_owned());
                async move {
                    // Another flight may have resolved the tag since this request looked it up.
                    if let Some(response) = service.just_resolved(&repo_ref, &tag).await {
                        return Ok(response);
                    }
                    let resolution = service.resolve(&repo_ref, &tag, &accept, request_context).await;
                    service.remember(&repo_ref, &tag, &resolution, request_context.client).await;
                    resolution
                }
            },
        );
        async move { result.await.unwrap_or_else(fetch_ended) }.boxed()
    }

    /// The resolution of a tag in memory, if it is fresh.
    async fn just_resolved(&self, repo_ref: &RepositoryRef, tag: &Tag) -> Option<ManifestResponse> {
        let now = (self.clock)();
        let cached = self.tags.in_memory(repo_ref, tag).filter(|cached| cached.is_fresh(repo_ref, tag, now))?;
        let (object, from) = self.content.shared_manifest(repo_ref, &cached.digest).await?;
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
                    self.slow_upstreams.mark_responsive(&repo_ref.registry);
                }
                let age = response.age.unwrap_or_default();
                let checked_at = (self.clock)().checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
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
        let key = tag_key(repo_ref, tag);
        let sources = TagSources { service: self, repo_ref, tag, key, accept, request_context };
        match search(sources.search(), &sources).await? {
            SearchResult::Found(response) => Ok(response),
            // Peers may turn to this node: all of them share its flight.
            SearchResult::ActAsOwner => {
                self.resolve_once(repo_ref, tag, accept, RequestContext { role: Role::Global, ..request_context }).await
            }
        }
    }
}

/// The sources of one tag. No holders: the upstream is the authority for its tags, and a HEAD is cheap.
struct TagSources<'a> {
    service: &'a TagService,
    repo_ref: &'a RepositoryRef,
    tag: &'a Tag,
    key: Digest,
    accept: &'a str,
    request_context: RequestContext,
}

#[async_trait]
impl ObjectSource for TagSources<'_> {
    type Object = ManifestResponse;

    async fn request(&self, source: Source) -> Result<ManifestResponse, SourceFailure> {
        let resolution = match (source, self.service.routing.peers_for_tags()) {
            (Source::Upstream, _) => self.revalidate().await,
            (Source::Owner { peer, role }, Some(peers)) => self.of_owner(peers, peer, role).await,
            (Source::AnyPeer, Some(peers)) => self.of_any_peer(peers).await,
            (Source::Holders | Source::Owner { .. } | Source::AnyPeer, _) => Err(SourceError::NotCached),
        };
        Ok(resolution?)
    }

    fn name(&self) -> impl fmt::Display + Send {
        format!("{}:{}", self.repo_ref, self.tag)
    }
}

impl TagSources<'_> {
    fn search(&self) -> SourceSearch {
        let routing = &self.service.routing;
        let Some(peers) = routing.peers_for_tags() else { return SourceSearch::upstream_only() };
        let role = self.request_context.role;
        let route = peers.owner_route(&self.key, role, routing.scope(self.repo_ref));
        SourceSearch::new(role, route, HolderStep::Skipped, WithoutOwner::ActAsOwner)
    }

    fn query(&self, mode: PeerRequestMode) -> PeerQuery<'_> {
        PeerQuery::about(self.repo_ref, &self.key, mode, Instant::now() + UPSTREAM_TIMEOUT)
    }

    /// Resolves a tag at its owner. Mostly the digest has not changed: then the manifest is not sent again.
    async fn of_owner(&self, peers: &Peers, owner: SocketAddr, role: Role) -> TagResolution {
        let Self { service, repo_ref, tag, accept, .. } = self;
        let query = PeerQuery { downstream: self.request_context.downstream, ..self.query(PeerRequestMode::As(role)) };
        if let Some(known) = service.tags.resolution(repo_ref, tag).await
            && let Some((object, _)) = service.content.shared_manifest(repo_ref, &known.digest).await
        {
            match peers.tag_resolution(owner, &query, tag, accept).await {
                Ok(PeerTagResolution { digest, age, from }) if digest == known.digest => {
                    return Ok(ManifestResponse { digest, object, from, age: Some(age) });
                }
                // It has moved, or only a GET brings the body of the upstream's error.
                Ok(_) => {}
                Err(SourceError::NotFound(_) | SourceError::Denied(_) | SourceError::Failed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.cache(peers.tag(owner, &query, tag, accept).await?).await)
    }

    /// The youngest resolution of any peer, unless it is too old.
    async fn of_any_peer(&self, peers: &Peers) -> TagResolution {
        let query = PeerQuery { scope: outage_scope(self.repo_ref), ..self.query(PeerRequestMode::OnlyIfCached) };
        let response = peers.last_resort_tag(&query, self.tag, self.accept).await.ok_or(SourceError::NotCached)?;
        let (age, rule) = (response.meaning.age, &self.repo_ref.rule);
        match self.cache(response).await {
            fresh if age < rule.ttl_of(self.tag) => Ok(fresh),
            old if age < rule.stale_if_error => Ok(stale(old)),
            _ => Err(SourceError::NotCached),
        }
    }

    async fn cache(&self, response: PeerTag) -> ManifestResponse {
        let PeerTag { meaning: PeerTagResolution { digest, age, from }, media_type, bytes } = response;
        let object = self.service.manifests.cache(self.repo_ref, &digest, &media_type, bytes).await;
        ManifestResponse { digest, object, from, age: Some(age) }
    }

    /// Resolves a tag at the upstream. Rate limits do not count a HEAD, and a GET follows only if the digest is not
    /// cached.
    async fn revalidate(&self) -> TagResolution {
        let Self { service, repo_ref, tag, accept, .. } = self;
        let is_known = service.tags.resolution(repo_ref, tag).await.is_some();
        let deadline = Instant::now() + if is_known { REVALIDATION_TIMEOUT } else { UPSTREAM_TIMEOUT };
        let reference = Reference::Tag((*tag).clone());
        // A HEAD can spare the body where the manifest may be cached: the tag was resolved before, or peers may have
        // it. A tag that is new to a single node is requested at once, which takes half the time.
        let may_be_cached = is_known || service.routing.peers_for_tags().is_some() || repo_ref.rule.is_passthrough();
        let head = match may_be_cached {
            true => service.upstream.manifest_digest(repo_ref, &reference, accept, deadline).await?,
            false => None,
        };
        if let Some(digest) = head {
            // Peers may join this flight, so only what peers may have is served from the cache.
            let request_context = RequestContext {
                requester: Requester::Peer(PeerTrust::Authenticated),
                downstream: self.request_context.downstream,
                ..RequestContext::CLIENT
            };
            match service.manifests.manifest(repo_ref, &digest, accept, request_context).await {
                Ok((object, from)) => return Ok(ManifestResponse { digest, object, from, age: Some(Duration::ZERO) }),
                // The tag may have moved meanwhile, or the HEAD was wrong: the GET of the tag decides.
                Err(SourceError::NotFound(_) | SourceError::Malformed(_)) => {}
                Err(error) => return Err(error),
            }
        }
        // The tag's digest is computed from the bytes. `Docker-Content-Digest` is wrong at many registries, and
        // go-containerregistry ignores it for tags as well. A header that matches is used: it may be of another
        // algorithm.
        let response = service.upstream.manifest(repo_ref, &reference, accept, deadline).await?;
        let digest = response.claimed.clone().filter(|claimed| claimed.matches(&response.bytes));
        let digest = digest.unwrap_or_else(|| Digest::of(&response.bytes));
        let object = service.manifests.accept(repo_ref, &digest, response).await?;
        Ok(ManifestResponse { digest, object, from: ServedFrom::Upstream, age: Some(Duration::ZERO) })
    }
}

/// What is served while an expired resolution of this age is at hand. None: the flight has no result yet. It continues,
/// and revalidates the tag for later requests.
fn choose(resolution: Option<&TagResolution>, expired: Option<Duration>) -> Choice {
    match resolution {
        None => Choice::Expired("slow"),
        // A peer's stale resolution may be older than this node's.
        Some(Ok(response)) if response.from == ServedFrom::Stale && response.age >= expired => Choice::Expired("peer"),
        Some(Err(error)) if error.is_outage() => Choice::Expired(error.as_str()),
        Some(_) => Choice::Result,
    }
}

fn is_stale(resolution: &TagResolution) -> bool {
    resolution.as_ref().is_ok_and(|response| response.from == ServedFrom::Stale)
}

fn stale(response: ManifestResponse) -> ManifestResponse {
    ManifestResponse { from: ServedFrom::Stale, ..response }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provenance::Provenance;
    use crate::store::SmallObject;

    fn resolution(from: ServedFrom, age: u64) -> TagResolution {
        let provenance = Provenance { rule: String::new(), registry: String::new(), repository: String::new() };
        let object = SmallObject::new("text/plain", Arc::new(provenance), b"x");
        Ok(ManifestResponse { digest: Digest::of(b"x"), object, from, age: Some(Duration::from_secs(age)) })
    }

    #[test]
    fn expired_tag_is_served_only_if_nothing_better_came() {
        let cases = [
            (None, Choice::Expired("slow")),
            (Some(resolution(ServedFrom::Upstream, 0)), Choice::Result),
            (Some(resolution(ServedFrom::Stale, 5)), Choice::Result),
            (Some(resolution(ServedFrom::Stale, 10)), Choice::Expired("peer")),
            (Some(Err(SourceError::not_found())), Choice::Result),
            (Some(Err(SourceError::denied())), Choice::Result),
            (Some(Err(SourceError::TimedOut)), Choice::Expired(SourceError::TimedOut.as_str())),
        ];
        for (asked, want) in cases {
            let text = format!("{:?}", asked.as_ref().map(|asked| asked.as_ref().map(|found| (found.from, found.age))));
            assert_eq!(choose(asked.as_ref(), Some(Duration::from_secs(10))), want, "{text}");
        }
    }
}
