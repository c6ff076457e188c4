//! Pingora's phases: every request is answered from the first one, and logged in the last.

mod clients;
mod gate;
mod logins;
mod sendfile;
mod socket;
mod taking;
mod turns;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use http::header::{ACCEPT, HOST, RANGE, USER_AGENT};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method};
use pingora::modules::http::HttpModules;
use pingora::prelude::{Error, ErrorType, HttpPeer};
use pingora::proxy::{ProxyHttp, Session};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

pub use self::clients::Clients;
use self::clients::{Place, Unwelcome};
pub use self::gate::Gate;
use self::sendfile::Sending;
use self::socket::Socket;
use self::taking::PATIENCE;
use self::turns::Turn;
use crate::access_log::{AccessLog, Line, Millis};
use crate::activity::{Activity, Answered};
use crate::connections::IDLE;
use crate::metrics::{self, Metrics};
use crate::oci::route::{self, query_value};
use crate::oci::{Endpoint, NamedBy, RangeSet, Reference, Registry, Repository, Route, accept};
use crate::peers::swarm::Direction;
use crate::peers::{Reach, Seal, Sending as Counted, Standing, Unproven, Visitor, wire};
use crate::pull::{Asker, Asking, BlobRequest, Body, ManifestAnswer, Pull, Refusal};
use crate::registries::{self, Registries, Rule};
use crate::respond::Reply;
use crate::sentinel;
use crate::source::Broken;
use crate::trace::{self, Tracer};

/// Answers one listener's requests.
pub struct Front {
    pub pull: Arc<Pull>,
    pub registries: Arc<Registries>,
    pub metrics: Arc<Metrics>,
    pub access_log: Arc<AccessLog>,
    pub load: Arc<Load>,
    pub clients: Arc<Clients>,
    pub gate: Arc<Gate>,
    pub activity: Arc<Activity>,
    pub tracer: Arc<Tracer>,
    pub listener: Listener,
}

/// Whom a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Clients,
    Peers,
}

/// Requests being answered, and the memory that their answers take.
pub struct Load {
    requests: AtomicUsize,
    /// KiB for answers that are sent whole: large manifests and lists.
    memory: Arc<Semaphore>,
}

/// There is no memory for another answer.
struct Overloaded;

/// A request's place in the load.
struct Seat(Arc<Load>);

/// One request and what became of it.
pub struct Exchange {
    id: String,
    span: trace::Span,
    started: Instant,
    /// Counts the request as load for as long as it is answered.
    seat: Option<Seat>,
    /// And as one of its client's.
    place: Option<Place>,
    /// Proves the answer to a peer.
    seal: Option<Seal>,
    /// Counts its body as sent to a peer.
    counted: Option<Counted>,
    /// Its share of the memory for answers that are sent whole.
    held: Option<OwnedSemaphorePermit>,
    route: &'static str,
    content: Option<Content>,
    status: u16,
    source: &'static str,
    sent: u64,
    first_byte: Option<Duration>,
    /// From its first byte to the end of the answer.
    took: Duration,
    failure: Option<String>,
}

struct Content {
    registry: Registry,
    repository: Repository,
    rule: String,
    named_by: NamedBy,
}

/// More requests than this at once are refused.
const MAX_REQUESTS: usize = 10_000;

/// Answers sent whole that are at least this large share this much memory.
const SMALL_ANSWER: usize = 64 * 1024;
const WHOLE_ANSWERS_KIB: usize = 128 * 1024;

/// No reference that is right is longer.
const MAX_REFERENCE: usize = 200;

/// In metrics and logs, where an answer has no content.
const NO_SOURCE: &str = "none";

/// Why an answer ended early that nothing else ended.
const LEFT: &str = "the client left";

#[async_trait]
impl ProxyHttp for Front {
    type CTX = Exchange;

    fn new_ctx(&self) -> Exchange {
        Exchange::new()
    }

    /// No modules: nothing is ever compressed.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, exchange: &mut Exchange) -> pingora::Result<bool> {
        session.set_keepalive(Some(IDLE.as_secs()));
        session.set_write_timeout(Some(PATIENCE));
        let reply = match self.load.enter() {
            Some(seat) => {
                exchange.seat = Some(seat);
                let span = self.span(session.req_header());
                let reply = span.within(Box::pin(self.answer(session, exchange))).await;
                exchange.span = span;
                match self.load.hold(reply.body.held()) {
                    Ok(held) => {
                        exchange.held = held;
                        reply
                    }
                    Err(Overloaded) => Reply::overloaded(),
                }
            }
            None => Reply::overloaded(),
        };
        send(session, exchange, reply).await?;
        Ok(true)
    }

    /// Never reached: no request passes the filter.
    async fn upstream_peer(&self, _: &mut Session, _: &mut Exchange) -> pingora::Result<Box<HttpPeer>> {
        Error::e_explain(ErrorType::InternalError, "every request is answered by the filter")
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, exchange: &mut Exchange) {
        if exchange.status == 0 && error.is_none() {
            return;
        }
        exchange.took = exchange.started.elapsed();
        self.count(exchange);
        if self.listener == Listener::Clients {
            note(&self.activity, session, exchange);
        }
        log(&self.access_log, session, error, exchange);
        finish(session, error, exchange);
    }

    fn suppress_error_log(&self, _: &Session, _: &Exchange, _: &Error) -> bool {
        true
    }
}

impl Front {
    async fn answer(&self, session: &mut Session, exchange: &mut Exchange) -> Reply {
        match self.welcome(session) {
            Ok(place) => exchange.place = place,
            Err(why @ Unwelcome::Stranger) => return Reply::refusal(&Refusal::Denied(why.as_str().into())),
            Err(why) => return Reply::refusal(&Refusal::Unavailable(why.as_str().into())),
        }
        if self.asks_for_token(session.req_header()) {
            exchange.route = "token";
            return self.give_token(session).await;
        }
        let request = session.req_header();
        let header = |name| request.headers.get(name).and_then(|value| value.to_str().ok());
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return Reply::read_only();
        }
        let (path, query) = (request.uri.path(), request.uri.query());
        let host = header(HOST).or_else(|| request.uri.authority().map(|a| a.as_str()));
        let route = match route::parse(path, query, host, &*self.registries) {
            Ok(route) => route,
            Err(error) => {
                if error.message.contains("override_path") {
                    tracing::warn!(path, problem = error.message, "a client's mirror configuration is wrong");
                }
                return Reply::route_error(&error);
            }
        };
        exchange.route = route.as_str();
        let is_probe = matches!(&route, Route::Content { registry, .. } if sentinel::is_registry(registry));
        if self.listener == Listener::Clients && !is_probe && !self.gate.knows(request) {
            return Reply::wrong_secret("this cache is for those who log in: access.logins_file has who may");
        }
        let Route::Content { registry, repository, endpoint, named_by } = route else {
            return self.ping(request);
        };
        if sentinel::is_registry(&registry) && self.listener == Listener::Clients {
            let range = header(RANGE).and_then(RangeSet::parse).as_ref().and_then(RangeSet::single);
            return sentinel::answer(&endpoint, range.filter(|_| request.method != Method::HEAD))
                .of_registry(&registry);
        }
        let mut place = self.pull.place(registry.clone(), repository.clone());
        let rule = place.rule.name().to_owned();
        exchange.content = Some(Content { registry: registry.clone(), repository, rule, named_by });
        let visitor = match self.visitor(session) {
            Ok(visitor) => visitor,
            Err(unproven) => return Reply::unproven(unproven),
        };
        exchange.seal = visitor.as_ref().and_then(|visitor| visitor.seal.clone());
        let asking = visitor.as_ref().map_or(Asking::CLIENT, |visitor| asking(visitor, &place.rule));
        let accept = accept::merge(request.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()));
        let mut turn = None;
        if place.rule.asks_who() && !place.rule.deny {
            place = match &visitor {
                Some(visitor) => self.let_peer_in(visitor, place, &endpoint, &accept, asking).await,
                None => match self.let_in(session, place, &endpoint, &accept).await {
                    Ok((place, may_be_wrong)) => {
                        turn = may_be_wrong;
                        place
                    }
                    Err(reply) => return reply.of_registry(&registry),
                },
            };
        }
        if let Err(refusal) = self.pull.permit(&place, asking.asker) {
            // Peers go by their own rules, which may be newer or older: this is no word of the origin.
            let refusal = if asking.asker.is_peer() { Refusal::NotKept } else { refusal };
            return Reply::refusal(&refusal);
        }
        let ranges = header(RANGE).and_then(RangeSet::parse);
        let range = ranges.as_ref().and_then(RangeSet::single);
        let head_only = request.method == Method::HEAD;
        let is_list = matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_));
        let answer = match endpoint {
            Endpoint::Manifest(Reference::Tag(_)) if asking.asker == Asker::Peer(Standing::Stranger) => {
                Err(self.no_tags())
            }
            Endpoint::Tags | Endpoint::Referrers(_) if asking.asker.is_peer() => {
                Err(Refusal::Denied("peers share content, not lists".into()))
            }
            Endpoint::Manifest(reference) => {
                let answer = self.pull.manifest(&place, &reference, &accept, asking).await;
                // A HEAD describes the whole.
                answer.map(|answer| {
                    let reply = Reply::manifest(&answer, range.filter(|_| !head_only));
                    reply.telling(visitor.is_some().then(|| told_age(&answer)).flatten().into_iter().collect())
                })
            }
            Endpoint::Blob(digest) => {
                let request = BlobRequest { place: place.clone(), digest, range, named_by, asking };
                if head_only {
                    let length = self.pull.blob_length(&request).await;
                    let reply = length.map(|(length, from)| Reply::blob_length(length, from, &request.digest));
                    match (visitor, self.pull.peers()) {
                        (Some(visitor), Some(peers)) => {
                            peers.heard(&visitor, &request.digest);
                            let here = self.pull.here(&request).await;
                            reply.map(|reply| reply.telling(peers.told(&visitor, &request.digest, &here)))
                        }
                        _ => reply,
                    }
                } else if let Some(visitor) = visitor {
                    self.blob_for(&visitor, &request, exchange).await
                } else {
                    let answer = match ranges.filter(|_| range.is_none()) {
                        Some(ranges) => self.pull.blob_parts(&request, &ranges).await,
                        None => self.pull.blob(&request).await,
                    };
                    answer.map(|answer| Reply::blob(answer, &request.digest))
                }
            }
            Endpoint::Tags => self.list(&place, "tags/list".into(), path, query).await,
            Endpoint::Referrers(digest) => self.list(&place, format!("referrers/{digest}"), path, query).await,
        };
        if matches!(answer, Err(Refusal::Denied(_))) && place.caller.holder().is_some() {
            // Who may not list may still pull.
            if !is_list {
                self.pull.shut_out(&place);
            }
            turn.into_iter().for_each(Turn::was_wrong);
        }
        // A challenge is for clients: a peer would take it for one about keys.
        let refuse = |refusal| match asking.asker.is_peer() {
            true => Reply::refusal(&refusal),
            false => self.refuse(request, &place, &refusal),
        };
        answer.unwrap_or_else(refuse).of_registry(&registry)
    }

    /// A request's part of a trace.
    fn span(&self, request: &Parts) -> trace::Span {
        match self.listener {
            Listener::Clients => self.tracer.answer(&request.headers),
            Listener::Peers => self.tracer.join(&request.headers),
        }
    }

    /// Whether somebody comes to the token endpoint. It is there where it is needed.
    fn asks_for_token(&self, request: &Parts) -> bool {
        self.listener == Listener::Clients
            && request.uri.path() == gate::TOKEN
            && matches!(request.method, Method::GET | Method::POST)
            && self.registries.ask_who()
    }

    /// A peer has let its client in. What it may be given here has to belong to the same repository.
    async fn let_peer_in(
        &self,
        visitor: &Visitor,
        place: registries::Place,
        endpoint: &Endpoint,
        accept: &str,
        asking: Asking,
    ) -> registries::Place {
        let place = registries::Place { caller: visitor.caller(), ..place };
        if let (Endpoint::Manifest(Reference::Digest(digest)) | Endpoint::Blob(digest), Reach::Origin) =
            (endpoint, asking.reach)
            && let Err(why) = self.pull.bring_in(&place, digest, endpoint, accept).await
        {
            tracing::debug!(%place, %digest, ?why, "what is here is not known to belong there");
        }
        place
    }

    /// Whether a client is answered. Peers prove who they are in other ways.
    fn welcome(&self, session: &Session) -> Result<Option<Place>, Unwelcome> {
        if self.listener == Listener::Peers {
            return Ok(None);
        }
        self.clients.admit(client_of(session), Instant::now()).map(Some)
    }

    /// Who asks on the peers' port.
    fn visitor(&self, session: &Session) -> Result<Option<Visitor>, Unproven> {
        let Some(peers) = self.pull.peers().filter(|_| self.listener == Listener::Peers) else { return Ok(None) };
        let from = client_of(session).map(|address| address.to_canonical());
        let at = session.server_addr().and_then(|address| address.as_inet()).copied();
        Visitor::read(session.req_header(), from, at, peers).map(Some)
    }

    /// Why a stranger is not told what a tag means; a peer whose rules differ asks elsewhere.
    fn no_tags(&self) -> Refusal {
        if self.pull.peers().is_some_and(|peers| peers.are_proven()) {
            return Refusal::NotKept;
        }
        Refusal::Denied("peers that do not prove who they are share what a digest proves, not tags".into())
    }

    /// A blob for a peer: from here, or from somebody who has it as well and is less busy.
    async fn blob_for(
        &self,
        visitor: &Visitor,
        request: &BlobRequest,
        exchange: &mut Exchange,
    ) -> Result<Reply, Refusal> {
        let Some(peers) = self.pull.peers() else { return Err(Refusal::NotKept) };
        let (digest, asked) = (&request.digest, Instant::now());
        let direction = self.pull.direct(visitor, request, peers).await;
        let request = &request.after(asked.elapsed());
        let reply = match direction {
            Direction::Redirect(peer) => Reply::redirect(peer),
            Direction::Depute(span) => Reply::depute(span),
            Direction::Answer => {
                exchange.counted = Some(peers.send());
                match self.pull.blob(request).await {
                    Ok(answer) => Reply::blob(answer, digest),
                    Err(refusal) => Reply::refusal(&refusal),
                }
            }
        };
        Ok(reply.telling(peers.told(visitor, digest, &self.pull.here(request).await)))
    }

    async fn list(
        &self,
        place: &registries::Place,
        endpoint: String,
        path: &str,
        query: Option<&str>,
    ) -> Result<Reply, Refusal> {
        let passed = paging(query);
        let answer = self.pull.list(place, endpoint, Some(&*passed).filter(|q| !q.is_empty())).await?;
        Ok(Reply::list(answer, path, query_value(query, "ns").as_deref()))
    }

    fn count(&self, exchange: &Exchange) {
        self.metrics.answered(&metrics::Answer {
            route: exchange.route,
            source: exchange.source,
            status: exchange.status,
            sent: exchange.sent,
            first_byte: exchange.first_byte,
            took: exchange.took,
        });
        if self.listener == Listener::Clients && !matches!(exchange.source, NO_SOURCE | "origin") {
            self.metrics.saved_bytes.inc_by(exchange.sent);
        }
    }
}

/// Where a request comes from.
fn client_of(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(|address| address.as_inet()).map(SocketAddr::ip)
}

fn asking(visitor: &Visitor, rule: &Rule) -> Asking {
    let (standing, reach) = visitor.within(rule);
    Asking { asker: Asker::Peer(standing), role: visitor.role, reach, aim: visitor.aim, left: visitor.deadline }
}

/// How old a tag's meaning is, more exactly than clients need to know it.
fn told_age(answer: &ManifestAnswer) -> Option<(HeaderName, HeaderValue)> {
    let age = u64::try_from(answer.age?.as_millis()).unwrap_or(u64::MAX);
    Some((wire::AGE, age.into()))
}

/// What of a query is the origin's business.
fn paging(query: Option<&str>) -> String {
    let mut passed = url::form_urlencoded::Serializer::new(String::new());
    for (key, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if matches!(&*key, "n" | "last" | "artifactType") {
            passed.append_pair(&key, &value);
        }
    }
    passed.finish()
}

/// Writes an answer. An error means that the connection must close: the client sees fewer bytes
/// than announced, and knows.
async fn send(session: &mut Session, exchange: &mut Exchange, mut reply: Reply) -> pingora::Result<()> {
    exchange.status = reply.status.as_u16();
    exchange.source = reply.from.map_or(NO_SOURCE, |from| from.as_str());
    if !session.is_body_empty() {
        // Somebody pushes: what they send is not read, so the connection cannot be used again.
        session.set_keepalive(None);
    }
    let mut head = reply.head(&exchange.id);
    if let Some(seal) = exchange.seal.take() {
        let (name, value) = seal.sign(exchange.status, &head.headers);
        head.insert_header(name, value)?;
    }
    if session.req_header().method == Method::HEAD {
        reply.body = Body::Memory(None);
        session.write_response_header(Box::new(head), true).await?;
        exchange.first_byte = Some(exchange.started.elapsed());
        return Ok(());
    }
    if let Body::File(reader) = &mut reply.body
        && reader.left() >= sendfile::WORTHWHILE
        && let Some(socket) = Socket::of_plain(session)
    {
        sendfile::write_head(session, head).await?;
        let mut sending = Sending::new(socket, reader);
        while let Some(sent) = sending.next().await.map_err(|broken| exchange.broke(&broken))? {
            exchange.sent(sent);
        }
        return Ok(());
    }
    let small = socket::CORKED.contains(&reply.body.held());
    if small {
        socket::cork(session);
    }
    session.write_response_header(Box::new(head), false).await?;
    let client = if matches!(reply.body, Body::Memory(_)) { None } else { Socket::of(session) };
    loop {
        let next = tokio::select! {
            biased;
            next = reply.body.next() => next,
            () = left(session, client.as_ref()) => Err(Broken(LEFT.into())),
        };
        let Some(piece) = next.map_err(|broken| exchange.broke(&broken))? else { break };
        let len = piece.len() as u64;
        // Pingora's own patience with HTTP/2 begins anew with each window.
        let written = timeout(PATIENCE, session.write_response_body(Some(piece), false)).await;
        written.unwrap_or_else(|_| Error::e_explain(ErrorType::WriteTimedout, "the client takes too little"))?;
        exchange.sent(len);
    }
    session.write_response_body(None, true).await?;
    if small {
        socket::uncork(session);
    }
    Ok(())
}

/// Ends when the client has left; its connection says so on HTTP/1.1, its stream on HTTP/2.
async fn left(session: &mut Session, socket: Option<&Socket>) {
    if let Some(socket) = socket {
        socket.closed().await;
    } else if let Some(closed) = session.as_downstream_mut().watch_h2_stream_close() {
        let _ = closed.await;
    } else {
        std::future::pending::<()>().await;
    }
}

/// Remembers an answer for those who look at the status.
fn note(activity: &Activity, session: &Session, exchange: &Exchange) {
    let Some(content) = &exchange.content else { return };
    let reference = session.req_header().uri.path().rsplit('/').next().unwrap_or_default();
    activity.add(Answered {
        id: exchange.id.clone(),
        at_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
        route: exchange.route.into(),
        image: format!("{}/{}", content.registry, content.repository),
        reference: reference[..reference.floor_char_boundary(MAX_REFERENCE)].to_owned(),
        status: exchange.status,
        source: exchange.source.into(),
        bytes: exchange.sent,
        first_byte_ms: exchange.first_byte.map(|time| Millis(time).number()),
        total_ms: Millis(exchange.took).number(),
    });
}

/// Adds a line to the access log.
fn log(access_log: &AccessLog, session: &Session, error: Option<&Error>, exchange: &Exchange) {
    let content = exchange.content.as_ref();
    let request = session.req_header();
    let left = error.map(|_| LEFT);
    let trace = exchange.span.trace().map(|trace| format!("{trace:032x}"));
    access_log.add(&Line {
        id: &exchange.id,
        trace: trace.as_deref(),
        client: session.client_addr().and_then(|address| address.as_inet()).copied(),
        agent: request.headers.get(USER_AGENT).and_then(|value| value.to_str().ok()),
        method: request.method.as_str(),
        path: request.uri.path(),
        route: exchange.route,
        registry: content.map(|c| c.registry.as_str()),
        repository: content.map(|c| c.repository.as_str()),
        named_by: content.map(|c| c.named_by.as_str()),
        rule: content.map(|c| c.rule.as_str()),
        status: exchange.status,
        source: exchange.source,
        bytes: exchange.sent,
        first_byte_ms: exchange.first_byte.map(Millis),
        total_ms: Millis(exchange.took),
        failure: exchange.failure.as_deref().or(left),
    });
}

/// Tells whoever follows the trace what became of the request.
fn finish(session: &Session, error: Option<&Error>, exchange: &mut Exchange) {
    let mut span = std::mem::take(&mut exchange.span);
    let request = session.req_header();
    span.rename(|| format!("{} {}", request.method, exchange.route));
    span.tell(|| {
        let client =
            session.client_addr().and_then(|address| address.as_inet()).map(|address| address.ip().to_string());
        let agent = request.headers.get(USER_AGENT).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let content = exchange.content.as_ref();
        let texts = [
            ("http.request.method", Some(request.method.to_string())),
            ("url.path", Some(request.uri.path().to_owned())),
            ("client.address", client),
            ("user_agent.original", agent),
            ("dray.request_id", Some(exchange.id.clone())),
            ("dray.registry", content.map(|content| content.registry.to_string())),
            ("dray.repository", content.map(|content| content.repository.to_string())),
            ("dray.rule", content.map(|content| content.rule.clone())),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text?.into())));
        let sent = ("http.response.body.size", exchange.sent.into());
        let status = ("http.response.status_code", u64::from(exchange.status).into());
        texts.chain([status, sent, ("dray.source", exchange.source.into())]).collect()
    });
    if let Some(failure) = exchange.failure.as_deref().or(error.map(|_| LEFT)) {
        span.fail(|| failure.to_owned());
    } else if exchange.status >= 500 {
        span.fail(|| exchange.status.to_string());
    }
}

impl Exchange {
    /// Counts bytes that left.
    fn sent(&mut self, count: u64) {
        self.first_byte.get_or_insert_with(|| self.started.elapsed());
        self.sent += count;
    }

    /// Notes why the answer ends early.
    fn broke(&mut self, broken: &Broken) -> Box<Error> {
        self.failure = Some(broken.to_string());
        Error::explain(ErrorType::WriteError, broken.to_string())
    }

    fn new() -> Self {
        Self {
            id: format!("{:016x}", fastrand::u64(..)),
            span: trace::Span::default(),
            started: Instant::now(),
            seat: None,
            place: None,
            seal: None,
            counted: None,
            held: None,
            route: "other",
            content: None,
            status: 0,
            source: NO_SOURCE,
            sent: 0,
            first_byte: None,
            took: Duration::ZERO,
            failure: None,
        }
    }
}

impl Default for Load {
    fn default() -> Self {
        Self { requests: AtomicUsize::new(0), memory: Arc::new(Semaphore::new(WHOLE_ANSWERS_KIB)) }
    }
}

impl Load {
    /// Takes memory for an answer that is sent whole; small ones need none.
    fn hold(&self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, Overloaded> {
        if bytes < SMALL_ANSWER {
            return Ok(None);
        }
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        self.memory.clone().try_acquire_many_owned(kib).map(Some).map_err(|_| Overloaded)
    }

    /// Counts a request, if there is room for it.
    fn enter(self: &Arc<Self>) -> Option<Seat> {
        let before = self.requests.fetch_add(1, Ordering::AcqRel);
        let seat = Seat(self.clone());
        (before < MAX_REQUESTS).then_some(seat)
    }

    /// How many requests are being answered.
    pub fn current(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}
