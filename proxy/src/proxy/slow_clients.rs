//! How slowly a client may take its answer: whoever takes almost nothing would hold the blob and its place for ever.

use std::time::Duration;

use tokio::time::Instant;

/// What a client has taken of late.
pub(super) struct SlowClientDetector {
    bytes: u64,
    since: Instant,
}

/// A client that takes less than [`ENOUGH`] bytes in this time, or not what is left, is gone.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

const ENOUGH: u64 = 256 * 1024;

impl SlowClientDetector {
    pub(super) fn begin() -> Self {
        Self { bytes: 0, since: Instant::now() }
    }

    /// When patience ends.
    pub(super) fn until(&self) -> Instant {
        self.since + PATIENCE
    }

    pub(super) fn took(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= ENOUGH {
            *self = Self::begin();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_is_not_enough() {
        for (bytes, is_enough) in [(1, false), (ENOUGH / 10 - 1, false), (ENOUGH / 4, true), (ENOUGH * 8, true)] {
            let mut taking = SlowClientDetector::begin();
            for _ in 0..10 {
                sleep(PATIENCE / 9).await;
                taking.took(bytes);
            }
            assert_eq!(Instant::now() < taking.until(), is_enough, "{bytes} bytes every half minute");
        }
    }
}
