//! Bytes that match the digest need no other proof: after the manifest, no quirk of a response fails a pull.

use dray_tests::http::head;
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};

use super::{FORMS, dray_of, pull, upstream_of};

/// Pulls through a new dray by each form, from an upstream with one quirk.
async fn tolerates(name: &str, spoil: impl Fn(&Request, Response) -> Response + Send + Sync + Clone + 'static) {
    let image = Image::new(7, &[1_000, 300_000, 3_000_000]);
    for form in FORMS {
        eprintln!("{name} by {form:?}");
        let upstream = upstream_of(&image, spoil.clone()).await;
        let dray = dray_of(&upstream);
        pull(&dray, form, &image).await;
        // A known tag is resolved by HEAD.
        pull(&dray, form, &image).await;
    }
}

fn whole(request: &Request, response: Response, content: &Content) -> Response {
    let mut without_range = request.clone();
    without_range.headers.remove("range");
    if request.is_blob() { content.respond(&without_range) } else { response }
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_without_length_or_ranges_is_cached() {
    let image = Image::new(3, &[1_000, 300_000, 3_000_000]);
    for form in FORMS {
        let content = Content::new(&[("a/app", "1", &image)]);
        // As Harbor up to 2.15 streams content that it is still downloading; its HEAD has no length either.
        let upstream = upstream_of(&image, move |request, response| {
            let is_large = |response: &Response| response.body.len() > 2048;
            let response = whole(request, response, &content);
            if request.is_blob() && is_large(&response) { response.chunked() } else { response }
        })
        .await;
        let dray = dray_of(&upstream);
        pull(&dray, form, &image).await;
        dray.wait_for_fills().await;
        let (layer, bytes) = image.layer();
        let again = dray.get(&form.path(&format!("blobs/{layer}"))).await;
        assert!(again.body == bytes && ["memory", "disk"].contains(&again.source()), "{}", again.source());
        let described = head(&dray.url(&form.path(&format!("blobs/{layer}")))).await;
        assert_eq!(described.header("content-length"), Some(bytes.len().to_string().as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_not_named_by_a_manifest_needs_no_length() {
    let image = Image::new(3, &[1_000, 300_000, 3_000_000]);
    for form in FORMS {
        let content = Content::new(&[("a/app", "1", &image)]);
        let upstream = upstream_of(&image, move |request, response| {
            let response = whole(request, response, &content);
            if request.is_blob() { response.chunked() } else { response }
        })
        .await;
        let dray = dray_of(&upstream);
        for (digest, bytes) in &image.blobs {
            let path = form.path(&format!("blobs/{digest}"));
            let response = dray.get(&path).await;
            assert_eq!((response.status, response.complete), (200, true), "{form:?}: {} bytes", bytes.len());
            assert!(response.body == *bytes);
            dray.wait_for_fills().await;
            assert!(["memory", "disk"].contains(&dray.get(&path).await.source()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_contradict_the_bytes_are_ignored() {
    let other = dray_tests::image::digest(b"other");
    tolerates("another digest", move |_, response| response.with("docker-content-digest", &other)).await;
    tolerates("an invalid digest", |_, response| response.with("docker-content-digest", "\"x\"")).await;
    tolerates("no digest", |_, response| response.without("docker-content-digest")).await;
    tolerates("an encoding", |_, response| response.with("content-encoding", "gzip")).await;
    tolerates("an odd type of blobs", |request, response| match request.is_blob() {
        true => response.with("content-type", "text/html"),
        false => response,
    })
    .await;
    tolerates("the label of a web page", |_, response| response.with("content-type", "text/html")).await;
    tolerates("a charset", |request, response| match request.is_blob() {
        true => response,
        false => {
            let typed =
                response.headers.iter().find(|(name, _)| name == "content-type").map(|(_, value)| value.clone());
            match typed {
                Some(typed) => response.with("content-type", format!("{typed}; charset=utf-8")),
                None => response,
            }
        }
    })
    .await;
    tolerates("many headers", |_, mut response| {
        response.headers.extend((0..150).map(|nth| (format!("x-filler-{nth}"), "x".to_owned())));
        response
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_head_is_only_a_hint() {
    for status in [403, 404, 405, 400, 500, 501] {
        tolerates(&format!("HEAD {status}"), move |request, response| match request.method.as_str() {
            "HEAD" if request.path.contains("/manifests/") => Response::new(status, ""),
            _ => response,
        })
        .await;
    }
    tolerates("HEAD with a page", |request, response| match request.method.as_str() {
        "HEAD" if request.path.contains("/manifests/") => Response::new(200, "").with("content-type", "text/html"),
        _ => response,
    })
    .await;
    // The digest in the HEAD response no longer exists when it is requested.
    let gone = dray_tests::image::digest(b"gone");
    tolerates("HEAD with a digest that is gone", move |request, response| match request.method.as_str() {
        "HEAD" if request.path.contains("/manifests/1") => response.with("docker-content-digest", &gone),
        _ => response,
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_as_by_the_go_client() {
    for (name, location) in [
        ("relative to the path", "../blobs/DIGEST?hop=9"),
        ("relative to the host", "/v2/a/app/blobs/DIGEST?hop=9"),
        ("without a scheme", "//HOST/v2/a/app/blobs/DIGEST?hop=9"),
        ("raw bytes", "/v2/a/app/blobs/DIGEST?hop=9&file=caf\u{e9} x"),
        ("ten hops", "/v2/a/app/blobs/DIGEST?hop=0"),
    ] {
        let image = Image::new(5, &[300_000]);
        let content = Content::new(&[("a/app", "1", &image)]);
        for form in FORMS {
            let (content, location) = (content.clone(), location.to_owned());
            let upstream = TestUpstream::with_handler(move |request| {
                let Some((path, query)) = request.path.split_once('?').filter(|_| request.is_blob()) else {
                    if !request.is_blob() {
                        return content.respond(request);
                    }
                    let digest = request.path.rsplit('/').next().unwrap_or_default();
                    let host = request.header("host").unwrap_or_default();
                    let location = location.replace("DIGEST", digest).replace("HOST", host);
                    return Response::new(307, "").with("location", location);
                };
                let hop: u32 =
                    query.trim_start_matches("hop=").chars().next().and_then(|c| c.to_digit(10)).unwrap_or(9);
                if hop < 8 {
                    return Response::new(302, "").with("location", format!("{path}?hop={}", hop + 1));
                }
                content.respond(request)
            })
            .await;
            eprintln!("{name} by {form:?}");
            pull(&dray_of(&upstream), form, &image).await;
        }
    }
}
