//! The connections of a listener: how long they may idle, and how long the head of a request may take.
//!
//! Pingora bounds each read, so that a client that sends one byte a minute would keep a connection for ever. This
//! module reads the head of a request whole, with one deadline, and passes it to Pingora.

mod idle;

use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use http::Version;
use http::header::CONNECTION;
use http::request::Parts;
use memchr::memchr_iter;
use pingora::apps::{HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::listeners::tls::{Acceptor, TlsSettings};
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::stream::Stream as TcpStream;
use pingora::protocols::{ALPN, Stream};
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use self::idle::{CloseTarget, Idle};
use crate::memory::{ClientBytes, Memory};
use crate::shares::{Share, Shares};
use crate::times::{CLOSE_TIMEOUT, COMPLETION_GRACE, STALL_TIMEOUT};
use crate::worker_watch::watched;

/// Accepts connections, and passes their requests to an application.
pub struct Connections<A> {
    app: Arc<A>,
    /// By client address, without a fixed limit: a load balancer opens all its connections from one address.
    slots: Shares<Option<IpAddr>>,
    idle: Arc<Idle>,
    /// Budget for heads while they are read.
    memory: Arc<Memory>,
    tls: Option<Acceptor>,
    /// Header lines of a rejection for lack of slots or memory.
    refusal: &'static str,
}

/// One connection of HTTP/2.
struct Streams<A> {
    app: Arc<A>,
    options: HttpServerOptions,
    /// Number of running requests.
    active: watch::Sender<usize>,
    /// Whether there was a request.
    begun: AtomicBool,
}

/// The bytes of a request before its body.
#[derive(Default)]
struct Head {
    bytes: BytesMut,
    /// Length of the prefix that was searched for the end of the head.
    seen: usize,
}

/// Why a connection ends without a request.
#[derive(Debug, PartialEq, Eq)]
enum HeadError {
    /// The connection idles, was closed, or must end.
    Closed,
    /// Another protocol, such as TLS.
    NotHttp,
    TooSlow,
    TooLong,
    /// The limit of connections, or of memory for heads, is reached.
    TooMany,
}

/// A connection without a request is closed after this time. Longer: idle clients hold slots. Shorter: pulls that
/// follow each other connect again.
const CLIENT_IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Largest head of a request, in bytes: larger than any that a client of a registry sends. Larger: each connection may
/// hold more memory. Smaller: clients with long tokens are refused.
const MAX_HEAD_BYTES: usize = 64 * 1024;

impl<A> Connections<A> {
    /// At most `most` connections at a time, and no more than there is memory for.
    pub fn new(app: A, most: usize, memory: Arc<Memory>) -> Self {
        let slots = Shares::new(most.min(memory.connections));
        Self { app: Arc::new(app), slots, idle: Arc::default(), memory, tls: None, refusal: "" }
    }

    /// For peers, which would take a 503 without this header for the status of the upstream.
    pub fn for_peers(self) -> Self {
        Self { refusal: "Dray-Refusal: overloaded\r\n", ..self }
    }

    /// The same behind TLS. A connection takes its slot before its handshake: Pingora's own listeners do not count
    /// connections in a handshake, and wait a minute for each.
    pub fn with_tls(self, settings: TlsSettings) -> Self {
        Self { tls: Some(settings.build()), ..self }
    }

    /// The connection after its handshake. None: the handshake failed, or the connection had to free its slot.
    async fn accept_tls(&self, stream: Stream, acceptor: &Acceptor, from: Option<IpAddr>) -> Option<Stream> {
        let plain = stream.into_any().downcast::<TcpStream>().ok()?;
        let mut waiting = self.idle.enter(from);
        let handshake = tokio::select! {
            handshake = timeout(STALL_TIMEOUT, acceptor.tls_handshake(*plain)) => handshake.ok()?,
            () = waiting.closed() => return None,
        };
        match handshake {
            Ok(stream) => Some(Box::new(stream)),
            Err(error) => {
                tracing::debug!(client = from.map(tracing::field::display), %error, "TLS handshake failed");
                None
            }
        }
    }

    /// A slot for a new connection. If none is free, an idle connection is closed: one of the same client, or the
    /// oldest if the client has no slot. A client with slots never costs another client a connection.
    async fn acquire_slot(&self, client: Option<IpAddr>) -> Option<Share<Option<IpAddr>>> {
        if let Some(slot) = self.slots.take(&client, 1) {
            return Some(slot);
        }
        let target = if self.slots.is_holding(&client) { CloseTarget::Client(client) } else { CloseTarget::Any };
        let is_closed = self.idle.close_oldest(target);
        let slot = timeout(CLOSE_TIMEOUT, self.slots.wait(&client, 1));
        if is_closed { slot.await.ok() } else { None }
    }
}

/// How many seconds a connection waits for its next request. None: it is closed, as is the default of HTTP/1.0 (RFC
/// 9112, section 9.3).
pub fn keep_alive_seconds(request: &Parts) -> Option<u64> {
    let is_keep_alive = || {
        let values = request.headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case("keep-alive"))
    };
    (request.version >= Version::HTTP_11 || is_keep_alive()).then_some(CLIENT_IDLE_TIMEOUT.as_secs())
}

#[async_trait]
impl<A: HttpServerApp + Send + Sync + 'static> ServerApp for Connections<A> {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        watched(self.serve(stream, shutdown)).await;
        None
    }

    async fn cleanup(&self) {
        self.app.http_cleanup().await;
    }
}

impl<A: HttpServerApp + Send + Sync + 'static> Connections<A> {
    async fn serve(&self, stream: Stream, shutdown: &ShutdownWatch) {
        let digest = stream.get_socket_digest();
        let from = digest.as_ref().and_then(|digest| digest.peer_addr()?.as_inet()).map(|from| from.ip());
        let from = from.map(|from| client(from.to_canonical()));
        let Some(_slot) = self.acquire_slot(from).await else {
            if self.tls.is_none() {
                reject(stream, &HeadError::TooMany, self.refusal).await;
            }
            return;
        };
        let stream = match &self.tls {
            Some(acceptor) => match self.accept_tls(stream, acceptor, from).await {
                Some(stream) => stream,
                None => return,
            },
            None => stream,
        };
        if matches!(stream.selected_alpn_proto(), Some(ALPN::H2)) {
            self.serve_http2(stream, from, shutdown).await;
        } else {
            self.serve_http1(stream, from, shutdown).await;
        }
    }

    /// HTTP/1: one request after the other.
    async fn serve_http1(&self, mut stream: Stream, from: Option<IpAddr>, shutdown: &ShutdownWatch) {
        let mut settings = None::<HttpPersistentSettings>;
        loop {
            let mut shutdown_begins = shutdown.clone();
            let head = tokio::select! {
                biased;
                head = self.read_head(&mut stream, from) => head,
                () = async { let _ = shutdown_begins.wait_for(|begun| *begun).await; } => Err(HeadError::Closed),
            };
            let head = match head {
                Ok(head) => head,
                Err(error) => return reject(stream, &error, self.refusal).await,
            };
            let mut session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
            }
            session.set_pipelined_prefix(head);
            session.set_total_drain_timeout(Some(COMPLETION_GRACE));
            let Some(reused) = self.app.process_new_http(session, shutdown).await else { return };
            (stream, settings) = reused.consume();
        }
    }

    /// Waits for a request, and reads its head.
    async fn read_head(&self, stream: &mut Stream, from: Option<IpAddr>) -> Result<BytesMut, HeadError> {
        let mut head = Head::default();
        let mut waiting = self.idle.enter(from);
        tokio::select! {
            begun = head.begin(stream) => begun?,
            () = waiting.closed() => return Err(HeadError::Closed),
        }
        drop(waiting);
        head.read_rest(stream, self.memory.of_clients.nothing(&from)).await
    }

    /// HTTP/2: many requests at once.
    async fn serve_http2(&self, stream: Stream, from: Option<IpAddr>, shutdown: &ShutdownWatch) {
        let mut options = HttpServerOptions::default();
        // With TLS, the handshake has already selected HTTP/2.
        options.h2c = true;
        options.h2_idle_timeout = Some(CLIENT_IDLE_TIMEOUT);
        let active = watch::Sender::new(0);
        let streams = Arc::new(Streams { app: self.app.clone(), options, active, begun: AtomicBool::new(false) });
        // After the first request, Pingora itself closes the connection when it idles.
        let never_begun = async {
            sleep(CLIENT_IDLE_TIMEOUT).await;
            if streams.begun.load(Ordering::Acquire) {
                std::future::pending::<()>().await;
            }
        };
        // Pingora sends GOAWAY when this changes: at a shutdown, or when the connection must free its slot. Running
        // responses are finished then, and a client knows that it may retry on another connection.
        let (ends, ending) = watch::channel(*shutdown.borrow());
        let mut serving = pin!(streams.process_new(stream, &ending));
        let mut shutdown = shutdown.clone();
        tokio::select! {
            _ = &mut serving => {}
            () = never_begun => {}
            () = self.slot_needed(&streams.active, from) => {
                ends.send_replace(true);
                let _ = timeout(CLOSE_TIMEOUT, serving).await;
            }
            () = async { let _ = shutdown.wait_for(|begun| *begun).await; } => {
                ends.send_replace(true);
                serving.await;
            }
        }
    }
}

impl<A> Connections<A> {
    /// Returns when the connection must free its slot, which only happens without a running request.
    async fn slot_needed(&self, active: &watch::Sender<usize>, from: Option<IpAddr>) {
        let mut active = active.subscribe();
        while active.wait_for(|count| *count == 0).await.is_ok() {
            let mut waiting = self.idle.enter(from);
            tokio::select! {
                () = waiting.closed() => return,
                _ = active.wait_for(|count| *count > 0) => {}
            }
        }
    }
}

#[async_trait]
impl<A: HttpServerApp + Send + Sync + 'static> HttpServerApp for Streams<A> {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        self.begun.store(true, Ordering::Release);
        session.set_total_drain_timeout(Some(COMPLETION_GRACE));
        self.active.send_modify(|count| *count += 1);
        let _ended = RequestGuard(&self.active);
        // A task of its own, beside the connection's.
        watched(self.app.process_new_http(session, shutdown)).await
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}

/// Ends the count of a running request, also if its stream was reset.
struct RequestGuard<'a>(&'a watch::Sender<usize>);

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// The address that a client is counted by: a host has a whole network of IPv6 addresses (RFC 4291, section 2.5.4).
pub fn client(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

/// Sends the reason as a status, then closes the connection.
async fn reject(mut stream: Stream, error: &HeadError, refusal: &str) {
    let status = match error {
        HeadError::Closed => return,
        HeadError::NotHttp => "400 Bad Request",
        HeadError::TooSlow => "408 Request Timeout",
        HeadError::TooLong => "431 Request Header Fields Too Large",
        HeadError::TooMany => "503 Service Unavailable",
    };
    tracing::debug!(status, "connection closed before a complete request");
    let refusal = if *error == HeadError::TooMany { refusal } else { "" };
    let response = format!("HTTP/1.1 {status}\r\n{refusal}Connection: close\r\nContent-Length: 0\r\n\r\n");
    let farewell = async {
        stream.write_all(response.as_bytes()).await?;
        AsyncWriteExt::shutdown(&mut stream).await?;
        // Unread bytes would reset the connection, and discard the response with it.
        let mut unread = [0; 512];
        while stream.read(&mut unread).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    let _ = timeout(CLOSE_TIMEOUT, farewell).await;
}

impl Head {
    /// Waits for the first bytes.
    async fn begin(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> Result<(), HeadError> {
        timeout(CLIENT_IDLE_TIMEOUT, self.read(stream)).await.unwrap_or(Err(HeadError::Closed))
    }

    /// Reads until the head is complete. Its memory counts as that of the client, so that a client cannot hold many
    /// half heads.
    async fn read_rest(
        mut self,
        stream: &mut (impl AsyncRead + Unpin),
        mut held: ClientBytes,
    ) -> Result<BytesMut, HeadError> {
        let rest = async {
            while !self.is_complete()? {
                if !held.cover(self.bytes.capacity()) {
                    return Err(HeadError::TooMany);
                }
                self.read(stream).await?;
            }
            Ok(self.bytes)
        };
        timeout(STALL_TIMEOUT, rest).await.unwrap_or(Err(HeadError::TooSlow))
    }

    async fn read(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> Result<(), HeadError> {
        if self.bytes.len() >= MAX_HEAD_BYTES {
            return Err(HeadError::TooLong);
        }
        self.bytes.reserve(1024);
        match stream.read_buf(&mut self.bytes).await {
            Ok(0) | Err(_) => Err(HeadError::Closed),
            Ok(_) => Ok(()),
        }
    }

    /// Whether the head ends with an empty line. Lines end with or without a carriage return, and empty lines may
    /// precede the first one (RFC 9112, sections 2.2 and 3.1).
    fn is_complete(&mut self) -> Result<bool, HeadError> {
        while let Some(b'\r' | b'\n') = self.bytes.first() {
            self.bytes.advance(1);
        }
        if self.bytes.first().is_some_and(|first| !first.is_ascii_graphic()) {
            return Err(HeadError::NotHttp);
        }
        let new = &self.bytes[self.seen.saturating_sub(2)..];
        self.seen = self.bytes.len();
        Ok(memchr_iter(b'\n', new).any(|at| matches!(new[at + 1..], [b'\n', ..] | [b'\r', b'\n', ..])))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Reads a head, the bytes of which arrive one by one, `apart` from each other.
    async fn trickled(text: &str, apart: Duration) -> Result<BytesMut, HeadError> {
        let (mut client, mut server) = duplex(1);
        let text = text.to_owned();
        tokio::spawn(async move {
            for byte in text.bytes() {
                sleep(apart).await;
                if client.write_u8(byte).await.is_err() {
                    return;
                }
            }
            std::future::pending::<()>().await;
            drop(client);
        });
        read(&mut server).await
    }

    async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<BytesMut, HeadError> {
        let (mut head, memory) = (Head::default(), Memory::new(16 * MAX_HEAD_BYTES));
        head.begin(stream).await?;
        head.read_rest(stream, memory.of_clients.nothing(&None)).await
    }

    #[tokio::test(start_paused = true)]
    async fn head_ends_with_an_empty_line() {
        for (text, is_whole) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", true),
            ("GET / HTTP/1.1\nHost: a\n\n", true),
            ("GET / HTTP/1.1\nHost: a\n\r\n", true),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\n", true),
            ("\n\nGET / HTTP/1.1\r\nHost: a\r\n", false),
            ("\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nHost: a\r\n", false),
        ] {
            let got = trickled(text, Duration::from_millis(1)).await;
            let expected =
                if is_whole { Ok(text.trim_start_matches(['\r', '\n']).into()) } else { Err(HeadError::TooSlow) };
            assert_eq!(got, expected, "{text:?}");
        }
        for text in ["\u{16}\u{3}\u{1}", "\r\n GET / HTTP/1.1", "\u{e9}"] {
            assert_eq!(trickled(text, Duration::from_millis(1)).await, Err(HeadError::NotHttp), "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn head_deadline_begins_with_the_first_byte() {
        let text = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        assert!(trickled(text, Duration::from_millis(300)).await.is_ok(), "within ten seconds");
        assert_eq!(trickled(text, Duration::from_secs(1)).await, Err(HeadError::TooSlow));
        assert_eq!(trickled(text, CLIENT_IDLE_TIMEOUT * 2).await, Err(HeadError::Closed), "no request");
        let begun = tokio::time::Instant::now();
        assert!(trickled("G", CLIENT_IDLE_TIMEOUT / 2).await.is_err());
        assert!(
            begun.elapsed() <= CLIENT_IDLE_TIMEOUT / 2 + STALL_TIMEOUT + Duration::from_secs(1),
            "an idle connection is not slow"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn oversized_head_is_refused() {
        let (mut client, mut server) = duplex(1024);
        tokio::spawn(async move {
            let line = format!("X: {}\r\n", "x".repeat(1000));
            client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
            while client.write_all(line.as_bytes()).await.is_ok() {}
        });
        assert_eq!(read(&mut server).await, Err(HeadError::TooLong));
        let (client, mut server) = duplex(1024);
        drop(client);
        assert_eq!(read(&mut server).await, Err(HeadError::Closed));
    }

    #[tokio::test(start_paused = true)]
    async fn half_heads_of_a_client_leave_room_for_others() {
        let memory = Memory::new(32 * 1024);
        let mut clients = Vec::new();
        let mut outcomes = Vec::new();
        for address in [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2] {
            let (mut client, mut server) = duplex(8192);
            client.write_all(b"GET / HTTP/1.1\r\nX: half").await.unwrap();
            clients.push(client);
            let mut head = Head::default();
            head.begin(&mut server).await.unwrap();
            let held = memory.of_clients.nothing(&Some(IpAddr::from([192, 0, 2, address])));
            outcomes.push(tokio::spawn(async move { head.read_rest(&mut server, held).await }));
            tokio::task::yield_now().await;
        }
        let outcomes = futures_util::future::join_all(outcomes).await;
        let outcomes: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
        let refused = outcomes.iter().filter(|outcome| **outcome == Err(HeadError::TooMany)).count();
        assert!((1..12).contains(&refused), "{refused} of the first client's");
        assert_eq!(outcomes.last(), Some(&Err(HeadError::TooSlow)), "the other client has its own share");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_is_closed_for_a_new_one() {
        let connections = Connections::new(NeverCalled, 4, Arc::new(Memory::new(1 << 20)));
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let held = [connections.acquire_slot(client(1)).await, connections.acquire_slot(client(1)).await];
        assert!(
            held.iter().all(Option::is_some) && connections.acquire_slot(client(1)).await.is_none(),
            "none is idle"
        );
        let mut oldest = connections.idle.enter(client(1));
        let left = async {
            oldest.closed().await;
            drop(held);
        };
        let (slot, ()) = tokio::join!(connections.acquire_slot(client(1)), left);
        assert!(slot.is_some());
    }

    struct NeverCalled;

    #[async_trait]
    impl HttpServerApp for NeverCalled {
        async fn process_new_http(self: &Arc<Self>, _: ServerSession, _: &ShutdownWatch) -> Option<ReusedHttpStream> {
            panic!("no request was whole")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn http2_connection_without_requests_is_closed() {
        let (_goes_on, shutdown) = tokio::sync::watch::channel(false);
        // The preface, settings, and the first half of a request's headers.
        let begun = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x01\x01\x01\0\0\0\x01";
        for sent in [&begun[..0], &begun[..10], begun] {
            let (mut client, server) = duplex(1024);
            client.write_all(sent).await.unwrap();
            let connections = Connections::new(NeverCalled, 2, Arc::new(Memory::new(1 << 20)));
            let ended = timeout(
                CLIENT_IDLE_TIMEOUT + STALL_TIMEOUT,
                connections.serve_http2(Box::new(server), None, &shutdown),
            )
            .await;
            assert!(ended.is_ok(), "{} bytes", sent.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_http2_connection_is_closed_for_a_new_one() {
        let (_goes_on, shutdown) = tokio::sync::watch::channel(false);
        let (mut client, server) = duplex(1024);
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let connections = Connections::new(NeverCalled, 2, Arc::new(Memory::new(1 << 20)));
        let leaving = async {
            while !connections.idle.close_oldest(CloseTarget::Any) {
                tokio::task::yield_now().await;
            }
        };
        let serving = timeout(CLIENT_IDLE_TIMEOUT / 2, connections.serve_http2(Box::new(server), None, &shutdown));
        let (ended, ()) = tokio::join!(serving, leaving);
        assert!(ended.is_ok());
    }

    #[tokio::test]
    async fn connection_with_a_running_request_keeps_its_slot() {
        let connections = Connections::new(NeverCalled, 2, Arc::new(Memory::new(1 << 20)));
        let active = watch::Sender::new(1);
        let mut leaves = std::pin::pin!(connections.slot_needed(&active, None));
        assert!(futures_util::poll!(&mut leaves).is_pending() && !connections.idle.close_oldest(CloseTarget::Any));
        active.send_replace(0);
        assert!(futures_util::poll!(&mut leaves).is_pending() && connections.idle.close_oldest(CloseTarget::Any));
        leaves.await;
    }
}
