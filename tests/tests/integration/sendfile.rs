//! Cached blobs are sent by sendfile, and connections are reused, whatever the client does.

use std::fs;
use std::process::Command;
use std::time::Duration;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::tls::Authority;
use dray_tests::upstream::{Content, Fault, TestUpstream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A dray with one cached blob of this size, whose upstream is down.
async fn warm(size: usize) -> (Dray, Image) {
    let image = Image::new(1, &[size]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    assert!(dray.get(&path(&image)).await.complete);
    dray.wait_for_fills().await;
    (dray, image)
}

fn path(image: &Image) -> String {
    format!("/v2/library/app/blobs/{}?ns=docker.io", image.layer().0)
}

async fn send_request(stream: &mut TcpStream, method: &str, image: &Image, more: &str) {
    let request = format!("{method} {} HTTP/1.1\r\nhost: x\r\n{more}\r\n", path(image));
    stream.write_all(request.as_bytes()).await.unwrap();
}

/// A response's head, and its Content-Length.
async fn head(stream: &mut TcpStream) -> (String, usize) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("the connection stays open"));
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap();
    (head, length)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_serves_many_responses() {
    let (dray, image) = warm(3_000_000).await;
    let bytes = image.layer().1;
    let mut stream = TcpStream::connect(dray.registry).await.unwrap();
    for nth in 0..10 {
        send_request(&mut stream, "HEAD", &image, "").await;
        assert_eq!(head(&mut stream).await.1, bytes.len());
        let start = nth * 100_000;
        send_request(&mut stream, "GET", &image, &format!("range: bytes={start}-\r\n")).await;
        let (text, length) = head(&mut stream).await;
        assert!(text.starts_with("http/1.1 206") && text.contains("connection: keep-alive"), "{text}");
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        assert!(body == bytes[start..], "wrong bytes");
    }
    let counted = "dray_requests_total{route=\"blob\",source=\"disk\",status=\"206\"}";
    eventually("all responses are counted", async || (dray.metric(counted).await == 10).then_some(())).await;
    let sent: usize = (0..10).map(|nth| bytes.len() - nth * 100_000).sum();
    assert_eq!(dray.metric("dray_client_bytes_total{source=\"disk\"}").await, sent as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_clients_hold_no_thread() {
    let (dray, image) = warm(3_000_000).await;
    let mut stalled = Vec::new();
    // More than all workers and blocking threads.
    for _ in 0..600 {
        let mut stream = TcpStream::connect(dray.registry).await.unwrap();
        send_request(&mut stream, "GET", &image, "").await;
        stalled.push(stream);
    }
    for stream in &mut stalled {
        head(stream).await;
    }
    let response = tokio::time::timeout(Duration::from_secs(20), dray.get(&path(&image))).await.unwrap();
    assert!(response.complete && response.body == image.layer().1);
    // A client that resumes reading gets the rest.
    let mut last = stalled.pop().unwrap();
    let mut body = vec![0; image.layer().1.len()];
    last.read_exact(&mut body).await.unwrap();
    assert!(body == image.layer().1[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn shrunk_file_closes_the_connection_early() {
    let (dray, image) = warm(40_000_000).await;
    let mut stream = TcpStream::connect(dray.registry).await.unwrap();
    send_request(&mut stream, "GET", &image, "").await;
    let (_, length) = head(&mut stream).await;
    let hex = image.layer().0.strip_prefix("sha256:").unwrap();
    let file = dray.start().cache_dir().join("v1/blobs/sha256").join(&hex[..2]).join(hex);
    std::fs::File::options().write(true).open(file).unwrap().set_len(1000).unwrap();
    let mut body = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut body)).await;
    assert!(ended.is_ok() && body.len() < length, "the connection closes");
    let response = dray.get(&path(&image)).await;
    assert!(response.status != 200 || response.body == image.layer().1, "{}", response.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn client_disconnecting_while_it_waits_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let files = authority.files(&["localhost"]);
    let tls = format!("[tls]\ncert = \"{}\"\nkey = \"{}\"\n", files.cert.display(), files.key.display());
    let image = Image::new(1, &[3_000_000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let upstream =
        TestUpstream::with_handler(move |request| content.respond(request).fault(Fault::GateAfter(1_000_000))).await;
    for (name, config, version) in [("plain", "", "--http1.1"), ("tls", &tls, "--http1.1"), ("h2", &tls, "--http2")] {
        let log = dir.path().join(name);
        let dray = Start::new(config.to_owned() + &rule("docker.io", &upstream.url()))
            .env("DRAY_LOG", "info")
            .log_to(&log)
            .run();
        let scheme = if config.is_empty() { "http" } else { "https" };
        let url = format!("{scheme}://localhost:{}{}", dray.registry.port(), path(&image));
        let mut curl = Command::new("curl")
            .args(["-s", "-4", "-k", "--noproxy", "*", "-o", "/dev/null", version, &url])
            .spawn()
            .unwrap();
        dray.wait_for_fill_start().await;
        curl.kill().unwrap();
        curl.wait().unwrap();
        eventually("the disconnect is logged", async || {
            fs::read_to_string(&log).unwrap().contains("the client disconnected").then_some(())
        })
        .await;
        assert_eq!(dray.metric("dray_downloads_in_progress").await, 1, "{name}: the download continues");
    }
}
