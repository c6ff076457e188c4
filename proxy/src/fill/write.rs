//! The blocking side of a fill: write in any order, hash in order, tell the readers.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::Fill;
use super::progress::Progress;
use crate::oci::digest::Verifier;
use crate::oci::{Span, Spans};
use crate::store::{Blob, Draft};

/// Pieces between the network and the disk; some 4 MiB.
const QUEUE: usize = 16;

/// What came out of order is read back this many bytes at a time.
const READ_BACK: u64 = 1024 * 1024;

/// Bytes on their way to the disk, and where they belong.
pub(super) struct Piece {
    pub(super) position: u64,
    pub(super) bytes: Bytes,
}

/// How a file ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Written {
    Verified,
    Mismatch,
    /// The pieces ended before the blob did; these are there.
    Part(Spans),
    /// The disk failed.
    DiskFailed,
}

/// Starts a thread that writes what it is sent into the draft, in which some of it may be already.
pub(super) fn start(fill: &Fill, draft: &Draft, written: Spans) -> (mpsc::Sender<Piece>, JoinHandle<Written>) {
    let (sender, pieces) = mpsc::channel(QUEUE);
    let writer = Writer {
        blob: draft.blob.clone(),
        progress: fill.progress.clone(),
        verifier: fill.key.digest.verifier(),
        hashed: 0,
        written,
    };
    let thread = tokio::task::spawn_blocking(move || {
        writer.run(pieces).unwrap_or_else(|error| {
            tracing::error!(%error, "a blob cannot be written");
            Written::DiskFailed
        })
    });
    (sender, thread)
}

/// Hashes a file that is whole, telling its readers as it goes. Whether it matches.
pub(super) fn hash_file(fill: &Fill, blob: &Arc<Blob>) -> bool {
    let mut writer = Writer {
        blob: blob.clone(),
        progress: fill.progress.clone(),
        verifier: fill.key.digest.verifier(),
        hashed: 0,
        written: Spans::default(),
    };
    while writer.hashed < blob.len {
        let next = Span { start: writer.hashed, end: blob.len.min(writer.hashed + READ_BACK) };
        if writer.hash_from_file(next).is_err() {
            return false;
        }
        writer.progress.send_modify(|progress| progress.wrote(next));
    }
    writer.verifier.verified()
}

struct Writer {
    blob: Arc<Blob>,
    progress: watch::Sender<Progress>,
    verifier: Verifier,
    /// Bytes from the start that went through the verifier.
    hashed: u64,
    written: Spans,
}

impl Writer {
    fn run(mut self, mut pieces: mpsc::Receiver<Piece>) -> io::Result<Written> {
        loop {
            let backlog = self.written.run_end(self.hashed);
            let piece = if backlog > self.hashed {
                // Between two pieces from the network, some of what waits to be hashed.
                self.hash_from_file(Span { start: self.hashed, end: backlog.min(self.hashed + READ_BACK) })?;
                match pieces.try_recv() {
                    Ok(piece) => piece,
                    Err(TryRecvError::Empty) => continue,
                    Err(TryRecvError::Disconnected) if self.written.run_end(0) == self.blob.len => continue,
                    Err(TryRecvError::Disconnected) => break,
                }
            } else {
                match pieces.blocking_recv() {
                    Some(piece) => piece,
                    None => break,
                }
            };
            self.write(&piece)?;
        }
        if self.hashed < self.blob.len {
            return Ok(Written::Part(std::mem::take(&mut self.written)));
        }
        Ok(if self.verifier.verified() { Written::Verified } else { Written::Mismatch })
    }

    fn write(&mut self, piece: &Piece) -> io::Result<()> {
        let span = Span { start: piece.position, end: piece.position + piece.bytes.len() as u64 };
        self.blob.file.write_all_at(&piece.bytes, span.start)?;
        self.written.insert(span);
        if span.start == self.hashed {
            self.verifier.update(&piece.bytes);
            self.hashed = span.end;
        }
        self.progress.send_modify(|progress| {
            progress.wrote(span);
            progress.hashed_to(self.hashed);
        });
        Ok(())
    }

    fn hash_from_file(&mut self, span: Span) -> io::Result<()> {
        let mut buffer = vec![0; usize::try_from(span.len()).unwrap_or(0)];
        self.blob.file.read_exact_at(&mut buffer, span.start)?;
        self.verifier.update(&buffer);
        self.hashed = span.end;
        self.progress.send_modify(|progress| progress.hashed_to(span.end));
        Ok(())
    }
}
