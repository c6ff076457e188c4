//! Traces: from a client through peers to an upstream, and to a collector.

use std::collections::HashMap;

use dray_tests::dray::{Start, rule};
use dray_tests::eventually;
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::{Response, TestUpstream};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";

/// A collector that accepts every batch.
async fn collector() -> TestUpstream {
    TestUpstream::with_handler(|_| Response::new(200, "").with("content-type", "application/x-protobuf")).await
}

/// The received spans by ID.
fn received_spans(collector: &TestUpstream) -> HashMap<String, Span> {
    let mut spans = HashMap::new();
    for request in collector.requests() {
        assert_eq!((&*request.method, &*request.path), ("POST", "/v1/traces"));
        let batch = ExportTraceServiceRequest::decode(&*request.body).unwrap();
        for resource in batch.resource_spans {
            let about = resource.resource.unwrap().attributes;
            assert!(about.iter().any(|a| a.key == "service.name" && text(a.value.clone()) == "dray"));
            let all = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(all.map(|span| (hex(&span.span_id), span)));
        }
    }
    spans
}

fn text(value: Option<opentelemetry_proto::tonic::common::v1::AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{other:?}"),
    }
}

fn attribute(span: &Span, name: &str) -> String {
    text(span.attributes.iter().find(|a| a.key == name).unwrap_or_else(|| panic!("{name} of {span:?}")).value.clone())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The names of a span and its ancestors, as far as the collector received them, and the ID of the next parent.
fn span_path(spans: &HashMap<String, Span>, id: &str) -> (Vec<String>, String) {
    let (mut names, mut at) = (Vec::new(), id.to_owned());
    while let Some(span) = spans.get(&at) {
        assert_eq!(hex(&span.trace_id), TRACE);
        names.push(span.name.clone());
        at = hex(&span.parent_span_id);
    }
    (names, at)
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_spans_client_peers_and_upstream() {
    let image = Image::new(1, &[300_000; 24]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let collector = collector().await;
    let ports = [free_port(), free_port()];
    let nodes = ports.map(|port| {
        let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
        let more = format!(
            "[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n[tracing]\notlp = \"{}\"\nsample = 0.0\n",
            collector.url()
        );
        Start::new(format!("{}\n{more}", rule("docker.io", &upstream.url()))).env("OTEL_BSP_SCHEDULE_DELAY", "50").run()
    });
    // With this many blobs each node owns some.
    for digest in image.blobs.keys() {
        let url = format!("http://{}/v2/library/app/blobs/{digest}?ns=docker.io", nodes[0].registry);
        let response = get(&url, &[("traceparent", &format!("00-{TRACE}-{CLIENT}-01")), ("tracestate", "a=1")]).await;
        assert_eq!((response.status, response.complete), (200, true));
        let untraced = format!("http://{}/v2/library/app/blobs/{digest}?ns=docker.io", nodes[1].registry);
        assert_eq!(get(&untraced, &[]).await.status, 200);
    }
    let blob_requests: Vec<_> = upstream.requests().into_iter().filter(|request| request.is_blob()).collect();
    assert_eq!(blob_requests.len(), image.blobs.len(), "once each");
    let parents = blob_requests.iter().map(|request| {
        assert_eq!(request.header("tracestate"), Some("a=1"));
        let parts: Vec<&str> = request.header("traceparent").unwrap().split('-').collect();
        assert_eq!((parts[0], parts[1], parts[3]), ("00", TRACE, "01"));
        parts[2].to_owned()
    });
    let parents: Vec<String> = parents.collect();
    let are_complete = |spans: &HashMap<String, Span>| {
        let of_client = |span: &&Span| hex(&span.parent_span_id) == CLIENT;
        spans.values().filter(of_client).count() == image.blobs.len()
            && parents.iter().all(|id| span_path(spans, id).1 == CLIENT)
    };
    let spans =
        eventually("the collector has all spans", async || Some(received_spans(&collector)).filter(are_complete)).await;
    let paths: Vec<Vec<String>> = parents.iter().map(|id| span_path(&spans, id).0).collect();
    let direct = ["GET 127.0.0.1", "download", "GET blob"];
    let through_peer = ["GET 127.0.0.1", "download", "GET blob", "peer request", "download", "GET blob"];
    assert!(paths.iter().all(|path| *path == direct || *path == through_peer), "{paths:?}");
    assert!(paths.iter().any(|path| *path == direct) && paths.iter().any(|path| *path == through_peer));
    assert!(spans.values().all(|span| hex(&span.trace_id) == TRACE), "a sample share of 0 starts no trace");
    let request = spans.values().find(|span| hex(&span.parent_span_id) == CLIENT).unwrap();
    assert_eq!(attribute(request, "http.response.status_code"), "200");
    assert_eq!(attribute(request, "dray.repository"), "library/app");
    assert!(request.end_time_unix_nano > request.start_time_unix_nano);
    assert!(!format!("{spans:?}").contains("token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_without_collector_is_passed_on_unchanged() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let node = Start::with_upstream("docker.io", &upstream.url()).env("DRAY_LOG", "info").log_to(&log).run();
    let parent = format!("00-{TRACE}-{CLIENT}-00");
    let url = |digest: &str| format!("http://{}/v2/library/app/blobs/{digest}?ns=docker.io", node.registry);
    let mut digests = image.blobs.keys();
    let (traced, untraced) = (digests.next().unwrap(), digests.next().unwrap());
    assert_eq!(get(&url(traced), &[("traceparent", &parent), ("tracestate", "a=1,b=2")]).await.status, 200);
    assert_eq!(get(&url(untraced), &[]).await.status, 200);
    let requests = upstream.requests();
    let of = |digest: &str| requests.iter().find(|request| request.path.contains(digest)).unwrap();
    assert_eq!(of(traced).header("traceparent"), Some(&*parent));
    assert_eq!(of(traced).header("tracestate"), Some("a=1,b=2"));
    assert_eq!(of(untraced).header("traceparent"), None);
    eventually("the access log names the trace", async || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.contains(&format!(" trace={TRACE} ")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_collector_loses_traces_and_logs_once() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let tracing = format!("[tracing]\notlp = \"http://127.0.0.1:{}\"\n", free_port());
    let start = Start::new(format!("{}\n{tracing}", rule("docker.io", &upstream.url())));
    let node = start.env("OTEL_BSP_SCHEDULE_DELAY", "20").env("DRAY_LOG", "info").log_to(&log).run();
    let lost = || std::fs::read_to_string(&log).unwrap().matches("trace export failed").count();
    for _ in 0..3 {
        for digest in image.blobs.keys() {
            let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
            assert_eq!(node.get(&path).await.status, 200);
        }
        eventually("the failure is logged", async || (lost() == 1).then_some(())).await;
    }
    assert_eq!(lost(), 1);
}
