//! Other drays: who owns a digest, who else has it, and asking them.
//!
//! Peers speak the registry protocol, tags only with proof of who they are, on a port of their own, and a few
//! headers beside it ([`wire`]). Questions only travel towards the origin ([`Role`]); whoever is asked as the
//! owner goes to the origin itself.

mod auth;
mod discovery;
mod download;
mod exchange;
pub mod health;
mod key;
pub mod members;
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
use self::members::Members;
pub use self::members::{OwnerRoute, Scope};
use self::peer_request::Locality;
pub use self::peer_request::{PeerBody, PeerRequest};
pub use self::query::{Downstream, PeerQuery, PeerRequestMode, RangePurpose, RedirectPolicy};
pub use self::requests::{PeerError, PeerTag, PeerTagResolution};
use self::swarm::{Claim, Time, Tracker};
use crate::config::{Config, PeersConfig as Settings, Zone};
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::role::Role;
use crate::source::root_cause;
use crate::times::{DEFAULT_TTL, IDLE_TIMEOUT, OBSERVATION_TTL, RETRY_INTERVAL};

/// The other processes and what is known of them.
pub struct Peers {
    members: ArcSwap<Members>,
    settings: Settings,
    listen: SocketAddr,
    discovery: tokio::sync::Mutex<Discovery>,
    /// Whether the members are known.
    formed: watch::Sender<bool>,
    health: Mutex<Health>,
    /// Somebody is to be pinged earlier than was known.
    troubled: Notify,
    proof: PeerAuth,
    client: Client,
    /// Who fetches what from this node.
    trackers: moka::sync::Cache<(Digest, Locality), Arc<Mutex<Tracker>>>,
    /// Those that lately had too much to do.
    busy: moka::sync::Cache<SocketAddr, ()>,
    /// How long each took to give what it was last asked for.
    latencies: moka::sync::Cache<SocketAddr, Duration>,
    /// Bodies sent to peers at the moment.
    sending: AtomicU32,
    started: Instant,
    metrics: Arc<Metrics>,
}

/// A member as it is shown to people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    pub address: SocketAddr,
    /// `-`: in none.
    pub zone: String,
    pub is_this_node: bool,
    /// Whether it is asked: not for a while after it could not be reached or lied.
    pub is_well: bool,
    /// How long it took to give what it was last asked for. Null: it was not, lately.
    pub first_byte_ms: Option<f64>,
    /// Of all digests, that it owns.
    pub share: f64,
}

/// Where an answer may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchPolicy {
    /// Wherever it can be had.
    Origin,
    /// What is here, or comes now: nobody else is asked for it.
    Kept,
}

/// More than the second after which a lost SYN is sent again: a busy link is not a dead peer.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);

/// Peers that are remembered, of all blobs together, each with up to a KiB; for how long.
const MAX_TRACKED: u64 = 256 * 1024;

impl Peers {
    /// None: this process keeps to itself. Must run inside a tokio runtime.
    pub fn new(config: &Config, metrics: Arc<Metrics>) -> Result<Option<Self>, String> {
        let settings = config.peers.clone();
        let Some(listen) = settings.listen else { return Ok(None) };
        let discovery = Discovery::new(&settings, &config.dns.servers, listen)?;
        let members = Members::new(&settings.members, listen, settings.zone.clone(), settings.zones);
        if !discovery.is_needed() && settings.members.is_empty() {
            return Err("peers.listen: nobody is known who could connect: set peers.service or peers.static".to_owned());
        }
        if !discovery.is_needed() && !settings.members.iter().any(|(_, member)| *member == members.own) {
            return Err(format!(
                "peers.static holds no address of this host with port {}: write all members, this one included, \
                 by the addresses that the others use",
                listen.port()
            ));
        }
        let names = settings.members.iter().map(|(zone, _)| zone).chain(settings.service.iter().map(|(zone, _)| zone));
        if settings.zone.is_some() && !names.clone().any(|zone| *zone == settings.zone) {
            let zones: Vec<&str> = names.filter_map(|zone| zone.as_deref()).collect();
            let zone = settings.zone.as_deref().unwrap_or_default();
            tracing::warn!(zone, ?zones, "peers.zone is none of the zones that have members: this node is alone in it");
        }
        metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
        let proof = PeerAuth::load(&settings)?;
        let client = Client::builder()
            .user_agent(concat!("dray/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(IDLE_TIMEOUT);
        let client = proof.prepare(client)?.build().map_err(|e| root_cause(&e))?;
        Ok(Some(Self {
            members: ArcSwap::from_pointee(members),
            formed: watch::Sender::new(!discovery.is_needed()),
            discovery: tokio::sync::Mutex::new(discovery),
            settings,
            listen,
            health: Mutex::default(),
            troubled: Notify::new(),
            proof,
            client,
            trackers: moka::sync::Cache::builder()
                .weigher(|_, tracker: &Arc<Mutex<Tracker>>| tracker.lock().most())
                .max_capacity(MAX_TRACKED)
                .time_to_idle(DEFAULT_TTL)
                .build(),
            busy: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(RETRY_INTERVAL).build(),
            latencies: moka::sync::Cache::builder().max_capacity(10_000).time_to_live(OBSERVATION_TTL).build(),
            sending: AtomicU32::new(0),
            started: Instant::now(),
            metrics,
        }))
    }

    /// Follows the names for as long as it is polled. While they cannot be resolved, everybody
    /// known stays a member.
    pub async fn follow_services(&self) {
        let mut discovery = self.discovery.lock().await;
        let mut known = Vec::new();
        while discovery.is_needed() {
            if let Some(mut found) = discovery.next().await {
                found.extend(self.settings.members.iter().cloned());
                found.sort_unstable();
                // Finding this host takes some system calls for each member. Until it is found it may still get its address.
                if found != known || !self.members.load().has_own() {
                    self.take(&found);
                    known = found;
                }
                self.formed.send_replace(true);
            }
        }
    }

    /// Waits until the members are known.
    pub async fn formed(&self) {
        // The sender lives as long as this.
        let _ = self.formed.subscribe().wait_for(|formed| *formed).await;
    }

    fn take(&self, found: &[(Zone, SocketAddr)]) {
        let members = Members::new(found, self.listen, self.settings.zone.clone(), self.settings.zones);
        if **self.members.load() != members {
            tracing::info!(members = members.len(), own = %members.own, zone = members.own_zone(), "the peers changed");
            if !members.has_own() {
                tracing::warn!("none of the peers' addresses is this host's: it asks them, but owns nothing");
            }
            self.metrics.peers.set(i64::try_from(members.len()).unwrap_or(i64::MAX));
            self.members.store(Arc::new(members));
        }
    }

    /// Whether a member is in another zone.
    pub fn is_far(&self, peer: SocketAddr) -> bool {
        self.members.load().is_far(peer)
    }

    /// How many members there are.
    pub fn count(&self) -> usize {
        self.members.load().len()
    }

    /// The members as they are shown to people, by zone and address.
    pub fn views(&self) -> Vec<PeerView> {
        let members = self.members.load();
        let share = 1.0 / members.len().max(1) as f64;
        let mut views: Vec<PeerView> = members
            .iter()
            .map(|(address, zone)| PeerView {
                address,
                zone: zone.to_owned(),
                is_this_node: address == members.own,
                is_well: address == members.own || self.is_well(&address),
                first_byte_ms: self.latencies.get(&address).map(|latency| latency.as_secs_f64() * 1000.0),
                share,
            })
            .collect();
        views.sort_by(|a, b| (&a.zone, a.address).cmp(&(&b.zone, b.address)));
        views
    }

    /// Whom to ask for a digest, having been asked as `role`.
    pub fn lead(&self, digest: &Digest, role: Role, scope: Scope) -> OwnerRoute {
        self.members.load().lead(digest, role, scope, |peer| self.is_well(peer))
    }

    /// Who goes to the origin for a digest, in which zone, and whether that is this node.
    pub fn owner(&self, digest: &Digest, scope: Scope) -> (SocketAddr, String, bool) {
        let members = self.members.load();
        let mut lead = members.lead(digest, Role::Client, scope, |peer| self.is_well(peer));
        // The owner of the zone asks further.
        if lead.asked_as == Role::Zone {
            lead = members.lead(digest, Role::Zone, scope, |peer| self.is_well(peer));
        }
        let owner = lead.leaders.first().copied().unwrap_or(members.own);
        (owner, members.zone_of(owner).to_owned(), owner == members.own)
    }

    /// Whether peers prove who they are: then they share what no digest proves, and what credentials
    /// were needed for.
    pub fn are_proven(&self) -> bool {
        !matches!(self.proof, PeerAuth::None)
    }

    /// What the peers' listener shows, if it wants certificates.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        match &self.proof {
            PeerAuth::Certificates(identity) => Some(identity),
            PeerAuth::None | PeerAuth::Key(_) => None,
        }
    }

    /// Reads the key or the certificates again. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        self.proof.reload()
    }

    /// A peer sent wrong bytes, of which it said this.
    pub fn sent_wrong(&self, peer: SocketAddr, claim: Claim) {
        match claim {
            Claim::Relayed if !self.health.lock().relayed_wrong(peer, self.now()) => {
                tracing::info!(%peer, "a peer passed on wrong bytes");
            }
            Claim::Relayed | Claim::Verified => self.lies(peer),
        }
    }

    /// Leaves a peer alone that lied, and names it to nobody.
    pub fn lies(&self, peer: SocketAddr) {
        tracing::warn!(%peer, "a peer sent wrong bytes");
        self.metrics.shut_out.inc();
        self.health.lock().lies(peer, self.now());
        self.trackers.iter().for_each(|(_, tracker)| tracker.lock().forget(&peer));
    }

    /// Whether a peer may be asked.
    fn is_well(&self, peer: &SocketAddr) -> bool {
        self.health.lock().is_well(peer, self.now())
    }

    /// The clock of trackers, views and health.
    pub fn now(&self) -> Time {
        self.started.elapsed()
    }
}
