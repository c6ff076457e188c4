//! How many connections a blob comes by: twice as many for as long as that makes it faster.

use std::time::Duration;

use tokio::time::Instant;

use crate::times::PAUSE;

/// Over which a rate is measured.
const MEASURED_OVER: Duration = Duration::from_millis(300);

/// A new connection has this long to bring its first byte.
const OPENING: Duration = Duration::from_secs(2);

/// Twice the connections have to bring this much more.
const WORTHWHILE: f64 = 1.25;

/// How many connections a blob comes by.
pub(super) enum ConnectionCount {
    Climbing(ConnectionScaler),
    Fixed(usize),
}

impl ConnectionCount {
    /// How many connections there should be.
    pub(super) fn lanes(&self) -> usize {
        match self {
            Self::Climbing(climb) => climb.lanes(),
            Self::Fixed(lanes) => *lanes,
        }
    }

    pub(super) fn is_fixed(&self) -> bool {
        matches!(self, Self::Fixed(_))
    }

    /// No more than this many can be had.
    pub(super) fn limit(&mut self, most: usize) {
        if let Self::Climbing(climb) = self {
            climb.limit(most);
        }
    }

    /// Looks at the bytes that came so far; `busy` connections have brought some of them.
    pub(super) fn observe(&mut self, now: Instant, bytes: u64, busy: usize) {
        if let Self::Climbing(climb) = self {
            climb.observe(now, bytes, busy);
        }
    }
}

/// Climbs by doubling, and steps back where that brought nothing.
pub struct ConnectionScaler {
    lanes: usize,
    most: usize,
    step: ScaleStep,
    /// When the present number was first wanted.
    stepped: Option<Instant>,
    /// Where the present measurement began: when, and bytes by then.
    since: Option<(Instant, u64)>,
}

enum ScaleStep {
    /// Nothing is known yet.
    Start,
    /// The present number is tried; before it the rate was this, in bytes a second.
    Try {
        before: f64,
    },
    Rest {
        until: Instant,
    },
}

impl ConnectionScaler {
    pub fn new(most: usize) -> Self {
        Self { lanes: 1, most, step: ScaleStep::Start, stepped: None, since: None }
    }

    /// How many there should be.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// No more than this many can be had.
    fn limit(&mut self, most: usize) {
        self.most = most.max(1);
        self.lanes = self.lanes.min(self.most);
        (self.step, self.stepped, self.since) = (ScaleStep::Start, None, None);
    }

    /// Looks at the bytes that came so far; `busy` connections have brought some of them.
    pub fn observe(&mut self, now: Instant, bytes: u64, busy: usize) {
        let stepped = *self.stepped.get_or_insert(now);
        let Some((since, before)) = self.since else {
            // It counts from when all of them bring bytes.
            if busy >= self.lanes || now.duration_since(stepped) > OPENING {
                self.since = Some((now, bytes));
            }
            return;
        };
        let elapsed = now.duration_since(since);
        if elapsed < MEASURED_OVER {
            return;
        }
        (self.since, self.stepped) = (None, None);
        #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact")]
        let rate = (bytes - before) as f64 / elapsed.as_secs_f64();
        match self.step {
            ScaleStep::Try { before } if rate < before * WORTHWHILE => {
                self.lanes /= 2;
                self.step = ScaleStep::Rest { until: now + PAUSE };
            }
            ScaleStep::Rest { until } if now < until => {}
            _ if self.lanes * 2 > self.most => self.step = ScaleStep::Rest { until: now + PAUSE },
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

    /// Runs for some seconds where `rate` tells the bytes a second of so many connections.
    fn climb(most: usize, seconds: u64, rate: impl Fn(usize) -> u64) -> (ConnectionScaler, usize) {
        let (mut climb, mut now, mut bytes, mut highest) = (ConnectionScaler::new(most), Instant::now(), 0, 1);
        for _ in 0..seconds * 10 {
            now += Duration::from_millis(100);
            bytes += rate(climb.lanes) / 10;
            climb.observe(now, bytes, climb.lanes);
            highest = highest.max(climb.lanes);
        }
        (climb, highest)
    }

    #[test]
    fn climbs_where_each_connection_is_limited() {
        assert_eq!(climb(8, 3, |lanes| 40_000_000 * lanes as u64).0.lanes, 8);
        assert_eq!(climb(4, 3, |lanes| 40_000_000 * lanes as u64).0.lanes, 4);
    }

    #[test]
    fn steps_back_where_all_share_a_limit() {
        let (ended, highest) = climb(8, 3, |_| 100_000_000);
        assert_eq!((ended.lanes, highest), (1, 2));
        let (ended, highest) = climb(8, 3, |lanes| 40_000_000 * (lanes as u64).min(3));
        assert_eq!((ended.lanes, highest), (4, 8), "three would do, four are near");
    }

    #[test]
    fn keeps_to_what_can_be_had_and_waits_for_what_is_opening() {
        let (mut ended, _) = climb(8, 3, |lanes| 40_000_000 * lanes as u64);
        ended.limit(3);
        assert_eq!(ended.lanes, 3);
        let mut trying = climb(8, 1, |lanes| 40_000_000 * lanes as u64).0;
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
