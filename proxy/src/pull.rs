//! How dray serves a request: from the cache, from a download in progress, or by one new download.

mod authorization;
mod blob;
mod cached;
mod content_proof;
mod error;
mod existence;
mod explain;
mod lend;
mod length;
mod list;
mod manifest;
mod negative_cache;
mod owners;
mod parts;
mod range;
mod reachability;
mod registry_hints;
mod request_context;
mod sources;
mod tag;
mod throughput;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::authorization::AuthorizationCache;
pub use self::authorization::AuthorizationError;
pub use self::blob::{BlobExtent, BlobRequest, BlobResponse, Body};
pub use self::error::{PullError, status_for_client};
pub use self::explain::Explanation;
pub use self::list::{ListBody, ListResponse};
pub use self::manifest::ManifestResponse;
use self::negative_cache::NegativeCache;
use self::reachability::Reachability;
use self::registry_hints::RegistryHints;
pub use self::request_context::{RequestContext, Requester};
use self::throughput::ThroughputEstimates;
use crate::config::{Config, CrossZonePeers};
use crate::confirmed_at::ConfirmedAt;
use crate::fill::{FillKey, FillView, Fills};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::oci::{Digest, Registry, Repository, Tag};
use crate::peers::swarm::Contribution;
use crate::peers::wire::Holder;
use crate::peers::{Peers, Scope};
use crate::principal::PrincipalId;
use crate::provenance::Provenance;
use crate::registries::{Registries, RepositoryRef, Rules};
use crate::role::Role;
use crate::secret::Secret;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::store::Store;
use crate::tags::Tags;
use crate::times::{DEFAULT_TTL, HOUR, OBSERVATION_TTL, STALL_TIMEOUT, UPSTREAM_TIMEOUT};
pub use crate::upstream::{ExchangedSecret, ListKind};
use crate::upstream::{ReloadedSessions, UpstreamClient, UpstreamView};

/// How long a slow upstream counts as slow, unless it responds earlier. Longer: stale tags are served for longer.
/// Shorter: more requests wait the full `ALTERNATIVE_TIMEOUT`.
const SLOW_UPSTREAM_TTL: Duration = Duration::from_secs(15);

/// List copies that are unpacked at the same time. More: each takes some MiB of memory before its size is counted.
/// Fewer: lists wait for each other during an outage.
const MAX_CONCURRENT_UNPACKS: usize = 4;

/// The state that pulls share.
pub struct Pull {
    registries: Arc<Registries>,
    store: Arc<Store>,
    upstream: Arc<UpstreamClient>,
    peers: Option<Arc<Peers>>,
    fills: Arc<Fills>,
    tags: Tags,
    metrics: Arc<Metrics>,
    negative_cache: NegativeCache,
    reachability: Reachability,
    authorizations: AuthorizationCache,
    /// Registries that did not respond within the timeout while a stale result was at hand.
    slow_upstreams: moka::sync::Cache<Registry, ()>,
    // The principal is None where all clients share a flight, and set where an earlier response was about rights.
    manifest_flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), manifest::FetchedManifest>,
    tag_flights: SingleFlight<(String, Tag, Role, Option<PrincipalId>), tag::TagResolution>,
    /// Checks whether repositories hold manifests that were cached from other repositories.
    confirmations: SingleFlight<(String, Digest), Result<(), SourceError>>,
    /// Lengths of blobs that are not cached on this node.
    lengths: moka::sync::Cache<(String, Digest), u64>,
    length_flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), length::Length>,
    registry_hints: Arc<RegistryHints>,
    /// Number of list copies written within the last hour, by repository.
    list_copies: moka::sync::Cache<String, Arc<AtomicU32>>,
    unpacking: Semaphore,
    /// Held while the referrers of a manifest are read, changed and written.
    referrers_lock: Arc<Mutex<()>>,
    /// When the response in each list's record was requested.
    list_times: ConfirmedAt<String, Instant>,
    /// What each peer sent of a corrupt blob, until a verified copy shows which peer was wrong.
    suspect_contributions: moka::sync::Cache<(Digest, Registry), Arc<Vec<Contribution>>>,
    throughput: ThroughputEstimates,
    /// The holders of blobs as peers last reported them.
    holders: moka::sync::Cache<(FillKey, sources::QueryScope), Arc<Vec<Holder>>>,
    /// Bytes requested in bounded ranges, by blob.
    requested_ranges: moka::sync::Cache<Digest, range::RequestedRanges>,
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
        Self {
            fills: Arc::new(Fills::new(store.clone(), memory, metrics.clone())),
            tags: Tags::new(store.clone()),
            registries,
            upstream: Arc::new(upstream),
            peers: peers.map(Arc::new),
            metrics,
            negative_cache: NegativeCache::new(),
            reachability: Reachability::new(),
            authorizations: AuthorizationCache::new(),
            slow_upstreams: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(SLOW_UPSTREAM_TTL).build(),
            manifest_flights: SingleFlight::default(),
            tag_flights: SingleFlight::default(),
            confirmations: SingleFlight::default(),
            lengths: moka::sync::Cache::builder().max_capacity(50_000).time_to_live(DEFAULT_TTL).build(),
            length_flights: SingleFlight::default(),
            registry_hints: Arc::new(RegistryHints::new(store.clone())),
            list_copies: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(HOUR).build(),
            unpacking: Semaphore::new(MAX_CONCURRENT_UNPACKS),
            referrers_lock: Arc::default(),
            list_times: ConfirmedAt::new(HOUR),
            suspect_contributions: moka::sync::Cache::builder().max_capacity(100).time_to_live(OBSERVATION_TTL).build(),
            throughput: ThroughputEstimates::new(),
            holders: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(STALL_TIMEOUT).build(),
            requested_ranges: moka::sync::Cache::builder()
                .max_capacity(50_000)
                .time_to_idle(Duration::from_secs(600))
                .build(),
            store,
        }
    }

    /// Discovers and probes the peers for as long as it is polled.
    pub async fn follow_peers(&self) {
        if let Some(peers) = &self.peers {
            tokio::join!(peers.follow_services(), peers.run_pings());
        }
    }

    /// Waits until the peers are known.
    pub async fn wait_for_peers(&self) {
        if let Some(peers) = &self.peers {
            peers.wait_until_known().await;
        }
    }

    /// Verifies cached blobs again, at most `rate` bytes a second, for as long as it is polled.
    pub async fn scrub(&self, rate: u64) {
        self.fills.scrub(rate).await;
    }

    /// A repository with its rule. Where the rule leaves authorization to the upstream, no principal is set yet.
    pub fn repo_ref(&self, registry: Registry, repository: Repository) -> RepositoryRef {
        let rule = self.registries.rule(&registry, &repository);
        RepositoryRef::new(rule, registry, repository)
    }

    /// Denies what the rule forbids, unauthorized clients, and private content to unauthenticated peers.
    pub fn permit(&self, repo_ref: &RepositoryRef, requester: Requester) -> Result<(), PullError> {
        if repo_ref.rule.deny {
            return Err(PullError::Denied(format!(
                "{} is denied by rule \"{}\"",
                repo_ref.registry,
                repo_ref.rule.name()
            )));
        }
        if !repo_ref.principal.is_authorized() {
            return Err(PullError::Denied(format!(
                "{} needs authorization: log in with an account that may pull from it",
                repo_ref.registry
            )));
        }
        if !requester.is_trusted() && repo_ref.rule.is_private() {
            return Err(PullError::Denied(format!(
                "{} needs credentials: it is shared only with authenticated peers",
                repo_ref.registry
            )));
        }
        Ok(())
    }

    /// Whether the rule of the registry that a cached object came from allows to serve it. An object that may not be
    /// served counts as a cache miss: the requested upstream decides.
    ///
    /// A peer's rules were compared only for the registry that it requested from.
    fn may_serve(
        &self,
        digest: &Digest,
        provenance: Option<&Provenance>,
        requester: Requester,
        repo_ref: &RepositoryRef,
    ) -> bool {
        let from = |provenance: &Provenance| -> Option<(Registry, Repository)> {
            Some((provenance.registry.parse().ok()?, provenance.repository.parse().ok()?))
        };
        // Two registries may hold the same layer, and its provenance names only one of them.
        if requester.is_trusted() && !repo_ref.rule.deny && self.authorizations.was_sent(repo_ref, digest) {
            return true;
        }
        // Fast path: most objects came from the requested repository.
        let is_from_repository = provenance.is_some_and(|from| repo_ref.is_source_of(from));
        if requester == Requester::Client && !repo_ref.rule.is_passthrough() && is_from_repository {
            return !repo_ref.rule.deny;
        }
        match provenance.and_then(from) {
            Some((registry, repository)) => {
                // A request in progress judges its own repository by the rule that it began with.
                let is_own = registry == repo_ref.registry && repository == repo_ref.repository;
                let current = || self.registries.rule(&registry, &repository);
                let rule = if is_own { repo_ref.rule.clone() } else { current() };
                let is_known =
                    requester == Requester::Client || (requester.is_trusted() && rule.id == repo_ref.rule.id);
                // Rules may route repositories of one registry to different upstreams. Rights at one are not rights at
                // another.
                let belongs = !rule.is_passthrough()
                    || (rule.id == repo_ref.rule.id
                        && self.authorizations.belongs_to(repo_ref, &registry, &repository, digest));
                !rule.deny && belongs && (is_known || !rule.is_private())
            }
            // The provenance is lost: it is served to clients only if no rule needs authorization by the upstream.
            None => requester == Requester::Client && !self.registries.any_passthrough(),
        }
    }

    /// What the repository's registry returns for a credential.
    pub async fn exchange(&self, repo_ref: &RepositoryRef, secret: Secret) -> Result<ExchangedSecret, SourceError> {
        // No request to an upstream that is down. A rate limit may not apply to this credential, so it is tried.
        match self.upstream.trouble(repo_ref) {
            Some(trouble) if !matches!(trouble, SourceError::Limited { .. }) => Err(trouble),
            _ => self.upstream.exchange(repo_ref, secret, Instant::now() + UPSTREAM_TIMEOUT).await,
        }
    }

    /// The role in which this node fetches a digest. It downloads from the upstream if it is the owner, or is requested
    /// as the owner. It also does so if peers may not get the repository or the principal's credential.
    fn role(&self, repo_ref: &RepositoryRef, digest: &Digest, request_context: RequestContext) -> Role {
        let peers = self.peers_for(repo_ref).filter(|_| repo_ref.principal.may_be_forwarded());
        peers.map_or(Role::Global, |peers| peers.owner_route(digest, request_context.role, self.scope(repo_ref)).role)
    }

    /// Whether this node owns a digest: it downloads and caches it for all nodes.
    pub fn is_owner(&self, repo_ref: &RepositoryRef, digest: &Digest) -> bool {
        self.role(repo_ref, digest, RequestContext::CLIENT) == Role::Global
    }

    /// Whether peers of other zones are sources for this repository.
    fn scope(&self, repo_ref: &RepositoryRef) -> Scope {
        match repo_ref.rule.cross_zone_peers {
            CrossZonePeers::UnlessSlower if self.throughput.upstream_is_faster(repo_ref.rule.name()) => Scope::OwnZone,
            CrossZonePeers::Always | CrossZonePeers::UnlessSlower => Scope::AllZones,
            CrossZonePeers::Never => Scope::OwnZone,
        }
    }

    /// The peers, if this repository may be shared with them.
    fn peers_for(&self, repo_ref: &RepositoryRef) -> Option<&Arc<Peers>> {
        self.peers.as_ref().filter(|peers| may_share(peers, repo_ref))
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

    pub fn download_views(&self) -> Vec<FillView> {
        self.fills.views()
    }

    pub fn upstream_views(&self) -> Vec<UpstreamView> {
        self.upstream.upstreams()
    }

    /// What a changed configuration needs before it can apply. Must run inside a tokio runtime.
    pub(crate) fn reloaded(&self, config: &Config) -> Result<ReloadedRules, String> {
        let rules = self.registries.reloaded(config);
        let sessions = self.upstream.reloaded(&config.egress, &rules)?;
        Ok(ReloadedRules { rules, sessions })
    }

    /// Applies other rules to new requests, and returns them. Requests in progress end under their own.
    pub(crate) fn store(&self, reloaded: ReloadedRules) -> Arc<Rules> {
        // First: requests under the new rules need their sessions.
        self.upstream.store(reloaded.sessions);
        self.registries.store(reloaded.rules.clone());
        reloaded.rules
    }

    /// Reloads certificates and keys that were replaced on disk. Blocks on the disk.
    pub fn reload(&self) -> [Result<(), String>; 2] {
        [self.upstream.reload(), self.peers.as_ref().map_or(Ok(()), |peers| peers.reload())]
    }

    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref()
    }
}

/// The rules of a changed configuration, ready to be applied.
pub(crate) struct ReloadedRules {
    rules: Arc<Rules>,
    sessions: ReloadedSessions,
}

/// Content that needs credentials is shared only with authenticated peers.
fn may_share(peers: &Peers, repo_ref: &RepositoryRef) -> bool {
    peers.are_authenticated() || !repo_ref.rule.is_private()
}

/// Whether a result is about the rights or the rate limit of one principal: another principal may get more.
fn is_personal<T>(repo_ref: &RepositoryRef, result: &Result<T, SourceError>) -> bool {
    let is_about_principal = |error: &SourceError| {
        matches!(
            error,
            SourceError::NotFound(_)
                | SourceError::Denied(_)
                | SourceError::Limited { .. }
                | SourceError::NoCredentials(_)
        )
    };
    repo_ref.rule.is_passthrough() && result.as_ref().err().is_some_and(is_about_principal)
}

/// The key of the flight that all principals share, and the key of the principal's own flight. A principal without a
/// credential for the upstream uses only its own: its failure must not reach others.
fn flight_keys<K>(repo_ref: &RepositoryRef, key: impl Fn(Option<PrincipalId>) -> K) -> (K, K) {
    let own = Some(repo_ref.principal.principal_id());
    (key(own.filter(|_| repo_ref.principal.lacks_authorization())), key(own))
}

/// The result of a flight that panicked.
fn fetch_ended<T>() -> Result<T, SourceError> {
    Err(SourceError::Unreachable("internal error: the task panicked, see dray's log".into()))
}
