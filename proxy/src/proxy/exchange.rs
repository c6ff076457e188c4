//! One request and its outcome, for metrics, the status, the access log and traces.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::header::USER_AGENT;
use pingora::prelude::{Error, ErrorType};
use pingora::protocols::http::ServerSession as Session;

use super::clients::ClientPermit;
use super::load::RequestPermit;
use super::{Listener, RegistryProxy};
use crate::access_log::{AccessLog, Line, Millis};
use crate::activity::{Activity, ServedContent};
use crate::bandwidth::Throttle;
use crate::memory::ClientBytes;
use crate::metrics;
use crate::oci::{Registry, RegistryFrom, Repository};
use crate::peers::{PeerBody, Seal};
use crate::source::Broken;
use crate::trace;

/// One request and its outcome.
pub struct Exchange {
    pub(super) id: String,
    pub(super) span: trace::TraceSpan,
    pub(super) started: Instant,
    /// Counts the request in the listener's load until it ends.
    pub(super) request_permit: Option<RequestPermit>,
    /// Counts the request against its client's limit until it ends.
    pub(super) client_permit: Option<ClientPermit>,
    /// Authenticates the response to a peer.
    pub(super) seal: Option<Seal>,
    /// The bandwidth limit of the body.
    pub(super) throttle: Option<Throttle>,
    /// Counts the body as being sent to a peer.
    pub(super) peer_body: Option<PeerBody>,
    /// Its share of the memory for buffered responses.
    pub(super) memory: Option<ClientBytes>,
    pub(super) route: &'static str,
    pub(super) content: Option<Content>,
    pub(super) status: u16,
    pub(super) source: &'static str,
    pub(super) sent: u64,
    pub(super) first_byte: Option<Duration>,
    /// From the end of the request's head to the end of the response.
    pub(super) duration: Duration,
    pub(super) failure: Option<String>,
    /// Why there is no content. A 401 needs no reason: it is a step of authentication.
    pub(super) reason: Option<String>,
}

pub(super) struct Content {
    pub(super) registry: Registry,
    pub(super) repository: Repository,
    pub(super) rule: String,
    pub(super) registry_from: RegistryFrom,
}

/// The status shows a reference up to this length, in bytes. A valid tag or SHA-256 digest is shorter.
const MAX_REFERENCE_BYTES: usize = 200;

/// In metrics and logs, the source of a response without content.
pub(super) const NO_SOURCE: &str = "none";

/// The cause of a response that ended early, if there is no other.
pub(super) const CLIENT_DISCONNECTED: &str = "the client disconnected";

impl RegistryProxy {
    /// Reports the outcome of a request to metrics, status, access log and trace.
    pub(super) fn report(&self, session: &Session, error: Option<&Error>, exchange: &mut Exchange) {
        exchange.duration = exchange.started.elapsed();
        self.count(exchange);
        if self.listener == Listener::Clients {
            record_activity(&self.activity, session, exchange);
        }
        log_access(&self.access_log, session, error, exchange);
        finish_span(session, error, exchange);
    }

    pub(super) fn count(&self, exchange: &Exchange) {
        self.metrics.count(&metrics::ResponseLabels {
            receiver: match self.listener {
                Listener::Clients => metrics::Receiver::Client,
                Listener::Peers => metrics::Receiver::Peer,
            },
            route: exchange.route,
            source: exchange.source,
            status: exchange.status,
            sent: exchange.sent,
            first_byte: exchange.first_byte,
            took: exchange.duration,
        });
    }
}

/// Adds a response to the recent activity of the status.
fn record_activity(activity: &Activity, session: &Session, exchange: &Exchange) {
    let Some(content) = &exchange.content else { return };
    let reference = session.req_header().uri.path().rsplit('/').next().unwrap_or_default();
    activity.add(ServedContent {
        id: exchange.id.clone(),
        at_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
        route: exchange.route.into(),
        image: [content.registry.as_str(), "/", content.repository.as_str()].concat(),
        reference: reference[..reference.floor_char_boundary(MAX_REFERENCE_BYTES)].to_owned(),
        status: exchange.status,
        source: exchange.source.into(),
        bytes: exchange.sent,
        first_byte_ms: exchange.first_byte.map(|time| Millis(time).number()),
        total_ms: Millis(exchange.duration).number(),
    });
}

/// Adds a line to the access log.
fn log_access(access_log: &AccessLog, session: &Session, error: Option<&Error>, exchange: &Exchange) {
    let content = exchange.content.as_ref();
    let request = session.req_header();
    let left = error.map(|_| CLIENT_DISCONNECTED);
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
        registry_from: content.map(|c| c.registry_from.as_str()),
        rule: content.map(|c| c.rule.as_str()),
        status: exchange.status,
        source: exchange.source,
        bytes: exchange.sent,
        first_byte_ms: exchange.first_byte.map(Millis),
        total_ms: Millis(exchange.duration),
        error: exchange.failure.as_deref().or(left).or(exchange.reason.as_deref()),
    });
}

/// Completes the request's trace span.
fn finish_span(session: &Session, error: Option<&Error>, exchange: &mut Exchange) {
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
    if let Some(failure) = exchange.failure.as_deref().or(error.map(|_| CLIENT_DISCONNECTED)) {
        span.fail(|| failure.to_owned());
    } else if exchange.status >= 500 {
        span.fail(|| exchange.status.to_string());
    }
}

impl Exchange {
    /// Waits for the bandwidth limit. Returns the time that this took.
    pub(super) async fn ready(&mut self) -> Duration {
        let Some(throttle) = &mut self.throttle else { return Duration::ZERO };
        let began = Instant::now();
        throttle.ready().await;
        began.elapsed()
    }

    /// Counts bytes that were sent.
    pub(super) fn count_sent(&mut self, count: u64) {
        if let Some(throttle) = &mut self.throttle {
            throttle.count(count);
        }
        self.first_byte.get_or_insert_with(|| self.started.elapsed());
        self.sent += count;
    }

    /// Records why the response ends early.
    pub(super) fn fail(&mut self, broken: &Broken) -> Box<Error> {
        self.failure = Some(broken.to_string());
        Error::explain(ErrorType::WriteError, broken.to_string())
    }

    pub(super) fn new() -> Self {
        Self {
            id: format!("{:016x}", fastrand::u64(..)),
            span: trace::TraceSpan::default(),
            started: Instant::now(),
            request_permit: None,
            client_permit: None,
            seal: None,
            throttle: None,
            peer_body: None,
            memory: None,
            route: "other",
            content: None,
            status: 0,
            source: NO_SOURCE,
            sent: 0,
            first_byte: None,
            duration: Duration::ZERO,
            failure: None,
            reason: None,
        }
    }
}
