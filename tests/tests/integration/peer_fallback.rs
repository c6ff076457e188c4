//! Peers that lack credentials, redirect to unusable peers, or drain: none of them fails a pull.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::http::{get, send};
use dray_tests::image::{Image, noise};
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use futures_util::future::join_all;
use reqwest::Method;
use rustix::process::Signal;

/// Images of one layer each. With all platforms each has 4 blobs.
fn images(count: u64, size: usize) -> Vec<Image> {
    (0..count).map(|seed| Image::new(seed, &[size])).collect()
}

fn content(images: &[Image]) -> Arc<Content> {
    let tags: Vec<String> = (0..images.len()).map(|nth| nth.to_string()).collect();
    let named: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    Arc::new(Content::new(&named))
}

/// Nodes with the same rules and these lines of `[peers]`.
fn cluster(count: usize, rules: &str, auth: &str) -> Vec<Start> {
    let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let members = members.join(", ");
    let peers = |port| format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n{auth}\n");
    ports.iter().map(|port| Start::new(format!("{rules}\n{}", peers(port)))).collect()
}

/// A dray with these peers.
fn node_with_peers(members: &[&TestUpstream], registry: &TestUpstream) -> Dray {
    let port = free_port();
    let members: String = members.iter().map(|member| format!(", \"{}\"", member.address)).collect();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"{members}]\n");
    Start::new(format!("{}\n{peers}", rule("docker.io", &registry.url()))).run()
}

fn blob(digest: &str) -> String {
    format!("/v2/library/app/blobs/{digest}?ns=docker.io")
}

/// Only one node has credentials, as while a secret reaches the nodes one after the other. The other nodes own most of
/// the content.
#[tokio::test(flavor = "multi_thread")]
async fn owner_without_credentials_fails_no_pull() {
    let images = images(2, 500_000);
    let content = content(&images);
    let known = format!("Basic {}", STANDARD.encode("robot:known"));
    let upstream = TestUpstream::with_handler(move |request| match request.header("authorization") {
        Some(value) if value == known => content.respond(request),
        _ => Response::new(401, "").with("www-authenticate", "Basic realm=\"r\""),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "a secret of all the drays\n").unwrap();
    let rules = rule("docker.io", &upstream.url())
        + "credentials = { username = \"robot\", password_env = \"DRAY_TEST_PASSWORD\" }\ntag_ttl = \"0s\"\n";
    let starts = cluster(5, &rules, &format!("key_file = \"{}\"", key.display())).into_iter().enumerate();
    let starts = starts.map(|(nth, start)| if nth == 0 { start.env("DRAY_TEST_PASSWORD", "known") } else { start });
    let nodes: Vec<Dray> = starts.map(Start::run).collect();
    for (nth, image) in images.iter().enumerate() {
        let tag = nodes[0].get(&format!("/v2/library/app/manifests/{nth}?ns=docker.io")).await;
        assert_eq!((tag.status, &tag.body), (200, image.index()), "{}", tag.text());
        for (digest, (_, bytes)) in &image.manifests {
            let response = nodes[0].get(&format!("/v2/library/app/manifests/{digest}?ns=docker.io")).await;
            assert_eq!((response.status, &response.body), (200, bytes), "{}", response.text());
        }
        for (digest, bytes) in &image.blobs {
            let head = send(Method::HEAD, &nodes[0].url(&blob(digest)), &[]).await;
            assert_eq!(head.status, 200);
            let response = nodes[0].get(&blob(digest)).await;
            assert_eq!((response.status, &response.body), (200, bytes), "{}", response.text());
        }
    }
}

/// The redirect names a peer that is down, or that this node does not list yet.
#[tokio::test(flavor = "multi_thread")]
async fn owner_redirecting_to_unusable_peer_is_requested_again() {
    let images = images(8, 300_000);
    let (content, upstream) = (content(&images), TestUpstream::with_handler(|_| Response::new(503, "")).await);
    let owner = TestUpstream::with_handler(move |request: &Request| {
        let is_direct = request.header("dray-request").is_some_and(|terms| terms.contains("no-redirect"));
        match request.method == "GET" && request.is_blob() && !is_direct {
            true => Response::new(307, "").with("location", "127.0.0.1:1"),
            false => content.respond(request),
        }
    })
    .await;
    let node = node_with_peers(&[&owner], &upstream);
    for image in &images {
        let (digest, bytes) = image.layer();
        let response = node.get(&blob(digest)).await;
        assert_eq!((response.status, response.source(), &response.body), (200, "peer", bytes), "{}", response.text());
    }
}

/// The holder is neither the owner nor the next owner.
#[tokio::test(flavor = "multi_thread")]
async fn image_on_any_peer_is_found_while_upstream_is_down() {
    let images = images(8, 300_000);
    let content = content(&images);
    let upstream = TestUpstream::with_handler(|_| Response::new(503, "")).await;
    let holder = TestUpstream::with_handler(move |request: &Request| content.respond(request)).await;
    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(TestUpstream::with_handler(|_| Response::new(504, "")).await);
    }
    let members: Vec<&TestUpstream> = others.iter().chain([&holder]).collect();
    let node = node_with_peers(&members, &upstream);
    let pulls = images.iter().map(async |image| {
        let manifest = node.get(&format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest)).await;
        assert_eq!((manifest.status, &manifest.body), (200, image.index()), "{}", manifest.text());
        let (digest, bytes) = image.layer();
        let head = send(Method::HEAD, &node.url(&blob(digest)), &[]).await;
        assert_eq!((head.status, head.header("content-length")), (200, Some(&*bytes.len().to_string())));
        let end = node.get_range(&blob(digest), "bytes=-10").await;
        assert_eq!((end.status, &*end.body), (206, &bytes[bytes.len() - 10..]), "{}", end.text());
        let whole = node.get(&blob(digest)).await;
        assert_eq!((whole.status, &whole.body), (200, bytes), "{}", whole.text());
    });
    join_all(pulls).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_node_starts_no_fill_for_peers() {
    let images = images(2, 30_000_000);
    let content = content(&images);
    // Slow enough that a reader is still connected when SIGTERM arrives.
    let upstream = TestUpstream::with_handler(move |request: &Request| {
        content.respond(request).fault(Fault::SlowUntilGate(1_000_000))
    })
    .await;
    let mut nodes: Vec<Dray> =
        cluster(2, &rule("docker.io", &upstream.url()), "").into_iter().map(Start::run).collect();
    let peer_url = |nodes: &[Dray], digest: &str| format!("http://{}{}", nodes[0].peers.unwrap(), blob(digest));
    let [first, second] = [0, 1].map(|nth| images[nth].layer().0.to_owned());
    let (url, client) = (peer_url(&nodes, &first), dray_tests::http::client());
    let reading = client.get(url).header("dray-request", "role=global").send().await.unwrap();
    assert_eq!(reading.status(), 200, "before SIGTERM it downloads for peers");
    nodes[0].process().signal(Signal::TERM);
    let admin = format!("http://{}/readyz", nodes[0].admin);
    eventually("the node drains", async || (get(&admin, &[]).await.status == 503).then_some(())).await;
    let response = get(&peer_url(&nodes, &second), &[("dray-request", "role=global")]).await;
    assert_eq!(response.status, 504, "{}", response.text());
    assert_eq!(upstream.count("GET", &second), 0);
    drop(reading);
}

/// A peer that sends short bodies with a matching length. The digest exposes it.
#[tokio::test(flavor = "multi_thread")]
async fn peer_sending_short_blobs_fails_no_pull() {
    let images = images(8, 1_000_000);
    let content = content(&images);
    let correct = content.clone();
    let upstream = TestUpstream::with_handler(move |request: &Request| correct.respond(request)).await;
    let corrupt = TestUpstream::with_handler(move |request: &Request| match request.is_blob() {
        true => Response::new(200, noise(9, 1000)),
        false => content.respond(request),
    })
    .await;
    let node = node_with_peers(&[&corrupt], &upstream);
    for image in &images {
        let (digest, bytes) = image.layer();
        let response = node.get(&blob(digest)).await;
        assert_eq!((response.status, response.complete), (200, true), "{}", response.text());
        assert!(response.body == bytes);
    }
    assert!(corrupt.count("GET", "/blobs/") > 0, "the peer owns none of eight blobs");
}
