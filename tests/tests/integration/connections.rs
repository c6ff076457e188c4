//! Connections whose clients are slow, long-winded or in the wrong place, on each listener.

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

/// Sends one piece after the other until the connection is closed, and gives what came back.
async fn answer(to: SocketAddr, first: &[u8], then: &[u8], apart: Duration) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(first).await.unwrap();
    let (mut answers, mut requests) = stream.split();
    let sending = async {
        while requests.write_all(then).await.is_ok() {
            sleep(apart).await;
        }
        std::future::pending::<()>().await;
    };
    let mut text = Vec::new();
    let reading = async {
        // Whatever was said before a reset counts.
        let _ = answers.read_to_end(&mut text).await;
    };
    let ended = async {
        tokio::select! {
            () = sending => {}
            () = reading => {}
        }
    };
    timeout(Duration::from_secs(50), ended).await.expect("the connection ends, though there is always a byte to read");
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_trickles_is_not_waited_for() {
    let dray = dray();
    let heads = listeners(&dray).map(|to| answer(to, b"GET / HTTP/1.1\r\nX: ", b"x", Duration::from_millis(200)));
    for text in futures_util::future::join_all(heads).await {
        assert!(text.starts_with("HTTP/1.1 408 "), "{text:?}");
    }
}

/// The answer is there at once; what comes of the request after it is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_nobody_wants_is_not_waited_for() {
    let dray = dray();
    let asking = listeners(&dray).map(|to| {
        let request = b"GET /v2/ HTTP/1.1\r\nHost: dray\r\nContent-Length: 1000000\r\n\r\n";
        answer(to, request, b"x", Duration::from_millis(200))
    });
    for text in futures_util::future::join_all(asking).await {
        assert!(text.starts_with("HTTP/1.1 "), "{text:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_has_a_greatest_length() {
    let dray = dray();
    let line = format!("X: {}\r\n", "x".repeat(8000));
    for to in listeners(&dray) {
        let text = answer(to, b"GET /v2/ HTTP/1.1\r\nHost: dray\r\n", line.as_bytes(), Duration::ZERO).await;
        assert!(text.starts_with("HTTP/1.1 431 "), "{text:?}");
    }
}

/// Runtimes try TLS first where they are not told, and take plain HTTP from the answer.
#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_tls_to_a_plain_port_is_told_at_once() {
    let dray = dray();
    for to in listeners(&dray) {
        let mut stream = TcpStream::connect(to).await.unwrap();
        stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await.unwrap();
        let mut first = [0; 13];
        // Far below what a head that is only slow gets.
        timeout(Duration::from_secs(8), stream.read_exact(&mut first)).await.expect("at once").unwrap();
        assert_eq!(&first, b"HTTP/1.1 400 ");
    }
}

/// Clients of HTTP/1.0 take the end of the connection for the end of the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_1_0_gets_one_answer() {
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
async fn a_connection_takes_one_request_after_the_other_in_any_pieces() {
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

/// A handshake that does not come holds its place for no longer than a head that does not come.
#[tokio::test(flavor = "multi_thread")]
async fn silent_handshake_is_closed_and_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let files = authority.files(&["localhost"]);
    let tls = format!("[tls]\ncert = \"{}\"\nkey = \"{}\"\n", files.cert.display(), files.key.display());
    let dray = Start::new(tls).run();
    let mut silent = TcpStream::connect(dray.registry).await.unwrap();
    let mut half = TcpStream::connect(dray.registry).await.unwrap();
    // The head of a record that announces a ClientHello.
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
