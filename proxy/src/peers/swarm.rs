//! Who has which bytes of a blob: pure decisions, for real nodes and simulated ones.
//!
//! A [`Tracker`] is kept by whoever is asked: it remembers what those who ask have, tells others of
//! them, and sends a question on once others can answer it as well as itself. A [`View`] is kept by
//! whoever fetches: it knows what the answers told, and picks for each range the least loaded that is
//! ahead. Both are hints. Whoever is asked for what it does not have says so, and a digest proves
//! what came.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::wire::{Holder, MAX_HOLDERS};
use crate::oci::{Span, Spans};

/// Peers that a tracker remembers for one blob, and that a view does. With more each goes to somebody less busy in a
/// large cluster, where it hears of few; in one of a thousand the same few are heard of too long.
const TRACKED: RangeInclusive<usize> = 512..=2048;
const KNOWN: RangeInclusive<usize> = 32..=64;
/// One is remembered of so many members.
const OF_TRACKED: usize = 4;
const OF_KNOWN: usize = 156;

/// Ranges on their way to one peer: as many as anybody fetches at a time, and some.
const MAX_COMING: usize = 16;

/// Pieces that a peer's part of a blob may be in: of more only the last word counts.
const MAX_SPANS: usize = 256;

/// Ranges of which is known who sent them.
const MAX_CONTRIBUTIONS: usize = 4096;

/// What was sent to somebody is believed to arrive for this long.
const ARRIVES: Duration = Duration::from_secs(15);

/// A peer that could not help is not asked again for this long.
const REFUSED: Duration = Duration::from_millis(250);

/// A peer that broke, for this long.
const BROKE: Duration = Duration::from_secs(5);

/// One that has it whole and hardly sends it, for this long.
const CRAWLED: Duration = Duration::from_secs(300);

/// Who gets a blob so many times slower than most sends it as slowly, and is named and asked last.
const FAR: f64 = 4.0;
/// Before that nobody knows.
const JUDGED: Duration = Duration::from_millis(100);
/// What is typical is so of the last reports, about so many.
const REPORTS: u32 = 64;

/// Of so many ranges one is asked for before anybody gets it.
const EAGER: u64 = 4;

/// A time in any clock.
pub type Time = Duration;

/// One node's knowledge of who fetches a blob from it.
pub struct Tracker {
    peers: HashMap<SocketAddr, Tracked>,
    most: usize,
    /// How often others were told of.
    told: u64,
    /// How fast most of them get it, in bytes a second, and of how many reports that is known.
    typical: f64,
    reports: u32,
}

#[derive(Default)]
struct Tracked {
    have: Spans,
    /// What is on its way to it.
    coming: Vec<(Span, Time)>,
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

/// One fetching node's knowledge of who has a blob.
pub struct View {
    peers: HashMap<SocketAddr, Known>,
    most: usize,
    contributions: Vec<Contribution>,
}

/// What a peer sent: to be compared once the truth is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contribution {
    pub peer: SocketAddr,
    pub claim: Claim,
    /// How long it said that the whole is, in bytes.
    pub total: u64,
    pub span: Span,
    /// xxHash64 of the bytes.
    pub checksum: u64,
}

/// What a peer says of the bytes that it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// It has the whole, and has hashed it.
    Verified,
    /// They come to it at the moment: it cannot know.
    Relayed,
}

#[derive(Default)]
struct Known {
    have: Spans,
    load: u32,
    /// Ranges that this node fetches from it.
    in_flight: u32,
    not_before: Time,
    /// It is far too slow: the next owner is better asked.
    crawls_until: Time,
}

/// Where a byte had better come from that a node was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comes {
    /// From here, or from somebody who is less busy.
    Here,
    /// From whoever else has it: this node is slow, or left it to others.
    Elsewhere,
}

/// What to do with a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Answer,
    Redirect(SocketAddr),
    /// Whoever asks fetches this part of it from the origin, for all.
    Depute(Span),
}

impl Tracker {
    /// In a cluster of so many.
    pub fn new(members: usize) -> Self {
        let most = (members / OF_TRACKED).clamp(*TRACKED.start(), *TRACKED.end());
        Self { peers: HashMap::new(), most, told: 0, typical: 0.0, reports: 0 }
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
        tracked.coming.retain(|(_, since)| now < *since + ARRIVES);
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
        comes: Comes,
        sending: u32,
        now: Time,
    ) -> Direction {
        let (has, typical) = (self.has(asker), self.typical);
        let able = self.peers.iter_mut().filter(|(peer, tracked)| {
            let is_slow = comes == Comes::Here && tracked.is_slow(has, typical);
            Some(**peer) != asker && tracked.gets(span.start, now) && !is_slow
        });
        let best = able.min_by_key(|(peer, tracked)| (tracked.is_slow(has, typical), tracked.load, **peer));
        match best {
            Some((peer, tracked)) if tracked.load < sending || comes == Comes::Elsewhere => {
                tracked.load = tracked.load.saturating_add(1);
                Direction::Redirect(*peer)
            }
            _ => Direction::Answer,
        }
    }

    /// Whoever asked for this gets it now, from here or from whom it was sent to.
    pub fn expect(&mut self, asker: Option<SocketAddr>, span: Span, now: Time) {
        if let Some(tracked) = asker.and_then(|asker| self.peers.get_mut(&asker)) {
            tracked.coming.truncate(MAX_COMING - 1);
            tracked.coming.insert(0, (span, now));
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
        if took >= JUDGED {
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
        let coming = |(span, since): &(Span, Time)| span.start <= at && at < span.end && now < *since + ARRIVES;
        self.have.run_end(at) > at || self.coming.iter().any(coming)
    }
}

impl Known {
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
            let idle = |(_, known): &(&SocketAddr, &Known)| known.in_flight == 0;
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
        let rank = |(peer, known): &(&SocketAddr, &Known)| {
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
        let scattered =
            |nth: usize, class: u32| if class == 0 { super::ring::splitmix(nth as u64 ^ lot) } else { nth as u64 };
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

/// Whether somebody with these bytes is left far behind by one that has so many: it takes longer than
/// others to get them, and so to send them. What it asks for it gets, but little is asked of it.
fn is_slow(have: &Spans, has: u64) -> bool {
    have.len() < has / 2
}

/// An order of peers that differs from lot to lot.
fn scatter(peer: SocketAddr, lot: u64) -> u64 {
    let port = u64::from(peer.port());
    let address = match peer {
        SocketAddr::V4(v4) => u64::from(v4.ip().to_bits()),
        #[allow(clippy::cast_possible_truncation, reason = "any bits will do")]
        SocketAddr::V6(v6) => v6.ip().to_bits() as u64,
    };
    super::ring::splitmix(address ^ port.rotate_left(48) ^ lot)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn peer(n: u16) -> SocketAddr {
        let [high, low] = n.to_be_bytes();
        SocketAddr::from(([10, 0, high, low], 5052))
    }

    fn mib(start: u64, end: u64) -> Span {
        Span { start: start * MIB, end: end * MIB }
    }

    fn at(millis: u64) -> Time {
        Duration::from_millis(millis)
    }

    /// A question, and where whoever asks goes.
    fn direct(
        tracker: &mut Tracker,
        asker: Option<SocketAddr>,
        span: Span,
        comes: Comes,
        sending: u32,
        now: Time,
    ) -> Direction {
        let direction = tracker.direct(asker, span, comes, sending, now);
        tracker.expect(asker, span, now);
        direction
    }

    #[test]
    fn a_busy_node_sends_on_to_whoever_gets_the_bytes_now() {
        let mut tracker = Tracker::new(1);
        for n in 1..=3 {
            tracker.heard(peer(n), &Spans::default(), 0, at(0));
        }
        assert_eq!(direct(&mut tracker, Some(peer(1)), mib(0, 16), Comes::Here, 0, at(0)), Direction::Answer);
        assert_eq!(
            direct(&mut tracker, Some(peer(2)), mib(0, 16), Comes::Here, 1, at(0)),
            Direction::Redirect(peer(1))
        );
        assert_eq!(
            direct(&mut tracker, Some(peer(3)), mib(0, 16), Comes::Here, 1, at(0)),
            Direction::Redirect(peer(2)),
            "sent on itself"
        );
        assert_eq!(
            direct(&mut tracker, None, mib(0, 16), Comes::Here, 0, at(0)),
            Direction::Answer,
            "no busier than the others"
        );
        assert_eq!(
            direct(&mut tracker, Some(peer(2)), mib(16, 32), Comes::Here, 9, at(0)),
            Direction::Answer,
            "nobody else has that"
        );
        assert_eq!(
            direct(&mut tracker, Some(peer(1)), mib(0, 16), Comes::Here, 9, at(0)),
            Direction::Redirect(peer(3)),
            "not to itself"
        );
        assert_eq!(
            direct(&mut tracker, Some(peer(2)), mib(0, 16), Comes::Here, 9, at(20_000)),
            Direction::Answer,
            "it never came"
        );
        assert!(tracker.holders(None).is_empty(), "nobody has said that it has any");
    }

    #[test]
    fn holders_are_told_of_least_loaded_first_and_bounded() {
        let mut tracker = Tracker::new(1);
        for n in 0..3000 {
            tracker.heard(peer(n), &mib(0, 16).into(), 3000 - u32::from(n), at(n.into()));
        }
        assert_eq!(tracker.peers.len(), 512);
        let told: Vec<_> = tracker.holders(Some(peer(2999))).into_iter().map(|holder| holder.peer).collect();
        assert_eq!(told, (2991..2999).rev().map(peer).collect::<Vec<_>>());
    }

    #[test]
    fn what_a_peer_says_is_bounded() {
        let (mut tracker, mut view) = (Tracker::new(1), View::new(1));
        for nth in 0..10_000 {
            let have: Spans = Span { start: nth * 10, end: nth * 10 + 1 }.into();
            tracker.heard(peer(1), &have, 0, at(0));
            view.learn(&Holder { peer: peer(1), load: 0, have });
        }
        assert!(tracker.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
        assert!(view.peers[&peer(1)].have.iter().count() <= MAX_SPANS);
    }

    #[test]
    fn a_large_cluster_is_remembered_better() {
        let bounds = [1, 2_000, 5_000, 10_000, 1_000_000].map(|size| (Tracker::new(size).most, View::new(size).most));
        assert_eq!(bounds, [(512, 32), (512, 32), (1250, 32), (2048, 64), (2048, 64)]);
    }

    #[test]
    fn equals_are_told_of_in_turn() {
        let mut tracker = Tracker::new(1);
        (0..32).for_each(|n| tracker.heard(peer(n), &mib(0, 16).into(), 0, at(0)));
        let told = (0..100).flat_map(|_| tracker.holders(None)).map(|holder| holder.peer);
        assert_eq!(told.collect::<std::collections::BTreeSet<_>>().len(), 32);
    }

    #[test]
    fn the_slow_end_up_as_leaves() {
        let mut tracker = Tracker::new(1);
        tracker.heard(peer(1), &mib(0, 64).into(), 9, at(0));
        tracker.heard(peer(2), &mib(0, 16).into(), 0, at(0));
        tracker.heard(peer(3), &mib(0, 64).into(), 5, at(0));
        assert_eq!(
            direct(&mut tracker, Some(peer(1)), mib(0, 16), Comes::Here, 9, at(0)),
            Direction::Redirect(peer(3))
        );
        assert_eq!(
            direct(&mut tracker, None, mib(0, 16), Comes::Here, 9, at(0)),
            Direction::Redirect(peer(2)),
            "good enough for a new one"
        );
        let told: Vec<_> = tracker.holders(Some(peer(1))).into_iter().map(|holder| holder.peer).collect();
        assert_eq!(told, [peer(3), peer(2)]);
        let mut view = View::new(1);
        tracker.holders(Some(peer(1))).iter().for_each(|holder| view.learn(holder));
        assert_eq!(view.pick(0, 64 * MIB, at(0), 1), Some(peer(3)));
        assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(2)));
    }

    #[test]
    fn who_gets_it_slowly_is_asked_last_by_those_who_have_less() {
        let mut tracker = Tracker::new(1);
        for n in 1..=10 {
            tracker.heard(peer(n), &Spans::default(), 0, at(0));
            let reached = if n == 1 { 4 } else { 64 };
            tracker.heard(peer(n), &mib(0, reached).into(), if n == 1 { 0 } else { 5 }, at(500));
        }
        assert!(matches!(
            direct(&mut tracker, None, mib(0, 16), Comes::Here, 9, at(500)),
            Direction::Redirect(to) if to != peer(1)
        ));
        assert!(tracker.holders(None).iter().all(|holder| holder.peer != peer(1)));
        assert_eq!(
            direct(&mut tracker, None, mib(0, 16), Comes::Here, 4, at(500)),
            Direction::Answer,
            "rather from here than from the slow one"
        );
    }

    #[test]
    fn the_least_loaded_that_is_ahead_is_picked() {
        let mut view = View::new(1);
        let holder = |n, load, have: Span| Holder { peer: peer(n), load, have: have.into() };
        view.learn(&holder(1, 3, mib(0, 64)));
        view.learn(&holder(2, 1, mib(0, 32)));
        assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(2)));
        assert_eq!(view.pick(40 * MIB, 0, at(0), 1), Some(peer(1)));
        assert_eq!(view.pick(64 * MIB, 0, at(0), 1), None);
        (0..3).for_each(|_| view.begin(peer(2)));
        assert_eq!(view.pick(0, 0, at(0), 1), Some(peer(1)));
        view.end(Contribution {
            peer: peer(2),
            claim: Claim::Verified,
            total: 64 << 20,
            span: mib(0, 16),
            checksum: 1,
        });
        assert_eq!(view.contributions().len(), 1);
        view.refused(peer(1), at(0));
        assert_eq!(view.pick(40 * MIB, 0, at(100), 1), None);
        assert_eq!(view.pick(40 * MIB, 0, at(300), 1), Some(peer(1)));
        view.broke(peer(1), at(300));
        assert_eq!(view.pick(40 * MIB, 0, at(60_000), 1), None, "until it says again what it has");
    }

    #[test]
    fn who_hardly_sends_is_left_alone_unless_there_is_nobody_else() {
        let mut view = View::new(1);
        view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 64).into() });
        view.crawled(peer(1), at(0));
        view.left(peer(1), at(0));
        assert!(view.crawls(peer(1), at(299_999)) && !view.crawls(peer(1), at(300_000)));
        assert_eq!(view.pick(0, 0, at(60_000), 1), None, "whatever else it did");
        view.forgive();
        assert_eq!(view.pick(0, 0, at(60_000), 1), Some(peer(1)));
    }

    #[test]
    fn what_is_rare_is_fetched_first() {
        let mut view = View::new(1);
        let ranges = [mib(0, 16), mib(16, 32), mib(32, 48), mib(48, 64)];
        assert_eq!(view.choose(&[], 0), None);
        assert_eq!(view.choose(&ranges, 5), Some(0), "in order where nobody has any");
        view.learn(&Holder { peer: peer(1), load: 0, have: mib(32, 40).into() });
        assert_eq!(view.choose(&ranges, 5), Some(2), "on its way to somebody");
        view.learn(&Holder { peer: peer(1), load: 0, have: mib(0, 32).into() });
        view.learn(&Holder { peer: peer(2), load: 0, have: mib(0, 16).into() });
        assert_eq!(view.choose(&ranges, 5), Some(1), "one has it, two have the other");
    }

    #[test]
    fn equals_share_the_work() {
        let mut view = View::new(1);
        (0..4).for_each(|n| view.learn(&Holder { peer: peer(n), load: 0, have: mib(0, 16).into() }));
        let picked: std::collections::BTreeSet<_> = (0..100).filter_map(|lot| view.pick(0, 0, at(0), lot)).collect();
        assert_eq!(picked.len(), 4);
    }
}
