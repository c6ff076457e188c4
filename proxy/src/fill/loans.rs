//! Ranges that an owner leaves to others: each is fetched from the origin by the one that asked for it, its
//! deputy, and the owner has it from there. So an owner that is slow, or far from the origin, slows nobody, and
//! yet nothing is fetched twice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::oci::Span;
use crate::times::{STALL_TIMEOUT, STILL};

/// Lent at a time: some more connections than an owner opens itself.
const MAX_LENT: usize = 12;

/// So many peers become deputies; of a thousand that ask, most would be new to it each time.
const MAX_DEPUTIES: usize = 8;

/// To one peer: as many ranges as it fetches at a time, once it has brought a little, and not far slower than
/// others.
const MAX_LENT_TO_ONE: usize = 4;
const A_LITTLE: u64 = 2 * 1024 * 1024;

/// By an owner that fetches nothing itself.
const MAX_LENT_BY_SLOW: usize = 32;

/// An owner so much slower than its deputies leaves the origin to them.
const FAR: f64 = 4.0;

/// So many deputies may fail. One may be refused by the origin where this node is not.
const MAX_FAILED: usize = 3;

/// Smaller blobs are not worth the connections.
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
    deputies: HashMap<SocketAddr, Rate>,
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
        let to_it = self.open.iter().filter(|loan| loan.to == to).count();
        let (to_one, largest) = match self.deputies.get(&to) {
            None if self.deputies.len() < MAX_DEPUTIES => (1, A_LITTLE),
            None => (0, 0),
            Some(pace) if pace.time.is_zero() => (1, A_LITTLE),
            Some(pace) if pace.bytes == 0 || pace.rate() * FAR < self.theirs.without(*pace).rate() => (0, 0),
            Some(_) => (MAX_LENT_TO_ONE, u64::MAX),
        };
        let most = if self.stands_back() { MAX_LENT_BY_SLOW } else { MAX_LENT };
        let may = self.begun && self.failed < MAX_FAILED && self.open.len() < most && to_it < to_one;
        if may { largest } else { 0 }
    }

    /// Whether a deputy had better wait until more may be lent to it.
    pub(super) fn may_lend_later(&self, to: SocketAddr) -> bool {
        !self.open.is_empty() && self.deputies.contains_key(&to)
    }

    pub(super) fn lend(&mut self, span: Span, to: SocketAddr, now: Duration) {
        self.deputies.entry(to).or_default();
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
        for loan in self.open.iter().filter(|loan| has(loan.span)) {
            let (bytes, time) = (loan.span.len(), now.saturating_sub(loan.since));
            self.theirs.brought(bytes, time);
            self.deputies.entry(loan.to).or_default().brought(bytes, time);
        }
        let come = self.take(|loan| has(loan.span));
        // Who brings nothing gets nothing more.
        for loan in self.open.iter().filter(|loan| now >= loan.since + STALL_TIMEOUT) {
            self.theirs.brought(0, STALL_TIMEOUT);
            self.deputies.entry(loan.to).or_default().brought(0, STALL_TIMEOUT);
        }
        let overdue = self.take(|loan| now >= loan.since + STALL_TIMEOUT);
        [come, overdue].concat()
    }

    /// The origin sent this node so much in this time, counted for each connection.
    pub(super) fn brought(&mut self, bytes: u64, time: Duration) {
        self.own.brought(bytes, time);
    }

    /// Whether this node had better fetch nothing that deputies could: they are at it, and far faster.
    pub(super) fn stands_back(&self) -> bool {
        !self.open.is_empty() && self.is_slow()
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
    fn brought(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    /// Of the others.
    fn without(self, one: Self) -> Self {
        Self { bytes: self.bytes.saturating_sub(one.bytes), time: self.time.saturating_sub(one.time) }
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
        Span { start: nth * 10, end: nth * 10 + 10 }
    }

    fn begun() -> Loans {
        let mut loans = Loans::default();
        assert_eq!(loans.may_lend(peer(1)), 0, "nobody knows yet whether there are ranges");
        loans.begin();
        loans
    }

    #[test]
    fn so_much_is_lent_and_no_more() {
        let mut loans = begun();
        for nth in 0..8 {
            let to = peer(u8::try_from(nth).unwrap());
            assert_eq!(loans.may_lend(to), A_LITTLE);
            loans.lend(span(nth), to, Duration::ZERO);
            assert_eq!(loans.may_lend(to), 0, "one to begin with");
            assert!(loans.may_lend_later(to));
        }
        assert_eq!(loans.may_lend(peer(8)), 0, "those are enough");
        assert!(!loans.may_lend_later(peer(8)));
        let due = loans.due(Duration::from_secs(1), |lent| lent.start <= 30);
        assert_eq!(due, [span(0), span(1), span(2), span(3)]);
        for nth in 8..16 {
            let to = peer(u8::try_from(nth % 2).unwrap());
            assert_eq!(loans.may_lend(to), u64::MAX, "more to one that has brought something");
            loans.lend(span(nth), to, Duration::from_secs(1));
        }
        assert!(loans.may_lend(peer(2)) == 0 && !loans.covers(25) && loans.covers(45), "that is enough");
    }

    #[test]
    fn nothing_more_is_lent_to_the_slow() {
        let mut loans = begun();
        (0..3).for_each(|nth| loans.lend(span(nth), peer(u8::try_from(nth).unwrap()), Duration::ZERO));
        loans.due(Duration::from_secs(1), |lent| lent != span(2));
        assert_eq!(loans.due(Duration::from_secs(9), |_| true), [span(2)]);
        assert_eq!([0, 9, 2].map(|last| loans.may_lend(peer(last))), [u64::MAX, A_LITTLE, 0]);
    }

    #[test]
    fn what_does_not_come_is_taken_back() {
        let mut loans = begun();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.lend(span(1), peer(2), STILL);
        assert!(loans.recall(5, peer(3), STILL / 2).is_empty(), "its deputy has only begun");
        assert_eq!(loans.recall(5, peer(3), STILL), [span(0)]);
        assert_eq!(loans.may_lend(peer(1)), A_LITTLE, "others may be luckier");
        assert!(loans.due(STALL_TIMEOUT, NEVER).is_empty());
        assert_eq!(loans.due(STALL_TIMEOUT + STILL, NEVER), [span(1)]);
    }

    #[test]
    fn who_brings_nothing_gets_nothing_more() {
        let mut loans = begun();
        (0..2).for_each(|nth| loans.lend(span(nth), peer(u8::try_from(nth).unwrap()), Duration::ZERO));
        loans.due(Duration::from_secs(1), |lent| lent == span(0));
        assert_eq!(loans.due(STALL_TIMEOUT, NEVER), [span(1)]);
        assert_eq!([0, 1].map(|last| loans.may_lend(peer(last))), [u64::MAX, 0]);
    }

    #[test]
    fn a_slow_owner_stands_back_while_others_are_at_it() {
        let mut loans = begun();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.lend(span(1), peer(2), Duration::ZERO);
        loans.brought(10, Duration::from_secs(10));
        assert!(!loans.stands_back(), "nobody knows how fast they are");
        loans.due(Duration::from_secs(2), |lent| lent == span(0));
        assert!(loans.stands_back(), "five bytes a second against one");
        loans.brought(30, Duration::from_secs(10));
        assert!(!loans.stands_back());
        loans.brought(0, Duration::from_secs(60));
        loans.due(Duration::from_secs(2), |lent| lent == span(1));
        assert!(!loans.stands_back(), "nobody fetches anything any more");
    }

    #[test]
    fn where_deputies_fail_nothing_more_is_lent() {
        let mut loans = begun();
        for nth in 0..3 {
            assert_eq!(loans.may_lend(peer(7)), A_LITTLE);
            loans.lend(span(nth), peer(1), Duration::ZERO);
            assert_eq!(loans.recall(nth * 10 + 3, peer(1), Duration::ZERO), [span(nth)]);
        }
        assert_eq!(loans.may_lend(peer(7)), 0);
        let mut loans = begun();
        loans.lend(span(1), peer(2), Duration::ZERO);
        assert_eq!(loans.end(), [span(1)]);
        assert!(loans.is_empty() && loans.may_lend(peer(2)) == 0);
    }
}
