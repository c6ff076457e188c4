//! Requests between nodes and their results, as in `pull/blob/sources.rs`, `pull/blob/lend.rs` and `peers/peer_request.rs`.

use dray::fill::{ConnectionScaler, Lent};
use dray::oci::Span;
use dray::peers::swarm::{BestSource, PeerDecision};
use dray::peers::wire::Holder;
use dray::pull::{
    Decision, HolderStep, MAX_HOLDERS_TRIED, MAX_PEER_RANGES, SearchProgress, Source as Step, SourceSearch,
    WithoutOwner,
};
use dray::role::Role;
use dray::source::SourceError;

use crate::network::{CARD, Flow, MAX_CONNECTIONS, Network, float, index, whole};

const ROUND_TRIP: f64 = 0.0005;

/// Seconds that a peer waits for a byte in flight to it before it responds that it has nothing.
const BYTE_WAIT: f64 = 0.25;
/// Seconds after which an owner checks again whether it may lend a range to a waiting peer.
const LEND_CHECK_INTERVAL: f64 = 0.05;

/// The response of a peer.
enum PeerResponse {
    /// The node that delivers it.
    From(usize),
    /// The requester is the owner's deputy for this span.
    Fetch(Span),
    /// The owner holds the request for now.
    Wait,
    Miss,
}

/// Where a range comes from.
struct Source {
    /// None: the upstream.
    from: Option<usize>,
    /// The part of the range that it delivers.
    given: Span,
    /// Round trips of the requests until it was found.
    round_trips: f64,
    /// Whether the download ends where the source has no more bytes.
    gives_up: bool,
    lent_by: Option<usize>,
}

impl Network {
    pub(crate) fn download_more(&mut self, node: usize, layer: usize) {
        let role = self.nodes[node].fetches[layer].role.expect("it has begun");
        let waiting: Vec<u64> = if role == Role::Client { Vec::new() } else { self.reader_positions(node, layer) };
        loop {
            let (lot, now) = (self.random.u64(..), self.clock());
            let fetch = &mut self.nodes[node].fetches[layer];
            let Some(plan) = &mut fetch.plan else { return };
            plan.collect(now, |span| fetch.trackers.iter().any(|tracker| tracker.is_at_a_peer(span)));
            let read = fetch.have.run_end(0);
            let mut wanted = vec![read];
            wanted.extend(&waiting);
            let is_urgent = plan.waited_for(&wanted).is_some() && fetch.lanes < MAX_CONNECTIONS;
            let most = fetch.scaler.as_ref().map_or(MAX_PEER_RANGES, ConnectionScaler::lanes);
            if fetch.lanes >= most && !is_urgent {
                return;
            }
            let span = if role == Role::Global {
                plan.next(read, &wanted, most)
            } else {
                plan.chosen(read, &wanted, |ranges| fetch.view.choose(ranges, lot))
            };
            fetch.idles = span.is_none();
            let Some(span) = span else { return };
            fetch.lanes += 1;
            let Some(source) = self.find_source(node, layer, span) else {
                // The owner holds the request.
                let fetch = &mut self.nodes[node].fetches[layer];
                fetch.lanes -= 1;
                fetch.plan.as_mut().expect("it fetches").give_back(span);
                fetch.waits_until = self.now + LEND_CHECK_INTERVAL;
                return;
            };
            let rest = Span { start: source.given.end, end: span.end };
            if let Some(plan) = &mut self.nodes[node].fetches[layer].plan {
                plan.give_back(rest);
            }
            if let Some(peer) = source.from {
                let address = self.nodes[peer].address;
                self.nodes[node].fetches[layer].view.begin(address);
                self.nodes[peer].sending += 1;
            }
            let starts = self.now + source.round_trips * ROUND_TRIP;
            self.flows_to[node].push(self.flows.len());
            self.flows.push(Flow {
                from: source.from,
                to: node,
                layer,
                span: source.given,
                position: float(source.given.start),
                starts,
                idle_since: starts,
                counted: 0.0,
                gives_up: source.gives_up,
                lent_by: source.lent_by,
            });
        }
    }

    /// The positions at which an owner's readers wait.
    fn reader_positions(&self, node: usize, layer: usize) -> Vec<u64> {
        let of_it = self.flows.iter().filter(|flow| flow.from == Some(node) && flow.layer == layer);
        let have = &self.nodes[node].fetches[layer].have;
        of_it.map(|flow| whole(flow.position)).filter(|at| have.run_end(*at) == *at).take(64).collect()
    }

    /// The source of a range, by the product's own search. None: the owner holds the request.
    fn find_source(&mut self, node: usize, layer: usize, span: Span) -> Option<Source> {
        let mut round_trips = 0.0;
        let role = self.nodes[node].fetches[layer].role.expect("it has begun");
        let route = (*self.owner_route(node, layer, role)).clone();
        let mut search = SourceSearch::new(role, route, HolderStep::First, WithoutOwner::ActAsOwner);
        let mut decision = search.first();
        let of_upstream = |round_trips| Source { from: None, given: span, round_trips, gives_up: false, lent_by: None };
        loop {
            let step = match decision {
                Decision::Request(step) => step,
                // All owners before this node are dead.
                Decision::ActAsOwner => {
                    self.open(node, layer, Role::Global);
                    return Some(of_upstream(round_trips + 1.0));
                }
                Decision::Fail(error) => unreachable!("the upstream always responds: {error}"),
            };
            let error = match step {
                Step::Holders => match self.find_holder(node, layer, span, &mut round_trips) {
                    Some(from) => {
                        let source = of_upstream(round_trips);
                        return Some(Source { from: Some(from), gives_up: true, ..source });
                    }
                    None => SourceError::NotCached,
                },
                Step::Owner { peer, .. } if self.nodes[index(peer)].is_dead => {
                    round_trips += 1.0;
                    self.found_dead(node, layer, index(peer));
                    SourceError::TimedOut
                }
                Step::Owner { peer, role } => {
                    let owner = index(peer);
                    let response = self.request(node, owner, layer, span, Some(role), &mut round_trips);
                    let source = of_upstream(round_trips);
                    return match response {
                        PeerResponse::From(from) => {
                            Some(Source { from: Some(from), gives_up: from != owner, ..source })
                        }
                        PeerResponse::Fetch(lent) => Some(Source { given: lent, lent_by: Some(owner), ..source }),
                        PeerResponse::Miss => Some(Source { from: Some(owner), gives_up: true, ..source }),
                        PeerResponse::Wait => None,
                    };
                }
                Step::Upstream | Step::AnyPeer => {
                    self.open(node, layer, Role::Global);
                    return Some(of_upstream(round_trips + 1.0));
                }
            };
            decision = search.after(step, error, SearchProgress::NotBegun);
        }
    }

    fn find_holder(&mut self, node: usize, layer: usize, span: Span, round_trips: &mut f64) -> Option<usize> {
        if self.nodes[node].fetches[layer].role == Some(Role::Global) {
            let fetch = &mut self.nodes[node].fetches[layer];
            let requesters = fetch.trackers.iter().flat_map(|tracker| tracker.holders_of_byte(span.start));
            requesters.collect::<Vec<_>>().iter().for_each(|holder| fetch.view.learn(holder));
        }
        for _ in 0..MAX_HOLDERS_TRIED {
            let (now, lot) = (self.clock(), self.random.u64(..));
            let has = self.nodes[node].fetches[layer].have.len();
            let holder = self.nodes[node].fetches[layer].view.pick(span.start, has, now, lot)?;
            if let PeerResponse::From(from) = self.request(node, index(holder), layer, span, None, round_trips) {
                return Some(from);
            }
        }
        None
    }

    /// Sends a request to one peer: as an owner in `request_role`, or as a holder. A redirect is followed; if its target
    /// has nothing, the first peer is requested again.
    fn request(
        &mut self,
        node: usize,
        peer: usize,
        layer: usize,
        span: Span,
        request_role: Option<Role>,
        round_trips: &mut f64,
    ) -> PeerResponse {
        *round_trips += 1.0;
        let now = self.clock();
        if self.nodes[peer].is_dead {
            self.found_dead(node, layer, peer);
            return PeerResponse::Miss;
        }
        if let Some(role) = request_role {
            self.open(peer, layer, role);
        }
        let (requester, sending) = (self.nodes[node].address, self.nodes[peer].sending);
        self.report(node, peer, layer);
        let locality = usize::from(self.is_cross_zone(node, peer));
        let fetch = &mut self.nodes[peer].fetches[layer];
        let owns = fetch.role == Some(Role::Global);
        let is_better = fetch.plan.as_ref().is_some_and(|plan| owns && plan.is_deferred_to_peers(span.start));
        let best_source = if is_better { BestSource::OtherHolder } else { BestSource::ThisNode };
        let decision = fetch.trackers[locality].decide(Some(requester), span, best_source, sending, now);
        let no_peer_has = !fetch.trackers.iter().any(|tracker| tracker.another_peer_has(requester, span.start));
        let enable_lending = owns && request_role.is_some() && no_peer_has && decision == PeerDecision::Serve;
        let plan = fetch.plan.as_mut().filter(|_| enable_lending);
        let lent = plan.map_or(Lent::No, |plan| plan.lend(span, requester, now));
        if lent != Lent::Later {
            let gets = if let Lent::Yes(lent) = lent { lent } else { span };
            fetch.trackers[locality].record_in_flight(Some(requester), gets, now);
        }
        self.learn_holders(node, peer, layer);
        match lent {
            Lent::Yes(lent) => {
                self.nodes[peer].fetches[layer].trackers[locality].depute(requester, lent);
                return PeerResponse::Fetch(lent);
            }
            Lent::Later => return PeerResponse::Wait,
            Lent::No => {}
        }
        if let PeerDecision::Redirect(other) = decision {
            *round_trips += 1.0;
            let other = index(other);
            if self.nodes[other].is_dead {
                self.found_dead(node, layer, other);
            } else {
                self.report(node, other, layer);
                self.learn_holders(node, other, layer);
                if self.has_soon(other, layer, span.start) {
                    return PeerResponse::From(other);
                }
                let refused = self.nodes[other].address;
                self.nodes[node].fetches[layer].view.mark_refused(refused, now);
            }
            *round_trips += 1.0;
            self.report(node, peer, layer);
        }
        if request_role.is_some() || self.has_soon(peer, layer, span.start) {
            return PeerResponse::From(peer);
        }
        let refused = self.nodes[peer].address;
        self.nodes[node].fetches[layer].view.mark_refused(refused, now);
        PeerResponse::Miss
    }

    /// Whether a node has a byte, or gets it within [`BYTE_WAIT`].
    fn has_soon(&self, node: usize, layer: usize, at: u64) -> bool {
        let soon = whole(self.card(node).min(CARD) * BYTE_WAIT / 16.0);
        let arrives_soon = |nth: &usize| {
            let flow = &self.flows[*nth];
            flow.layer == layer
                && flow.span.start <= at
                && at < flow.span.end
                && at <= whole(flow.position) + soon
                && self.now - flow.idle_since < BYTE_WAIT
        };
        self.nodes[node].fetches[layer].have.run_end(at) > at || self.flows_to[node].iter().any(arrives_soon)
    }

    pub(crate) fn report(&mut self, node: usize, peer: usize, layer: usize) {
        let (requester, have, load) =
            (self.nodes[node].address, self.nodes[node].fetches[layer].have.clone(), self.nodes[node].sending);
        let (now, locality) = (self.clock(), usize::from(self.is_cross_zone(node, peer)));
        self.nodes[peer].fetches[layer].trackers[locality].record(requester, &have, load, now);
    }

    /// The holders in a peer's response, itself included, reach the requester's view.
    pub(crate) fn learn_holders(&mut self, node: usize, peer: usize, layer: usize) {
        let requester = self.nodes[node].address;
        let locality = usize::from(self.is_cross_zone(node, peer));
        let server = &mut self.nodes[peer];
        let mut named = server.fetches[layer].trackers[locality].holders(Some(requester));
        let (load, have) = (server.sending, server.fetches[layer].have.clone());
        named.push(Holder { peer: server.address, load, have });
        let now = self.clock();
        let Self { nodes, .. } = self;
        let Some(node) = nodes.get_mut(node) else { return };
        let (view, health) = (&mut node.fetches[layer].view, &node.health);
        let may_be_used = |holder: &&Holder| holder.peer != requester && health.is_available(&holder.peer, now);
        named.iter().filter(may_be_used).for_each(|holder| view.learn(holder));
    }
}
