//! Pieces of a file on their way to a client: how large, and from which memory.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Memory that all pieces together should take, in bytes.
const ALL_PIECES: usize = 24 * 1024 * 1024;
const LARGEST: usize = 1024 * 1024;
const SMALLEST: usize = 16 * 1024;

/// A new piece takes at most this part of what is left.
const SHARE: usize = 16;

/// Buffers kept for the next piece.
const MAX_SPARE: usize = 8;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static SPARE: Mutex<Vec<Box<[u8]>>> = Mutex::new(Vec::new());

/// How much to read at once: the more slow readers hold, the less is left for each.
pub(super) fn piece_len() -> usize {
    len_with(IN_USE.load(Ordering::Relaxed))
}

fn len_with(in_use: usize) -> usize {
    let share = ALL_PIECES.saturating_sub(in_use) / SHARE;
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
        let spare = (len == LARGEST).then(|| SPARE.lock().pop()).flatten();
        IN_USE.fetch_add(len, Ordering::Relaxed);
        Self { memory: spare.unwrap_or_else(|| vec![0; len].into_boxed_slice()), filled: 0 }
    }

    pub(super) fn memory(&mut self) -> &mut [u8] {
        &mut self.memory
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
        IN_USE.fetch_sub(self.memory.len(), Ordering::Relaxed);
        if self.memory.len() == LARGEST {
            let mut spare = SPARE.lock();
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
    fn five_hundred_slow_readers_stay_within_the_bound() {
        assert_eq!(len_with(0), LARGEST);
        let mut in_use = 0;
        for _ in 0..500 {
            in_use += len_with(in_use);
        }
        assert!(in_use < ALL_PIECES + 500 * SMALLEST, "{in_use}");
        assert_eq!(len_with(in_use), SMALLEST);
    }

    #[test]
    fn a_piece_shows_only_what_was_read() {
        let mut piece = Piece::new(LARGEST);
        piece.memory()[..3].copy_from_slice(b"abc");
        assert_eq!(&piece.into_bytes(3)[..], b"abc");
        assert_eq!(Piece::new(LARGEST).into_bytes(0).len(), 0);
    }
}
