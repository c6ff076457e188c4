//! Several drays: each object is downloaded from its upstream once.

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{get, send};
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::TestUpstream;
use reqwest::Method;

fn cluster(count: usize, registry_rule: &str) -> Vec<Dray> {
    let ports: Vec<u16> = (0..count).map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let start = |port: &u16| {
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{}]\n", members.join(", "));
        Start::new(format!("{registry_rule}\n{peers}")).run()
    };
    ports.iter().map(start).collect()
}

fn paths(image: &Image) -> Vec<String> {
    let manifests = image.manifests.keys().map(|digest| format!("/v2/library/app/manifests/{digest}?ns=docker.io"));
    manifests.chain(image.blobs.keys().map(|digest| format!("/v2/library/app/blobs/{digest}?ns=docker.io"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_download_each_object_once() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let nodes = cluster(3, &rule("docker.io", &upstream.url()));
    let mut from_peers = 0;
    for path in paths(&image) {
        let responses = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
        for response in &responses {
            assert_eq!((response.status, response.complete), (200, true), "{path}");
            assert!(response.body == responses[0].body);
            from_peers += usize::from(response.source() == "peer");
        }
        let object = path.split('?').next().unwrap();
        assert_eq!(upstream.count("GET", object), 1, "{path}");
    }
    let objects = paths(&image).len();
    assert_eq!(from_peers, 2 * objects, "every node but the owner gets it from the owner");
    let received: u64 = futures_util::future::join_all(
        nodes.iter().map(|node| node.metric("dray_peer_bytes_total{from_zone=\"-\",to_zone=\"-\"}")),
    )
    .await
    .iter()
    .sum();
    let sizes = image.blobs.values().map(bytes::Bytes::len).chain(image.manifests.values().map(|(_, b)| b.len()));
    assert_eq!(received, 2 * sizes.sum::<usize>() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_stays_on_the_disk_of_its_owner() {
    let image = Image::new(1, &[2_000_000, 3_000_000, 1_500_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let nodes = cluster(3, &rule("docker.io", &upstream.url()));
    let large: Vec<&String> = image.blobs.iter().filter(|(_, bytes)| bytes.len() > 300_000).map(|(d, _)| d).collect();
    let files = |digest: &str| {
        let name = digest.trim_start_matches("sha256:");
        let file = |node: &Dray| node.start().cache_dir().join(format!("v1/blobs/sha256/{}/{name}", &name[..2]));
        nodes.iter().filter(|node| file(node).exists()).count()
    };
    for digest in large {
        let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
        for _ in 0..2 {
            for node in &nodes {
                assert_eq!(node.get(&path).await.status, 200);
            }
        }
        dray_tests::eventually("the blob is published", async || (files(digest) == 1).then_some(())).await;
        let sources = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
        assert!(sources.iter().all(|response| response.source() == "disk"), "the other nodes keep it for a while");
        assert_eq!(upstream.count("GET", digest), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_owner_is_replaced_by_the_next() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let mut nodes = cluster(3, &rule("docker.io", &upstream.url()));
    nodes[0].process().kill();
    for path in paths(&image) {
        for node in &nodes[1..] {
            let response = node.get(&path).await;
            assert_eq!((response.status, response.complete), (200, true), "{path}");
        }
        let object = path.split('?').next().unwrap();
        assert_eq!(upstream.count("GET", object), 1, "the next owner fetches for all: {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_port_serves_only_what_a_digest_verifies() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let rules = format!(
        "{}[[registry]]\nmatch = \"private.io\"\nupstreams = [\"{}\"]\ncredentials = {{ username = \"u\", password_env = \"HOME\" }}\n\
         [[registry]]\nmatch = \"denied.io\"\ndeny = true\n",
        rule("docker.io", &upstream.url()),
        upstream.url()
    );
    let nodes = cluster(1, &rules);
    let peer = nodes[0].peers.unwrap();
    let (layer, _) = image.layer();
    for (path, status) in [
        (format!("/v2/library/app/blobs/{layer}?ns=docker.io"), 200),
        (format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest), 200),
        ("/v2/library/app/manifests/1?ns=docker.io".to_owned(), 403),
        ("/v2/library/app/tags/list?ns=docker.io".to_owned(), 403),
        (format!("/v2/library/app/blobs/{layer}?ns=private.io"), 504),
        (format!("/v2/library/app/blobs/{layer}?ns=denied.io"), 504),
        (format!("/v2/library/app/blobs/{layer}?ns=127.0.0.1%3A{}", upstream.address.port()), 200),
    ] {
        assert_eq!(get(&format!("http://{peer}{path}"), &[]).await.status, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn service_name_forms_a_cluster() {
    use dray_tests::dns::Dns;
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dns = Dns::start(&[]).await;
    let port = free_port();
    let addresses = ["127.0.0.11", "127.0.0.12", "127.0.0.13"];
    dns.set("dray.example", &addresses);
    let start = |address: &&str| {
        let peers = format!(
            "[dns]\nservers = [\"{}\"]\n[peers]\nlisten = \"{address}:{port}\"\nservice = \"dray.example\"\n",
            dns.address
        );
        Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run()
    };
    let nodes: Vec<Dray> = addresses.iter().map(start).collect();
    for node in &nodes {
        dray_tests::eventually("the nodes list each other", async || {
            (node.metric("dray_peers").await == 3).then_some(())
        })
        .await;
    }
    for path in paths(&image) {
        for node in &nodes {
            assert_eq!(node.get(&path).await.status, 200);
        }
        let object = path.split('?').next().unwrap();
        assert_eq!(upstream.count("GET", object), 1, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_blob_is_not_shared_under_another_registry() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let private = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let public = TestUpstream::with_handler(|_| dray_tests::upstream::Response::new(404, "")).await;
    let rules = format!(
        "{}[[registry]]\nmatch = \"private.io\"\nupstreams = [\"{}\"]\ncredentials = {{ username = \"u\", password_env = \"HOME\" }}\n",
        rule("docker.io", &public.url()),
        private.url()
    );
    let nodes = cluster(1, &rules);
    let peer = nodes[0].peers.unwrap();
    for path in paths(&image) {
        let kept = nodes[0].get(&path.replace("docker.io", "private.io")).await;
        assert_eq!(kept.status, 200);
        nodes[0].wait_for_fills().await;
        assert_eq!(nodes[0].get(&path).await.status, 404, "the other registry does not have it: {path}");
        assert_eq!(get(&format!("http://{peer}{path}"), &[]).await.status, 404, "{path}");
        let without = path.split('?').next().unwrap();
        assert_ne!(get(&format!("http://{peer}{without}"), &[]).await.status, 200, "nor without a namespace: {path}");
    }
}

/// Two of four nodes are frozen, so the next owner may be frozen as well.
#[tokio::test(flavor = "multi_thread")]
async fn frozen_peers_are_waited_for_once() {
    let images: Vec<Image> = (0..4).map(|seed| Image::new(seed, &[2_000_000, 700_000, 1000])).collect();
    let tags: Vec<String> = (0..4).map(|seed| seed.to_string()).collect();
    let content: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&content, |_, r| r).await;
    let mut nodes = cluster(4, &rule("docker.io", &upstream.url()));
    let (frozen, living) = nodes.split_at_mut(2);
    frozen.iter_mut().for_each(|node| node.process().signal(rustix::process::Signal::STOP));
    let pull = async |image: &Image| {
        for path in paths(image) {
            for node in &*living {
                let response = node.get(&path).await;
                assert_eq!((response.status, response.complete), (200, true), "{path}: {}", response.text());
            }
        }
    };
    let failures = async || {
        let name = "dray_peer_requests_total{from_zone=\"-\",outcome=\"error\",to_zone=\"-\"}";
        (living[0].metric(name).await, living[1].metric(name).await)
    };
    pull(&images[0]).await;
    pull(&images[1]).await;
    let detected = failures().await;
    assert!(detected.0 + detected.1 > 0, "a frozen peer was requested");
    pull(&images[2]).await;
    pull(&images[3]).await;
    assert_eq!(failures().await, detected, "a silent peer is not requested again");
    frozen.iter_mut().for_each(|node| node.process().signal(rustix::process::Signal::CONT));
    for node in living {
        dray_tests::eventually("the peers are healthy again", async || {
            let status = get(&format!("http://{}/api/v1/status", node.admin), &[]).await.text();
            let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
            status["peers"].as_array()?.iter().all(|member| member["state"] == "healthy").then_some(())
        })
        .await;
    }
}

/// Whichever peer owns the blob, the slow one or the other.
#[tokio::test(flavor = "multi_thread")]
async fn peer_sending_slowly_is_skipped() {
    let images: Vec<Image> = (0..4).map(|seed| Image::new(seed, &[1_000_000])).collect();
    let tags: Vec<String> = (0..4).map(|seed| seed.to_string()).collect();
    let content: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&content, |_, r| r).await;
    let all = std::sync::Arc::new(dray_tests::upstream::Content::new(&content));
    let slow = TestUpstream::with_handler(move |request| {
        let response = all.respond(request);
        if request.method == "GET" && request.is_blob() {
            return response.fault(dray_tests::upstream::Fault::SlowUntilGate(3000));
        }
        response
    })
    .await;
    let port = free_port();
    let peers =
        format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\", \"{}\"]\n", slow.address);
    let node = Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run();
    let pulls = images.iter().map(async |image| {
        let (digest, bytes) = image.layer();
        let response = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == bytes);
    });
    futures_util::future::join_all(pulls).await;
    assert!(slow.count("GET", "/blobs/") > 0, "the slow peer was requested");
}

/// A HEAD request, or a range at the end of a blob of unknown length.
#[tokio::test(flavor = "multi_thread")]
async fn blob_length_is_requested_upstream_once() {
    let image = Image::new(1, &[1_000_000]);
    let (digest, bytes) = image.layer();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let nodes = cluster(3, &rule("docker.io", &upstream.url()));
    let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
    for node in &nodes {
        let length = send(Method::HEAD, &node.url(&path), &[]).await;
        assert_eq!((length.status, length.header("content-length")), (200, Some(bytes.len().to_string().as_str())));
        let end = node.get_range(&path, "bytes=-1000").await;
        assert_eq!((end.status, end.body.as_ref()), (206, &bytes[bytes.len() - 1000..]));
    }
    assert_eq!(upstream.count("HEAD", digest), 1);
}

/// The owner knows that the start was corrupt. A node that follows it must not complete it either.
#[tokio::test(flavor = "multi_thread")]
async fn corrupt_blob_of_an_owner_is_not_completed_by_a_peer() {
    let image = Image::new(1, &[2_000_000]);
    let (layer, bytes) = image.layer();
    let is_corrupt = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let corrupts = is_corrupt.clone();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, mut response| {
        if request.is_blob() && corrupts.load(std::sync::atomic::Ordering::SeqCst) {
            response = response.flipped(0);
        }
        response
    })
    .await;
    let nodes = cluster(2, &rule("docker.io", &upstream.url()));
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let first = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
    is_corrupt.store(false, std::sync::atomic::Ordering::SeqCst);
    for (node, response) in nodes.iter().zip(first) {
        assert!(!response.complete);
        let resume = node.get_range(&path, &format!("bytes={}-", response.body.len())).await;
        assert!(resume.status == 404 || response.body.is_empty(), "{} after {}", resume.status, response.body.len());
    }
    for node in &nodes {
        let again = node.get(&path).await;
        assert!(again.complete && again.body == bytes);
    }
}

#[test]
fn static_list_without_this_node_fails_the_start() {
    use dray_tests::process::output;
    let start = Start::new("[peers]\nlisten = \"0.0.0.0:5052\"\nstatic = [\"192.0.2.1:5052\"]\n");
    let refused = output(&mut start.command());
    let error = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{error}");
    assert!(error.contains("peers.static"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_different_member_lists_do_not_deadlock() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let ports = [free_port(), free_port()];
    // Each node lists itself and the other under different addresses, so each may select the other as owner.
    let start = |own: usize| {
        let members = format!("\"127.0.0.1:{}\", \"127.0.0.2:{}\"", ports[own], ports[1 - own]);
        let peers = format!("[peers]\nlisten = \"0.0.0.0:{}\"\nstatic = [{members}]\n", ports[own]);
        Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run()
    };
    let nodes = [start(0), start(1)];
    for path in paths(&image) {
        for response in futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await {
            assert_eq!((response.status, response.complete), (200, true), "{path}");
        }
    }
}

/// A peer that is not a dray and sends corrupt blobs.
#[tokio::test(flavor = "multi_thread")]
async fn owner_sending_corrupt_blobs_is_ejected() {
    let images: Vec<Image> = (0..12).map(|seed| Image::new(seed, &[1_000_000])).collect();
    let tags: Vec<String> = (0..12).map(|seed| seed.to_string()).collect();
    let content: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&content, |_, r| r).await;
    let peer_content = std::sync::Arc::new(dray_tests::upstream::Content::new(&content));
    let corrupt_peer = TestUpstream::with_handler(move |request| {
        let mut response = peer_content.respond(request);
        if request.is_blob() && response.body.len() > 1000 {
            response = response.flipped(500);
        }
        response
    })
    .await;
    let port = free_port();
    let peers = format!(
        "[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\", \"{}\"]\n",
        corrupt_peer.address
    );
    let node = Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run();
    let mut corrupt_blobs = 0;
    for image in &images {
        let (digest, bytes) = image.layer();
        let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
        let first = node.get(&path).await;
        if !first.complete {
            corrupt_blobs += 1;
            let again = node.get(&path).await;
            assert!(again.complete && again.body == bytes, "the upstream serves it: {}", again.status);
            assert_eq!(again.source(), "upstream");
            dray_tests::eventually("the corrupt peer is ejected", async || {
                (node.metric("dray_peer_ejections_total").await == 1).then_some(())
            })
            .await;
        } else {
            assert!(first.body == bytes);
        }
        node.wait_for_fills().await;
    }
    assert_eq!(corrupt_blobs, 1, "the peer is used once");
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_corrupt_once_is_served_right_to_others() {
    for size in [40_000_000, 100_000] {
        let image = Image::new(1, &[size]);
        let (digest, bytes) = image.layer();
        let wrong = std::sync::atomic::AtomicBool::new(true);
        let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, mut response| {
            if request.is_blob()
                && request.method == "GET"
                && !response.body.is_empty()
                && wrong.swap(false, std::sync::atomic::Ordering::SeqCst)
            {
                response = response.flipped(50_000);
            }
            response
        })
        .await;
        let nodes = cluster(3, &rule("docker.io", &upstream.url()));
        let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
        let first = nodes[0].get(&path).await;
        assert!(!first.complete || first.status != 200 || first.body == *bytes, "wrong bytes are not sent whole");
        // Nodes that received no wrong byte get the right ones, and so does the first node, from the start.
        for node in [&nodes[1], &nodes[2], &nodes[0]] {
            let response = node.get(&path).await;
            assert_eq!((response.status, response.complete), (200, true), "{size}");
            assert!(response.body == *bytes);
        }
    }
}

/// A node that follows an owner waits as long as the owner does, and sends no upstream request itself.
#[tokio::test(flavor = "multi_thread")]
async fn stalled_upstream_is_not_requested_by_every_node() {
    let image = Image::new(1, &[20_000_000]);
    let (layer, bytes) = image.layer();
    let stalls = std::sync::atomic::AtomicU32::new(2);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, mut response| {
        let less = |left: u32| left.checked_sub(1);
        let order = std::sync::atomic::Ordering::SeqCst;
        if request.is_blob() && request.method == "GET" && stalls.fetch_update(order, order, less).is_ok() {
            response.fault = dray_tests::upstream::Fault::StallAfter(1_000_000);
        }
        response
    })
    .await;
    let nodes = cluster(5, &rule("docker.io", &upstream.url()));
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    for response in futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await {
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == bytes);
    }
    // The number of ranges depends on the speed of each node. But not every node may request the same byte.
    let ranges: Vec<_> = (upstream.requests().iter().filter(|request| request.is_blob()))
        .map(|request| request.range().expect("a range, since the blob is a large one"))
        .collect();
    for start in ranges.iter().map(|range| *range.start()) {
        let often = ranges.iter().filter(|range| range.contains(&start)).count();
        assert!(often < nodes.len(), "byte {start} is requested {often} times: {ranges:?}");
    }
    let sent = upstream.sent();
    assert!(sent <= bytes.len() as u64 * 3 / 2, "{sent} of {}", bytes.len());
}
