//! Who is asked for what, and what comes of it: the way of `pull/sources.rs`, `pull/lend.rs` and `peers/visit.rs`.

use dray::fill::{ConnectionScaler, Lent};
use dray::oci::Span;
use dray::peers::swarm::{BestSource, PeerDecision};
use dray::peers::wire::Holder;
use dray::role::Role;

use crate::network::{CARD, MOST_LANES, Network, WatchedBody, float, index, whole};

const ROUND_TRIP: f64 = 0.0005;

/// What a follower fetches at a time.
const IN_FLIGHT: usize = 4;
/// As in `pull/sources.rs`.
const ASK_HOLDERS: usize = 3;
/// What is on its way to somebody is waited for this long before it says that it has nothing.
const ON_ITS_WAY: f64 = 0.25;
/// How often an owner looks whether it may lend what somebody waits for.
const LOOK_AGAIN: f64 = 0.05;

/// What somebody who was asked says.
enum ProgramOutput {
    /// Where it comes from.
    From(usize),
    /// This part of it is to be fetched from the origin, in the owner's stead.
    Fetch(Span),
    /// A little later.
    Wait,
    NotHere,
}

/// Where a range comes from.
struct Source {
    /// None: the origin.
    from: Option<usize>,
    /// What of it.
    given: Span,
    /// After so many questions.
    round_trips: f64,
    /// Whether it comes only as far as that one has it.
    gives_up: bool,
    lent_by: Option<usize>,
}

impl Network {
    pub(crate) fn ask_for_more(&mut self, node: usize, layer: usize) {
        let role = self.nodes[node].fetches[layer].role.expect("it has begun");
        let waiting: Vec<u64> = if role == Role::Client { Vec::new() } else { self.waiting_for(node, layer) };
        loop {
            let (lot, now) = (self.random.u64(..), self.clock());
            let fetch = &mut self.nodes[node].fetches[layer];
            let Some(plan) = &mut fetch.plan else { return };
            plan.collect(now, |span| fetch.trackers.iter().any(|tracker| tracker.is_elsewhere(span)));
            let read = fetch.have.run_end(0);
            let mut wanted = vec![read];
            wanted.extend(&waiting);
            let urgent = plan.waited_for(&wanted).is_some() && fetch.lanes < MOST_LANES;
            let most = fetch.climb.as_ref().map_or(IN_FLIGHT, ConnectionScaler::lanes);
            if fetch.lanes >= most && !urgent {
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
                // The owner lets it wait.
                let fetch = &mut self.nodes[node].fetches[layer];
                fetch.lanes -= 1;
                fetch.plan.as_mut().expect("it fetches").give_back(span);
                fetch.waits_until = self.now + LOOK_AGAIN;
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
            self.flows.push(WatchedBody {
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

    /// Where readers of an owner wait.
    fn waiting_for(&self, node: usize, layer: usize) -> Vec<u64> {
        let of_it = self.flows.iter().filter(|flow| flow.from == Some(node) && flow.layer == layer);
        let have = &self.nodes[node].fetches[layer].have;
        of_it.map(|flow| whole(flow.position)).filter(|at| have.run_end(*at) == *at).take(64).collect()
    }

    /// Whom a range comes from. None: who was asked lets it wait.
    fn find_source(&mut self, node: usize, layer: usize, span: Span) -> Option<Source> {
        let mut round_trips = 0.0;
        let role = self.nodes[node].fetches[layer].role.expect("it has begun");
        if role == Role::Global {
            let fetch = &mut self.nodes[node].fetches[layer];
            let visitors = fetch.trackers.iter().flat_map(|tracker| tracker.who_has(span.start));
            visitors.collect::<Vec<_>>().iter().for_each(|holder| fetch.view.learn(holder));
        }
        for _ in 0..ASK_HOLDERS {
            let (now, lot) = (self.clock(), self.random.u64(..));
            let has = self.nodes[node].fetches[layer].have.len();
            let Some(holder) = self.nodes[node].fetches[layer].view.pick(span.start, has, now, lot) else { break };
            if let ProgramOutput::From(from) = self.ask(node, index(holder), layer, span, None, &mut round_trips) {
                return Some(Source { from: Some(from), given: span, round_trips, gives_up: true, lent_by: None });
            }
        }
        loop {
            let lead = self.lead(node, layer, role);
            let Some(leader) = lead.leaders.first().map(|leader| index(*leader)) else { break };
            if self.nodes[leader].is_dead {
                round_trips += 1.0;
                self.found_dead(node, layer, leader);
                continue;
            }
            let source = Source { from: None, given: span, round_trips, gives_up: false, lent_by: None };
            let said = self.ask(node, leader, layer, span, Some(lead.asked_as), &mut round_trips);
            return match said {
                ProgramOutput::From(from) => {
                    Some(Source { from: Some(from), round_trips, gives_up: from != leader, ..source })
                }
                ProgramOutput::Fetch(lent) => {
                    Some(Source { given: lent, round_trips, lent_by: Some(leader), ..source })
                }
                ProgramOutput::NotHere => Some(Source { from: Some(leader), round_trips, gives_up: true, ..source }),
                ProgramOutput::Wait => None,
            };
        }
        // Those who come before it are not there any more.
        self.open(node, layer, Role::Global);
        round_trips += 1.0;
        Some(Source { from: None, given: span, round_trips, gives_up: false, lent_by: None })
    }

    /// Asks one peer, for what it has or to be that for it; where it names another, that one, and if that cannot
    /// help, the first again.
    fn ask(
        &mut self,
        node: usize,
        peer: usize,
        layer: usize,
        span: Span,
        asked_as: Option<Role>,
        round_trips: &mut f64,
    ) -> ProgramOutput {
        *round_trips += 1.0;
        let now = self.clock();
        if self.nodes[peer].is_dead {
            self.found_dead(node, layer, peer);
            return ProgramOutput::NotHere;
        }
        if let Some(role) = asked_as {
            self.open(peer, layer, role);
        }
        let (asker, sending) = (self.nodes[node].address, self.nodes[peer].sending);
        self.hear(node, peer, layer);
        let circle = usize::from(self.is_far(node, peer));
        let fetch = &mut self.nodes[peer].fetches[layer];
        let owns = fetch.role == Some(Role::Global);
        let is_better = fetch.plan.as_ref().is_some_and(|plan| owns && plan.is_better_elsewhere(span.start));
        let comes = if is_better { BestSource::Elsewhere } else { BestSource::Here };
        let direction = fetch.trackers[circle].direct(Some(asker), span, comes, sending, now);
        let nobody_has = !fetch.trackers.iter().any(|tracker| tracker.another_has(asker, span.start));
        let may_lend = owns && asked_as.is_some() && nobody_has && direction == PeerDecision::Answer;
        let asked = fetch.plan.as_mut().filter(|_| may_lend);
        let lent = asked.map_or(Lent::No, |plan| plan.lend(span, asker, now));
        if lent != Lent::Later {
            let gets = if let Lent::Yes(lent) = lent { lent } else { span };
            fetch.trackers[circle].expect(Some(asker), gets, now);
        }
        self.tell(node, peer, layer);
        match lent {
            Lent::Yes(lent) => {
                self.nodes[peer].fetches[layer].trackers[circle].depute(asker, lent);
                return ProgramOutput::Fetch(lent);
            }
            Lent::Later => return ProgramOutput::Wait,
            Lent::No => {}
        }
        if let PeerDecision::Redirect(other) = direction {
            *round_trips += 1.0;
            let other = index(other);
            if self.nodes[other].is_dead {
                self.found_dead(node, layer, other);
            } else {
                self.hear(node, other, layer);
                self.tell(node, other, layer);
                if self.gives(other, layer, span.start) {
                    return ProgramOutput::From(other);
                }
                let refused = self.nodes[other].address;
                self.nodes[node].fetches[layer].view.refused(refused, now);
            }
            *round_trips += 1.0;
            self.hear(node, peer, layer);
        }
        if asked_as.is_some() || self.gives(peer, layer, span.start) {
            return ProgramOutput::From(peer);
        }
        let refused = self.nodes[peer].address;
        self.nodes[node].fetches[layer].view.refused(refused, now);
        ProgramOutput::NotHere
    }

    /// Whether somebody has a byte, or gets it in no time.
    fn gives(&self, node: usize, layer: usize, at: u64) -> bool {
        let soon = whole(self.card(node).min(CARD) * ON_ITS_WAY / 16.0);
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

    pub(crate) fn hear(&mut self, node: usize, peer: usize, layer: usize) {
        let (asker, have, load) =
            (self.nodes[node].address, self.nodes[node].fetches[layer].have.clone(), self.nodes[node].sending);
        let (now, circle) = (self.clock(), usize::from(self.is_far(node, peer)));
        self.nodes[peer].fetches[layer].trackers[circle].heard(asker, &have, load, now);
    }

    /// What an answer tells of others and of whoever answers.
    pub(crate) fn tell(&mut self, node: usize, peer: usize, layer: usize) {
        let asker = self.nodes[node].address;
        let circle = usize::from(self.is_far(node, peer));
        let answers = &mut self.nodes[peer];
        let mut told = answers.fetches[layer].trackers[circle].holders(Some(asker));
        let (load, have) = (answers.sending, answers.fetches[layer].have.clone());
        told.push(Holder { peer: answers.address, load, have });
        let now = self.clock();
        let Self { nodes, .. } = self;
        let Some(node) = nodes.get_mut(node) else { return };
        let (view, health) = (&mut node.fetches[layer].view, &node.health);
        let may_be_asked = |holder: &&Holder| holder.peer != asker && health.is_well(&holder.peer, now);
        told.iter().filter(may_be_asked).for_each(|holder| view.learn(holder));
    }
}
