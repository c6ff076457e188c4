//! The k6 script works against real images: its checks hold, hot and cold. And a log that nobody reads.

use std::process::{Command, Stdio};

use dray_tests::dray::{Start, rule};
use dray_tests::image::Image;
use dray_tests::process::{Process, run};
use dray_tests::registry::Registry;
use dray_tests::tool;

#[tokio::test(flavor = "multi_thread")]
async fn the_pull_script_passes_its_thresholds() {
    let registry = Registry::open().await;
    for nth in 0..3 {
        registry.push("team/app", &nth.to_string(), &Image::new(nth, &[1_000_000, 10_000])).await;
    }
    let dray = Start::new(rule("quay.io", &registry.url())).run();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../loadtest/pull.js");
    let said = run(Command::new(tool("k6"))
        .args(["run", "--quiet", "--no-usage-report", "--env"])
        .arg(format!("BASE={}", dray.url("")))
        .args(["--env", "IMAGES=quay.io/team/app:0,quay.io/team/app:1,quay.io/team/app:2"])
        .args(["--env", "VUS=5", "--env", "ITERATIONS=30", script]));
    assert!(said.contains("pulled_bytes"), "{said}");
    assert!(dray.metric("dray_requests_total{route=\"blob\",source=\"disk\",status=\"200\"}").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_holds_up_nobody() {
    let start = Start::new("").env("DRAY_LOG", "debug");
    let mut process = Process::spawn(start.command().stderr(Stdio::piped()));
    let line = process.line("listening ");
    let address = line.split(' ').find_map(|field| field.strip_prefix("registry=")).unwrap();
    let (client, long) = (dray_tests::http::client(), "x".repeat(200));
    // Far more than a pipe takes.
    for nth in 0..2000 {
        let url = format!("http://{address}/v2/{long}/manifests/{nth}?ns=localhost");
        let answer = tokio::time::timeout(std::time::Duration::from_secs(10), client.get(url).send()).await;
        assert_eq!(answer.expect("answered all the same").unwrap().status(), 403, "request {nth}");
    }
}
