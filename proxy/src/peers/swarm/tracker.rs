//! What whoever is asked remembers of those who ask.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{BestSource, MAX_SPANS, PeerDecision, Time, is_slow, scatter};
use crate::oci::{Span, Spans};
use crate::peers::wire::{Holder, MAX_HOLDERS};
use crate::times::TICK;

/// One node's knowledge of who fetches a blob from it.
pub struct Tracker {
    pub(super) peers: HashMap<SocketAddr, Tracked>,
    pub(super) most: usize,
    fan: u32,
    /// How often others were told of.
    told: u64,
    /// How fast most of them get it, in bytes a second, and of how many reports that is known.
    typical: f64,
    reports: u32,
}

#[derive(Default)]
pub(super) struct Tracked {
    pub(super) have: Spans,
    /// What is on its way to it.
    coming: Vec<RangeInFlight>,
    /// Through how many nodes what it asked for last reaches it from here, and how far.
    hops: u32,
    until: u64,
    /// Where the range begins for which others were last sent to it.
    serves: Option<u64>,
    /// What it fetches from the origin in this node's stead, or has fetched.
    deputed: Spans,
    /// Bodies that it sends, and those sent to it for since it said so.
    load: u32,
    /// When it first said what it has, and how much.
    since: Option<(Time, u64)>,
    /// How fast it has got it since, in bytes a second. None: nobody can say yet.
    rate: Option<f64>,
    seen: Time,
}

/// A range on its way to somebody.
struct RangeInFlight {
    span: Span,
    since: Time,
    hops: u32,
}

impl RangeInFlight {
    /// Whether it is still believed to arrive.
    fn arrives(&self, now: Time) -> bool {
        now < self.since + ARRIVES
    }
}

/// Peers that are remembered for one blob, one of so many members. With more each goes to somebody less busy in a large
/// cluster; in one of a thousand the same few are heard of too long.
const TRACKED: RangeInclusive<usize> = 512..=2048;
const OF_TRACKED: usize = 4;

/// Ranges on their way to one peer: as many as anybody fetches at a time, and some.
const MAX_COMING: usize = 16;

/// What was sent to somebody is believed to arrive for this long.
const ARRIVES: Duration = Duration::from_secs(15);

/// Bodies that somebody sends are counted by so many, of one in so many members: if each sent as many as it fetches, a
/// thousand who ask at once would be a chain, at whose end each byte comes a thousand hops late. Half as many more as
/// anybody fetches at a time make them a tree, which grows by half with each hop; still more, and the first ones share
/// their cards among too many. A few are better off if all send equally much.
const FAN: RangeInclusive<u32> = 2..=6;
const OF_FAN: usize = 16;

/// Who gets a blob so many times slower than most sends it as slowly, and is named and asked last.
const FAR: f64 = 4.0;
/// What is typical is so of the last reports, about so many.
const REPORTS: u32 = 64;

impl Tracker {
    /// In a cluster of so many.
    pub fn new(members: usize) -> Self {
        let most = (members / OF_TRACKED).clamp(*TRACKED.start(), *TRACKED.end());
        let fan = u32::try_from(members / OF_FAN).unwrap_or(u32::MAX).clamp(*FAN.start(), *FAN.end());
        Self { peers: HashMap::new(), most, fan, told: 0, typical: 0.0, reports: 0 }
    }

    /// How many peers it remembers at most.
    pub fn most(&self) -> u32 {
        u32::try_from(self.most).unwrap_or(u32::MAX)
    }

    /// A peer said what it has, by asking.
    pub fn heard(&mut self, peer: SocketAddr, have: &Spans, load: u32, now: Time) {
        if !self.peers.contains_key(&peer) && self.peers.len() >= self.most {
            let oldest = self.peers.iter().min_by_key(|(peer, tracked)| (tracked.seen, **peer)).map(|(peer, _)| *peer);
            oldest.map(|oldest| self.peers.remove(&oldest));
        }
        let tracked = self.peers.entry(peer).or_default();
        tracked.coming.retain(|coming| coming.arrives(now));
        // What it has said before it has still: reports may overtake each other.
        have.iter().for_each(|span| tracked.have.insert(span));
        if tracked.have.iter().count() > MAX_SPANS {
            tracked.have = have.clone();
        }
        tracked.load = load;
        tracked.seen = now;
        if let Some(rate) = tracked.rate_at(now) {
            self.reports = (self.reports + 1).min(REPORTS);
            self.typical += (rate - self.typical) / f64::from(self.reports);
        }
    }

    /// Whether a peer's requests say what it has: it has some, or gets the first of it now. One that got nothing here may have
    /// it from elsewhere by now.
    pub fn is_told_by(&self, peer: &SocketAddr, now: Time) -> bool {
        let gets_some = |tracked: &Tracked| tracked.coming.iter().any(|coming| coming.arrives(now));
        self.peers.get(peer).is_some_and(|tracked| !tracked.have.is_empty() || gets_some(tracked))
    }

    /// Names it to nobody any more.
    pub fn forget(&mut self, peer: &SocketAddr) {
        self.peers.remove(peer);
    }

    /// Whether to answer for a range, the first byte of which `comes` from there, or who else could. `sending`
    /// are the bodies that this node sends already.
    pub fn direct(
        &mut self,
        asker: Option<SocketAddr>,
        span: Span,
        comes: BestSource,
        sending: u32,
        now: Time,
    ) -> PeerDecision {
        let (has, typical, fan) = (self.has(asker), self.typical, self.fan);
        // Whoever asks again may be who those behind it wait for.
        let before = asker.and_then(|asker| self.peers.get(&asker)?.comes_by(span.start)).unwrap_or(u32::MAX);
        let able = self.peers.iter_mut().filter(|(peer, tracked)| {
            let is_slow = comes == BestSource::Here && tracked.is_slow(has, typical);
            let may_be_asked = Some(**peer) != asker && tracked.hops_to(span) < before;
            may_be_asked && tracked.gets(span.start, now) && !is_slow
        });
        let best = able.min_by_key(|(peer, tracked)| {
            let serves_another = tracked.serves.is_some_and(|start| start != span.start);
            let nearest = (tracked.load / fan, serves_another, tracked.hops_to(span), tracked.load);
            (tracked.is_slow(has, typical), nearest, **peer)
        });
        let (direction, hops, until) = match best {
            Some((peer, tracked)) if tracked.load / fan < sending / fan || comes == BestSource::Elsewhere => {
                tracked.load = tracked.load.saturating_add(1);
                tracked.serves = Some(span.start);
                (PeerDecision::Redirect(*peer), tracked.hops_to(span) + 1, tracked.gets_until(span.start, now))
            }
            _ => (PeerDecision::Answer, 1, span.end),
        };
        if let Some(asker) = asker.and_then(|asker| self.peers.get_mut(&asker)) {
            (asker.hops, asker.until) = (hops, until);
        }
        direction
    }

    /// Whoever asked for this gets it now, from here or from whom it was sent to.
    pub fn expect(&mut self, asker: Option<SocketAddr>, span: Span, now: Time) {
        if let Some(tracked) = asker.and_then(|asker| self.peers.get_mut(&asker)) {
            tracked.coming.truncate(MAX_COMING - 1);
            // Beyond what its source gets it may be that one's to find another: it must not be sent here.
            let span = Span { start: span.start, end: span.end.min(tracked.until).max(span.start) };
            tracked.coming.insert(0, RangeInFlight { span, since: now, hops: tracked.hops });
        }
    }

    /// Whether somebody has all of this.
    pub fn is_elsewhere(&self, span: Span) -> bool {
        self.peers.values().any(|tracked| tracked.have.run_end(span.start) >= span.end)
    }

    /// A peer fetches this from the origin in this node's stead.
    pub fn depute(&mut self, peer: SocketAddr, span: Span) {
        if let Some(tracked) = self.peers.get_mut(&peer) {
            tracked.deputed.insert(span);
        }
    }

    /// It does not after all.
    pub fn fail_as_deputy(&mut self, peer: SocketAddr, at: u64) {
        if let Some(tracked) = self.peers.get_mut(&peer) {
            let failed = Span { start: at, end: tracked.deputed.run_end(at) };
            tracked.deputed.remove(failed);
        }
    }

    /// Whether another than whoever asks has the byte at `at`, or gets it from the origin.
    pub fn another_has(&self, asker: SocketAddr, at: u64) -> bool {
        self.peers.iter().any(|(peer, tracked)| *peer != asker && tracked.brings(at))
    }

    /// Some of those who have the byte at `at`, or get it from the origin: the least loaded.
    pub fn who_has(&self, at: u64) -> Vec<Holder> {
        let mut able: Vec<_> = self.peers.iter().filter(|(_, tracked)| tracked.brings(at)).collect();
        able.sort_by_key(|(peer, tracked)| (tracked.load, **peer));
        let holder = |(peer, tracked): (&SocketAddr, &Tracked)| {
            let mut have = tracked.have.clone();
            tracked.deputed.iter().for_each(|span| have.insert(span));
            Holder { peer: *peer, load: tracked.load, have }
        };
        able.into_iter().take(MAX_HOLDERS).map(holder).collect()
    }

    /// How many bytes whoever asks has.
    fn has(&self, asker: Option<SocketAddr>) -> u64 {
        asker.and_then(|asker| self.peers.get(&asker)).map_or(0, |asker| asker.have.len())
    }

    /// Those that whoever asks may ask as well: the least loaded first, but the slow last.
    pub fn holders(&mut self, asker: Option<SocketAddr>) -> Vec<Holder> {
        self.told += 1;
        let lot = self.told;
        let has = self.has(asker);
        let mut others: Vec<_> =
            self.peers.iter().filter(|(peer, tracked)| Some(**peer) != asker && !tracked.have.is_empty()).collect();
        let rank = |(peer, tracked): &(&SocketAddr, &Tracked)| {
            (tracked.is_slow(has, self.typical), tracked.load, scatter(**peer, lot))
        };
        // Few of many: the others need no order.
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
    /// Judges it by what it has by now.
    fn rate_at(&mut self, now: Time) -> Option<f64> {
        let has = self.have.len();
        let (since, had) = *self.since.get_or_insert((now, has));
        let took = now.saturating_sub(since);
        if took >= TICK {
            #[allow(clippy::cast_precision_loss, reason = "a rate")]
            let got = has.saturating_sub(had) as f64;
            self.rate = Some(got / took.as_secs_f64());
        }
        self.rate
    }

    /// Whether it is left far behind by one that has so many bytes, or by most.
    fn is_slow(&self, has: u64, typical: f64) -> bool {
        is_slow(&self.have, has) || self.rate.is_some_and(|rate| rate * FAR < typical)
    }

    fn brings(&self, at: u64) -> bool {
        self.have.run_end(at) > at || self.deputed.run_end(at) > at
    }

    /// Whether it has this byte, or gets it now.
    fn gets(&self, at: u64, now: Time) -> bool {
        self.gets_until(at, now) > at
    }

    /// The end of what it has from there, or gets now.
    fn gets_until(&self, at: u64, now: Time) -> u64 {
        let coming = self.coming.iter().filter(|coming| coming.span.contains(at) && coming.arrives(now));
        coming.map(|coming| coming.span.end).fold(self.have.run_end(at), u64::max)
    }

    /// Through how many nodes a range reaches it from here: none if it has it.
    fn hops_to(&self, span: Span) -> u32 {
        if self.have.run_end(span.start) >= span.end {
            return 0;
        }
        self.comes_by(span.start).unwrap_or(0)
    }

    /// The same of a byte that is on its way.
    fn comes_by(&self, at: u64) -> Option<u32> {
        self.coming.iter().find(|coming| coming.span.contains(at)).map(|coming| coming.hops)
    }
}
