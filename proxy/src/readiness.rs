//! Whether this process has begun, and whether it is about to end.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether clients should be sent here: true between the start line and the stop signal.
#[derive(Default)]
pub struct Readiness {
    begun: AtomicBool,
    ended: AtomicBool,
}

impl Readiness {
    pub fn get(&self) -> bool {
        self.begun.load(Ordering::Acquire) && !self.has_ended()
    }

    pub fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }

    /// For ever, also where it has not begun yet.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}
