//! A thousand nodes and more on virtual time: the code that decides who asks whom for which bytes
//! (`peers::ring`, `peers::swarm`, `fill::Plan`) drives a network whose links are shared max-min fair.
//!
//! Nothing here measures a real clock: the same shape always takes the same virtual time. Not
//! simulated: the processor, the disk, and packets; what is slow there is measured by `make bench`.

mod links;

use std::net::SocketAddr;
use std::time::Duration;

use dray::fill::{Climb, Lent, Pace, Plan};
use dray::oci::{Digest, Span, Spans};
use dray::peers::ring::Ring;
use dray::peers::swarm::{Claim, Comes, Contribution, Direction, Tracker, View};
use dray::peers::wire::Holder;

/// Bytes a second of 10 Gbit/s.
const CARD: f64 = 1.25e9;
const ROUND_TRIP: f64 = 0.0005;
const STEP: f64 = 0.002;

const MB: u64 = 1_000_000;
const LAYERS: [u64; 5] = [1500 * MB, 800 * MB, 400 * MB, 200 * MB, 100 * MB];

/// What containerd pulls at a time, and a follower fetches at a time of each.
const AT_A_TIME: usize = 3;
const IN_FLIGHT: usize = 4;
/// An origin gets more connections while they help; a reader that waits may have one more.
const MOST_LANES: usize = 8;
/// As in `pull/sources.rs`.
const ASK_HOLDERS: usize = 3;
/// What is on its way to somebody is waited for this long before it says that it has nothing.
const ON_ITS_WAY: f64 = 0.25;
/// How often an owner looks whether it may lend what somebody waits for.
const LOOK_AGAIN: f64 = 0.05;
/// Who follows what somebody has gives up when nothing comes for this long.
const COMES: f64 = 1.0;

/// What is simulated.
struct Shape {
    nodes: usize,
    /// Every so many nodes one is ten times slower; 0: none.
    slow_every: usize,
    owners: Owners,
}

/// Whether those who own something are among the slow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owners {
    AsFast,
    Slow,
}

struct Outcome {
    /// When each node had all, in the time that its image takes through its own card; without the slow.
    finished: Vec<f64>,
    /// What left the origin, and the busiest node, in images.
    origin: f64,
    busiest: f64,
}

/// One layer on one node.
#[derive(Default)]
struct Fetch {
    plan: Option<Plan>,
    have: Spans,
    view: View,
    tracker: Tracker,
    pace: Pace,
    /// Of an owner: how many connections to the origin are worth it.
    climb: Option<Climb>,
    lanes: usize,
    /// Its question is held by the owner until then.
    waits_until: f64,
    done: bool,
}

struct Node {
    address: SocketAddr,
    fetches: Vec<Fetch>,
    sending: u32,
    sent: f64,
    finished: Option<f64>,
}

/// Bytes on their way from somebody to somebody.
struct Flow {
    /// None: the origin.
    from: Option<usize>,
    to: usize,
    layer: usize,
    span: Span,
    position: f64,
    starts: f64,
    /// Since when nothing came, for who may give up.
    idle_since: f64,
    gives_up: bool,
}

/// What somebody who was asked says.
enum Said {
    /// Where it comes from.
    From(usize),
    /// This part of it is to be fetched from the origin, in the owner's stead.
    Fetch(Span),
    /// A little later.
    Wait,
    NotHere,
}

struct Network {
    shape: Shape,
    nodes: Vec<Node>,
    owners: Vec<usize>,
    flows: Vec<Flow>,
    /// Which of them go to each node.
    flows_to: Vec<Vec<usize>>,
    from_origin: f64,
    now: f64,
    /// Where clocks begin that count from a moment.
    started: tokio::time::Instant,
    random: fastrand::Rng,
}

fn address(node: usize) -> SocketAddr {
    let [_, a, b, c] = u32::try_from(node).expect("a small number").to_be_bytes();
    SocketAddr::from(([10, a, b, c], 5052))
}

fn index(address: SocketAddr) -> usize {
    let SocketAddr::V4(address) = address else { unreachable!("the members are IPv4") };
    usize::try_from(address.ip().to_bits() & 0x00ff_ffff).expect("a small number")
}

#[allow(clippy::cast_precision_loss, reason = "bytes of an image are far below 2^52")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position within a blob")]
fn whole(position: f64) -> u64 {
    position as u64
}

impl Network {
    fn new(shape: Shape) -> Self {
        let addresses: Vec<SocketAddr> = (1..=shape.nodes).map(address).collect();
        let ring: Ring = addresses.iter().copied().collect();
        let owner = |layer: &u64| index(ring.owners(&Digest::of(&layer.to_be_bytes()), 1)[0]) - 1;
        let owners = LAYERS.iter().map(owner).collect();
        let node = |address| Node {
            address,
            fetches: LAYERS.iter().map(|_| Fetch::default()).collect(),
            sending: 0,
            sent: 0.0,
            finished: None,
        };
        let nodes = addresses.into_iter().map(node).collect();
        let random = fastrand::Rng::with_seed(1);
        let started = tokio::time::Instant::now();
        Self {
            shape,
            nodes,
            owners,
            flows: Vec::new(),
            flows_to: Vec::new(),
            from_origin: 0.0,
            now: 0.0,
            started,
            random,
        }
    }

    fn is_slow(&self, node: usize) -> bool {
        match self.owners.contains(&node) {
            true => self.shape.owners == Owners::Slow,
            false => self.shape.slow_every > 0 && node.is_multiple_of(self.shape.slow_every),
        }
    }

    fn card(&self, node: usize) -> f64 {
        if self.is_slow(node) { CARD / 10.0 } else { CARD }
    }

    fn clock(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    fn run(mut self) -> Outcome {
        while self.nodes.iter().enumerate().any(|(node, state)| state.finished.is_none() && !self.is_slow(node)) {
            assert!(self.now < 120.0, "no progress: {} flows", self.flows.len());
            self.index_flows();
            for node in 0..self.nodes.len() {
                self.begin(node);
            }
            let rates = self.rates();
            self.advance(&rates);
            self.now += STEP;
            self.climb();
        }
        let image = float(LAYERS.iter().sum());
        let healthy = self.nodes.iter().enumerate().filter(|(node, _)| !self.is_slow(*node));
        let mut finished: Vec<f64> = healthy.filter_map(|(_, node)| Some(node.finished? / (image / CARD))).collect();
        finished.sort_unstable_by(f64::total_cmp);
        let busiest = self.nodes.iter().map(|node| node.sent).fold(0.0, f64::max) / image;
        Outcome { finished, origin: self.from_origin / image, busiest }
    }

    /// Starts the layers that a node pulls now, and as many ranges of each as it may.
    fn begin(&mut self, node: usize) {
        let mut pulling = 0;
        for layer in 0..LAYERS.len() {
            if pulling < AT_A_TIME && !self.nodes[node].fetches[layer].done {
                pulling += 1;
                self.open(node, layer);
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

    /// Owners think over how many connections to have.
    fn climb(&mut self) {
        let now = self.started + self.clock();
        for layer in 0..LAYERS.len() {
            let fetch = &mut self.nodes[self.owners[layer]].fetches[layer];
            if let Some(climb) = &mut fetch.climb {
                climb.observe(now, fetch.have.len(), fetch.lanes);
            }
        }
    }

    fn open(&mut self, node: usize, layer: usize) {
        let fetch = &mut self.nodes[node].fetches[layer];
        if fetch.plan.is_none() && !fetch.done {
            fetch.plan = Some(Plan::new(LAYERS[layer], Spans::default()));
            if self.owners[layer] == node {
                fetch.climb = Some(Climb::new(MOST_LANES));
                // It lends once the origin has answered it.
                self.ask_for_more(node, layer);
                self.nodes[node].fetches[layer].plan.as_mut().expect("it has begun").may_lend();
            }
        }
    }

    fn ask_for_more(&mut self, node: usize, layer: usize) {
        let owns = self.owners[layer] == node;
        let waiting: Vec<u64> = if owns { self.waiting_for(node, layer) } else { Vec::new() };
        loop {
            let (lot, now) = (self.random.u64(..), self.clock());
            let fetch = &mut self.nodes[node].fetches[layer];
            let Some(plan) = &mut fetch.plan else { return };
            plan.collect(now, |span| fetch.tracker.is_elsewhere(span));
            let read = fetch.have.run_end(0);
            let mut wanted = vec![read];
            wanted.extend(&waiting);
            let urgent = plan.waited_for(&wanted).is_some() && fetch.lanes < MOST_LANES;
            let most = fetch.climb.as_ref().map_or(IN_FLIGHT, Climb::lanes);
            if fetch.lanes >= most && !urgent {
                return;
            }
            let span = if owns {
                plan.next(read, &wanted, most)
            } else {
                plan.chosen(read, &wanted, |ranges| fetch.view.choose(ranges, lot))
            };
            let Some(span) = span else { return };
            fetch.lanes += 1;
            let Some((from, given, round_trips, gives_up)) = self.find_source(node, layer, span) else {
                // The owner lets it wait.
                let fetch = &mut self.nodes[node].fetches[layer];
                fetch.lanes -= 1;
                fetch.plan.as_mut().expect("it fetches").give_back(span);
                fetch.waits_until = self.now + LOOK_AGAIN;
                return;
            };
            let rest = Span { start: given.end, end: span.end };
            let span = given;
            if let Some(plan) = &mut self.nodes[node].fetches[layer].plan {
                plan.give_back(rest);
            }
            if let Some(peer) = from {
                let address = self.nodes[peer].address;
                self.nodes[node].fetches[layer].view.begin(address);
                self.nodes[peer].sending += 1;
            }
            let starts = self.now + round_trips * ROUND_TRIP;
            self.flows_to[node].push(self.flows.len());
            let position = float(span.start);
            self.flows.push(Flow { from, to: node, layer, span, position, starts, idle_since: starts, gives_up });
        }
    }

    /// Where readers of an owner wait.
    fn waiting_for(&self, node: usize, layer: usize) -> Vec<u64> {
        let of_it = self.flows.iter().filter(|flow| flow.from == Some(node) && flow.layer == layer);
        let have = &self.nodes[node].fetches[layer].have;
        of_it.map(|flow| whole(flow.position)).filter(|at| have.run_end(*at) == *at).take(64).collect()
    }

    /// Whom a range comes from, after how many round trips, and whether it comes only as far as that one has
    /// it: the way of `BlobSources::open`.
    fn find_source(&mut self, node: usize, layer: usize, span: Span) -> Option<(Option<usize>, Span, f64, bool)> {
        let mut round_trips = 0.0;
        let owner = self.owners[layer];
        if owner == node {
            let fetch = &mut self.nodes[node].fetches[layer];
            let visitors = fetch.tracker.who_has(span.start);
            visitors.iter().for_each(|holder| fetch.view.learn(holder));
        }
        for _ in 0..ASK_HOLDERS {
            let (now, lot) = (self.clock(), self.random.u64(..));
            let has = self.nodes[node].fetches[layer].have.len();
            let Some(holder) = self.nodes[node].fetches[layer].view.pick(span.start, has, now, lot) else { break };
            let from = self.ask(node, index(holder) - 1, layer, span, false, &mut round_trips);
            if let Said::From(source) = from {
                return Some((Some(source), span, round_trips, true));
            }
        }
        if owner == node {
            return Some((None, span, round_trips + 1.0, false));
        }
        let source = match self.ask(node, owner, layer, span, true, &mut round_trips) {
            Said::From(source) => source,
            Said::Fetch(lent) => return Some((None, lent, round_trips, false)),
            Said::NotHere => owner,
            Said::Wait => return None,
        };
        Some((Some(source), span, round_trips, source != owner))
    }

    /// Asks one peer; where it names another, that one, and if that cannot help, the first again.
    fn ask(
        &mut self,
        node: usize,
        peer: usize,
        layer: usize,
        span: Span,
        as_owner: bool,
        round_trips: &mut f64,
    ) -> Said {
        *round_trips += 1.0;
        let now = self.clock();
        if as_owner {
            self.open(peer, layer);
        }
        let (asker, sending) = (self.nodes[node].address, self.nodes[peer].sending);
        self.hear(node, peer, layer);
        let fetch = &mut self.nodes[peer].fetches[layer];
        let is_better = fetch.plan.as_ref().is_some_and(|plan| plan.is_better_elsewhere(span.start));
        let comes = if is_better { Comes::Elsewhere } else { Comes::Here };
        let direction = fetch.tracker.direct(Some(asker), span, comes, sending, now);
        let nobody_has = !fetch.tracker.another_has(asker, span.start);
        let asked = fetch.plan.as_mut().filter(|_| as_owner && nobody_has && direction == Direction::Answer);
        let lent = asked.map_or(Lent::No, |plan| plan.lend(span, asker, now));
        if lent != Lent::Later {
            let gets = if let Lent::Yes(lent) = lent { lent } else { span };
            self.nodes[peer].fetches[layer].tracker.expect(Some(asker), gets, now);
        }
        self.tell(node, peer, layer);
        match lent {
            Lent::Yes(lent) => {
                self.nodes[peer].fetches[layer].tracker.depute(asker, lent);
                return Said::Fetch(lent);
            }
            Lent::Later => return Said::Wait,
            Lent::No => {}
        }
        if let Direction::Redirect(other) = direction {
            *round_trips += 1.0;
            let other = index(other) - 1;
            self.hear(node, other, layer);
            self.tell(node, other, layer);
            if self.gives(other, layer, span.start) {
                return Said::From(other);
            }
            *round_trips += 1.0;
            self.nodes[node].fetches[layer].view.refused(address(other + 1), now);
            self.hear(node, peer, layer);
        }
        if as_owner || self.gives(peer, layer, span.start) {
            return Said::From(peer);
        }
        self.nodes[node].fetches[layer].view.refused(address(peer + 1), now);
        Said::NotHere
    }

    /// Whether somebody has a byte, or gets it in no time.
    fn gives(&self, node: usize, layer: usize, at: u64) -> bool {
        let soon = whole(self.card(node) * ON_ITS_WAY / 16.0);
        let comes = |nth: &usize| {
            let flow = &self.flows[*nth];
            flow.layer == layer
                && flow.span.start <= at
                && at < flow.span.end
                && at <= whole(flow.position) + soon
                && self.now - flow.idle_since < ON_ITS_WAY
        };
        self.nodes[node].fetches[layer].have.run_end(at) > at || self.flows_to[node].iter().any(comes)
    }

    fn hear(&mut self, node: usize, peer: usize, layer: usize) {
        let (asker, have, load) =
            (self.nodes[node].address, self.nodes[node].fetches[layer].have.clone(), self.nodes[node].sending);
        let now = self.clock();
        self.nodes[peer].fetches[layer].tracker.heard(asker, &have, load, now);
    }

    /// What an answer tells of others and of whoever answers.
    fn tell(&mut self, node: usize, peer: usize, layer: usize) {
        let asker = self.nodes[node].address;
        let answers = &mut self.nodes[peer];
        let mut told = answers.fetches[layer].tracker.holders(Some(asker));
        let (load, have) = (answers.sending, answers.fetches[layer].have.clone());
        told.push(Holder { peer: answers.address, load, have });
        let view = &mut self.nodes[node].fetches[layer].view;
        told.iter().filter(|holder| holder.peer != asker).for_each(|holder| view.learn(holder));
    }

    /// Bytes that a flow's source has beyond its position.
    fn available(&self, flow: &Flow) -> f64 {
        match flow.from {
            None => f64::INFINITY,
            Some(peer) => {
                let end = self.nodes[peer].fetches[flow.layer].have.run_end(whole(flow.position));
                (float(end) - flow.position).max(0.0)
            }
        }
    }

    /// The rate of each flow: what its source sends and it receives is shared with others.
    fn rates(&self) -> Vec<f64> {
        let count = self.nodes.len();
        // Outgoing links, incoming ones, and that of the origin.
        let links = (0..count).chain(0..count).map(|node| self.card(node)).chain([CARD]).collect();
        let moves = |flow: &&Flow| flow.starts <= self.now && self.available(flow) >= 1.0;
        let way = |flow: &Flow| [flow.from.unwrap_or(2 * count), count + flow.to];
        let ways: Vec<_> = self.flows.iter().map(|flow| Some(flow).filter(moves).map(way)).collect();
        links::shares(links, &ways)
    }

    /// Moves all flows by one step.
    fn advance(&mut self, rates: &[f64]) {
        let until = self.now + STEP;
        let available: Vec<f64> = self.flows.iter().map(|flow| self.available(flow)).collect();
        let mut over = Vec::new();
        for (nth, flow) in self.flows.iter_mut().enumerate() {
            let moved = (rates[nth] * STEP).min(available[nth]).min(float(flow.span.end) - flow.position);
            if moved <= 0.0 {
                if flow.gives_up && until - flow.idle_since > COMES {
                    over.push(nth);
                }
                continue;
            }
            flow.idle_since = until;
            let came = Span { start: whole(flow.position), end: whole(flow.position + moved) };
            flow.position += moved;
            match flow.from {
                None => self.from_origin += moved,
                Some(peer) => self.nodes[peer].sent += moved,
            }
            let fetch = &mut self.nodes[flow.to].fetches[flow.layer];
            if came.start < came.end {
                fetch.have.insert(came);
            }
            if flow.from.is_none()
                && let Some(plan) = &mut fetch.plan
            {
                plan.brought(came.end - came.start, Duration::from_secs_f64(STEP));
            }
            if flow.from.is_some() && self.owners[flow.layer] != flow.to {
                fetch.pace.brought(came.end - came.start, Duration::from_secs_f64(STEP));
                let left = fetch
                    .pace
                    .leaves(whole(flow.position) - flow.span.start, Duration::from_secs_f64(until - flow.starts));
                let at = whole(flow.position);
                let able = fetch.view.able(at, fetch.have.len(), Duration::from_secs_f64(until));
                if left && able > 1 && float(flow.span.end) - flow.position >= 1.0 {
                    fetch.pace.left();
                    over.push(nth);
                    continue;
                }
            }
            if float(flow.span.end) - flow.position < 1.0 {
                fetch.have.insert(Span { start: came.start, end: flow.span.end });
                over.push(nth);
            }
        }
        for nth in over.into_iter().rev() {
            let flow = self.flows.swap_remove(nth);
            self.end(&flow);
        }
    }

    fn end(&mut self, flow: &Flow) {
        let broke = float(flow.span.end) - flow.position >= 1.0;
        let now = self.clock();
        let peer = flow.from.map(|peer| {
            self.nodes[peer].sending -= 1;
            self.nodes[peer].address
        });
        let fetch = &mut self.nodes[flow.to].fetches[flow.layer];
        fetch.lanes -= 1;
        let reached = whole(flow.position);
        let owner = self.owners[flow.layer];
        if let Some(peer) = peer {
            let (claim, total) = (Claim::Relayed, LAYERS[flow.layer]);
            let span = Span { start: flow.span.start, end: reached };
            fetch.view.end(Contribution { peer, claim, total, span, checksum: 0 });
            if broke {
                fetch.view.left(peer, now);
            }
        }
        if broke && let Some(plan) = &mut fetch.plan {
            plan.give_back(Span { start: reached, end: flow.span.end });
        }
        if fetch.have.len() == LAYERS[flow.layer] {
            fetch.done = true;
            fetch.plan = None;
            fetch.view = View::default();
        }
        if flow.from.is_none() && flow.to != owner {
            self.hear(flow.to, owner, flow.layer);
        }
    }
}

#[allow(clippy::print_stdout, reason = "the figures are what it is for")]
fn simulate(shape: Shape) -> Outcome {
    let Shape { nodes, slow_every, owners } = shape;
    let outcome = Network::new(shape).run();
    let (median, last) = (outcome.finished[outcome.finished.len() / 2], *outcome.finished.last().expect("a node"));
    println!(
        "{nodes} nodes, slow every {slow_every}{}: median {median:.2} x, last {last:.2} x, origin {:.3} x, busiest {:.2} x",
        if owners == Owners::Slow { " and the owners" } else { "" },
        outcome.origin,
        outcome.busiest
    );
    outcome
}

/// How many nodes: a thousand, or what `DRAY_SIMULATED` says.
fn nodes() -> usize {
    std::env::var("DRAY_SIMULATED").map_or(1000, |text| text.parse().expect("a number of nodes"))
}

#[test]
fn an_image_reaches_a_thousand_nodes_at_nearly_the_speed_of_their_cards() {
    let outcome = simulate(Shape { nodes: nodes(), slow_every: 0, owners: Owners::AsFast });
    let median = outcome.finished[outcome.finished.len() / 2];
    let last = outcome.finished.last().unwrap();
    assert!(median <= 1.7, "half of them are done at {median:.2} x size / card");
    assert!(*last <= 2.2, "the last is done at {last:.2} x size / card");
    assert!(outcome.origin <= 1.01 && outcome.busiest <= 2.5);
}

#[test]
fn slow_nodes_do_not_slow_the_others() {
    let outcome = simulate(Shape { nodes: nodes(), slow_every: 20, owners: Owners::AsFast });
    let last = outcome.finished.last().unwrap();
    assert!(*last <= 3.0, "the last healthy one is done at {last:.2} x size / card");
    assert!(outcome.origin <= 1.01);
}

/// All five at once, which is five times what one slow node does to a cluster. Without deputies it takes ten
/// times as long as their cards would need.
#[test]
fn slow_owners_do_not_slow_the_others_as_much() {
    let outcome = simulate(Shape { nodes: nodes() / 5, slow_every: 0, owners: Owners::Slow });
    let median = outcome.finished[outcome.finished.len() / 2];
    assert!(median <= 4.0, "half of the healthy ones are done at {median:.2} x size / card");
    assert!(outcome.origin <= 1.01);
}
