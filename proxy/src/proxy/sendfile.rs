//! `sendfile(2)`: a file's bytes to a plain HTTP/1.1 client without copying them through this
//! process. It costs as much as reading and writing large pieces, and no memory for a client that
//! reads slowly.
//!
//! Pingora neither sends files nor lets go of its socket, so the answer's head goes through it and
//! the body past it, on a duplicate of the descriptor. Pingora counts the bytes of a body and closes
//! a connection on which some are missing; it counts none for a HEAD. While the head is written, the
//! request is therefore said to be one. The connection is then in the state that Pingora thinks it
//! is in once exactly the announced bytes were sent; if fewer were, the caller must close it.
//!
//! A file that is still growing is sent as far as it is there, again and again.

use std::io::{self, IoSliceMut};
use std::sync::Arc;

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

/// Below this, the set-up costs more than the copy that it saves.
pub(super) const WORTHWHILE: u64 = 256 * 1024;

/// Sent at once: a fast client must not keep a worker to itself.
const CHUNK: u64 = 2 * 1024 * 1024;

/// Whether the page cache holds a chunk is asked once for each of these; the kernel reads ahead at
/// least as much.
const PROBE: u64 = 128 * 1024;

/// A body on its way past Pingora.
pub(super) struct SendfileBody<'a> {
    socket: Socket,
    reader: &'a mut Reader,
    taking: SlowClientDetector,
}

/// Writes the head of an answer whose body goes past Pingora.
pub(super) async fn write_head(session: &mut Session, head: ResponseHeader) -> pingora::Result<()> {
    let method = session.req_header().method.clone();
    session.req_header_mut().set_method(Method::HEAD);
    let written = session.write_response_header(Box::new(head)).await;
    session.req_header_mut().set_method(method);
    written
}

impl<'a> SendfileBody<'a> {
    pub(super) fn new(socket: Socket, reader: &'a mut Reader) -> Self {
        socket.hold_back();
        Self { socket, reader, taking: SlowClientDetector::begin() }
    }

    /// Sends some of what is there, or waits until more is; how many bytes the client took. None:
    /// it has all.
    pub(super) async fn next(&mut self) -> Result<Option<u64>, Broken> {
        if self.reader.must_wait() {
            self.socket.push();
            tokio::select! {
                ready = self.reader.ready() => drop(ready?),
                () = self.socket.closed() => return Err(Broken("the client left".into())),
            }
            self.socket.hold_back();
            self.taking = SlowClientDetector::begin();
        }
        let Some((blob, mut span)) = self.reader.ready().await? else {
            self.socket.push();
            return Ok(None);
        };
        span.end = span.end.min(span.start + CHUNK);
        let sent = self.send(&blob, span).await.inspect_err(|error| blob.failed(error));
        let sent = sent.map_err(|error| Broken(error.to_string()))?;
        self.taking.took(sent);
        self.reader.skip(sent);
        Ok(Some(sent))
    }

    /// Sends some of a span.
    async fn send(&self, blob: &Arc<Blob>, span: Span) -> io::Result<u64> {
        loop {
            let writable = timeout_at(self.taking.until(), self.socket.stream().writable()).await;
            writable.map_err(|_| io::ErrorKind::TimedOut)??;
            let result = if is_cached(blob, span) {
                send_chunk(&self.socket, blob, span)
            } else {
                // The disk may block, so that happens on a thread that may. The client cannot: its
                // socket is non-blocking.
                let (socket, blob) = (self.socket.clone(), blob.clone());
                let sending = tokio::task::spawn_blocking(move || send_chunk(&socket, &blob, span));
                sending.await.map_err(io::Error::other)?
            };
            match result {
                // More was promised than the file holds.
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

/// Whether sending this would hardly wait for the disk.
fn is_cached(blob: &Blob, span: Span) -> bool {
    let probes = (span.start..span.end).step_by(usize::try_from(PROBE).unwrap_or(usize::MAX)).chain([span.end - 1]);
    let cached = |at| {
        let mut byte = [0];
        preadv2(&blob.file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) != Err(Errno::AGAIN)
    };
    probes.into_iter().all(cached)
}
