//! The k6 script works against real images: its checks hold, hot and cold.

use std::process::Command;

use dray_tests::dray::{Start, rule};
use dray_tests::image::Image;
use dray_tests::process::run;
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
