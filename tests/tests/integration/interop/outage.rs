//! In an outage, dray serves lists, referrers and "not found" responses from before.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::{Start, rule};
use dray_tests::eventually;
use dray_tests::image::{MANIFEST, digest};
use dray_tests::upstream::{Fault, Response, TestUpstream};
use serde_json::json;

use super::{FORMS, REGISTRY, dray_of};

#[tokio::test(flavor = "multi_thread")]
async fn list_seen_before_is_served_while_upstream_is_down() {
    let subject = digest(b"image");
    let referrers = json!({"schemaVersion": 2, "manifests": [{"digest": digest(b"signature"), "size": 9}]}).to_string();
    let fallback = format!("manifests/{}", subject.replace(':', "-"));
    let without_api = format!("referrers/{}", digest(b"of a registry without the API"));
    let old = without_api.clone();
    let body = referrers.clone();
    let upstream = TestUpstream::with_handler(move |request| match request.path.contains("/referrers/") {
        true if request.path.contains(&old) => Response::new(404, "404 page not found"),
        true => Response::new(200, body.clone()).with("oci-filters-applied", "artifactType"),
        false if request.path.contains("/tags/list") => Response::new(200, r#"{"name":"a/app","tags":["1"]}"#)
            .with("link", "</v2/a/app/tags/list?n=1&last=1>; rel=\"next\""),
        false => Response::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#),
    })
    .await;
    let dray = dray_of(&upstream);
    for form in FORMS {
        assert_eq!(dray.get(&form.path("tags/list?n=1")).await.status, 200);
        assert_eq!(dray.get(&form.path(&format!("referrers/{subject}?artifactType=a%2Fb"))).await.status, 200);
        assert_eq!(dray.get(&form.path(&fallback)).await.status, 404);
        assert_eq!(dray.get(&form.path(&without_api)).await.status, 404);
    }
    drop(upstream);
    let dray = dray.kill_and_restart();
    for form in FORMS {
        let tags = eventually("the list is served", async || {
            let response = dray.get(&form.path("tags/list?n=1")).await;
            (response.status == 200).then_some(response)
        })
        .await;
        assert_eq!((tags.text().as_str(), tags.source()), (r#"{"name":"a/app","tags":["1"]}"#, "stale"));
        assert!(tags.header("link").unwrap().contains("last=1") && tags.header("age").is_some());
        let kept = dray.get(&form.path(&format!("referrers/{subject}?artifactType=a%2Fb"))).await;
        assert_eq!((kept.status, kept.text()), (200, referrers.clone()));
        assert_eq!(kept.header("oci-filters-applied"), Some("artifactType"));
        let absent = dray.get(&form.path(&without_api)).await;
        assert_eq!(
            (absent.status, absent.code().as_str()),
            (404, "UNSUPPORTED"),
            "the client then looks for the fall-back tag"
        );
        // A known "not found" is repeated; a tag that was never requested is unknown.
        assert_eq!(dray.get(&form.path(&fallback)).await.status, 404);
        assert_eq!(dray.get(&form.path("manifests/never")).await.status, 503);
        assert_eq!(dray.get(&form.path("tags/list?n=2")).await.status, 503);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_in_an_outage_come_from_cached_artifacts() {
    let subject = digest(b"image");
    let artifact = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.dev.cosign.artifact.sig.v1+json",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
        "layers": [], "subject": {"mediaType": MANIFEST, "digest": subject, "size": 5}, "annotations": {"a": "b"},
    })
    .to_string();
    let (bytes, artifact_digest) = (artifact.clone(), digest(artifact.as_bytes()));
    let upstream = TestUpstream::with_handler(move |request| match request.path.contains("/manifests/") {
        true => Response::new(200, bytes.clone()).with("content-type", MANIFEST),
        false => Response::new(404, ""),
    })
    .await;
    let dray = Start::new(rule(REGISTRY, &upstream.url())).run();
    let form = FORMS[0];
    assert_eq!(dray.get(&form.path(&format!("manifests/{artifact_digest}"))).await.status, 200);
    drop(upstream);
    let list = eventually("the list is built", async || {
        let response = dray.get(&form.path(&format!("referrers/{subject}"))).await;
        (response.status == 200).then_some(response)
    })
    .await;
    let list: serde_json::Value = serde_json::from_slice(&list.body).unwrap();
    assert_eq!(list["manifests"][0]["digest"], artifact_digest);
    assert_eq!(list["manifests"][0]["artifactType"], "application/vnd.dev.cosign.artifact.sig.v1+json");
    assert_eq!(list["manifests"][0]["size"], artifact.len());
    let other = dray.get(&form.path(&format!("referrers/{subject}?artifactType=x%2Fy"))).await;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&other.body).unwrap()["manifests"], json!([]));
    assert_eq!(other.header("oci-filters-applied"), Some("artifactType"));
}

/// A registry without the API has a fall-back tag, which is complete; the cached artifacts are not.
#[tokio::test(flavor = "multi_thread")]
async fn missing_referrers_api_stays_missing_in_an_outage() {
    let subject = digest(b"image");
    let artifact = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "a/b",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
        "layers": [], "subject": {"mediaType": MANIFEST, "digest": subject, "size": 5},
    })
    .to_string();
    let bytes = artifact.clone();
    let upstream = TestUpstream::with_handler(move |request| match request.path.contains("/manifests/") {
        true => Response::new(200, bytes.clone()).with("content-type", MANIFEST),
        false => Response::new(404, "404 page not found"),
    })
    .await;
    let dray = Start::new(rule(REGISTRY, &upstream.url())).run();
    let form = FORMS[0];
    let fallback = form.path(&format!("manifests/{}", subject.replace(':', "-")));
    assert_eq!(dray.get(&form.path(&format!("referrers/{subject}"))).await.status, 404);
    assert_eq!(dray.get(&fallback).await.status, 200);
    drop(upstream);
    let response = dray.get(&form.path(&format!("referrers/{subject}"))).await;
    assert_eq!((response.status, response.code().as_str()), (404, "UNSUPPORTED"));
    assert_eq!(dray.get(&fallback).await.status, 200);
}

/// Clients request the lists that they watch repeatedly.
#[tokio::test(flavor = "multi_thread")]
async fn list_requested_often_keeps_its_latest_copy() {
    let pushed = Arc::new(AtomicUsize::new(0));
    let now = pushed.clone();
    let upstream = TestUpstream::with_handler(move |_| {
        let tags: Vec<usize> = (0..=now.load(Ordering::SeqCst)).collect();
        Response::new(200, json!({"tags": tags}).to_string())
    })
    .await;
    let dray = dray_of(&upstream);
    let path = FORMS[0].path("tags/list");
    for _ in 0..80 {
        assert_eq!(dray.get(&path).await.status, 200);
    }
    pushed.store(7, Ordering::SeqCst);
    let last = dray.get(&path).await.text();
    drop(upstream);
    eventually("the latest copy is served", async || {
        let response = dray.get(&path).await;
        (response.source() == "stale" && response.text() == last).then_some(())
    })
    .await;
}

/// A slow upstream must not leave clients with the first copy forever.
#[tokio::test(flavor = "multi_thread")]
async fn list_of_slow_upstream_is_served_stale_and_renewed() {
    let (seen, lists) = (Arc::new(AtomicUsize::new(0)), [r#"{"tags":["1"]}"#, r#"{"tags":["1","2"]}"#]);
    let nth = seen.clone();
    let upstream = TestUpstream::with_handler(move |_| match nth.fetch_add(1, Ordering::SeqCst) {
        0 => Response::new(200, lists[0]),
        _ => Response::new(200, lists[1]).fault(Fault::LateUntilGate),
    })
    .await;
    let dray = dray_of(&upstream);
    let path = FORMS[0].path("tags/list");
    assert_eq!(dray.get(&path).await.text(), lists[0]);
    let meanwhile = dray.get(&path).await;
    assert_eq!((meanwhile.source(), meanwhile.text().as_str()), ("stale", lists[0]));
    let records = dray.start().cache_dir().join("v1/lists");
    let record =
        || std::fs::read(std::fs::read_dir(&records).unwrap().next().unwrap().unwrap().path()).unwrap_or_default();
    let before = record();
    upstream.open_gate();
    eventually("the copy is renewed", async || (record() != before).then_some(())).await;
    drop(upstream);
    assert_eq!(dray.get(&path).await.text(), lists[1]);
}

/// A list that was denied or removed since is not served from the copy.
#[tokio::test(flavor = "multi_thread")]
async fn list_denied_since_is_not_served_in_an_outage() {
    for status in [403, 404] {
        let seen = Arc::new(AtomicUsize::new(0));
        let nth = seen.clone();
        let upstream = TestUpstream::with_handler(move |_| match nth.fetch_add(1, Ordering::SeqCst) {
            0 => Response::new(200, r#"{"tags":["1"]}"#),
            1 => Response::new(status, ""),
            _ => Response::new(503, ""),
        })
        .await;
        let dray = dray_of(&upstream);
        let path = FORMS[1].path("tags/list");
        assert_eq!(dray.get(&path).await.status, 200);
        assert_eq!(dray.get(&path).await.status, status);
        let off = eventually("the copy is gone", async || {
            let response = dray.get(&path).await;
            (response.status != 200).then_some(response)
        })
        .await;
        assert_eq!(off.status, 503);
    }
}

/// The end of a slow response must not restore a list that was denied meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn list_that_ends_after_denial_is_not_cached() {
    let seen = AtomicUsize::new(0);
    let upstream = TestUpstream::with_handler(move |_| match seen.fetch_add(1, Ordering::SeqCst) {
        0 => Response::new(200, r#"{"tags":["1"]}"#).fault(Fault::GateAfter(3)),
        1 => Response::new(403, ""),
        _ => Response::new(503, ""),
    })
    .await;
    let dray = dray_of(&upstream);
    let path = FORMS[1].path("tags/list");
    let denied = async {
        eventually("the first request arrives", async || (upstream.requests().len() == 1).then_some(())).await;
        let denied = dray.get(&path).await;
        upstream.open_gate();
        denied
    };
    let (first, denied) = tokio::join!(dray.get(&path), denied);
    assert_eq!((first.status, first.complete, denied.status), (200, true, 403));
    for _ in 0..20 {
        assert_eq!(dray.get(&path).await.status, 503);
    }
}
