//! One slow, hostile or faulty party does not affect others: meanwhile all other clients are served, from the cache as
//! well.

use std::net::SocketAddr;
use std::time::Duration;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::held_disk::HeldDisk;
use dray_tests::http::get;
use dray_tests::image::{Image, noise};
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

/// Source addresses other than that of the tests' own clients.
const ATTACKERS: [[u8; 4]; 2] = [[127, 0, 0, 2], [127, 0, 0, 3]];

async fn connect(from: [u8; 4], to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    socket.connect(to).await
}

/// Opens this number of connections from each attacker and sends this text.
async fn flood(to: SocketAddr, each: usize, sent: impl Fn(usize) -> String) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for nth in 0..each * ATTACKERS.len() {
        let Ok(mut stream) = connect(ATTACKERS[nth % ATTACKERS.len()], to).await else { continue };
        // dray may close the connection at once.
        let _ = stream.write_all(sent(nth).as_bytes()).await;
        open.push(stream);
    }
    open
}

/// A correct registry that serves an image.
async fn honest(image: &Image) -> (TestUpstream, String) {
    let content = Content::new(&[("a/app", "1", image)]);
    let upstream = TestUpstream::with_handler(move |request| content.respond(request)).await;
    let rule = rule("honest.example", &upstream.url());
    (upstream, rule)
}

/// Pulls the image, then again from the cache.
async fn pull_and_find_cached(dray: &Dray, image: &Image) {
    let path = |below: &str| format!("/v2/a/app/{below}?ns=honest.example");
    assert_eq!(dray.get(&path("manifests/1")).await.body, image.index());
    for (digest, bytes) in &image.blobs {
        let response = dray.get(&path(&format!("blobs/{digest}"))).await;
        assert!(response.status == 200 && response.complete && response.body == *bytes, "{}", response.status);
        eventually("it is cached", async || {
            let again = dray.get(&path(&format!("blobs/{digest}"))).await;
            ["memory", "disk"].contains(&again.source()).then_some(())
        })
        .await;
    }
}

fn digest(nth: usize) -> String {
    format!("sha256:{nth:064x}")
}

/// Two hosts request more blobs than dray downloads at a time, from registries that never respond.
#[tokio::test(flavor = "multi_thread")]
async fn silent_upstreams_leave_room_for_others() {
    let image = Image::new(1, &[400_000, 1_000]);
    let (_upstream, honest_rule) = honest(&image).await;
    let silent = TestUpstream::with_handler(|_| Response::new(200, "").fault(Fault::Silent)).await;
    let rules = (0..4).map(|nth| rule(&format!("silent{nth}.example"), &silent.url())).collect::<String>();
    let dray = Start::new(honest_rule + &rules).run();
    let request = |nth: usize| {
        let (registry, digest) = (nth % 4, digest(nth));
        format!("GET /v2/silent{registry}.example/a/app/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n")
    };
    let waiting = flood(dray.registry, 700, request).await;
    eventually("the attack is running", async || (silent.requests().len() > 300).then_some(())).await;
    pull_and_find_cached(&dray, &image).await;
    drop(waiting);
    pull_and_find_cached(&dray, &Image::new(1, &[400_000, 1_000])).await;
}

/// Blobs that trickle, without a reader.
#[tokio::test(flavor = "multi_thread")]
async fn trickling_upstreams_do_not_end_caching() {
    let image = Image::new(1, &[400_000, 2_000_000]);
    let (upstream, honest_rule) = honest(&image).await;
    let large = noise(1, 31 << 20);
    let trickling = TestUpstream::with_handler(move |request| match request.is_blob() {
        true => Response::new(200, large.clone()).fault(Fault::SlowUntilGate(2_500)),
        false => Response::new(404, ""),
    })
    .await;
    let dray = Start::new(honest_rule + &rule("trickling.example", &trickling.url())).run();
    let request =
        |nth: usize| format!("GET /v2/trickling.example/a/app/blobs/{} HTTP/1.1\r\nHost: x\r\n\r\n", digest(nth));
    drop(flood(dray.registry, 150, request).await);
    eventually("the attack is running", async || (trickling.requests().len() > 100).then_some(())).await;
    pull_and_find_cached(&dray, &image).await;
    for digest in image.blobs.keys() {
        assert_eq!(upstream.count("GET", digest), 1, "{digest} was downloaded more than once");
    }
    // A download at this rate is aborted, even if little is left of it.
    eventually("the downloads are aborted", async || {
        (dray.metric("dray_downloads_in_progress").await == 0).then_some(())
    })
    .await;
}

/// Idle connections, and incomplete heads.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_two_hosts_leave_room_for_others() {
    let image = Image::new(1, &[1_000]);
    let (_upstream, rule) = honest(&image).await;
    let port = dray_tests::process::free_port();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"]\n");
    let dray = Start::new(rule + &peers).run();
    let half = format!("GET /v2/ HTTP/1.1\r\nX: {}", "x".repeat(7_000));
    let ports = [dray.registry, dray.admin, SocketAddr::from(([127, 0, 0, 1], port))];
    for (nth, to) in ports.into_iter().enumerate() {
        let idle = flood(to, 700, |_| String::new()).await;
        let halves = flood(to, 300, |_| half.clone()).await;
        for path in ["/livez", "/readyz", "/metrics"] {
            assert_eq!(get(&format!("http://{}{path}", dray.admin), &[]).await.status, 200, "{nth} {path}");
        }
        assert_eq!(dray.get("/v2/").await.status, 200);
        let peer = get(&format!("http://127.0.0.1:{port}/v2/"), &[]).await;
        assert_ne!(peer.status, 503, "the peer port");
        drop((idle, halves));
    }
    pull_and_find_cached(&dray, &image).await;
}

/// An upstream behind a filter that resets the connection for some paths.
#[tokio::test(flavor = "multi_thread")]
async fn path_resetting_connections_does_not_mark_upstream_down() {
    let image = Image::new(1, &[400_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request| match request.path.contains("/odd/") {
        true => Response::new(200, "x").fault(Fault::ResetAfter(0)),
        false => content.respond(request),
    })
    .await;
    let reset = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let filter = reset.local_addr().unwrap();
    let behind = upstream.address;
    // Resets the connection when it reads such a path, before any response.
    tokio::spawn(async move {
        while let Ok((mut client, _)) = reset.accept().await {
            tokio::spawn(async move {
                let mut head = vec![0; 65_536];
                let Ok(mut server) = TcpStream::connect(behind).await else { return };
                loop {
                    let Ok(count) = client.read(&mut head).await else { return };
                    if count == 0 || String::from_utf8_lossy(&head[..count]).contains("/odd/") {
                        let _ = client.set_zero_linger();
                        return;
                    }
                    if server.write_all(&head[..count]).await.is_err() {
                        return;
                    }
                    let mut response = vec![0; 1 << 20];
                    loop {
                        match tokio::time::timeout(Duration::from_millis(200), server.read(&mut response)).await {
                            Ok(Ok(count)) if count > 0 => {
                                if client.write_all(&response[..count]).await.is_err() {
                                    return;
                                }
                            }
                            Ok(_) => return,
                            Err(_) => break,
                        }
                    }
                }
            });
        }
    });
    let dray = Start::new(rule("honest.example", &format!("http://{filter}"))).run();
    for _ in 0..3 {
        let odd = (0..4).map(|nth| {
            let (dray, path) = (&dray, format!("/v2/odd/app{nth}/manifests/1?ns=honest.example"));
            async move { dray.get(&path).await.status }
        });
        assert!(join_all(odd).await.into_iter().all(|status| status == 503));
        let metrics = get(&format!("http://{}/metrics", dray.admin), &[]).await.text();
        let down = metrics.lines().filter(|line| line.starts_with("dray_upstream_down{") && !line.ends_with(" 0"));
        assert_eq!(down.count(), 0, "{metrics}");
        assert_eq!(dray.get("/v2/a/app/manifests/1?ns=honest.example").await.status, 200);
    }
    pull_and_find_cached(&dray, &image).await;
}

/// An announced length reserves no disk space, and evicts nothing.
#[tokio::test(flavor = "multi_thread")]
async fn announced_length_evicts_nothing() {
    let image = Image::new(1, &[12_000_000, 9_000_000]);
    let (_upstream, honest_rule) = honest(&image).await;
    let lying = TestUpstream::with_handler(|request| match request.is_blob() {
        true => {
            Response::new(200, noise(1, 100_000)).with("content-length", 90_000_000).fault(Fault::StallAfter(100_000))
        }
        false => Response::new(404, ""),
    })
    .await;
    let dray = Start::new(honest_rule + &rule("lying.example", &lying.url())).disk("128MiB").run();
    pull_and_find_cached(&dray, &image).await;
    let taken = dray.metric("dray_cache_bytes{tier=\"large\"}").await;
    let request = |nth: usize| format!("GET /v2/lying.example/a/app/blobs/{} HTTP/1.1\r\nHost: x\r\n\r\n", digest(nth));
    let waiting = flood(dray.registry, 3, request).await;
    eventually("the attack is running", async || (lying.requests().len() >= 6).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(dray.metric("dray_evicted_bytes_total").await, 0);
    let reserved = dray.metric("dray_cache_bytes{tier=\"large\"}").await - taken;
    assert!(reserved <= 6 * (8 << 20) + (1 << 20), "{reserved} bytes for six of 90 MB");
    pull_and_find_cached(&dray, &image).await;
    drop(waiting);
}

/// A hanging disk delays only requests that read from it.
#[tokio::test(flavor = "multi_thread")]
async fn hanging_disk_delays_only_requests_that_read_it() {
    let [served, hanging] = [1, 2].map(|seed| Image::new(seed, &[400_000, 700_000]));
    let content = Content::new(&[("a/app", "1", &served), ("b/app", "1", &hanging)]);
    let upstream = TestUpstream::with_handler(move |request| content.respond(request)).await;
    let dray = Start::new(rule("honest.example", &upstream.url())).run();
    let path = |repository: &str, below: &str| format!("/v2/{repository}/{below}?ns=honest.example");
    for (repository, image) in [("a/app", &served), ("b/app", &hanging)] {
        assert_eq!(dray.get(&path(repository, "manifests/1")).await.status, 200);
        for digest in image.blobs.keys() {
            assert_eq!(dray.get(&path(repository, &format!("blobs/{digest}"))).await.status, 200);
        }
    }
    dray.wait_for_fills().await;
    // The restart clears the memory; then one image is read again.
    let dray = dray.restart();
    assert_eq!(dray.get(&path("a/app", "manifests/1")).await.status, 200);
    let held = HeldDisk::hold(&dray.start().cache_dir().join("v1"));
    let below =
        hanging.blobs.iter().filter(|(_, bytes)| bytes.len() > 300_000).map(|(digest, _)| format!("blobs/{digest}"));
    let waiting: Vec<_> = below
        .chain(["manifests/1".to_owned()])
        .flat_map(|below| {
            let url = dray.url(&path("b/app", &below));
            (0..4).map(move |_| url.clone())
        })
        .map(|url| tokio::spawn(async move { get(&url, &[]).await }))
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    for _ in 0..8 {
        assert_eq!(dray.get("/v2/").await.status, 200);
        assert_eq!(dray.get(&path("a/app", "manifests/1")).await.source(), "memory");
        for path in ["/livez", "/metrics"] {
            assert_eq!(get(&format!("http://{}{path}", dray.admin), &[]).await.status, 200, "{path}");
        }
    }
    assert!(waiting.iter().all(|request| !request.is_finished()), "the requests wait for the disk");
    drop(held);
    for request in waiting {
        let response = request.await.unwrap();
        assert!(response.status == 200 && response.complete, "{}: {}", response.status, response.text());
    }
}
