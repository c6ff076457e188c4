//! Which range of a blob to ask for next.

use std::net::SocketAddr;
use std::time::Duration;

use super::loans::{Loans, WORTHWHILE};
use crate::oci::{Span, Spans};

/// Largest range asked for at once, in bytes.
pub(super) const LARGEST_RANGE: u64 = 16 * 1024 * 1024;
const SMALLEST_RANGE: u64 = 2 * 1024 * 1024;

/// Chosen ranges are this part of the blob, where that is between smallest and largest.
const SHARES: u64 = 32;

/// Ranges that nobody waits for begin at most this far ahead of what was hashed: so much is read again
/// to be hashed, and should still be in the page cache then.
const WINDOW: u64 = 96 * 1024 * 1024;

/// Where the order is free, so many different ranges should be on their way in the cluster that nodes
/// have something to give to each other.
const WIDE_WINDOW: u64 = 1024 * 1024 * 1024;

/// All ranges together should take this much of the window.
const IN_FLIGHT: u64 = 64 * 1024 * 1024;

/// The ranges of one blob.
#[derive(Default)]
pub struct RangePlan {
    total: u64,
    /// Written, asked for, or lent.
    taken: Spans,
    lent: Loans,
    /// What was lent before: whether or not it came, this node fetches it now.
    returned: Vec<Span>,
}

/// Whether a range is left to whoever asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lent {
    /// It, or its beginning.
    Yes(Span),
    /// Enough is lent for now, and nobody brings this range yet.
    Later,
    /// It is on its way already, or not worth it.
    No,
}

impl RangePlan {
    pub fn new(total: u64, written: Spans) -> Self {
        Self { total, taken: written, lent: Loans::default(), returned: Vec::new() }
    }

    /// Takes a range where a reader waits, otherwise the one that `choose` picks of those that are missing
    /// and not too far from what was `hashed`. Ranges begin at the same places on every node, so that
    /// what one has is what another asks for.
    pub fn chosen(
        &mut self,
        hashed: u64,
        wanted: &[u64],
        choose: impl FnOnce(&[Span]) -> Option<usize>,
    ) -> Option<Span> {
        let unit = (self.total / SHARES).clamp(SMALLEST_RANGE, LARGEST_RANGE).next_multiple_of(SMALLEST_RANGE);
        let cut = |gap: Span| Span { start: gap.start, end: gap.end.min((gap.start / unit + 1) * unit) };
        let waited_for = self.waited_for(wanted).and_then(|at| self.gap(at)).map(cut);
        let span = waited_for.or_else(|| {
            let mut missing = Vec::new();
            let mut from = 0;
            while let Some(gap) = self.gap(from).map(cut).filter(|gap| gap.start < hashed + WIDE_WINDOW) {
                missing.push(gap);
                from = gap.end;
            }
            missing.get(choose(&missing)?).copied()
        })?;
        self.taken.insert(span);
        Some(span)
    }

    /// Takes the next range for one of `lanes` connections: where a reader waits, otherwise the
    /// first that is missing, unless that is too far from what was `hashed`.
    pub fn next(&mut self, hashed: u64, wanted: &[u64], lanes: usize) -> Option<Span> {
        let waited_for = self.waited_for(wanted).and_then(|at| self.gap(at));
        let in_order = || self.own_gap().filter(|gap| gap.start < hashed + WINDOW);
        let gap = waited_for.or_else(in_order)?;
        let lanes = lanes.max(1) as u64;
        // Towards the end ranges get smaller, so that no connection is left with the last one.
        let left = self.total - self.taken.len();
        let len = (IN_FLIGHT / lanes).min(left.div_ceil(lanes)).clamp(SMALLEST_RANGE, LARGEST_RANGE);
        let span = self.of_one_source(Span { start: gap.start, end: gap.end.min(gap.start + len) });
        self.taken.insert(span);
        Some(span)
    }

    /// The first gap that is this node's to fetch where nobody waits: where it is far slower than its deputies,
    /// only what one of them has had.
    fn own_gap(&self) -> Option<Span> {
        let first = self.gap(0)?;
        if !self.lent.stands_back() {
            return Some(first);
        }
        let gaps = self.returned.iter().filter_map(|known| {
            let gap = self.gap(known.start).filter(|gap| gap.start < known.end)?;
            Some(Span { start: gap.start, end: gap.end.min(known.end) })
        });
        gaps.min_by_key(|gap| gap.start)
    }

    /// As much of a range as comes from one source: what a deputy has, or what none has.
    fn of_one_source(&self, span: Span) -> Span {
        let edges = self.returned.iter().flat_map(|known| [known.start, known.end]);
        let end = edges.filter(|edge| *edge > span.start).fold(span.end, u64::min);
        Span { start: span.start, end }
    }

    /// The first byte that a reader waits for and nobody brings.
    pub fn waited_for(&self, wanted: &[u64]) -> Option<u64> {
        wanted.iter().copied().find(|at| *at < self.total && self.taken.run_end(*at) == *at)
    }

    /// Takes this range, which somebody brings already.
    pub(super) fn take(&mut self, span: Span) {
        self.taken.insert(span);
    }

    /// A range that will not come after all.
    pub fn give_back(&mut self, span: Span) {
        self.taken.remove(span);
    }

    /// The first range at or after `from` that nobody brings.
    pub(super) fn gap(&self, from: u64) -> Option<Span> {
        self.taken.gap(from, self.total)
    }

    /// Whether every byte is there or on its way here.
    pub fn is_complete(&self) -> bool {
        self.gap(0).is_none() && self.lent.is_empty()
    }

    /// The source understands ranges: they may be lent.
    pub fn may_lend(&mut self) {
        self.lent.begin();
    }

    /// Leaves a range, or its beginning, to a peer, which fetches it in this node's stead.
    pub fn lend(&mut self, span: Span, to: SocketAddr, now: Duration) -> Lent {
        let is_missing = self.gap(span.start).is_some_and(|gap| gap.start == span.start && span.end <= gap.end);
        let is_apart = |known: &Span| span.end <= known.start || known.end <= span.start;
        let is_tiny = span.len() < SMALLEST_RANGE && span.end < self.total;
        if self.total < WORTHWHILE || is_tiny || !is_missing || !self.returned.iter().all(is_apart) {
            return Lent::No;
        }
        let largest = self.lent.may_lend(to);
        if largest > 0 {
            let span = Span { start: span.start, end: span.end.min(span.start.saturating_add(largest)) };
            self.taken.insert(span);
            self.lent.lend(span, to, now);
            return Lent::Yes(span);
        }
        if self.lent.may_lend_later(to) { Lent::Later } else { Lent::No }
    }

    /// Whether the byte at `at` is to come from a deputy.
    pub fn is_lent(&self, at: u64) -> bool {
        self.lent.covers(at)
    }

    /// Whether the byte at `at` is there, on its way, or lent.
    pub(super) fn is_taken(&self, at: u64) -> bool {
        self.taken.run_end(at) > at
    }

    /// Whether it is to come from this one.
    pub(super) fn is_lent_to(&self, at: u64, to: SocketAddr) -> bool {
        self.lent.covers_for(at, to)
    }

    /// Whether anything is to come from a deputy.
    pub(super) fn has_lent(&self) -> bool {
        !self.lent.is_empty()
    }

    /// Whether whoever asks for the byte at `at` had better ask somebody else who has it.
    pub fn is_better_elsewhere(&self, at: u64) -> bool {
        self.is_lent(at) || self.lent.is_slow()
    }

    /// The origin sent this node so much in this time, counted for each connection.
    pub fn brought(&mut self, bytes: u64, time: Duration) {
        self.lent.brought(bytes, time);
    }

    /// Takes up what was lent and somebody `has`, and what has not come in time.
    pub fn collect(&mut self, now: Duration, has: impl Fn(Span) -> bool) {
        let due = self.lent.due(now, has);
        self.take_back(due);
    }

    /// Somebody insists on having the byte at `at` from here, though it was lent.
    pub fn recall(&mut self, at: u64, by: SocketAddr, now: Duration) {
        let failed = self.lent.recall(at, by, now);
        self.take_back(failed);
    }

    /// Takes back all that was lent, and lends nothing more: there are no ranges to be had.
    pub(super) fn lend_no_more(&mut self) {
        let all = self.lent.end();
        self.take_back(all);
    }

    fn take_back(&mut self, spans: Vec<Span>) {
        for span in spans {
            self.taken.remove(span);
            self.returned.push(span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn what_is_lent_is_fetched_by_somebody_else_until_it_is_collected() {
        let (mut plan, to) = (plan(100), SocketAddr::from(([192, 0, 2, 1], 5052)));
        plan.may_lend();
        let range = |start: u64, end: u64| Span { start: start * MIB, end: end * MIB };
        assert_eq!(mib(plan.next(0, &[], 4)), Some((0, 16)));
        assert_eq!(plan.lend(range(8, 24), to, Duration::ZERO), Lent::No, "it is on its way");
        assert_eq!(plan.lend(range(16, 32), to, Duration::ZERO), Lent::Yes(range(16, 18)), "a little to begin with");
        assert!(plan.is_lent(16 * MIB));
        assert_eq!(plan.lend(range(64, 80), to, Duration::ZERO), Lent::Later, "one at a time");
        assert_eq!(plan.lend(range(16, 32), to, Duration::ZERO), Lent::No, "to one only");
        assert_eq!(mib(plan.next(0, &[17 * MIB], 4)), Some((18, 34)), "who waits for that waits for its deputy");
        while plan.next(50 * MIB, &[], 4).is_some() {}
        assert!(!plan.is_complete(), "it is not here");
        plan.collect(Duration::ZERO, |span| span == range(16, 18));
        assert_eq!(plan.lend(range(16, 18), to, Duration::ZERO), Lent::No, "somebody has it");
        plan.give_back(range(12, 40));
        assert_eq!(mib(plan.next(50 * MIB, &[], 1)), Some((12, 16)), "what the deputy has is asked for by itself");
        assert_eq!(mib(plan.next(50 * MIB, &[], 1)), Some((16, 18)));
        assert_eq!(mib(plan.next(50 * MIB, &[], 1)), Some((18, 34)));
        assert_eq!(mib(plan.next(50 * MIB, &[], 1)), Some((34, 40)));
        assert!(plan.is_complete());
    }

    #[test]
    fn small_blobs_are_not_lent() {
        let to = SocketAddr::from(([192, 0, 2, 1], 5052));
        let little = Span { start: 16 * MIB, end: 18 * MIB };
        for (size, lends) in [(40, Lent::No), (64, Lent::Yes(little))] {
            let mut plan = plan(size);
            plan.may_lend();
            assert_eq!(plan.lend(Span { start: 16 * MIB, end: 32 * MIB }, to, Duration::ZERO), lends);
        }
    }

    fn plan(mib: u64) -> RangePlan {
        RangePlan::new(mib * MIB, Spans::default())
    }

    fn mib(span: Option<Span>) -> Option<(u64, u64)> {
        span.map(|span| (span.start / MIB, span.end / MIB))
    }

    #[test]
    fn ranges_come_in_order_and_within_the_window() {
        let mut plan = plan(1000);
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.next(0, &[], 4))).collect();
        assert_eq!(ranges, [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 96)]);
        assert_eq!(mib(plan.next(16 * MIB, &[], 4)), Some((96, 112)));
        plan.give_back(Span { start: 20 * MIB, end: 32 * MIB });
        assert_eq!(mib(plan.next(16 * MIB, &[], 4)), Some((20, 32)), "what was lost comes first");
    }

    #[test]
    fn chosen_ranges_begin_at_the_same_places_everywhere() {
        let mut plan = plan(512);
        let none = |_: &[Span]| None;
        assert_eq!(mib(plan.chosen(0, &[19 * MIB], none)), Some((19, 32)), "who waits comes first");
        plan.give_back(Span { start: 24 * MIB, end: 32 * MIB });
        assert_eq!(mib(plan.chosen(0, &[], |missing| Some(missing.len() - 1))), Some((496, 512)));
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.chosen(0, &[], |_| Some(0)))).take(4).collect();
        assert_eq!(ranges, [(0, 16), (16, 19), (24, 32), (32, 48)]);
        assert_eq!(mib(RangePlan::new(20 * MIB, Spans::default()).chosen(0, &[5 * MIB], none)), Some((5, 6)));
    }

    #[test]
    fn who_waits_comes_first() {
        let mut plan = plan(1000);
        assert_eq!(mib(plan.next(0, &[500 * MIB], 1)), Some((500, 516)));
        assert_eq!(mib(plan.next(0, &[500 * MIB], 1)), Some((0, 16)), "that one is on its way");
        assert_eq!(mib(plan.next(0, &[MIB, 490 * MIB, 495 * MIB], 1)), Some((490, 500)));
        assert_eq!(mib(plan.next(0, &[5000 * MIB], 1)), Some((16, 32)), "beyond the end");
    }

    #[test]
    fn many_connections_share_the_end() {
        let mut plan = plan(20);
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.next(0, &[], 4))).collect();
        assert_eq!(ranges, [(0, 5), (5, 8), (8, 11), (11, 13), (13, 15), (15, 17), (17, 19), (19, 20)]);
        assert!(plan.is_complete());
    }
}
