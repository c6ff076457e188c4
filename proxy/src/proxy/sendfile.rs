//! `sendfile(2)`: a file's bytes to a plain HTTP/1.1 client without copying them through this
//! process. It costs as much as reading and writing large pieces,
//! and no memory for a client that reads slowly.
//!
//! Pingora neither sends files nor lets go of its socket, so the answer's head goes through it and
//! the body past it, on a duplicate of the descriptor. Pingora counts the bytes of a body and closes
//! a connection on which some are missing; it counts none for a HEAD. While the head is written, the
//! request is therefore said to be one. The connection is then in the state that Pingora thinks it
//! is in once exactly the announced bytes were sent; if fewer were, the caller must close it.
//!
//! A small body and its head, which Pingora writes one after the other, go out together ([`cork`]).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use pingora::http::ResponseHeader;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::Session;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::net::sockopt::set_tcp_cork;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::oci::Span;
use crate::store::Blob;

/// Below this, the set-up costs more than the copy that it saves.
pub(super) const WORTHWHILE: u64 = 256 * 1024;

/// Bodies in memory of this size go out together with their head; smaller ones do anyway, from
/// Pingora's buffer.
pub(super) const CORKED: std::ops::Range<usize> = 1000..64 * 1024;

/// Sent at once: a fast client must not keep a worker to itself.
const CHUNK: u64 = 2 * 1024 * 1024;

/// Whether the page cache holds a chunk is asked once for each of these; the kernel reads ahead at
/// least as much.
const PROBE: u64 = 128 * 1024;

/// A client's socket, beside the one that Pingora holds.
pub(super) struct Socket(Arc<TcpStream>);

/// Holds back what is written until [`uncork`]: one packet, and one wake-up of the client, for a head
/// and a small body. Does nothing where the connection is no plain HTTP/1.1.
pub(super) fn cork(session: &Session) {
    let _ = descriptor(session).map(|socket| set_tcp_cork(socket, true));
}

pub(super) fn uncork(session: &Session) {
    let _ = descriptor(session).map(|socket| set_tcp_cork(socket, false));
}

/// The client's socket. None: the connection is no plain HTTP/1.1.
fn descriptor(session: &Session) -> Option<BorrowedFd<'_>> {
    let stream = session.as_http1()?.stream();
    let stream = (**stream).as_any().downcast_ref::<Stream>()?;
    // SAFETY: the stream owns the descriptor, and lives as long as the session that is borrowed.
    #[allow(unsafe_code)]
    Some(unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) })
}

impl Socket {
    /// None: the connection is no plain HTTP/1.1, so its bytes have to pass through this process.
    pub(super) fn of(session: &Session) -> Option<Self> {
        let own = rustix::io::fcntl_dupfd_cloexec(descriptor(session)?, 0).ok()?;
        Some(Self(Arc::new(TcpStream::from_std(own.into()).ok()?)))
    }

    /// Writes the head of an answer whose body goes past Pingora.
    pub(super) async fn write_head(session: &mut Session, head: ResponseHeader) -> pingora::Result<()> {
        let method = session.req_header().method.clone();
        session.req_header_mut().set_method(Method::HEAD);
        let written = session.write_response_header(Box::new(head), true).await;
        session.req_header_mut().set_method(method);
        written
    }

    /// Sends a span of a file and adds to `sent` what was taken. A client that takes nothing for
    /// `patience` is gone.
    pub(super) async fn send(
        &self,
        blob: &Arc<Blob>,
        mut span: Span,
        patience: Duration,
        sent: &mut u64,
    ) -> io::Result<()> {
        // Only full segments until the end: pushing each page costs a third more CPU.
        let _ = self.0.set_nodelay(false);
        let _ = set_tcp_cork(&*self.0, true);
        while !span.is_empty() {
            timeout(patience, self.0.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
            let count = span.len().min(CHUNK);
            let result = if is_cached(blob, span.start, count) {
                send_chunk(&self.0, blob, span.start, count)
            } else {
                // The disk may block, so that happens on a thread that may. The client cannot: its
                // socket is non-blocking.
                let (socket, blob, start) = (self.0.clone(), blob.clone(), span.start);
                let sending = tokio::task::spawn_blocking(move || send_chunk(&socket, &blob, start, count));
                sending.await.map_err(io::Error::other)?
            };
            match result {
                // More was promised than the file holds.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    span.start += count as u64;
                    *sent += count as u64;
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => {
                    blob.failed(&error);
                    return Err(error);
                }
            }
        }
        let _ = set_tcp_cork(&*self.0, false);
        let _ = self.0.set_nodelay(true);
        Ok(())
    }
}

fn send_chunk(socket: &TcpStream, blob: &Blob, mut start: u64, count: u64) -> io::Result<usize> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    socket.try_io(Interest::WRITABLE, || Ok(rustix::fs::sendfile(socket, &blob.file, Some(&mut start), count)?))
}

/// Whether sending this chunk would hardly wait for the disk.
fn is_cached(blob: &Blob, start: u64, count: u64) -> bool {
    let end = start + count;
    let probes = (start..end).step_by(usize::try_from(PROBE).unwrap_or(usize::MAX)).chain([end - 1]);
    let cached = |at| {
        let mut byte = [0];
        preadv2(&blob.file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT) != Err(Errno::AGAIN)
    };
    probes.into_iter().all(cached)
}
