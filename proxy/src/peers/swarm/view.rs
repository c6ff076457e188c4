//! What whoever fetches knows of those who have it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Contribution, MAX_SPANS, Time, is_slow, scatter};
use crate::oci::{Span, Spans};
use crate::peers::ring;
use crate::peers::wire::Holder;

/// One fetching node's knowledge of who has a blob.
pub struct View {
    pub(super) peers: HashMap<SocketAddr, KnownHolder>,
    pub(super) most: usize,
    contributions: Vec<Contribution>,
}

#[derive(Default)]
pub(super) struct KnownHolder {
    pub(super) have: Spans,
    load: u32,
    /// Ranges that this node fetches from it.
    in_flight: u32,
    not_before: Time,
    /// It is far too slow: the next owner is better asked.
    crawls_until: Time,
}

/// Peers that are known of one blob, one of so many members: in a large cluster each hears of few.
const KNOWN: RangeInclusive<usize> = 32..=64;
const OF_KNOWN: usize = 156;

/// Ranges of which is known who sent them.
const MAX_CONTRIBUTIONS: usize = 4096;

/// A peer that could not help is not asked again for this long.
const REFUSED: Duration = Duration::from_millis(250);

/// A peer that broke, for this long.
const BROKE: Duration = Duration::from_secs(5);

/// One that has it whole and hardly sends it, for this long.
const CRAWLED: Duration = Duration::from_secs(300);

/// Of so many ranges one is asked for before anybody gets it.
const EAGER: u64 = 4;

impl KnownHolder {
    fn is_able(&self, at: u64, now: Time) -> bool {
        now >= self.not_before && now >= self.crawls_until && self.have.run_end(at) > at
    }
}

impl View {
    /// In a cluster of so many.
    pub fn new(members: usize) -> Self {
        let most = (members / OF_KNOWN).clamp(*KNOWN.start(), *KNOWN.end());
        Self { peers: HashMap::new(), most, contributions: Vec::new() }
    }

    /// Somebody has these bytes.
    pub fn learn(&mut self, holder: &Holder) {
        if self.peers.len() >= self.most && !self.peers.contains_key(&holder.peer) {
            let idle = |(_, known): &(&SocketAddr, &KnownHolder)| known.in_flight == 0;
            let least = self.peers.iter().filter(idle).min_by_key(|(peer, known)| (known.have.len(), **peer));
            let Some(least) = least.map(|(peer, _)| *peer) else { return };
            self.peers.remove(&least);
        }
        let known = self.peers.entry(holder.peer).or_default();
        known.load = holder.load;
        // Nobody loses bytes: an older word adds nothing, and takes nothing away.
        holder.have.iter().for_each(|span| known.have.insert(span));
        if known.have.iter().count() > MAX_SPANS {
            known.have = holder.have.clone();
        }
    }

    /// The least loaded that has the byte at `at`, the slow last, for a node that `has` so many; of equals the
    /// one that `lot` falls on.
    pub fn pick(&self, at: u64, has: u64, now: Time, lot: u64) -> Option<SocketAddr> {
        let able = self.peers.iter().filter(|(_, known)| known.is_able(at, now));
        let rank = |(peer, known): &(&SocketAddr, &KnownHolder)| {
            (is_slow(&known.have, has), known.load.saturating_add(known.in_flight), scatter(**peer, lot))
        };
        able.min_by_key(rank).map(|(peer, _)| *peer)
    }

    /// How many could be asked for the byte at `at` by a node that `has` so many, the slow left out.
    pub fn able(&self, at: u64, has: u64, now: Time) -> usize {
        self.peers.values().filter(|known| known.is_able(at, now) && !is_slow(&known.have, has)).count()
    }

    /// Which range to fetch next: one that somebody has whole, the rarest first, so that what this node
    /// has differs from what others have; otherwise one that somebody is getting; otherwise the first. Now and
    /// then the first that nobody has comes before those that somebody is getting, maybe slowly: else all would
    /// wait for the same few, and nobody would bring others.
    pub fn choose(&self, ranges: &[Span], lot: u64) -> Option<usize> {
        let (getting, nobody) = if lot.is_multiple_of(EAGER) { (2, 1) } else { (1, 2) };
        let rarity = |span: &Span| {
            let ends = self.peers.values().map(|known| known.have.run_end(span.start));
            let (whole, some) = ends.fold((0u32, 0u32), |(whole, some), end| {
                (whole + u32::from(end >= span.end), some + u32::from(end > span.start))
            });
            match (whole, some) {
                (0, 0) => (nobody, 0),
                (0, _) => (getting, 0),
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

    /// Asks a peer for a range.
    pub fn begin(&mut self, peer: SocketAddr) {
        self.peers.entry(peer).or_default().in_flight += 1;
    }

    /// The range came, or as much of it as did.
    pub fn end(&mut self, contribution: Contribution) {
        if let Some(known) = self.peers.get_mut(&contribution.peer) {
            known.in_flight = known.in_flight.saturating_sub(1);
        }
        // What it said of the length is one as well.
        let is_new = || self.contributions.iter().all(|known| known.peer != contribution.peer);
        let counts = !contribution.span.is_empty() || is_new();
        if counts && self.contributions.len() < MAX_CONTRIBUTIONS {
            self.contributions.push(contribution);
        }
    }

    /// Who sent what so far.
    pub fn contributions(&self) -> &[Contribution] {
        &self.contributions
    }

    /// It could not help just now.
    pub fn refused(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().not_before = now + REFUSED;
    }

    /// It broke off, or was left: others come first for a while.
    pub fn left(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().not_before = now + BROKE;
    }

    /// It hardly sent what it has: others are asked, also where it is the owner.
    pub fn crawled(&mut self, peer: SocketAddr, now: Time) {
        self.peers.entry(peer).or_default().crawls_until = now + CRAWLED;
    }

    /// Nobody else has it: better slowly than not at all.
    pub fn forgive(&mut self) {
        self.peers.values_mut().for_each(|known| known.crawls_until = Time::ZERO);
    }

    /// Whether it is left alone for that.
    pub fn crawls(&self, peer: SocketAddr, now: Time) -> bool {
        self.peers.get(&peer).is_some_and(|known| now < known.crawls_until)
    }

    /// It is not there, or gives nothing.
    pub fn broke(&mut self, peer: SocketAddr, now: Time) {
        let known = self.peers.entry(peer).or_default();
        known.not_before = now + BROKE;
        known.have = Spans::default();
    }
}
