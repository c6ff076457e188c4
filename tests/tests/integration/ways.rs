//! Members without a way to the registry, that name others in vain, or that are about to go: they cost nobody a pull.

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

/// Images of one layer each; those of all platforms are 4 blobs.
fn images(count: u64, size: usize) -> Vec<Image> {
    (0..count).map(|seed| Image::new(seed, &[size])).collect()
}

fn content(images: &[Image]) -> Arc<Content> {
    let tags: Vec<String> = (0..images.len()).map(|nth| nth.to_string()).collect();
    let named: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    Arc::new(Content::new(&named))
}

/// A dray for each of these lines of `[peers]`.
fn cluster(count: usize, rules: &str, proof: &str) -> Vec<Start> {
    let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let members = members.join(", ");
    let peers = |port| format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n{proof}\n");
    ports.iter().map(|port| Start::new(format!("{rules}\n{}", peers(port)))).collect()
}

/// A dray with these other members.
fn beside(members: &[&TestUpstream], registry: &TestUpstream) -> Dray {
    let port = free_port();
    let members: String = members.iter().map(|member| format!(", \"{}\"", member.address)).collect();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"{members}]\n");
    Start::new(format!("{}\n{peers}", rule("docker.io", &registry.url()))).run()
}

fn blob(digest: &str) -> String {
    format!("/v2/library/app/blobs/{digest}?ns=docker.io")
}

/// All but one cannot say who they are, as where a secret has not come to all nodes yet. Whoever owns it.
#[tokio::test(flavor = "multi_thread")]
async fn owners_without_a_way_to_the_registry_stop_nobody() {
    let images = images(2, 500_000);
    let content = content(&images);
    let known = format!("Basic {}", STANDARD.encode("robot:known"));
    let upstream = TestUpstream::answering(move |request| match request.header("authorization") {
        Some(said) if said == known => content.answer(request),
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
            let answer = nodes[0].get(&format!("/v2/library/app/manifests/{digest}?ns=docker.io")).await;
            assert_eq!((answer.status, &answer.body), (200, bytes), "{}", answer.text());
        }
        for (digest, bytes) in &image.blobs {
            let head = send(Method::HEAD, &nodes[0].url(&blob(digest)), &[]).await;
            assert_eq!(head.status, 200);
            let answer = nodes[0].get(&blob(digest)).await;
            assert_eq!((answer.status, &answer.body), (200, bytes), "{}", answer.text());
        }
    }
}

/// As somebody who is down, or whom this node does not know yet.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_names_somebody_who_may_not_be_asked_is_asked_again() {
    let images = images(8, 300_000);
    let (content, upstream) = (content(&images), TestUpstream::answering(|_| Response::new(503, "")).await);
    let owner = TestUpstream::answering(move |request: &Request| {
        let insists = request.header("dray-request").is_some_and(|terms| terms.contains("no-redirect"));
        match request.method == "GET" && request.is_blob() && !insists {
            true => Response::new(307, "").with("location", "127.0.0.1:1"),
            false => content.answer(request),
        }
    })
    .await;
    let node = beside(&[&owner], &upstream);
    for image in &images {
        let (digest, bytes) = image.layer();
        let answer = node.get(&blob(digest)).await;
        assert_eq!((answer.status, answer.source(), &answer.body), (200, "peer", bytes), "{}", answer.text());
    }
}

/// The one who has it is neither the owner nor next to it.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_member_has_of_an_image_is_had_by_all_while_the_registry_is_down() {
    let images = images(8, 300_000);
    let content = content(&images);
    let upstream = TestUpstream::answering(|_| Response::new(503, "")).await;
    let holder = TestUpstream::answering(move |request: &Request| content.answer(request)).await;
    let mut others = Vec::new();
    for _ in 0..12 {
        others.push(TestUpstream::answering(|_| Response::new(504, "")).await);
    }
    let members: Vec<&TestUpstream> = others.iter().chain([&holder]).collect();
    let node = beside(&members, &upstream);
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
async fn who_is_about_to_go_begins_nothing_for_others() {
    let images = images(2, 30_000_000);
    let content = content(&images);
    // Slow enough that somebody still reads when it is told to go.
    let upstream = TestUpstream::answering(move |request: &Request| {
        content.answer(request).fault(Fault::SlowUntilGate(1_000_000))
    })
    .await;
    let mut nodes: Vec<Dray> =
        cluster(2, &rule("docker.io", &upstream.url()), "").into_iter().map(Start::run).collect();
    let asked = |nodes: &[Dray], digest: &str| format!("http://{}{}", nodes[0].peers.unwrap(), blob(digest));
    let [first, second] = [0, 1].map(|nth| images[nth].layer().0.to_owned());
    let (url, client) = (asked(&nodes, &first), dray_tests::http::client());
    let reading = client.get(url).header("dray-request", "role=global").send().await.unwrap();
    assert_eq!(reading.status(), 200, "while it stays it fetches what it is asked for");
    nodes[0].process().signal(Signal::TERM);
    let admin = format!("http://{}/readyz", nodes[0].admin);
    eventually("it is about to go", async || (get(&admin, &[]).await.status == 503).then_some(())).await;
    let answer = get(&asked(&nodes, &second), &[("dray-request", "role=global")]).await;
    assert_eq!(answer.status, 504, "{}", answer.text());
    assert_eq!(upstream.count("GET", &second), 0);
    drop(reading);
}

/// A liar that says so is found out by the digest; the truth is longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_makes_large_blobs_short_costs_no_pull() {
    let images = images(8, 1_000_000);
    let content = content(&images);
    let truth = content.clone();
    let upstream = TestUpstream::answering(move |request: &Request| truth.answer(request)).await;
    let liar = TestUpstream::answering(move |request: &Request| match request.is_blob() {
        true => Response::new(200, noise(9, 1000)),
        false => content.answer(request),
    })
    .await;
    let node = beside(&[&liar], &upstream);
    for image in &images {
        let (digest, bytes) = image.layer();
        let answer = node.get(&blob(digest)).await;
        assert_eq!((answer.status, answer.complete), (200, true), "{}", answer.text());
        assert!(answer.body == bytes);
    }
    assert!(liar.count("GET", "/blobs/") > 0, "it owns none of eight");
}
