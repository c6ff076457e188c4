//! Peers that send nothing after the head, or are overloaded: each costs a short delay, and no pull fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};

/// Images of one layer each, and their upstream.
struct Rig {
    images: Vec<Image>,
    content: Arc<Content>,
    upstream: TestUpstream,
}

impl Rig {
    async fn new(sizes: &[usize]) -> Self {
        let images: Vec<Image> = sizes.iter().zip(0..).map(|(size, seed)| Image::new(seed, &[*size])).collect();
        let tags: Vec<String> = (0..images.len()).map(|nth| nth.to_string()).collect();
        let named: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
        let (content, upstream) = (Arc::new(Content::new(&named)), TestUpstream::start(&named, |_, r| r).await);
        Self { images, content, upstream }
    }

    /// A peer with all content; `spoil` changes its responses.
    async fn peer(&self, spoil: impl Fn(&Request, Response) -> Response + Send + Sync + 'static) -> TestUpstream {
        let content = self.content.clone();
        TestUpstream::with_handler(move |request| spoil(request, content.respond(request))).await
    }

    /// A dray with this `[peers]` configuration. `peers` receives the dray's own peer port.
    fn node(&self, peers: impl Fn(u16) -> String) -> Dray {
        let port = free_port();
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\n{}\n", peers(port));
        Start::new(format!("{}\n{peers}", rule("docker.io", &self.upstream.url()))).run()
    }

    async fn pull_all(&self, node: &Dray) {
        let pulls = self.images.iter().map(async |image| {
            let (digest, bytes) = image.layer();
            let response = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
            assert_eq!((response.status, response.complete), (200, true), "a blob of {} bytes", bytes.len());
            assert!(response.body == bytes);
        });
        futures_util::future::join_all(pulls).await;
    }
}

/// As behind a link that drops large packets, or with a disk that hangs. In one zone, and in one of two zones.
#[tokio::test(flavor = "multi_thread")]
async fn peer_sending_heads_only_is_skipped() {
    let sizes = [100_000, 1_000_000].repeat(6);
    for zoned in [false, true] {
        let rig = Rig::new(&sizes).await;
        let silent = rig
            .peer(|request, response| match request.method.as_str() {
                "GET" if request.is_blob() => response.fault(Fault::StallAfter(0)),
                _ => response,
            })
            .await;
        // With zones, only the silent peer is in the node's zone; the peer of the other zone is down.
        let node = rig.node(|port| match zoned {
            false => format!("static = [\"127.0.0.1:{port}\", \"{}\"]", silent.address),
            true => format!(
                "zone = \"a\"\nstatic = {{ a = [\"127.0.0.1:{port}\", \"{}\"], b = [\"127.0.0.1:1\"] }}",
                silent.address
            ),
        });
        rig.pull_all(&node).await;
        assert!(silent.count("GET", "/blobs/") > 0, "the silent peer was requested");
    }
}

/// The same with manifests, which cannot be resumed from a part.
#[tokio::test(flavor = "multi_thread")]
async fn manifest_with_head_only_is_requested_elsewhere() {
    let rig = Rig::new(&[1000; 8]).await;
    let silent = rig
        .peer(|request, response| match request.is_blob() {
            false => response.fault(Fault::StallAfter(0)),
            true => response,
        })
        .await;
    let node = rig.node(|port| format!("static = [\"127.0.0.1:{port}\", \"{}\"]", silent.address));
    let pulls = rig.images.iter().map(async |image| {
        let response = node.get(&format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest)).await;
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == image.manifests[&image.digest].1);
    });
    futures_util::future::join_all(pulls).await;
    assert!(silent.count("GET", "/manifests/") > 0, "the silent peer was requested");
}

/// If all peers of an overloaded owner went to the upstream, the upstream would be overloaded instead.
#[tokio::test(flavor = "multi_thread")]
async fn overloaded_owner_is_requested_again() {
    let rig = Rig::new(&[100_000; 6]).await;
    let refusals = AtomicU32::new(3);
    let busy = rig
        .peer(move |request, response| {
            let less = |left: u32| left.checked_sub(1);
            let is_blob_get = request.method == "GET" && request.is_blob();
            match is_blob_get && refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
                true => Response::new(503, "").with("dray-refusal", "overloaded"),
                false => response,
            }
        })
        .await;
    let node = rig.node(|port| format!("static = [\"127.0.0.1:{port}\", \"{}\"]", busy.address));
    let mut from_busy = 0;
    for image in &rig.images {
        let (digest, _) = image.layer();
        let response = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
        assert_eq!((response.status, response.complete), (200, true));
        from_busy += usize::from(response.source() == "peer");
    }
    assert!(from_busy > 0, "the peer owns none of six blobs");
    assert_eq!(
        rig.upstream.count("GET", "/blobs/"),
        rig.images.len() - from_busy,
        "each blob of the owner comes from the owner"
    );
}

/// Another peer may have space. The owner does not request the upstream again for each peer request.
#[tokio::test(flavor = "multi_thread")]
async fn owner_without_space_does_not_repeat_upstream_requests() {
    let image = Image::new(1, &[100_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let port = free_port();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\", \"127.0.0.1:1\"]\n");
    let node = Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).disk("64MiB").run();
    let url = format!("http://127.0.0.1:{port}/v2/library/app/blobs/{}?ns=docker.io", image.layer().0);
    for _ in 0..5 {
        let response = dray_tests::http::get(&url, &[("dray-request", "role=global; whole")]).await;
        assert_eq!(response.status, 504, "an owner without space refuses: {}", String::from_utf8_lossy(&response.body));
    }
    assert_eq!(upstream.count("GET", "/blobs/"), 1);
    drop(node);
}
