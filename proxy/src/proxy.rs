//! What becomes of a request on the registry and peer ports: it is answered, counted and logged.

mod answer;
mod browsers;
mod client_auth;
mod clients;
mod exchange;
mod load;
mod login_throttle;
mod logins;
mod sendfile;
mod slow_clients;
mod socket;

use std::net::IpAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::poll;
use http::header::{ACCEPT, HOST, RANGE};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method};
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::prelude::{Error, ErrorType};
use pingora::protocols::http::ServerSession as Session;
use pingora::server::ShutdownWatch;
use tokio::time::timeout;

use self::answer::send;
pub use self::browsers::Browsers;
pub use self::client_auth::ClientAuth;
pub use self::clients::Clients;
use self::clients::{ClientDenied, ClientPermit};
pub use self::exchange::Exchange;
use self::exchange::{Content, LEFT};
pub use self::load::Load;
use self::load::Overloaded;
use self::login_throttle::LoginPermit;
use self::slow_clients::PATIENCE;
use self::socket::SocketDescriptor;
use crate::access_log::AccessLog;
use crate::activity::Activity;
use crate::connections::{self, kept_for};
use crate::metrics::Metrics;
use crate::oci::route::{self, query_value};
use crate::oci::{Endpoint, RangeSet, Reference, RegistryFrom, Route, accept, link};
use crate::peers::swarm::PeerDecision;
use crate::peers::{FetchPolicy, PeerAuthError, PeerRequest, PeerTrust, wire};
use crate::probe_image;
use crate::pull::{BlobRequest, ListKind, ManifestResponse, Pull, PullError, RequestContext, Requester};
use crate::readiness::Readiness;
use crate::registries::{self, Registries, Rule};
use crate::respond::PreparedResponse;
use crate::times::FAREWELL;
use crate::trace::{self, Tracer};

/// Answers one listener's requests.
pub struct RegistryProxy {
    pub pull: Arc<Pull>,
    pub registries: Arc<Registries>,
    pub metrics: Arc<Metrics>,
    pub access_log: Arc<AccessLog>,
    pub load: Arc<Load>,
    pub clients: Arc<Clients>,
    pub browsers: Arc<Browsers>,
    pub gate: Arc<ClientAuth>,
    pub activity: Arc<Activity>,
    pub tracer: Arc<Tracer>,
    pub readiness: Arc<Readiness>,
    pub listener: Listener,
}

/// Whom a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Clients,
    Peers,
}

/// A request that takes longer is watched for the client's departure. Shorter: more requests cost a descriptor more.
const AT_ONCE: Duration = Duration::from_millis(250);

/// As nginx calls it in its log; no client sees it.
const CLIENT_CLOSED_REQUEST: u16 = 499;

#[async_trait]
impl HttpServerApp for RegistryProxy {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: Session,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        match session.read_request().await {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                tracing::debug!(%error, "a request cannot be read");
                self.count(&Exchange { status: 400, ..Exchange::new() });
                let farewell = async {
                    let _ = session.respond_error(400).await;
                    session.shutdown().await;
                };
                let _ = timeout(FAREWELL, farewell).await;
                return None;
            }
        }
        let mut exchange = Exchange::new();
        let kept_for = kept_for(session.req_header()).filter(|_| !*shutdown.borrow());
        session.set_keepalive(kept_for);
        if let Err(error) = self.respond(&mut session, &mut exchange).await {
            self.account(&session, Some(&error), &mut exchange);
            // The client sees fewer bytes than announced, at once: a copy of the descriptor may still be open. One that reads
            // nothing takes no farewell.
            let _ = timeout(FAREWELL, session.shutdown()).await;
            return None;
        }
        self.account(&session, None, &mut exchange);
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = timeout(PATIENCE, session.finish()).await.ok()?.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

/// A request for content, once it is authorized.
struct ContentRequest<'a> {
    endpoint: Endpoint,
    accept: &'a str,
    named_by: RegistryFrom,
    asking: RequestContext,
}

impl RegistryProxy {
    async fn respond(&self, session: &mut Session, exchange: &mut Exchange) -> pingora::Result<()> {
        session.set_write_timeout(Some(PATIENCE));
        let client = self.party(session);
        let reply = match self.load.enter(client) {
            Some(seat) => {
                exchange.seat = Some(seat);
                let span = self.span(session.req_header());
                let connection = SocketDescriptor::of(session);
                let answer = span.within(Box::pin(self.answer(session, exchange)));
                let Some(reply) = while_client_waits(connection, answer).await else {
                    exchange.span = span;
                    exchange.status = CLIENT_CLOSED_REQUEST;
                    // Nothing is written to somebody who has left.
                    return Err(Error::explain(ErrorType::ConnectionClosed, LEFT).into_down());
                };
                exchange.span = span;
                let reply = if self.listener == Listener::Clients { reply.for_clients() } else { reply };
                match self.load.hold(reply.body.held(), client) {
                    Ok(held) => {
                        exchange.held = held;
                        reply
                    }
                    Err(Overloaded) => PreparedResponse::refusal(&PullError::Busy),
                }
            }
            None => PreparedResponse::refusal(&PullError::Busy),
        };
        send(session, exchange, reply).await
    }
}

impl RegistryProxy {
    async fn answer(&self, session: &mut Session, exchange: &mut Exchange) -> PreparedResponse {
        match self.welcome(session) {
            Ok(place) => exchange.place = place,
            Err(why @ ClientDenied::Stranger) => {
                return PreparedResponse::refusal(&PullError::Denied(why.as_str().into()));
            }
            Err(why) => return PreparedResponse::refusal(&PullError::Unavailable(why.as_str().into())),
        }
        if let Err(foreign) = self.browsers.admit(session.req_header()) {
            return PreparedResponse::refusal(&PullError::Denied(foreign.as_str().into()));
        }
        if self.asks_for_token(session.req_header()) {
            exchange.route = "token";
            return self.give_token(session).await;
        }
        let request = session.req_header();
        let route = match self.route(request) {
            Ok(route) => route,
            Err(reply) => return *reply,
        };
        exchange.route = route.as_str();
        let is_probe = matches!(&route, Route::Content { registry, .. } if probe_image::is_registry(registry));
        if self.listener == Listener::Clients && !is_probe && !self.gate.knows(request) {
            return PreparedResponse::wrong_secret(
                "this cache is for those who log in: access.logins_file has who may",
            );
        }
        let Route::Content { registry, repository, endpoint, named_by } = route else {
            return self.ping(request);
        };
        if probe_image::is_registry(&registry) && self.listener == Listener::Clients {
            let range = text(request, &RANGE).and_then(RangeSet::parse).as_ref().and_then(RangeSet::single);
            return probe_image::answer(&endpoint, range.filter(|_| request.method != Method::HEAD))
                .of_registry(&registry);
        }
        let place = self.pull.place(registry.clone(), repository.clone());
        let rule = place.rule.name().to_owned();
        exchange.content = Some(Content { registry: registry.clone(), repository, rule, named_by });
        let visitor = match self.visitor(session) {
            Ok(visitor) => visitor,
            Err(unproven) => return PreparedResponse::unproven(unproven),
        };
        exchange.seal = visitor.as_ref().and_then(|visitor| visitor.seal.clone());
        let asking = match &visitor {
            Some(visitor) => self.asking(visitor, &place.rule, &endpoint),
            None => RequestContext::of_client(named_by),
        };
        let asking = RequestContext { client: self.party(session), ..asking };
        let begun = Instant::now();
        let accept = accept::merge(request.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()));
        let authorized = self.authorize(session, visitor.as_ref(), place, &endpoint, &accept, asking).await;
        let (place, turn) = match authorized {
            Ok(authorized) => authorized,
            Err(reply) => return reply.of_registry(&registry),
        };
        let asking = asking.after(begun.elapsed());
        if let Err(refusal) = self.pull.permit(&place, asking.asker) {
            // Peers go by their own rules, which may be newer or older: this is no word of the origin.
            let refusal = if asking.asker.is_peer() { PullError::NotKept } else { refusal };
            return PreparedResponse::refusal(&refusal);
        }
        let is_list = matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog);
        let wanted = ContentRequest { endpoint, accept: &accept, named_by, asking };
        let answer = self.content(session, exchange, &place, wanted, visitor).await;
        if answer.as_ref().is_err_and(PullError::is_denied) && place.caller.holder().is_some() {
            // A client that may not list may still pull.
            if !is_list {
                self.pull.shut_out(&place);
            }
            turn.into_iter().for_each(LoginPermit::was_wrong);
        }
        // A challenge is for clients: a peer would take it for one about keys.
        let refuse = |refusal| match asking.asker.is_peer() {
            true => PreparedResponse::refusal(&refusal),
            false => self.refuse(session.req_header(), &place, &refusal),
        };
        answer.unwrap_or_else(refuse).of_registry(&registry)
    }

    /// What a request means.
    fn route(&self, request: &Parts) -> Result<Route, Box<PreparedResponse>> {
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return Err(Box::new(PreparedResponse::read_only()));
        }
        let (path, query) = (request.uri.path(), request.uri.query());
        let host = text(request, &HOST).or_else(|| request.uri.authority().map(|a| a.as_str()));
        route::parse(path, query, host, &*self.registries).map_err(|error| {
            if error.message.contains("override_path") {
                tracing::warn!(path, problem = error.message, "a client's mirror configuration is wrong");
            }
            Box::new(PreparedResponse::route_error(&error))
        })
    }

    /// Whether the client or peer may have what a rule gives to some only, and with whose credentials it is requested. Then also
    /// its turn, if its secret may be wrong.
    async fn authorize(
        &self,
        session: &Session,
        visitor: Option<&PeerRequest>,
        place: registries::RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        asking: RequestContext,
    ) -> Result<(registries::RepositoryRef, Option<LoginPermit>), PreparedResponse> {
        if !place.rule.asks_who() || place.rule.deny {
            return Ok((place, None));
        }
        if let Some(visitor) = visitor {
            return Ok((self.let_peer_in(visitor, place, endpoint, accept, asking).await, None));
        }
        let let_in = self.let_in(session, place, endpoint, accept);
        match timeout(asking.patience, let_in).await {
            Ok(authorized) => authorized,
            Err(_) => {
                let message = "the upstream does not say in time who may have it";
                Err(PreparedResponse::refusal(&PullError::Unavailable(message.into())))
            }
        }
    }

    /// What is requested, from wherever it comes.
    async fn content(
        &self,
        session: &Session,
        exchange: &mut Exchange,
        place: &registries::RepositoryRef,
        wanted: ContentRequest<'_>,
        visitor: Option<PeerRequest>,
    ) -> Result<PreparedResponse, PullError> {
        let request = session.req_header();
        let ranges = request.headers.get(RANGE).and_then(|value| RangeSet::parse(value.to_str().ok()?));
        let range = ranges.as_ref().and_then(RangeSet::single);
        let head_only = request.method == Method::HEAD;
        let (path, query) = (request.uri.path(), request.uri.query());
        let ContentRequest { endpoint, accept, named_by, asking } = wanted;
        match endpoint {
            Endpoint::Manifest(Reference::Tag(_)) if asking.asker == Requester::Peer(PeerTrust::Stranger) => {
                Err(self.no_tags())
            }
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog if asking.asker.is_peer() => {
                Err(PullError::Denied("peers share content, not lists".into()))
            }
            Endpoint::Manifest(reference) => {
                let answer = self.pull.manifest(place, &reference, accept, asking).await;
                // A HEAD describes the whole.
                answer.map(|answer| {
                    let reply = PreparedResponse::manifest(&answer, range.filter(|_| !head_only));
                    reply.telling(visitor.is_some().then(|| told_age(&answer)).flatten().into_iter().collect())
                })
            }
            Endpoint::Blob(digest) => {
                let request = BlobRequest { place: place.clone(), digest, range, named_by, asking };
                if head_only {
                    let length = self.pull.blob_length(&request).await;
                    let reply =
                        length.map(|(length, from)| PreparedResponse::blob_length(length, from, &request.digest));
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
                    answer.map(|answer| PreparedResponse::blob(answer, &request.digest))
                }
            }
            Endpoint::Tags => self.list(place, &ListKind::Tags, path, query, asking).await,
            Endpoint::Referrers(digest) => self.list(place, &ListKind::Referrers(digest), path, query, asking).await,
            Endpoint::Catalog => self.list(place, &ListKind::Catalog, path, query, asking).await,
        }
    }

    /// Who takes a share of what all share: a cluster's nodes may stand in one network.
    fn party(&self, session: &Session) -> Option<IpAddr> {
        match self.listener {
            Listener::Clients => client_of(session),
            Listener::Peers => address_of(session),
        }
    }

    /// A request's part of a trace.
    fn span(&self, request: &Parts) -> trace::TraceSpan {
        match self.listener {
            Listener::Clients => self.tracer.answer(&request.headers),
            Listener::Peers => self.tracer.join(&request.headers),
        }
    }

    /// Whether somebody comes to the token endpoint. It is there where it is needed.
    fn asks_for_token(&self, request: &Parts) -> bool {
        self.listener == Listener::Clients
            && request.uri.path() == client_auth::TOKEN
            && matches!(request.method, Method::GET | Method::POST)
            && self.registries.ask_who()
    }

    /// A peer has let its client in. What it may be given here has to belong to the same repository.
    async fn let_peer_in(
        &self,
        visitor: &PeerRequest,
        place: registries::RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        asking: RequestContext,
    ) -> registries::RepositoryRef {
        let place = registries::RepositoryRef { caller: visitor.caller(), ..place };
        if let (Endpoint::Manifest(Reference::Digest(digest)) | Endpoint::Blob(digest), FetchPolicy::Origin) =
            (endpoint, asking.reach)
            && let Err(why) = self.pull.bring_in(&place, digest, endpoint, accept).await
        {
            tracing::debug!(%place, %digest, ?why, "what is here is not known to belong there");
        }
        place
    }

    /// Whether a client is answered. Peers prove who they are in other ways.
    fn welcome(&self, session: &Session) -> Result<Option<ClientPermit>, ClientDenied> {
        if self.listener == Listener::Peers {
            return Ok(None);
        }
        self.clients.admit(address_of(session), Instant::now()).map(Some)
    }

    /// What a peer may want of this node.
    fn asking(&self, visitor: &PeerRequest, rule: &Rule, endpoint: &Endpoint) -> RequestContext {
        let (standing, reach) = visitor.within(rule);
        // Who is about to go begins nothing for others: it would go with it. What a tag means is asked in a moment.
        let is_tag = matches!(endpoint, Endpoint::Manifest(Reference::Tag(_)));
        let reach = if self.readiness.has_ended() && !is_tag { FetchPolicy::Kept } else { reach };
        let patience = RequestContext::patience_of_peer(visitor.terms.deadline);
        RequestContext {
            asker: Requester::Peer(standing),
            client: None,
            role: visitor.terms.role,
            reach,
            aim: visitor.terms.aim,
            downstream: visitor.terms.peers,
            patience,
        }
    }

    /// Who asks on the peers' port.
    fn visitor(&self, session: &Session) -> Result<Option<PeerRequest>, PeerAuthError> {
        let Some(peers) = self.pull.peers().filter(|_| self.listener == Listener::Peers) else { return Ok(None) };
        let from = address_of(session);
        let at = session.server_addr().and_then(|address| address.as_inet()).copied();
        PeerRequest::read(session.req_header(), from, at, peers).map(Some)
    }

    /// Why a stranger is not told what a tag means; a peer whose rules differ asks elsewhere.
    fn no_tags(&self) -> PullError {
        if self.pull.peers().is_some_and(|peers| peers.are_proven()) {
            return PullError::NotKept;
        }
        PullError::Denied("peers that do not prove who they are share what a digest proves, not tags".into())
    }

    /// A blob for a peer: from here, or from somebody who has it as well and is less busy.
    async fn blob_for(
        &self,
        visitor: &PeerRequest,
        request: &BlobRequest,
        exchange: &mut Exchange,
    ) -> Result<PreparedResponse, PullError> {
        let Some(peers) = self.pull.peers() else { return Err(PullError::NotKept) };
        let (digest, asked) = (&request.digest, Instant::now());
        let direction = self.pull.direct(visitor, request, peers).await;
        let request = &request.after(asked.elapsed());
        let reply = match direction {
            PeerDecision::Redirect(peer) => PreparedResponse::redirect(peer),
            PeerDecision::Depute(span) => PreparedResponse::depute(span),
            PeerDecision::Answer => {
                exchange.counted = Some(peers.send());
                match self.pull.blob(request).await {
                    Ok(answer) => PreparedResponse::blob(answer, digest),
                    Err(refusal) => PreparedResponse::refusal(&refusal),
                }
            }
        };
        Ok(reply.telling(peers.told(visitor, digest, &self.pull.here(request).await)))
    }

    async fn list(
        &self,
        place: &registries::RepositoryRef,
        list: &ListKind,
        path: &str,
        query: Option<&str>,
        asking: RequestContext,
    ) -> Result<PreparedResponse, PullError> {
        let passed = query.map(link::without_namespace).filter(|query| !query.is_empty());
        let answer = self.pull.list(place, list, passed.as_deref(), asking).await?;
        Ok(PreparedResponse::list(answer, path, query_value(query, "ns").as_deref()))
    }
}

/// The answer, or None if the client leaves first: what it holds here is given back at once. Downloads and lookups that it
/// began go on for the next client.
async fn while_client_waits(
    connection: Option<SocketDescriptor>,
    answer: impl Future<Output = PreparedResponse>,
) -> Option<PreparedResponse> {
    let mut answer = std::pin::pin!(answer);
    // What is in memory needs no timer.
    if let Poll::Ready(reply) = poll!(&mut answer) {
        return Some(reply);
    }
    if let Ok(reply) = timeout(AT_ONCE, &mut answer).await {
        return Some(reply);
    }
    let Some(connection) = connection else { return Some(answer.await) };
    tokio::select! {
        biased;
        reply = answer => Some(reply),
        () = connection.closed() => None,
    }
}

/// A header's text. None: it is missing, or not text.
fn text<'a>(request: &'a Parts, name: &HeaderName) -> Option<&'a str> {
    request.headers.get(name).and_then(|value| value.to_str().ok())
}

/// Where a request comes from.
fn address_of(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(|address| address.as_inet()).map(|address| address.ip().to_canonical())
}

/// As whom that counts where all share something.
fn client_of(session: &Session) -> Option<IpAddr> {
    address_of(session).map(connections::client)
}

/// How old a tag's meaning is, more exactly than clients need to know it.
fn told_age(answer: &ManifestResponse) -> Option<(HeaderName, HeaderValue)> {
    let age = u64::try_from(answer.age?.as_millis()).unwrap_or(u64::MAX);
    Some((wire::AGE, age.into()))
}
