//! A client's socket past Pingora: what it should hold back, and whether the client is still there.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use pingora::protocols::http::ServerSession as Session;
use pingora::protocols::l4::stream::Stream;
use rustix::net::sockopt::set_tcp_cork;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Another descriptor of the socket of an HTTP/1.1 connection, beside the one that Pingora holds.
#[derive(Clone)]
pub(super) struct Socket(Arc<TcpStream>);

/// The descriptor of an HTTP/1.1 connection, for as long as its session lives: a request that is answered at once, as most
/// are, needs no other one.
pub(super) struct SocketDescriptor(RawFd);

/// Bodies in memory of this size go out together with their head. Smaller ones do anyway, from Pingora's buffer, which has
/// room for a head of 1 KiB beside them.
pub(super) const CORKED: std::ops::Range<usize> = 7 * 1024..64 * 1024;

/// Holds back what is written until [`uncork`]: one packet, and one wake-up of the client, for a head
/// and a small body. Does nothing where the connection is no plain HTTP/1.1.
pub(super) fn cork(session: &Session) {
    let _ = plain(session).map(|socket| set_tcp_cork(socket, true));
}

pub(super) fn uncork(session: &Session) {
    let _ = plain(session).map(|socket| set_tcp_cork(socket, false));
}

/// The socket, where what is written to it is what the client reads.
fn plain(session: &Session) -> Option<BorrowedFd<'_>> {
    let stream = session.as_http1()?.stream();
    (**stream).as_any().is::<Stream>().then(|| descriptor(session)).flatten()
}

fn descriptor(session: &Session) -> Option<BorrowedFd<'_>> {
    let stream = session.as_http1()?.stream();
    // SAFETY: on Unix a stream's id is its descriptor, which it owns; it lives as long as the session
    // that is borrowed.
    #[allow(unsafe_code)]
    Some(unsafe { BorrowedFd::borrow_raw(stream.id()) })
}

impl SocketDescriptor {
    /// None: the connection is not HTTP/1.1.
    pub(super) fn of(session: &Session) -> Option<Self> {
        descriptor(session).map(|socket| Self(socket.as_raw_fd()))
    }

    /// Ends when the client has closed its side. Polled only while the session lives.
    pub(super) async fn closed(&self) {
        // SAFETY: the caller holds the session, which owns the descriptor, until this future is dropped.
        #[allow(unsafe_code)]
        let socket = Socket::beside(unsafe { BorrowedFd::borrow_raw(self.0) });
        match socket {
            Some(socket) => socket.closed().await,
            None => std::future::pending().await,
        }
    }
}

impl Socket {
    /// None: the connection is no plain HTTP/1.1, so its bytes have to pass through this process.
    pub(super) fn of_plain(session: &Session) -> Option<Self> {
        Self::beside(plain(session)?)
    }

    /// None: the connection is no HTTP/1.1.
    pub(super) fn of(session: &Session) -> Option<Self> {
        Self::beside(descriptor(session)?)
    }

    fn beside(socket: BorrowedFd<'_>) -> Option<Self> {
        let own = rustix::io::fcntl_dupfd_cloexec(socket, 0).ok()?;
        Some(Self(Arc::new(TcpStream::from_std(own.into()).ok()?)))
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.0
    }

    /// Sends full segments only: pushing each page costs a third more CPU.
    pub(super) fn hold_back(&self) {
        let _ = self.0.set_nodelay(false);
        let _ = set_tcp_cork(self.0.as_fd(), true);
    }

    /// Sends what was held back.
    pub(super) fn push(&self) {
        let _ = set_tcp_cork(self.0.as_fd(), false);
        let _ = self.0.set_nodelay(true);
    }

    /// Ends when the client closed its side. Whoever does that while it waits for an answer has left.
    pub(super) async fn closed(&self) {
        while let Ok(ready) = self.0.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            // The next request waits already: only a new event is of interest.
            let _ = self.0.try_io(Interest::READABLE, || Err::<(), _>(std::io::ErrorKind::WouldBlock.into()));
        }
    }
}
