//! Repositories of several registries that have the same name, and clients that do not say which one they mean.

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{Answer, get};
use dray_tests::image::Image;
use dray_tests::upstream::TestUpstream;

/// Somebody's registry, one of somebody else who has its layer as well, with wrong bytes, and a Docker Hub without it.
struct Rig {
    real: TestUpstream,
    evil: TestUpstream,
    _hub: TestUpstream,
    dray: Dray,
    image: Image,
    others: Image,
}

impl Rig {
    async fn new() -> Self {
        let (image, others) = (Image::new(1, &[12_000_000]), Image::new(2, &[1000]));
        let real = TestUpstream::start(&[("team/app", "1", &image)], |_, r| r).await;
        let content = [("team/app", "1", &image), ("team/app", "2", &others)];
        let evil =
            TestUpstream::start(&content, |request, response| match request.is_blob() && response.body.len() > 1000 {
                true => response.flipped(500),
                false => response,
            })
            .await;
        let hub = TestUpstream::start(&[], |_, r| r).await;
        let rules =
            [("ghcr.io", &real), ("evil.example", &evil), ("docker.io", &hub)].map(|(name, at)| rule(name, &at.url()));
        let dray = Start::new(rules.concat()).run();
        Self { real, evil, _hub: hub, dray, image, others }
    }

    async fn manifests(&self, registry: &str, image: &Image) {
        for digest in image.manifests.keys() {
            let path = format!("/v2/team/app/manifests/{digest}?ns={registry}");
            assert_eq!(self.dray.get(&path).await.status, 200);
        }
    }

    async fn first_bytes(&self) -> Answer {
        let url = self.dray.url(&format!("/v2/team/app/blobs/{}", self.image.layer().0));
        get(&url, &[("range", "bytes=0-999")]).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_takes_a_name_from_who_served_it_first() {
    let rig = Rig::new().await;
    rig.manifests("ghcr.io", &rig.image).await;
    rig.manifests("evil.example", &rig.others).await;
    let answer = rig.first_bytes().await;
    assert_eq!((answer.status, answer.complete), (206, true));
    assert!(answer.body == rig.image.layer().1[..1000]);
    assert!(rig.real.count("GET", "/blobs/") > 0);
    assert_eq!(rig.dray.metric("dray_fills{state=\"running\"}").await, 0, "a part was enough");
    assert_eq!(rig.evil.count("GET", rig.image.layer().0), 0);
}

/// What the first one has named is forgotten by then: that nobody else is known to have named it says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_takes_a_name_after_a_restart() {
    let mut rig = Rig::new().await;
    rig.manifests("ghcr.io", &rig.image).await;
    assert_eq!(rig.first_bytes().await.status, 206);
    rig.dray = rig.dray.kill_and_restart();
    rig.manifests("evil.example", &rig.image).await;
    let answer = rig.first_bytes().await;
    assert_eq!((answer.status, answer.complete), (206, true));
    assert!(answer.body == rig.image.layer().1[..1000]);
    assert_eq!(rig.evil.count("GET", rig.image.layer().0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_it_may_come_from_several_no_part_is_passed_on_unproven() {
    let rig = Rig::new().await;
    // Both say that it is theirs.
    rig.manifests("evil.example", &rig.image).await;
    rig.manifests("ghcr.io", &rig.image).await;
    let bytes = &rig.image.layer().1[..1000];
    let first = rig.first_bytes().await;
    assert!(rig.evil.count("GET", rig.image.layer().0) > 0, "it came first");
    assert!(first.body.is_empty() && !first.complete, "{} bytes of which nobody knows", first.body.len());
    // Now it is known who lies.
    let again = rig.first_bytes().await;
    assert_eq!((again.status, again.complete), (206, true));
    assert!(again.body == bytes);
}
