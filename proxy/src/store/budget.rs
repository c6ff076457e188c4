//! Bytes on disk, counted until the last descriptor closes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntGauge;

/// A limit in bytes, and how much of it is taken.
pub(super) struct Budget {
    limit: u64,
    used: AtomicU64,
    gauge: IntGauge,
}

/// A share of a budget, given back when dropped.
pub(super) struct Charge {
    bytes: u64,
    budget: Arc<Budget>,
}

/// Neither the budget nor the disk has room, and nothing more can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no space in the cache")]
pub struct NoSpace;

impl Budget {
    pub(super) fn new(limit: u64, gauge: IntGauge) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0), gauge })
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes a share if it fits.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Charge, NoSpace> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        match self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) {
            Ok(_) => Ok(self.charged(bytes)),
            Err(_) => Err(NoSpace),
        }
    }

    /// Takes a share for what is on disk already, even beyond the limit.
    pub(super) fn account(self: &Arc<Self>, bytes: u64) -> Charge {
        self.used.fetch_add(bytes, Ordering::AcqRel);
        self.charged(bytes)
    }

    pub(super) fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used.load(Ordering::Acquire))
    }

    pub(super) fn over(&self) -> bool {
        self.used.load(Ordering::Acquire) > self.limit
    }

    fn charged(self: &Arc<Self>, bytes: u64) -> Charge {
        self.show();
        Charge { bytes, budget: self.clone() }
    }

    fn show(&self) {
        self.gauge.set(i64::try_from(self.used.load(Ordering::Acquire)).unwrap_or(i64::MAX));
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::AcqRel);
        self.budget.show();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_come_back() {
        let budget = Budget::new(10, IntGauge::new("x", "x").unwrap());
        let six = budget.reserve(6).unwrap();
        assert_eq!(budget.reserve(5).err(), Some(NoSpace));
        let four = budget.reserve(4).unwrap();
        drop(six);
        assert!(budget.reserve(u64::MAX).is_err());
        assert!(!budget.over());
        let found = budget.account(20);
        assert!(budget.over());
        drop((found, four));
        assert!(budget.reserve(10).is_ok());
    }
}
