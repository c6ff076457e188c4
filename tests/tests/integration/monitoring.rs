//! Metrics and their users: the table, the alerts, the dashboard.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use dray_tests::documents::text;
use dray_tests::dray::{Start, rule};
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::{free_port, run};
use dray_tests::project;
use dray_tests::upstream::{Response, TestUpstream};
use serde_json::Value;

/// The texts between backticks in a cell.
fn names(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The documented names with their types and labels.
fn documented() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let table = text("docs/operations/monitoring.md");
    let rows = table.lines().filter(|line| line.starts_with("| `dray_"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = names(cells[1]).pop_first().unwrap();
        assert!(!cells[4].is_empty(), "{name} has a description");
        (name, (cells[2].to_owned(), names(cells[3])))
    })
    .collect()
}

/// Every `dray_...` in a text; histograms without their suffix.
fn used(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let found =
        text.match_indices("dray_").map(|(at, _)| text[at..].chars().take_while(|c| is_name(*c)).collect::<String>());
    found.map(|name| name.trim_end_matches("_bucket").to_owned()).collect()
}

#[test]
fn metrics_table_lists_exactly_the_metrics_of_the_code() {
    let in_code: BTreeSet<String> =
        text("proxy/src/metrics.rs").lines().filter(|line| line.contains("= \"dray_")).flat_map(used).collect();
    let in_table: BTreeSet<String> = documented().into_keys().collect();
    assert!(in_code.len() > 25);
    assert_eq!(in_code, in_table);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_have_type_and_labels_of_the_table() {
    let image = Image::new(1, &[500_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| {
        r.with("ratelimit-limit", "100;w=1").with("ratelimit-remaining", "9;w=1")
    })
    .await;
    let gone = TestUpstream::with_handler(|_| Response::new(429, "")).await;
    let port = free_port();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"]\n");
    let passthrough = format!("{}authorization = \"passthrough\"\n", rule("passthrough.example", &gone.url()));
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "0123456789abcdef").unwrap();
    let peers = format!("{peers}key_file = \"{}\"\n", key.path().display());
    let dray = Start::new(rule("docker.io", &upstream.url()) + &passthrough + &peers).run();
    let (layer, bytes) = image.layer();
    for path in ["manifests/1".to_owned(), format!("blobs/{layer}"), format!("blobs/{layer}"), "tags/list".to_owned()] {
        dray.get(&format!("/v2/library/app/{path}?ns=docker.io")).await;
        dray.wait_for_fills().await;
    }
    dray.get("/v2/a/manifests/1?ns=passthrough.example").await;
    get(&format!("http://127.0.0.1:{port}/v2/"), &[]).await;
    assert_eq!(dray.metric("dray_client_bytes_total{source=\"disk\"}").await, bytes.len() as u64);
    let scraped = get(&format!("http://{}/metrics", dray.admin), &[]).await.text();
    let documented = documented();
    let mut seen = BTreeSet::new();
    for line in scraped.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            assert_eq!(documented.get(name).map(|(kind, _)| &**kind), Some(kind), "{name}");
            seen.insert(name.to_owned());
        } else if !line.starts_with('#') && !line.contains("_sum") && !line.contains("_count") {
            let (series, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let keys = labels.split("\",").filter_map(|label| Some(label.split_once('=')?.0.to_owned()));
            let keys: BTreeSet<String> = keys.filter(|key| key != "le").collect();
            assert_eq!(documented[name.trim_end_matches("_bucket")].1, keys, "{line}");
        }
    }
    for name in [
        "dray_upstream_first_byte_seconds",
        "dray_upstream_body_seconds_total",
        "dray_client_authorizations_total",
        "dray_request_seconds",
    ] {
        assert!(seen.contains(name), "{name}\n{scraped}");
    }
}

#[test]
fn alerts_fire_as_their_tests_say() {
    let directory = project().join("k8s/monitoring");
    run(Command::new("promtool").current_dir(&directory).args(["check", "rules", "../dray/monitoring/alerts.yaml"]));
    run(Command::new("promtool").current_dir(&directory).args(["test", "rules", "alerts.test.yaml"]));
}

#[test]
fn alert_links_to_a_section_of_the_runbooks() {
    let alerts = text("k8s/dray/monitoring/alerts.yaml");
    let links: Vec<&str> = alerts.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")).collect();
    assert_eq!(links.len(), alerts.matches("- alert: ").count(), "every alert has one");
    for link in links {
        let (file, anchor) = link.split_once('#').unwrap();
        let has = |line: &str| line.strip_prefix("## ").is_some_and(|title| title.to_lowercase() == anchor);
        assert!(text(file).lines().any(has), "{link}");
    }
}

#[test]
fn alerts_and_dashboard_use_existing_metrics() {
    let dashboard: Value = serde_json::from_str(&text("k8s/dray/monitoring/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let expressions: Vec<&str> = targets.map(|target| target["expr"].as_str().unwrap()).collect();
    assert!(expressions.len() > 30);
    let documented = documented();
    let mut all = expressions.join("\n");
    // Prometheus itself parses the expressions.
    let mut rules = "groups:\n- name: dashboard\n  rules:\n".to_owned();
    for (nth, expression) in expressions.iter().enumerate() {
        let plain = expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*");
        rules += &format!("  - record: panel:{nth}\n    expr: {}\n", Value::String(plain));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), rules).unwrap();
    run(Command::new("promtool").args(["check", "rules", "--lint=none"]).arg(file.path()));
    all += &text("k8s/dray/monitoring/alerts.yaml");
    for name in used(&all) {
        assert!(documented.contains_key(&name), "{name} is not in the table");
    }
    let shown = used(&all);
    for name in documented.keys().filter(|name| *name != "dray_small_dropped_total") {
        assert!(shown.contains(name), "{name} is on no dashboard and in no alert");
    }
}
