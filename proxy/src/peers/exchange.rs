//! One request to a peer: signing, retries, detection of frozen peers, and authentication of the response.

use std::net::SocketAddr;
use std::time::Duration;

use http::header::{ACCEPT, ACCEPT_ENCODING, CACHE_CONTROL, RANGE};
use http::{HeaderValue, Method};
use reqwest::Response;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::key::Seal;
use super::query::{Downstream, PeerQuery, PeerRequestMode};
use super::wire::{PeerRefusal, Terms};
use super::{Peers, Scope, wire};
use crate::role::Role;
use crate::source::{Part, SourceError, causes, root_cause};
use crate::times::{ALTERNATIVE_TIMEOUT, LOOKUP_TIMEOUT};
use crate::trace;

/// Next owners that are pinged while an owner is silent. Larger: more pings. Smaller: of several frozen owners in a
/// row, each costs a request its own probe.
const MAX_SUSPECTED_OWNERS: usize = 2;

/// Attempts at an overloaded owner, after random pauses of up to one, two and three times [`OVERLOADED_PAUSE`]: about
/// half a second for each of three owners, a small part of a client's timeout. Larger: clients wait longer. Smaller:
/// load moves to the next owner, which then is overloaded.
const MAX_OVERLOADED_TRIES: u32 = 4;
const OVERLOADED_PAUSE: Duration = Duration::from_millis(200);

/// What a request tells the peer besides the query.
#[derive(Default)]
pub(super) struct RequestMetadata {
    /// This node, then the peers for which it sends the request.
    pub(super) peers: Downstream,
    /// What this node has: `dray-have`.
    pub(super) have: Option<HeaderValue>,
    /// Whether this node could download the range from the upstream itself.
    pub(super) may_depute: bool,
    /// The manifest media types that the client accepts.
    pub(super) accept: Option<HeaderValue>,
}

impl Peers {
    /// Sends a request, and counts its outcome.
    pub(super) async fn get(
        &self,
        method: Method,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        path: &str,
        part: Part,
        metadata: RequestMetadata,
    ) -> Result<Response, SourceError> {
        if !self.is_available(&peer) {
            // Another request marked it as down since it was chosen.
            return Err(SourceError::Unreachable("the peer is down or ejected".into()));
        }
        let repo_ref = query.repo_ref;
        let namespace = url::form_urlencoded::byte_serialize(repo_ref.registry.as_str().as_bytes());
        let path = format!("/v2/{}/{path}?ns={}", repo_ref.repository, namespace.collect::<String>());
        let url = format!("{}://{peer}{path}", self.auth.scheme());
        let mut request = self.client.request(method, url).header(ACCEPT_ENCODING, "identity");
        let role = match query.mode {
            PeerRequestMode::OnlyIfCached => {
                request = request.header(CACHE_CONTROL, wire::ONLY_IF_CACHED);
                Role::Global
            }
            PeerRequestMode::As(role) => role,
        };
        let terms = Terms {
            role,
            rule: Some(repo_ref.rule.fingerprint().to_owned()),
            deadline: Some(query.deadline.saturating_duration_since(Instant::now())),
            peers: metadata.peers,
            range_purpose: query.range_purpose,
            priority: query.priority,
            redirects: query.redirects,
            may_depute: metadata.may_depute,
        };
        let headers = [(wire::REQUEST, terms.write()), (wire::HAVE, metadata.have), (ACCEPT, metadata.accept)];
        request = request.headers(headers.into_iter().filter_map(|(name, value)| Some((name, value?))).collect());
        // Only a peer that is to request from the registry needs a credential.
        let is_forwarded = matches!(query.mode, PeerRequestMode::As(_)) && repo_ref.principal.may_be_forwarded();
        if let Some(authorization) = repo_ref.principal.authorization().filter(|_| is_forwarded)
            && let Some(sealed) = self.auth.seal(authorization)
        {
            request = request.header(wire::AUTHORIZATION, sealed);
        }
        if let Some(range) = part.header() {
            request = request.header(RANGE, range);
        }
        let mut request = request.build().map_err(|error| SourceError::Malformed(root_cause(&error)))?;
        let mut span = trace::begin("peer request", trace::TraceSpanKind::Client);
        span.write(request.headers_mut());
        let sent_at = Instant::now();
        let response = self.exchange_with_retries(peer, request, query).await;
        let outcome = match response.as_ref().map(|response| response.status().as_u16()) {
            Ok(200 | 206) => "hit",
            Ok(307) => "redirected",
            Ok(404 | 504) => "miss",
            Ok(401 | 403) => "denied",
            Ok(429 | 503) => "overloaded",
            Ok(_) => "error",
            Err(SourceError::Busy) => "overloaded",
            Err(_) => "error",
        };
        span.tell(|| {
            let address = ("server.address", peer.ip().to_string().into());
            vec![address, ("server.port", u64::from(peer.port()).into()), ("dray.outcome", outcome.into())]
        });
        if let Err(error) = &response {
            span.fail(|| error.to_string());
        }
        let members = self.members.load();
        let zones = [members.zone_of(peer), members.own_zone()];
        self.metrics.peer_requests.with_label_values(&[zones[0], zones[1], outcome]).inc();
        if outcome == "hit" {
            self.metrics.peer_first_byte.with_label_values(&zones).observe(sent_at.elapsed().as_secs_f64());
            self.latencies.insert(peer, sent_at.elapsed());
            self.record_success(peer);
        }
        response
    }

    /// Retries an overloaded owner after a pause: if all its followers went to the next owner, that would be overloaded
    /// instead.
    async fn exchange_with_retries(
        &self,
        peer: SocketAddr,
        request: reqwest::Request,
        query: &PeerQuery<'_>,
    ) -> Result<Response, SourceError> {
        let may_retry = matches!(query.mode, PeerRequestMode::As(_)) && !self.overloaded.contains_key(&peer);
        let tries = if may_retry { MAX_OVERLOADED_TRIES } else { 1 };
        for nth in 1..tries {
            let Some(again) = request.try_clone() else { break };
            match self.exchange(peer, again, query).await {
                Err(SourceError::Busy) => sleep(OVERLOADED_PAUSE.mul_f64(f64::from(nth) * fastrand::f64())).await,
                result => return result,
            }
        }
        let response = self.exchange(peer, request, query).await;
        if may_retry && matches!(response, Err(SourceError::Busy)) {
            self.overloaded.insert(peer, ());
        }
        response
    }

    /// Signs a request, sends it, and accepts only an authenticated response.
    async fn exchange(
        &self,
        peer: SocketAddr,
        mut request: reqwest::Request,
        query: &PeerQuery<'_>,
    ) -> Result<Response, SourceError> {
        let method = request.method().clone();
        let probe = request.try_clone();
        let path = request.url()[url::Position::BeforePath..].to_owned();
        let seal = self.auth.sign(peer, &method, &path, request.headers_mut());
        let mut sending = std::pin::pin!(timeout_at(query.deadline, self.client.execute(request)));
        let result = tokio::select! {
            biased;
            result = &mut sending => result,
            // A silent peer waits for its upstream, or is frozen: a probe tells which.
            alive = self.probe_silent_peer(peer, query, probe) => {
                if !alive {
                    self.mark_down(peer);
                    return Err(SourceError::Unreachable("the peer does not respond to a probe".into()));
                }
                sending.await
            }
        };
        match result {
            Ok(Ok(response)) => self.authenticate(peer, response, seal.as_ref()).await,
            Ok(Err(error)) => {
                let cause = root_cause(&error);
                if is_about_certificates(&error) {
                    self.mark_unauthenticated(peer, &cause);
                } else {
                    self.mark_down(peer);
                }
                Err(SourceError::Unreachable(cause))
            }
            // The peer is not marked as down: its upstream may be slow, and then all peers would request from that.
            Err(_) => Err(SourceError::TimedOut),
        }
    }

    /// Waits, then probes a peer that is still silent. False: it is frozen, or was marked as down meanwhile. The next owners are pinged meanwhile, so
    /// that several frozen ones cost no more time than one.
    async fn probe_silent_peer(
        &self,
        peer: SocketAddr,
        query: &PeerQuery<'_>,
        outstanding: Option<reqwest::Request>,
    ) -> bool {
        sleep(ALTERNATIVE_TIMEOUT).await;
        if let PeerRequestMode::As(role) = query.mode {
            let scope = if role == Role::Zone { Scope::OwnZone } else { query.scope };
            let after = PeerQuery { scope, downstream: Downstream::NONE, ..*query };
            let next = self.successors(&after, MAX_SUSPECTED_OWNERS + 1).into_iter().filter(|next| *next != peer);
            next.take(MAX_SUSPECTED_OWNERS).for_each(|next| self.mark_suspect(next));
        }
        // Another request may have marked it as down meanwhile.
        self.is_available(&peer) && self.responds_to_probe(peer, outstanding).await
    }

    /// Accepts a response only if it is authenticated, where a key is configured.
    async fn authenticate(
        &self,
        peer: SocketAddr,
        response: Response,
        seal: Option<&Seal>,
    ) -> Result<Response, SourceError> {
        let status = response.status().as_u16();
        let is_authenticated = seal.is_none_or(|seal| seal.verifies(status, response.headers()));
        // An overloaded peer responds before it authenticates the request, so its 503 may be unsigned.
        if status == 503
            && (!is_authenticated || PeerRefusal::read(response.headers()) == Some(PeerRefusal::Overloaded))
        {
            return Err(SourceError::Busy);
        }
        if is_authenticated && status != 401 {
            return Ok(response);
        }
        let error = match status {
            401 => error_text(response).await,
            _ => "its response is not signed with a key of peers.key_file".to_owned(),
        };
        self.mark_unauthenticated(peer, &error);
        Err(SourceError::NotCached)
    }

    /// Marks a peer as down for a while: its key or certificate may be rotated later than that of this node.
    fn mark_unauthenticated(&self, peer: SocketAddr, error: &str) {
        self.metrics.peer_auth_failures.with_label_values(&["response"]).inc();
        tracing::warn!(%peer, error, "peer authentication failed");
        self.mark_down(peer);
    }
}

/// The body of a 401, for the log.
async fn error_text(mut response: Response) -> String {
    const MAX_ERROR_TEXT: usize = 500;
    let first = timeout(LOOKUP_TIMEOUT, response.chunk()).await.ok().and_then(Result::ok).flatten().unwrap_or_default();
    match &*String::from_utf8_lossy(&first[..first.len().min(MAX_ERROR_TEXT)]) {
        "" => "the peer responded 401".to_owned(),
        text => format!("the peer responded 401: {text}"),
    }
}

/// Whether one side rejects the other's certificate, or has none.
fn is_about_certificates(error: &reqwest::Error) -> bool {
    let tls_error = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(tls_error, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)))
}
