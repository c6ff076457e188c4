//! The nodes, their downloads, and the flows between them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dray::config::Zones;
use dray::fill::{ConnectionScaler, Pace, RangePlan};
use dray::oci::{Digest, Span, Spans};
use dray::peers::health::Health;
use dray::peers::members::{FoundMember, Members, OwnerRoute, Scope};
use dray::peers::ring::Ring;
use dray::peers::swarm::{Tracker, View};
use dray::role::Role;

use crate::{Outcome, Shape, Slow};

/// Bytes a second of a 10 Gbit/s card.
pub(crate) const CARD: f64 = 1.25e9;
pub(crate) const STEP: f64 = 0.002;

const MB: u64 = 1_000_000;
pub(crate) const LAYERS: [u64; 5] = [1500 * MB, 800 * MB, 400 * MB, 200 * MB, 100 * MB];

/// Layers that containerd pulls at a time.
const MAX_LAYERS: usize = 3;
/// Connections to the upstream at most. More are opened while they help, and one more for a waiting reader.
pub(crate) const MAX_CONNECTIONS: usize = 8;
/// Successors that a new owner queries, as in `peers/requests.rs`.
const MAX_SUCCESSORS: usize = 2;

/// The download of one layer on one node.
pub(crate) struct Fetch {
    pub(crate) plan: Option<RangePlan>,
    /// None: it has not begun.
    pub(crate) role: Option<Role>,
    pub(crate) have: Spans,
    pub(crate) view: View,
    /// For requesters of its own zone, and of other zones.
    pub(crate) trackers: [Tracker; 2],
    pub(crate) pace: Pace,
    /// An owner only: the number of connections to the upstream.
    pub(crate) scaler: Option<ConnectionScaler>,
    pub(crate) lanes: usize,
    /// Fewer ranges are left than it could download at a time.
    pub(crate) idles: bool,
    /// The owner holds its request until this time.
    pub(crate) waits_until: f64,
    pub(crate) done: bool,
}

impl Fetch {
    fn new(members: usize) -> Self {
        Self {
            plan: None,
            role: None,
            have: Spans::default(),
            view: View::new(members),
            trackers: std::array::from_fn(|_| Tracker::new(members)),
            pace: Pace::default(),
            scaler: None,
            lanes: 0,
            idles: false,
            waits_until: 0.0,
            done: false,
        }
    }
}

pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) zone: usize,
    pub(crate) fetches: Vec<Fetch>,
    pub(crate) health: Health,
    /// The routes of each layer as a client and as a zone's owner, until a peer is found dead.
    routes: [[Option<Arc<OwnerRoute>>; 2]; LAYERS.len()],
    pub(crate) is_dead: bool,
    pub(crate) sending: u32,
    pub(crate) sent: f64,
    finished: Option<f64>,
}

/// A range that is being sent from one node, or the upstream, to another node.
pub(crate) struct Flow {
    /// None: the upstream.
    pub(crate) from: Option<usize>,
    pub(crate) to: usize,
    pub(crate) layer: usize,
    pub(crate) span: Span,
    pub(crate) position: f64,
    pub(crate) starts: f64,
    /// When its last byte came.
    pub(crate) idle_since: f64,
    /// Seconds in which it delivered bytes.
    pub(crate) counted: f64,
    pub(crate) gives_up: bool,
    /// The owner whose deputy downloads it.
    pub(crate) lent_by: Option<usize>,
}

pub(crate) struct Network {
    pub(crate) shape: Shape,
    members: Vec<FoundMember>,
    pub(crate) nodes: Vec<Node>,
    /// The owner of each layer, over all zones.
    owners: Vec<usize>,
    pub(crate) flows: Vec<Flow>,
    /// The flows to each node.
    pub(crate) flows_to: Vec<Vec<usize>>,
    pub(crate) from_upstream: f64,
    /// Bytes that were sent across zones.
    pub(crate) crossed: f64,
    pub(crate) now: f64,
    /// Start of the virtual clock, where an `Instant` is needed.
    started: tokio::time::Instant,
    pub(crate) random: fastrand::Rng,
}

fn address(node: usize) -> SocketAddr {
    let [_, a, b, c] = u32::try_from(node + 1).expect("a small number").to_be_bytes();
    SocketAddr::from(([10, a, b, c], 5052))
}

pub(crate) fn index(address: SocketAddr) -> usize {
    let SocketAddr::V4(address) = address else { unreachable!("the members are IPv4") };
    usize::try_from(address.ip().to_bits() & 0x00ff_ffff).expect("a small number") - 1
}

#[allow(clippy::cast_precision_loss, reason = "bytes of an image are far below 2^52")]
pub(crate) fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position within a blob")]
pub(crate) fn whole(position: f64) -> u64 {
    position as u64
}

fn digest(layer: usize) -> Digest {
    Digest::of(&LAYERS[layer].to_be_bytes())
}

impl Network {
    pub(crate) fn new(shape: Shape) -> Self {
        let zone = |node: usize| node % shape.zones.count;
        let name = |node: usize| (shape.zones.count > 1).then(|| Arc::from(zone(node).to_string()));
        let members: Vec<FoundMember> = (0..shape.nodes).map(|node| (name(node), address(node)).into()).collect();
        let ring: Ring = members.iter().map(|member| member.address).collect();
        let owners = (0..LAYERS.len()).map(|layer| index(ring.owners(&digest(layer), 1)[0])).collect();
        let node = |node| Node {
            address: address(node),
            zone: zone(node),
            fetches: LAYERS.iter().map(|_| Fetch::new(shape.nodes)).collect(),
            health: Health::default(),
            routes: Default::default(),
            is_dead: false,
            sending: 0,
            sent: 0.0,
            finished: None,
        };
        let nodes = (0..shape.nodes).map(node).collect();
        Self {
            shape,
            members,
            nodes,
            owners,
            flows: Vec::new(),
            flows_to: Vec::new(),
            from_upstream: 0.0,
            crossed: 0.0,
            now: 0.0,
            started: tokio::time::Instant::now(),
            random: fastrand::Rng::with_seed(1),
        }
    }

    fn is_slow(&self, node: usize) -> bool {
        match self.shape.slow {
            Slow::None => false,
            Slow::OneIn(many) => node.is_multiple_of(many) && !self.owners.contains(&node),
            Slow::Owners => self.owners.contains(&node),
        }
    }

    /// Whether a node is to be killed: the first owner, and one in `many` of all nodes.
    fn is_doomed(&self, node: usize) -> bool {
        self.shape.killed.is_some_and(|(many, _)| node == self.owners[0] || node % many == 1)
    }

    pub(crate) fn card(&self, node: usize) -> f64 {
        if self.is_slow(node) { CARD / 10.0 } else { CARD }
    }

    pub(crate) fn clock(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    /// Whether traffic between two nodes crosses into another zone.
    pub(crate) fn is_cross_zone(&self, node: usize, other: usize) -> bool {
        self.shape.zones.policy != Zones::Ignore && self.nodes[node].zone != self.nodes[other].zone
    }

    pub(crate) fn run(mut self) -> Outcome {
        let counts = |network: &Self, node: usize| !network.is_slow(node) && !network.nodes[node].is_dead;
        while (0..self.nodes.len()).any(|node| self.nodes[node].finished.is_none() && counts(&self, node)) {
            assert!(self.now < 120.0, "no progress: {} flows", self.flows.len());
            self.index_flows();
            for node in 0..self.nodes.len() {
                self.begin(node);
            }
            let rates = self.rates();
            self.advance(&rates);
            self.now += STEP;
            self.kill();
            self.scale_connections();
        }
        let image = float(LAYERS.iter().sum());
        let healthy = (0..self.nodes.len()).filter(|node| counts(&self, *node));
        let finished = healthy.filter_map(|node| self.nodes[node].finished);
        let mut finished: Vec<f64> = finished.map(|when| when / (image / CARD.min(self.shape.upstream))).collect();
        finished.sort_unstable_by(f64::total_cmp);
        let busiest = self.nodes.iter().map(|node| node.sent).fold(0.0, f64::max) / image;
        Outcome { finished, upstream: self.from_upstream / image, busiest, crossed: self.crossed / image }
    }

    /// Starts the layers that a node pulls now, and as many of their ranges as it may download at a time.
    fn begin(&mut self, node: usize) {
        if self.nodes[node].is_dead {
            return;
        }
        let mut pulling = 0;
        for layer in 0..LAYERS.len() {
            if pulling < MAX_LAYERS && !self.nodes[node].fetches[layer].done {
                pulling += 1;
                self.open(node, layer, Role::Client);
            }
            let fetch = &self.nodes[node].fetches[layer];
            if fetch.plan.is_some() && !fetch.done && fetch.waits_until <= self.now {
                self.download_more(node, layer);
            }
        }
        if pulling == 0 && self.nodes[node].finished.is_none() {
            self.nodes[node].finished = Some(self.now);
        }
    }

    fn index_flows(&mut self) {
        self.flows_to = vec![Vec::new(); self.nodes.len()];
        for (nth, flow) in self.flows.iter().enumerate() {
            self.flows_to[flow.to].push(nth);
        }
    }

    /// The route of a node that downloads a layer in `role`: the product's decision, with this node's knowledge.
    pub(crate) fn owner_route(&mut self, node: usize, layer: usize, role: Role) -> Arc<OwnerRoute> {
        if role == Role::Global {
            return Arc::new(OwnerRoute { role, owners: Vec::new(), request_role: role });
        }
        let nth = usize::from(role == Role::Zone);
        if self.nodes[node].routes[layer][nth].is_none() {
            let members = self.members_of(node);
            let (health, now) = (&self.nodes[node].health, self.clock());
            let route = |layer, role| {
                let route = members.owner_route(&digest(layer), role, Scope::AllZones, |peer: &SocketAddr| {
                    health.is_available(peer, now)
                });
                Some(Arc::new(route))
            };
            let routes = std::array::from_fn(|layer| [route(layer, Role::Client), route(layer, Role::Zone)]);
            self.nodes[node].routes = routes;
        }
        self.nodes[node].routes[layer][nth].clone().expect("it was just found")
    }

    fn members_of(&self, node: usize) -> Members {
        Members::new(&self.members, self.nodes[node].address, None, self.shape.zones.policy)
    }

    /// Records on a node that a peer is dead.
    pub(crate) fn found_dead(&mut self, node: usize, layer: usize, peer: usize) {
        let (now, dead) = (self.clock(), self.nodes[peer].address);
        self.nodes[node].health.mark_down(dead, now);
        self.nodes[node].fetches[layer].view.mark_failed(dead, now);
        self.nodes[node].routes = Default::default();
    }

    /// Starts a download, or continues it in a higher role.
    pub(crate) fn open(&mut self, node: usize, layer: usize, request_role: Role) {
        let known = self.nodes[node].fetches[layer].role;
        if self.nodes[node].fetches[layer].done || known >= Some(request_role) {
            return;
        }
        let role = self.owner_route(node, layer, request_role).role.max(request_role);
        let fetch = &mut self.nodes[node].fetches[layer];
        fetch.role = Some(role);
        let plan = fetch.plan.get_or_insert_with(|| RangePlan::new(LAYERS[layer], Spans::default()));
        if role == Role::Global && fetch.scaler.is_none() {
            fetch.scaler = Some(ConnectionScaler::new(MAX_CONNECTIONS));
            if known.is_some() {
                plan.enable_lending();
                self.query_successors(node, layer);
                return;
            }
            // It lends ranges only after the upstream has responded to its own request.
            self.download_more(node, layer);
            self.nodes[node].fetches[layer].plan.as_mut().expect("it has begun").enable_lending();
        }
    }

    /// Queries the successors: an owner that takes another's place does so before it downloads.
    fn query_successors(&mut self, node: usize, layer: usize) {
        let (health, now) = (&self.nodes[node].health, self.clock());
        let alive = |peer: &SocketAddr| health.is_available(peer, now);
        let found = self.members_of(node).successors(&digest(layer), MAX_SUCCESSORS, Scope::AllZones, alive);
        for peer in found.into_iter().map(index) {
            match self.nodes[peer].is_dead {
                true => self.found_dead(node, layer, peer),
                false => self.learn_holders(node, peer, layer),
            }
        }
    }

    /// Owners adapt their number of connections to the upstream.
    fn scale_connections(&mut self) {
        let now = self.started + self.clock();
        for fetch in self.nodes.iter_mut().flat_map(|node| &mut node.fetches) {
            if let Some(scaler) = &mut fetch.scaler {
                scaler.observe(now, fetch.have.len(), fetch.lanes);
            }
        }
    }

    /// Kills the doomed nodes when it is time: all their flows break off.
    fn kill(&mut self) {
        let Some((_, when)) = self.shape.killed else { return };
        if self.now < when || self.nodes[self.owners[0]].is_dead {
            return;
        }
        (0..self.nodes.len()).filter(|node| self.is_doomed(*node)).collect::<Vec<_>>().into_iter().for_each(|node| {
            self.nodes[node].is_dead = true;
        });
        let dead = |network: &Self, flow: &Flow| {
            network.nodes[flow.to].is_dead || flow.from.is_some_and(|from| network.nodes[from].is_dead)
        };
        let over: Vec<_> = (0..self.flows.len()).filter(|nth| dead(self, &self.flows[*nth])).collect();
        for nth in over.into_iter().rev() {
            let flow = self.flows.swap_remove(nth);
            self.end(&flow);
            if let Some(from) = flow.from.filter(|from| self.nodes[*from].is_dead) {
                self.found_dead(flow.to, flow.layer, from);
            }
        }
    }
}
