//! What a downloading node knows of the holders of a blob.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Contribution, MAX_SPANS, Time, is_slow, scatter};
use crate::oci::{Span, Spans};
use crate::peers::ring;
use crate::peers::wire::Holder;

/// The holders of one blob, as one downloading node knows them.
pub struct View {
    pub(super) peers: HashMap<SocketAddr, KnownHolder>,
    pub(super) max_holders: usize,
    contributions: Vec<Contribution>,
}

#[derive(Default)]
pub(super) struct KnownHolder {
    pub(super) have: Spans,
    load: u32,
    /// Number of ranges that this node is downloading from it.
    in_flight: u32,
    /// It did not have a range, or failed: not picked before this time.
    not_before: Time,
    /// It was far too slow: not picked before this time, not even as the owner.
    too_slow_until: Time,
}

/// Holders known of one blob: a fixed fraction of the members, within these bounds. Larger: more memory and longer
/// choices. Smaller: in a large cluster, downloads crowd on few holders.
const MAX_KNOWN_HOLDERS: RangeInclusive<usize> = 32..=64;
const MEMBERS_PER_KNOWN_HOLDER: usize = 156;

/// Ranges whose sender is remembered. Larger: more memory. Smaller: in a very large corrupt blob the peer at fault goes
/// undetected.
const MAX_CONTRIBUTIONS: usize = 4096;

/// How long a peer that did not have a range is not picked. Longer: new holders are used late. Shorter: useless
/// requests.
const REFUSED_PAUSE: Duration = Duration::from_millis(250);

/// How long a peer that failed is not picked. Longer: a lost connection costs a good holder. Shorter: more failed
/// requests.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

/// How long a peer that has the whole blob, but hardly sends it, is not used for this blob. Longer: it stays unused
/// after it recovers. Shorter: the download stalls on it repeatedly.
const TOO_SLOW_PAUSE: Duration = Duration::from_secs(300);

/// One in this many choices prefers a range that no peer has. Larger: all nodes wait for the same few ranges. Smaller:
/// more ranges come from the owner instead of from peers.
const UNHELD_FIRST_INTERVAL: u64 = 4;

impl KnownHolder {
    fn is_able(&self, at: u64, now: Time) -> bool {
        now >= self.not_before && now >= self.too_slow_until && self.have.run_end(at) > at
    }
}

impl View {
    /// The view in a cluster of `members` peers.
    pub fn new(members: usize) -> Self {
        let max_holders =
            (members / MEMBERS_PER_KNOWN_HOLDER).clamp(*MAX_KNOWN_HOLDERS.start(), *MAX_KNOWN_HOLDERS.end());
        Self { peers: HashMap::new(), max_holders, contributions: Vec::new() }
    }

    /// Records what a holder has.
    pub fn learn(&mut self, holder: &Holder) {
        if self.peers.len() >= self.max_holders && !self.peers.contains_key(&holder.peer) {
            let idle = |(_, known): &(&SocketAddr, &KnownHolder)| known.in_flight == 0;
            let least = self.peers.iter().filter(idle).min_by_key(|(peer, known)| (known.have.len(), **peer));
            let Some(least) = least.map(|(peer, _)| *peer) else { return };
            self.peers.remove(&least);
        }
        let known = self.peers.entry(holder.peer).or_default();
        known.load = holder.load;
        // A peer loses no bytes while it downloads, so an older report that comes late changes nothing.
        holder.have.iter().for_each(|span| known.have.insert(span));
        if known.have.iter().count() > MAX_SPANS {
            known.have = holder.have.clone();
        }
    }

    /// The least loaded holder of the byte at `at`, slow ones last, for a node that has `has` bytes. `lot` decides
    /// among equals.
    pub fn pick(&self, at: u64, has: u64, now: Time, lot: u64) -> Option<SocketAddr> {
        let able = self.peers.iter().filter(|(_, known)| known.is_able(at, now));
        let rank = |(peer, known): &(&SocketAddr, &KnownHolder)| {
            (is_slow(&known.have, has), known.load.saturating_add(known.in_flight), scatter(**peer, lot))
        };
        able.min_by_key(rank).map(|(peer, _)| *peer)
    }

    /// How many holders can serve the byte at `at` to a node that has `has` bytes, without slow ones.
    pub fn able(&self, at: u64, has: u64, now: Time) -> usize {
        self.peers.values().filter(|known| known.is_able(at, now) && !is_slow(&known.have, has)).count()
    }

    /// The range to download next, in this order:
    ///
    /// 1. a range that a peer has whole, the rarest first, so that this node has what others lack;
    /// 2. the first range that a peer is downloading;
    /// 3. the first range that no peer has.
    ///
    /// One in `UNHELD_FIRST_INTERVAL` choices swaps 2 and 3: otherwise all nodes wait for the same few ranges, which
    /// may come slowly, and no node brings others.
    pub fn choose(&self, ranges: &[Span], lot: u64) -> Option<usize> {
        let (in_flight, unheld) = if lot.is_multiple_of(UNHELD_FIRST_INTERVAL) { (2, 1) } else { (1, 2) };
        let rarity = |span: &Span| {
            let ends = self.peers.values().map(|known| known.have.run_end(span.start));
            let (whole, some) = ends.fold((0u32, 0u32), |(whole, some), end| {
                (whole + u32::from(end >= span.end), some + u32::from(end > span.start))
            });
            match (whole, some) {
                (0, 0) => (unheld, 0),
                (0, _) => (in_flight, 0),
                _ => (0, whole),
            }
        };
        let scattered = |nth: usize, class: u32| if class == 0 { ring::splitmix(nth as u64 ^ lot) } else { nth as u64 };
        let rated = ranges.iter().enumerate().map(|(nth, span)| {
            let (class, holders) = rarity(span);
            ((class, holders, scattered(nth, class)), nth)
        });
        rated.min().map(|(_, nth)| nth)
    }

    /// Records that a download from a peer begins.
    pub fn begin(&mut self, peer: SocketAddr) {
        self.peers.entry(peer).or_default().in_flight += 1;
    }

    /// Records the end of a download, and what it brought.
    pub fn end(&mut self, contribution: Contribution) {
        if let Some(known) = self.peers.get_mut(&contribution.peer) {
            known.in_flight = known.in_flight.saturating_sub(1);
        }
        // The length that a peer reported is a contribution even without bytes: it may be wrong.
        let is_new = || self.contributions.iter().all(|known| known.peer != contribution.peer);
        let counts = !contribution.span.is_empty() || is_new();
        if counts && self.contributions.len() < MAX_CONTRIBUTIONS {
            self.contributions.push(contribution);
        }
    }

    /// What each peer has sent so far.
    pub fn contributions(&self) -> &[Contribution] {
        &self.contributions
    }

    /// Records that a peer does not have a range.
    pub fn mark_refused(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().not_before = now + REFUSED_PAUSE;
    }

    /// Records that a download ended early: other peers come first for a while.
    pub fn mark_interrupted(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().not_before = now + FAILED_PAUSE;
    }

    /// Records that a peer hardly sends what it has: it is not used for a while, not even as the owner.
    pub fn mark_too_slow(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().too_slow_until = now + TOO_SLOW_PAUSE;
    }

    /// Allows the peers that were too slow again, where no other source is left.
    pub fn forgive(&mut self) {
        self.peers.values_mut().for_each(|known| known.too_slow_until = Time::ZERO);
    }

    /// Whether a peer was too slow a short time ago.
    pub fn is_too_slow(&self, peer: SocketAddr, now: Time) -> bool {
        self.peers.get(&peer).is_some_and(|known| now < known.too_slow_until)
    }

    /// Records that a peer failed: what it has is forgotten until it reports again.
    pub fn mark_failed(&mut self, peer: SocketAddr, now: Time) {
        let known = self.peers.entry(peer).or_default();
        known.not_before = now + FAILED_PAUSE;
        known.have = Spans::default();
    }
}
