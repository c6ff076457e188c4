//! Connections of slow, oversized or misdirected clients, on each listener.

use std::net::SocketAddr;
use std::time::Duration;

use dray_tests::dray::{Dray, Start};
use dray_tests::process::run;
use dray_tests::tls::Authority;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

fn dray() -> Dray {
    Start::new("").run()
}

fn listeners(dray: &Dray) -> [SocketAddr; 2] {
    [dray.registry, dray.admin]
}

/// Sends a piece repeatedly until the connection is closed. Returns everything that was received.
async fn response_until_closed(to: SocketAddr, first: &[u8], then: &[u8], apart: Duration) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(first).await.unwrap();
    let (mut responses, mut requests) = stream.split();
    let sending = async {
        while requests.write_all(then).await.is_ok() {
            sleep(apart).await;
        }
        std::future::pending::<()>().await;
    };
    let mut text = Vec::new();
    let reading = async {
        // Everything received before a reset counts.
        let _ = responses.read_to_end(&mut text).await;
    };
    let ended = async {
        tokio::select! {
            () = sending => {}
            () = reading => {}
        }
    };
    timeout(Duration::from_secs(50), ended).await.expect("the connection ends while bytes still arrive");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn trickling_head_gets_408() {
    let dray = dray();
    let heads = listeners(&dray)
        .map(|to| response_until_closed(to, b"GET / HTTP/1.1\r\nX: ", b"x", Duration::from_millis(200)));
    for text in futures_util::future::join_all(heads).await {
        assert!(text.starts_with("HTTP/1.1 408 "), "{text:?}");
    }
}

/// The response arrives at once; the rest of the request body is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn unwanted_body_is_not_waited_for() {
    let dray = dray();
    let responses = listeners(&dray).map(|to| {
        let request = b"GET /v2/ HTTP/1.1\r\nHost: dray\r\nContent-Length: 1000000\r\n\r\n";
        response_until_closed(to, request, b"x", Duration::from_millis(200))
    });
    for text in futures_util::future::join_all(responses).await {
        assert!(text.starts_with("HTTP/1.1 "), "{text:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_head_gets_431() {
    let dray = dray();
    let line = format!("X: {}\r\n", "x".repeat(8000));
    for to in listeners(&dray) {
        let text =
            response_until_closed(to, b"GET /v2/ HTTP/1.1\r\nHost: dray\r\n", line.as_bytes(), Duration::ZERO).await;
        assert!(text.starts_with("HTTP/1.1 431 "), "{text:?}");
    }
}

/// Runtimes without a configured scheme try TLS first, and switch to plain HTTP because of this response.
#[tokio::test(flavor = "multi_thread")]
async fn tls_on_a_plain_port_gets_400_at_once() {
    let dray = dray();
    for to in listeners(&dray) {
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await.unwrap();
        let mut first = [0; 13];
        // Far below the timeout of a slow head.
        timeout(Duration::from_secs(8), stream.read_exact(&mut first)).await.expect("at once").unwrap();
        assert_eq!(&first, b"HTTP/1.1 400 ");
    }
}

/// HTTP/1.0 clients take the end of the connection for the end of the response.
#[tokio::test(flavor = "multi_thread")]
async fn http_1_0_client_gets_one_response() {
    let dray = dray();
    for to in listeners(&dray) {
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n").await.unwrap();
        let mut text = String::new();
        let ended = timeout(Duration::from_secs(30), stream.read_to_string(&mut text)).await;
        ended.expect("the connection ends").unwrap();
        assert!(text.starts_with("HTTP/1.") && text.contains("\r\n\r\n"), "{text:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_accepts_requests_in_any_pieces() {
    let dray = dray();
    let request = b"\r\nGET /v2/ HTTP/1.1\r\nHost: dray\r\n\r\n";
    let mut stream = TcpStream::connect(dray.registry).await.unwrap();
    for size in [1, 2, 7, request.len()] {
        for piece in request.chunks(size) {
            stream.write_all(piece).await.unwrap();
            stream.flush().await.unwrap();
        }
        let mut text = String::new();
        while !text.ends_with("{}") {
            let mut piece = [0; 4096];
            let count = timeout(Duration::from_secs(30), stream.read(&mut piece)).await.unwrap().unwrap();
            assert!(count > 0, "closed after {text:?}");
            text += &String::from_utf8_lossy(&piece[..count]);
        }
        assert!(text.starts_with("HTTP/1.1 200 "), "{text:?}");
    }
}

/// A missing TLS handshake holds a connection no longer than a missing head.
#[tokio::test(flavor = "multi_thread")]
async fn silent_tls_handshake_is_closed_without_delaying_others() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let files = authority.files(&["localhost"]);
    let tls = format!("[tls]\ncert = \"{}\"\nkey = \"{}\"\n", files.cert.display(), files.key.display());
    let dray = Start::new(tls).run();
    let mut silent = TcpStream::connect(dray.registry).await.unwrap();
    let mut half = TcpStream::connect(dray.registry).await.unwrap();
    // The head of a TLS record that announces a ClientHello.
    half.write_all(&[22, 3, 1, 2, 0]).await.unwrap();
    let url = format!("https://localhost:{}/v2/", dray.registry.port());
    let mut curl = std::process::Command::new("curl");
    curl.args(["-sS", "--fail", "-4", "--noproxy", "*", "--cacert"]).arg(&authority.ca_file).arg(url);
    tokio::task::spawn_blocking(move || run(&mut curl)).await.unwrap();
    for stream in [&mut silent, &mut half] {
        let ended = timeout(Duration::from_secs(30), stream.read_to_end(&mut Vec::new())).await;
        assert!(ended.is_ok(), "the connection is closed");
    }
}
