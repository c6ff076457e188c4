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

/// With the last ranges it does not grow. Packets that are lost are sent again within that time.
const HURRY: Duration = Duration::from_millis(500);

impl Pace {
    /// A connection brought so many bytes, for which it took so long.
    pub fn brought(&mut self, bytes: u64, time: Duration) {
        self.bytes += bytes;
        self.time += time;
    }

    /// Whether to leave a connection that has brought so many bytes in all, in this time, because the
    /// others are far faster.
    pub fn leaves(&self, bytes: u64, time: Duration) -> bool {
        time >= PATIENCE * (1 + self.left).min(MAX_PATIENCE) && rate(bytes, time) * FAR < self.others(bytes, time)
    }

    /// The same where everything else is on its way, so that whoever is asked instead has nothing else to do: also of
    /// one that has brought nothing `since`.
    pub fn leaves_soon(&self, bytes: u64, time: Duration, since: Duration) -> bool {
        time + since >= HURRY && rate(bytes, time + since) * FAR < self.others(bytes, time)
    }

    /// How fast the others are beside one that has brought so many bytes.
    fn others(&self, bytes: u64, time: Duration) -> f64 {
        rate(self.bytes.saturating_sub(bytes), self.time.saturating_sub(time))
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
    fn who_is_waited_for_alone_is_left_soon() {
        let mut pace = Pace::default();
        pace.brought(1_000_000, SECOND / 10);
        assert!(!pace.leaves_soon(0, Duration::ZERO, SECOND / 4), "it may just have lost a packet");
        assert!(pace.leaves_soon(0, Duration::ZERO, SECOND / 2));
        pace.brought(1_000_000, SECOND / 10);
        assert!(!pace.leaves_soon(1_000_000, SECOND / 10, SECOND / 5), "it is as fast as the others");
        assert!(pace.leaves_soon(1_000_000, SECOND / 10, SECOND), "it was");
        assert!(!Pace::default().leaves_soon(0, Duration::ZERO, SECOND), "there are no others");
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
