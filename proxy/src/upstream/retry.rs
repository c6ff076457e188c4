//! Retries: a few, after jittered pauses, and within a budget, so that retries do not become the load.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The retries that may be spent. Each request earns a fifth of a retry.
pub(super) struct RetryBudget {
    fifths: AtomicI64,
}

/// What a retry costs. More: fewer retries per request.
const RETRY_FIFTHS: i64 = 5;
/// What can be saved up. More: more retries at the start of an outage.
const MAX_FIFTHS: i64 = 50 * RETRY_FIFTHS;

/// Attempts of a request, after short pauses or after the limits that the upstream names. More: an upstream in an
/// outage gets more requests. Fewer: a short failure reaches the client.
pub(super) const ATTEMPTS: u32 = 3;

/// Bound of failing upstream requests per client request: a client without a fallback waits for an outage to end.
/// Redirect hops and token requests are not counted. More: an outage multiplies the load. Fewer: clients get its
/// errors.
const MAX_UPSTREAM_REQUESTS: u32 = 12;

/// Rounds of `ATTEMPTS` for a client without a fallback, if the upstream responds with an error or a limit.
pub const ROUNDS: u32 = MAX_UPSTREAM_REQUESTS / ATTEMPTS;

impl RetryBudget {
    pub(super) fn new() -> Self {
        Self { fifths: AtomicI64::new(10 * RETRY_FIFTHS) }
    }

    /// Called once per request.
    pub(super) fn earn(&self) {
        let _ = self
            .fifths
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |fifths| (fifths < MAX_FIFTHS).then_some(fifths + 1));
    }

    /// The pause after this many attempts. None: give up.
    pub(super) fn pause(&self, attempts: u32, deadline: Instant) -> Option<Duration> {
        let most = 50 << attempts.min(8);
        let pause = Duration::from_millis(fastrand::u64(most / 2..=most));
        if attempts >= ATTEMPTS || Instant::now() + pause >= deadline {
            return None;
        }
        let spend = |fifths: i64| (fifths >= RETRY_FIFTHS).then_some(fifths - RETRY_FIFTHS);
        self.fifths.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).ok().map(|_| pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn retries_are_delayed_and_budgeted() {
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
