//! Repositories with the same name in several registries, and clients that do not name the registry.

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{ClientResponse, get};
use dray_tests::image::Image;
use dray_tests::upstream::TestUpstream;

/// The right registry, another one that has the same layer with corrupt bytes, and a Docker Hub without it.
struct Rig {
    right: TestUpstream,
    corrupt: TestUpstream,
    _hub: TestUpstream,
    dray: Dray,
    image: Image,
    others: Image,
}

impl Rig {
    async fn new() -> Self {
        let (image, others) = (Image::new(1, &[12_000_000]), Image::new(2, &[1000]));
        let right = TestUpstream::start(&[("team/app", "1", &image)], |_, r| r).await;
        let content = [("team/app", "1", &image), ("team/app", "2", &others)];
        let corrupt =
            TestUpstream::start(&content, |request, response| match request.is_blob() && response.body.len() > 1000 {
                true => response.flipped(500),
                false => response,
            })
            .await;
        let hub = TestUpstream::start(&[], |_, r| r).await;
        let rules = [("ghcr.io", &right), ("evil.example", &corrupt), ("docker.io", &hub)]
            .map(|(name, at)| rule(name, &at.url()));
        let dray = Start::new(rules.concat()).run();
        Self { right, corrupt, _hub: hub, dray, image, others }
    }

    async fn manifests(&self, registry: &str, image: &Image) {
        for digest in image.manifests.keys() {
            let path = format!("/v2/team/app/manifests/{digest}?ns={registry}");
            assert_eq!(self.dray.get(&path).await.status, 200);
        }
    }

    async fn first_bytes(&self) -> ClientResponse {
        let url = self.dray.url(&format!("/v2/team/app/blobs/{}", self.image.layer().0));
        get(&url, &[("range", "bytes=0-999")]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_hint_is_not_taken_by_a_later_registry() {
    let rig = Rig::new().await;
    rig.manifests("ghcr.io", &rig.image).await;
    rig.manifests("evil.example", &rig.others).await;
    let response = rig.first_bytes().await;
    assert_eq!((response.status, response.complete), (206, true));
    assert!(response.body == rig.image.layer().1[..1000]);
    assert!(rig.right.count("GET", "/blobs/") > 0);
    assert_eq!(rig.dray.metric("dray_downloads_in_progress").await, 0, "a range was enough");
    assert_eq!(rig.corrupt.count("GET", rig.image.layer().0), 0);
}

/// The restart forgets which digests the first registry's manifests named. That must not make the second registry the
/// only candidate.
#[tokio::test(flavor = "multi_thread")]
async fn repository_hint_is_not_taken_after_a_restart() {
    let mut rig = Rig::new().await;
    rig.manifests("ghcr.io", &rig.image).await;
    assert_eq!(rig.first_bytes().await.status, 206);
    rig.dray = rig.dray.kill_and_restart();
    rig.manifests("evil.example", &rig.image).await;
    let response = rig.first_bytes().await;
    assert_eq!((response.status, response.complete), (206, true));
    assert!(response.body == rig.image.layer().1[..1000]);
    assert_eq!(rig.corrupt.count("GET", rig.image.layer().0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn range_with_several_possible_registries_is_verified_first() {
    let rig = Rig::new().await;
    // Both registries serve the manifests.
    rig.manifests("evil.example", &rig.image).await;
    rig.manifests("ghcr.io", &rig.image).await;
    let bytes = &rig.image.layer().1[..1000];
    let first = rig.first_bytes().await;
    assert!(rig.corrupt.count("GET", rig.image.layer().0) > 0, "the corrupt registry is requested first");
    assert!(first.body.is_empty() && !first.complete, "{} unverified bytes", first.body.len());
    // Now the corrupt registry is known.
    let again = rig.first_bytes().await;
    assert_eq!((again.status, again.complete), (206, true));
    assert!(again.body == bytes);
}
