//! The admin port: probes and metrics, and the status for operators.
//!
//! | path | content | access |
//! |---|---|---|
//! | `/livez`, `/readyz`, `/metrics` | probes, Prometheus | every client that can connect |
//! | `/` | the status page, in one file | loopback, or the token of `admin_token_file` |
//! | `/api/v1/status` | the status as JSON | the same |
//! | `/api/v1/events` | the status every two seconds, as server-sent events | the same |
//! | `/api/v1/explain?image=` | how a pull of the image would be served | the same |
//! | `/api/v1/cluster` | all nodes at a glance | the same |
//! | `/api/v1/cache` | the large blobs that are cached | the same |
//! | POST `/api/v1/cache/purge`, `/api/v1/cache/revalidate` | removes content, ends the TTL of a tag | the same |

mod cache_api;
mod status_auth;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderMap;
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use serde::Serialize;
use tokio::sync::Semaphore;

pub use self::status_auth::{StatusAuth, StatusDenied};
use crate::connections::keep_alive_seconds;
use crate::metrics::Metrics;
use crate::oci::route::query_value;
use crate::readiness::Readiness;
use crate::status::{ClusterStatus, StatusSources};
use crate::times::RETRY_INTERVAL;

/// Handles the requests of the admin listener.
pub struct Admin {
    pub metrics: Arc<Metrics>,
    pub readiness: Arc<Readiness>,
    pub status_auth: Arc<StatusAuth>,
    pub sources: StatusSources,
    /// Limits concurrent event streams.
    pub event_streams: Arc<Semaphore>,
    /// Limits requests that read all records or ask all nodes.
    pub inquiries: Arc<Semaphore>,
}

/// A response with its whole body.
struct StatusResponse {
    status: u16,
    content_type: &'static str,
    body: Bytes,
    extra_header: Option<(&'static str, &'static str)>,
}

/// Concurrent event streams. More get a 503: each serializes the whole status every two seconds.
pub const MAX_EVENT_STREAMS: usize = 32;

/// Concurrent requests that read all records of the cache or ask all nodes. More: a page that repeats them loads the
/// whole cluster.
pub const MAX_INQUIRIES: usize = 4;

const PAGE: &str = include_str!("admin/page.html");

/// The page loads nothing from other hosts, and no other page can frame it.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                           connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

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
        let keep_alive_seconds = keep_alive_seconds(session.req_header()).filter(|_| !*shutdown.borrow());
        session.set_keepalive(keep_alive_seconds);
        let response = match session.req_header().uri.path() {
            "/api/v1/events" if session.req_header().method == http::Method::GET => {
                match self.status_auth.authorize(&session) {
                    Ok(()) => return self.stream(session).await,
                    Err(denied) => StatusResponse::denied(denied),
                }
            }
            "/api/v1/cache/purge" | "/api/v1/cache/revalidate" => {
                match (&session.req_header().method, self.status_auth.authorize(&session)) {
                    (&http::Method::POST, Ok(())) => return self.change_cache(session).await,
                    (_, Ok(())) => StatusResponse::text(405, "method not allowed: use POST\n"),
                    (_, Err(denied)) => StatusResponse::denied(denied),
                }
            }
            _ => self.respond(&session).await,
        };
        let head_only = session.req_header().method == http::Method::HEAD;
        session.write_response_header(Box::new(response.head()?)).await.ok()?;
        if !head_only {
            session.write_response_body(response.body, true).await.ok()?;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

impl Admin {
    async fn respond(&self, session: &ServerSession) -> StatusResponse {
        let request = session.req_header();
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            return StatusResponse::text(405, "method not allowed: use GET or HEAD\n");
        }
        match request.uri.path() {
            "/livez" => return StatusResponse::text(200, "ok\n"),
            "/readyz" if self.readiness.get() => return StatusResponse::text(200, "ok\n"),
            "/readyz" => return StatusResponse::text(503, "starting or stopping\n"),
            "/metrics" => return StatusResponse::new(200, "text/plain; version=0.0.4", self.metrics.render()),
            _ => {}
        }
        if let Err(denied) = self.status_auth.authorize(session) {
            return StatusResponse::denied(denied);
        }
        if request.uri.path().starts_with("/api/") && is_from_other_site(&request.headers) {
            return StatusResponse::text(403, "pages of other sites may not use the API\n");
        }
        match request.uri.path() {
            "/" => StatusResponse {
                extra_header: Some(("content-security-policy", PAGE_POLICY)),
                ..StatusResponse::new(200, "text/html; charset=utf-8", PAGE)
            },
            "/api/v1/status" => StatusResponse::json(200, &self.sources.status()),
            "/api/v1/cache" | "/api/v1/cluster" if self.inquiries.available_permits() == 0 => {
                StatusResponse::text(503, "too many such requests at the same time on this node\n")
            }
            "/api/v1/cache" => {
                let _permit = self.inquiries.acquire().await;
                self.list_cache(request.uri.query()).await
            }
            "/api/v1/cluster" => match self.cluster().await {
                Ok(cluster) => StatusResponse::json(200, &cluster),
                Err(problem) => StatusResponse::text(409, format!("{problem}\n")),
            },
            "/api/v1/explain" => match query_value(request.uri.query(), "image") {
                Some(image) => match self.sources.pull.explain(&image).await {
                    Ok(explanation) => StatusResponse::json(200, &explanation),
                    Err(problem) => StatusResponse::text(400, problem + "\n"),
                },
                None => StatusResponse::text(400, "expected ?image=NAME\n"),
            },
            _ => StatusResponse::text(
                404,
                "not found; use /, /api/v1/status, /api/v1/events, /api/v1/explain?image=, /api/v1/cluster, /api/v1/cache, \
                 /metrics, /livez, /readyz\n",
            ),
        }
    }

    async fn cluster(&self) -> Result<ClusterStatus, &'static str> {
        let _permit = self.inquiries.acquire().await;
        self.sources.cluster().await
    }

    /// Sends the status every two seconds until the client disconnects or this process ends.
    async fn stream(&self, mut session: ServerSession) -> Option<ReusedHttpStream> {
        let Ok(_permit) = self.event_streams.try_acquire() else {
            let response = StatusResponse::text(503, "too many event streams on this node\n");
            session.write_response_header(Box::new(response.head()?)).await.ok()?;
            session.write_response_body(response.body, true).await.ok()?;
            return None;
        };
        session.set_keepalive(None);
        begin_stream(&mut session, "text/event-stream").await?;
        while !self.readiness.has_ended() {
            let event = format!("data: {}\n\n", serde_json::to_string(&self.sources.status()).ok()?);
            session.write_response_body(event.into(), false).await.ok()?;
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        session.write_response_body(Bytes::new(), true).await.ok()?;
        None
    }
}

/// Sends the head of a response without a known length. None: the client is gone.
async fn begin_stream(session: &mut ServerSession, content_type: &str) -> Option<()> {
    session.set_write_timeout(Some(RETRY_INTERVAL * 5));
    let mut head = ResponseHeader::build(200, Some(3)).ok()?;
    head.insert_header("content-type", content_type).ok()?;
    head.insert_header("cache-control", "no-store").ok()?;
    head.insert_header("transfer-encoding", "chunked").ok()?;
    session.write_response_header(Box::new(head)).await.ok()
}

/// Whether a browser sends the request for a page of another site (Fetch Metadata).
fn is_from_other_site(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"))
}

impl StatusResponse {
    fn new(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: body.into(), extra_header: None }
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

    fn denied(denied: StatusDenied) -> Self {
        match denied {
            StatusDenied::NoToken => Self {
                extra_header: Some(("www-authenticate", "Basic realm=\"dray\", charset=\"UTF-8\"")),
                ..Self::text(
                    401,
                    "authentication required: the password is the token of admin_token_file, with any user name\n",
                )
            },
            StatusDenied::NotLoopback => Self::text(
                403,
                "the status is available on loopback only, by localhost or an IP address; set admin_token_file to \
                 allow access with a token\n",
            ),
        }
    }

    fn head(&self) -> Option<ResponseHeader> {
        let mut head = ResponseHeader::build(self.status, Some(6)).ok()?;
        head.insert_header("content-type", self.content_type).ok()?;
        head.insert_header("content-length", self.body.len()).ok()?;
        head.insert_header("cache-control", "no-store").ok()?;
        head.insert_header("x-content-type-options", "nosniff").ok()?;
        if let Some((name, value)) = self.extra_header {
            head.insert_header(name, value).ok()?;
        }
        Some(head)
    }
}
