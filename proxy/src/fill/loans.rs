//! Ranges that an owner leaves to others: each is fetched from the origin by the one that asked for it, its
//! deputy, and the owner has it from there. So an owner that is slow, or far from the origin, slows nobody, and
//! yet nothing is fetched twice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::plan::LARGEST_RANGE;
use crate::oci::Span;
use crate::times::{STALL_TIMEOUT, STILL};

/// Ranges lent at a time: some more than the connections that an owner opens itself. More: the upstream gets more
/// connections. Fewer: a slow owner's peers wait for each other.
const MAX_LENT: usize = 12;

/// Ranges lent to one peer at a time, once it has shown that it is fast enough: as many as it requests at a time.
const MAX_LENT_TO_ONE: usize = 4;

/// A range for a peer of which it is not known that it is fast enough, in bytes. Larger: one that is slow or dies delays all
/// the others (simulated with one dead node in fifty: 7.8 times the image's time instead of 1.4). Smaller: more requests
/// before its speed is known.
const FIRST_LOAN: u64 = 2 * 1024 * 1024;

/// Bytes a second at which the largest range comes before it is overdue.
const FAST: f64 = LARGEST_RANGE as f64 / STALL_TIMEOUT.as_secs() as f64;

/// An owner that many times slower than its deputies sends those who request a range to peers that have it.
const FAR: f64 = 4.0;

/// So many deputies may fail. One may be refused by the upstream where this node is not.
const MAX_FAILED: usize = 3;

/// Smaller blobs are not worth the connections, in bytes.
pub(super) const WORTHWHILE: u64 = 64 * 1024 * 1024;

/// What one owner has lent of a blob.
#[derive(Default)]
pub(super) struct Loans {
    /// Whether anything is lent: not before it is known that ranges can be had.
    begun: bool,
    open: Vec<Loan>,
    /// How many did not come: after some nothing more is lent.
    failed: usize,
    /// What one connection brings, here and to a deputy.
    own: Rate,
    theirs: Rate,
    /// What is known of the peers to which ranges were lent.
    deputies: HashMap<SocketAddr, Deputy>,
}

#[derive(Clone, Copy)]
enum Deputy {
    Fast,
    /// It lets ranges become overdue.
    Silent,
}

#[derive(Clone, Copy, Default)]
struct Rate {
    bytes: u64,
    time: Duration,
}

struct Loan {
    span: Span,
    to: SocketAddr,
    since: Duration,
}

impl Loans {
    /// From now on ranges may be lent.
    pub(super) fn begin(&mut self) {
        self.begun = true;
    }

    /// How much more may be lent to this peer at once, in bytes.
    pub(super) fn may_lend(&self, to: SocketAddr) -> u64 {
        let (to_one, largest) = match self.deputies.get(&to) {
            None => (1, FIRST_LOAN),
            Some(Deputy::Fast) => (MAX_LENT_TO_ONE, u64::MAX),
            Some(Deputy::Silent) => return 0,
        };
        let to_it = self.open.iter().filter(|loan| loan.to == to).count();
        let may = self.begun && self.failed < MAX_FAILED && self.open.len() < MAX_LENT && to_it < to_one;
        if may { largest } else { 0 }
    }

    pub(super) fn lend(&mut self, span: Span, to: SocketAddr, now: Duration) {
        self.open.push(Loan { span, to, since: now });
    }

    /// Whether the byte at `at` is lent.
    pub(super) fn covers(&self, at: u64) -> bool {
        self.open.iter().any(|loan| loan.covers(at))
    }

    /// Whether it is lent to this peer.
    pub(super) fn covers_for(&self, at: u64, to: SocketAddr) -> bool {
        self.open.iter().any(|loan| loan.covers(at) && loan.to == to)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Those that somebody `has` now, or that were lent too long ago.
    pub(super) fn due(&mut self, now: Duration, has: impl Fn(Span) -> bool) -> Vec<Span> {
        let is_overdue = |loan: &Loan| now >= loan.since + STALL_TIMEOUT;
        for loan in &self.open {
            if has(loan.span) {
                let brought = Rate { bytes: loan.span.len(), time: now.saturating_sub(loan.since) };
                self.theirs.add(brought);
                match brought.is_fast() {
                    true => self.deputies.insert(loan.to, Deputy::Fast),
                    false => self.deputies.remove(&loan.to),
                };
            } else if is_overdue(loan) {
                self.theirs.add(Rate { bytes: 0, time: STALL_TIMEOUT });
                self.deputies.insert(loan.to, Deputy::Silent);
                self.failed += 1;
            }
        }
        self.take(|loan| has(loan.span) || is_overdue(loan))
    }

    /// The origin sent this node so much in this time, counted for each connection.
    pub(super) fn brought(&mut self, bytes: u64, time: Duration) {
        self.own.add(Rate { bytes, time });
    }

    /// Whether this node is far slower than its deputies.
    pub(super) fn is_slow(&self) -> bool {
        !self.own.time.is_zero() && self.own.rate() * FAR < self.theirs.rate()
    }

    /// Whoever asks for the byte at `at` has to have it from the owner: its deputy because it cannot fetch
    /// it, another one because its deputy gives nothing.
    pub(super) fn recall(&mut self, at: u64, by: SocketAddr, now: Duration) -> Vec<Span> {
        let failed = self.take(|loan| loan.covers(at) && (loan.to == by || now >= loan.since + STILL));
        self.failed += failed.len();
        failed
    }

    /// All of them: nothing more is lent.
    pub(super) fn end(&mut self) -> Vec<Span> {
        self.begun = false;
        self.take(|_| true)
    }

    fn take(&mut self, is_over: impl Fn(&Loan) -> bool) -> Vec<Span> {
        self.open.extract_if(.., |loan| is_over(loan)).map(|loan| loan.span).collect()
    }
}

impl Loan {
    fn covers(&self, at: u64) -> bool {
        self.span.contains(at)
    }
}

impl Rate {
    fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.time += other.time;
    }

    fn is_fast(self) -> bool {
        self.time.is_zero() || self.rate() >= FAST
    }

    /// Bytes a second.
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    fn rate(self) -> f64 {
        if self.time.is_zero() { 0.0 } else { self.bytes as f64 / self.time.as_secs_f64() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: fn(Span) -> bool = |_| false;

    fn peer(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 5052))
    }

    fn span(nth: u64) -> Span {
        Span { start: nth * LARGEST_RANGE, end: (nth + 1) * LARGEST_RANGE }
    }

    fn begun() -> Loans {
        let mut loans = Loans::default();
        assert_eq!(loans.may_lend(peer(1)), 0, "nobody knows yet whether there are ranges");
        loans.begin();
        loans
    }

    #[test]
    fn loans_are_limited_for_each_peer_and_for_all() {
        let mut loans = begun();
        for nth in 0..8 {
            let to = peer(u8::try_from(nth).unwrap());
            assert_eq!(loans.may_lend(to), FIRST_LOAN);
            loans.lend(span(nth), to, Duration::ZERO);
            assert_eq!(loans.may_lend(to), 0, "one to begin with");
        }
        let due = loans.due(Duration::from_secs(1), |lent| lent.start <= span(3).start);
        assert_eq!(due, [span(0), span(1), span(2), span(3)]);
        for nth in 8..16 {
            let to = peer(u8::try_from(nth % 2).unwrap());
            assert_eq!(loans.may_lend(to), u64::MAX, "more to one that is fast");
            loans.lend(span(nth), to, Duration::from_secs(1));
        }
        assert!(
            loans.may_lend(peer(2)) == 0 && !loans.covers(span(2).start) && loans.covers(span(4).start),
            "that is enough"
        );
    }

    #[test]
    fn what_does_not_come_is_taken_back() {
        let mut loans = begun();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.lend(span(1), peer(2), STILL);
        assert!(loans.recall(5, peer(3), STILL / 2).is_empty(), "its deputy has only begun");
        assert_eq!(loans.recall(5, peer(3), STILL), [span(0)]);
        assert_eq!(loans.may_lend(peer(1)), FIRST_LOAN, "others may be luckier");
        assert!(loans.due(STALL_TIMEOUT, NEVER).is_empty());
        assert_eq!(loans.due(STALL_TIMEOUT + STILL, NEVER), [span(1)]);
    }

    #[test]
    fn silent_deputy_gets_nothing_more() {
        let mut loans = begun();
        (0..3).for_each(|nth| loans.lend(span(nth), peer(u8::try_from(nth).unwrap()), Duration::ZERO));
        loans.due(Duration::from_secs(1), |lent| lent == span(0));
        loans.lend(span(4), peer(0), Duration::from_secs(1));
        assert_eq!(loans.due(STALL_TIMEOUT, |lent| lent == span(1)), [span(1), span(2)]);
        assert_eq!([0, 1, 2].map(|last| loans.may_lend(peer(last))), [u64::MAX, u64::MAX, 0]);
    }

    #[test]
    fn slow_deputy_gets_small_ranges() {
        let mut loans = begun();
        loans.lend(Span { end: FIRST_LOAN, ..span(0) }, peer(1), Duration::ZERO);
        loans.due(Duration::from_secs(1), |_| true);
        assert_eq!(loans.may_lend(peer(1)), u64::MAX, "a whole range would take eight seconds");
        loans.lend(span(1), peer(1), Duration::from_secs(1));
        loans.lend(Span { end: FIRST_LOAN, ..span(0) }, peer(2), Duration::from_secs(1));
        loans.due(Duration::from_secs(3), |lent| lent.start == 0);
        assert_eq!(loans.may_lend(peer(2)), FIRST_LOAN, "a whole range would take sixteen");
    }

    #[test]
    fn owner_is_slow_compared_with_its_deputies() {
        let mut loans = begun();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.brought(10, Duration::from_secs(10));
        assert!(!loans.is_slow(), "how fast they are is not known");
        loans.due(Duration::from_secs(2), |lent| lent == span(0));
        assert!(loans.is_slow(), "one byte a second against 8 MiB");
        loans.brought(4 * LARGEST_RANGE, Duration::from_secs(10));
        assert!(!loans.is_slow());
    }

    #[test]
    fn where_deputies_fail_nothing_more_is_lent() {
        let mut loans = begun();
        for nth in 0..3 {
            assert_eq!(loans.may_lend(peer(7)), FIRST_LOAN);
            loans.lend(span(nth), peer(1), Duration::ZERO);
            assert_eq!(loans.recall(span(nth).start + 3, peer(1), Duration::ZERO), [span(nth)]);
        }
        assert_eq!(loans.may_lend(peer(7)), 0);
        let mut loans = begun();
        loans.lend(span(1), peer(2), Duration::ZERO);
        assert_eq!(loans.end(), [span(1)]);
        assert!(loans.is_empty() && loans.may_lend(peer(2)) == 0);
    }
}
