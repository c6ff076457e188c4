//! Time of a pull by tag during an outage: at first, and once the outage is detected.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use dray_tests::dray::{Dray, Start};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::registry::Registry;
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket, socket_with, sockopt};

use super::rig::{ROUNDS, median, row};

const TAG: &str = "/v2/team/app/manifests/1?ns=reg.test";
const MISSING: &str = "/v2/team/app/manifests/2?ns=reg.test";

/// How a registry is dead.
#[derive(Clone, Copy)]
enum Death {
    /// No process listens on the port.
    Refuses,
    /// Connections and requests are accepted, but there is no response.
    Stalls,
    /// No packet comes back, not even a RST.
    Swallows,
}

/// Milliseconds for a known and an unknown tag: before and after the outage is detected.
type Took = [f64; 4];

pub(crate) async fn dead() {
    for (death, name) in [
        (Death::Refuses, "that is off"),
        (Death::Stalls, "that never answers"),
        (Death::Swallows, "behind a black hole"),
    ] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(round(death).await);
        }
        let of = |nth: usize| median(&rounds.iter().map(|took: &Took| took[nth]).collect::<Vec<_>>());
        for (nth, what, bar) in [
            (0, "a known tag, the first time", "<= 1200 ms"),
            (1, "the same, once it is known", "<= 50 ms"),
            (2, "an unknown tag, the first time", "<= 10 s"),
            (3, "the same, once it is known", "at once"),
        ] {
            row(&format!("a registry {name}: {what}"), &format!("{:.1} ms", of(nth)), "", bar);
        }
    }
}

async fn round(death: Death) -> Took {
    let image = Image::new(1, &[1000]);
    let mut registry = Registry::open().await;
    registry.push("team/app", "1", &image).await;
    let silent = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (now, content) = (silent.clone(), Content::new(&[("team/app", "1", &image)]));
    let test_upstream =
        TestUpstream::with_handler(move |request| match now.load(std::sync::atomic::Ordering::SeqCst) {
            true => Response::new(200, "").fault(Fault::Silent),
            false => content.respond(request),
        })
        .await;
    let upstream = if matches!(death, Death::Stalls) { test_upstream.url() } else { registry.url() };
    let dray = Start::new(format!(
        "[[registry]]\nmatch = \"reg.test\"\nupstreams = [\"{upstream}\"]\ntag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n"
    ))
    .run();
    assert_eq!(dray.get(TAG).await.status, 200);
    let mut _hole = None;
    match death {
        Death::Refuses => registry.stop(),
        Death::Stalls => silent.store(true, std::sync::atomic::Ordering::SeqCst),
        Death::Swallows => {
            registry.stop();
            _hole = Some(Hole::dig(registry.port));
        }
    }
    let (known, unknown) = (timed(&dray, TAG, 200).await, timed(&dray, MISSING, 503).await);
    eventually("the outage is detected", async || {
        (dray.metric("dray_upstream_down{rule=\"reg.test\"}").await == 1).then_some(())
    })
    .await;
    // The median of several requests, because one may coincide with a probe.
    let mut later = [Vec::new(), Vec::new()];
    for _ in 0..20 {
        later[0].push(timed(&dray, TAG, 200).await);
        later[1].push(timed(&dray, MISSING, 503).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    [known, median(&later[0]), unknown, median(&later[1])]
}

async fn timed(dray: &Dray, path: &str, status: u16) -> f64 {
    let sent_at = Instant::now();
    let response = dray.get(path).await;
    assert_eq!(response.status, status, "{}", response.text());
    sent_at.elapsed().as_secs_f64() * 1000.0
}

/// A listener with a full backlog: the kernel drops new connections, like a network that drops packets.
struct Hole {
    _listener: OwnedFd,
    _taken: Vec<OwnedFd>,
}

impl Hole {
    fn dig(port: u16) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseaddr(&listener, true).unwrap();
        bind(&listener, &address).unwrap();
        listen(&listener, 0).unwrap();
        let taken = (0..3).map(|_| {
            let client = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
            // The connection is pending or established.
            let _ = connect(&client, &address);
            client
        });
        Self { _taken: taken.collect(), _listener: listener }
    }
}
