//! Several drays: each object leaves its origin once.

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
async fn three_nodes_and_one_fetch_of_each_object() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let nodes = cluster(3, &rule("docker.io", &upstream.url()));
    let mut peer_answers = 0;
    for path in paths(&image) {
        let answers = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
        for answer in &answers {
            assert_eq!((answer.status, answer.complete), (200, true), "{path}");
            assert!(answer.body == answers[0].body);
            peer_answers += usize::from(answer.source() == "peer");
        }
        let object = path.split('?').next().unwrap();
        assert_eq!(upstream.count("GET", object), 1, "{path}");
    }
    let objects = paths(&image).len();
    assert_eq!(peer_answers, 2 * objects, "every node but the owner got it from the owner");
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
async fn a_blob_stays_on_the_disk_of_its_owner() {
    let image = Image::new(1, &[2_000_000, 3_000_000, 1_500_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let nodes = cluster(3, &rule("docker.io", &upstream.url()));
    let large: Vec<&String> = image.blobs.iter().filter(|(_, bytes)| bytes.len() > 300_000).map(|(d, _)| d).collect();
    let files = |digest: &str| {
        let name = digest.trim_start_matches("sha256:");
        let place = |node: &Dray| node.start().cache_dir().join(format!("v1/blobs/sha256/{}/{name}", &name[..2]));
        nodes.iter().filter(|node| place(node).exists()).count()
    };
    for digest in large {
        let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
        for _ in 0..2 {
            for node in &nodes {
                assert_eq!(node.get(&path).await.status, 200);
            }
        }
        dray_tests::eventually("it has its name", async || (files(digest) == 1).then_some(())).await;
        let sources = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
        assert!(sources.iter().all(|answer| answer.source() == "disk"), "the others have it for a while");
        assert_eq!(upstream.count("GET", digest), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_owner_costs_nothing_but_its_share() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let mut nodes = cluster(3, &rule("docker.io", &upstream.url()));
    nodes[0].process().kill();
    for path in paths(&image) {
        for node in &nodes[1..] {
            let answer = node.get(&path).await;
            assert_eq!((answer.status, answer.complete), (200, true), "{path}");
        }
        let object = path.split('?').next().unwrap();
        assert_eq!(upstream.count("GET", object), 1, "the next owner fetches for all: {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_peer_port_gives_only_what_a_digest_proves() {
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
async fn a_name_is_enough_to_form_a_cluster() {
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
        dray_tests::eventually("they know each other", async || (node.metric("dray_peers").await == 3).then_some(()))
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
async fn what_came_with_credentials_is_not_shared_under_another_name() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let private = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let public = TestUpstream::answering(|_| dray_tests::upstream::Response::new(404, "")).await;
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
        nodes[0].fills_end().await;
        assert_eq!(nodes[0].get(&path).await.status, 404, "the other registry does not have it: {path}");
        assert_eq!(get(&format!("http://{peer}{path}"), &[]).await.status, 404, "{path}");
        let without = path.split('?').next().unwrap();
        assert_ne!(get(&format!("http://{peer}{without}"), &[]).await.status, 200, "nor where it was learned: {path}");
    }
}

/// Two of four: whoever comes next may be frozen as well.
#[tokio::test(flavor = "multi_thread")]
async fn frozen_nodes_cost_a_moment_once() {
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
                let answer = node.get(&path).await;
                assert_eq!((answer.status, answer.complete), (200, true), "{path}: {}", answer.text());
            }
        }
    };
    let in_vain = async || {
        let name = "dray_peer_requests_total{from_zone=\"-\",outcome=\"failed\",to_zone=\"-\"}";
        (living[0].metric(name).await, living[1].metric(name).await)
    };
    pull(&images[0]).await;
    pull(&images[1]).await;
    let found_out = in_vain().await;
    assert!(found_out.0 + found_out.1 > 0, "somebody was asked");
    pull(&images[2]).await;
    pull(&images[3]).await;
    assert_eq!(in_vain().await, found_out, "who is silent is not asked again");
    frozen.iter_mut().for_each(|node| node.process().signal(rustix::process::Signal::CONT));
    for node in living {
        dray_tests::eventually("it is known that they are back", async || {
            let status = get(&format!("http://{}/api/v1/status", node.admin), &[]).await.text();
            let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
            status["peers"].as_array()?.iter().all(|member| member["is_well"] == true).then_some(())
        })
        .await;
    }
}

/// Whatever owns the blob, the one that hardly sends it or the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_hardly_sends_what_it_has_is_passed_over() {
    let images: Vec<Image> = (0..4).map(|seed| Image::new(seed, &[1_000_000])).collect();
    let tags: Vec<String> = (0..4).map(|seed| seed.to_string()).collect();
    let content: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&content, |_, r| r).await;
    let all = std::sync::Arc::new(dray_tests::upstream::Content::new(&content));
    let slow = TestUpstream::answering(move |request| {
        let response = all.answer(request);
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
        let answer = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == bytes);
    });
    futures_util::future::join_all(pulls).await;
    assert!(slow.count("GET", "/blobs/") > 0, "it was believed to be as good as another");
}

/// A HEAD, or the end of a blob whose length nobody has said yet.
#[tokio::test(flavor = "multi_thread")]
async fn how_long_a_blob_is_the_upstream_is_asked_once() {
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

/// The owner knows that a beginning was wrong; who follows it must not complete it either.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_an_owner_are_not_completed_by_a_follower() {
    let image = Image::new(1, &[2_000_000]);
    let (layer, bytes) = image.layer();
    let lie = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let lying = lie.clone();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, mut response| {
        if request.is_blob() && lying.load(std::sync::atomic::Ordering::SeqCst) {
            response = response.flipped(0);
        }
        response
    })
    .await;
    let nodes = cluster(2, &rule("docker.io", &upstream.url()));
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let first = futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await;
    lie.store(false, std::sync::atomic::Ordering::SeqCst);
    for (node, answer) in nodes.iter().zip(first) {
        assert!(!answer.complete);
        let resume = node.get_range(&path, &format!("bytes={}-", answer.body.len())).await;
        assert!(resume.status == 404 || answer.body.is_empty(), "{} after {}", resume.status, answer.body.len());
    }
    for node in &nodes {
        let again = node.get(&path).await;
        assert!(again.complete && again.body == bytes);
    }
}

#[test]
fn a_list_without_this_node_is_refused() {
    use dray_tests::process::output;
    let start = Start::new("[peers]\nlisten = \"0.0.0.0:5052\"\nstatic = [\"192.0.2.1:5052\"]\n");
    let refused = output(&mut start.command());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("peers.static"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_disagree_never_wait_for_each_other() {
    let image = Image::new(1, &[2_000_000, 700_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let ports = [free_port(), free_port()];
    // Each knows itself by another address than the other does, so each may take the other for the owner.
    let start = |own: usize| {
        let members = format!("\"127.0.0.1:{}\", \"127.0.0.2:{}\"", ports[own], ports[1 - own]);
        let peers = format!("[peers]\nlisten = \"0.0.0.0:{}\"\nstatic = [{members}]\n", ports[own]);
        Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run()
    };
    let nodes = [start(0), start(1)];
    for path in paths(&image) {
        for answer in futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await {
            assert_eq!((answer.status, answer.complete), (200, true), "{path}");
        }
    }
}

/// A member that is no dray and lies about everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_lying_owner_is_found_out_and_left_alone() {
    let images: Vec<Image> = (0..12).map(|seed| Image::new(seed, &[1_000_000])).collect();
    let tags: Vec<String> = (0..12).map(|seed| seed.to_string()).collect();
    let content: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&content, |_, r| r).await;
    let lies = std::sync::Arc::new(dray_tests::upstream::Content::new(&content));
    let liar = TestUpstream::answering(move |request| {
        let mut response = lies.answer(request);
        if request.is_blob() && response.body.len() > 1000 {
            response = response.flipped(500);
        }
        response
    })
    .await;
    let port = free_port();
    let peers =
        format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\", \"{}\"]\n", liar.address);
    let node = Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).run();
    let mut lied = 0;
    for image in &images {
        let (digest, bytes) = image.layer();
        let path = format!("/v2/library/app/blobs/{digest}?ns=docker.io");
        let first = node.get(&path).await;
        if !first.complete {
            lied += 1;
            let again = node.get(&path).await;
            assert!(again.complete && again.body == bytes, "the origin has it: {}", again.status);
            assert_eq!(again.source(), "origin");
            dray_tests::eventually("the liar is found out", async || {
                (node.metric("dray_peers_shut_out_total").await == 1).then_some(())
            })
            .await;
        } else {
            assert!(first.body == bytes);
        }
        node.fills_end().await;
    }
    assert_eq!(lied, 1, "it is believed once");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_wrong_once_is_not_wrong_for_everybody() {
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
        assert!(!first.complete || first.status != 200 || first.body == *bytes, "wrong bytes do not pass");
        // Nodes that never saw a wrong byte get the right ones, and so does the first, from its start.
        for node in [&nodes[1], &nodes[2], &nodes[0]] {
            let answer = node.get(&path).await;
            assert_eq!((answer.status, answer.complete), (200, true), "{size}");
            assert!(answer.body == *bytes);
        }
    }
}

/// Who follows an owner waits as long as that one does, and does not go to the origin itself.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_stalls_is_not_asked_by_everybody() {
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
    for answer in futures_util::future::join_all(nodes.iter().map(|node| node.get(&path))).await {
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == bytes);
    }
    // How many ranges the blob is requested in depends on how fast each node is. What must not be: that every node
    // requests the same byte.
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
