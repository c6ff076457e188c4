//! `sendfile(2)`: a file's bytes to a plain HTTP/1.1 client without copying them through this process. It costs as much
//! as reading and writing large pieces, and no memory for a client that reads slowly.
//!
//! Pingora neither sends files nor releases its socket: it writes the head, and the body goes around it on a duplicate
//! of the descriptor. Pingora counts the bytes of a body and closes a connection on which some are missing; for HEAD it
//! counts none. So the request pretends to be HEAD while the head is written. Pingora's view of the connection is
//! correct again once exactly the announced bytes are sent. If fewer are sent, the connection must be closed.
//!
//! A file that is still growing is sent piece by piece, up to its current end.

use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession as Session;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use tokio::io::Interest;
use tokio::time::timeout_at;

use super::slow_clients::SlowClientDetector;
use super::socket::Socket;
use crate::fill::Reader;
use crate::oci::Span;
use crate::source::Broken;
use crate::store::Blob;

/// A smaller body, in bytes, is copied: the set-up of `sendfile` would cost more than the copy that it saves.
pub(super) const MIN_SENDFILE_BYTES: u64 = 256 * 1024;

/// Bytes of one `sendfile` call. Larger: a fast client keeps a worker from other connections for longer. Smaller: more
/// calls.
pub(super) const MAX_CHUNK_BYTES: u64 = 2 * 1024 * 1024;

/// One byte of each such step is probed in the page cache. The kernel reads ahead at least as much; larger steps could
/// miss a gap, and block a worker on the disk.
const CACHE_PROBE_STEP: u64 = 128 * 1024;

/// A body that is sent around Pingora.
pub(super) struct SendfileBody<'a> {
    socket: Socket,
    reader: &'a mut Reader,
    detector: SlowClientDetector,
    /// Bytes of one call.
    max_chunk: u64,
}

/// Writes the head of a response whose body is sent around Pingora.
pub(super) async fn write_head(session: &mut Session, head: ResponseHeader) -> pingora::Result<()> {
    let method = session.req_header().method.clone();
    session.req_header_mut().set_method(Method::HEAD);
    let written = session.write_response_header(Box::new(head)).await;
    session.req_header_mut().set_method(method);
    written
}

impl<'a> SendfileBody<'a> {
    pub(super) fn new(socket: Socket, reader: &'a mut Reader, max_chunk: u64) -> Self {
        socket.cork();
        Self { socket, reader, detector: SlowClientDetector::start(), max_chunk }
    }

    /// Ends when the client has disconnected.
    pub(super) async fn closed(&self) {
        self.socket.closed().await;
    }

    /// The client is not slow for this time: dray did not send.
    pub(super) fn excuse(&mut self, time: Duration) {
        self.detector.excuse(time);
    }

    /// Sends some of the available bytes, or waits for more. Returns how many the client accepted; None at the end of
    /// the body.
    pub(super) async fn next(&mut self) -> Result<Option<u64>, Broken> {
        if self.reader.must_wait() {
            self.socket.uncork();
            tokio::select! {
                ready = self.reader.ready() => drop(ready?),
                () = self.socket.closed() => return Err(Broken("the client disconnected".into())),
            }
            self.socket.cork();
            self.detector = SlowClientDetector::start();
        }
        let Some((blob, mut span)) = self.reader.ready().await? else {
            self.socket.uncork();
            return Ok(None);
        };
        span.end = span.end.min(span.start + self.max_chunk);
        let sent = self.send(&blob, span).await.inspect_err(|error| blob.failed(error));
        let sent = sent.map_err(|error| Broken(error.to_string()))?;
        self.detector.record(sent);
        self.reader.skip(sent);
        Ok(Some(sent))
    }

    /// Sends the start of a span, as much as the socket accepts.
    async fn send(&self, blob: &Arc<Blob>, span: Span) -> io::Result<u64> {
        loop {
            let writable = timeout_at(self.detector.deadline(), self.socket.stream().writable()).await;
            writable.map_err(|_| io::ErrorKind::TimedOut)??;
            let result = if is_cached(blob, span) {
                send_chunk(&self.socket, blob, span)
            } else {
                // The disk may block, so this runs on a thread for blocking work. The client cannot block it: its
                // socket is non-blocking.
                let (socket, blob) = (self.socket.clone(), blob.clone());
                let sending = tokio::task::spawn_blocking(move || send_chunk(&socket, &blob, span));
                sending.await.map_err(io::Error::other)?
            };
            match result {
                // The file is shorter than the announced length.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => return Ok(count as u64),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn send_chunk(socket: &Socket, blob: &Blob, span: Span) -> io::Result<usize> {
    let (mut start, count) = (span.start, usize::try_from(span.len()).unwrap_or(usize::MAX));
    let socket = socket.stream();
    socket.try_io(Interest::WRITABLE, || Ok(rustix::fs::sendfile(socket, &blob.file, Some(&mut start), count)?))
}

/// Whether the page cache probably holds the span, so that sending it does not wait for the disk.
fn is_cached(blob: &Blob, span: Span) -> bool {
    let probes =
        (span.start..span.end).step_by(usize::try_from(CACHE_PROBE_STEP).unwrap_or(usize::MAX)).chain([span.end - 1]);
    let cached = |at| {
        let mut byte = [0];
        preadv2(&blob.file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) != Err(Errno::AGAIN)
    };
    probes.into_iter().all(cached)
}
