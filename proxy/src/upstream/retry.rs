//! When to ask again: after a jittered pause, a few times, and never so often that retries become
//! the load.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Retries that may be spent. Each request earns a fifth of one.
pub(super) struct RetryBudget {
    fifths: AtomicI64,
}

const COST: i64 = 5;
const MOST: i64 = 50 * COST;

/// How often a request that fails is sent at once, or after the limits that the upstream names. More: an upstream in trouble gets
/// more requests. Fewer: a short failure reaches the client.
pub(super) const ATTEMPTS: u32 = 3;

/// Requests to an upstream that one client request causes at most where each of them fails: a client without a fall-back waits for
/// an outage to end. Not counted are those that each of them may cause elsewhere: hops of redirects, and token requests.
const MAX_UPSTREAM_REQUESTS: u32 = 12;

/// How often a client without a fall-back has an upstream asked that answers, with an error or a limit.
pub const ROUNDS: u32 = MAX_UPSTREAM_REQUESTS / ATTEMPTS;

impl RetryBudget {
    pub(super) fn new() -> Self {
        Self { fifths: AtomicI64::new(10 * COST) }
    }

    /// Called once a request.
    pub(super) fn earn(&self) {
        let _ = self
            .fifths
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |fifths| (fifths < MOST).then_some(fifths + 1));
    }

    /// How long to wait after so many attempts; None: give up.
    pub(super) fn pause(&self, attempts: u32, deadline: Instant) -> Option<Duration> {
        let most = 50 << attempts.min(8);
        let pause = Duration::from_millis(fastrand::u64(most / 2..=most));
        if attempts >= ATTEMPTS || Instant::now() + pause >= deadline {
            return None;
        }
        let spend = |fifths: i64| (fifths >= COST).then_some(fifths - COST);
        self.fifths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).ok().map(|_| pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn retries_are_few_late_and_paid_for() {
        let budget = RetryBudget::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        let first = budget.pause(1, deadline).unwrap();
        let second = budget.pause(2, deadline).unwrap();
        assert!((50..=100).contains(&first.as_millis()) && (100..=200).contains(&second.as_millis()));
        assert_eq!(budget.pause(3, deadline), None);
        assert_eq!(budget.pause(1, Instant::now()), None, "no time left");
        let spent = (0..100).filter(|_| budget.pause(1, deadline).is_some()).count();
        assert_eq!(spent, 8, "ten at the start, two spent above");
        (0..5).for_each(|_| budget.earn());
        assert!(budget.pause(1, deadline).is_some() && budget.pause(1, deadline).is_none());
    }
}
