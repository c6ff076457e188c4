//! A client's socket around Pingora: corking, and detection of a disconnect.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use pingora::protocols::http::ServerSession as Session;
use pingora::protocols::l4::stream::Stream;
use rustix::net::sockopt::set_tcp_cork;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A duplicate of an HTTP/1.1 connection's descriptor, beside the one that Pingora holds.
#[derive(Clone)]
pub(super) struct Socket(Arc<TcpStream>);

/// The descriptor of an HTTP/1.1 connection, valid while its session lives. Most requests end before they need a
/// duplicate.
pub(super) struct SocketDescriptor(RawFd);

/// Bodies in memory of these sizes, in bytes, are sent together with their head by corking. Pingora's buffer joins
/// smaller ones with a head of up to 1 KiB anyway.
pub(super) const CORKED_SIZES: std::ops::Range<usize> = 7 * 1024..64 * 1024;

/// Holds back writes until [`uncork`]: one packet, and one wake-up of the client, for a head and a small body. Does
/// nothing if the connection is not plain HTTP/1.1.
pub(super) fn cork(session: &Session) {
    let _ = plain(session).map(|socket| set_tcp_cork(socket, true));
}

pub(super) fn uncork(session: &Session) {
    let _ = plain(session).map(|socket| set_tcp_cork(socket, false));
}

/// The socket, if the connection is plain HTTP/1.1: what is written to it is what the client reads.
fn plain(session: &Session) -> Option<BorrowedFd<'_>> {
    let stream = session.as_http1()?.stream();
    (**stream).as_any().is::<Stream>().then(|| descriptor(session)).flatten()
}

fn descriptor(session: &Session) -> Option<BorrowedFd<'_>> {
    let stream = session.as_http1()?.stream();
    // SAFETY: on Unix a stream's id is its descriptor. The stream owns it and lives as long as the borrowed session.
    #[allow(unsafe_code)]
    Some(unsafe { BorrowedFd::borrow_raw(stream.id()) })
}

impl SocketDescriptor {
    /// None: the connection is not HTTP/1.1.
    pub(super) fn of(session: &Session) -> Option<Self> {
        descriptor(session).map(|socket| Self(socket.as_raw_fd()))
    }

    /// Ends when the client has closed its side. Must be polled only while the session lives.
    pub(super) async fn closed(&self) {
        // SAFETY: the session owns the descriptor and is not dropped before this future.
        #[allow(unsafe_code)]
        let socket = Socket::duplicate(unsafe { BorrowedFd::borrow_raw(self.0) });
        match socket {
            Some(socket) => socket.closed().await,
            None => std::future::pending().await,
        }
    }
}

impl Socket {
    /// None: the connection is not plain HTTP/1.1, so its bytes must be copied through this process.
    pub(super) fn of_plain(session: &Session) -> Option<Self> {
        Self::duplicate(plain(session)?)
    }

    /// None: the connection is not HTTP/1.1.
    pub(super) fn of(session: &Session) -> Option<Self> {
        Self::duplicate(descriptor(session)?)
    }

    fn duplicate(socket: BorrowedFd<'_>) -> Option<Self> {
        let own = rustix::io::fcntl_dupfd_cloexec(socket, 0).ok()?;
        Some(Self(Arc::new(TcpStream::from_std(own.into()).ok()?)))
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.0
    }

    /// Sends full segments only: sending each page on its own costs a third more CPU.
    pub(super) fn cork(&self) {
        let _ = self.0.set_nodelay(false);
        let _ = set_tcp_cork(self.0.as_fd(), true);
    }

    /// Sends what was held back, and sends writes at once again.
    pub(super) fn uncork(&self) {
        let _ = set_tcp_cork(self.0.as_fd(), false);
        let _ = self.0.set_nodelay(true);
    }

    /// Ends when the client has closed its side. A client that does so while it waits for a response has disconnected.
    pub(super) async fn closed(&self) {
        while let Ok(ready) = self.0.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            // A pipelined request is readable: clear the readiness, so that only a new event ends the wait.
            let _ = self.0.try_io(Interest::READABLE, || Err::<(), _>(std::io::ErrorKind::WouldBlock.into()));
        }
    }
}
