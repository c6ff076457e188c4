//! The k6 scripts meet their thresholds against real images, warm and cold. And a log without a reader.

use std::process::{Command, Stdio};

use dray_tests::dray::{Start, binary, rule};
use dray_tests::image::Image;
use dray_tests::process::{Process, run};
use dray_tests::registry::Registry;
use dray_tests::tool;

#[tokio::test(flavor = "multi_thread")]
async fn pull_script_meets_its_thresholds() {
    let registry = Registry::open().await;
    for nth in 0..3 {
        registry.push("team/app", &nth.to_string(), &Image::new(nth, &[1_000_000, 10_000])).await;
    }
    let dray = Start::new(rule("quay.io", &registry.url())).run();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../loadtest/pull.js");
    let printed = run(Command::new(tool("k6"))
        .args(["run", "--quiet", "--no-usage-report", "--env"])
        .arg(format!("BASE={}", dray.url("")))
        .args(["--env", "IMAGES=quay.io/team/app:0,quay.io/team/app:1,quay.io/team/app:2"])
        .args(["--env", "VUS=5", "--env", "ITERATIONS=30", script]));
    assert!(printed.contains("pulled_bytes"), "{printed}");
    assert!(dray.metric("dray_requests_total{route=\"blob\",source=\"disk\",status=\"200\"}").await > 0);
}

/// Each scenario for a few seconds, by its one command.
#[test]
fn every_scenario_passes_and_reports() {
    let scripts = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../loadtest");
    let names = std::fs::read_dir(&scripts)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str().unwrap().strip_suffix(".js").map(str::to_owned));
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(names, ["blobs", "churn", "compare", "manifests", "origin-down", "pull", "ranges", "rollout"]);
    let dir = tempfile::tempdir().unwrap();
    for name in &names {
        let out = dir.path().join(name);
        let mut command = Command::new("sh");
        command.arg(scripts.join("run.sh")).arg(name).env("DRAY", binary()).env("K6", tool("k6")).env("OUT", &out);
        command.envs([("DURATION", "3"), ("RATE", "50"), ("BURST", "200"), ("NODES", "8"), ("ITERATIONS", "6")]);
        command.envs([("SIZE", "1500000"), ("COUNT", "3"), ("DRAYS", if name == "rollout" { "2" } else { "1" })]);
        if name == "origin-down" {
            command.env("DURATION", "9");
        }
        let printed = run(&mut command);
        assert!(printed.contains("passed") && !printed.contains("FAILED"), "{name}: {printed}");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.with_extension("json")).unwrap()).unwrap();
        assert_eq!(json["metrics"]["checks"]["values"]["fails"], 0, "{name}");
        let html = std::fs::read_to_string(out.with_extension("html")).unwrap();
        assert!(html.contains("passed") && html.contains("Thresholds and checks"), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unread_log_does_not_block_requests() {
    let start = Start::new("").env("DRAY_LOG", "debug");
    let mut process = Process::spawn(start.command().stderr(Stdio::piped()));
    let line = process.line("listening ");
    let address = line.split(' ').find_map(|field| field.strip_prefix("registry=")).unwrap();
    let (client, long) = (dray_tests::http::client(), "x".repeat(200));
    // Far more log lines than a pipe buffers.
    for nth in 0..2000 {
        let url = format!("http://{address}/v2/{long}/manifests/{nth}?ns=localhost");
        let response = tokio::time::timeout(std::time::Duration::from_secs(10), client.get(url).send()).await;
        assert_eq!(response.expect("a response in time").unwrap().status(), 403, "request {nth}");
    }
}
