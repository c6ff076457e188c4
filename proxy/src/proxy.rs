//! Handles requests on the registry and peer ports: authorizes, responds, counts and logs.

mod answer;
mod browsers;
mod client_auth;
mod client_policy;
mod clients;
mod exchange;
mod load;
mod login_throttle;
mod logins;
mod peer_operations;
mod sendfile;
mod slow_clients;
mod socket;

use std::net::IpAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
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
pub use self::client_policy::ClientPolicy;
pub use self::clients::Clients;
use self::clients::{ClientDenied, ClientPermit};
pub use self::exchange::Exchange;
use self::exchange::{CLIENT_DISCONNECTED, Content};
pub use self::load::Load;
use self::load::Overloaded;
use self::login_throttle::LoginPermit;
use self::slow_clients::CLIENT_STALL_TIMEOUT;
use self::socket::SocketDescriptor;
use crate::access_log::AccessLog;
use crate::activity::Activity;
use crate::bandwidth::{CurrentPriority, PRIORITY, Priority, RateLimiter, Throttle};
use crate::connections::{self, keep_alive_seconds};
use crate::metrics::Metrics;
use crate::oci::route::{self, query_value};
use crate::oci::{Endpoint, RangeSet, Reference, RegistryFrom, Route, accept, link};
use crate::peers::swarm::PeerDecision;
use crate::peers::{FetchPolicy, PEER_OPERATIONS, PeerAuthError, PeerRequest, PeerTrust, wire};
use crate::probe_image;
use crate::pull::{BlobRequest, ListKind, ManifestResponse, Pull, PullError, RequestContext, Requester, check_rule};
use crate::readiness::Readiness;
use crate::registries::{self, Rule, Rules};
use crate::respond::PreparedResponse;
use crate::status::StatusSources;
use crate::times::CLOSE_TIMEOUT;
use crate::trace::{self, Tracer};

/// Handles the requests of one listener.
pub struct RegistryProxy {
    pub pull: Arc<Pull>,
    pub policy: Arc<ArcSwap<ClientPolicy>>,
    pub metrics: Arc<Metrics>,
    pub access_log: Arc<AccessLog>,
    pub load: Arc<Load>,
    pub clients: Arc<Clients>,
    pub browsers: Arc<Browsers>,
    pub client_auth: Arc<ClientAuth>,
    pub activity: Arc<Activity>,
    pub tracer: Arc<Tracer>,
    pub readiness: Arc<Readiness>,
    /// The limit of what this process sends to peers.
    pub peer_upload: Arc<RateLimiter>,
    pub status: Arc<StatusSources>,
    pub listener: Listener,
}

/// The kind of requester that a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    Clients,
    Peers,
}

/// A request that takes longer is watched for a client disconnect. Larger: abandoned requests hold their share longer.
/// Smaller: more requests need a second descriptor.
const DISCONNECT_WATCH_DELAY: Duration = Duration::from_millis(250);

/// nginx's status for a request whose client disconnected. Only logs, metrics and the status have it.
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
                tracing::debug!(%error, "request unreadable");
                self.count(&Exchange { status: 400, ..Exchange::new() });
                let farewell = async {
                    let _ = session.respond_error(400).await;
                    session.shutdown().await;
                };
                let _ = timeout(CLOSE_TIMEOUT, farewell).await;
                return None;
            }
        }
        let mut exchange = Exchange::new();
        let keep_alive_seconds = keep_alive_seconds(session.req_header()).filter(|_| !*shutdown.borrow());
        session.set_keepalive(keep_alive_seconds);
        if let Err(error) = self.respond(&mut session, &mut exchange).await {
            self.report(&session, Some(&error), &mut exchange);
            // A duplicate of the descriptor may still be open: without the shutdown the client would not see the short
            // body at once. The timeout is for a client that reads nothing.
            let _ = timeout(CLOSE_TIMEOUT, session.shutdown()).await;
            return None;
        }
        self.report(&session, None, &mut exchange);
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = timeout(CLIENT_STALL_TIMEOUT, session.finish()).await.ok()?.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

/// An authorized request for content.
struct ContentRequest<'a> {
    endpoint: Endpoint,
    accept: &'a str,
    registry_from: RegistryFrom,
    request_context: RequestContext,
}

impl RegistryProxy {
    async fn respond(&self, session: &mut Session, exchange: &mut Exchange) -> pingora::Result<()> {
        session.set_write_timeout(Some(CLIENT_STALL_TIMEOUT));
        let client = self.share_key(session);
        let response = match self.load.admit(client) {
            Some(permit) => {
                exchange.request_permit = Some(permit);
                let span = self.span(session.req_header());
                let connection = SocketDescriptor::of(session);
                let handling = span.within(Box::pin(self.handle(session, exchange)));
                let Some(response) = until_disconnect(connection, handling).await else {
                    exchange.span = span;
                    exchange.status = CLIENT_CLOSED_REQUEST;
                    // The client has disconnected: nothing is written.
                    return Err(Error::explain(ErrorType::ConnectionClosed, CLIENT_DISCONNECTED).into_down());
                };
                exchange.span = span;
                match self.load.reserve(response.body.held(), client) {
                    Ok(memory) => {
                        exchange.memory = memory;
                        response
                    }
                    Err(Overloaded) => PreparedResponse::refusal(&PullError::Busy),
                }
            }
            None => PreparedResponse::refusal(&PullError::Busy),
        };
        let response = if self.listener == Listener::Clients { response.for_clients() } else { response };
        send(session, exchange, response).await
    }
}

impl RegistryProxy {
    async fn handle(&self, session: &mut Session, exchange: &mut Exchange) -> PreparedResponse {
        let policy = self.policy.load_full();
        match self.admit_client(&policy, session) {
            Ok(permit) => exchange.client_permit = permit,
            Err(denied @ ClientDenied::NotAllowed) => {
                return PreparedResponse::refusal(&PullError::Denied(denied.as_str().into()));
            }
            Err(denied) => return PreparedResponse::refusal(&PullError::Unavailable(denied.as_str().into())),
        }
        if let Err(denied) = self.browsers.admit(&policy.browser_names, session.req_header()) {
            return PreparedResponse::refusal(&PullError::Denied(denied.as_str().into()));
        }
        if self.listener == Listener::Peers && session.req_header().uri.path().starts_with(PEER_OPERATIONS) {
            exchange.route = "operation";
            return self.peer_operation(session, exchange).await;
        }
        if self.is_token_request(&policy, session.req_header()) {
            exchange.route = "token";
            return self.issue_token(&policy, session).await;
        }
        let request = session.req_header();
        let route = match self.route(&policy.rules, request) {
            Ok(route) => route,
            Err(response) => return *response,
        };
        exchange.route = route.as_str();
        let is_probe = matches!(&route, Route::Content { registry, .. } if probe_image::is_registry(registry));
        if self.listener == Listener::Clients
            && !is_probe
            && !self.client_auth.is_logged_in(policy.logins.as_deref(), request)
        {
            return PreparedResponse::credential_rejected(
                "this cache requires a login: use an account of access.users_file",
            );
        }
        let Route::Content { registry, repository, endpoint, registry_from } = route else {
            return self.ping(&policy, request);
        };
        if probe_image::is_registry(&registry) && self.listener == Listener::Clients {
            let range = text(request, &RANGE).and_then(RangeSet::parse).as_ref().and_then(RangeSet::single);
            return probe_image::answer(&endpoint, range.filter(|_| request.method != Method::HEAD))
                .of_registry(&registry);
        }
        let repo_ref = policy.rules.repo_ref(registry.clone(), repository.clone());
        let rule = repo_ref.rule.name().to_owned();
        exchange.content = Some(Content { registry: registry.clone(), repository, rule, registry_from });
        let peer_request = match self.peer_request(session) {
            Ok(peer_request) => peer_request,
            Err(unauthenticated) => return PreparedResponse::unauthenticated(unauthenticated),
        };
        exchange.seal = peer_request.as_ref().and_then(|peer_request| peer_request.seal.clone());
        let request_context = match &peer_request {
            Some(peer_request) => self.peer_context(peer_request, &repo_ref.rule, &endpoint),
            None => {
                let priority = text(request, &PRIORITY).map_or(Priority::Client, Priority::of_client);
                RequestContext { priority, ..RequestContext::of_client(registry_from) }
            }
        };
        let request_context = RequestContext { client: self.share_key(session), ..request_context };
        if self.listener == Listener::Peers {
            exchange.throttle =
                Throttle::new([self.peer_upload.clone()], CurrentPriority::new(request_context.priority));
        }
        let started = Instant::now();
        let accept = accept::merge(request.headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()));
        let authorized =
            self.authorize(session, peer_request.as_ref(), repo_ref, &endpoint, &accept, request_context).await;
        let (repo_ref, permit) = match authorized {
            Ok(authorized) => authorized,
            Err(response) => return response.of_registry(&registry),
        };
        let request_context = request_context.after(started.elapsed());
        if let Err(refusal) = check_rule(&repo_ref, request_context.requester) {
            // A peer's own rules may be newer or older. A 504 says nothing about the upstream, unlike a 403.
            let refusal = if request_context.requester.is_peer() { PullError::NotCached } else { refusal };
            return PreparedResponse::refusal(&refusal);
        }
        let is_list = matches!(endpoint, Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog);
        let content_request = ContentRequest { endpoint, accept: &accept, registry_from, request_context };
        let result = self.content(session, exchange, &repo_ref, content_request, peer_request).await;
        if result.as_ref().is_err_and(PullError::is_denied) && repo_ref.principal.holder().is_some() {
            // A client that is denied a list may still be allowed to pull.
            if !is_list {
                self.pull.authorizer.revoke_authorization(&repo_ref);
            }
            permit.into_iter().for_each(LoginPermit::mark_rejected);
        }
        // Only clients get a challenge: a peer would take a 401 for failed peer authentication.
        let refuse = |refusal| match request_context.requester.is_peer() {
            true => PreparedResponse::refusal(&refusal),
            false => self.client_error(session.req_header(), &repo_ref, &refusal),
        };
        result.unwrap_or_else(refuse).of_registry(&registry)
    }

    /// Resolves a request to a registry, repository and endpoint.
    fn route(&self, rules: &Rules, request: &Parts) -> Result<Route, Box<PreparedResponse>> {
        if !matches!(request.method, Method::GET | Method::HEAD) {
            return Err(Box::new(PreparedResponse::read_only()));
        }
        let (path, query) = (request.uri.path(), request.uri.query());
        let host = text(request, &HOST).or_else(|| request.uri.authority().map(|a| a.as_str()));
        route::parse(path, query, host, rules).map_err(|error| {
            if error.message.contains("override_path") {
                tracing::warn!(path, error = error.message, "client mirror configuration invalid");
            }
            Box::new(PreparedResponse::route_error(&error))
        })
    }

    /// Authorizes a request where the rule needs it, and sets the principal of the repository. The login permit is held
    /// while the credential may still be rejected.
    async fn authorize(
        &self,
        session: &Session,
        peer_request: Option<&PeerRequest>,
        repo_ref: registries::RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        request_context: RequestContext,
    ) -> Result<(registries::RepositoryRef, Option<LoginPermit>), PreparedResponse> {
        if !repo_ref.rule.is_passthrough() || repo_ref.rule.deny {
            return Ok((repo_ref, None));
        }
        if let Some(peer_request) = peer_request {
            return Ok((self.authorize_peer(peer_request, repo_ref, endpoint, accept, request_context).await, None));
        }
        let authorization = self.authorize_client(session, repo_ref, endpoint, accept);
        match timeout(request_context.time_limit, authorization).await {
            Ok(authorized) => authorized,
            Err(_) => {
                let message = "authorization timed out: the registry did not respond in time";
                Err(PreparedResponse::refusal(&PullError::Unavailable(message.into())))
            }
        }
    }

    /// Produces the content, from the cache, a peer or the upstream.
    async fn content(
        &self,
        session: &Session,
        exchange: &mut Exchange,
        repo_ref: &registries::RepositoryRef,
        content_request: ContentRequest<'_>,
        peer_request: Option<PeerRequest>,
    ) -> Result<PreparedResponse, PullError> {
        let request = session.req_header();
        let ranges = request.headers.get(RANGE).and_then(|value| RangeSet::parse(value.to_str().ok()?));
        let range = ranges.as_ref().and_then(RangeSet::single);
        let head_only = request.method == Method::HEAD;
        let (path, query) = (request.uri.path(), request.uri.query());
        let ContentRequest { endpoint, accept, registry_from, request_context } = content_request;
        match endpoint {
            Endpoint::Manifest(Reference::Tag(_))
                if request_context.requester == Requester::Peer(PeerTrust::Unauthenticated) =>
            {
                Err(self.tags_denied())
            }
            Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog if request_context.requester.is_peer() => {
                Err(PullError::Denied("lists are not served to peers".into()))
            }
            Endpoint::Manifest(reference) => {
                let found = self.pull.manifests.manifest(repo_ref, &reference, accept, request_context).await;
                // A HEAD request describes the whole manifest.
                found.map(|found| {
                    let response = PreparedResponse::manifest(&found, range.filter(|_| !head_only));
                    response.with_headers(
                        peer_request.is_some().then(|| age_header(&found)).flatten().into_iter().collect(),
                    )
                })
            }
            Endpoint::Blob(digest) => {
                let request = BlobRequest { repo_ref: repo_ref.clone(), digest, range, registry_from, request_context };
                if head_only {
                    let length = self.pull.blobs.length(&request).await;
                    let response =
                        length.map(|(length, from)| PreparedResponse::blob_length(length, from, &request.digest));
                    match (peer_request, self.pull.peers()) {
                        (Some(peer_request), Some(peers)) => {
                            peers.record_report(&peer_request, &request.digest);
                            let here = self.pull.blobs.here(&request).await;
                            response.map(|response| {
                                response.with_headers(peers.response_headers(&peer_request, &request.digest, &here))
                            })
                        }
                        _ => response,
                    }
                } else if let Some(peer_request) = peer_request {
                    self.blob_for_peer(&peer_request, &request, exchange).await
                } else {
                    let found = match ranges.filter(|_| range.is_none()) {
                        Some(ranges) => self.pull.blobs.parts(&request, &ranges).await,
                        None => self.pull.blobs.blob(&request).await,
                    };
                    found.map(|found| PreparedResponse::blob(found, &request.digest))
                }
            }
            Endpoint::Tags => self.list(repo_ref, &ListKind::Tags, path, query, request_context).await,
            Endpoint::Referrers(digest) => {
                self.list(repo_ref, &ListKind::Referrers(digest), path, query, request_context).await
            }
            Endpoint::Catalog => self.list(repo_ref, &ListKind::Catalog, path, query, request_context).await,
        }
    }

    /// The key for fair sharing. Peers count by address, not by network: all nodes of a cluster may be in one network.
    fn share_key(&self, session: &Session) -> Option<IpAddr> {
        match self.listener {
            Listener::Clients => client_of(session),
            Listener::Peers => address_of(session),
        }
    }

    /// The request's trace span.
    fn span(&self, request: &Parts) -> trace::TraceSpan {
        match self.listener {
            Listener::Clients => self.tracer.answer(&request.headers),
            Listener::Peers => self.tracer.join(&request.headers),
        }
    }

    /// Whether this is a request to the token endpoint, which exists only if a rule authorizes clients at the registry.
    fn is_token_request(&self, policy: &ClientPolicy, request: &Parts) -> bool {
        self.listener == Listener::Clients
            && request.uri.path() == client_auth::TOKEN_PATH
            && matches!(request.method, Method::GET | Method::POST)
            && policy.rules.any_passthrough()
    }

    /// The peer has authorized its client. This node checks only that the digest belongs to the repository.
    async fn authorize_peer(
        &self,
        peer_request: &PeerRequest,
        repo_ref: registries::RepositoryRef,
        endpoint: &Endpoint,
        accept: &str,
        request_context: RequestContext,
    ) -> registries::RepositoryRef {
        let repo_ref = registries::RepositoryRef { principal: peer_request.principal(), ..repo_ref };
        if let (Endpoint::Manifest(Reference::Digest(digest)) | Endpoint::Blob(digest), FetchPolicy::Upstream) =
            (endpoint, request_context.fetch_policy)
            && let Err(error) = self.pull.authorizer.authorize_content(&repo_ref, digest, endpoint, accept).await
        {
            tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, %error, "content proof failed");
        }
        repo_ref
    }

    /// Applies the limits of `[access]` to a client. Peers authenticate by key or certificate instead.
    fn admit_client(&self, policy: &ClientPolicy, session: &Session) -> Result<Option<ClientPermit>, ClientDenied> {
        if self.listener == Listener::Peers {
            return Ok(None);
        }
        self.clients.admit(&policy.limits, address_of(session), Instant::now()).map(Some)
    }

    /// The terms under which this node serves a peer's request.
    fn peer_context(&self, peer_request: &PeerRequest, rule: &Rule, endpoint: &Endpoint) -> RequestContext {
        let (trust, fetch_policy) = peer_request.within(rule);
        // While draining, this node starts no download for a peer: it would be cut off. Tag lookups are short.
        let is_tag = matches!(endpoint, Endpoint::Manifest(Reference::Tag(_)));
        let fetch_policy = if self.readiness.has_ended() && !is_tag { FetchPolicy::CacheOnly } else { fetch_policy };
        let time_limit = RequestContext::peer_time_limit(peer_request.terms.deadline);
        RequestContext {
            requester: Requester::Peer(trust),
            client: None,
            role: peer_request.terms.role,
            fetch_policy,
            range_purpose: peer_request.terms.range_purpose,
            priority: peer_request.terms.priority.min(Priority::Peer),
            downstream: peer_request.terms.peers,
            time_limit,
        }
    }

    /// Authenticates a request on the peer port. None: the listener serves clients.
    fn peer_request(&self, session: &Session) -> Result<Option<PeerRequest>, PeerAuthError> {
        let Some(peers) = self.pull.peers().filter(|_| self.listener == Listener::Peers) else { return Ok(None) };
        let from = address_of(session);
        let at = session.server_addr().and_then(|address| address.as_inet()).copied();
        PeerRequest::read(session.req_header(), from, at, peers).map(Some)
    }

    /// The error for a peer that gets no tags. If peers authenticate, this one has other rules and gets a cache miss.
    fn tags_denied(&self) -> PullError {
        if self.pull.peers().is_some_and(|peers| peers.are_authenticated()) {
            return PullError::NotCached;
        }
        PullError::Denied("tags are not served to unauthenticated peers".into())
    }

    /// A blob for a peer: the content, a redirect to a less loaded holder, or a range to download for all peers.
    async fn blob_for_peer(
        &self,
        peer_request: &PeerRequest,
        request: &BlobRequest,
        exchange: &mut Exchange,
    ) -> Result<PreparedResponse, PullError> {
        let Some(peers) = self.pull.peers() else { return Err(PullError::NotCached) };
        let (digest, started) = (&request.digest, Instant::now());
        let decision = self.pull.blobs.direct(peer_request, request, peers).await;
        let request = &request.after(started.elapsed());
        let response = match decision {
            PeerDecision::Redirect(peer) => PreparedResponse::redirect(peer),
            PeerDecision::Depute(span) => PreparedResponse::delegate(span),
            PeerDecision::Serve => {
                exchange.peer_body = Some(peers.send());
                match self.pull.blobs.blob(request).await {
                    Ok(found) => PreparedResponse::blob(found, digest),
                    Err(refusal) => PreparedResponse::refusal(&refusal),
                }
            }
        };
        Ok(response.with_headers(peers.response_headers(peer_request, digest, &self.pull.blobs.here(request).await)))
    }

    async fn list(
        &self,
        repo_ref: &registries::RepositoryRef,
        list: &ListKind,
        path: &str,
        query: Option<&str>,
        request_context: RequestContext,
    ) -> Result<PreparedResponse, PullError> {
        let passed = query.map(link::without_namespace).filter(|query| !query.is_empty());
        let found = self.pull.lists.list(repo_ref, list, passed.as_deref(), request_context).await?;
        Ok(PreparedResponse::list(found, path, query_value(query, "ns").as_deref()))
    }
}

/// The response, or None if the client disconnects first, which frees the request's shares at once. Downloads and
/// lookups are tasks of their own and are not cancelled with it.
async fn until_disconnect(
    connection: Option<SocketDescriptor>,
    handling: impl Future<Output = PreparedResponse>,
) -> Option<PreparedResponse> {
    let mut handling = std::pin::pin!(handling);
    // A response from memory needs no timer.
    if let Poll::Ready(response) = poll!(&mut handling) {
        return Some(response);
    }
    if let Ok(response) = timeout(DISCONNECT_WATCH_DELAY, &mut handling).await {
        return Some(response);
    }
    let Some(connection) = connection else { return Some(handling.await) };
    tokio::select! {
        biased;
        response = handling => Some(response),
        () = connection.closed() => None,
    }
}

/// A header's text. None: the header is missing or is not text.
fn text<'a>(request: &'a Parts, name: &HeaderName) -> Option<&'a str> {
    request.headers.get(name).and_then(|value| value.to_str().ok())
}

/// The address of the client or peer.
fn address_of(session: &Session) -> Option<IpAddr> {
    session.client_addr().and_then(|address| address.as_inet()).map(|address| address.ip().to_canonical())
}

/// The address as fair sharing counts it: an IPv6 network is one client.
fn client_of(session: &Session) -> Option<IpAddr> {
    address_of(session).map(connections::client)
}

/// The age of a tag resolution for peers, in milliseconds: the `Age` header for clients has only seconds.
fn age_header(found: &ManifestResponse) -> Option<(HeaderName, HeaderValue)> {
    let age = u64::try_from(found.age?.as_millis()).unwrap_or(u64::MAX);
    Some((wire::AGE, age.into()))
}
