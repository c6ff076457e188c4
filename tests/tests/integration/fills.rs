//! One download with many readers: slow, stalled, disconnected.

use std::time::Duration;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::http::client;
use dray_tests::image::Image;
use dray_tests::upstream::{Fault, TestUpstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const SIZE: usize = 4_000_000;

async fn rig(fault: Fault) -> (TestUpstream, Dray, Image) {
    let image = Image::new(1, &[SIZE]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
        if request.is_blob() { response.fault(fault) } else { response }
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    (upstream, dray, image)
}

fn path(image: &Image) -> String {
    format!("/v2/library/app/blobs/{}?ns=docker.io", image.layer().0)
}

/// A connection that has sent a request for the blob and read nothing.
async fn request_blob(dray: &Dray, image: &Image) -> TcpStream {
    let mut stream = TcpStream::connect(dray.registry).await.unwrap();
    let request = format!("GET {} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", path(image));
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_clients_share_one_download() {
    let (upstream, dray, image) = rig(Fault::GateAfter(1000)).await;
    let url = dray.url(&path(&image));
    let mut pulls = JoinSet::new();
    for nth in 0..100 {
        let url = url.clone();
        pulls.spawn(async move {
            let mut request = client().get(url);
            // Some resume, as clients do.
            let skip = if nth % 4 == 0 { nth * 1000 } else { 0 };
            if skip > 0 {
                request = request.header("range", format!("bytes={skip}-"));
            }
            let response = request.send().await.unwrap();
            (skip, response.headers()["x-dray-source"].clone(), response.bytes().await.unwrap())
        });
    }
    eventually("the upstream is requested", async || (upstream.count("GET", "/blobs/") > 0).then_some(())).await;
    upstream.open_gate();
    let bytes = image.layer().1;
    while let Some(pulled) = pulls.join_next().await {
        let (skip, source, body) = pulled.unwrap();
        assert!(body == bytes.slice(skip..), "wrong bytes");
        assert!(source == "upstream" || source == "disk");
    }
    assert_eq!(upstream.count("GET", "/blobs/"), 1);
    assert_eq!(upstream.sent(), bytes.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_stalled_or_slow_readers_disturb_no_other() {
    let (upstream, dray, image) = rig(Fault::GateAfter(2_000_000)).await;
    let closed = request_blob(&dray, &image).await;
    let stalled = request_blob(&dray, &image).await;
    let mut slow = request_blob(&dray, &image).await;
    let crawl = tokio::spawn(async move {
        let mut byte = [0];
        let mut count = 0u64;
        while count < 20_000 && slow.read(&mut byte).await.is_ok_and(|n| n == 1) {
            count += 1;
        }
        (count, slow)
    });
    dray.wait_for_fill_start().await;
    drop(closed);
    upstream.open_gate();
    let response = dray.get(&path(&image)).await;
    assert!(response.complete && response.body == image.layer().1);
    let (count, _still_open) = crawl.await.unwrap();
    assert_eq!(count, 20_000);
    drop(stalled);
    assert_eq!(upstream.count("GET", "/blobs/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn fill_whose_only_reader_left_still_finishes() {
    let (upstream, dray, image) = rig(Fault::GateAfter(2_000_000)).await;
    let mut only = request_blob(&dray, &image).await;
    let mut some = vec![0; 100_000];
    only.read_exact(&mut some).await.unwrap();
    drop(only);
    upstream.open_gate();
    dray.wait_for_fills().await;
    drop(upstream);
    let response = dray.get(&path(&image)).await;
    assert_eq!((response.status, response.source()), (200, "disk"));
    assert!(response.body == image.layer().1);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_follow_a_growing_fill() {
    let (upstream, dray, image) = rig(Fault::GateAfter(2_000_000)).await;
    let mut reader = request_blob(&dray, &image).await;
    // More than a million bytes arrive while the upstream holds back the rest.
    let mut first = vec![0; 1_000_000];
    tokio::time::timeout(Duration::from_secs(20), reader.read_exact(&mut first)).await.unwrap().unwrap();
    assert_eq!(dray.metric("dray_downloads_in_progress").await, 1);
    upstream.open_gate();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    first.extend(rest);
    let body = first.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert!(first[body..] == image.layer().1[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_dray_finishes_running_pulls() {
    let (upstream, mut dray, image) = rig(Fault::GateAfter(2_000_000)).await;
    let mut reader = request_blob(&dray, &image).await;
    let mut head = [0; 1000];
    reader.read_exact(&mut head).await.unwrap();
    dray.process().signal(rustix::process::Signal::TERM);
    let readyz = format!("http://{}/readyz", dray.admin);
    eventually("the node is not ready", async || {
        let response = client().get(&readyz).send().await;
        response.map_or(true, |response| response.status() == 503).then_some(())
    })
    .await;
    upstream.open_gate();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).await.unwrap();
    let body = head.windows(4).position(|w| w == b"\r\n\r\n").unwrap() + 4;
    assert!([&head[body..], &rest].concat() == image.layer().1[..]);
    assert!(dray.process().wait().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_upstream_takes_only_its_share_of_fills() {
    let image = Image::new(1, &[SIZE]);
    let stuck = TestUpstream::with_handler(|_| {
        dray_tests::upstream::Response::new(200, vec![0; 200_000]).fault(Fault::StallAfter(1000))
    })
    .await;
    let honest = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let rules = [("stuck.example", &stuck), ("docker.io", &honest)].map(|(name, upstream)| rule(name, &upstream.url()));
    let dray = Start::new(rules.concat()).run();
    let mut waiting = JoinSet::new();
    for n in 0..600_u32 {
        let digest = dray_tests::image::digest(&n.to_le_bytes());
        let url = dray.url(&format!("/v2/a/b/blobs/{digest}?ns=stuck.example"));
        waiting.spawn(async move { client().get(url).send().await.map(|response| response.status().as_u16()) });
    }
    let mut refused = 0;
    while refused < 88 {
        let status = waiting.join_next().await.unwrap().unwrap().unwrap();
        assert_eq!(status, 503);
        refused += 1;
    }
    assert!(dray.metric("dray_downloads_in_progress").await <= 512);
    let response = dray.get(&path(&image)).await;
    assert!(response.complete && response.body == image.layer().1);
}
