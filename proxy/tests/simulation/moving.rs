//! Moves bytes over shared links: network cards, and lines between zones.

use std::time::Duration;

use dray::oci::Span;
use dray::peers::swarm::{Claim, Contribution, View};
use dray::role::Role;

use crate::links::{self, LinkPath};
use crate::network::{CARD, Flow, LAYERS, Network, STEP, float, whole};

/// Seconds without a byte after which a download from a holder ends.
const STALL_TIMEOUT: f64 = 1.0;

impl Network {
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

    /// The rate of each flow. It shares its source's card, its target's card and the line between zones with other
    /// flows. A source with few bytes left leaves the rest of its share to them.
    pub(crate) fn rates(&self) -> Vec<f64> {
        let (count, zones) = (self.nodes.len(), self.shape.zones);
        // Links: outgoing cards, incoming cards, the upstream's card, and the lines from each zone to each other.
        let cards = (0..count).chain(0..count).map(|node| self.card(node)).chain([self.shape.upstream]);
        let mut links: Vec<f64> = cards.chain(std::iter::repeat_n(zones.between, zones.count * zones.count)).collect();
        let line = |from: usize, to: usize| {
            let (from, to) = (self.nodes[from].zone, self.nodes[to].zone);
            (from != to).then_some(2 * count + 1 + from * zones.count + to)
        };
        let mut links_of = |flow: &Flow| -> LinkPath {
            let available = self.available(flow);
            if flow.starts > self.now || available < 1.0 {
                return LinkPath::default();
            }
            let little = (available < CARD * STEP).then(|| {
                links.push(available / STEP);
                links.len() - 1
            });
            let line = flow.from.and_then(|from| line(from, flow.to));
            [Some(flow.from.unwrap_or(2 * count)), Some(count + flow.to), line, little]
        };
        let routes: Vec<LinkPath> = self.flows.iter().map(&mut links_of).collect();
        links::shares(links, &routes)
    }

    /// Moves all flows by one step.
    pub(crate) fn advance(&mut self, rates: &[f64]) {
        let until = self.now + STEP;
        let available: Vec<f64> = self.flows.iter().map(|flow| self.available(flow)).collect();
        let mut over = Vec::new();
        for (nth, flow) in self.flows.iter_mut().enumerate() {
            let moved = (rates[nth] * STEP).min(available[nth]).min(float(flow.span.end) - flow.position).max(0.0);
            let came = Span { start: whole(flow.position), end: whole(flow.position + moved) };
            let fetch = &mut self.nodes[flow.to].fetches[flow.layer];
            let follows = flow.from.is_some() && fetch.role != Some(Role::Global);
            if moved > 0.0 {
                flow.idle_since = until;
                flow.position += moved;
                if came.start < came.end {
                    fetch.have.insert(came);
                }
                if follows {
                    flow.counted += STEP;
                    fetch.pace.brought(came.len(), Duration::from_secs_f64(STEP));
                }
                if flow.from.is_none()
                    && let Some(plan) = &mut fetch.plan
                {
                    plan.brought(came.len(), Duration::from_secs_f64(STEP));
                }
                if float(flow.span.end) - flow.position < 1.0 {
                    fetch.have.insert(Span { start: came.start, end: flow.span.end });
                    over.push(nth);
                }
                match flow.from {
                    None => self.from_upstream += moved,
                    Some(peer) => {
                        self.nodes[peer].sent += moved;
                        if self.nodes[peer].zone != self.nodes[flow.to].zone {
                            self.crossed += moved;
                        }
                    }
                }
            } else if flow.gives_up && until - flow.idle_since > STALL_TIMEOUT {
                over.push(nth);
            }
            let is_over = over.last() == Some(&nth);
            let fetch = &mut self.nodes[flow.to].fetches[flow.layer];
            if follows && !is_over && flow.starts < until {
                let (brought, took) = (came.end - flow.span.start, Duration::from_secs_f64(until - flow.starts));
                let counted = Duration::from_secs_f64(flow.counted);
                let is_left = (moved > 0.0 && fetch.pace.leaves(brought, took))
                    || (fetch.idles && fetch.pace.leaves_soon(brought, counted, took.saturating_sub(counted)));
                if is_left && fetch.view.able(came.end, fetch.have.len(), Duration::from_secs_f64(until)) > 1 {
                    fetch.pace.left();
                    over.push(nth);
                }
            }
        }
        for nth in over.into_iter().rev() {
            let flow = self.flows.swap_remove(nth);
            self.end(&flow);
        }
    }

    /// Records that a flow is complete, or broke off.
    pub(crate) fn end(&mut self, flow: &Flow) {
        let broke = float(flow.span.end) - flow.position >= 1.0;
        let now = self.clock();
        let peer = flow.from.map(|peer| {
            self.nodes[peer].sending -= 1;
            self.nodes[peer].address
        });
        let count = self.nodes.len();
        let fetch = &mut self.nodes[flow.to].fetches[flow.layer];
        fetch.lanes -= 1;
        let reached = whole(flow.position);
        if let Some(peer) = peer {
            let (claim, total) = (Claim::Relayed, LAYERS[flow.layer]);
            let span = Span { start: flow.span.start, end: reached };
            fetch.view.end(Contribution { peer, claim, total, span, checksum: 0 });
            if broke {
                fetch.view.mark_interrupted(peer, now);
            }
        }
        if broke && let Some(plan) = &mut fetch.plan {
            plan.give_back(Span { start: reached, end: flow.span.end });
        }
        if fetch.have.len() == LAYERS[flow.layer] {
            fetch.done = true;
            fetch.plan = None;
            fetch.view = View::new(count);
        }
        if let Some(owner) = flow.lent_by.filter(|owner| !self.nodes[*owner].is_dead) {
            self.report(flow.to, owner, flow.layer);
        }
    }
}
