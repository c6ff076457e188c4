//! The operators' port: `/livez`, `/readyz`, `/metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use http::Response;
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;

use crate::metrics::Metrics;

/// Answers the admin listener.
pub struct Admin {
    pub metrics: Arc<Metrics>,
    pub readiness: Arc<Readiness>,
}

/// Whether clients should be sent here: true between the start line and the stop signal.
#[derive(Default)]
pub struct Readiness {
    begun: AtomicBool,
    ended: AtomicBool,
}

const INDEX: &str =
    "dray\n\n/livez    the process answers\n/readyz   clients may be sent here\n/metrics  for Prometheus\n";

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        session.set_keepalive(Some(60));
        let request = session.req_header();
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            return reply(405, "text/plain", b"only GET and HEAD\n".to_vec());
        }
        match request.uri.path() {
            "/" => reply(200, "text/plain", INDEX.into()),
            "/livez" => reply(200, "text/plain", b"ok\n".to_vec()),
            "/readyz" if self.readiness.get() => reply(200, "text/plain", b"ok\n".to_vec()),
            "/readyz" => reply(503, "text/plain", b"starting or stopping\n".to_vec()),
            "/metrics" => reply(200, "text/plain; version=0.0.4", self.metrics.render()),
            _ => reply(404, "text/plain", INDEX.into()),
        }
    }
}

fn reply(status: u16, content_type: &str, body: Vec<u8>) -> Response<Vec<u8>> {
    let length = body.len();
    let built = Response::builder()
        .status(status)
        .header("content-type", content_type)
        .header("content-length", length)
        .body(body);
    built.expect("status and headers are constants of this file")
}

impl Readiness {
    pub fn get(&self) -> bool {
        self.begun.load(Ordering::Acquire) && !self.ended.load(Ordering::Acquire)
    }

    pub fn begin(&self) {
        self.begun.store(true, Ordering::Release);
    }

    /// For ever, also where it has not begun yet.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }
}
