//! Memory for the pieces of a file that are sent to clients, and their size.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Memory that all pieces together should take, in bytes. Larger: many slow readers take more memory. Smaller: they
/// read smaller pieces, which costs CPU.
const TARGET_BYTES: usize = 24 * 1024 * 1024;
const MAX_PIECE: usize = 1024 * 1024;
const MIN_PIECE: usize = 16 * 1024;

/// A new piece takes at most one part in this many of the memory left. Larger: pieces shrink sooner. Smaller: a few
/// slow readers take most of it.
const PIECE_SHARE: usize = 16;

/// Full-sized buffers kept for reuse. More: idle memory. Fewer: fast readers allocate and clear memory more often.
const MAX_SPARE: usize = 8;

/// The memory of all pieces.
#[derive(Default)]
pub struct PieceMemory {
    in_use: AtomicUsize,
    spare: Mutex<Vec<Box<[u8]>>>,
}

impl PieceMemory {
    /// Length of the next piece. The more memory slow readers hold, the less is left for each piece.
    pub fn piece_len(&self) -> usize {
        piece_len_with(self.in_use.load(Ordering::Relaxed))
    }

    pub fn piece(self: &Arc<Self>, len: usize) -> Piece {
        let spare = (len == MAX_PIECE).then(|| self.spare.lock().pop()).flatten();
        self.in_use.fetch_add(len, Ordering::Relaxed);
        let memory = spare.unwrap_or_else(|| vec![0; len].into_boxed_slice());
        Piece { memory, filled: 0, pool: self.clone() }
    }
}

fn piece_len_with(in_use: usize) -> usize {
    let share = TARGET_BYTES.saturating_sub(in_use) / PIECE_SHARE;
    (share / MIN_PIECE * MIN_PIECE).clamp(MIN_PIECE, MAX_PIECE)
}

/// A buffer to read into. A full-sized one is kept for reuse when its last `Bytes` is dropped, so that a fast reader
/// neither allocates nor clears memory.
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
        if self.memory.len() == MAX_PIECE {
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
        assert_eq!(piece_len_with(0), MAX_PIECE);
        let mut in_use = 0;
        for _ in 0..500 {
            in_use += piece_len_with(in_use);
        }
        assert!(in_use < TARGET_BYTES + 500 * MIN_PIECE, "{in_use}");
        assert_eq!(piece_len_with(in_use), MIN_PIECE);
    }

    #[test]
    fn piece_exposes_only_bytes_that_were_read() {
        let pieces = Arc::new(PieceMemory::default());
        let mut piece = pieces.piece(MAX_PIECE);
        piece.memory()[..3].copy_from_slice(b"abc");
        assert_eq!(&piece.into_bytes(3)[..], b"abc");
        assert_eq!(pieces.piece(MAX_PIECE).into_bytes(0).len(), 0);
    }
}
