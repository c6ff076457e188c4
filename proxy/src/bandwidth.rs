//! Bandwidth limits: rates that many connections share, and which connection is served first.
//!
//! A connection reserves bytes before it reads or writes them, and waits while the rate is used up. Waiting connections
//! are served by [`Priority`], within a priority in turn; every [`FAIR_TURN`]th turn goes to the one that waits longest.
//! Bytes that nothing waits for, such as manifests, are charged: the others wait for longer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use http::HeaderName;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

/// What waits for bytes. A higher one is served first; a lower one gets what is left, and a small share at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Nothing: a prefetch, a pin, `dray warm`.
    Background,
    Peer,
    Client,
}

/// How urgent a client's request is, from `u=0` to `u=7` (RFC 9218, section 4.1).
pub const PRIORITY: HeaderName = HeaderName::from_static("priority");

/// The urgency of background work (RFC 9218, section 4.1).
pub const BACKGROUND: &str = "u=7";

/// The priority of a download. It only rises, when a more urgent request joins.
#[derive(Clone)]
pub struct CurrentPriority(Arc<AtomicU8>);

/// A rate that connections share.
pub struct RateLimiter {
    /// Bytes a second; 0: unlimited.
    rate: AtomicU64,
    bucket: Mutex<Bucket>,
    started: Instant,
}

/// A token bucket, and the connections that wait for tokens.
struct Bucket {
    /// In bytes. Negative: more was used than the rate allows so far.
    available: f64,
    refilled: Duration,
    /// The one that waits longest first.
    waiting: VecDeque<Waiter>,
    /// Turns since the last one by waiting time alone.
    turns: u32,
    /// Whether a task serves the waiting connections.
    is_driven: bool,
}

struct Waiter {
    /// It rises while the download waits.
    priority: CurrentPriority,
    bytes: u64,
    granted: oneshot::Sender<Reservation>,
}

/// Bytes that a connection may use. What is left when it is dropped goes back.
struct Reservation {
    limiter: Arc<RateLimiter>,
    bytes: u64,
}

/// One connection's use of limits.
pub struct Throttle {
    limits: Vec<Limit>,
    priority: CurrentPriority,
}

struct Limit {
    limiter: Arc<RateLimiter>,
    reservation: Option<Reservation>,
}

/// Bytes to reserve at a time. Larger: connections take turns less often. Smaller: more wake-ups.
pub const RESERVED_BYTES: u64 = 64 * 1024;

/// One turn in this number goes to the connection that waits longest. Larger: downloads for peers get so little beside
/// those of clients that the peers take them for stalled. Smaller: a prefetch slows the pulls of clients.
const FAIR_TURN: u32 = 8;

/// Used bytes that have to be waited for, as time at the rate. Longer: bytes that did not wait, such as manifests, stop
/// everything else for longer. Shorter: the rate is exceeded by more.
const MAX_DEBT: Duration = Duration::from_secs(1);

/// Unused rate that is kept for a burst. Longer: a second may exceed the rate by more. Shorter: timers that fire late
/// waste a part of the rate.
const BURST: Duration = Duration::from_millis(50);

/// Bounds of the pause between two looks at the bucket. Longer: the rate is used less evenly, and a changed one is
/// noticed later. Shorter: more wake-ups.
const MIN_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(100);

impl Priority {
    /// The priority of a client's request with this header.
    pub fn of_client(header: &str) -> Self {
        let is_background = header.split(',').any(|parameter| parameter.trim() == BACKGROUND);
        if is_background { Self::Background } else { Self::Client }
    }
}

impl CurrentPriority {
    pub fn new(priority: Priority) -> Self {
        Self(Arc::new(AtomicU8::new(priority as u8)))
    }

    pub fn get(&self) -> Priority {
        match self.0.load(Ordering::Relaxed) {
            0 => Priority::Background,
            1 => Priority::Peer,
            _ => Priority::Client,
        }
    }

    pub fn raise(&self, priority: Priority) {
        self.0.fetch_max(priority as u8, Ordering::Relaxed);
    }
}

impl RateLimiter {
    /// `rate` in bytes a second. None: unlimited.
    pub fn new(rate: Option<u64>) -> Self {
        let bucket =
            Bucket { available: 0.0, refilled: Duration::ZERO, waiting: VecDeque::new(), turns: 0, is_driven: false };
        Self { rate: AtomicU64::new(rate.unwrap_or(0)), bucket: Mutex::new(bucket), started: Instant::now() }
    }

    /// Applies to all connections within [`MAX_PAUSE`].
    pub fn set_rate(&self, rate: Option<u64>) {
        self.rate.store(rate.unwrap_or(0), Ordering::Relaxed);
    }

    /// Waits until `bytes` may be used. None: there is no limit.
    async fn reserve(self: &Arc<Self>, priority: &CurrentPriority, bytes: u64) -> Option<Reservation> {
        if self.rate.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let granted = {
            let mut bucket = self.bucket.lock();
            self.refill(&mut bucket);
            if bucket.available > 0.0 && bucket.waiting.is_empty() {
                return Some(self.take(&mut bucket, bytes));
            }
            let (sender, granted) = oneshot::channel();
            bucket.waiting.push_back(Waiter { priority: priority.clone(), bytes, granted: sender });
            if !bucket.is_driven {
                bucket.is_driven = true;
                tokio::spawn(self.clone().drive());
            }
            granted
        };
        granted.await.ok()
    }

    /// Counts bytes that did not wait.
    fn charge(&self, bytes: u64) {
        if self.rate.load(Ordering::Relaxed) > 0 {
            let mut bucket = self.bucket.lock();
            self.refill(&mut bucket);
            let rate = to_f64(self.rate.load(Ordering::Relaxed));
            let least = (-rate * MAX_DEBT.as_secs_f64()).min(bucket.available);
            bucket.available = (bucket.available - to_f64(bytes)).max(least);
        }
    }

    fn give_back(&self, bytes: u64) {
        self.bucket.lock().available += to_f64(bytes);
    }

    fn refill(&self, bucket: &mut Bucket) {
        bucket.refill(self.started.elapsed(), to_f64(self.rate.load(Ordering::Relaxed)));
    }

    fn take(self: &Arc<Self>, bucket: &mut Bucket, bytes: u64) -> Reservation {
        bucket.available -= to_f64(bytes);
        Reservation { limiter: self.clone(), bytes }
    }

    /// Serves the waiting connections until none is left.
    async fn drive(self: Arc<Self>) {
        loop {
            let pause = {
                let mut bucket = self.bucket.lock();
                let rate = to_f64(self.rate.load(Ordering::Relaxed));
                self.refill(&mut bucket);
                while rate == 0.0 || bucket.available > 0.0 {
                    let Some(waiter) = bucket.next_waiter() else {
                        bucket.is_driven = false;
                        return;
                    };
                    let reservation = self.take(&mut bucket, waiter.bytes);
                    if let Err(mut unused) = waiter.granted.send(reservation) {
                        // The connection is gone. Not given back by its drop, which would lock the bucket again.
                        bucket.available += to_f64(std::mem::take(&mut unused.bytes));
                    }
                }
                bucket.pause(rate)
            };
            sleep(pause).await;
        }
    }
}

impl Bucket {
    fn refill(&mut self, now: Duration, rate: f64) {
        let passed = now.saturating_sub(self.refilled);
        self.refilled = now;
        let most = (rate * BURST.as_secs_f64()).max(to_f64(RESERVED_BYTES));
        // What was given back may exceed the burst already.
        self.available = (self.available + rate * passed.as_secs_f64()).min(most);
    }

    fn next_waiter(&mut self) -> Option<Waiter> {
        self.turns = (self.turns + 1) % FAIR_TURN;
        if self.turns == 0 {
            return self.waiting.pop_front();
        }
        let highest = self.waiting.iter().map(|waiter| waiter.priority.get()).max()?;
        let position = self.waiting.iter().position(|waiter| waiter.priority.get() >= highest)?;
        self.waiting.remove(position)
    }

    /// The time until tokens are available.
    fn pause(&self, rate: f64) -> Duration {
        Duration::from_secs_f64((-self.available / rate).clamp(MIN_PAUSE.as_secs_f64(), MAX_PAUSE.as_secs_f64()))
    }
}

impl Reservation {
    /// Uses some bytes. Returns those that exceed the reservation.
    fn spend(&mut self, bytes: u64) -> u64 {
        let spent = bytes.min(self.bytes);
        self.bytes -= spent;
        bytes - spent
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.limiter.give_back(self.bytes);
        }
    }
}

impl Throttle {
    /// A connection that these limits apply to. None: none of them limits anything now.
    pub fn new(limiters: impl IntoIterator<Item = Arc<RateLimiter>>, priority: CurrentPriority) -> Option<Self> {
        let limited = limiters.into_iter().filter(|limiter| limiter.rate.load(Ordering::Relaxed) > 0);
        let limits: Vec<_> = limited.map(|limiter| Limit { limiter, reservation: None }).collect();
        (!limits.is_empty()).then_some(Self { limits, priority })
    }

    #[must_use]
    pub fn with_priority(self, priority: CurrentPriority) -> Self {
        Self { priority, ..self }
    }

    /// Waits until some bytes may be read or written. Dropping the future loses nothing.
    pub async fn ready(&mut self) {
        for limit in &mut self.limits {
            if limit.reservation.as_ref().is_none_or(|reservation| reservation.bytes == 0) {
                limit.reservation = limit.limiter.reserve(&self.priority, RESERVED_BYTES).await;
            }
        }
    }

    /// Counts bytes that were read or written.
    pub fn count(&mut self, bytes: u64) {
        for limit in &mut self.limits {
            let excess = limit.reservation.as_mut().map_or(bytes, |reservation| reservation.spend(bytes));
            if excess > 0 {
                limit.limiter.charge(excess);
            }
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a number of bytes in flight")]
fn to_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Bytes that connections of each priority use in `seconds`, in pieces of this size.
    async fn used(limiter: &Arc<RateLimiter>, connections: &[(Priority, usize)], piece: u64, seconds: u64) -> Vec<u64> {
        let mut counts = Vec::new();
        let mut tasks = tokio::task::JoinSet::new();
        for (priority, connections) in connections {
            let count = Arc::new(AtomicU64::new(0));
            counts.push(count.clone());
            for _ in 0..*connections {
                let (limiter, count, priority) = (limiter.clone(), count.clone(), *priority);
                tasks.spawn(async move {
                    let mut throttle = Throttle::new([limiter], CurrentPriority::new(priority)).unwrap();
                    loop {
                        throttle.ready().await;
                        throttle.count(piece);
                        count.fetch_add(piece, Ordering::Relaxed);
                        tokio::task::yield_now().await;
                    }
                });
            }
        }
        sleep(Duration::from_secs(seconds)).await;
        tasks.shutdown().await;
        counts.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn rate_is_kept_within_five_percent_by_any_number_of_connections() {
        for (rate, connections, piece) in
            [(200 * MIB, 200, 16 << 10), (200 * MIB, 1, 200 << 10), (2 * MIB, 200, 4 << 10), (MIB, 3, 100 << 10)]
        {
            let limiter = Arc::new(RateLimiter::new(Some(rate)));
            let used = used(&limiter, &[(Priority::Client, connections)], piece, 10).await[0];
            let share = to_f64(used) / to_f64(rate * 10);
            assert!((0.95..1.05).contains(&share), "{connections} connections at {rate}: {share}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lower_priority_gets_what_is_left() {
        let limiter = Arc::new(RateLimiter::new(Some(10 * MIB)));
        let all = [(Priority::Client, 2), (Priority::Peer, 2), (Priority::Background, 9)];
        let shares = used(&limiter, &all, 16 << 10, 10).await;
        let lower = shares[1] + shares[2];
        assert!(shares[0] > 85 * MIB && (10 * MIB..14 * MIB).contains(&lower), "{shares:?}");
        let rest = used(&limiter, &all[1..], 16 << 10, 10).await;
        assert!(rest[0] > 85 * MIB && rest[1] < 14 * MIB, "{rest:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn download_that_waits_rises_with_its_priority() {
        let limiter = Arc::new(RateLimiter::new(Some(MIB)));
        let priority = CurrentPriority::new(Priority::Background);
        let mut throttle = Throttle::new([limiter.clone()], priority.clone()).unwrap();
        let busy = tokio::spawn(async move { used(&limiter, &[(Priority::Client, 50)], 64 << 10, 600).await });
        sleep(Duration::from_secs(5)).await;
        throttle.count(RESERVED_BYTES);
        let raised = async {
            sleep(Duration::from_millis(1)).await;
            priority.raise(Priority::Client);
        };
        let began = Instant::now();
        tokio::join!(throttle.ready(), raised);
        // Of 50 clients, each has a turn in three seconds.
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
        busy.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn charged_bytes_delay_others_for_a_second_at_most() {
        let limiter = Arc::new(RateLimiter::new(Some(MIB)));
        limiter.charge(1000 * MIB);
        let mut throttle = Throttle::new([limiter], CurrentPriority::new(Priority::Peer)).unwrap();
        let began = Instant::now();
        throttle.ready().await;
        assert!(began.elapsed() <= MAX_DEBT + MAX_PAUSE, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn connections_of_a_priority_share_the_rate_evenly() {
        let limiter = Arc::new(RateLimiter::new(Some(10 * MIB)));
        let shares = used(&limiter, &[(Priority::Client, 1), (Priority::Client, 1)], 16 << 10, 10).await;
        assert!(shares[0].abs_diff(shares[1]) <= MIB, "{shares:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn changed_rate_applies_to_waiting_connections() {
        let limiter = Arc::new(RateLimiter::new(Some(1)));
        limiter.bucket.lock().available = -1e6;
        let mut throttle = Throttle::new([limiter.clone()], CurrentPriority::new(Priority::Client)).unwrap();
        let began = Instant::now();
        let changed = async {
            sleep(Duration::from_secs(1)).await;
            limiter.set_rate(None);
        };
        tokio::join!(throttle.ready(), changed);
        assert!(began.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn reservation_of_a_dropped_connection_goes_back() {
        let limiter = Arc::new(RateLimiter::new(Some(MIB)));
        for _ in 0..1000 {
            let mut throttle = Throttle::new([limiter.clone()], CurrentPriority::new(Priority::Client)).unwrap();
            let _ = tokio::time::timeout(Duration::from_millis(1), throttle.ready()).await;
        }
        let used = used(&limiter, &[(Priority::Client, 1)], 16 << 10, 10).await[0];
        assert!(used > 9 * MIB, "{used}");
    }

    #[test]
    fn client_may_request_in_the_background() {
        for (header, want) in
            [("u=7", Priority::Background), ("i, u=7", Priority::Background), ("u=1", Priority::Client)]
        {
            assert_eq!(Priority::of_client(header), want, "{header}");
        }
    }

    #[test]
    fn priority_of_a_download_only_rises() {
        let priority = CurrentPriority::new(Priority::Peer);
        priority.raise(Priority::Background);
        assert_eq!(priority.get(), Priority::Peer);
        priority.raise(Priority::Client);
        assert_eq!(priority.get(), Priority::Client);
    }
}
