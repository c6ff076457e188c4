//! Which of several peers is left far behind by the others: it is left where others could be asked.

use std::time::Duration;

/// What the connections of one blob have brought, and how long they took for it, each counted for itself.
#[derive(Default)]
pub struct Pace {
    bytes: u64,
    time: Duration,
    left: u32,
}

/// How much slower than the others is far behind.
const FAR: f64 = 4.0;

/// Before that nobody knows. After each one that was left it takes as much longer: there may be nobody
/// who is faster.
const PATIENCE: Duration = Duration::from_millis(500);
const MAX_PATIENCE: u32 = 20;

impl Pace {
    /// A connection brought so many bytes, for which it took so long.
    pub fn brought(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    /// Whether to leave a connection that has brought so many bytes in all, in this time, because the
    /// others are far faster.
    pub fn leaves(&self, bytes: u64, time: Duration) -> bool {
        if time < PATIENCE * (1 + self.left).min(MAX_PATIENCE) {
            return false;
        }
        let others = rate(self.bytes.saturating_sub(bytes), self.time.saturating_sub(time));
        rate(bytes, time) * FAR < others
    }

    /// One was left.
    pub fn left(&mut self) {
        self.left += 1;
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
    fn who_is_far_slower_than_the_others_is_left() {
        let mut pace = Pace::default();
        pace.brought(1000, SECOND);
        assert!(!pace.leaves(1000, SECOND), "there are no others");
        pace.brought(100_000, SECOND);
        assert!(pace.leaves(1000, SECOND));
        let mut pace = Pace::default();
        pace.brought(1000, SECOND);
        pace.brought(3000, SECOND);
        assert!(!pace.leaves(1000, SECOND), "slower, but not by far");
        pace.brought(200_000, SECOND);
        assert!(!pace.leaves(100, SECOND / 4), "nobody knows yet");
    }

    #[test]
    fn patience_grows_where_leaving_does_not_help() {
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
