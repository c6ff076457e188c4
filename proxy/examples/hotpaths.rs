//! The code that every request runs, each part alone and repeated, for counting instructions:
//!
//! ```sh
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null target/*/ci/examples/hotpaths route 1000
//! ```
//!
//! The integration test `hotpaths` runs all of them and enforces a limit for each.

#![allow(clippy::print_stderr, clippy::unwrap_used, reason = "a tool for developers")]

use std::hint::black_box;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use dray::access_log::{AccessLog, Line, Millis};
use dray::activity::{Activity, ServedContent};
use dray::config::{Config, DiskShare, LogFilter, Size};
use dray::metrics::{Metrics, ResponseLabels};
use dray::oci::{Digest, RangeSet, Span, Spans, route};
use dray::peers::ring::Ring;
use dray::provenance::Provenance;
use dray::registries::Registries;
use dray::respond::PreparedResponse;
use dray::source::ServedFrom;
use dray::store::{SmallKind, SmallObject, Store};
use dray::telemetry::{self, LogFormat};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, count] = &arguments[..] else {
        eprintln!("usage: hotpaths route|range|spans|ring|head|lookup|count|log|note COUNT");
        return ExitCode::from(2);
    };
    let count: u32 = count.parse().unwrap();
    match name.as_str() {
        "route" => route(count),
        "range" => range(count),
        "spans" => spans(count),
        "ring" => ring(count),
        "head" => head(count),
        "lookup" => lookup(count),
        "count" => count_responses(count),
        "log" => log(count),
        "note" => note(count),
        other => {
            eprintln!("unknown hot path {other}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// The path and query of a blob request.
fn route(count: u32) {
    let registries = Registries::new(&Config::default());
    let path = format!("/v2/library/alpine/blobs/{}", Digest::of(b"x"));
    for _ in 0..count {
        let parsed = route::parse(black_box(&path), Some("ns=docker.io"), Some("127.0.0.1:5050"), &*registries.rules());
        black_box(parsed.is_ok());
    }
}

/// A `Range` header with four ranges.
fn range(count: u32) {
    for _ in 0..count {
        let set = RangeSet::parse(black_box("bytes=0-49999,100000-149999,5000000-5049999,-1000"));
        black_box(set.unwrap().within(10_000_000));
    }
}

/// The bytes of a blob that arrive over four connections.
fn spans(count: u32) {
    let mut spans = Spans::default();
    for nth in 0..u64::from(count) {
        let start = (nth % 4) * (1 << 40) + (nth / 4) * 65_536;
        spans.insert(black_box(Span { start, end: start + 65_536 }));
        black_box(spans.run_end(0));
    }
}

/// The owners of a digest among 1,000 members.
fn ring(count: u32) {
    let member = |n: u16| SocketAddr::from(([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]], 5052));
    let members: Ring = (0..1000).map(member).collect();
    let digest = Digest::of(b"x");
    for _ in 0..count {
        black_box(black_box(&members).owners(&digest, 3));
    }
}

/// The head of a response.
fn head(count: u32) {
    let digest = Digest::of(b"x");
    let registry = "docker.io".parse().unwrap();
    for _ in 0..count {
        let reply = PreparedResponse::blob_length(black_box(1234), ServedFrom::Memory, &digest).of_registry(&registry);
        black_box(reply.head("0123456789abcdef"));
    }
}

/// A manifest in memory.
fn lookup(count: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        let disk = DiskShare::Size(Size(64 << 20));
        let store = Store::open(dir.path(), disk, DiskShare::Percent(0), 16 << 20, &Metrics::new()).await.unwrap();
        let digest = Digest::of(b"x");
        let provenance = Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "a/b".into() };
        let object = SmallObject::new("a/b", provenance.into(), b"x");
        store.small.insert(&digest, SmallKind::Manifest, object).await;
        for _ in 0..count {
            black_box(store.find(black_box(&digest), SmallKind::Manifest).await.is_some());
        }
    });
}

/// A response, for the metrics.
fn count_responses(count: u32) {
    let metrics = Metrics::new();
    for _ in 0..count {
        metrics.count(black_box(&ResponseLabels {
            receiver: dray::metrics::Receiver::Client,
            route: "manifest",
            source: "memory",
            status: 200,
            sent: 1234,
            first_byte: Some(Duration::from_micros(90)),
            took: Duration::from_micros(100),
        }));
    }
}

/// A response, for the access log.
fn log(count: u32) {
    let sink = telemetry::init(&LogFilter::default(), LogFormat::Text).unwrap().sink;
    let access_log = AccessLog::new(LogFormat::Text, sink.clone());
    let path = format!("/v2/library/alpine/manifests/{}", Digest::of(b"x"));
    for _ in 0..count {
        access_log.add(black_box(&Line {
            id: "0123456789abcdef",
            trace: None,
            client: Some(SocketAddr::from(([127, 0, 0, 1], 40_000))),
            agent: Some("containerd/2.1.0"),
            method: "GET",
            path: &path,
            route: "manifest",
            registry: Some("docker.io"),
            repository: Some("library/alpine"),
            registry_from: Some("ns"),
            rule: Some("docker.io"),
            status: 200,
            source: "memory",
            bytes: 1234,
            first_byte_ms: Some(Millis(Duration::from_micros(90))),
            total_ms: Millis(Duration::from_micros(100)),
            error: None,
        }));
    }
    sink.close();
}

/// A response, for the status page.
fn note(count: u32) {
    let activity = Activity::default();
    for _ in 0..count {
        activity.add(black_box(ServedContent {
            id: "0123456789abcdef".into(),
            at_ms: 1,
            route: "manifest".into(),
            image: "docker.io/library/alpine".into(),
            reference: "3.22".into(),
            status: 200,
            source: "memory".into(),
            bytes: 1234,
            first_byte_ms: Some(0.09),
            total_ms: 0.1,
        }));
    }
}
