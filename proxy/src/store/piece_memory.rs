//! Pieces of a file on their way to a client: how large they are, and from which memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Memory that all pieces together should take, in bytes. More: the process takes more with many slow readers. Less: each of
/// them reads smaller pieces, which costs CPU.
const ALL_PIECES: usize = 24 * 1024 * 1024;
const LARGEST: usize = 1024 * 1024;
const SMALLEST: usize = 16 * 1024;

/// A new piece takes at most this part of what is left.
const SHARE: usize = 16;

/// Buffers kept for the next piece.
const MAX_SPARE: usize = 8;

/// The memory of all pieces.
#[derive(Default)]
pub struct PieceMemory {
    in_use: AtomicUsize,
    spare: Mutex<Vec<Box<[u8]>>>,
}

impl PieceMemory {
    /// How much to read at once: the more slow readers hold, the less is left for each.
    pub fn piece_len(&self) -> usize {
        len_with(self.in_use.load(Ordering::Relaxed))
    }

    pub fn piece(self: &Arc<Self>, len: usize) -> Piece {
        let spare = (len == LARGEST).then(|| self.spare.lock().pop()).flatten();
        self.in_use.fetch_add(len, Ordering::Relaxed);
        let memory = spare.unwrap_or_else(|| vec![0; len].into_boxed_slice());
        Piece { memory, filled: 0, pool: self.clone() }
    }
}

fn len_with(in_use: usize) -> usize {
    let share = ALL_PIECES.saturating_sub(in_use) / SHARE;
    (share / SMALLEST * SMALLEST).clamp(SMALLEST, LARGEST)
}

/// Memory to read into. A full-sized one goes back to the spares when its last `Bytes` is dropped,
/// so that a fast reader neither allocates nor clears memory.
pub struct Piece {
    memory: Box<[u8]>,
    filled: usize,
    pool: Arc<PieceMemory>,
}

impl Piece {
    pub fn memory(&mut self) -> &mut [u8] {
        &mut self.memory
    }

    /// The first `filled` bytes.
    pub fn into_bytes(mut self, filled: usize) -> Bytes {
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
        self.pool.in_use.fetch_sub(self.memory.len(), Ordering::Relaxed);
        if self.memory.len() == LARGEST {
            let mut spare = self.pool.spare.lock();
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
        let pieces = Arc::new(PieceMemory::default());
        let mut piece = pieces.piece(LARGEST);
        piece.memory()[..3].copy_from_slice(b"abc");
        assert_eq!(&piece.into_bytes(3)[..], b"abc");
        assert_eq!(pieces.piece(LARGEST).into_bytes(0).len(), 0);
    }
}
