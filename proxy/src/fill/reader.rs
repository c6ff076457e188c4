//! Reads a span of a file that is complete, or that a fill is still writing.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::sync::watch;

use super::Progress;
use super::piece::{Piece, piece_len};
use crate::oci::Span;
use crate::source::Broken;
use crate::store::Blob;

/// A span of a blob, piece by piece.
pub struct Reader {
    file: Arc<File>,
    span: Span,
    /// None: the whole file is there.
    progress: Option<watch::Receiver<Progress>>,
    /// Keeps the blob's bytes counted.
    _blob: Option<Arc<Blob>>,
}

impl Reader {
    pub fn of_blob(blob: Arc<Blob>, span: Span) -> Self {
        Self { file: blob.file.clone(), span, progress: None, _blob: Some(blob) }
    }

    pub(super) fn of_fill(file: Arc<File>, progress: watch::Receiver<Progress>, span: Span) -> Self {
        Self { file, span, progress: Some(progress), _blob: None }
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        if self.span.is_empty() {
            return Ok(None);
        }
        let readable = self.readable().await?;
        let len = usize::try_from(readable - self.span.start).unwrap_or(usize::MAX).min(piece_len());
        let bytes = read(&self.file, self.span.start, len).await.map_err(|e| Broken(e.to_string()))?;
        if bytes.is_empty() {
            return Err(Broken("the file is shorter than it was".into()));
        }
        self.span.start += bytes.len() as u64;
        Ok(Some(bytes))
    }

    /// The end of what may be read now; waits until that is something.
    async fn readable(&mut self) -> Result<u64, Broken> {
        let Some(progress) = &mut self.progress else {
            return Ok(self.span.end);
        };
        let start = self.span.start;
        let moved = progress.wait_for(|p| p.released > start || p.is_over()).await;
        let released = moved.map_err(|_| Broken("the fill vanished".into()))?.released;
        if released <= start {
            return Err(Broken("the fill failed".into()));
        }
        Ok(released.min(self.span.end))
    }
}

/// Reads without a thread what the page cache holds, and everything else on a thread that may block.
async fn read(file: &Arc<File>, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut piece = Piece::new(len);
    let cached = {
        let mut slices = [IoSliceMut::new(piece.memory())];
        preadv2(file, &mut slices, offset, ReadWriteFlags::NOWAIT)
    };
    match cached {
        Ok(count) if count > 0 => return Ok(piece.into_bytes(count)),
        Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let file = file.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let count = file.read_at(piece.memory(), offset)?;
        Ok(piece.into_bytes(count))
    });
    reading.await.map_err(io::Error::other)?
}
