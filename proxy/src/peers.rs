//! The other dray instances of the cluster: which peer owns a digest, which peers hold it, and requests to them.
//!
//! Peers speak the registry protocol on a port of their own, with a few additional headers ([`wire`]). Only
//! authenticated peers resolve tags for each other. Requests only travel towards the upstream ([`Role`]): a peer that
//! is requested as the owner requests from the upstream itself.

mod auth;
mod discovery;
mod download;
mod exchange;
pub mod health;
mod key;
pub mod members;
mod operations;
mod peer_request;
mod probes;
mod query;
mod requests;
pub mod ring;
pub mod swarm;
pub mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use reqwest::Client;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use self::auth::PeerAuth;
pub use self::auth::PeerTrust;
use self::discovery::Discovery;
use self::health::Health;
pub use self::key::{PeerAuthError, Seal};
use self::members::{FoundMember, Members};
pub use self::members::{OwnerRoute, Scope};
pub use self::operations::{NodeResult, PEER_OPERATIONS};
use self::peer_request::Locality;
pub use self::peer_request::{PeerBody, PeerRequest};
pub use self::query::{Downstream, PeerQuery, PeerRequestMode, RangePurpose, RedirectPolicy};
pub use self::requests::{PeerError, PeerTag, PeerTagResolution};
use self::swarm::{Claim, Time, Tracker};
use crate::config::{Config, PeersConfig as Settings};
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::role::Role;
use crate::source::root_cause;
use crate::times::{DEFAULT_TTL, IDLE_TIMEOUT, OBSERVATION_TTL, RETRY_INTERVAL};

/// The peers, and what this node has observed of them.
pub struct Peers {
    members: ArcSwap<Members>,
    settings: Settings,
    listen: SocketAddr,
    discovery: tokio::sync::Mutex<Discovery>,
    /// Whether the members are known.
    formed: watch::Sender<bool>,
    health: Mutex<Health>,
    /// Wakes the pinger: a ping is due earlier than the one that it sleeps for.
    ping_due: Notify,
    auth: PeerAuth,
    client: Client,
    /// Per blob and locality: which peers request it from this node, and what they have of it.
    trackers: moka::sync::Cache<(Digest, Locality), Arc<Mutex<Tracker>>>,
    /// Peers that were overloaded within [`RETRY_INTERVAL`]: requests to them are not retried.
    overloaded: moka::sync::Cache<SocketAddr, ()>,
    /// Time to first byte of each peer's last successful response.
    latencies: moka::sync::Cache<SocketAddr, Duration>,
    /// Number of bodies that are being sent to peers.
    sending: AtomicU32,
    started: Instant,
    metrics: Arc<Metrics>,
}

/// A member in the status report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    pub address: SocketAddr,
    /// `-`: the member has no zone.
    pub zone: String,
    pub is_this_node: bool,
    /// `healthy`; `down`: it does not respond, and is pinged until it does; `ejected`: it sent corrupt bytes, and is not used
    /// for a while.
    pub state: String,
    /// Time to first byte of its last response. Null: none within `OBSERVATION_TTL`.
    pub first_byte_ms: Option<f64>,
    /// The fraction of all digests that it owns.
    pub share: f64,
}

/// Where a response may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchPolicy {
    /// Any source, including the upstream.
    Upstream,
    /// Only this node's cache and the downloads that it runs.
    CacheOnly,
}

/// Timeout for a connection to a peer: more than the second after which TCP resends a lost SYN. Larger: a dead peer delays
/// each request more. Smaller: one lost packet marks a peer as down.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);

/// The members of `peers.static`.
fn listed(settings: &Settings) -> Vec<FoundMember> {
    settings.members.iter().cloned().map(FoundMember::from).collect()
}

/// Upper bound for the peers tracked over all blobs together, each with up to a KiB. Larger: more memory. Smaller:
/// trackers of blobs in use are evicted, and this node sends bodies that other holders could send.
const MAX_TRACKED: u64 = 256 * 1024;

impl Peers {
    /// None: peers are not configured. Must run inside a tokio runtime.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Option<Self>, String> {
        let settings = config.peers.clone();
        let Some(listen) = settings.listen else { return Ok(None) };
        let discovery = Discovery::new(&settings, &config.dns.servers, listen)?;
        let members = Members::new(&listed(&settings), listen, settings.zone.clone(), settings.zones);
        if !discovery.is_needed() && settings.members.is_empty() {
            return Err(
                "peers.listen is set, but no members are configured: set peers.service or peers.static".to_owned()
            );
        }
        if !discovery.is_needed() && !settings.members.iter().any(|(_, member)| *member == members.own) {
            return Err(format!(
                "peers.static contains no address of this host with port {}: list all members, this one included, \
                 with the addresses that the others use",
                listen.port()
            ));
        }
        let names = settings.members.iter().map(|(zone, _)| zone).chain(settings.service.iter().map(|(zone, _)| zone));
        if settings.zone.is_some() && !names.clone().any(|zone| *zone == settings.zone) {
            let zones: Vec<&str> = names.filter_map(|zone| zone.as_deref()).collect();
            let zone = settings.zone.as_deref().unwrap_or_default();
            tracing::warn!(zone, ?zones, "own zone has no members configured");
        }
        metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
        let auth = PeerAuth::load(&settings)?;
        let client = Client::builder()
            .user_agent(concat!("dray/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT);
        let client = auth.prepare(client)?.build().map_err(|e| root_cause(&e))?;
        Ok(Some(Self {
            members: ArcSwap::from_pointee(members),
            formed: watch::Sender::new(!discovery.is_needed()),
            discovery: tokio::sync::Mutex::new(discovery),
            settings,
            listen,
            health: Mutex::default(),
            ping_due: Notify::new(),
            auth,
            client,
            trackers: moka::sync::Cache::builder()
                .weigher(|_, tracker: &Arc<Mutex<Tracker>>| tracker.lock().max_peers())
                .max_capacity(MAX_TRACKED)
                .time_to_idle(DEFAULT_TTL)
                .build(),
            overloaded: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(RETRY_INTERVAL).build(),
            latencies: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(OBSERVATION_TTL).build(),
            sending: AtomicU32::new(0),
            started: Instant::now(),
            metrics,
        }))
    }

    /// Resolves the service names again and again while it is polled. While they cannot be resolved, the known members
    /// stay.
    pub async fn follow_services(&self) {
        let mut discovery = self.discovery.lock().await;
        let mut known = Vec::new();
        while discovery.is_needed() {
            if let Some(mut found) = discovery.next().await {
                found.extend(listed(&self.settings));
                found.sort_unstable();
                // `Members::new` finds this host with some system calls for each member, so an unchanged list skips it.
                // But until this host is found its address may still appear.
                if found != known || !self.members.load().has_own() {
                    self.update_members(&found);
                    known = found;
                }
                self.formed.send_replace(true);
            }
        }
    }

    /// Waits until the members are known.
    pub async fn wait_until_known(&self) {
        // Waiting only fails when the sender is dropped, and `self` owns it.
        let _ = self.formed.subscribe().wait_for(|formed| *formed).await;
    }

    fn update_members(&self, found: &[FoundMember]) {
        let members = Members::new(found, self.listen, self.settings.zone.clone(), self.settings.zones);
        if **self.members.load() != members {
            tracing::info!(members = members.len(), own = %members.own, zone = members.own_zone(), "peers changed");
            if !members.has_own() {
                tracing::warn!(own = %members.own, "own address not among the peers: this node owns no digests");
            }
            self.metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
            self.members.store(Arc::new(members));
        }
    }

    /// Whether traffic to or from a peer crosses into another zone.
    pub fn is_cross_zone(&self, peer: SocketAddr) -> bool {
        self.members.load().is_cross_zone(peer)
    }

    pub fn count(&self) -> usize {
        self.members.load().len()
    }

    /// The members for the status report, sorted by zone and address.
    pub fn views(&self) -> Vec<PeerView> {
        let members = self.members.load();
        let share = 1.0 / members.len().max(1) as f64;
        let (health, now) = (self.health.lock(), self.now());
        let mut views: Vec<PeerView> = members
            .iter()
            .map(|(address, zone)| PeerView {
                address,
                zone: zone.to_owned(),
                is_this_node: address == members.own,
                state: if address == members.own { "healthy" } else { health.state(&address, now) }.to_owned(),
                first_byte_ms: self.latencies.get(&address).map(|latency| latency.as_secs_f64() * 1000.0),
                share,
            })
            .collect();
        views.sort_by(|a, b| (&a.zone, a.address).cmp(&(&b.zone, b.address)));
        views
    }

    /// The route to the owners of a digest, for a request that reached this node with `role`.
    pub fn owner_route(&self, digest: &Digest, role: Role, scope: Scope) -> OwnerRoute {
        self.members.load().owner_route(digest, role, scope, |peer| self.is_available(peer))
    }

    /// The peer that downloads a digest from the upstream, its zone, and whether it is this node.
    pub fn owner(&self, digest: &Digest, scope: Scope) -> (SocketAddr, String, bool) {
        let members = self.members.load();
        let mut route = members.owner_route(digest, Role::Client, scope, |peer| self.is_available(peer));
        // The zone's owner forwards the request to the owner of all zones.
        if route.request_role == Role::Zone {
            route = members.owner_route(digest, Role::Zone, scope, |peer| self.is_available(peer));
        }
        let owner = route.owners.first().copied().unwrap_or(members.own);
        (owner, members.zone_of(owner).to_owned(), owner == members.own)
    }

    /// Whether peers authenticate each other. Then they also share what no digest verifies (tags), and content that
    /// needs credentials.
    pub fn are_authenticated(&self) -> bool {
        !matches!(self.auth, PeerAuth::None)
    }

    /// The certificate of the peers' listener, with mTLS only.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        match &self.auth {
            PeerAuth::Certificates(identity) => Some(identity),
            PeerAuth::None | PeerAuth::Key(_) => None,
        }
    }

    /// Reloads the key or the certificates. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        self.auth.reload()
    }

    /// Handles corrupt bytes of a peer, by what it claimed of them: a peer that relays cannot know, and is ejected only
    /// when it relays corrupt bytes repeatedly.
    pub fn report_corrupt(&self, peer: SocketAddr, claim: Claim) {
        match claim {
            Claim::Relayed if !self.health.lock().record_relayed_corruption(peer, self.now()) => {
                tracing::info!(%peer, "peer relayed corrupt bytes");
            }
            Claim::Relayed | Claim::Verified => self.eject(peer),
        }
    }

    /// Ejects a peer that sent corrupt bytes as verified, and no longer names it as a holder to others.
    pub fn eject(&self, peer: SocketAddr) {
        tracing::warn!(%peer, reason = "corrupt", "peer ejected");
        self.metrics.peer_ejections.inc();
        self.health.lock().eject(peer, self.now());
        self.trackers.iter().for_each(|(_, tracker)| tracker.lock().forget(&peer));
    }

    /// Whether a peer is neither down nor ejected.
    fn is_available(&self, peer: &SocketAddr) -> bool {
        self.health.lock().is_available(peer, self.now())
    }

    /// The clock that trackers, views and health share.
    pub fn now(&self) -> Time {
        self.started.elapsed()
    }
}
