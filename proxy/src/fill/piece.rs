//! Pieces of a file on their way to a client: how large, and from which memory.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// Memory that all readers' pieces take together, in bytes.
const ALL_PIECES: usize = 32 * 1024 * 1024;
const LARGEST: usize = 256 * 1024;
const SMALLEST: usize = 16 * 1024;

/// Buffers kept for the next reader.
const MAX_SPARE: usize = 16;

static READERS: AtomicUsize = AtomicUsize::new(0);
static SPARE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// Counts one reader for as long as it lives.
pub(super) struct Seat(());

impl Seat {
    pub(super) fn take() -> Self {
        READERS.fetch_add(1, Ordering::Relaxed);
        Self(())
    }

    /// How much to read at once: the more readers, the less each.
    pub(super) fn piece_len(&self) -> usize {
        piece_len(READERS.load(Ordering::Relaxed))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        READERS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn piece_len(readers: usize) -> usize {
    let share = ALL_PIECES / readers.max(1);
    (share / SMALLEST * SMALLEST).clamp(SMALLEST, LARGEST)
}

/// Memory to read into. A full-sized one goes back to the spares when its last `Bytes` is dropped,
/// so that a fast reader neither allocates nor clears memory.
pub(super) struct Piece {
    memory: Box<[u8]>,
    filled: usize,
}

impl Piece {
    pub(super) fn new(len: usize) -> Self {
        let spare = (len == LARGEST).then(|| SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop()).flatten();
        Self { memory: spare.unwrap_or_else(|| vec![0; len].into_boxed_slice()), filled: 0 }
    }

    pub(super) fn memory(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.memory.len());
        &mut self.memory[..len]
    }

    /// The first `filled` bytes.
    pub(super) fn into_bytes(mut self, filled: usize) -> Bytes {
        self.filled = filled.min(self.memory.len());
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.filled]
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if self.memory.len() == LARGEST {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            if spare.len() < MAX_SPARE {
                spare.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_shrink_as_readers_grow() {
        assert_eq!(piece_len(1), LARGEST);
        assert_eq!(piece_len(128), LARGEST);
        assert_eq!(piece_len(500), 64 * 1024);
        assert_eq!(piece_len(100_000), SMALLEST);
        assert!((0..4000).all(|n| n * piece_len(n) <= ALL_PIECES || piece_len(n) == SMALLEST));
    }

    #[test]
    fn a_piece_shows_only_what_was_read() {
        let mut piece = Piece::new(LARGEST);
        piece.memory(3).copy_from_slice(b"abc");
        assert_eq!(&piece.into_bytes(3)[..], b"abc");
        assert_eq!(Piece::new(LARGEST).into_bytes(0).len(), 0);
    }
}
