//! The nodes, what each fetches, and what is on its way between them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dray::config::{Zone, Zones};
use dray::fill::{ConnectionScaler, Pace, RangePlan};
use dray::oci::{Digest, Span, Spans};
use dray::peers::health::Health;
use dray::peers::members::{Members, OwnerRoute, Scope};
use dray::peers::ring::Ring;
use dray::peers::swarm::{Tracker, View};
use dray::role::Role;

use crate::{Outcome, Shape, Slow};

/// Bytes a second of 10 Gbit/s.
pub(crate) const CARD: f64 = 1.25e9;
pub(crate) const STEP: f64 = 0.002;

const MB: u64 = 1_000_000;
pub(crate) const LAYERS: [u64; 5] = [1500 * MB, 800 * MB, 400 * MB, 200 * MB, 100 * MB];

/// What containerd pulls at a time.
const AT_A_TIME: usize = 3;
/// An origin gets more connections while they help; a reader that waits may have one more.
pub(crate) const MOST_LANES: usize = 8;
/// Those who may have what a node owns from now on; as in `peers/ask.rs`.
const SUCCESSORS: usize = 2;

/// One layer on one node.
pub(crate) struct Fetch {
    pub(crate) plan: Option<RangePlan>,
    /// None: not begun.
    pub(crate) role: Option<Role>,
    pub(crate) have: Spans,
    pub(crate) view: View,
    /// Those of its own zone, and those of others.
    pub(crate) trackers: [Tracker; 2],
    pub(crate) pace: Pace,
    /// Of an owner: how many connections to the origin are worth it.
    pub(crate) climb: Option<ConnectionScaler>,
    pub(crate) lanes: usize,
    /// It could fetch more at a time than there is to fetch.
    pub(crate) idles: bool,
    /// Its question is held by the owner until then.
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
            climb: None,
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
    /// Whom it asks for each layer, until it learns that somebody is down.
    leads: [[Option<Arc<OwnerRoute>>; 2]; LAYERS.len()],
    pub(crate) is_dead: bool,
    pub(crate) sending: u32,
    pub(crate) sent: f64,
    finished: Option<f64>,
}

/// Bytes on their way from somebody to somebody.
pub(crate) struct WatchedBody {
    /// None: the origin.
    pub(crate) from: Option<usize>,
    pub(crate) to: usize,
    pub(crate) layer: usize,
    pub(crate) span: Span,
    pub(crate) position: f64,
    pub(crate) starts: f64,
    /// Since when nothing came, for who may give up.
    pub(crate) idle_since: f64,
    /// For how long it has brought something.
    pub(crate) counted: f64,
    pub(crate) gives_up: bool,
    /// The owner in whose stead it is fetched.
    pub(crate) lent_by: Option<usize>,
}

pub(crate) struct Network {
    pub(crate) shape: Shape,
    members: Vec<(Zone, SocketAddr)>,
    pub(crate) nodes: Vec<Node>,
    /// Of all zones: those whom the ring names first.
    owners: Vec<usize>,
    pub(crate) flows: Vec<WatchedBody>,
    /// Which of them go to each node.
    pub(crate) flows_to: Vec<Vec<usize>>,
    pub(crate) from_upstream: f64,
    /// What went from one zone to another.
    pub(crate) crossed: f64,
    pub(crate) now: f64,
    /// Where clocks begin that count from a moment.
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
        let members: Vec<(Zone, SocketAddr)> = (0..shape.nodes).map(|node| (name(node), address(node))).collect();
        let ring: Ring = members.iter().map(|(_, member)| *member).collect();
        let owners = (0..LAYERS.len()).map(|layer| index(ring.owners(&digest(layer), 1)[0])).collect();
        let node = |node| Node {
            address: address(node),
            zone: zone(node),
            fetches: LAYERS.iter().map(|_| Fetch::new(shape.nodes)).collect(),
            health: Health::default(),
            leads: Default::default(),
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
            Slow::Nobody => false,
            Slow::OneIn(many) => node.is_multiple_of(many) && !self.owners.contains(&node),
            Slow::Owners => self.owners.contains(&node),
        }
    }

    /// Who is killed in the middle of it: the first owner, and some of the others.
    fn is_doomed(&self, node: usize) -> bool {
        self.shape.killed.is_some_and(|(many, _)| node == self.owners[0] || node % many == 1)
    }

    pub(crate) fn card(&self, node: usize) -> f64 {
        if self.is_slow(node) { CARD / 10.0 } else { CARD }
    }

    pub(crate) fn clock(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    /// Whether what goes from one to the other crosses into another zone.
    pub(crate) fn is_far(&self, node: usize, other: usize) -> bool {
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
            self.climb();
        }
        let image = float(LAYERS.iter().sum());
        let healthy = (0..self.nodes.len()).filter(|node| counts(&self, *node));
        let finished = healthy.filter_map(|node| self.nodes[node].finished);
        let mut finished: Vec<f64> = finished.map(|when| when / (image / CARD.min(self.shape.upstream))).collect();
        finished.sort_unstable_by(f64::total_cmp);
        let busiest = self.nodes.iter().map(|node| node.sent).fold(0.0, f64::max) / image;
        Outcome { finished, upstream: self.from_upstream / image, busiest, crossed: self.crossed / image }
    }

    /// Starts the layers that a node pulls now, and as many ranges of each as it may.
    fn begin(&mut self, node: usize) {
        if self.nodes[node].is_dead {
            return;
        }
        let mut pulling = 0;
        for layer in 0..LAYERS.len() {
            if pulling < AT_A_TIME && !self.nodes[node].fetches[layer].done {
                pulling += 1;
                self.open(node, layer, Role::Client);
            }
            let fetch = &self.nodes[node].fetches[layer];
            if fetch.plan.is_some() && !fetch.done && fetch.waits_until <= self.now {
                self.ask_for_more(node, layer);
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

    /// Whom a node asks that fetches a layer as `role`: the real decision, by what it knows of the others.
    pub(crate) fn lead(&mut self, node: usize, layer: usize, role: Role) -> Arc<OwnerRoute> {
        if role == Role::Global {
            return Arc::new(OwnerRoute { role, leaders: Vec::new(), asked_as: role });
        }
        let nth = usize::from(role == Role::Zone);
        if self.nodes[node].leads[layer][nth].is_none() {
            let members = self.members_of(node);
            let (health, now) = (&self.nodes[node].health, self.clock());
            let lead = |layer, role| {
                let lead =
                    members.lead(&digest(layer), role, Scope::AllZones, |peer: &SocketAddr| health.is_well(peer, now));
                Some(Arc::new(lead))
            };
            let leads = std::array::from_fn(|layer| [lead(layer, Role::Client), lead(layer, Role::Zone)]);
            self.nodes[node].leads = leads;
        }
        self.nodes[node].leads[layer][nth].clone().expect("it was just found")
    }

    fn members_of(&self, node: usize) -> Members {
        Members::new(&self.members, self.nodes[node].address, None, self.shape.zones.policy)
    }

    /// A node found out that another is not there.
    pub(crate) fn found_dead(&mut self, node: usize, layer: usize, peer: usize) {
        let (now, dead) = (self.clock(), self.nodes[peer].address);
        self.nodes[node].health.is_down(dead, now);
        self.nodes[node].fetches[layer].view.broke(dead, now);
        self.nodes[node].leads = Default::default();
    }

    /// Begins to fetch, or goes on as more than it was.
    pub(crate) fn open(&mut self, node: usize, layer: usize, asked_as: Role) {
        let known = self.nodes[node].fetches[layer].role;
        if self.nodes[node].fetches[layer].done || known >= Some(asked_as) {
            return;
        }
        let role = self.lead(node, layer, asked_as).role.max(asked_as);
        let fetch = &mut self.nodes[node].fetches[layer];
        fetch.role = Some(role);
        let plan = fetch.plan.get_or_insert_with(|| RangePlan::new(LAYERS[layer], Spans::default()));
        if role == Role::Global && fetch.climb.is_none() {
            fetch.climb = Some(ConnectionScaler::new(MOST_LANES));
            if known.is_some() {
                plan.may_lend();
                self.ask_successors(node, layer);
                return;
            }
            // It lends once the origin has answered it.
            self.ask_for_more(node, layer);
            self.nodes[node].fetches[layer].plan.as_mut().expect("it has begun").may_lend();
        }
    }

    /// An owner that takes another's place asks before it fetches.
    fn ask_successors(&mut self, node: usize, layer: usize) {
        let (health, now) = (&self.nodes[node].health, self.clock());
        let alive = |peer: &SocketAddr| health.is_well(peer, now);
        let found = self.members_of(node).successors(&digest(layer), SUCCESSORS, Scope::AllZones, alive);
        for peer in found.into_iter().map(index) {
            match self.nodes[peer].is_dead {
                true => self.found_dead(node, layer, peer),
                false => self.tell(node, peer, layer),
            }
        }
    }

    /// Owners think over how many connections to have.
    fn climb(&mut self) {
        let now = self.started + self.clock();
        for fetch in self.nodes.iter_mut().flat_map(|node| &mut node.fetches) {
            if let Some(climb) = &mut fetch.climb {
                climb.observe(now, fetch.have.len(), fetch.lanes);
            }
        }
    }

    /// Kills those whose time has come: what they send and get breaks off.
    fn kill(&mut self) {
        let Some((_, when)) = self.shape.killed else { return };
        if self.now < when || self.nodes[self.owners[0]].is_dead {
            return;
        }
        (0..self.nodes.len()).filter(|node| self.is_doomed(*node)).collect::<Vec<_>>().into_iter().for_each(|node| {
            self.nodes[node].is_dead = true;
        });
        let dead = |network: &Self, flow: &WatchedBody| {
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
