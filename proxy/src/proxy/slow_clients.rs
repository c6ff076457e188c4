//! Minimum rate at which a client must read: one that reads almost nothing would hold the blob and its permits forever.

use std::time::Duration;

use tokio::time::Instant;

/// How much a client has read in the current window.
pub(super) struct SlowClientDetector {
    bytes: u64,
    since: Instant,
}

/// A client that reads less than [`MIN_WINDOW_BYTES`] in this time, or not the rest, is disconnected. Larger: stalled
/// clients hold resources longer. Smaller: slow links are cut off.
pub(super) const CLIENT_STALL_TIMEOUT: Duration = Duration::from_secs(300);

const MIN_WINDOW_BYTES: u64 = 256 * 1024;

impl SlowClientDetector {
    pub(super) fn start() -> Self {
        Self { bytes: 0, since: Instant::now() }
    }

    /// When the client is disconnected if it has not read enough.
    pub(super) fn deadline(&self) -> Instant {
        self.since + CLIENT_STALL_TIMEOUT
    }

    /// Moves the window by a time in which nothing was to be read.
    pub(super) fn excuse(&mut self, time: Duration) {
        self.since += time;
    }

    pub(super) fn record(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= MIN_WINDOW_BYTES {
            *self = Self::start();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn client_below_min_window_bytes_times_out() {
        for (bytes, is_connected) in
            [(1, false), (MIN_WINDOW_BYTES / 10 - 1, false), (MIN_WINDOW_BYTES / 4, true), (MIN_WINDOW_BYTES * 8, true)]
        {
            let mut detector = SlowClientDetector::start();
            for _ in 0..10 {
                sleep(CLIENT_STALL_TIMEOUT / 9).await;
                detector.record(bytes);
            }
            assert_eq!(Instant::now() < detector.deadline(), is_connected, "{bytes} bytes every half minute");
        }
    }
}
