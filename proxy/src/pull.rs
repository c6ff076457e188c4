//! How dray serves a request: from the cache, from a download in progress, or by one new download.
//!
//! | service | serves |
//! |---|---|
//! | [`ManifestService`] | manifests, by [`tag::TagService`] and [`manifest::ManifestFetcher`] |
//! | [`BlobService`] | blobs, their ranges and lengths |
//! | [`ListService`] | tags, referrers, the catalog |
//! | [`Authorizer`] | the decision whether a principal may pull, before any of these |

mod authorization;
mod blob;
mod body;
mod cache_admin;
mod cached_content;
mod error;
mod explain;
mod flights;
mod list;
mod manifest;
mod negative_cache;
mod peer_routing;
mod reachability;
mod referrers;
mod registry_hints;
mod request_context;
mod rule_check;
mod serve_policy;
mod slow_upstreams;
mod source_search;
mod tag;
mod throughput;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use self::authorization::AuthorizationCache;
pub use self::authorization::{AuthorizationError, Authorizer};
use self::blob::BlobContext;
pub use self::blob::{BlobExtent, BlobRequest, BlobResponse, BlobService};
pub use self::blob::{MAX_HOLDERS_TRIED, MAX_PEER_RANGES};
pub use self::body::Body;
pub use self::cache_admin::{CacheAdmin, CacheList, CacheOrder, ListedBlob, PurgeTarget, Purged};
use self::cached_content::CachedContent;
pub use self::error::{PullError, status_for_client};
use self::explain::Explainer;
pub use self::explain::Explanation;
pub use self::list::{ListBody, ListResponse, ListService};
use self::manifest::ManifestFetcher;
pub use self::manifest::{ManifestResponse, ManifestService};
use self::negative_cache::NegativeCache;
use self::peer_routing::PeerRouting;
use self::referrers::Referrers;
use self::registry_hints::RegistryHints;
pub use self::request_context::{RequestContext, Requester};
pub use self::rule_check::check_rule;
use self::serve_policy::ServePolicy;
use self::slow_upstreams::SlowUpstreams;
pub use self::source_search::{Decision, HolderStep, SearchProgress, Source, SourceSearch, WithoutOwner};
use self::tag::TagService;
use crate::config::{ByteRate, Config};
use crate::fill::Fills;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::peers::Peers;
use crate::registries::{Registries, RepositoryRef, Rules};
use crate::single_flight::SingleFlight;
use crate::store::Store;
use crate::tags::Tags;
pub use crate::upstream::{ExchangedSecret, ListKind};
use crate::upstream::{ReloadedSessions, UpstreamClient, UpstreamView};

/// The services of a process, and what they share with its operation.
pub struct Pull {
    pub authorizer: Arc<Authorizer>,
    pub manifests: Arc<ManifestService>,
    pub blobs: Arc<BlobService>,
    pub lists: Arc<ListService>,
    pub cache_admin: Arc<CacheAdmin>,
    explainer: Explainer,
    registries: Arc<Registries>,
    store: Arc<Store>,
    upstream: Arc<UpstreamClient>,
    routing: Arc<PeerRouting>,
}

impl Pull {
    pub fn new(
        registries: Arc<Registries>,
        store: Arc<Store>,
        upstream: UpstreamClient,
        peers: Option<Peers>,
        memory: Arc<Memory>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (upstream, routing) = (Arc::new(upstream), Arc::new(PeerRouting::new(peers)));
        let (negative_cache, slow_upstreams) = (Arc::new(NegativeCache::new()), SlowUpstreams::new());
        let authorizations = Arc::new(AuthorizationCache::new());
        let policy = Arc::new(ServePolicy::new(registries.clone(), authorizations.clone()));
        let content = Arc::new(CachedContent::new(store.clone(), policy.clone()));
        let (referrers, tags) = (Arc::new(Referrers::new(store.clone())), Arc::new(Tags::new(store.clone())));
        let registry_hints = Arc::new(RegistryHints::new(store.clone()));
        let authorizer = Arc::new(Authorizer::new(
            authorizations.clone(),
            store.clone(),
            policy,
            upstream.clone(),
            slow_upstreams.clone(),
            metrics.clone(),
        ));
        let fetcher = Arc::new(ManifestFetcher::new(
            content.clone(),
            routing.clone(),
            upstream.clone(),
            authorizations.clone(),
            negative_cache.clone(),
            referrers.clone(),
            metrics.clone(),
        ));
        let tag_service = Arc::new(TagService {
            tags: tags.clone(),
            registries: registries.clone(),
            manifests: fetcher.clone(),
            content: content.clone(),
            routing: routing.clone(),
            upstream: upstream.clone(),
            negative_cache: negative_cache.clone(),
            slow_upstreams,
            metrics: metrics.clone(),
            clock: SystemTime::now,
            flights: SingleFlight::default(),
        });
        let fills = Arc::new(Fills::new(store.clone(), memory, metrics.clone()));
        let context = Arc::new(BlobContext::new(
            fills.clone(),
            routing.clone(),
            upstream.clone(),
            authorizations,
            registry_hints.clone(),
        ));
        Self {
            manifests: Arc::new(ManifestService::new(
                fetcher,
                tag_service,
                upstream.clone(),
                negative_cache.clone(),
                registry_hints,
            )),
            blobs: Arc::new(BlobService::new(registries.clone(), content.clone(), negative_cache, context)),
            lists: Arc::new(ListService::new(store.clone(), upstream.clone(), authorizer.clone(), referrers, metrics)),
            cache_admin: Arc::new(CacheAdmin::new(registries.clone(), store.clone(), tags.clone(), fills)),
            explainer: Explainer {
                registries: registries.clone(),
                tags,
                content,
                routing: routing.clone(),
                upstream: upstream.clone(),
            },
            authorizer,
            registries,
            store,
            upstream,
            routing,
        }
    }

    /// Discovers and probes the peers for as long as it is polled.
    pub async fn follow_peers(&self) {
        if let Some(peers) = self.peers() {
            tokio::join!(peers.follow_services(), peers.run_pings());
        }
    }

    /// Waits until the peers are known.
    pub async fn wait_for_peers(&self) {
        if let Some(peers) = self.peers() {
            peers.wait_until_known().await;
        }
    }

    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.routing.peers()
    }

    pub fn registries(&self) -> &Registries {
        &self.registries
    }

    /// Explains a name such as `alpine`, `ghcr.io/team/app:1` or `reg.corp:5000/app@sha256:...`.
    pub async fn explain(&self, image: &str) -> Result<Explanation, String> {
        self.explainer.explain(image).await
    }

    /// Bytes of blobs on disk, their limit, and the disk space reserved for small objects.
    pub fn disk_usage(&self) -> (u64, u64, u64) {
        let (used, limit) = self.store.large.usage();
        (used, limit, self.store.small.disk_bytes())
    }

    /// Whether the upstream's rate limit is nearly used up, so that prefetches are postponed.
    pub fn is_rate_limit_low(&self, repo_ref: &RepositoryRef) -> bool {
        self.upstream.is_rate_limit_low(repo_ref)
    }

    /// Evicts these blobs last.
    pub fn pin(&self, digests: HashSet<Digest>) {
        self.store.large.pin(digests);
    }

    pub fn upstream_views(&self) -> Vec<UpstreamView> {
        self.upstream.upstreams()
    }

    /// What a changed configuration needs before it can apply. Must run inside a tokio runtime.
    pub(crate) fn reloaded(&self, config: &Config) -> Result<ReloadedRules, String> {
        let rules = self.registries.reloaded(config);
        let sessions = self.upstream.reloaded(&config.egress, &rules)?;
        Ok(ReloadedRules { rules, sessions, upstream_limit: config.limits.upstream })
    }

    /// Applies other rules to new requests, and returns them. Requests in progress end under their own.
    pub(crate) fn store(&self, reloaded: ReloadedRules) -> Arc<Rules> {
        // First: requests under the new rules need their sessions.
        self.upstream.store(reloaded.sessions, reloaded.upstream_limit);
        self.registries.store(reloaded.rules.clone());
        reloaded.rules
    }

    /// Reloads certificates and keys that were replaced on disk. Blocks on the disk.
    pub fn reload(&self) -> [Result<(), String>; 2] {
        [self.upstream.reload(), self.peers().map_or(Ok(()), |peers| peers.reload())]
    }
}

/// The rules of a changed configuration, ready to be applied.
pub(crate) struct ReloadedRules {
    rules: Arc<Rules>,
    sessions: ReloadedSessions,
    upstream_limit: Option<ByteRate>,
}
