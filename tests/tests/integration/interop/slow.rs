//! Timeouts apply to client requests: a slow upstream is requested once, and its response serves the next client.

use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Fault, Request, TestUpstream};

use super::{Form, dray_of, upstream_of};

/// Clients with a fall-back get an error after ten seconds. The upstream starts later, when the gate opens.
#[tokio::test(flavor = "multi_thread")]
async fn slow_upstream_is_requested_once_for_all_clients() {
    let image = Image::new(1, &[400_000]);
    let upstream = upstream_of(&image, |_, response| response.fault(Fault::LateUntilGate)).await;
    let dray = dray_of(&upstream);
    let (layer, bytes) = image.layer();
    let manifest = format!("manifests/{}", image.digest);
    let blob = format!("blobs/{layer}");
    let by_namespace = async {
        for refused in futures_util::future::join_all(
            ["manifests/1", &manifest, &blob].map(|below| dray_get(&dray, Form::Namespace.path(below))),
        )
        .await
        {
            assert_eq!(refused.status, 503, "{}", refused.text());
            assert!(refused.header("retry-after").is_none());
        }
        // Clients with a fall-back have their error; clients without one still wait.
        upstream.open_gate();
    };
    let by_path = async {
        let [tag, index, layer] =
            ["manifests/1", &manifest, &blob].map(|below| dray_get(&dray, Form::Path.path(below)));
        let (tag, index, layer) = tokio::join!(tag, index, layer);
        assert_eq!((tag.status, &tag.body), (200, image.index()), "{}", tag.text());
        assert_eq!((index.status, &index.body), (200, image.index()));
        assert_eq!((layer.status, layer.complete), (200, true));
        assert!(layer.body == bytes);
    };
    tokio::join!(by_namespace, by_path);
    for below in ["/manifests/1", &format!("/{manifest}"), &format!("/{blob}")] {
        assert_eq!(upstream.count("GET", below), 1, "{below} was requested more than once");
    }
    let kept = eventually("it is cached", async || {
        let response = dray.get(&Form::Namespace.path(&blob)).await;
        ["memory", "disk"].contains(&response.source()).then_some(response)
    })
    .await;
    assert!(kept.body == bytes);
    assert_eq!(dray.get(&Form::Namespace.path(&manifest)).await.source(), "memory");
}

/// An upstream that ignores ranges cannot be resumed on another connection. So dray waits for a paused response, of a
/// small and of a large blob.
#[tokio::test(flavor = "multi_thread")]
async fn paused_upstream_without_ranges_is_waited_for() {
    let image = Image::new(1, &[200_000, 3_000_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request| {
        let whole = Request { headers: Default::default(), ..request.clone() };
        let response = content.respond(&whole);
        if response.body.len() > 100_000 { response.fault(Fault::GateAfter(100_000)) } else { response }
    })
    .await;
    let dray = dray_of(&upstream);
    let pulls = image.blobs.iter().map(async |(digest, bytes)| {
        let response = dray_get(&dray, Form::Path.path(&format!("blobs/{digest}"))).await;
        assert!(response.status == 200 && response.complete && response.body == *bytes);
    });
    let opened = async {
        let all = image.blobs.len();
        eventually("all are requested", async || (upstream.count("GET", "/blobs/") >= all).then_some(())).await;
        // Longer than a resumable connection may pause.
        tokio::time::sleep(std::time::Duration::from_secs(12)).await;
        upstream.open_gate();
    };
    tokio::join!(futures_util::future::join_all(pulls), opened);
    for digest in image.blobs.keys() {
        assert_eq!(upstream.count("GET", digest), 1, "{digest} was requested more than once");
    }
}

async fn dray_get(dray: &dray_tests::dray::Dray, path: String) -> dray_tests::http::ClientResponse {
    dray.get(&path).await
}
