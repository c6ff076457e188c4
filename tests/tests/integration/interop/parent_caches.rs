//! Parent caches: a dray beside the clients, and another cache in front of the registry.

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::head;
use dray_tests::image::{Image, digest};
use dray_tests::registry::Registry;

use super::{FORMS, REGISTRY, pull, upstream_of};

/// A dray with one rule for every registry.
fn child_of(upstreams: &[&str]) -> Dray {
    let upstreams: Vec<String> = upstreams.iter().map(|upstream| format!("\"{upstream}\"")).collect();
    let upstreams = upstreams.join(", ");
    Start::new(format!("[[registry]]\nmatch = \"*\"\nupstreams = [{upstreams}]\ntag_ttl = \"0s\"\n")).run()
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_through_parent_dray_is_requested_once() {
    for naming in ["/{registry}/{repo}", "?ns={registry}"] {
        let image = Image::new(9, &[1_000, 300_000, 5_000_000]);
        let upstream = upstream_of(&image, |_, response| response).await;
        let parent = Start::new(rule(REGISTRY, &upstream.url())).run();
        let to_parent = format!("http://{}{naming}", parent.registry);
        let children = [child_of(&[&to_parent, &upstream.url()]), child_of(&[&to_parent])];
        for child in &children {
            for form in FORMS {
                pull(child, form, &image).await;
            }
            let (layer, bytes) = image.layer();
            let part = child.get_range(&FORMS[1].path(&format!("blobs/{layer}")), "bytes=100-199").await;
            assert_eq!((part.status, &part.body[..]), (206, &bytes[100..200]));
            let described = head(&child.url(&FORMS[0].path(&format!("blobs/{layer}")))).await;
            assert_eq!(described.header("content-length"), Some(bytes.len().to_string().as_str()));
            let missing = child.get(&FORMS[0].path("manifests/none")).await;
            assert_eq!(
                (missing.status, missing.code().as_str()),
                (404, "NAME_UNKNOWN"),
                "the registry's own error, through both caches"
            );
            let referrers = child.get(&FORMS[0].path(&format!("referrers/{}", digest(b"x")))).await;
            assert_eq!(referrers.status, 404);
        }
        let bytes: usize = image.blobs.values().map(bytes::Bytes::len).sum();
        assert!(upstream.sent() < bytes as u64 * 11 / 10, "{naming}: {} of {bytes} bytes", upstream.sent());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_with_parent_down_still_serves() {
    let image = Image::new(10, &[400_000]);
    let upstream = upstream_of(&image, |_, response| response).await;
    let child = child_of(&["http://127.0.0.1:1/{registry}/{repo}", &upstream.url()]);
    for form in FORMS {
        pull(&child, form, &image).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_registry_works_as_a_parent() {
    let image = Image::new(11, &[1_000, 400_000]);
    let upstream = Registry::open().await;
    upstream.push("a/app", "1", &image).await;
    let parent = Registry::with(&format!("http: {{addr: ADDR}}\nproxy: {{remoteurl: \"{}\"}}\n", upstream.url())).await;
    let child = child_of(&[&parent.url()]);
    for form in FORMS {
        pull(&child, form, &image).await;
    }
}
