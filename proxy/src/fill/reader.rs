//! Reads a span of a complete file, or of a file that a fill is still writing.

use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::sync::watch;
use tokio::time::sleep;

use super::ReadMode;
use super::progress::Progress;
use super::readers::ReaderSlot;
use crate::oci::Span;
use crate::source::Broken;
use crate::store::Blob;
use crate::times::ALTERNATIVE_TIMEOUT;

/// A span of a blob, piece by piece.
pub struct Reader {
    blob: Arc<Blob>,
    span: Span,
    /// None: the whole file is cached.
    fill: Option<FillReader>,
}

/// The running fill that writes the file.
struct FillReader {
    progress: watch::Receiver<Progress>,
    slot: ReaderSlot,
    mode: ReadMode,
}

impl Reader {
    pub fn of_blob(blob: Arc<Blob>, span: Span) -> Self {
        Self { blob, span, fill: None }
    }

    pub(super) fn of_fill(
        blob: Arc<Blob>,
        progress: watch::Receiver<Progress>,
        slot: ReaderSlot,
        span: Span,
        mode: ReadMode,
    ) -> Self {
        Self { blob, span, fill: Some(FillReader { progress, slot, mode }) }
    }

    /// How many bytes are left to read.
    pub fn left(&self) -> u64 {
        self.span.len()
    }

    /// Whether the next byte has yet to arrive.
    pub fn must_wait(&self) -> bool {
        self.fill.as_ref().is_some_and(|fill| {
            let progress = fill.progress.borrow();
            !progress.is_over() && progress.readable(self.span.start, self.blob.len, fill.mode) <= self.span.start
        })
    }

    /// The span that may be read now; waits until it is not empty. None: everything was read.
    pub async fn ready(&mut self) -> Result<Option<(Arc<Blob>, Span)>, Broken> {
        if self.span.is_empty() {
            return Ok(None);
        }
        let end = self.readable().await?;
        Ok(Some((self.blob.clone(), Span { start: self.span.start, end })))
    }

    /// Marks `count` of the ready bytes as read.
    pub fn skip(&mut self, count: u64) {
        self.span.start = self.span.end.min(self.span.start + count);
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        let Some((blob, span)) = self.ready().await? else { return Ok(None) };
        let len = usize::try_from(span.len()).unwrap_or(usize::MAX).min(blob.pieces.piece_len());
        let read = read(&blob, span.start, len).await.inspect_err(|error| blob.failed(error));
        let bytes = read.map_err(|e| Broken(e.to_string()))?;
        if bytes.is_empty() {
            return Err(Broken("the cached file was truncated".into()));
        }
        self.skip(bytes.len() as u64);
        Ok(Some(bytes))
    }

    /// The end of what may be read now; waits until that is more than nothing.
    async fn readable(&mut self) -> Result<u64, Broken> {
        let Some(FillReader { progress, slot, mode }) = &mut self.fill else {
            return Ok(self.span.end);
        };
        let (start, total, mode) = (self.span.start, self.blob.len, *mode);
        let mut waits = false;
        loop {
            {
                let progress = progress.borrow_and_update();
                let readable = progress.readable(start, total, mode);
                if readable > start {
                    if waits {
                        slot.served();
                    }
                    return Ok(readable.min(self.span.end));
                }
                if progress.is_over() {
                    return Err(Broken("the download failed".into()));
                }
            }
            if !waits {
                // The byte may have arrived just before registration, so check again.
                slot.wait_for(start);
                waits = true;
                continue;
            }
            tokio::select! {
                () = slot.arrived() => {}
                () = sleep(ALTERNATIVE_TIMEOUT), if mode == ReadMode::UnverifiedUntilStall => {
                    return Err(Broken("no bytes arrived in time".into()));
                }
                changed = progress.changed() => changed.map_err(|_| Broken("the download ended".into()))?,
            }
        }
    }
}

/// Reads from the page cache on this thread, and everything else on a thread that may block.
#[expect(clippy::disallowed_methods, reason = "what may block has a thread for it")]
async fn read(blob: &Arc<Blob>, offset: u64, len: usize) -> io::Result<Bytes> {
    let mut piece = blob.pieces.piece(len);
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
