//! Detects peers that are far slower than the others, if another source can replace them.

use std::time::Duration;

/// Throughput of the connections of one blob: their bytes, and the sum of their times.
#[derive(Default)]
pub struct Pace {
    bytes: u64,
    time: Duration,
    given_up: u32,
}

/// A connection this many times slower than the others is given up. Larger: slow peers delay blobs for longer. Smaller:
/// ordinary variation makes connections change peers.
const SLOW_FACTOR: f64 = 4.0;

/// Measured time before a connection may be given up. Each connection that was given up adds the same again, up to
/// [`MAX_TIME_FACTOR`] times: there may be no faster peer. Larger: slow peers delay blobs for longer. Smaller: the
/// beginning of a connection counts as its speed.
const MIN_MEASURED_TIME: Duration = Duration::from_millis(500);
const MAX_TIME_FACTOR: u32 = 20;

/// The same for the last ranges; it does not grow. Larger: the last range of a slow peer delays the blob. Smaller: lost
/// packets, which are retransmitted within this time, count as slowness.
const LAST_RANGE_TIME: Duration = Duration::from_millis(500);

impl Pace {
    /// A connection received `bytes` in `time`.
    pub fn brought(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    /// Whether to give up a connection that received `bytes` in `time`, because the others are far faster.
    pub fn leaves(&self, bytes: u64, time: Duration) -> bool {
        time >= MIN_MEASURED_TIME * (1 + self.given_up).min(MAX_TIME_FACTOR)
            && rate(bytes, time) * SLOW_FACTOR < self.others(bytes, time)
    }

    /// The same if no other range is left to request, so that a replacement has nothing else to do. It includes
    /// `since`, the time without a byte.
    pub fn leaves_soon(&self, bytes: u64, time: Duration, since: Duration) -> bool {
        time + since >= LAST_RANGE_TIME && rate(bytes, time + since) * SLOW_FACTOR < self.others(bytes, time)
    }

    /// The throughput of the other connections.
    fn others(&self, bytes: u64, time: Duration) -> f64 {
        rate(self.bytes.saturating_sub(bytes), self.time.saturating_sub(time))
    }

    /// A connection was given up.
    pub fn left(&mut self) {
        self.given_up += 1;
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rate")]
fn rate(bytes: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { bytes as f64 / time.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn far_slower_connection_is_given_up() {
        let mut pace = Pace::default();
        pace.brought(1000, SECOND);
        assert!(!pace.leaves(1000, SECOND), "there are no others");
        pace.brought(100_000, SECOND);
        assert!(pace.leaves(1000, SECOND));
        let mut pace = Pace::default();
        pace.brought(1000, SECOND);
        pace.brought(3000, SECOND);
        assert!(!pace.leaves(1000, SECOND), "slower, but not far slower");
        pace.brought(200_000, SECOND);
        assert!(!pace.leaves(100, SECOND / 4), "measured for too short a time");
    }

    #[test]
    fn slow_last_connection_is_given_up_early() {
        let mut pace = Pace::default();
        pace.brought(1_000_000, SECOND / 10);
        assert!(!pace.leaves_soon(0, Duration::ZERO, SECOND / 4), "it may wait for a retransmission");
        assert!(pace.leaves_soon(0, Duration::ZERO, SECOND / 2));
        pace.brought(1_000_000, SECOND / 10);
        assert!(!pace.leaves_soon(1_000_000, SECOND / 10, SECOND / 5), "it is as fast as the others");
        assert!(pace.leaves_soon(1_000_000, SECOND / 10, SECOND), "it was as fast before");
        assert!(!Pace::default().leaves_soon(0, Duration::ZERO, SECOND), "there are no others");
    }

    #[test]
    fn measured_time_grows_with_each_connection_given_up() {
        let mut pace = Pace::default();
        pace.brought(100_000_000, 100 * SECOND);
        let mut times = Vec::new();
        for _ in 0..4 {
            let mut time = Duration::ZERO;
            while !pace.leaves(0, time) {
                time += SECOND / 10;
            }
            pace.left();
            times.push(time.as_millis());
        }
        assert_eq!(times, [500, 1000, 1500, 2000]);
    }
}
