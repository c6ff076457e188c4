//! The number of connections of a blob, doubled while that raises the throughput.
//!
//! | state | after a measurement | next state |
//! |---|---|---|
//! | start | any throughput | try, with twice the connections |
//! | try | less than [`MIN_GAIN`] times as fast as before | rest, with half the connections |
//! | try | faster | try, with twice the connections |
//! | rest | [`PAUSE`] has passed | try, with twice the connections |
//! | start, try, rest | twice the connections would exceed the maximum | rest |
//! | any | the upstream refuses a connection | start, with at most the connections that it accepted |

use std::time::Duration;

use tokio::time::Instant;

use crate::times::PAUSE;

/// Duration of one throughput measurement. Larger: more connections come later. Smaller: ordinary variation counts as a
/// change.
const MEASUREMENT_TIME: Duration = Duration::from_millis(300);

/// Time for new connections to receive their first byte; the measurement begins after that in any case. Larger: one
/// stuck connection delays the next step. Smaller: connections that are still opening count as useless.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(2);

/// Minimum gain in throughput from twice the connections. Larger: useful connections are closed. Smaller: useless ones
/// are kept.
const MIN_GAIN: f64 = 1.25;

/// The number of connections of a blob.
pub(super) enum ConnectionCount {
    Adaptive(ConnectionScaler),
    Fixed(usize),
}

impl ConnectionCount {
    /// The number of connections to use.
    pub(super) fn lanes(&self) -> usize {
        match self {
            Self::Adaptive(scaler) => scaler.lanes(),
            Self::Fixed(lanes) => *lanes,
        }
    }

    pub(super) fn is_fixed(&self) -> bool {
        matches!(self, Self::Fixed(_))
    }

    /// Sets the maximum: the upstream accepts no more connections.
    pub(super) fn limit(&mut self, max: usize) {
        if let Self::Adaptive(scaler) = self {
            scaler.limit(max);
        }
    }

    /// Measures `bytes`, the total so far, which `busy` connections receive.
    pub(super) fn observe(&mut self, now: Instant, bytes: u64, busy: usize) {
        if let Self::Adaptive(scaler) = self {
            scaler.observe(now, bytes, busy);
        }
    }
}

/// Doubles the connections, and halves them again if that did not help.
pub struct ConnectionScaler {
    lanes: usize,
    max: usize,
    step: ScaleStep,
    /// When the present number was first used.
    stepped: Option<Instant>,
    /// When the present measurement began, and the bytes by then.
    since: Option<(Instant, u64)>,
}

enum ScaleStep {
    /// Nothing is measured yet.
    Start,
    /// The present number is on trial; the throughput before it was this, in bytes a second.
    Try {
        before: f64,
    },
    Rest {
        until: Instant,
    },
}

impl ConnectionScaler {
    pub fn new(max: usize) -> Self {
        Self { lanes: 1, max, step: ScaleStep::Start, stepped: None, since: None }
    }

    /// The number of connections to use.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Sets the maximum: the upstream accepts no more connections.
    fn limit(&mut self, max: usize) {
        self.max = max.max(1);
        self.lanes = self.lanes.min(self.max);
        (self.step, self.stepped, self.since) = (ScaleStep::Start, None, None);
    }

    /// Measures `bytes`, the total so far, which `busy` connections receive.
    pub fn observe(&mut self, now: Instant, bytes: u64, busy: usize) {
        let stepped = *self.stepped.get_or_insert(now);
        let Some((since, before)) = self.since else {
            // The measurement begins when all connections receive bytes.
            if busy >= self.lanes || now.duration_since(stepped) > FIRST_BYTE_TIMEOUT {
                self.since = Some((now, bytes));
            }
            return;
        };
        let elapsed = now.duration_since(since);
        if elapsed < MEASUREMENT_TIME {
            return;
        }
        (self.since, self.stepped) = (None, None);
        #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact")]
        let rate = (bytes - before) as f64 / elapsed.as_secs_f64();
        match self.step {
            ScaleStep::Try { before } if rate < before * MIN_GAIN => {
                self.lanes /= 2;
                self.step = ScaleStep::Rest { until: now + PAUSE };
            }
            ScaleStep::Rest { until } if now < until => {}
            _ if self.lanes * 2 > self.max => self.step = ScaleStep::Rest { until: now + PAUSE },
            _ => {
                self.step = ScaleStep::Try { before: rate };
                self.lanes *= 2;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates some seconds; `rate` is the throughput of a number of connections, in bytes a second.
    fn scale(max: usize, seconds: u64, rate: impl Fn(usize) -> u64) -> (ConnectionScaler, usize) {
        let (mut scaler, mut now, mut bytes, mut highest) = (ConnectionScaler::new(max), Instant::now(), 0, 1);
        for _ in 0..seconds * 10 {
            now += Duration::from_millis(100);
            bytes += rate(scaler.lanes) / 10;
            scaler.observe(now, bytes, scaler.lanes);
            highest = highest.max(scaler.lanes);
        }
        (scaler, highest)
    }

    #[test]
    fn per_connection_limit_adds_connections() {
        assert_eq!(scale(8, 3, |lanes| 40_000_000 * lanes as u64).0.lanes, 8);
        assert_eq!(scale(4, 3, |lanes| 40_000_000 * lanes as u64).0.lanes, 4);
    }

    #[test]
    fn shared_limit_removes_connections() {
        let (ended, highest) = scale(8, 3, |_| 100_000_000);
        assert_eq!((ended.lanes, highest), (1, 2));
        let (ended, highest) = scale(8, 3, |lanes| 40_000_000 * (lanes as u64).min(3));
        assert_eq!((ended.lanes, highest), (4, 8), "three would suffice, four is the nearest");
    }

    #[test]
    fn scaler_respects_limit_and_opening_connections() {
        let (mut ended, _) = scale(8, 3, |lanes| 40_000_000 * lanes as u64);
        ended.limit(3);
        assert_eq!(ended.lanes, 3);
        let mut trying = scale(8, 1, |lanes| 40_000_000 * lanes as u64).0;
        trying.limit(1);
        let now = Instant::now() + Duration::from_secs(60);
        (0..100).for_each(|nth| trying.observe(now + Duration::from_millis(nth * 100), 0, 1));
        assert_eq!(trying.lanes, 1);
        let mut opening = ConnectionScaler::new(8);
        let now = Instant::now();
        (0..20).for_each(|nth| opening.observe(now + Duration::from_millis(nth * 100), nth * 1_000_000, 0));
        assert_eq!(opening.lanes, 1);
    }
}
