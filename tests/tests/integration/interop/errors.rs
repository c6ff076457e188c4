//! An error of the upstream is passed on unchanged.

use dray_tests::http::{get, head, send};
use dray_tests::image::Image;
use dray_tests::upstream::{Fault, Response, TestUpstream};
use reqwest::Method;
use serde_json::json;

use super::{FORMS, Form, directly, dray_of, upstream_of};

fn error(code: &str) -> String {
    json!({"errors": [{"code": code, "message": "from the upstream", "detail": {"a": 1}}]}).to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn error_of_upstream_keeps_status_code_and_body() {
    let digest = dray_tests::image::digest(b"nothing");
    let paths = ["manifests/1", "tags/list?n=5000", &format!("referrers/{digest}"), &format!("blobs/{digest}")];
    // Codes that clients branch on: Quay, ECR, cosign, oras.
    let cases = [
        (404, "NAME_UNKNOWN", 404),
        (404, "MANIFEST_UNKNOWN", 404),
        (410, "MANIFEST_UNKNOWN", 410),
        (403, "DENIED", 403),
        (401, "UNAUTHORIZED", 403),
        (406, "MANIFEST_INVALID", 406),
        (413, "TOO_MANY_TAGS_REQUESTED", 413),
        (400, "INVALID_PARAMETER", 400),
        (451, "BLOCKED", 451),
        (500, "INTERNAL", 503),
    ];
    for (status, code, wanted) in cases {
        let upstream = TestUpstream::with_handler(move |_| Response::new(status, error(code))).await;
        let dray = dray_of(&upstream);
        for path in paths {
            let direct = directly(&upstream, path).await;
            for form in FORMS {
                let through = dray.get(&form.path(path)).await;
                assert_eq!((through.status, through.code().as_str()), (wanted, code), "{status} {path} {form:?}");
                assert_eq!(through.body, direct.body, "{status} {path} {form:?}");
                assert!(through.header("retry-after").is_none() && through.header("www-authenticate").is_none());
            }
        }
    }
}

/// dray waits for a registry that cannot be reached, but not for one that responds with an error.
#[tokio::test(flavor = "multi_thread")]
async fn blob_failing_each_time_is_requested_a_few_times() {
    let upstream = TestUpstream::with_handler(|_| Response::new(502, error("BROKEN"))).await;
    let dray = dray_of(&upstream);
    let refused = dray.get(&Form::Path.path(&format!("blobs/{}", dray_tests::image::digest(b"x")))).await;
    assert_eq!((refused.status, refused.code().as_str()), (503, "BROKEN"));
    let requests = upstream.requests().len();
    assert!(requests <= 12, "{requests} upstream requests for one client request");
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_endpoint_with_web_page_means_missing_api() {
    let digest = dray_tests::image::digest(b"image");
    for status in [200, 302] {
        let upstream = TestUpstream::with_handler(move |request| match status {
            302 if request.path.contains("/referrers/") => Response::new(302, "").with("location", "/login"),
            _ => Response::new(200, "<html>log in</html>").with("content-type", "text/html; charset=utf-8"),
        })
        .await;
        let dray = dray_of(&upstream);
        for form in FORMS {
            let through = dray.get(&form.path(&format!("referrers/{digest}"))).await;
            assert_eq!(through.status, 404);
            assert_ne!(through.code(), "NAME_UNKNOWN", "oras takes it for a missing repository");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_404_without_body_is_not_a_missing_repository() {
    let upstream = TestUpstream::with_handler(|_| Response::new(404, "404 page not found")).await;
    let dray = dray_of(&upstream);
    let digest = dray_tests::image::digest(b"image");
    for form in FORMS {
        let referrers = dray.get(&form.path(&format!("referrers/{digest}"))).await;
        assert_eq!((referrers.status, referrers.code().as_str()), (404, "UNSUPPORTED"));
        assert_eq!(dray.get(&form.path("tags/list")).await.code(), "NAME_UNKNOWN");
        assert_eq!(dray.get(&form.path("manifests/1")).await.code(), "MANIFEST_UNKNOWN");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn schema_1_image_gets_404_with_a_reason() {
    let manifest = json!({"schemaVersion": 1, "name": "a/app", "fsLayers": [], "history": [], "signatures": []});
    let bytes = manifest.to_string();
    let upstream = TestUpstream::with_handler(move |_| {
        Response::new(200, bytes.clone())
            .with("content-type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
    })
    .await;
    let dray = dray_of(&upstream);
    for form in FORMS {
        let refused = dray.get(&form.path("manifests/1")).await;
        assert_eq!((refused.status, refused.code().as_str()), (404, "MANIFEST_UNKNOWN"));
        assert!(refused.text().contains("schema 1"), "{}", refused.text());
    }
}

/// Tools that push first look up which content the repository has.
#[tokio::test(flavor = "multi_thread")]
async fn content_of_another_repository_is_requested_upstream() {
    let image = Image::new(1, &[50_000, 400_000]);
    let upstream = upstream_of(&image, |request, response| match request.path.contains("/v2/a/copy/") {
        // This repository has some of the content as well.
        true if request.path.contains("/blobs/") && request.method == "HEAD" => {
            let known = request.path.ends_with("?known");
            if known { response } else { Response::new(404, error("BLOB_UNKNOWN")) }
        }
        _ => response,
    })
    .await;
    let dray = dray_of(&upstream);
    super::pull(&dray, FORMS[0], &image).await;
    dray.wait_for_fills().await;
    let mut contents: Vec<String> = image.blobs.keys().map(|digest| format!("blobs/{digest}")).collect();
    contents.push(format!("manifests/{}", image.digest));
    for below in &contents {
        let cached = head(&dray.url(&format!("/v2/a/app/{below}?ns=reg.example"))).await;
        assert_eq!(cached.status, 200, "{below}");
        for _ in 0..2 {
            let url = dray.url(&format!("/v2/a/other/{below}?ns=reg.example"));
            assert_eq!(head(&url).await.status, 404, "{below} of a repository that does not exist");
            assert_eq!(get(&url, &[]).await.status, 404, "{below}");
        }
    }
    // The same while a blob of another repository is being downloaded.
    let arriving = Image::new(2, &[3_000_000]);
    let held = upstream_of(&arriving, |request, response| match request.path.contains("/v2/a/app/") {
        true if request.method == "GET" => response.fault(Fault::GateAfter(500_000)),
        true => response,
        false => Response::new(404, error("BLOB_UNKNOWN")),
    })
    .await;
    let other_dray = dray_of(&held);
    let (layer, _) = arriving.layer();
    let path = |repository: &str| format!("/v2/a/{repository}/blobs/{layer}?ns=reg.example");
    let other_client = async {
        other_dray.wait_for_fill_start().await;
        assert_eq!(head(&other_dray.url(&path("other"))).await.status, 404);
        held.open_gate();
    };
    let ((), whole) = tokio::join!(other_client, async { other_dray.get(&path("app")).await });
    assert!(whole.complete);
    // With the upstream off, the cache serves.
    drop(upstream);
    for below in &contents {
        let url = dray.url(&format!("/v2/a/third/{below}?ns=reg.example"));
        assert_eq!(send(Method::HEAD, &url, &[]).await.status, 200, "{below}");
        assert_eq!(get(&url, &[]).await.status, 200, "{below}");
    }
}
