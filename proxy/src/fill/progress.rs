//! How far a fill is, as its readers see it.

use super::{HELD_BYTES, ReadMode};
use crate::oci::{Span, Spans};

/// What of a blob is there, and whether more will come.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    written: Spans,
    /// Bytes from the start that were hashed.
    hashed: u64,
    /// What was written cannot be read back.
    is_unreadable: bool,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opening,
    Growing,
    Verified,
    Failed,
}

/// How often it is told how much was hashed, in bytes.
const HASHED_STEP: u64 = 8 * 1024 * 1024;

impl Progress {
    pub(super) fn new() -> Self {
        Self { written: Spans::default(), hashed: 0, is_unreadable: false, phase: Phase::Opening }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn hashed(&self) -> u64 {
        self.hashed
    }

    pub(super) fn is_unreadable(&self) -> bool {
        self.is_unreadable
    }

    pub(super) fn found_unreadable(&mut self) {
        self.is_unreadable = true;
    }

    pub(super) fn written(&self) -> &Spans {
        &self.written
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Verified | Phase::Failed)
    }

    /// How far a reader at `start` may read in a blob of `total` bytes; `start` if not at all. The
    /// end of the blob may be held until its digest agrees.
    pub(super) fn readable(&self, start: u64, total: u64, reading: ReadMode) -> u64 {
        match (self.phase, reading) {
            (Phase::Verified, _) => total,
            (_, ReadMode::Verified) => start,
            (_, ReadMode::Unproven | ReadMode::OfWhatComes) => self.written.run_end(start),
            (_, ReadMode::Proven) => self.written.run_end(start).min(total.saturating_sub(HELD_BYTES)).max(start),
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    pub(super) fn set_written(&mut self, written: Spans) {
        self.written = written;
    }

    pub(super) fn wrote(&mut self, span: Span) {
        self.written.insert(span);
    }

    /// Whether it moved so far that somebody should know: no reader waits for it, only the plan.
    pub(super) fn hashed_to(&mut self, end: u64) -> bool {
        let before = std::mem::replace(&mut self.hashed, end);
        before / HASHED_STEP != end / HASHED_STEP
    }

    /// Takes back what was written: it is wrong.
    pub(super) fn disown(&mut self) {
        self.written = Spans::default();
        self.phase = Phase::Failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_held_until_the_digest_agrees() {
        let total = 10 * HELD_BYTES;
        let mut progress = Progress::new();
        progress.wrote(Span { start: 0, end: 5 });
        progress.wrote(Span { start: 100, end: total });
        assert_eq!(progress.readable(0, total, ReadMode::Proven), 5);
        assert_eq!(progress.readable(5, total, ReadMode::Proven), 5, "a gap");
        assert_eq!(progress.readable(200, total, ReadMode::Proven), total - HELD_BYTES);
        assert_eq!(progress.readable(total - 1, total, ReadMode::Proven), total - 1);
        assert_eq!(progress.readable(200, total, ReadMode::Unproven), total);
        assert_eq!(progress.readable(200, total, ReadMode::Verified), 200);
        progress.enter(Phase::Verified);
        assert_eq!(progress.readable(total - 1, total, ReadMode::Proven), total);
        progress.disown();
        assert_eq!(progress.readable(0, total, ReadMode::Proven), 0);
    }
}
