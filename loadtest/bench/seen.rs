//! The cost of observability: the access log, the metrics, and the status page.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use dray_tests::callgrind::{CALLGRIND, collected_instructions, instructions_per_pass};
use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::http::client;
use dray_tests::image::Image;
use dray_tests::page;
use dray_tests::process::free_port;
use dray_tests::upstream::TestUpstream;
use rustix::process::Signal;

use super::rig::{ROUNDS, cpu_seconds, median, row};

/// Measured requests, and warm-up requests before them, which pay for lazy initialization.
const REQUESTS: u32 = 2_000;
const BEFORE: u32 = 200;

/// Passes of the metrics alone. More passes: the varying start of a process has less weight.
const PASSES: u32 = 20_000;

const PEERS: usize = 1_000;
const UPDATES: u32 = 500;

/// Instructions do not depend on the load of the machine. They still vary a little with the scheduling of threads.
pub(crate) async fn by_log_and_metrics() {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        with.push(of_a_request("info").await);
        without.push(of_a_request("info,access=off").await);
    }
    let (with, counting) = (median(&with), float(instructions_per_pass("count", PASSES)));
    let log = with - median(&without);
    row(
        "a warm manifest: its line in the access log, and its metrics",
        &format!("{:.1} %", (log + counting) / with * 100.0),
        &format!("{log:.0} + {counting:.0} of {with:.0} instructions"),
        "<= 5 %",
    );
}

async fn of_a_request(log: &str) -> f64 {
    let all = counted(log, BEFORE + REQUESTS).await;
    (all - counted(log, BEFORE).await) / f64::from(REQUESTS)
}

/// Instructions of a process that serves this number of requests for a manifest in memory.
async fn counted(log: &str, requests: u32) -> f64 {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, log_file) = (dir.path().join("counted"), dir.path().join("log"));
    let counter = CALLGRIND.join(" ");
    fs::write(&wrapper, format!("#!/bin/sh\nexec {counter} {} \"$@\"\n", binary().display())).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let start = Start::with_upstream("docker.io", &upstream.url())
        .env("DRAY_LOG", log)
        .log_to(&log_file)
        .with_program(&wrapper);
    let mut dray = start.run();
    let (client, url) = (client(), dray.url(&format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest)));
    for _ in 0..requests {
        let response = client.get(&url).header("user-agent", "containerd/v2.1.0").send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    float(collected_instructions(&fs::read_to_string(log_file).unwrap()))
}

#[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
fn float(instructions: u64) -> f64 {
    instructions as f64
}

/// The status page of a node that has many peers.
pub(crate) async fn by_people() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let port = free_port();
    let others = (1..PEERS).map(|nth| format!("\"10.0.{}.{}:5052\"", nth / 250, nth % 250 + 1));
    let members: Vec<String> = others.chain([format!("\"127.0.0.1:{port}\"")]).collect();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{}]\n", members.join(", "));
    let dray = Start::new(rule("docker.io", &upstream.url()) + &peers).run();
    dray.get("/v2/library/app/manifests/1?ns=docker.io").await;
    updates(&dray).await;
    let dir = tempfile::tempdir().unwrap();
    let captures = page::capture(dray.admin, dir.path(), None);
    let of = |key: &str| median(&captures.iter().map(|capture| capture[key].as_f64().unwrap()).collect::<Vec<_>>());
    let bytes = client().get(format!("http://{}/", dray.admin)).send().await.unwrap().bytes().await.unwrap().len();
    row(
        "the status page in Chromium, 1,000 peers: loaded",
        &format!("{:.0} ms", of("loaded_ms")),
        &format!("filled after {:.0} ms; {} KB", of("shown_ms"), bytes / 1000),
        "< 200 ms, < 100 KB",
    );
}

async fn updates(dray: &Dray) {
    let (client, url) = (client(), format!("http://{}/api/v1/status", dray.admin));
    let (began, before) = (Instant::now(), cpu_seconds(dray.id()));
    for _ in 0..UPDATES {
        client.get(&url).send().await.unwrap().bytes().await.unwrap();
    }
    let each = |seconds: f64| seconds / f64::from(UPDATES) * 1000.0;
    row(
        "an update of the status page, 1,000 peers",
        &format!("{:.2} ms of the processor", each(cpu_seconds(dray.id()) - before)),
        &format!("{:.2} ms until it was there", each(began.elapsed().as_secs_f64())),
        "< 0.5 ms",
    );
}
