//! The disk budget. Bytes count until the last descriptor of their file is closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::IntGauge;

/// A limit in bytes, and how much of it is taken.
pub(super) struct Budget {
    limit: u64,
    /// The limit, or less if other programs need space on the file system.
    ceiling: AtomicU64,
    used: AtomicU64,
    gauge: IntGauge,
}

/// Reserved bytes of a budget, returned on drop.
pub(super) struct Charge {
    bytes: AtomicU64,
    budget: Arc<Budget>,
}

/// Neither the budget nor the disk has room, and nothing more can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no space in the cache")]
pub struct NoSpace;

impl Budget {
    pub(super) fn new(limit: u64, gauge: IntGauge) -> Arc<Self> {
        Arc::new(Self { limit, ceiling: AtomicU64::new(limit), used: AtomicU64::new(0), gauge })
    }

    /// Bytes that may be in use now.
    pub(super) fn limit(&self) -> u64 {
        self.ceiling.load(Ordering::Acquire)
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Leaves space to other programs: at most `bytes` may be in use, and never more than the configured limit.
    pub(super) fn yield_to(&self, bytes: u64) {
        self.ceiling.store(bytes.min(self.limit), Ordering::Release);
    }

    /// Reserves bytes if they fit.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Charge, NoSpace> {
        let limit = self.limit();
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) {
            Ok(_) => Ok(self.charge(bytes)),
            Err(_) => Err(NoSpace),
        }
    }

    /// Charges bytes that are on disk already, even beyond the limit.
    pub(super) fn account(self: &Arc<Self>, bytes: u64) -> Charge {
        self.used.fetch_add(bytes, Ordering::AcqRel);
        self.charge(bytes)
    }

    pub(super) fn free(&self) -> u64 {
        self.limit().saturating_sub(self.used())
    }

    fn charge(self: &Arc<Self>, bytes: u64) -> Charge {
        self.update_gauge();
        Charge { bytes: bytes.into(), budget: self.clone() }
    }

    fn update_gauge(&self) {
        self.gauge.set(i64::try_from(self.used()).unwrap_or(i64::MAX));
    }
}

impl Charge {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Reserves more bytes for this charge.
    pub(super) fn grow(&self, more: u64) -> Result<(), NoSpace> {
        let mut charge = self.budget.reserve(more)?;
        self.bytes.fetch_add(std::mem::take(charge.bytes.get_mut()), Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes(), Ordering::AcqRel);
        self.budget.update_gauge();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_charge_frees_its_bytes() {
        let budget = Budget::new(10, IntGauge::new("x", "x").unwrap());
        let six = budget.reserve(6).unwrap();
        assert_eq!(budget.reserve(5).err(), Some(NoSpace));
        let four = budget.reserve(4).unwrap();
        drop(six);
        assert!(budget.reserve(u64::MAX).is_err());
        let found = budget.account(20);
        assert_eq!((budget.used(), budget.free()), (24, 0));
        drop((found, four));
        let growing = budget.reserve(1).unwrap();
        assert!(growing.grow(10).is_err() && growing.grow(9).is_ok());
        assert_eq!((growing.bytes(), budget.used()), (10, 10));
        drop(growing);
        assert!(budget.reserve(10).is_ok());
    }

    #[test]
    fn yielded_limit_can_be_raised_again() {
        let budget = Budget::new(10, IntGauge::new("x", "x").unwrap());
        let _eight = budget.reserve(8).unwrap();
        budget.yield_to(5);
        assert_eq!((budget.limit(), budget.free()), (5, 0));
        assert!(budget.reserve(1).is_err());
        budget.yield_to(u64::MAX);
        assert_eq!((budget.limit(), budget.free()), (10, 2));
    }
}
