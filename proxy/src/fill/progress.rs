//! The progress of a fill, as its readers see it.

use super::{HELD_BYTES, ReadMode};
use crate::oci::{Span, Spans};

/// Which bytes of a blob are written, and whether more will follow.
#[derive(Clone, Debug)]
pub(super) struct Progress {
    written: Spans,
    /// Bytes from the start that were hashed.
    hashed: u64,
    /// Written bytes cannot be read back from the disk.
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

/// Bytes of hash progress between two notifications of the plan. Larger: the window of the plan moves late. Smaller:
/// more wake-ups.
const HASH_NOTIFY_BYTES: u64 = 8 * 1024 * 1024;

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

    pub(super) fn mark_unreadable(&mut self) {
        self.is_unreadable = true;
    }

    pub(super) fn written(&self) -> &Spans {
        &self.written
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Verified | Phase::Failed)
    }

    /// The end of what a reader at `start` may read in a blob of `total` bytes; `start` if nothing. The tail may be
    /// withheld until the digest matches.
    pub(super) fn readable(&self, start: u64, total: u64, mode: ReadMode) -> u64 {
        match (self.phase, mode) {
            (Phase::Verified, _) => total,
            (_, ReadMode::Verified) => start,
            (_, ReadMode::Unverified | ReadMode::UnverifiedUntilStall) => self.written.run_end(start),
            (_, ReadMode::VerifiedTail) => self.written.run_end(start).min(total.saturating_sub(HELD_BYTES)).max(start),
        }
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
    }

    pub(super) fn set_written(&mut self, written: Spans) {
        self.written = written;
    }

    pub(super) fn add_written(&mut self, span: Span) {
        self.written.insert(span);
    }

    /// Whether the plan should be notified. No reader waits for the hash.
    pub(super) fn hashed_to(&mut self, end: u64) -> bool {
        let before = std::mem::replace(&mut self.hashed, end);
        before / HASH_NOTIFY_BYTES != end / HASH_NOTIFY_BYTES
    }

    /// Withdraws what was written, because it does not match the digest.
    pub(super) fn withdraw(&mut self) {
        self.written = Spans::default();
        self.phase = Phase::Failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_before_verification_is_withheld() {
        let total = 10 * HELD_BYTES;
        let mut progress = Progress::new();
        progress.add_written(Span { start: 0, end: 5 });
        progress.add_written(Span { start: 100, end: total });
        assert_eq!(progress.readable(0, total, ReadMode::VerifiedTail), 5);
        assert_eq!(progress.readable(5, total, ReadMode::VerifiedTail), 5, "a gap");
        assert_eq!(progress.readable(200, total, ReadMode::VerifiedTail), total - HELD_BYTES);
        assert_eq!(progress.readable(total - 1, total, ReadMode::VerifiedTail), total - 1);
        assert_eq!(progress.readable(200, total, ReadMode::Unverified), total);
        assert_eq!(progress.readable(200, total, ReadMode::Verified), 200);
        progress.enter(Phase::Verified);
        assert_eq!(progress.readable(total - 1, total, ReadMode::VerifiedTail), total);
        progress.withdraw();
        assert_eq!(progress.readable(0, total, ReadMode::VerifiedTail), 0);
    }
}
