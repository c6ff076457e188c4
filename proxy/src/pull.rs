//! What dray does with a request: serve what is kept, join what is under way, fetch the rest once.

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
use crate::config::CrossZonePeers;
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
use crate::registries::{Registries, RepositoryRef};
use crate::role::Role;
use crate::secret::Secret;
use crate::single_flight::SingleFlight;
use crate::source::SourceError;
use crate::store::Store;
use crate::tags::Tags;
use crate::times::{DEFAULT_TTL, HOUR, OBSERVATION_TTL, STALL_TIMEOUT, UPSTREAM_TIMEOUT};
pub use crate::upstream::{ExchangedSecret, ListKind};
use crate::upstream::{UpstreamClient, UpstreamView};

/// A registry that took long is taken to take long again for this time, or until it answers.
const SLOW: Duration = Duration::from_secs(15);

const UNPACKING: usize = 4;

/// Everything that a pull needs.
pub struct Pull {
    registries: Arc<Registries>,
    store: Arc<Store>,
    upstream: Arc<UpstreamClient>,
    peers: Option<Arc<Peers>>,
    fills: Arc<Fills>,
    tags: Tags,
    metrics: Arc<Metrics>,
    negatives: NegativeCache,
    reachable: Reachability,
    entitlements: AuthorizationCache,
    /// Registries that lately kept somebody waiting who had an older answer.
    slow: moka::sync::Cache<Registry, ()>,
    // For all who ask for it there, and where one of them was refused, for each by itself.
    manifest_flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), manifest::FetchedManifest>,
    tag_flights: SingleFlight<(String, Tag, Role, Option<PrincipalId>), tag::TagResolution>,
    /// Whether repositories hold manifests that are cached from others.
    confirmations: SingleFlight<(String, Digest), Result<(), SourceError>>,
    /// How long blobs are that are not here.
    lengths: moka::sync::Cache<(Registry, Repository, Digest), u64>,
    length_flights: SingleFlight<(String, Digest, Role, Option<PrincipalId>), length::Length>,
    homes: Arc<RegistryHints>,
    /// Copies of lists that were written lately, by repository.
    list_copies: moka::sync::Cache<String, Arc<AtomicU32>>,
    /// Copies that are unpacked at the same time: each takes some MiB before its size is counted.
    unpacking: Semaphore,
    /// Held while the artifacts of a manifest are written.
    subjects: Arc<Mutex<()>>,
    /// When the response was requested that each list's record tells of.
    list_words: ConfirmedAt<String, Instant>,
    /// Who sent what of blobs that did not match, until the truth is known.
    suspects: moka::sync::Cache<(Digest, Registry), Arc<Vec<Contribution>>>,
    speeds: ThroughputEstimates,
    /// What peers lately said to have of blobs.
    holders: moka::sync::Cache<(FillKey, sources::PeersAsked), Arc<Vec<Holder>>>,
    /// Bytes of bounded ranges asked for, by blob.
    asked: moka::sync::Cache<Digest, range::RequestedRanges>,
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
            negatives: NegativeCache::new(),
            reachable: Reachability::new(),
            entitlements: AuthorizationCache::new(),
            slow: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(SLOW).build(),
            manifest_flights: SingleFlight::default(),
            tag_flights: SingleFlight::default(),
            confirmations: SingleFlight::default(),
            lengths: moka::sync::Cache::builder().max_capacity(50_000).time_to_live(DEFAULT_TTL).build(),
            length_flights: SingleFlight::default(),
            homes: Arc::new(RegistryHints::new(store.clone())),
            list_copies: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(HOUR).build(),
            unpacking: Semaphore::new(UNPACKING),
            subjects: Arc::default(),
            list_words: ConfirmedAt::new(HOUR),
            suspects: moka::sync::Cache::builder().max_capacity(100).time_to_live(OBSERVATION_TTL).build(),
            speeds: ThroughputEstimates::new(),
            holders: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(STALL_TIMEOUT).build(),
            asked: moka::sync::Cache::builder().max_capacity(50_000).time_to_idle(Duration::from_secs(600)).build(),
            store,
        }
    }

    /// Follows who the peers are, and whether they are there, for as long as it is polled.
    pub async fn follow_peers(&self) {
        if let Some(peers) = &self.peers {
            tokio::join!(peers.follow_services(), peers.look_after());
        }
    }

    /// Waits until the peers are known.
    pub async fn peers_known(&self) {
        if let Some(peers) = &self.peers {
            peers.formed().await;
        }
    }

    /// Reads what is kept again, at most `rate` bytes a second, for as long as it is polled.
    pub async fn scrub(&self, rate: u64) {
        self.fills.scrub(rate).await;
    }

    /// A repository with the rule that holds for it.
    pub fn place(&self, registry: Registry, repository: Repository) -> RepositoryRef {
        let rule = self.registries.rule(&registry, &repository).clone();
        RepositoryRef::new(rule, registry, repository)
    }

    /// What a rule forbids, and what peers may not have without proof of who they are.
    pub fn permit(&self, place: &RepositoryRef, asker: Requester) -> Result<(), PullError> {
        if place.rule.deny {
            return Err(PullError::Denied(format!("{} is denied by rule \"{}\"", place.registry, place.rule.name())));
        }
        if !place.caller.is_let_in() {
            return Err(PullError::Denied(format!("{} is for those who may pull from it", place.registry)));
        }
        if !asker.is_trusted() && place.rule.is_private() {
            return Err(PullError::Denied(format!(
                "{} needs credentials and is not shared with peers",
                place.registry
            )));
        }
        Ok(())
    }

    /// Whether something kept may be given out, by the rule of the registry that it came from. What
    /// may not is as good as not kept: the origin of whoever asks decides.
    ///
    /// A peer's rules were compared for the registry that it asks for, and for no other.
    fn may_give(
        &self,
        digest: &Digest,
        provenance: Option<&Provenance>,
        asker: Requester,
        place: &RepositoryRef,
    ) -> bool {
        let from = |provenance: &Provenance| -> Option<(Registry, Repository)> {
            Some((provenance.registry.parse().ok()?, provenance.repository.parse().ok()?))
        };
        // Two registries may have the same layer: each has sent it.
        if asker.is_trusted() && !place.rule.deny && self.entitlements.has_sent(place, digest) {
            return true;
        }
        // What most requests are for came from the very place.
        let is_of_place = provenance.is_some_and(|from| place.is_source_of(from));
        if asker == Requester::Client && !place.rule.asks_who() && is_of_place {
            return !place.rule.deny;
        }
        match provenance.and_then(from) {
            Some((registry, repository)) => {
                let rule = self.registries.rule(&registry, &repository);
                let is_known = asker == Requester::Client || (asker.is_trusted() && Arc::ptr_eq(rule, &place.rule));
                // Rules may send parts of a registry elsewhere: rights there are none here.
                let belongs = !rule.asks_who()
                    || (Arc::ptr_eq(rule, &place.rule)
                        && self.entitlements.belongs(place, &registry, &repository, digest));
                !rule.deny && belongs && (is_known || !rule.is_private())
            }
            // Its record is lost: only those who may have everything may have it.
            None => asker == Requester::Client && !self.registries.ask_who(),
        }
    }

    /// What a secret opens at a place's registry.
    pub async fn exchange(&self, place: &RepositoryRef, secret: Secret) -> Result<ExchangedSecret, SourceError> {
        // Who is not there is not asked. Whom a registry limits is not known before.
        match self.upstream.trouble(place) {
            Some(trouble) if !matches!(trouble, SourceError::Limited { .. }) => Err(trouble),
            _ => self.upstream.exchange(place, secret, Instant::now() + UPSTREAM_TIMEOUT).await,
        }
    }

    /// As what this process fetches a digest: it goes to the origin if it is asked as the owner, is the
    /// owner, or may not show peers the digest, or what it asks for it with.
    fn role(&self, place: &RepositoryRef, digest: &Digest, asking: RequestContext) -> Role {
        let peers = self.peers_for(place).filter(|_| place.caller.may_be_lent());
        peers.map_or(Role::Global, |peers| peers.lead(digest, asking.role, self.scope(place)).role)
    }

    /// Whether this node is who fetches a digest for all, so that it is kept here.
    pub fn is_owned_here(&self, place: &RepositoryRef, digest: &Digest) -> bool {
        self.role(place, digest, RequestContext::CLIENT) == Role::Global
    }

    /// Whether peers in other zones are asked for what belongs there.
    fn scope(&self, place: &RepositoryRef) -> Scope {
        match place.rule.far_peers {
            CrossZonePeers::UnlessSlower if self.speeds.upstream_is_faster(place.rule.name()) => Scope::OwnZone,
            CrossZonePeers::Always | CrossZonePeers::UnlessSlower => Scope::AllZones,
            CrossZonePeers::Never => Scope::OwnZone,
        }
    }

    /// Those who may be asked for what belongs there.
    fn peers_for(&self, place: &RepositoryRef) -> Option<&Arc<Peers>> {
        self.peers.as_ref().filter(|peers| may_share(peers, place))
    }

    /// Bytes of blobs on disk, their limit, and what is set aside for small objects.
    pub fn disk_usage(&self) -> (u64, u64, u64) {
        let (used, limit) = self.store.large.usage();
        (used, limit, self.store.small.disk_bytes())
    }

    /// Whether a registry allows so few more pulls that what nobody waits for is put off.
    pub fn is_scarce(&self, place: &RepositoryRef) -> bool {
        self.upstream.is_scarce(place)
    }

    /// Keeps these blobs for as long as anything else can go.
    pub fn pin(&self, digests: HashSet<Digest>) {
        self.store.large.pin(digests);
    }

    pub fn fills_now(&self) -> Vec<FillView> {
        self.fills.views()
    }

    pub fn upstreams_now(&self) -> Vec<UpstreamView> {
        self.upstream.upstreams()
    }

    /// Reads files again that others replace. Blocks on the disk.
    pub fn reload(&self) -> [Result<(), String>; 2] {
        [self.upstream.reload(), self.peers.as_ref().map_or(Ok(()), |peers| peers.reload())]
    }

    /// What other drays see of this one.
    pub fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref()
    }
}

/// What a rule fetches with credentials is only for peers that prove who they are.
fn may_share(peers: &Peers, place: &RepositoryRef) -> bool {
    peers.are_proven() || !place.rule.is_private()
}

/// Whether an answer is about the rights of whoever asked, or its account: others may have more.
fn is_personal<T>(place: &RepositoryRef, answer: &Result<T, SourceError>) -> bool {
    let is_ones_own = |error: &SourceError| {
        matches!(
            error,
            SourceError::NotFound(_)
                | SourceError::Denied(_)
                | SourceError::Limited { .. }
                | SourceError::NoCredentials(_)
        )
    };
    place.rule.asks_who() && answer.as_ref().err().is_some_and(is_ones_own)
}

/// The flight that a question shares with all others, and the one with those of the same caller. Whoever can ask nothing
/// flies for nobody else.
fn flights<K>(place: &RepositoryRef, key: impl Fn(Option<PrincipalId>) -> K) -> (K, K) {
    let own = Some(place.caller.who());
    (key(own.filter(|_| place.caller.is_empty_handed())), key(own))
}

/// What a flight that panicked has brought.
fn fetch_ended<T>() -> Result<T, SourceError> {
    Err(SourceError::Unreachable("the fetch ended".into()))
}
