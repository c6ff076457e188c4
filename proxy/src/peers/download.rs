//! One range that is being downloaded from a peer. The view counts it as in flight, and learns its result.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use xxhash_rust::xxh64::Xxh64;

use super::swarm::{Claim, Contribution, View};
use crate::oci::Span;
use crate::source::{Broken, MinRate, Speed};

/// Minimum rate of a peer that has the whole blob; one that relays may have a slow upstream. Higher: loaded peers are
/// given up. Lower: a crawling peer delays the download for longer.
const MIN_RATE: MinRate = MinRate { bytes: 256 * 1024, window: Duration::from_secs(10) };

/// A peer that has the whole blob, and sent nothing for this long when its download ended, counts as too slow. Longer:
/// a stalled peer is soon requested again. Shorter: a peer on a congested link is avoided for minutes.
const STALL_DURATION: Duration = Duration::from_secs(2);

pub(super) struct PeerDownload {
    view: Arc<Mutex<View>>,
    contribution: Contribution,
    /// The end of the span that the response announced.
    announced_end: u64,
    /// When the view's clock started.
    clock: Instant,
    checksum: Xxh64,
    speed: Speed,
    /// Since when the download waits for the next piece.
    waiting_since: Option<Instant>,
    is_too_slow: bool,
}

impl PeerDownload {
    pub(super) fn new(view: &Arc<Mutex<View>>, contribution: Contribution, announced: Span, clock: Instant) -> Self {
        view.lock().begin(contribution.peer);
        let (checksum, speed) = (Xxh64::new(0), Speed::default());
        let view = view.clone();
        Self {
            view,
            contribution,
            announced_end: announced.end,
            clock,
            checksum,
            speed,
            waiting_since: None,
            is_too_slow: false,
        }
    }

    /// The download waits for the next piece from now on.
    pub(super) fn start_waiting(&mut self) {
        self.waiting_since = Some(Instant::now());
    }

    /// Records a piece. Error: the peer is below the minimum rate, so another source should continue.
    pub(super) fn record(&mut self, piece: &[u8]) -> Result<(), Broken> {
        let waited = self.waiting_since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.checksum.update(piece);
        self.contribution.span.end += piece.len() as u64;
        let meets_minimum = self.speed.meets_minimum(MIN_RATE, waited, piece.len());
        self.is_too_slow = !meets_minimum && self.contribution.claim == Claim::Verified;
        if self.is_too_slow { Err(Broken("too slow for a holder of the whole blob".into())) } else { Ok(()) }
    }
}

impl Drop for PeerDownload {
    fn drop(&mut self) {
        let contribution = Contribution { checksum: self.checksum.digest(), ..self.contribution };
        let mut view = self.view.lock();
        view.end(contribution);
        // A download that ended early stalled, broke off or was cancelled: the view prefers other peers for a while.
        let has_stalled = contribution.claim == Claim::Verified
            && self.waiting_since.is_some_and(|since| since.elapsed() >= STALL_DURATION);
        if self.is_too_slow || has_stalled {
            view.mark_too_slow(contribution.peer, self.clock.elapsed());
        } else if contribution.span.end < self.announced_end {
            view.mark_interrupted(contribution.peer, self.clock.elapsed());
        }
    }
}
