//! The operators' port: probes and metrics for machines, the status for people.
//!
//! | path | what | who |
//! |---|---|---|
//! | `/livez`, `/readyz`, `/metrics` | probes, Prometheus | whoever can connect |
//! | `/` | the status page, in one piece | as below |
//! | `/api/v1/status` | the same as JSON | loopback, or `admin_token_file` |
//! | `/api/v1/events` | the same every two seconds, as server-sent events | |
//! | `/api/v1/explain?image=` | what would become of a pull | |

mod status_auth;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use serde::Serialize;
use tokio::sync::Semaphore;

pub use self::status_auth::{StatusAuth, StatusDenied};
use crate::connections::kept_for;
use crate::metrics::Metrics;
use crate::oci::route::query_value;
use crate::readiness::Readiness;
use crate::status::StatusSources;
use crate::times::RETRY_INTERVAL;

/// Answers the admin listener.
pub struct Admin {
    pub metrics: Arc<Metrics>,
    pub readiness: Arc<Readiness>,
    pub visitors: Arc<StatusAuth>,
    pub sources: StatusSources,
    /// Pages that are kept up to date at a time.
    pub watching: Arc<Semaphore>,
}

/// An answer in one piece.
struct StatusResponse {
    status: u16,
    content_type: &'static str,
    body: Bytes,
    more: Option<(&'static str, &'static str)>,
}

/// More people than look at one node at a time.
pub const MAX_WATCHING: usize = 32;

const PAGE: &str = include_str!("admin/page.html");

/// Nothing is loaded from elsewhere, and nobody shows the page inside theirs.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

#[async_trait]
impl HttpServerApp for Admin {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        if !session.read_request().await.ok()? {
            return None;
        }
        let kept_for = kept_for(session.req_header()).filter(|_| !*shutdown.borrow());
        session.set_keepalive(kept_for);
        let reply = match session.req_header().uri.path() {
            "/api/v1/events" if session.req_header().method == http::Method::GET => {
                match self.visitors.welcome(&session) {
                    Ok(()) => return self.stream(session).await,
                    Err(unwelcome) => StatusResponse::unwelcome(unwelcome),
                }
            }
            _ => self.reply(&session).await,
        };
        let head_only = session.req_header().method == http::Method::HEAD;
        session.write_response_header(Box::new(reply.head()?)).await.ok()?;
        if !head_only {
            session.write_response_body(reply.body, true).await.ok()?;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

impl Admin {
    async fn reply(&self, session: &ServerSession) -> StatusResponse {
        let request = session.req_header();
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            return StatusResponse::text(405, "only GET and HEAD\n");
        }
        match request.uri.path() {
            "/livez" => return StatusResponse::text(200, "ok\n"),
            "/readyz" if self.readiness.get() => return StatusResponse::text(200, "ok\n"),
            "/readyz" => return StatusResponse::text(503, "starting or stopping\n"),
            "/metrics" => return StatusResponse::new(200, "text/plain; version=0.0.4", self.metrics.render()),
            _ => {}
        }
        if let Err(unwelcome) = self.visitors.welcome(session) {
            return StatusResponse::unwelcome(unwelcome);
        }
        match request.uri.path() {
            "/" => StatusResponse {
                more: Some(("content-security-policy", POLICY)),
                ..StatusResponse::new(200, "text/html; charset=utf-8", PAGE)
            },
            "/api/v1/status" => StatusResponse::json(200, &self.sources.status()),
            "/api/v1/explain" => match query_value(request.uri.query(), "image") {
                Some(image) => match self.sources.pull.explain(&image).await {
                    Ok(explanation) => StatusResponse::json(200, &explanation),
                    Err(problem) => StatusResponse::text(400, problem + "\n"),
                },
                None => StatusResponse::text(400, "expected ?image=NAME\n"),
            },
            _ => StatusResponse::text(
                404,
                "there are /, /api/v1/status, /api/v1/explain?image=, /metrics, /livez and /readyz\n",
            ),
        }
    }

    /// Sends the status again and again until the reader leaves.
    async fn stream(&self, mut session: ServerSession) -> Option<ReusedHttpStream> {
        let Ok(_watching) = self.watching.try_acquire() else {
            let reply = StatusResponse::text(503, "enough people are watching\n");
            session.write_response_header(Box::new(reply.head()?)).await.ok()?;
            session.write_response_body(reply.body, true).await.ok()?;
            return None;
        };
        session.set_keepalive(None);
        session.set_write_timeout(Some(RETRY_INTERVAL * 5));
        let mut head = ResponseHeader::build(200, Some(3)).ok()?;
        head.insert_header("content-type", "text/event-stream").ok()?;
        head.insert_header("cache-control", "no-store").ok()?;
        head.insert_header("transfer-encoding", "chunked").ok()?;
        session.write_response_header(Box::new(head)).await.ok()?;
        while !self.readiness.has_ended() {
            let event = format!("data: {}\n\n", serde_json::to_string(&self.sources.status()).ok()?);
            session.write_response_body(event.into(), false).await.ok()?;
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        session.write_response_body(Bytes::new(), true).await.ok()?;
        None
    }
}

impl StatusResponse {
    fn new(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into(), more: None }
    }

    fn text(status: u16, body: impl Into<Bytes>) -> Self {
        Self::new(status, "text/plain; charset=utf-8", body)
    }

    fn json(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::new(status, "application/json", body),
            Err(error) => Self::text(500, format!("{error}\n")),
        }
    }

    fn unwelcome(unwelcome: StatusDenied) -> Self {
        match unwelcome {
            StatusDenied::NoToken => Self {
                more: Some(("www-authenticate", "Basic realm=\"dray\", charset=\"UTF-8\"")),
                ..Self::text(401, "the password is the token in admin_token_file; any user name will do\n")
            },
            StatusDenied::NotHere => Self::text(
                403,
                "the status is only shown on loopback, by the name localhost or an address; set admin_token_file to \
                 show it to those who have the token\n",
            ),
        }
    }

    fn head(&self) -> Option<ResponseHeader> {
        let mut head = ResponseHeader::build(self.status, Some(6)).ok()?;
        head.insert_header("content-type", self.content_type).ok()?;
        head.insert_header("content-length", self.body.len()).ok()?;
        head.insert_header("cache-control", "no-store").ok()?;
        head.insert_header("x-content-type-options", "nosniff").ok()?;
        if let Some((name, value)) = self.more {
            head.insert_header(name, value).ok()?;
        }
        Some(head)
    }
}
