//! Members that answer and then send nothing, or that have too much to do: they cost a moment, and no pull.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};

/// Images of one layer each, and the registry that has them.
struct Rig {
    images: Vec<Image>,
    content: Arc<Content>,
    upstream: TestUpstream,
}

impl Rig {
    async fn of(sizes: &[usize]) -> Self {
        let images: Vec<Image> = sizes.iter().zip(0..).map(|(size, seed)| Image::new(seed, &[*size])).collect();
        let tags: Vec<String> = (0..images.len()).map(|nth| nth.to_string()).collect();
        let named: Vec<_> = images.iter().zip(&tags).map(|(image, tag)| ("library/app", tag.as_str(), image)).collect();
        let (content, upstream) = (Arc::new(Content::new(&named)), TestUpstream::start(&named, |_, r| r).await);
        Self { images, content, upstream }
    }

    /// A member that has all of it, and spoils what it is asked for.
    async fn member(&self, spoil: impl Fn(&Request, Response) -> Response + Send + Sync + 'static) -> TestUpstream {
        let content = self.content.clone();
        TestUpstream::answering(move |request| spoil(request, content.answer(request))).await
    }

    /// A dray beside it. `peers` has a place for its own port and one for the member.
    fn node(&self, peers: impl Fn(u16) -> String) -> Dray {
        let port = free_port();
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\n{}\n", peers(port));
        Start::new(format!("{}\n{peers}", rule("docker.io", &self.upstream.url()))).run()
    }

    async fn pull_all(&self, node: &Dray) {
        let pulls = self.images.iter().map(async |image| {
            let (digest, bytes) = image.layer();
            let answer = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
            assert_eq!((answer.status, answer.complete), (200, true), "a blob of {} bytes", bytes.len());
            assert!(answer.body == bytes);
        });
        futures_util::future::join_all(pulls).await;
    }
}

/// As behind a link that loses large packets, or from a disk that hangs. Whatever zones mean.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_sends_heads_only_is_passed_over() {
    let sizes = [100_000, 1_000_000].repeat(6);
    for zoned in [false, true] {
        let rig = Rig::of(&sizes).await;
        let silent = rig
            .member(|request, response| match request.method.as_str() {
                "GET" if request.is_blob() => response.fault(Fault::StallAfter(0)),
                _ => response,
            })
            .await;
        // In its own zone it asks nobody else; whoever is in the other one is not there at all.
        let node = rig.node(|port| match zoned {
            false => format!("static = [\"127.0.0.1:{port}\", \"{}\"]", silent.address),
            true => format!(
                "zone = \"a\"\nstatic = {{ a = [\"127.0.0.1:{port}\", \"{}\"], b = [\"127.0.0.1:1\"] }}",
                silent.address
            ),
        });
        rig.pull_all(&node).await;
        assert!(silent.count("GET", "/blobs/") > 0, "it was believed to be as good as another");
    }
}

/// The same with manifests, of which nobody has the half.
#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_which_only_the_head_comes_is_asked_for_elsewhere() {
    let rig = Rig::of(&[1000; 8]).await;
    let silent = rig
        .member(|request, response| match request.is_blob() {
            false => response.fault(Fault::StallAfter(0)),
            true => response,
        })
        .await;
    let node = rig.node(|port| format!("static = [\"127.0.0.1:{port}\", \"{}\"]", silent.address));
    let pulls = rig.images.iter().map(async |image| {
        let answer = node.get(&format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest)).await;
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == image.manifests[&image.digest].1);
    });
    futures_util::future::join_all(pulls).await;
    assert!(silent.count("GET", "/manifests/") > 0, "it was believed to be as good as another");
}

/// If all who ask it went to the origin, that one would have as much to do.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_with_too_much_to_do_is_asked_again() {
    let rig = Rig::of(&[100_000; 6]).await;
    let refusals = AtomicU32::new(3);
    let busy = rig
        .member(move |request, response| {
            let less = |left: u32| left.checked_sub(1);
            let asked = request.method == "GET" && request.is_blob();
            match asked && refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
                true => Response::new(503, "").with("dray-refusal", "overloaded"),
                false => response,
            }
        })
        .await;
    let node = rig.node(|port| format!("static = [\"127.0.0.1:{port}\", \"{}\"]", busy.address));
    let mut of_busy = 0;
    for image in &rig.images {
        let (digest, _) = image.layer();
        let answer = node.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await;
        assert_eq!((answer.status, answer.complete), (200, true));
        of_busy += usize::from(answer.source() == "peer");
    }
    assert!(of_busy > 0, "it owns none of six");
    assert_eq!(rig.upstream.count("GET", "/blobs/"), rig.images.len() - of_busy, "what it owns comes from it");
}

/// Somebody else may have room; the origin is not asked for it again by each question.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_without_room_says_so_without_asking_the_upstream_again() {
    let image = Image::new(1, &[100_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let port = free_port();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\", \"127.0.0.1:1\"]\n");
    let node = Start::new(format!("{}\n{peers}", rule("docker.io", &upstream.url()))).disk("64MiB").run();
    let url = format!("http://127.0.0.1:{port}/v2/library/app/blobs/{}?ns=docker.io", image.layer().0);
    for _ in 0..5 {
        let asked = dray_tests::http::get(&url, &[("dray-request", "role=global; whole")]).await;
        assert_eq!(
            asked.status,
            504,
            "what cannot be kept is somebody else's: {}",
            String::from_utf8_lossy(&asked.body)
        );
    }
    assert_eq!(upstream.count("GET", "/blobs/"), 1);
    drop(node);
}
