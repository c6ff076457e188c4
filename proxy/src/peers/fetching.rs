//! One range on its way from a peer: counted as in flight, and what came of it told to the view.

use std::sync::{Arc, Mutex};

use tokio::time::Instant;
use xxhash_rust::xxh64::Xxh64;

use super::lock;
use super::swarm::{Contribution, View};
use crate::oci::Span;

/// A range on its way from a peer.
pub(super) struct Fetching {
    view: Arc<Mutex<View>>,
    contribution: Contribution,
    /// Where what it promised ends.
    promised: u64,
    /// When the view's clock started.
    clock: Instant,
    checksum: Xxh64,
}

impl Fetching {
    pub(super) fn new(view: &Arc<Mutex<View>>, contribution: Contribution, promised: Span, clock: Instant) -> Self {
        lock(view).begin(contribution.peer);
        Self { view: view.clone(), contribution, promised: promised.end, clock, checksum: Xxh64::new(0) }
    }

    pub(super) fn passed(&mut self, piece: &[u8]) {
        self.checksum.update(piece);
        self.contribution.span.end += piece.len() as u64;
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        let contribution = Contribution { checksum: self.checksum.digest(), ..self.contribution };
        let mut view = lock(&self.view);
        view.end(contribution);
        // It stalled, broke off, or was not needed any more: others come first for a while.
        if contribution.span.end < self.promised {
            view.left(contribution.peer, self.clock.elapsed());
        }
    }
}
