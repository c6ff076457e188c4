//! Decides which range of a blob to request next.

use std::net::SocketAddr;
use std::time::Duration;

use super::loans::{Loans, MIN_LENDING_BLOB_BYTES};
use crate::oci::{Span, Spans};

/// Largest range of one request, in bytes. Larger: more is lost if a source fails, and readers wait longer for other
/// ranges. Smaller: more requests for each blob.
pub(super) const MAX_RANGE_BYTES: u64 = 16 * 1024 * 1024;

/// Smallest range of one request, in bytes. Larger: connections end the blob less evenly. Smaller: more requests near
/// its end.
const MIN_RANGE_BYTES: u64 = 2 * 1024 * 1024;

/// The number of chosen ranges in a blob, if their size is then between smallest and largest. Larger: more requests.
/// Smaller: peers have fewer ranges to exchange.
const CHOSEN_RANGES_PER_BLOB: u64 = 32;

/// Ranges without waiting readers begin at most this far, in bytes, after what was hashed. Larger: bytes written out of
/// order may have left the page cache before they are read back for the hash. Smaller: connections wait for the hash.
const WINDOW_BYTES: u64 = 96 * 1024 * 1024;

/// The same, in bytes, if the order is free. Larger: more to read back from the disk. Smaller: nodes download the same
/// ranges at the same time, and have nothing to exchange.
const WIDE_WINDOW_BYTES: u64 = 1024 * 1024 * 1024;

/// Bytes that the running ranges of a blob may span together. Larger: less of [`WINDOW_BYTES`] is left for ranges that
/// end early. Smaller: ranges get smaller.
const MAX_RUNNING_BYTES: u64 = 64 * 1024 * 1024;

/// The ranges of one blob.
#[derive(Default)]
pub struct RangePlan {
    total: u64,
    /// Written, requested, or lent.
    taken: Spans,
    lent: Loans,
    /// Ranges that were lent before: whether or not they arrived, this node downloads them now.
    returned: Vec<Span>,
}

/// Whether a range is lent to the peer that requests it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lent {
    /// This range is lent: the requested one, or its beginning.
    Yes(Span),
    /// The limit of loans is reached for now, and the range is not requested yet.
    Later,
    /// The range is already requested, or not worth a loan.
    No,
}

/// The range to request first of a blob of `total` bytes, of which some are `written`: where the first reader waits, or
/// the next missing bytes, however far they are from what will be hashed first. The last byte if nothing is missing: the
/// source confirms the blob.
pub(super) fn first_range(total: u64, written: &Spans, from: u64) -> Span {
    let last = Span { start: total.saturating_sub(1), end: total };
    let gap = written.gap(from, total).or_else(|| written.gap(0, total)).unwrap_or(last);
    Span { start: gap.start, end: gap.end.min(gap.start.saturating_add(MAX_RANGE_BYTES)) }
}

impl RangePlan {
    pub fn new(total: u64, written: Spans) -> Self {
        Self { total, taken: written, lent: Loans::default(), returned: Vec::new() }
    }

    /// Takes the range that a reader waits for. Otherwise takes the one that `choose` picks from the missing ones near
    /// what was `hashed`. Ranges begin at the same offsets on every node, so that a peer has exactly the range that
    /// another requests.
    pub fn chosen(
        &mut self,
        hashed: u64,
        wanted: &[u64],
        choose: impl FnOnce(&[Span]) -> Option<usize>,
    ) -> Option<Span> {
        let unit = (self.total / CHOSEN_RANGES_PER_BLOB)
            .clamp(MIN_RANGE_BYTES, MAX_RANGE_BYTES)
            .next_multiple_of(MIN_RANGE_BYTES);
        let cut = |gap: Span| Span { start: gap.start, end: gap.end.min((gap.start / unit + 1) * unit) };
        let waited_for = self.waited_for(wanted).and_then(|at| self.gap(at)).map(cut);
        let span = waited_for.or_else(|| {
            let mut missing = Vec::new();
            let mut from = 0;
            while let Some(gap) = self.gap(from).map(cut).filter(|gap| gap.start < hashed + WIDE_WINDOW_BYTES) {
                missing.push(gap);
                from = gap.end;
            }
            missing.get(choose(&missing)?).copied()
        })?;
        self.taken.insert(span);
        Some(span)
    }

    /// Takes the next range for one of `lanes` connections: where a reader waits, otherwise the first missing one, if
    /// it is near enough to what was `hashed`.
    pub fn next(&mut self, hashed: u64, wanted: &[u64], lanes: usize) -> Option<Span> {
        let waited_for = self.waited_for(wanted).and_then(|at| self.gap(at));
        let in_order = || self.gap_without_reader().filter(|gap| gap.start < hashed + WINDOW_BYTES);
        let gap = waited_for.or_else(in_order)?;
        let lanes = lanes.max(1) as u64;
        // Ranges shrink towards the end, so that no connection is left alone with a large one.
        let left = self.total - self.taken.len();
        let len = (MAX_RUNNING_BYTES / lanes).min(left.div_ceil(lanes)).clamp(MIN_RANGE_BYTES, MAX_RANGE_BYTES);
        let span = self.of_one_source(Span { start: gap.start, end: gap.end.min(gap.start + len) });
        self.taken.insert(span);
        Some(span)
    }

    /// The first gap that this node downloads without a waiting reader. If it is far slower than its deputies, only
    /// gaps that were lent before.
    fn gap_without_reader(&self) -> Option<Span> {
        let first = self.gap(0)?;
        if !self.lent.defers_to_deputies() {
            return Some(first);
        }
        let gaps = self.returned.iter().filter_map(|known| {
            let gap = self.gap(known.start).filter(|gap| gap.start < known.end)?;
            Some(Span { start: gap.start, end: gap.end.min(known.end) })
        });
        gaps.min_by_key(|gap| gap.start)
    }

    /// The beginning of a range that has one source: a deputy, or the upstream.
    fn of_one_source(&self, span: Span) -> Span {
        let edges = self.returned.iter().flat_map(|known| [known.start, known.end]);
        let end = edges.filter(|edge| *edge > span.start).fold(span.end, u64::min);
        Span { start: span.start, end }
    }

    /// The first byte that a reader waits for and that is not requested.
    pub fn waited_for(&self, wanted: &[u64]) -> Option<u64> {
        wanted.iter().copied().find(|at| *at < self.total && self.taken.run_end(*at) == *at)
    }

    /// Marks a range as requested.
    pub(super) fn take(&mut self, span: Span) {
        self.taken.insert(span);
    }

    /// Marks a range as missing, because its request failed.
    pub fn give_back(&mut self, span: Span) {
        self.taken.remove(span);
    }

    /// The first range at or after `from` that is neither written nor requested.
    pub(super) fn gap(&self, from: u64) -> Option<Span> {
        self.taken.gap(from, self.total)
    }

    /// Whether every byte is written or requested, and none is lent.
    pub fn is_complete(&self) -> bool {
        self.gap(0).is_none() && self.lent.is_empty()
    }

    /// Enables lending, because the source supports ranges.
    pub fn enable_lending(&mut self) {
        self.lent.begin();
    }

    /// Lends a range, or its beginning, to a peer, which downloads it as the deputy of this node.
    pub fn lend(&mut self, span: Span, to: SocketAddr, now: Duration) -> Lent {
        let is_missing = self.gap(span.start).is_some_and(|gap| gap.start == span.start && span.end <= gap.end);
        let is_apart = |known: &Span| span.end <= known.start || known.end <= span.start;
        let is_tiny = span.len() < MIN_RANGE_BYTES && span.end < self.total;
        if self.total < MIN_LENDING_BLOB_BYTES || is_tiny || !is_missing || !self.returned.iter().all(is_apart) {
            return Lent::No;
        }
        let largest = self.lent.lendable_bytes(to);
        if largest > 0 {
            let span = Span { start: span.start, end: span.end.min(span.start.saturating_add(largest)) };
            self.taken.insert(span);
            self.lent.lend(span, to, now);
            return Lent::Yes(span);
        }
        if self.lent.may_lend_later(to) { Lent::Later } else { Lent::No }
    }

    /// Whether the byte at `at` is lent to a deputy.
    pub fn is_forwarded(&self, at: u64) -> bool {
        self.lent.covers(at)
    }

    /// Whether the byte at `at` is written, requested, or lent.
    pub(super) fn is_taken(&self, at: u64) -> bool {
        self.taken.run_end(at) > at
    }

    /// Whether the byte at `at` is lent to this peer.
    pub(super) fn is_lent_to(&self, at: u64, to: SocketAddr) -> bool {
        self.lent.covers_for(at, to)
    }

    /// Whether any range is lent.
    pub(super) fn has_lent(&self) -> bool {
        !self.lent.is_empty()
    }

    /// Whether a peer that requests the byte at `at` should be redirected to another holder.
    pub fn is_deferred_to_peers(&self, at: u64) -> bool {
        self.is_forwarded(at) || self.lent.is_slow()
    }

    /// The upstream sent this node `bytes` in `time`, added up over its connections.
    pub fn brought(&mut self, bytes: u64, time: Duration) {
        self.lent.brought(bytes, time);
    }

    /// Ends loans whose range a peer `has`, and those that are overdue: this node downloads them now.
    pub fn collect(&mut self, now: Duration, has: impl Fn(Span) -> bool) {
        let due = self.lent.due(now, has);
        self.download_again(due);
    }

    /// A peer needs the byte at `at` from this node: revokes its loan.
    pub fn recall(&mut self, at: u64, by: SocketAddr, now: Duration) {
        let failed = self.lent.recall(at, by, now);
        self.download_again(failed);
    }

    /// Ends all loans, and disables lending, because the source does not support ranges.
    pub(super) fn stop_lending(&mut self) {
        let all = self.lent.end();
        self.download_again(all);
    }

    fn download_again(&mut self, spans: Vec<Span>) {
        for span in spans {
            self.taken.remove(span);
            self.returned.push(span);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_range_of_a_partial_is_its_next_gap() {
        let (total, mib) = (1 << 30, |n: u64| n << 20);
        let written: Spans =
            [Span { start: 0, end: mib(500) }, Span { start: mib(510), end: mib(900) }].into_iter().collect();
        let first =
            |written: &Spans, from| (first_range(total, written, from).start, first_range(total, written, from).end);
        assert_eq!(first(&Spans::default(), 7), (7, 7 + MAX_RANGE_BYTES));
        assert_eq!(first(&written, 0), (mib(500), mib(510)), "far from the first byte, and the gap is small");
        assert_eq!(first(&written, mib(505)), (mib(505), mib(510)));
        assert_eq!(first(&written, mib(600)), (mib(900), mib(900) + MAX_RANGE_BYTES));
        assert_eq!(first(&Span { start: mib(100), end: total }.into(), mib(600)), (0, MAX_RANGE_BYTES));
        assert_eq!(first(&Span::whole(total).into(), 0), (total - 1, total));
    }

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn lent_range_is_not_requested_until_collected() {
        let (mut plan, to) = (plan(100), SocketAddr::from(([192, 0, 2, 1], 5052)));
        plan.enable_lending();
        let range = |start: u64, end: u64| Span { start: start * MIB, end: end * MIB };
        assert_eq!(mib(plan.next(0, &[], 4)), Some((0, 16)));
        assert_eq!(plan.lend(range(8, 24), to, Duration::ZERO), Lent::No, "already requested");
        assert_eq!(plan.lend(range(16, 32), to, Duration::ZERO), Lent::Yes(range(16, 18)), "a small first loan");
        assert!(plan.is_forwarded(16 * MIB));
        assert_eq!(plan.lend(range(64, 80), to, Duration::ZERO), Lent::Later, "one loan at a time");
        assert_eq!(plan.lend(range(16, 32), to, Duration::ZERO), Lent::No, "already lent");
        assert_eq!(
            mib(plan.next(0, &[17 * MIB], 4)),
            Some((18, 34)),
            "a lent range is not requested, even with a reader"
        );
        while plan.next(50 * MIB, &[], 4).is_some() {}
        assert!(!plan.is_complete(), "the lent range is missing");
        plan.collect(Duration::ZERO, |span| span == range(16, 18));
        assert_eq!(plan.lend(range(16, 18), to, Duration::ZERO), Lent::No, "a peer has it");
        plan.give_back(range(12, 40));
        assert_eq!(mib(plan.next(50 * MIB, &[], 1)), Some((12, 16)), "the range before the former loan");
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
            plan.enable_lending();
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
    fn ranges_without_readers_stay_in_the_window() {
        let mut plan = plan(1000);
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.next(0, &[], 4))).collect();
        assert_eq!(ranges, [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 96)]);
        assert_eq!(mib(plan.next(16 * MIB, &[], 4)), Some((96, 112)));
        plan.give_back(Span { start: 20 * MIB, end: 32 * MIB });
        assert_eq!(mib(plan.next(16 * MIB, &[], 4)), Some((20, 32)), "a failed range comes first");
    }

    #[test]
    fn chosen_ranges_begin_at_fixed_offsets() {
        let mut plan = plan(512);
        let none = |_: &[Span]| None;
        assert_eq!(mib(plan.chosen(0, &[19 * MIB], none)), Some((19, 32)), "a waiting reader comes first");
        plan.give_back(Span { start: 24 * MIB, end: 32 * MIB });
        assert_eq!(mib(plan.chosen(0, &[], |missing| Some(missing.len() - 1))), Some((496, 512)));
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.chosen(0, &[], |_| Some(0)))).take(4).collect();
        assert_eq!(ranges, [(0, 16), (16, 19), (24, 32), (32, 48)]);
        assert_eq!(mib(RangePlan::new(20 * MIB, Spans::default()).chosen(0, &[5 * MIB], none)), Some((5, 6)));
    }

    #[test]
    fn range_with_waiting_reader_comes_first() {
        let mut plan = plan(1000);
        assert_eq!(mib(plan.next(0, &[500 * MIB], 1)), Some((500, 516)));
        assert_eq!(mib(plan.next(0, &[500 * MIB], 1)), Some((0, 16)), "already requested");
        assert_eq!(mib(plan.next(0, &[MIB, 490 * MIB, 495 * MIB], 1)), Some((490, 500)));
        assert_eq!(mib(plan.next(0, &[5000 * MIB], 1)), Some((16, 32)), "beyond the end");
    }

    #[test]
    fn ranges_at_the_end_get_smaller() {
        let mut plan = plan(20);
        let ranges: Vec<_> = std::iter::from_fn(|| mib(plan.next(0, &[], 4))).collect();
        assert_eq!(ranges, [(0, 5), (5, 8), (8, 11), (11, 13), (13, 15), (15, 17), (17, 19), (19, 20)]);
        assert!(plan.is_complete());
    }
}
