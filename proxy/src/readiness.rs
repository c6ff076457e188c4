//! Whether this process has started, and whether it is about to stop.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process should get client requests: true between the start line and the stop signal.
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

    /// Final, even if the process has not started yet.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}
