//! The blocking side of a fill: hash in order, write, release.

use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{Fill, HELD_BYTES, Progress};
use crate::oci::digest::Verifier;
use crate::store::{Blob, Draft};

/// Pieces between the network and the disk; some 4 MiB.
const QUEUE: usize = 16;

/// How a file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    Verified,
    Mismatch,
    /// The feed ended before the blob did.
    Short,
    /// The disk failed.
    DiskFailed,
}

/// Starts a thread that writes what it is sent into the draft.
pub(super) fn start(fill: &Fill, draft: &Draft) -> (mpsc::Sender<Bytes>, JoinHandle<Written>) {
    let (sender, mut pieces) = mpsc::channel::<Bytes>(QUEUE);
    let (blob, total, progress) = (draft.blob.clone(), draft.blob.len, fill.progress.clone());
    let mut verifier = fill.key.digest.verifier();
    let thread = tokio::task::spawn_blocking(move || {
        let mut written = 0;
        while let Some(piece) = pieces.blocking_recv() {
            verifier.update(&piece);
            if let Err(error) = blob.file.write_all_at(&piece, written) {
                tracing::error!(%error, "a blob cannot be written");
                return Written::DiskFailed;
            }
            written += piece.len() as u64;
            release(&progress, written.min(total.saturating_sub(HELD_BYTES)));
        }
        match written == total {
            false => Written::Short,
            true if verifier.verified() => Written::Verified,
            true => Written::Mismatch,
        }
    });
    (sender, thread)
}

/// Hashes a file that is whole, releasing as it goes. Whether it matches.
pub(super) fn hash_file(fill: &Fill, blob: &Blob) -> bool {
    let mut verifier = fill.key.digest.verifier();
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    while position < blob.len {
        match read_into(&blob.file, &mut buffer, position, &mut verifier) {
            Ok(count) if count > 0 => position += count as u64,
            _ => return false,
        }
        release(&fill.progress, position.min(blob.len.saturating_sub(HELD_BYTES)));
    }
    verifier.verified()
}

fn read_into(file: &std::fs::File, buffer: &mut [u8], position: u64, verifier: &mut Verifier) -> io::Result<usize> {
    let count = file.read_at(buffer, position)?;
    verifier.update(&buffer[..count]);
    Ok(count)
}

fn release(progress: &watch::Sender<Progress>, released: u64) {
    progress.send_modify(|progress| progress.released = released);
}
