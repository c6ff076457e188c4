//! One connection's bytes, for as long as it brings enough of them, and what its breaks cost.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use tokio::time::{Instant, timeout};

use crate::source::{Floor, Incoming, Speed};

/// A source that brings less than this in [`SLOW_STALLS`] times its stall timeout is changed.
const SLOWEST_BYTES: u64 = 64 * 1024;
const SLOW_STALLS: u32 = 3;

/// So many connections in a row that bring next to nothing, and it is over.
const MAX_BARREN: u32 = 4;

/// Whatever they bring, more connections than this are an origin that cannot be used.
const MAX_FAILURES: u32 = 100;

/// A slow connection brings a few packets at a time, and each piece costs several threads a wake-up:
/// so much is gathered, for so long at most.
const GATHERED: usize = 64 * 1024;
const GATHERING: Duration = Duration::from_millis(5);

/// A body that is watched.
pub(super) struct WatchedBody {
    incoming: Incoming,
    /// Bytes that it has brought.
    brought: u64,
    speed: Speed,
    /// Why the next piece will not come.
    broken: Option<String>,
}

/// The connections of one blob that broke.
#[derive(Default)]
pub(super) struct Breaks {
    pub(super) failures: u32,
    /// How many in a row brought next to nothing.
    pub(super) barren: u32,
}

impl WatchedBody {
    pub(super) fn new(incoming: Incoming) -> Self {
        Self { incoming, brought: 0, speed: Speed::default(), broken: None }
    }

    /// Offset of the next byte that comes.
    pub(super) fn position(&self) -> u64 {
        self.incoming.span.start + self.brought
    }

    /// Offset after the last byte that comes.
    pub(super) fn end(&self) -> u64 {
        self.incoming.span.end
    }

    /// The next piece and what comes soon after it; the very first piece at once.
    pub(super) async fn gather(&mut self) -> Result<Bytes, String> {
        let is_first = self.brought == 0;
        let piece = self.next().await?;
        if is_first || piece.len() >= GATHERED || self.position() >= self.end() {
            return Ok(piece);
        }
        tokio::time::sleep(GATHERING).await;
        let mut gathered = BytesMut::from(piece);
        while gathered.len() < GATHERED
            && self.broken.is_none()
            && let Some(next) = self.incoming.next().now_or_never()
        {
            match next {
                Some(Ok(piece)) => {
                    self.brought += piece.len() as u64;
                    gathered.extend_from_slice(&piece);
                }
                Some(Err(broken)) => self.broken = Some(broken.0),
                None => self.broken = Some("ended early".into()),
            }
        }
        Ok(gathered.freeze())
    }

    /// The next piece, or why there is none.
    pub(super) async fn next(&mut self) -> Result<Bytes, String> {
        if let Some(broken) = self.broken.take() {
            return Err(broken);
        }
        let asked = Instant::now();
        let stall_timeout = self.incoming.stall_timeout;
        let slowest = Floor { bytes: SLOWEST_BYTES, window: stall_timeout * SLOW_STALLS };
        match timeout(stall_timeout, self.incoming.next()).await {
            Ok(Some(Ok(piece))) if self.speed.keeps_up(slowest, asked.elapsed(), piece.len()) => {
                self.brought += piece.len() as u64;
                Ok(piece)
            }
            Ok(Some(Ok(_))) => Err("too slow".into()),
            Ok(Some(Err(broken))) => Err(broken.0),
            Ok(None) => Err("ended early".into()),
            Err(_) => Err("stalled".into()),
        }
    }
}

impl Breaks {
    /// Counts a connection that broke. Whoever brings a byte a connection brings nothing.
    pub(super) fn broke(&mut self, brought: u64) {
        self.failures += 1;
        self.barren = if brought < SLOWEST_BYTES { self.barren + 1 } else { 1 };
    }

    /// A connection brought all that it was asked for.
    pub(super) fn recovered(&mut self) {
        self.barren = 0;
    }

    /// Whether there is no sense in going on.
    pub(super) fn too_many(&self) -> bool {
        self.barren >= MAX_BARREN || self.failures >= MAX_FAILURES
    }

    /// How long to wait before the next connection.
    pub(super) fn pause(&self) -> Duration {
        if self.barren <= 1 {
            return Duration::ZERO;
        }
        let most = 200 << self.barren.min(MAX_BARREN);
        Duration::from_millis(fastrand::u64(most / 2..=most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_a_connection_is_nothing() {
        let mut breaks = Breaks::default();
        (0..3).for_each(|_| breaks.broke(1));
        assert!(!breaks.too_many() && breaks.pause() > Duration::ZERO);
        breaks.broke(SLOWEST_BYTES);
        assert!(breaks.pause().is_zero());
        (0..3).for_each(|_| breaks.broke(1));
        assert!(breaks.too_many());
    }
}
