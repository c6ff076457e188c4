//! One range on its way from a peer: counted as in flight, and what came of it told to the view.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use xxhash_rust::xxh64::Xxh64;

use super::swarm::{Claim, Contribution, View};
use crate::oci::Span;
use crate::source::{Broken, Floor, Speed};

/// Who has the whole of a blob sends as much in this time at least: with less others are better asked. Who gets
/// it only now may have an origin that is slow.
const FLOOR: Floor = Floor { bytes: 256 * 1024, window: Duration::from_secs(10) };

/// Who has the whole and sent nothing for so long when it was given up is as one that sends too little.
const SILENT: Duration = Duration::from_secs(2);

/// A range on its way from a peer.
pub(super) struct PeerDownload {
    view: Arc<Mutex<View>>,
    contribution: Contribution,
    /// Where what it promised ends.
    promised: u64,
    /// When the view's clock started.
    clock: Instant,
    checksum: Xxh64,
    speed: Speed,
    /// Since when the next piece is waited for.
    asked: Option<Instant>,
    crawls: bool,
}

impl PeerDownload {
    pub(super) fn new(view: &Arc<Mutex<View>>, contribution: Contribution, promised: Span, clock: Instant) -> Self {
        view.lock().begin(contribution.peer);
        let (checksum, speed) = (Xxh64::new(0), Speed::default());
        let view = view.clone();
        Self { view, contribution, promised: promised.end, clock, checksum, speed, asked: None, crawls: false }
    }

    /// The next piece is waited for.
    pub(super) fn asks(&mut self) {
        self.asked = Some(Instant::now());
    }

    /// It came. An error: others are better asked.
    pub(super) fn passed(&mut self, piece: &[u8]) -> Result<(), Broken> {
        let waited = self.asked.take().map_or(Duration::ZERO, |asked| asked.elapsed());
        self.checksum.update(piece);
        self.contribution.span.end += piece.len() as u64;
        let keeps_up = self.speed.keeps_up(FLOOR, waited, piece.len());
        self.crawls = !keeps_up && self.contribution.claim == Claim::Verified;
        if self.crawls { Err(Broken("too slow for a peer that has it".into())) } else { Ok(()) }
    }
}

impl Drop for PeerDownload {
    fn drop(&mut self) {
        let contribution = Contribution { checksum: self.checksum.digest(), ..self.contribution };
        let mut view = self.view.lock();
        view.end(contribution);
        // It stalled, broke off, or was not needed any more: others come first for a while.
        let is_silent =
            contribution.claim == Claim::Verified && self.asked.is_some_and(|since| since.elapsed() >= SILENT);
        if self.crawls || is_silent {
            view.crawled(contribution.peer, self.clock.elapsed());
        } else if contribution.span.end < self.promised {
            view.left(contribution.peer, self.clock.elapsed());
        }
    }
}
