//! Ranges that an owner lends to other peers. The peer that requests a range becomes its deputy: it downloads the range
//! from the upstream, and the owner gets it from there. An owner that is slow, or far from the upstream, then slows no
//! other node, and still each byte is downloaded once.
//!
//! | loan | event | then |
//! |---|---|---|
//! | open | a peer announces the whole range | the owner downloads it from that peer |
//! | open | [`STALL_TIMEOUT`] passes | the owner downloads it; the deputy's rate falls |
//! | open | its deputy requests it again, or another peer after [`NO_PROGRESS_TIMEOUT`] | failed: the owner downloads it |
//! | open | the sources turn out not to support ranges | all loans end, and no range is lent any more |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::oci::Span;
use crate::times::{NO_PROGRESS_TIMEOUT, STALL_TIMEOUT};

/// Open loans of one blob at the same time: a few more than the connections that an owner opens itself. Larger: more
/// ranges depend on deputies. Smaller: a slow owner slows the others.
const MAX_LOANS: usize = 12;

/// Peers that become deputies of one blob. Larger: of a thousand peers most requests would come from a new deputy,
/// whose speed is unknown. Smaller: fewer connections to the upstream.
const MAX_DEPUTIES: usize = 8;

/// Open loans of one peer: as many ranges as it downloads at a time, once it has delivered [`FIRST_LOAN_BYTES`] and is
/// not far slower than others. Larger: more is lost if the peer fails. Smaller: its connections idle.
const MAX_LOANS_PER_DEPUTY: usize = 4;

/// Size of the first loan of a peer, in bytes. Larger: a slow or broken deputy delays more. Smaller: too little to
/// measure its speed.
const FIRST_LOAN_BYTES: u64 = 2 * 1024 * 1024;

/// The same as [`MAX_LOANS`], for an owner that stands back: the deputies do all of the work.
const MAX_LOANS_OF_SLOW_OWNER: usize = 32;

/// An owner this many times slower than its deputies leaves the upstream to them; a deputy this many times slower than
/// the others gets no more loans. Larger: slow nodes take part for longer. Smaller: ordinary variation excludes nodes.
const SLOW_FACTOR: f64 = 4.0;

/// Loans that may fail before no more are lent. One failure is no evidence: the upstream may reject one deputy and not
/// this node. Larger: more readers wait for failed loans. Smaller: one bad deputy ends lending.
const MAX_FAILED_LOANS: usize = 3;

/// Smallest blob of which ranges are lent, in bytes. Larger: medium blobs depend on the owner alone. Smaller:
/// connections cost more than they save.
pub(super) const MIN_LENDING_BLOB_BYTES: u64 = 64 * 1024 * 1024;

/// The loans of one blob by its owner.
#[derive(Default)]
pub(super) struct Loans {
    /// Whether lending is enabled: not before the source is known to support ranges.
    enabled: bool,
    open: Vec<Loan>,
    /// How many loans failed.
    failed: usize,
    /// Throughput of one connection: of this node, and of its deputies.
    own_rate: Rate,
    deputies_rate: Rate,
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
    /// Enables lending.
    pub(super) fn begin(&mut self) {
        self.enabled = true;
    }

    /// The size of the next loan to this peer, in bytes; 0: none.
    pub(super) fn lendable_bytes(&self, to: SocketAddr) -> u64 {
        let open_to_peer = self.open.iter().filter(|loan| loan.to == to).count();
        let (max_to_peer, largest) = match self.deputies.get(&to) {
            None if self.deputies.len() < MAX_DEPUTIES => (1, FIRST_LOAN_BYTES),
            None => (0, 0),
            Some(pace) if pace.time.is_zero() => (1, FIRST_LOAN_BYTES),
            Some(pace) if pace.bytes == 0 || pace.rate() * SLOW_FACTOR < self.deputies_rate.without(*pace).rate() => {
                (0, 0)
            }
            Some(_) => (MAX_LOANS_PER_DEPUTY, u64::MAX),
        };
        let max_loans = if self.defers_to_deputies() { MAX_LOANS_OF_SLOW_OWNER } else { MAX_LOANS };
        let may =
            self.enabled && self.failed < MAX_FAILED_LOANS && self.open.len() < max_loans && open_to_peer < max_to_peer;
        if may { largest } else { 0 }
    }

    /// Whether a peer should wait for a later loan.
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

    /// Whether the byte at `at` is lent to this peer.
    pub(super) fn covers_for(&self, at: u64, to: SocketAddr) -> bool {
        self.open.iter().any(|loan| loan.covers(at) && loan.to == to)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Ends the loans whose range a peer `has`, and those that are overdue.
    pub(super) fn due(&mut self, now: Duration, has: impl Fn(Span) -> bool) -> Vec<Span> {
        for loan in self.open.iter().filter(|loan| has(loan.span)) {
            let (bytes, time) = (loan.span.len(), now.saturating_sub(loan.since));
            self.deputies_rate.add(bytes, time);
            self.deputies.entry(loan.to).or_default().add(bytes, time);
        }
        let come = self.take(|loan| has(loan.span));
        // A deputy that delivers nothing gets no more loans.
        for loan in self.open.iter().filter(|loan| now >= loan.since + STALL_TIMEOUT) {
            self.deputies_rate.add(0, STALL_TIMEOUT);
            self.deputies.entry(loan.to).or_default().add(0, STALL_TIMEOUT);
        }
        let overdue = self.take(|loan| now >= loan.since + STALL_TIMEOUT);
        [come, overdue].concat()
    }

    /// The upstream sent this node `bytes` in `time`, added up over its connections.
    pub(super) fn brought(&mut self, bytes: u64, time: Duration) {
        self.own_rate.add(bytes, time);
    }

    /// Whether this node should download nothing that its deputies could: they have open loans, and are far faster.
    pub(super) fn defers_to_deputies(&self) -> bool {
        !self.open.is_empty() && self.is_slow()
    }

    /// Whether this node is far slower than its deputies.
    pub(super) fn is_slow(&self) -> bool {
        !self.own_rate.time.is_zero() && self.own_rate.rate() * SLOW_FACTOR < self.deputies_rate.rate()
    }

    /// Ends the loan of the byte at `at` if its deputy requests it, because it cannot download it, or if it is overdue
    /// for another peer.
    pub(super) fn recall(&mut self, at: u64, by: SocketAddr, now: Duration) -> Vec<Span> {
        let failed = self.take(|loan| loan.covers(at) && (loan.to == by || now >= loan.since + NO_PROGRESS_TIMEOUT));
        self.failed += failed.len();
        failed
    }

    /// Ends all loans, and disables lending.
    pub(super) fn end(&mut self) -> Vec<Span> {
        self.enabled = false;
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
    fn add(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    /// The rate of all deputies except one.
    fn without(self, one: Self) -> Self {
        Self { bytes: self.bytes.saturating_sub(one.bytes), time: self.time.saturating_sub(one.time) }
    }

    /// In bytes a second.
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

    fn lending() -> Loans {
        let mut loans = Loans::default();
        assert_eq!(loans.lendable_bytes(peer(1)), 0, "range support is unknown");
        loans.begin();
        loans
    }

    #[test]
    fn lending_stops_at_its_limits() {
        let mut loans = lending();
        for nth in 0..8 {
            let to = peer(u8::try_from(nth).unwrap());
            assert_eq!(loans.lendable_bytes(to), FIRST_LOAN_BYTES);
            loans.lend(span(nth), to, Duration::ZERO);
            assert_eq!(loans.lendable_bytes(to), 0, "one first loan per peer");
            assert!(loans.may_lend_later(to));
        }
        assert_eq!(loans.lendable_bytes(peer(8)), 0, "the limit of deputies");
        assert!(!loans.may_lend_later(peer(8)));
        let due = loans.due(Duration::from_secs(1), |lent| lent.start <= 30);
        assert_eq!(due, [span(0), span(1), span(2), span(3)]);
        for nth in 8..16 {
            let to = peer(u8::try_from(nth % 2).unwrap());
            assert_eq!(loans.lendable_bytes(to), u64::MAX, "a deputy that delivered gets more");
            loans.lend(span(nth), to, Duration::from_secs(1));
        }
        assert!(loans.lendable_bytes(peer(2)) == 0 && !loans.covers(25) && loans.covers(45), "the limit of loans");
    }

    #[test]
    fn slow_deputy_gets_no_more_loans() {
        let mut loans = lending();
        (0..3).for_each(|nth| loans.lend(span(nth), peer(u8::try_from(nth).unwrap()), Duration::ZERO));
        loans.due(Duration::from_secs(1), |lent| lent != span(2));
        assert_eq!(loans.due(Duration::from_secs(9), |_| true), [span(2)]);
        assert_eq!([0, 9, 2].map(|last| loans.lendable_bytes(peer(last))), [u64::MAX, FIRST_LOAN_BYTES, 0]);
    }

    #[test]
    fn overdue_loan_is_revoked() {
        let mut loans = lending();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.lend(span(1), peer(2), NO_PROGRESS_TIMEOUT);
        assert!(loans.recall(5, peer(3), NO_PROGRESS_TIMEOUT / 2).is_empty(), "the loan is new");
        assert_eq!(loans.recall(5, peer(3), NO_PROGRESS_TIMEOUT), [span(0)]);
        assert_eq!(loans.lendable_bytes(peer(1)), FIRST_LOAN_BYTES, "another loan is allowed");
        assert!(loans.due(STALL_TIMEOUT, NEVER).is_empty());
        assert_eq!(loans.due(STALL_TIMEOUT + NO_PROGRESS_TIMEOUT, NEVER), [span(1)]);
    }

    #[test]
    fn stalled_deputy_gets_no_more_loans() {
        let mut loans = lending();
        (0..2).for_each(|nth| loans.lend(span(nth), peer(u8::try_from(nth).unwrap()), Duration::ZERO));
        loans.due(Duration::from_secs(1), |lent| lent == span(0));
        assert_eq!(loans.due(STALL_TIMEOUT, NEVER), [span(1)]);
        assert_eq!([0, 1].map(|last| loans.lendable_bytes(peer(last))), [u64::MAX, 0]);
    }

    #[test]
    fn slow_owner_stands_back_while_deputies_download() {
        let mut loans = lending();
        loans.lend(span(0), peer(1), Duration::ZERO);
        loans.lend(span(1), peer(2), Duration::ZERO);
        loans.brought(10, Duration::from_secs(10));
        assert!(!loans.defers_to_deputies(), "the rate of the deputies is unknown");
        loans.due(Duration::from_secs(2), |lent| lent == span(0));
        assert!(loans.defers_to_deputies(), "five bytes a second against one");
        loans.brought(30, Duration::from_secs(10));
        assert!(!loans.defers_to_deputies());
        loans.brought(0, Duration::from_secs(60));
        loans.due(Duration::from_secs(2), |lent| lent == span(1));
        assert!(!loans.defers_to_deputies(), "no loans are open");
    }

    #[test]
    fn lending_ends_after_failed_loans() {
        let mut loans = lending();
        for nth in 0..3 {
            assert_eq!(loans.lendable_bytes(peer(7)), FIRST_LOAN_BYTES);
            loans.lend(span(nth), peer(1), Duration::ZERO);
            assert_eq!(loans.recall(nth * 10 + 3, peer(1), Duration::ZERO), [span(nth)]);
        }
        assert_eq!(loans.lendable_bytes(peer(7)), 0);
        let mut loans = lending();
        loans.lend(span(1), peer(2), Duration::ZERO);
        assert_eq!(loans.end(), [span(1)]);
        assert!(loans.is_empty() && loans.lendable_bytes(peer(2)) == 0);
    }
}
