//! What a serving node remembers of its requesters.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{BestSource, MAX_SPANS, PeerDecision, Time, is_slow, scatter};
use crate::oci::{Span, Spans};
use crate::peers::wire::{Holder, MAX_HOLDERS};
use crate::times::TICK;

/// The peers that request one blob from one node.
pub struct Tracker {
    pub(super) peers: HashMap<SocketAddr, Tracked>,
    pub(super) max_peers: usize,
    load_step: u32,
    /// How often holders were named: each time equally loaded ones come in another order.
    times_named: u64,
    /// Mean download rate of the last reports, in bytes a second, and their number.
    mean_rate: f64,
    reports: u32,
}

#[derive(Default)]
pub(super) struct Tracked {
    pub(super) have: Spans,
    /// Ranges that it is downloading, the newest first.
    in_flight: Vec<RangeInFlight>,
    /// The nodes that its last range passes from this node to it, and where its source's bytes end.
    hops: u32,
    until: u64,
    /// The start of the range for which a requester was last redirected to it.
    last_redirect_start: Option<u64>,
    /// Spans that it downloads from the upstream as this owner's deputy, or has downloaded.
    deputed: Spans,
    /// Number of bodies that it is sending, by its last report, plus the redirects to it since.
    load: u32,
    /// The time of its first report, and how many bytes it had then.
    since: Option<(Time, u64)>,
    /// Its download rate since then, in bytes a second. None: not known yet.
    rate: Option<f64>,
    last_seen: Time,
}

/// A range that a requester is downloading.
struct RangeInFlight {
    span: Span,
    since: Time,
    hops: u32,
}

impl RangeInFlight {
    /// Whether it is still expected to arrive.
    fn is_in_flight(&self, now: Time) -> bool {
        now < self.since + IN_FLIGHT_TIMEOUT
    }
}

/// Peers tracked for one blob: a fixed fraction of the members, within these bounds. Larger: more memory for
/// each blob. Smaller: in a larger cluster requesters are redirected to busier holders.
const MAX_TRACKED_PEERS: RangeInclusive<usize> = 512..=2048;
const MEMBERS_PER_TRACKED_PEER: usize = 4;

/// In-flight ranges remembered of one peer: more than any peer downloads at a time. Larger: more memory. Smaller:
/// redirects miss peers that are about to have a range.
const MAX_IN_FLIGHT: usize = 16;

/// How long a range counts as in flight. Longer: requesters are redirected to peers that never got it. Shorter:
/// requesters are not redirected to peers that still download, and load this node.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_secs(15);

/// Loads are compared in steps of this many bodies: a fixed fraction of the members, within these bounds. Peers
/// download 4 ranges at a time. If each sent as many, a thousand simultaneous requesters would form a chain, in which
/// each byte reaches the last one after a thousand hops. With 6 they form a tree that grows by half with each hop.
/// Larger: the first peers share their network cards among too many. Small clusters are faster if all peers send
/// equally much.
const LOAD_STEP: RangeInclusive<u32> = 2..=6;
const MEMBERS_PER_LOAD_STEP: usize = 16;

/// A peer that downloads this many times slower than the mean also sends slowly, and is named and used last. Larger:
/// slow peers slow others. Smaller: ordinary peers are passed over.
const SLOW_FACTOR: f64 = 4.0;
/// Reports that the mean rate is taken over, about. Larger: it follows changes slowly. Smaller: it fluctuates.
const MAX_REPORTS: u32 = 64;

impl Tracker {
    /// The tracker in a cluster of `members` peers.
    pub fn new(members: usize) -> Self {
        let max_peers =
            (members / MEMBERS_PER_TRACKED_PEER).clamp(*MAX_TRACKED_PEERS.start(), *MAX_TRACKED_PEERS.end());
        let load_step = u32::try_from(members / MEMBERS_PER_LOAD_STEP)
            .unwrap_or(u32::MAX)
            .clamp(*LOAD_STEP.start(), *LOAD_STEP.end());
        Self { peers: HashMap::new(), max_peers, load_step, times_named: 0, mean_rate: 0.0, reports: 0 }
    }

    /// The most peers that it tracks.
    pub fn max_peers(&self) -> u32 {
        u32::try_from(self.max_peers).unwrap_or(u32::MAX)
    }

    /// Records what a requester reports to have.
    pub fn record(&mut self, peer: SocketAddr, have: &Spans, load: u32, now: Time) {
        if !self.peers.contains_key(&peer) && self.peers.len() >= self.max_peers {
            let oldest =
                self.peers.iter().min_by_key(|(peer, tracked)| (tracked.last_seen, **peer)).map(|(peer, _)| *peer);
            oldest.map(|oldest| self.peers.remove(&oldest));
        }
        let tracked = self.peers.entry(peer).or_default();
        tracked.in_flight.retain(|range| range.is_in_flight(now));
        // Reports may overtake each other, so an older one must not remove bytes.
        have.iter().for_each(|span| tracked.have.insert(span));
        if tracked.have.iter().count() > MAX_SPANS {
            tracked.have = have.clone();
        }
        tracked.load = load;
        tracked.last_seen = now;
        if let Some(rate) = tracked.update_rate(now) {
            self.reports = (self.reports + 1).min(MAX_REPORTS);
            self.mean_rate += (rate - self.mean_rate) / f64::from(self.reports);
        }
    }

    /// Whether a peer's requests report what it has: it has some bytes, or is downloading the first. A peer that got
    /// nothing from this node may have it from another one by now.
    pub fn reports_have(&self, peer: &SocketAddr, now: Time) -> bool {
        let gets_some = |tracked: &Tracked| tracked.in_flight.iter().any(|range| range.is_in_flight(now));
        self.peers.get(peer).is_some_and(|tracked| !tracked.have.is_empty() || gets_some(tracked))
    }

    /// Forgets a peer, so that it is not named any more.
    pub fn forget(&mut self, peer: &SocketAddr) {
        self.peers.remove(peer);
    }

    /// Decides whether this node serves a range, or which other holder does. `best_source` is the better source of the
    /// range's first byte; `sending` is the number of bodies that this node is sending.
    pub fn decide(
        &mut self,
        requester: Option<SocketAddr>,
        span: Span,
        best_source: BestSource,
        sending: u32,
        now: Time,
    ) -> PeerDecision {
        let (has, mean_rate, load_step) = (self.bytes_of(requester), self.mean_rate, self.load_step);
        // Peers behind the requester may wait for it: only a peer nearer to this node may be its source.
        let requester_hops =
            requester.and_then(|requester| self.peers.get(&requester)?.in_flight_hops(span.start)).unwrap_or(u32::MAX);
        let able = self.peers.iter_mut().filter(|(peer, tracked)| {
            let is_slow = best_source == BestSource::ThisNode && tracked.is_slow(has, mean_rate);
            let may_be_source = Some(**peer) != requester && tracked.hops_to(span) < requester_hops;
            may_be_source && tracked.has_or_downloads(span.start, now) && !is_slow
        });
        let best = able.min_by_key(|(peer, tracked)| {
            let serves_another = tracked.last_redirect_start.is_some_and(|start| start != span.start);
            let nearest = (tracked.load / load_step, serves_another, tracked.hops_to(span), tracked.load);
            (tracked.is_slow(has, mean_rate), nearest, **peer)
        });
        let (decision, hops, until) = match best {
            Some((peer, tracked))
                if tracked.load / load_step < sending / load_step || best_source == BestSource::OtherHolder =>
            {
                tracked.load = tracked.load.saturating_add(1);
                tracked.last_redirect_start = Some(span.start);
                (PeerDecision::Redirect(*peer), tracked.hops_to(span) + 1, tracked.downloaded_until(span.start, now))
            }
            _ => (PeerDecision::Serve, 1, span.end),
        };
        if let Some(requester) = requester.and_then(|requester| self.peers.get_mut(&requester)) {
            (requester.hops, requester.until) = (hops, until);
        }
        decision
    }

    /// Records that the requester gets this span now, from this node or from the redirect's target.
    pub fn record_in_flight(&mut self, requester: Option<SocketAddr>, span: Span, now: Time) {
        if let Some(tracked) = requester.and_then(|requester| self.peers.get_mut(&requester)) {
            tracked.in_flight.truncate(MAX_IN_FLIGHT - 1);
            // Beyond what its source gets, that source may request the rest itself, and must not be redirected to this
            // peer.
            let span = Span { start: span.start, end: span.end.min(tracked.until).max(span.start) };
            tracked.in_flight.insert(0, RangeInFlight { span, since: now, hops: tracked.hops });
        }
    }

    /// Whether a requester has all of this span.
    pub fn is_at_a_peer(&self, span: Span) -> bool {
        self.peers.values().any(|tracked| tracked.have.run_end(span.start) >= span.end)
    }

    /// Records a peer as the deputy for a span.
    pub fn depute(&mut self, peer: SocketAddr, span: Span) {
        if let Some(tracked) = self.peers.get_mut(&peer) {
            tracked.deputed.insert(span);
        }
    }

    /// Records that a deputy failed, from `at` on.
    pub fn fail_as_deputy(&mut self, peer: SocketAddr, at: u64) {
        if let Some(tracked) = self.peers.get_mut(&peer) {
            let failed = Span { start: at, end: tracked.deputed.run_end(at) };
            tracked.deputed.remove(failed);
        }
    }

    /// Whether a peer other than the requester has the byte at `at`, or downloads it as a deputy.
    pub fn another_peer_has(&self, requester: SocketAddr, at: u64) -> bool {
        self.peers.iter().any(|(peer, tracked)| *peer != requester && tracked.has_or_is_deputy(at))
    }

    /// The least loaded peers that have the byte at `at`, or download it as deputies.
    pub fn holders_of_byte(&self, at: u64) -> Vec<Holder> {
        let mut able: Vec<_> = self.peers.iter().filter(|(_, tracked)| tracked.has_or_is_deputy(at)).collect();
        able.sort_by_key(|(peer, tracked)| (tracked.load, **peer));
        let holder = |(peer, tracked): (&SocketAddr, &Tracked)| {
            let mut have = tracked.have.clone();
            tracked.deputed.iter().for_each(|span| have.insert(span));
            Holder { peer: *peer, load: tracked.load, have }
        };
        able.into_iter().take(MAX_HOLDERS).map(holder).collect()
    }

    /// How many bytes the requester has.
    fn bytes_of(&self, requester: Option<SocketAddr>) -> u64 {
        requester.and_then(|requester| self.peers.get(&requester)).map_or(0, |requester| requester.have.len())
    }

    /// Other holders for the requester: the least loaded first, but slow ones last.
    pub fn holders(&mut self, requester: Option<SocketAddr>) -> Vec<Holder> {
        self.times_named += 1;
        let lot = self.times_named;
        let has = self.bytes_of(requester);
        let mut others: Vec<_> =
            self.peers.iter().filter(|(peer, tracked)| Some(**peer) != requester && !tracked.have.is_empty()).collect();
        let rank = |(peer, tracked): &(&SocketAddr, &Tracked)| {
            (tracked.is_slow(has, self.mean_rate), tracked.load, scatter(**peer, lot))
        };
        // Only the few that are named need an order.
        if others.len() > MAX_HOLDERS {
            others.select_nth_unstable_by_key(MAX_HOLDERS, rank);
            others.truncate(MAX_HOLDERS);
        }
        others.sort_unstable_by_key(rank);
        let holder = |(peer, tracked): (&SocketAddr, &Tracked)| Holder {
            peer: *peer,
            load: tracked.load,
            have: tracked.have.clone(),
        };
        others.into_iter().take(MAX_HOLDERS).map(holder).collect()
    }
}

impl Tracked {
    /// Updates its download rate.
    fn update_rate(&mut self, now: Time) -> Option<f64> {
        let has = self.have.len();
        let (since, had) = *self.since.get_or_insert((now, has));
        let elapsed = now.saturating_sub(since);
        if elapsed >= TICK {
            #[allow(clippy::cast_precision_loss, reason = "a rate")]
            let got = has.saturating_sub(had) as f64;
            self.rate = Some(got / elapsed.as_secs_f64());
        }
        self.rate
    }

    /// Whether it is far behind a requester that has `has` bytes, or behind the mean rate.
    fn is_slow(&self, has: u64, mean_rate: f64) -> bool {
        is_slow(&self.have, has) || self.rate.is_some_and(|rate| rate * SLOW_FACTOR < mean_rate)
    }

    /// Whether it has this byte, or downloads it as a deputy.
    fn has_or_is_deputy(&self, at: u64) -> bool {
        self.have.run_end(at) > at || self.deputed.run_end(at) > at
    }

    /// Whether it has this byte, or is downloading it.
    fn has_or_downloads(&self, at: u64, now: Time) -> bool {
        self.downloaded_until(at, now) > at
    }

    /// The end of what it has from `at` on, or is downloading.
    fn downloaded_until(&self, at: u64, now: Time) -> u64 {
        let in_flight = self.in_flight.iter().filter(|range| range.span.contains(at) && range.is_in_flight(now));
        in_flight.map(|range| range.span.end).fold(self.have.run_end(at), u64::max)
    }

    /// The hops of a range from this node to it: none if it has the range.
    fn hops_to(&self, span: Span) -> u32 {
        if self.have.run_end(span.start) >= span.end {
            return 0;
        }
        self.in_flight_hops(span.start).unwrap_or(0)
    }

    /// The hops of a byte that it is downloading.
    fn in_flight_hops(&self, at: u64) -> Option<u32> {
        self.in_flight.iter().find(|range| range.span.contains(at)).map(|range| range.hops)
    }
}
