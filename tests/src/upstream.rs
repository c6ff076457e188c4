//! A test double for an upstream registry on port 0. A test can change every response.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::image::Image;

/// A running upstream.
pub struct TestUpstream {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    sent: Arc<Mutex<u64>>,
    gate: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// A request as the upstream received it.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// A response to send.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    pub fault: Fault,
}

/// How a response fails on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Closes in order after this number of body bytes.
    CutAfter(usize),
    /// Closes with RST after this number of body bytes.
    ResetAfter(usize),
    /// Stops sending after this number of body bytes, and keeps the connection open.
    StallAfter(usize),
    /// Waits after this number of body bytes until [`TestUpstream::open_gate`] is called.
    GateAfter(usize),
    /// Sends nothing, not even a head, until [`TestUpstream::open_gate`] is called.
    LateUntilGate,
    /// Sends this number of bytes a second until [`TestUpstream::open_gate`] is called.
    SlowUntilGate(usize),
    /// Sends one byte at a time.
    Drip,
    /// Reads the request and never responds.
    Silent,
    /// Reads the request and closes the connection.
    Closed,
}

type Handler = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

impl TestUpstream {
    /// Serves images, each under `repository` and `tag`. `spoil` changes the correct responses.
    pub async fn start(
        images: &[(&str, &str, &Image)],
        spoil: impl Fn(&Request, Response) -> Response + Send + Sync + 'static,
    ) -> Self {
        let content = Content::new(images);
        Self::with_handler(move |request| spoil(request, content.respond(request))).await
    }

    /// Sends the responses of a handler.
    pub async fn with_handler(handler: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        Self::listen(Arc::new(handler), None).await
    }

    /// The same behind TLS.
    pub async fn with_handler_tls(
        tls: TlsAcceptor,
        handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> Self {
        Self::listen(Arc::new(handler), Some(tls)).await
    }

    async fn listen(handler: Handler, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (requests, sent): (Arc<Mutex<Vec<Request>>>, Arc<Mutex<u64>>) = Default::default();
        let gate = watch::Sender::new(false);
        let shared = Connection { handler, requests: requests.clone(), sent: sent.clone(), gate: gate.subscribe() };
        let task = tokio::spawn(async move {
            // Aborted together with the task: a dropped upstream sends no more responses.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let (connection, tls) = (shared.clone(), tls.clone());
                connections.spawn(async move {
                    let reset = rustix::io::dup(&stream).ok();
                    match tls {
                        None => connection.serve(stream, reset).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                connection.serve(stream, reset).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, requests, sent, gate, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no handler panicked").clone()
    }

    /// Number of requests with this method and a path that contains `part`.
    pub fn count(&self, method: &str, part: &str) -> usize {
        self.requests().iter().filter(|r| r.method == method && r.path.contains(part)).count()
    }

    /// Body bytes sent so far.
    pub fn sent(&self) -> u64 {
        *self.sent.lock().expect("no handler panicked")
    }

    pub fn open_gate(&self) {
        self.gate.send_replace(true);
    }
}

impl Drop for TestUpstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }

    /// The start of `Range: bytes=a-...`.
    pub fn range_start(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.split('-').next()?.parse().ok()
    }

    /// The bytes of `Range: bytes=a-b`.
    pub fn range(&self) -> Option<std::ops::RangeInclusive<usize>> {
        let (_, end) = self.header("range")?.split_once('-')?;
        Some(self.range_start()?..=end.parse().ok()?)
    }
}

impl Response {
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), fault: Fault::None }
    }

    pub fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
        self
    }

    /// In chunks, without a length, as registries stream content that they are still downloading.
    pub fn chunked(mut self) -> Self {
        let mut framed = Vec::new();
        for piece in self.body.chunks(32 * 1024) {
            framed.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            framed.extend_from_slice(piece);
            framed.extend_from_slice(b"\r\n");
        }
        framed.extend_from_slice(b"0\r\n\r\n");
        self.body = framed.into();
        self.without("content-length").with("transfer-encoding", "chunked")
    }

    /// With one bit of the byte at `at` changed.
    pub fn flipped(mut self, at: usize) -> Self {
        let mut bytes = self.body.to_vec();
        bytes[at] ^= 1;
        self.body = bytes.into();
        self
    }

    pub fn fault(mut self, fault: Fault) -> Self {
        self.fault = fault;
        self
    }

    fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
    }
}

/// The content of a correct registry.
#[derive(Clone)]
pub struct Content {
    blobs: BTreeMap<String, Bytes>,
    manifests: BTreeMap<String, (String, Bytes)>,
}

impl Content {
    pub fn new(images: &[(&str, &str, &Image)]) -> Self {
        let mut content = Self { blobs: BTreeMap::new(), manifests: BTreeMap::new() };
        for (repository, tag, image) in images {
            for (digest, bytes) in &image.blobs {
                content.blobs.insert(format!("/v2/{repository}/blobs/{digest}"), bytes.clone());
            }
            for (digest, manifest) in &image.manifests {
                content.manifests.insert(format!("/v2/{repository}/manifests/{digest}"), manifest.clone());
            }
            let index = image.manifests[&image.digest].clone();
            content.manifests.insert(format!("/v2/{repository}/manifests/{tag}"), index);
        }
        content
    }

    /// The correct response, ranges included.
    pub fn respond(&self, request: &Request) -> Response {
        let path = request.path.split('?').next().unwrap_or_default();
        if path == "/v2/" {
            return Response::new(200, "{}");
        }
        if let Some((media_type, bytes)) = self.manifests.get(path) {
            return Response::new(200, bytes.clone())
                .with("content-type", media_type)
                .with("docker-content-digest", crate::image::digest(bytes));
        }
        let Some(bytes) = self.blobs.get(path) else {
            return Response::new(404, r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#);
        };
        let response = Response::new(200, bytes.clone()).with("content-type", "application/octet-stream");
        let Some(start) = request.range_start().filter(|start| *start < bytes.len()) else {
            return response;
        };
        let last = request.header("range").and_then(|range| range.rsplit('-').next()?.parse().ok());
        let end = last.map_or(bytes.len(), |last: usize| bytes.len().min(last + 1));
        let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
        Response { status: 206, body: bytes.slice(start..end), ..response }.with("content-range", range)
    }
}

#[derive(Clone)]
struct Connection {
    handler: Handler,
    requests: Arc<Mutex<Vec<Request>>>,
    sent: Arc<Mutex<u64>>,
    gate: watch::Receiver<bool>,
}

impl Connection {
    async fn serve(mut self, mut stream: impl AsyncRead + AsyncWrite + Unpin, raw: Option<std::os::fd::OwnedFd>) {
        let mut buffer = Vec::new();
        while let Some(request) = read_request(&mut stream, &mut buffer).await {
            let response = (self.handler)(&request);
            let head_only = request.method == "HEAD";
            self.requests.lock().expect("no handler panicked").push(request);
            if self.write(&mut stream, response, head_only, raw.as_ref()).await.is_none() {
                return;
            }
        }
    }

    /// None: the connection has ended.
    async fn write(
        &mut self,
        stream: &mut (impl AsyncWrite + Unpin),
        response: Response,
        head_only: bool,
        raw: Option<&std::os::fd::OwnedFd>,
    ) -> Option<()> {
        if response.fault == Fault::Silent {
            std::future::pending::<()>().await;
        }
        if response.fault == Fault::Closed {
            return None;
        }
        if response.fault == Fault::LateUntilGate {
            self.gate.wait_for(|open| *open).await.ok()?;
        }
        let mut head = format!("HTTP/1.1 {} Scripted\r\n", response.status);
        if !response.has("content-length") && !response.has("transfer-encoding") {
            head += &format!("content-length: {}\r\n", response.body.len());
        }
        for (name, value) in &response.headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).await.ok()?;
        if head_only {
            return Some(());
        }
        let upto = match response.fault {
            Fault::CutAfter(n) | Fault::ResetAfter(n) | Fault::StallAfter(n) | Fault::GateAfter(n) => n,
            Fault::Drip | Fault::SlowUntilGate(_) => 0,
            Fault::None | Fault::Silent | Fault::Closed | Fault::LateUntilGate => response.body.len(),
        };
        let upto = upto.min(response.body.len());
        self.send(stream, &response.body[..upto]).await?;
        match response.fault {
            Fault::None | Fault::Silent | Fault::Closed | Fault::LateUntilGate => Some(()),
            Fault::CutAfter(_) => {
                let _ = stream.shutdown().await;
                None
            }
            Fault::ResetAfter(_) => {
                let _ = stream.flush().await;
                if let Some(raw) = raw {
                    let _ = rustix::net::sockopt::set_socket_linger(raw, Some(std::time::Duration::ZERO));
                }
                None
            }
            Fault::StallAfter(_) => {
                std::future::pending::<()>().await;
                None
            }
            Fault::GateAfter(_) => {
                self.gate.wait_for(|open| *open).await.ok()?;
                self.send(stream, &response.body[upto..]).await
            }
            Fault::SlowUntilGate(rate) => {
                let mut rest = response.body;
                while !*self.gate.borrow() && !rest.is_empty() {
                    let piece = rest.split_to(rest.len().min(rate / 20 + 1));
                    self.send(stream, &piece).await?;
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                self.send(stream, &rest).await
            }
            Fault::Drip => {
                for byte in response.body.chunks(1) {
                    self.send(stream, byte).await?;
                }
                Some(())
            }
        }
    }

    async fn send(&self, stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Option<()> {
        for piece in bytes.chunks(64 * 1024) {
            // Counted before it is sent: a client that has received the bytes must find them counted.
            *self.sent.lock().expect("no handler panicked") += piece.len() as u64;
            stream.write_all(piece).await.ok()?;
            stream.flush().await.ok()?;
        }
        Some(())
    }
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<Request> {
    let end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        let mut piece = [0; 4096];
        match stream.read(&mut piece).await {
            Ok(count) if count > 0 => buffer.extend_from_slice(&piece[..count]),
            _ => return None,
        }
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).ok()?;
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    while buffer.len() < length {
        let mut piece = [0; 4096];
        match stream.read(&mut piece).await {
            Ok(count) if count > 0 => buffer.extend_from_slice(&piece[..count]),
            _ => return None,
        }
    }
    let body = buffer.drain(..length).collect();
    Some(Request { method, path, headers, body })
}
