//! The body of one connection, which fails if it is too slow, and the count of failed connections.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use tokio::time::{Instant, timeout};

use crate::source::{Incoming, MinRate, Speed};

/// A source that sends less than this many bytes in [`WINDOW_STALLS`] times its stall timeout is replaced. Larger:
/// usable slow sources are replaced. Smaller: a trickle holds up a range.
const MIN_WINDOW_BYTES: u64 = 64 * 1024;

/// See [`MIN_WINDOW_BYTES`]. Larger: slow sources are replaced later. Smaller: pauses count as slowness.
const WINDOW_STALLS: u32 = 3;

/// Consecutive connections with less than [`MIN_WINDOW_BYTES`] before the download fails. Larger: readers wait longer
/// for a blob that no source can send. Smaller: short outages fail downloads.
const MAX_CONSECUTIVE_EMPTY: u32 = 4;

/// Failed connections before the download fails, whatever they sent. Larger: an unusable upstream is tried for longer.
/// Smaller: large blobs fail where connections often break.
const MAX_FAILURES: u32 = 100;

/// Bytes to gather into one piece. A slow connection receives a few packets at a time, and each piece costs several
/// threads a wake-up. Larger: more memory for each connection. Smaller: more wake-ups.
const GATHER_BYTES: usize = 64 * 1024;

/// Time limit for gathering a piece. Larger: readers get bytes later. Smaller: more wake-ups.
const GATHER_TIME: Duration = Duration::from_millis(5);

/// A body with a stall timeout and a minimum throughput.
pub(super) struct WatchedBody {
    incoming: Incoming,
    /// Bytes that have arrived.
    received: u64,
    speed: Speed,
    /// The error that the next read returns.
    broken: Option<String>,
}

/// Counts the failed connections of one blob.
#[derive(Default)]
pub(super) struct Breaks {
    pub(super) failures: u32,
    /// Consecutive connections with almost no bytes.
    pub(super) consecutive_empty: u32,
}

impl WatchedBody {
    pub(super) fn new(incoming: Incoming) -> Self {
        Self { incoming, received: 0, speed: Speed::default(), broken: None }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.incoming.span.start + self.received
    }

    /// Offset after the last byte.
    pub(super) fn end(&self) -> u64 {
        self.incoming.span.end
    }

    /// The next piece and what follows shortly after it; the very first piece at once.
    pub(super) async fn gather(&mut self) -> Result<Bytes, String> {
        let is_first = self.received == 0;
        let piece = self.next().await?;
        if is_first || piece.len() >= GATHER_BYTES || self.position() >= self.end() {
            return Ok(piece);
        }
        tokio::time::sleep(GATHER_TIME).await;
        let mut gathered = BytesMut::from(piece);
        while gathered.len() < GATHER_BYTES
            && self.broken.is_none()
            && let Some(next) = self.incoming.next().now_or_never()
        {
            match next {
                Some(Ok(piece)) => {
                    self.received += piece.len() as u64;
                    gathered.extend_from_slice(&piece);
                }
                Some(Err(broken)) => self.broken = Some(broken.0),
                None => self.broken = Some("the connection ended early".into()),
            }
        }
        Ok(gathered.freeze())
    }

    /// The next piece, or the error.
    pub(super) async fn next(&mut self) -> Result<Bytes, String> {
        if let Some(broken) = self.broken.take() {
            return Err(broken);
        }
        // Not within the timeout: a bandwidth limit says nothing of the source.
        self.incoming.ready().await;
        let requested_at = Instant::now();
        let stall_timeout = self.incoming.stall_timeout;
        let slowest = MinRate { bytes: MIN_WINDOW_BYTES, window: stall_timeout * WINDOW_STALLS };
        match timeout(stall_timeout, self.incoming.next()).await {
            Ok(Some(Ok(piece))) if self.speed.meets_minimum(slowest, requested_at.elapsed(), piece.len()) => {
                self.received += piece.len() as u64;
                Ok(piece)
            }
            Ok(Some(Ok(_))) => Err("below the minimum throughput".into()),
            Ok(Some(Err(broken))) => Err(broken.0),
            Ok(None) => Err("the connection ended early".into()),
            Err(_) => Err("stalled".into()),
        }
    }
}

impl Breaks {
    /// Counts a connection that failed. A source that sends a single byte per connection counts as sending nothing.
    pub(super) fn broke(&mut self, received: u64) {
        self.failures += 1;
        self.consecutive_empty = if received < MIN_WINDOW_BYTES { self.consecutive_empty + 1 } else { 1 };
    }

    /// A connection completed its request.
    pub(super) fn recovered(&mut self) {
        self.consecutive_empty = 0;
    }

    /// Whether the download should fail.
    pub(super) fn too_many(&self) -> bool {
        self.consecutive_empty >= MAX_CONSECUTIVE_EMPTY || self.failures >= MAX_FAILURES
    }

    /// How long to wait before the next connection.
    pub(super) fn pause(&self) -> Duration {
        if self.consecutive_empty <= 1 {
            return Duration::ZERO;
        }
        let max_millis = 200 << self.consecutive_empty.min(MAX_CONSECUTIVE_EMPTY);
        Duration::from_millis(fastrand::u64(max_millis / 2..=max_millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_per_connection_counts_as_empty() {
        let mut breaks = Breaks::default();
        (0..3).for_each(|_| breaks.broke(1));
        assert!(!breaks.too_many() && breaks.pause() > Duration::ZERO);
        breaks.broke(MIN_WINDOW_BYTES);
        assert!(breaks.pause().is_zero());
        (0..3).for_each(|_| breaks.broke(1));
        assert!(breaks.too_many());
    }
}
