//! The blocking side of a fill: writes in any order, hashes in order, and notifies the readers.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{self as std_mpsc, TryRecvError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use super::Fill;
use super::progress::Progress;
use crate::oci::digest::DigestVerifier;
use crate::oci::{Span, Spans};
use crate::store::{Blob, Draft, Large};

/// Pieces of one blob that wait for the disk, and as many that wait for the hash. Larger: one blob takes more of
/// [`MAX_WAITING_KIB`]. Smaller: short pauses of the disk stop the download.
const QUEUED_PIECES: usize = 16;

/// Bytes that are read back at once for the hash, if they were written out of order. Larger: new pieces wait longer
/// between two reads. Smaller: more reads.
const READ_BACK_BYTES: u64 = 1024 * 1024;

/// Bytes to write, and their position in the blob.
pub(super) struct WritePiece {
    pub(super) position: u64,
    pub(super) bytes: Bytes,
    _memory: OwnedSemaphorePermit,
}

/// KiB that may wait for the disk or the hash, of all blobs together. Larger: a disk that hangs takes more memory.
/// Smaller: disks that pause for a moment delay all downloads.
pub(super) const MAX_WAITING_KIB: usize = 128 * 1024;

/// Sends the pieces of a blob to its writing thread.
#[derive(Clone)]
pub(super) struct BlobWriter {
    pieces: mpsc::Sender<WritePiece>,
    waiting_kib: Arc<Semaphore>,
}

/// The writing thread has ended.
#[derive(Debug)]
pub(super) struct WriterClosed;

impl BlobWriter {
    /// A writer, and the receiver of its pieces. All writers share `waiting_kib`.
    pub(super) fn new(waiting_kib: Arc<Semaphore>) -> (Self, mpsc::Receiver<WritePiece>) {
        let (pieces, received) = mpsc::channel(QUEUED_PIECES);
        (Self { pieces, waiting_kib }, received)
    }

    /// Waits for memory and for a slot in the queue.
    pub(super) async fn write(&self, position: u64, bytes: Bytes) -> Result<(), WriterClosed> {
        let kib = u32::try_from(bytes.len() / 1024 + 1).unwrap_or(u32::MAX);
        let memory = self.waiting_kib.clone().acquire_many_owned(kib).await.map_err(|_| WriterClosed)?;
        self.pieces.send(WritePiece { position, bytes, _memory: memory }).await.map_err(|_| WriterClosed)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.pieces.is_closed()
    }
}

impl WritePiece {
    fn span(&self) -> Span {
        Span { start: self.position, end: self.position + self.bytes.len() as u64 }
    }
}

impl WriteOutcome {
    fn failed(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::StorageFull {
            return Self::NoSpace;
        }
        tracing::error!(%error, "blob write failed");
        Self::DiskFailed
    }
}

/// How writing a file ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WriteOutcome {
    Verified,
    Mismatch,
    /// The pieces ended before the blob did; these spans are written.
    Part(Spans),
    /// There is no space left, and nothing more can be evicted.
    NoSpace,
    /// The disk failed.
    DiskFailed,
}

/// Starts two threads: one writes pieces into the draft, which may hold some of the blob already, and one hashes them.
/// On one thread both times would add up.
pub(super) fn start(
    fill: &Fill,
    large: &Arc<Large>,
    draft: &Draft,
    written: Spans,
    waiting_kib: Arc<Semaphore>,
) -> (BlobWriter, JoinHandle<WriteOutcome>) {
    let (writer, mut pieces) = BlobWriter::new(waiting_kib);
    let (large, blob, publisher) = (large.clone(), draft.blob.clone(), fill.publisher());
    let mut bytes = written.len();
    let mut recorder = large.recorder(draft, &fill.key.digest);
    let hasher = Hasher::new(fill, &draft.blob, written);
    let thread = tokio::task::spawn_blocking(move || {
        let (to_hash, from_disk) = std_mpsc::sync_channel(QUEUED_PIECES);
        let hashing = std::thread::Builder::new().name("hash".into()).spawn(move || hasher.run(&from_disk));
        let hashing = match hashing {
            Ok(hashing) => hashing,
            Err(error) => return WriteOutcome::failed(&error),
        };
        let mut failure = None;
        while let Some(piece) = pieces.blocking_recv() {
            bytes += piece.span().len();
            let reserved = large.reserve(&blob, bytes);
            if let Err(error) = reserved.and_then(|()| large.write(&blob, &piece.bytes, piece.position)) {
                failure = Some(error);
                break;
            }
            publisher.wrote(piece.span());
            if let Some(recorder) = &mut recorder {
                recorder.wrote(piece.span().len(), || publisher.written());
            }
            if to_hash.send(piece).is_err() {
                break;
            }
        }
        drop(to_hash);
        let hashed = hashing.join().unwrap_or_else(|_| Err(io::Error::other("the hash thread panicked")));
        match (failure, hashed) {
            (Some(error), _) | (None, Err(error)) => WriteOutcome::failed(&error),
            (None, Ok(written)) => written,
        }
    });
    (writer, thread)
}

/// Hashes a complete file and reports its progress to readers. True: the digest matches.
pub(super) fn hash_file(fill: &Fill, blob: &Arc<Blob>) -> bool {
    let mut hasher = Hasher::new(fill, blob, Spans::default());
    while hasher.hashed < blob.len {
        let next = Span { start: hasher.hashed, end: blob.len.min(hasher.hashed + READ_BACK_BYTES) };
        if hasher.hash_from_file(next).is_err() {
            return false;
        }
        fill.publisher().wrote(next);
    }
    hasher.verifier.verified()
}

/// Hashes in order what is written in any order.
struct Hasher {
    blob: Arc<Blob>,
    progress: watch::Sender<Progress>,
    verifier: DigestVerifier,
    /// Bytes from the start that went through the verifier.
    hashed: u64,
    written: Spans,
    /// Buffer for bytes that are read back.
    buffer: Vec<u8>,
}

impl Hasher {
    fn new(fill: &Fill, blob: &Arc<Blob>, written: Spans) -> Self {
        let (verifier, progress) = (fill.key.digest.verifier(), fill.progress.clone());
        Self { blob: blob.clone(), progress, verifier, hashed: 0, written, buffer: Vec::new() }
    }

    /// Hashes until the last piece. If it fails, the download is notified before its next piece.
    fn run(self, pieces: &std_mpsc::Receiver<WritePiece>) -> io::Result<WriteOutcome> {
        let progress = self.progress.clone();
        let hashed = self.hash(pieces);
        if hashed.is_err() {
            progress.send_modify(Progress::mark_unreadable);
        }
        hashed
    }

    fn hash(mut self, pieces: &std_mpsc::Receiver<WritePiece>) -> io::Result<WriteOutcome> {
        loop {
            let backlog = self.written.run_end(self.hashed);
            let piece = if backlog > self.hashed {
                // Between two pieces, hashes a part of the backlog.
                self.hash_from_file(Span { start: self.hashed, end: backlog.min(self.hashed + READ_BACK_BYTES) })?;
                match pieces.try_recv() {
                    Ok(piece) => piece,
                    Err(TryRecvError::Empty) => continue,
                    Err(TryRecvError::Disconnected) if self.written.run_end(0) == self.blob.len => continue,
                    Err(TryRecvError::Disconnected) => break,
                }
            } else {
                match pieces.recv() {
                    Ok(piece) => piece,
                    Err(_) => break,
                }
            };
            self.take(&piece);
        }
        if self.hashed < self.blob.len {
            return Ok(WriteOutcome::Part(self.written));
        }
        Ok(if self.verifier.verified() { WriteOutcome::Verified } else { WriteOutcome::Mismatch })
    }

    fn take(&mut self, piece: &WritePiece) {
        let span = piece.span();
        self.written.insert(span);
        if span.start == self.hashed {
            self.verifier.update(&piece.bytes);
            self.advance(span.end);
        }
    }

    #[expect(clippy::disallowed_methods, reason = "has a thread of its own")]
    fn hash_from_file(&mut self, span: Span) -> io::Result<()> {
        self.buffer.resize(usize::try_from(span.len()).unwrap_or(0), 0);
        self.blob.file.read_exact_at(&mut self.buffer, span.start)?;
        self.verifier.update(&self.buffer);
        self.advance(span.end);
        Ok(())
    }

    fn advance(&mut self, end: u64) {
        self.hashed = end;
        self.progress.send_if_modified(|progress| progress.hashed_to(end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskShare, Size};
    use crate::metrics::Metrics;
    use crate::oci::Digest;
    use crate::provenance::Provenance;
    use crate::store::Store;

    #[tokio::test]
    async fn unreadable_file_ends_the_download() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, free) = (DiskShare::Size(Size(64 << 20)), DiskShare::Percent(0));
        let store = Store::open(dir.path(), disk, free, 1 << 20, &Metrics::new()).await.unwrap();
        let provenance = Provenance { rule: "r".into(), registry: "a.io".into(), repository: "b".into() };
        let draft = store.large.draft(1 << 20, provenance).unwrap();
        draft.blob.file.set_len(0).unwrap();
        let blob = draft.blob.clone();
        let progress = watch::Sender::new(Progress::new());
        let verifier = Digest::of(b"x").verifier();
        // Recorded as written, but missing in the file.
        let written = Spans::from(Span { start: 0, end: 1 << 20 });
        let hasher = Hasher { blob, progress: progress.clone(), verifier, hashed: 0, written, buffer: Vec::new() };
        let (_sender, pieces) = std_mpsc::sync_channel(1);
        assert!(hasher.run(&pieces).is_err());
        assert!(progress.borrow().is_unreadable());
    }
}
