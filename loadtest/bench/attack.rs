//! The effect of one hostile or slow party on other clients: the latency of their requests during an attack, relative
//! to the latency of the same requests before it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::client;
use dray_tests::image::{Image, digest, noise};
use dray_tests::upstream::{Fault, Request, Response, TestUpstream};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use super::rig::row;

/// Number of measured requests of each kind.
const REQUESTS: usize = 200;

/// Number of requests for uncached blobs. Smaller, because each needs its own blob.
const COLD: usize = 40;

/// Source addresses other than that of the measuring client.
const ATTACKERS: [[u8; 4]; 2] = [[127, 0, 0, 2], [127, 0, 0, 3]];

/// The connections that each attacker opens, and what it sends on them.
struct Attack {
    name: &'static str,
    connections: usize,
    on: Port,
    sends: fn(usize) -> String,
    /// Whether the attacker closes its connections at once.
    hangs_up: bool,
}

#[derive(Clone, Copy)]
enum Port {
    Registry,
    Admin,
}

const ATTACKS: [Attack; 7] = [
    Attack {
        name: "idle connections",
        connections: 4_000,
        on: Port::Registry,
        sends: |_| String::new(),
        hangs_up: false,
    },
    Attack {
        name: "idle connections to the admin port",
        connections: 600,
        on: Port::Admin,
        sends: |_| String::new(),
        hangs_up: false,
    },
    Attack {
        name: "half heads",
        connections: 2_000,
        on: Port::Registry,
        sends: |_| format!("GET /v2/ HTTP/1.1\r\nX: {}", "x".repeat(7_000)),
        hangs_up: false,
    },
    Attack {
        name: "blobs of a silent registry",
        connections: 1_000,
        on: Port::Registry,
        sends: |nth| blob("silent", nth),
        hangs_up: false,
    },
    Attack {
        name: "the same, hung up at once",
        connections: 2_000,
        on: Port::Registry,
        sends: |nth| blob("silent", nth),
        hangs_up: true,
    },
    Attack {
        name: "blobs of a trickling registry",
        connections: 300,
        on: Port::Registry,
        sends: |nth| blob("trickling", nth),
        hangs_up: false,
    },
    Attack {
        name: "unread ranges",
        connections: 250,
        on: Port::Registry,
        sends: |nth| {
            let digest = digest(&nth.to_le_bytes());
            format!(
                "GET /v2/large.example/a/large/blobs/{digest} HTTP/1.1\r\nHost: x\r\nRange: bytes=1000000-7000000\r\n\r\n"
            )
        },
        hangs_up: false,
    },
];

fn blob(registry: &str, nth: usize) -> String {
    format!("GET /v2/{registry}.example/a/{registry}/blobs/{} HTTP/1.1\r\nHost: x\r\n\r\n", digest(&nth.to_le_bytes()))
}

/// A blob that is not cached yet.
fn cold(nth: usize) -> Vec<u8> {
    noise(nth as u64, 300_000)
}

pub(crate) async fn all() {
    let image = Image::new(1, &[400_000]);
    let content = dray_tests::upstream::Content::new(&[("a/app", "1", &image)]);
    let colds: std::collections::HashMap<String, Vec<u8>> = (0..2 * COLD * ATTACKS.len())
        .map(|nth| (digest(&cold(nth)), nth))
        .map(|(digest, nth)| (digest, cold(nth)))
        .collect();
    let registry = TestUpstream::with_handler(move |request: &Request| {
        let cold = request.path.rsplit('/').next().and_then(|last| colds.get(last.split('?').next()?));
        cold.map_or_else(|| content.respond(request), |bytes| Response::new(200, bytes.clone()))
    })
    .await;
    // Large enough that a range of it bypasses the cache without a download.
    let large = bytes::Bytes::from(vec![0; 256 << 20]);
    let bad = TestUpstream::with_handler(move |request| match request.path.as_str() {
        path if !path.contains("/blobs/") => Response::new(404, ""),
        path if path.contains("/silent/") => Response::new(200, "").fault(Fault::Silent),
        path if path.contains("/trickling/") => {
            Response::new(200, large.slice(..31 << 20)).fault(Fault::SlowUntilGate(2_500))
        }
        _ => {
            let start = request.range_start().unwrap_or(0);
            let last = request.header("range").and_then(|range| range.rsplit('-').next()?.parse().ok());
            let last: usize = last.unwrap_or(large.len() - 1);
            let range = format!("bytes {start}-{last}/{}", large.len());
            Response { status: 206, ..Response::new(200, large.slice(start..=last)) }.with("content-range", range)
        }
    })
    .await;
    let rules = [("honest", registry.url()), ("silent", bad.url()), ("trickling", bad.url()), ("large", bad.url())];
    let rules: String = rules.iter().map(|(name, url)| rule(&format!("{name}.example"), url)).collect();
    for (nth, attack) in ATTACKS.iter().enumerate() {
        let dray = Start::new(rules.clone()).run();
        let before = measure(&dray, &image, 2 * nth * COLD).await;
        let _held = begin(attack, &dray).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let during = measure(&dray, &image, (2 * nth + 1) * COLD).await;
        for ((kind, before), during) in KINDS.iter().zip(before).zip(during) {
            let at = |latencies: &[f64], percent: usize| latencies[(latencies.len() - 1) * percent / 100];
            let ratio = |percent| at(&during, percent) / at(&before, percent);
            let measured = format!("median {:.2} x, p99 {:.2} x ({:.1} ms)", ratio(50), ratio(99), at(&during, 99));
            row(&format!("{}: {}", attack.name, kind.what), &measured, "the same before the attack", "<= 2 x");
        }
    }
}

async fn begin(attack: &Attack, dray: &Dray) -> Vec<TcpStream> {
    let to = match attack.on {
        Port::Registry => dray.registry,
        Port::Admin => dray.admin,
    };
    let mut held = Vec::new();
    for nth in 0..attack.connections * ATTACKERS.len() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((ATTACKERS[nth % ATTACKERS.len()], 0))).unwrap();
        let Ok(mut stream) = socket.connect(to).await else { continue };
        // dray may close the connection at once.
        let _ = stream.write_all((attack.sends)(nth).as_bytes()).await;
        if !attack.hangs_up {
            held.push(stream);
        }
    }
    held
}

/// A kind of measured request, and how often it is sent.
struct Kind {
    what: &'static str,
    count: usize,
    url: fn(&Dray, &Image, usize) -> String,
}

const KINDS: [Kind; 6] = [
    Kind { what: "`/v2/`", count: REQUESTS, url: |dray, _, _| dray.url("/v2/") },
    Kind { what: "a cached manifest", count: REQUESTS, url: |dray, _, _| honest(dray, "manifests/1") },
    Kind {
        what: "a cached blob",
        count: REQUESTS,
        url: |dray, image, _| honest(dray, &format!("blobs/{}", image.layers[0])),
    },
    Kind {
        what: "a blob that is not cached",
        count: COLD,
        url: |dray, _, nth| honest(dray, &format!("blobs/{}", digest(&cold(nth)))),
    },
    Kind { what: "`/livez`", count: REQUESTS, url: |dray, _, _| format!("http://{}/livez", dray.admin) },
    Kind { what: "`/metrics`", count: REQUESTS, url: |dray, _, _| format!("http://{}/metrics", dray.admin) },
];

fn honest(dray: &Dray, below: &str) -> String {
    dray.url(&format!("/v2/a/app/{below}?ns=honest.example"))
}

/// Milliseconds of the requests of each kind, sorted.
async fn measure(dray: &Dray, image: &Image, first_cold: usize) -> Vec<Vec<f64>> {
    let client = client();
    let timed = async |url: String| {
        let begun = Instant::now();
        let response = client.get(&url).send().await.unwrap_or_else(|error| panic!("{url}: {error}"));
        assert_eq!(response.status(), 200, "{url}");
        response.bytes().await.unwrap();
        begun.elapsed().as_secs_f64() * 1000.0
    };
    let mut latencies = Vec::new();
    for kind in KINDS {
        let mut took = Vec::new();
        if kind.count == REQUESTS {
            timed((kind.url)(dray, image, 0)).await;
        }
        for nth in 0..kind.count {
            took.push(timed((kind.url)(dray, image, first_cold + nth)).await);
        }
        took.sort_by(f64::total_cmp);
        latencies.push(took);
    }
    latencies
}
