//! Hostile clients: malformed requests fail, no address is reached that no rule allows, and dray's memory stays as it
//! was.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dray_tests::dns::Dns;
use dray_tests::dray::{Dray, Start};
use dray_tests::image::Image;
use dray_tests::upstream::TestUpstream;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Sends bytes and returns the status of the response. None: the connection was closed without a response.
async fn send_raw(dray: &Dray, request: &[u8]) -> Option<u16> {
    let mut stream = TcpStream::connect(&dray.registry).await.unwrap();
    // dray may close the connection before all bytes are sent.
    let _ = stream.write_all(request).await;
    let _ = stream.shutdown().await;
    let mut head = Vec::new();
    let reading = async {
        let mut piece = [0; 4096];
        while head.len() < 12 {
            match stream.read(&mut piece).await {
                Ok(0) | Err(_) => break,
                Ok(count) => head.extend_from_slice(&piece[..count]),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), reading).await.expect("a response, or the end of the connection");
    String::from_utf8_lossy(&head).split_whitespace().nth(1)?.parse().ok()
}

/// Resident memory in bytes.
fn memory(dray: &Dray) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", dray.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A listener that counts connections.
async fn connection_counter() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, connections) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let counted = connections.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    (port, connections)
}

/// Every spelling of an address that clients must not make dray connect to.
#[tokio::test(flavor = "multi_thread")]
async fn private_address_in_any_spelling_is_never_connected() {
    let (port, connections) = connection_counter().await;
    let names = [("rebind.test", "127.0.0.1"), ("metadata.test", "169.254.169.254"), ("inside.test", "10.0.0.1")];
    let dns = Dns::start(&names).await;
    dns.set("six.test", &["::1"]);
    dns.set("mapped.test", &["::ffff:127.0.0.1"]);
    dns.set("mixed.test", &["127.0.0.1", "::1"]);
    let dray = Start::new(format!("[dns]\nservers = [\"{}\"]", dns.address)).run();
    let hosts = [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "0.0.0.0",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[fe80::1%25lo]",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "rebind.test",
        "REBIND.test",
        "rebind.test.",
        "six.test",
        "mapped.test",
        "mixed.test",
        "metadata.test",
        "inside.test",
        "169.254.169.254",
        "[fd00:ec2::254]",
        "10.0.0.1",
        "100.64.0.1",
        "192.168.0.1",
        "172.16.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "[ff02::1]",
        "%31%32%37.0.0.1",
        "127。0。0。1",
        "①②⑦.0.0.1",
        "user@127.0.0.1",
        "user:pass@127.0.0.1",
        "ghcr.io@127.0.0.1",
        "127.0.0.1%00.ghcr.io",
        "127.0.0.1%23.ghcr.io",
        "127.0.0.1%2f.ghcr.io",
        "127.0.0.1\\.ghcr.io",
        "http://127.0.0.1",
        "https://127.0.0.1",
        "file:///etc/passwd",
        "gopher://127.0.0.1",
        "unix:/run/containerd.sock",
        "127.0.0.1/..",
        "127.0.0.1?x=",
        "127.0.0.1#",
    ];
    let digest = Image::new(1, &[1]).digest.clone();
    for host in hosts {
        for port in [String::new(), format!(":{port}")] {
            let encoded: String = url_encode(&format!("{host}{port}"));
            for path in [
                format!("/v2/a/manifests/1?ns={host}{port}"),
                format!("/v2/a/manifests/1?ns={encoded}"),
                format!("/v2/a/blobs/{digest}?ns={encoded}"),
                format!("/v2/a/tags/list?ns={encoded}"),
                format!("/v2/a/referrers/{digest}?ns={encoded}"),
            ] {
                let request = format!("GET {path} HTTP/1.1\r\nHost: dray\r\n\r\n");
                let status = send_raw(&dray, request.as_bytes()).await;
                // Not 503: that status would mean that dray tried to reach the registry.
                assert!(status.is_none_or(|status| (400..500).contains(&status)), "{path}: {status:?}");
            }
            // In a path or a Host, a text that is not a registry means Docker Hub, which cannot be resolved in this
            // test.
            for request in [
                format!("GET /v2/{host}{port}/a/manifests/1 HTTP/1.1\r\nHost: dray\r\n\r\n"),
                format!("GET /v2/a/manifests/1 HTTP/1.1\r\nHost: {host}{port}\r\n\r\n"),
            ] {
                let status = send_raw(&dray, request.as_bytes()).await;
                let is_right = |status| status == 503 || (400..500).contains(&status);
                assert!(status.is_none_or(is_right), "{request}: {status:?}");
            }
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 0, "dray connected to a private address");
}

fn url_encode(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// One valid request with random changes.
fn mutated(random: &mut fastrand::Rng, digest: &str) -> Vec<u8> {
    let methods = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "PRI", "get", ""];
    let paths = [
        "/v2/",
        "/v2",
        "/",
        "*",
        "/v2/library/app/manifests/1",
        "/v2/library/app/blobs/DIGEST",
        "/v2/library/app/tags/list",
        "/v2/library/app/referrers/DIGEST",
        "/v2/docker.io/library/app/manifests/DIGEST",
        "/v2/_catalog",
        "/v2/library/app/blobs/uploads/",
        "/v2/../../etc/passwd",
        "/v2/%2e%2e/%2e%2e/etc/passwd",
        "//v2//library//app",
        "/v2/library/app/manifests/%00",
        "/v2/library/app/manifests/DIGEST?ns=docker.io&ns=ghcr.io",
        "http://x/v2/",
        "/v2/library/app/manifests/1?ns=",
        "/metrics",
        "/v2/library/app/blobs/sha256:",
        "/v2/library/app/blobs/sha512:00",
    ];
    let headers = [
        "Range: bytes=0-",
        "Range: bytes=-1",
        "Range: bytes=5-1",
        "Range: bytes=0-0,1-1,2-2",
        "Range: bytes=18446744073709551615-",
        "Range: lines=1",
        "Accept: */*",
        "Accept: ,,,;q=",
        "Authorization: Bearer x",
        "Authorization: Basic AAAA",
        "Content-Length: 5",
        "Content-Length: -1",
        "Content-Length: 99999999999999999999",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked, identity",
        "Connection: upgrade",
        "Upgrade: h2c",
        "Expect: 100-continue",
        "Host: a",
        "X: \u{1}",
        "dray-request: role=global; peers=127.0.0.1:1",
        "dray-have: 9;0-99+5",
        "Cache-Control: only-if-cached",
        ": empty",
        "no colon",
    ];
    let mut request =
        format!("{} {} HTTP/1.1\r\nHost: dray\r\n", random.choice(methods).unwrap(), random.choice(paths).unwrap());
    for _ in 0..random.usize(0..4) {
        request += &format!("{}\r\n", random.choice(headers).unwrap());
    }
    if random.u8(0..20) == 0 {
        request += &format!("Y: {}\r\n", "y".repeat(random.usize(0..200_000)));
    }
    let mut request = format!("{request}\r\n").replace("DIGEST", digest).into_bytes();
    for _ in 0..random.usize(0..4) {
        if request.is_empty() {
            break;
        }
        let at = random.usize(0..request.len());
        match random.u8(0..4) {
            0 => request[at] = random.u8(..),
            1 => drop(request.remove(at)),
            2 => request.insert(at, random.u8(..)),
            _ => request.truncate(at.max(1)),
        }
    }
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_malformed_requests_leave_no_trace() {
    let image = Image::new(1, &[300_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let config = format!(
        "[access]\nunlisted_registries = \"deny\"\n[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\"]\n",
        upstream.url()
    );
    let dray = Start::new(config).env("DRAY_LOG", "warn").run();
    let mut random = fastrand::Rng::with_seed(20_261_126);
    let send = async |random: &mut fastrand::Rng, count: usize| {
        let requests: Vec<_> = (0..count).map(|_| mutated(random, &image.layers[0])).collect();
        let responses =
            futures_util::stream::iter(&requests).map(async |request| (request, send_raw(&dray, request).await));
        let responses: Vec<_> = responses.buffer_unordered(16).collect().await;
        for (request, response) in responses {
            let text = String::from_utf8_lossy(&request[..request.len().min(300)]).into_owned();
            assert!(response.is_none_or(|status| status < 500), "{response:?} to {text:?}");
        }
    };
    // Threads, pools and caches have reached their size.
    send(&mut random, 1000).await;
    let before = memory(&dray);
    send(&mut random, 10_000).await;
    let grown = memory(&dray).saturating_sub(before);
    assert!(grown <= 16 << 20, "{} KiB more", grown / 1024);
    let whole = dray.get(&format!("/v2/library/app/blobs/{}?ns=docker.io", image.layers[0])).await;
    assert_eq!(whole.status, 200, "{}", whole.text());
    assert!(whole.body == image.blobs[&image.layers[0]], "the cached blob is unchanged");
}

/// A hostile registry that aims at dray's memory: each response leaves data behind.
#[tokio::test(flavor = "multi_thread")]
async fn oversized_upstream_headers_are_not_kept_in_memory() {
    let huge = "x".repeat(300_000);
    let count = AtomicUsize::new(0);
    let registry = TestUpstream::with_handler(move |request| {
        let nth = count.fetch_add(1, Ordering::SeqCst);
        let digits: String = request.path.chars().filter(char::is_ascii_digit).collect();
        match nth % 2 {
            // Neither JSON nor a media type that a client accepts.
            0 => dray_tests::upstream::Response::new(200, digits).with("content-type", format!("a/{huge}")),
            _ => dray_tests::upstream::Response::new(401, "")
                .with("www-authenticate", format!("Bearer realm=\"http://127.0.0.1:1/\",service=\"{huge}\"")),
        }
    })
    .await;
    let dray = Start::with_upstream("reg.test", &registry.url()).run();
    let status_of = async |nth: usize| dray.get(&format!("/v2/r{nth}/manifests/v{nth}?ns=reg.test")).await.status;
    for nth in 0..20 {
        assert!(matches!(status_of(nth).await, 403 | 502), "neither response is usable");
    }
    let before = memory(&dray);
    futures_util::stream::iter(20..620).map(status_of).buffer_unordered(8).collect::<Vec<_>>().await;
    let grown = memory(&dray).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes");
}
