//! Which range of a blob to ask for next.

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
pub struct Plan {
    total: u64,
    /// Written, or asked for.
    taken: Spans,
}

impl Plan {
    pub fn new(total: u64, written: Spans) -> Self {
        Self { total, taken: written }
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
        let in_order = || self.gap(0).filter(|gap| gap.start < hashed + WINDOW);
        let gap = waited_for.or_else(in_order)?;
        let lanes = lanes.max(1) as u64;
        // Towards the end ranges get smaller, so that no connection is left with the last one.
        let left = self.total - self.taken.len();
        let len = (IN_FLIGHT / lanes).min(left.div_ceil(lanes)).clamp(SMALLEST_RANGE, LARGEST_RANGE);
        let span = Span { start: gap.start, end: gap.end.min(gap.start + len) };
        self.taken.insert(span);
        Some(span)
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

    /// Whether every byte is there or on its way.
    pub fn is_complete(&self) -> bool {
        self.gap(0).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn plan(mib: u64) -> Plan {
        Plan::new(mib * MIB, Spans::default())
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
        assert_eq!(mib(Plan::new(20 * MIB, Spans::default()).chosen(0, &[5 * MIB], none)), Some((5, 6)));
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
