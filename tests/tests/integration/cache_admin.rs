//! `dray cache` and `dray status --cluster` on running processes: list, purge and revalidate, on one node and on all.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::http::{client, get, send};
use dray_tests::image::Image;
use dray_tests::process::{free_port, output};
use dray_tests::upstream::{Content, TestUpstream};
use reqwest::Method;

const NS: &str = "?ns=docker.io";

/// Runs `dray cache` or `dray status` against a process: its exit code and what it printed.
fn operate(dray: &Dray, arguments: &[&str]) -> (Option<i32>, String) {
    let printed = output(Command::new(binary()).args(arguments).args(["--admin", &dray.admin.to_string()]));
    let text = [printed.stdout, printed.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    (printed.status.code(), text.concat())
}

/// Nodes that authenticate each other, and the directory of their key.
fn cluster(count: usize, registry_rules: &str) -> (Vec<Dray>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "a secret that all of them share").unwrap();
    let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let start = |port: &u16| {
        let peers = format!(
            "[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{}]\nkey_file = \"{}\"\n",
            members.join(", "),
            key.display()
        );
        Start::new(format!("{registry_rules}\n{peers}")).run()
    };
    (ports.iter().map(start).collect(), dir)
}

/// Pulls an image as a runtime does.
async fn pull(dray: &Dray, image: &Image) {
    let index = dray.get(&format!("/v2/library/app/manifests/1{NS}")).await;
    assert_eq!(index.status, 200);
    for digest in image.manifests.keys() {
        assert_eq!(dray.get(&format!("/v2/library/app/manifests/{digest}{NS}")).await.status, 200);
    }
    for digest in image.blobs.keys() {
        let blob = dray.get(&format!("/v2/library/app/blobs/{digest}{NS}")).await;
        assert!(blob.status == 200 && blob.complete);
    }
    dray.wait_for_fills().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_blobs_are_listed_and_an_image_is_purged() {
    let image = Image::new(1, &[3_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    pull(&dray, &image).await;
    let (code, printed) = operate(&dray, &["cache", "list"]);
    assert!(code == Some(0) && printed.contains("docker.io/library/app"), "{printed}");
    let large: Vec<_> = image.blobs.iter().filter(|(_, bytes)| bytes.len() > 256 << 10).collect();
    assert!(large.iter().all(|(digest, _)| printed.contains(*digest)), "{printed}");
    assert!(printed.contains(&format!("{} blobs", large.len())), "{printed}");
    let (_, none) = operate(&dray, &["cache", "list", "--registry", "ghcr.io"]);
    assert!(none.starts_with("0 blobs"), "{none}");
    let before = upstream.requests().len();
    let (code, printed) = operate(&dray, &["cache", "purge", "app:1"]);
    let objects = image.blobs.len() + image.manifests.len();
    assert!(code == Some(0) && printed.contains(&format!("this node: purged {objects} objects")), "{printed}");
    assert!(operate(&dray, &["cache", "list"]).1.starts_with("0 blobs"));
    assert_eq!(upstream.requests().len(), before, "a purge requests nothing");
    for digest in image.blobs.keys() {
        assert_eq!(dray.get(&format!("/v2/library/app/blobs/{digest}{NS}")).await.source(), "upstream", "{digest}");
    }
    assert_eq!(dray.get(&format!("/v2/library/app/manifests/1{NS}")).await.source(), "upstream");
    pull(&dray, &image).await;
    // foyer finds what was only removed from its index again at the next start.
    let dray = dray.restart();
    let small = image.blobs.iter().find(|(_, bytes)| bytes.len() < 256 << 10).unwrap().0;
    assert_eq!(dray.get(&format!("/v2/library/app/blobs/{small}{NS}")).await.source(), "disk", "it was cached again");
    assert_eq!(operate(&dray, &["cache", "purge", "app:1"]).0, Some(0));
    let dray = dray.restart();
    for digest in image.blobs.keys().filter(|digest| image.blobs[*digest].len() < 256 << 10) {
        assert_eq!(dray.get(&format!("/v2/library/app/blobs/{digest}{NS}")).await.source(), "upstream", "{digest}");
    }
    let (code, printed) = operate(&dray, &["cache", "purge", "never:1"]);
    assert!(code == Some(0) && printed.contains("nothing of it was cached"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn purged_registry_stays_purged_after_a_restart() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    pull(&dray, &image).await;
    let large = image.blobs.values().filter(|bytes| bytes.len() > 256 << 10).count();
    let (code, printed) = operate(&dray, &["cache", "purge", "--registry", "docker.io"]);
    assert!(code == Some(0) && printed.contains(&format!("purged {large} objects")), "{printed}");
    let dray = dray.restart();
    let small = image.blobs.iter().find(|(_, bytes)| bytes.len() < 256 << 10).unwrap().0;
    for path in [format!("/v2/library/app/blobs/{small}{NS}"), format!("/v2/library/app/manifests/1{NS}")] {
        assert_eq!(dray.get(&path).await.source(), "upstream", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_of_a_cluster_reaches_every_node_or_says_which_not() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let (mut nodes, _key) = cluster(3, &rule("docker.io", &upstream.url()));
    // The owners of the layers have no tag and no manifest of the image, nor has the node that is asked.
    pull(&nodes[2], &image).await;
    let (code, printed) = operate(&nodes[0], &["cache", "purge", "app:1", "--cluster"]);
    assert!(code == Some(0) && printed.lines().count() == 3, "{printed}");
    for node in &nodes {
        let (_, listed) = operate(node, &["cache", "list"]);
        assert!(listed.starts_with("0 blobs"), "{listed}");
    }
    let sent = upstream.count("GET", image.layer().0);
    pull(&nodes[1], &image).await;
    assert_eq!(upstream.count("GET", image.layer().0), sent + 1, "no node had it for the others");
    drop(nodes.pop());
    let (code, printed) = operate(&nodes[0], &["cache", "purge", image.layer().0, "--cluster"]);
    assert!(
        code == Some(1) && printed.contains("failed: ") && printed.contains("1 node may still have it"),
        "{printed}"
    );
    assert!(printed.matches("failed: ").count() == 1 && printed.contains("this node: "), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_of_a_registry_takes_relayed_copies() {
    let image = Image::new(1, &[2_000_000, 1_700_000, 1_300_000, 700_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let (nodes, _key) = cluster(2, &rule("docker.io", &upstream.url()));
    for node in &nodes {
        pull(node, &image).await;
    }
    let before = upstream.requests().len();
    for node in &nodes {
        assert_eq!(operate(node, &["cache", "purge", "--registry", "docker.io"]).0, Some(0));
    }
    for digest in image.blobs.keys() {
        let blob = nodes[0].get(&format!("/v2/library/app/blobs/{digest}{NS}")).await;
        assert!(["upstream", "peer"].contains(&blob.source()), "{digest} came from {}", blob.source());
        assert!(upstream.requests()[before..].iter().any(|request| request.path.contains(digest.as_str())), "{digest}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revalidated_tag_is_resolved_anew_on_all_nodes() {
    let [old, new] = [Image::new(1, &[1000]), Image::new(2, &[1000])];
    let contents = [&old, &new].map(|image| Content::new(&[("library/app", "1", image)]));
    let has_moved = Arc::new(AtomicBool::new(false));
    let moved = has_moved.clone();
    let upstream =
        TestUpstream::with_handler(move |request| contents[usize::from(moved.load(Ordering::SeqCst))].respond(request))
            .await;
    let rules =
        format!("[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\"]\nimmutable_tags = ['.*']\n", upstream.url());
    let (nodes, _key) = cluster(3, &rules);
    let resolved = async |node: &Dray| {
        let response = node.get(&format!("/v2/library/app/manifests/1{NS}")).await;
        response.header("docker-content-digest").unwrap().to_owned()
    };
    for node in &nodes {
        assert_eq!(resolved(node).await, old.digest);
    }
    has_moved.store(true, Ordering::SeqCst);
    assert_eq!(resolved(&nodes[1]).await, old.digest, "it never expires by itself");
    let (code, printed) = operate(&nodes[0], &["cache", "revalidate", "app:1"]);
    assert!(code == Some(0) && printed.matches("the next pull revalidates it").count() == 3, "{printed}");
    for node in &nodes {
        assert_eq!(resolved(node).await, new.digest);
    }
    let (code, printed) = operate(&nodes[0], &["cache", "revalidate", &format!("app@{}", new.digest)]);
    assert!(code == Some(2) && printed.contains("a digest never changes"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn purge_api_refuses_pages_of_other_sites_and_malformed_requests() {
    let dray = Start::new(rule("docker.io", "http://127.0.0.1:9")).run();
    let url = format!("http://{}/api/v1/cache/purge", dray.admin);
    // What a form of another site can send: its content-type needs no permission of the browser.
    for content_type in ["text/plain", "application/x-www-form-urlencoded"] {
        let request = client().post(&url).header("content-type", content_type).body(r#"{"registry": "docker.io"}"#);
        assert_eq!(request.send().await.unwrap().status(), 415, "{content_type}");
    }
    let foreign = client().post(&url).header("host", "evil.example").header("content-type", "application/json");
    assert_eq!(foreign.body(r#"{"registry": "docker.io"}"#).send().await.unwrap().status(), 403);
    assert_eq!(send(Method::OPTIONS, &url, &[]).await.status, 405, "no page may ask for permission");
    assert_eq!(get(&url, &[]).await.status, 405);
    for (body, problem) in [
        ("{}", "exactly one"),
        (r#"{"image": "a", "digest": "b"}"#, "exactly one"),
        (r#"{"images": "a"}"#, "unknown field"),
        (r#"{"digest": "sha256:short"}"#, "not a valid digest"),
        (r#"{"registry": "a/b"}"#, "not a valid registry"),
        ("no json", "expected"),
    ] {
        let response = client().post(&url).header("content-type", "application/json").body(body).send().await.unwrap();
        assert_eq!(response.status(), 400, "{body}");
        let text = response.text().await.unwrap();
        assert!(text.contains(problem), "{body}: {text}");
    }
    let cluster = client().post(&url).header("content-type", "application/json");
    let response = cluster.body(r#"{"registry": "docker.io", "cluster": true}"#).send().await.unwrap();
    assert_eq!(response.status(), 409);
    assert!(response.text().await.unwrap().contains("peers.key_file"));
    for path in ["/api/v1/status", "/api/v1/cache", "/api/v1/cluster"] {
        let foreign = get(&format!("http://{}{path}", dray.admin), &[("sec-fetch-site", "cross-site")]).await;
        assert_eq!(foreign.status, 403, "{path}");
    }
    let list = get(&format!("http://{}/api/v1/cache?sort=name", dray.admin), &[]).await;
    assert_eq!((list.status, list.text().contains("expected size or used")), (400, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_peer_may_not_purge() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "a secret that the other does not have").unwrap();
    for (settings, status) in [(String::new(), 403), (format!("key_file = \"{}\"\n", key.display()), 401)] {
        let port = free_port();
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"]\n{settings}");
        let dray = Start::new(format!("{}\n{peers}", rule("docker.io", "http://127.0.0.1:9"))).run();
        let url = format!("http://127.0.0.1:{port}/peers/v1/purge?registry=docker.io");
        assert_eq!(send(Method::POST, &url, &[]).await.status, status, "{settings}");
        assert_eq!(get(&format!("http://127.0.0.1:{port}/peers/v1/summary"), &[]).await.status, status);
        let (code, printed) = operate(&dray, &["status", "--cluster"]);
        match status {
            403 => assert!(code == Some(1) && printed.contains("peers.key_file"), "{printed}"),
            _ => assert!(code == Some(0) && printed.contains("1 of 1 nodes"), "{printed}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_status_shows_all_nodes_and_those_that_are_not_reached() {
    let image = Image::new(1, &[700_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let (mut nodes, _key) = cluster(3, &rule("docker.io", &upstream.url()));
    for node in &nodes {
        pull(node, &image).await;
    }
    let (code, printed) = operate(&nodes[0], &["status", "--cluster"]);
    assert!(code == Some(0) && printed.contains("3 of 3 nodes; hit ratio"), "{printed}");
    assert!(!printed.contains("differ"), "{printed}");
    drop(nodes.pop());
    let (code, printed) = operate(&nodes[0], &["status", "--cluster"]);
    assert!(code == Some(0) && printed.contains("2 of 3 nodes"), "{printed}");
    let json = get(&format!("http://{}/api/v1/cluster", nodes[0].admin), &[]).await;
    let json: serde_json::Value = serde_json::from_str(&json.text()).unwrap();
    let traffic = &json["traffic"];
    assert!(json["nodes"].as_array().unwrap().len() == 3 && traffic["sent_bytes"].as_u64() > Some(1_400_000), "{json}");
    let (sent, received) = (traffic["sent_bytes"].as_u64().unwrap(), traffic["upstream_bytes"].as_u64().unwrap());
    assert_eq!(json["saved_bytes"].as_u64(), Some(sent.saturating_sub(received)));
}

/// In Chromium, with a node that is not reached and an upstream that is down. `DRAY_SCREENSHOTS=DIR` keeps the
/// screenshots.
#[tokio::test(flavor = "multi_thread")]
async fn status_page_shows_the_cluster_on_demand() {
    let image = Image::new(1, &[700_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let gone = format!("http://127.0.0.1:{}", free_port());
    let (mut nodes, _key) = cluster(3, &(rule("docker.io", &upstream.url()) + &rule("gone.example", &gone)));
    pull(&nodes[0], &image).await;
    pull(&nodes[1], &image).await;
    assert_eq!(nodes[0].get("/v2/team/app/manifests/1?ns=gone.example").await.status, 503);
    drop(nodes.pop());
    let kept = std::env::var_os("DRAY_SCREENSHOTS");
    let dir = tempfile::tempdir().unwrap();
    let (url, paths): (String, Vec<String>) =
        (nodes[0].url(""), image.blobs.keys().map(|digest| format!("/v2/library/app/blobs/{digest}{NS}")).collect());
    let traffic = tokio::spawn(async move {
        for path in paths.iter().cycle() {
            get(&format!("{url}{path}"), &[]).await;
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    let captures =
        dray_tests::page::capture(nodes[0].admin, kept.as_deref().map_or(dir.path(), std::path::Path::new), Some(3));
    traffic.abort();
    assert_eq!(captures.len(), 3);
    for capture in &captures {
        let text = capture["text"].as_str().unwrap();
        assert!(text.contains("2 of 3 nodes · hit ratio") && text.contains(&gone), "{text}");
    }
}
