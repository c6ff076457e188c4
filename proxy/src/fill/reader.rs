//! Reads a span of a file that is complete, or that a fill is still writing.

use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::sync::watch;

use super::audience::Seat;
use super::piece::{Piece, piece_len};
use super::progress::{Phase, Progress};
use crate::oci::Span;
use crate::source::Broken;
use crate::store::Blob;

/// A span of a blob, piece by piece.
pub struct Reader {
    blob: Arc<Blob>,
    span: Span,
    /// None: the whole file is there.
    fill: Option<Following>,
}

/// A fill that is read along.
struct Following {
    progress: watch::Receiver<Progress>,
    seat: Seat,
}

impl Reader {
    pub fn of_blob(blob: Arc<Blob>, span: Span) -> Self {
        Self { blob, span, fill: None }
    }

    pub(super) fn of_fill(blob: Arc<Blob>, progress: watch::Receiver<Progress>, seat: Seat, span: Span) -> Self {
        Self { blob, span, fill: Some(Following { progress, seat }) }
    }

    /// What is still to be read, if all of it is there and proven.
    pub fn complete(&self) -> Option<(&Arc<Blob>, Span)> {
        let proven = |fill: &Following| fill.progress.borrow().phase() == Phase::Verified;
        self.fill.as_ref().is_none_or(proven).then_some((&self.blob, self.span))
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        if self.span.is_empty() {
            return Ok(None);
        }
        let readable = self.readable().await?;
        let len = usize::try_from(readable - self.span.start).unwrap_or(usize::MAX).min(piece_len());
        let read = read(&self.blob, self.span.start, len).await.inspect_err(|error| self.blob.failed(error));
        let bytes = read.map_err(|e| Broken(e.to_string()))?;
        if bytes.is_empty() {
            return Err(Broken("the file is shorter than it was".into()));
        }
        self.span.start += bytes.len() as u64;
        Ok(Some(bytes))
    }

    /// The end of what may be read now; waits until that is something.
    async fn readable(&mut self) -> Result<u64, Broken> {
        let Some(Following { progress, seat }) = &mut self.fill else {
            return Ok(self.span.end);
        };
        let (start, total) = (self.span.start, self.blob.len);
        let now = progress.borrow().readable(start, total);
        let readable = if now > start {
            now
        } else {
            seat.wait_for(start);
            let moved = progress.wait_for(|p| p.readable(start, total) > start || p.is_over()).await;
            seat.served();
            moved.map_err(|_| Broken("the fill vanished".into()))?.readable(start, total)
        };
        if readable <= start {
            return Err(Broken("the fill failed".into()));
        }
        Ok(readable.min(self.span.end))
    }
}

/// Reads without a thread what the page cache holds, and everything else on a thread that may block.
async fn read(blob: &Arc<Blob>, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut piece = Piece::new(len);
    let cached = {
        let mut slices = [IoSliceMut::new(piece.memory())];
        preadv2(&blob.file, &mut slices, offset, ReadWriteFlags::NOWAIT)
    };
    match cached {
        Ok(count) if count > 0 => return Ok(piece.into_bytes(count)),
        Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let blob = blob.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let count = blob.file.read_at(piece.memory(), offset)?;
        Ok(piece.into_bytes(count))
    });
    reading.await.map_err(io::Error::other)?
}
