//! How a question reaches a peer, and whether what comes back is believed.

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
use crate::times::{ALTERNATIVE_TIMEOUT, LOOK_TIMEOUT};
use crate::trace;

const COME_AFTER: usize = 2;

/// An owner that has too much to do is asked so often, with pauses of up to as long, twice and three times as long: half a
/// second altogether for each of three owners is a small part of the time that a client has.
const BUSY: u32 = 4;
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// What a request tells a peer beside the question.
#[derive(Default)]
pub(super) struct RequestMetadata {
    /// This node, then the peers for which it asks.
    pub(super) peers: Downstream,
    /// What this node has: `dray-have`.
    pub(super) have: Option<HeaderValue>,
    /// Whether this node could fetch the range from the upstream itself.
    pub(super) may_depute: bool,
    /// The media types of a manifest that its client accepts.
    pub(super) accept: Option<HeaderValue>,
}

impl Peers {
    /// Asks a question, and counts what came of it.
    pub(super) async fn get(
        &self,
        method: Method,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        path: &str,
        part: Part,
        told: RequestMetadata,
    ) -> Result<Response, SourceError> {
        if !self.is_well(&peer) {
            // It was found out since it was chosen.
            return Err(SourceError::Unreachable("the peer is left alone".into()));
        }
        let place = question.place;
        let namespace = url::form_urlencoded::byte_serialize(place.registry.as_str().as_bytes());
        let path = format!("/v2/{}/{path}?ns={}", place.repository, namespace.collect::<String>());
        let url = format!("{}://{peer}{path}", self.proof.scheme());
        let mut request = self.client.request(method, url).header(ACCEPT_ENCODING, "identity");
        let role = match question.manner {
            PeerRequestMode::IfKept => {
                request = request.header(CACHE_CONTROL, wire::ONLY_IF_CACHED);
                Role::Global
            }
            PeerRequestMode::As(role) => role,
        };
        let terms = Terms {
            role,
            rule: Some(place.rule.fingerprint().to_owned()),
            deadline: Some(question.deadline.saturating_duration_since(Instant::now())),
            peers: told.peers,
            aim: question.aim,
            redirects: question.redirects,
            may_depute: told.may_depute,
        };
        let headers = [(wire::REQUEST, terms.write()), (wire::HAVE, told.have), (ACCEPT, told.accept)];
        request = request.headers(headers.into_iter().filter_map(|(name, value)| Some((name, value?))).collect());
        // Only whoever is to ask the registry needs to be shown something.
        let is_lent = matches!(question.manner, PeerRequestMode::As(_)) && place.caller.may_be_lent();
        if let Some(authorization) = place.caller.authorization().filter(|_| is_lent)
            && let Some(sealed) = self.proof.seal(authorization)
        {
            request = request.header(wire::AUTHORIZATION, sealed);
        }
        if let Some(range) = part.header() {
            request = request.header(RANGE, range);
        }
        let mut request = request.build().map_err(|error| SourceError::Malformed(root_cause(&error)))?;
        let mut span = trace::begin("ask a peer", trace::TraceSpanKind::Client);
        span.write(request.headers_mut());
        let asked = Instant::now();
        let answer = self.exchange_patiently(peer, request, question).await;
        let outcome = match answer.as_ref().map(|response| response.status().as_u16()) {
            Ok(200 | 206) => "given",
            Ok(307) => "redirected",
            Ok(504) => "not_kept",
            Ok(_) => "refused",
            Err(SourceError::Busy) => "busy",
            Err(_) => "failed",
        };
        span.tell(|| {
            let address = ("server.address", peer.ip().to_string().into());
            vec![address, ("server.port", u64::from(peer.port()).into()), ("dray.outcome", outcome.into())]
        });
        if let Err(error) = &answer {
            span.fail(|| error.to_string());
        }
        let members = self.members.load();
        let way = [members.zone_of(peer), members.own_zone()];
        self.metrics.peer_requests.with_label_values(&[way[0], way[1], outcome]).inc();
        if outcome == "given" {
            self.metrics.peer_first_byte.with_label_values(&way).observe(asked.elapsed().as_secs_f64());
            self.latencies.insert(peer, asked.elapsed());
            self.gives(peer);
        }
        answer
    }

    /// Asks an owner that has too much to do again, a little later: if all who ask it went to somebody else, that one
    /// would have too much to do.
    async fn exchange_patiently(
        &self,
        peer: SocketAddr,
        request: reqwest::Request,
        question: &PeerQuery<'_>,
    ) -> Result<Response, SourceError> {
        let is_patient = matches!(question.manner, PeerRequestMode::As(_)) && !self.busy.contains_key(&peer);
        let tries = if is_patient { BUSY } else { 1 };
        for nth in 1..tries {
            let Some(again) = request.try_clone() else { break };
            match self.exchange(peer, again, question).await {
                Err(SourceError::Busy) => sleep(BUSY_PAUSE.mul_f64(f64::from(nth) * fastrand::f64())).await,
                answer => return answer,
            }
        }
        let answer = self.exchange(peer, request, question).await;
        if is_patient && matches!(answer, Err(SourceError::Busy)) {
            self.busy.insert(peer, ());
        }
        answer
    }

    /// Proves a request to be ours, sends it, and believes its answer only if it is proven as well.
    async fn exchange(
        &self,
        peer: SocketAddr,
        mut request: reqwest::Request,
        question: &PeerQuery<'_>,
    ) -> Result<Response, SourceError> {
        let method = request.method().clone();
        let probe = request.try_clone();
        let path = request.url()[url::Position::BeforePath..].to_owned();
        let seal = self.proof.sign(peer, &method, &path, request.headers_mut());
        let mut sending = std::pin::pin!(timeout_at(question.deadline, self.client.execute(request)));
        let answered = tokio::select! {
            biased;
            answered = &mut sending => answered,
            // It waits for its origin, or it is frozen.
            alive = self.answers_if_asked(peer, question, probe) => {
                if !alive {
                    self.is_down(peer);
                    return Err(SourceError::Unreachable("the peer is silent".into()));
                }
                sending.await
            }
        };
        match answered {
            Ok(Ok(response)) => self.believe(peer, response, seal.as_ref()).await,
            Ok(Err(error)) => {
                let why = root_cause(&error);
                if is_about_certificates(&error) {
                    self.is_unproven(peer, &why);
                } else {
                    self.is_down(peer);
                }
                Err(SourceError::Unreachable(why))
            }
            // Its origin may be slow: that is no reason for everybody to ask the origin.
            Err(_) => Err(SourceError::TimedOut),
        }
    }

    /// Whether a peer that has been silent for a while is there. Who would be asked next is pinged meanwhile: several that
    /// are frozen cost no more time than one.
    async fn answers_if_asked(
        &self,
        peer: SocketAddr,
        question: &PeerQuery<'_>,
        owed: Option<reqwest::Request>,
    ) -> bool {
        sleep(ALTERNATIVE_TIMEOUT).await;
        if let PeerRequestMode::As(role) = question.manner {
            let scope = if role == Role::Zone { Scope::OwnZone } else { question.scope };
            let after = PeerQuery { scope, downstream: Downstream::NONE, ..*question };
            let next = self.successors(&after, COME_AFTER + 1).into_iter().filter(|next| *next != peer);
            next.take(COME_AFTER).for_each(|next| self.is_suspect(next));
        }
        // Somebody else may have found out meanwhile.
        self.is_well(&peer) && self.answers(peer, owed).await
    }

    /// Takes an answer only from whoever knows the key, if there is one.
    async fn believe(
        &self,
        peer: SocketAddr,
        response: Response,
        seal: Option<&Seal>,
    ) -> Result<Response, SourceError> {
        let status = response.status().as_u16();
        let proven = seal.is_none_or(|seal| seal.proves(status, response.headers()));
        // Who has too much to do has no time to look who asks, and signs nothing.
        if status == 503 && (!proven || PeerRefusal::read(response.headers()) == Some(PeerRefusal::Overloaded)) {
            return Err(SourceError::Busy);
        }
        if proven && status != 401 {
            return Ok(response);
        }
        let why = match status {
            401 => said(response).await,
            _ => "its answer is not signed with our key".to_owned(),
        };
        self.is_unproven(peer, &why);
        Err(SourceError::NotKept)
    }

    /// It may be given its key or certificate later than this one: not to be asked for a while.
    fn is_unproven(&self, peer: SocketAddr, why: &str) {
        self.metrics.unproven.with_label_values(&["answer"]).inc();
        tracing::warn!(%peer, why, "a peer does not know this node, or this node does not know it");
        self.is_down(peer);
    }
}

/// What a refusal says, for whoever reads the log.
async fn said(mut response: Response) -> String {
    const ENOUGH: usize = 500;
    let first = timeout(LOOK_TIMEOUT, response.chunk()).await.ok().and_then(Result::ok).flatten().unwrap_or_default();
    match &*String::from_utf8_lossy(&first[..first.len().min(ENOUGH)]) {
        "" => "it says nothing more than 401".to_owned(),
        text => format!("it says: {text}"),
    }
}

/// Whether one side does not accept the other's certificate, or has none to show.
fn is_about_certificates(error: &reqwest::Error) -> bool {
    let of_tls = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(of_tls, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)))
}
