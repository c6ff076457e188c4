//! Exports spans to an OpenTelemetry collector: OTLP over HTTP, in batches, from a separate thread. Spans that the
//! collector does not accept are lost.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor};
use reqwest::redirect::Policy;
use tokio::runtime::Handle;
use url::Url;

use crate::source::root_cause;
use crate::times::STALL_TIMEOUT;
use crate::trace::{FinishedSpan, Report, TraceSpanKind, Value};

/// Sends spans to a collector.
pub(super) struct Otlp {
    batches: BatchSpanProcessor,
    scope: InstrumentationScope,
}

/// The HTTP client of the exporter, on dray's runtime: the exporter's own clients need threads that block.
struct CollectorClient {
    client: reqwest::Client,
    runtime: Handle,
    /// Whether the collector accepted the last batch. Only changes are logged.
    is_healthy: AtomicBool,
}

/// Timeout for the last batch at shutdown. Longer: a collector that is down delays the end of the process. Shorter: the
/// last spans are lost.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

impl Otlp {
    /// Must run inside a tokio runtime. `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and
    /// `OTEL_EXPORTER_OTLP_HEADERS` apply as in the OpenTelemetry specification.
    pub(super) fn new(collector: &Url) -> Result<Self, String> {
        // A collector is a local service: the proxy settings are for upstream registries.
        let client = reqwest::Client::builder().timeout(STALL_TIMEOUT).no_proxy().redirect(Policy::none()).build();
        let client = client.map_err(|e| root_cause(&e))?;
        let http = CollectorClient { client, runtime: Handle::current(), is_healthy: AtomicBool::new(true) };
        let base = collector.as_str().trim_end_matches('/').trim_end_matches("/v1/traces");
        let endpoint = format!("{base}/v1/traces");
        let exporter = SpanExporter::builder().with_http().with_http_client(http).with_endpoint(endpoint).build();
        let mut batches = BatchSpanProcessor::builder(exporter.map_err(|e| e.to_string())?).build();
        let mut resource = Resource::builder().with_attribute(KeyValue::new("service.version", VERSION));
        if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
            resource = resource.with_service_name(NAME);
        }
        batches.set_resource(&resource.build());
        Ok(Self { batches, scope: InstrumentationScope::builder(NAME).with_version(VERSION).build() })
    }
}

const NAME: &str = "dray";
const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Report for Otlp {
    fn report(&self, span: FinishedSpan) {
        let (trace, state) = (TraceId::from(span.step.trace), &span.step.state);
        let state = state.as_ref().and_then(|state| state.to_str().ok()?.parse().ok());
        let context = |state: Option<TraceState>| {
            let (id, flags) = (SpanId::from(span.step.span), TraceFlags::new(span.step.flags()));
            SpanContext::new(trace, id, flags, false, state.unwrap_or_default())
        };
        self.batches.on_end(SpanData {
            span_context: context(state),
            parent_span_id: span.parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: span.kind == TraceSpanKind::Server && span.parent.is_some(),
            span_kind: match span.kind {
                TraceSpanKind::Server => SpanKind::Server,
                TraceSpanKind::Client => SpanKind::Client,
                TraceSpanKind::Internal => SpanKind::Internal,
            },
            name: span.name,
            start_time: span.began,
            end_time: span.began + span.took,
            attributes: span.attributes.into_iter().map(|(name, value)| attribute(name, value)).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: span.failure.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        });
    }

    fn close(&self) {
        if let Err(error) = self.batches.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "last spans not exported");
        }
    }
}

fn attribute(name: &'static str, value: Value) -> KeyValue {
    match value {
        Value::Text(text) => KeyValue::new(name, text),
        Value::Static(text) => KeyValue::new(name, text),
        Value::Number(number) => KeyValue::new(name, i64::try_from(number).unwrap_or(i64::MAX)),
    }
}

#[async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let sending = self.client.request(head.method, head.uri.to_string()).headers(head.headers).body(body);
        // On dray's runtime: the exporter's thread has none.
        let response = self.runtime.spawn(async move {
            let response = sending.send().await?;
            let status = response.status();
            Ok::<_, reqwest::Error>((status, response.bytes().await?))
        });
        let response = response.await?.map_err(reqwest::Error::without_url);
        let failure = match &response {
            Ok((status, _)) => (!status.is_success()).then(|| format!("the collector returned {status}")),
            Err(error) => Some(root_cause(error)),
        };
        let was_healthy = self.is_healthy.swap(failure.is_none(), Ordering::Relaxed);
        match failure {
            Some(error) if was_healthy => tracing::warn!(error, "trace export failed, spans are lost"),
            None if !was_healthy => tracing::info!("trace export recovered"),
            _ => {}
        }
        let (status, body) = response?;
        Ok(Response::builder().status(status).body(body)?)
    }
}

impl fmt::Debug for CollectorClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CollectorClient").finish_non_exhaustive()
    }
}
