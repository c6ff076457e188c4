//! Faults of upstreams and what clients receive: the right bytes, or a clean error.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{ClientResponse, get, head};
use dray_tests::image::{Image, noise};
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};

/// One layer of 2 MB behind an upstream whose blob responses are changed. The number counts the blob requests before.
async fn rig(
    spoil: impl Fn(usize, &Request, Response) -> Response + Send + Sync + 'static,
) -> (TestUpstream, Dray, Image) {
    let image = Image::new(1, &[2_000_000]);
    let count = AtomicUsize::new(0);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
        if request.is_blob() && request.method == "GET" {
            spoil(count.fetch_add(1, Ordering::SeqCst), request, response)
        } else {
            response
        }
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    (upstream, dray, image)
}

fn blob_path(image: &Image) -> String {
    format!("/v2/library/app/blobs/{}?ns=docker.io", image.layer().0)
}

async fn pull(dray: &Dray, image: &Image) -> ClientResponse {
    dray.get(&blob_path(image)).await
}

/// The range by which a client resumes. A reset may have taken all bytes that were on the way.
fn rest_after(response: &ClientResponse) -> String {
    format!("bytes={}-", response.body.len().max(1))
}

/// The client must not notice the fault.
fn assert_right(response: &ClientResponse, image: &Image) {
    assert_eq!((response.status, response.complete), (200, true));
    assert!(response.body == image.layer().1, "wrong bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_body_is_resumed_unnoticed() {
    for fault in [Fault::CutAfter(700_000), Fault::ResetAfter(700_000), Fault::CutAfter(0)] {
        let (upstream, dray, image) = rig(move |nth, _, response| match nth {
            0 | 1 => response.fault(fault),
            _ => response,
        })
        .await;
        assert_right(&pull(&dray, &image).await, &image);
        let starts: Vec<_> = upstream.requests().iter().filter(|r| r.is_blob()).map(Request::range_start).collect();
        assert_eq!(starts.len(), 3, "{fault:?}: {starts:?}");
        let by_range = starts[1..].iter().any(Option::is_some);
        assert_eq!(by_range, fault != Fault::CutAfter(0), "{fault:?}: {starts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_upstream_is_reconnected() {
    let (_upstream, dray, image) = rig(|nth, _, response| match nth {
        0 => response.fault(Fault::StallAfter(700_000)),
        _ => response,
    })
    .await;
    assert_right(&pull(&dray, &image).await, &image);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_without_ranges_is_read_again_and_skipped() {
    let whole = Image::new(1, &[2_000_000]);
    let content = Content::new(&[("library/app", "1", &whole)]);
    let (_upstream, dray, image) = rig(move |nth, request, _| {
        let plain = Request { headers: Default::default(), ..request.clone() };
        let response = content.respond(&plain);
        if nth == 0 { response.fault(Fault::CutAfter(900_000)) } else { response }
    })
    .await;
    assert_right(&pull(&dray, &image).await, &image);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_range_is_not_trusted() {
    let (_upstream, dray, image) = rig(|nth, request, response| match (nth, request.range_start()) {
        (0, _) => response.fault(Fault::CutAfter(900_000)),
        // 206, but for bytes that were not requested.
        (1, Some(start)) => {
            let (total, body) = (response.body.len() + start, response.body.clone());
            let range = format!("bytes {}-{}/{total}", start - 5, total - 6);
            Response { body, ..response }.with("content-range", range)
        }
        (2, Some(_)) => response.without("content-range"),
        _ => response,
    })
    .await;
    assert_right(&pull(&dray, &image).await, &image);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_blob_is_never_sent_whole() {
    let (_upstream, dray, image) = rig(|_, _, response| {
        let last = response.body.len() - 1;
        response.flipped(last / 2)
    })
    .await;
    let response = pull(&dray, &image).await;
    assert!(!response.complete, "the connection closes early");
    assert!(
        response.body.len() + 64 * 1024 <= image.layer().1.len(),
        "the tail is withheld until the digest is verified"
    );
    let resume = get(&dray.url(&blob_path(&image)), &[("range", "bytes=1000-")]).await;
    assert_eq!((resume.status, resume.code().as_str()), (404, "BLOB_UNKNOWN"));
    assert!(dray.metric("dray_digest_mismatches_total").await >= 1);
    let config = image.blobs.iter().find(|(_, bytes)| bytes.len() < 1000).unwrap();
    let small = dray.get(&format!("/v2/library/app/blobs/{}?ns=docker.io", config.0)).await;
    assert_eq!((small.status, small.body.is_empty()), (502, false), "a small object is verified before its first byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_start_is_never_completed_by_a_right_end() {
    let (_upstream, dray, image) = rig(|nth, _, response| {
        let mut bytes = response.body.to_vec();
        bytes[500] ^= u8::from(nth == 0);
        Response { body: bytes.into(), ..response }
    })
    .await;
    let first = pull(&dray, &image).await;
    assert!(!first.complete);
    assert_right(&pull(&dray, &image).await, &image);
    // The blob is cached and verified now, but a client that resumes may have the corrupt start.
    let resume = get(&dray.url(&blob_path(&image)), &[("range", &rest_after(&first))]).await;
    assert_eq!(resume.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_start_without_namespace_is_not_completed() {
    let image = Image::new(1, &[2_000_000]);
    let upstream = TestUpstream::start(&[("team/app", "1", &image)], |request, response| match request.is_blob() {
        true => response.flipped(0),
        false => response,
    })
    .await;
    let hub = TestUpstream::with_handler(|_| Response::new(404, "")).await;
    let dray = Start::new([rule("ghcr.io", &upstream.url()), rule("docker.io", &hub.url())].concat()).run();
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=ghcr.io").await.status, 200);
    let path = format!("/v2/team/app/blobs/{}", image.layer().0);
    let first = dray.get(&path).await;
    assert!(!first.complete && !first.body.is_empty());
    assert_eq!(dray.get_range(&path, &rest_after(&first)).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_registry_does_not_affect_another() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let honest = TestUpstream::start(&[("team/app", "1", &image)], |_, r| r).await;
    let corrupt = TestUpstream::start(&[("team/app", "1", &image)], |request, response| match request.is_blob() {
        // Large blobs are corrupt, small ones stall.
        true if response.body.len() > 1_000_000 => {
            Response { body: vec![0; response.body.len()].into(), ..response }.fault(Fault::GateAfter(1_000_000))
        }
        true => response.fault(Fault::StallAfter(10)),
        false => response.with("content-type", "text/plain"),
    })
    .await;
    let rules = [rule("good.example", &honest.url()), rule("evil.example", &corrupt.url())].concat();
    let dray = Start::new(rules).run();
    let path = |digest: &str, ns: &str| format!("/v2/team/app/blobs/{digest}?ns={ns}");
    for digest in &image.layers {
        let spoiled = dray.url(&path(digest, "evil.example"));
        let waiting = tokio::spawn(async move { get(&spoiled, &[]).await });
        dray_tests::eventually("the corrupt download runs", async || (corrupt.count("GET", digest) > 0).then_some(()))
            .await;
        let response = dray.get(&path(digest, "good.example")).await;
        assert!(response.complete && response.body == image.blobs[digest]);
        corrupt.open_gate();
        waiting.abort();
    }
    let by_digest = format!("/v2/team/app/manifests/{}?ns=", image.digest);
    assert_eq!(dray.get(&format!("{by_digest}evil.example")).await.status, 200);
    let manifest = dray.get(&format!("{by_digest}good.example")).await;
    assert_eq!(manifest.header("content-type"), Some(dray_tests::image::INDEX), "the type comes from the bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_byte_per_connection_fails_soon() {
    let (upstream, dray, image) = rig(|_, _, response| response.fault(Fault::CutAfter(1))).await;
    let response = pull(&dray, &image).await;
    assert!(!response.complete);
    assert!(upstream.count("GET", "/blobs/") <= 10, "{}", upstream.count("GET", "/blobs/"));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_upstream_is_skipped_for_the_next() {
    let image = Image::new(1, &[2_000_000]);
    let silent = TestUpstream::with_handler(|_| Response::new(200, "").fault(Fault::Silent)).await;
    let honest = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let config =
        format!("[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\", \"{}\"]\n", silent.url(), honest.url());
    let dray = Start::new(config).run();
    assert_right(&pull(&dray, &image).await, &image);
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
    assert_eq!(silent.requests().len(), 1, "the silent upstream moves to the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_lengths_fail_cleanly() {
    // Announces more than it sends, every time: the client gets an error and does not hang.
    let (_upstream, dray, image) = rig(|_, _, response| {
        let announced = response.body.len() + 10;
        response.with("content-length", announced).fault(Fault::CutAfter(usize::MAX))
    })
    .await;
    let response = pull(&dray, &image).await;
    assert!(!response.complete || response.status >= 500);
    // No length, and chunks that end in the middle.
    let (_upstream, dray, image) = rig(|_, _, response| {
        Response::new(200, format!("{:x}\r\n", response.body.len())).with("transfer-encoding", "chunked")
    })
    .await;
    let response = pull(&dray, &image).await;
    assert!(!response.complete || response.status >= 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_errors_map_to_client_statuses() {
    for (upstream_status, client_status) in
        [(404, 404), (410, 410), (403, 403), (401, 403), (429, 503), (500, 503), (503, 503), (400, 400), (304, 502)]
    {
        let (_upstream, dray, image) =
            rig(move |_, _, _| Response::new(upstream_status, "").with("retry-after", 60)).await;
        let response = pull(&dray, &image).await;
        assert_eq!(response.status, client_status, "for {upstream_status}");
        assert_eq!(response.header("retry-after"), None, "podman would wait for it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_upstream_error_is_retried() {
    let (upstream, dray, image) =
        rig(|nth, _, response| if nth == 0 { Response::new(502, "") } else { response }).await;
    assert_right(&pull(&dray, &image).await, &image);
    assert_eq!(upstream.count("GET", "/blobs/"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_off_fails_soon() {
    let (upstream, dray, image) = rig(|_, _, response| response).await;
    drop(upstream);
    let response = pull(&dray, &image).await;
    assert_eq!((response.status, response.code().as_str()), (503, "UNAVAILABLE"));
}

#[tokio::test(flavor = "multi_thread")]
async fn dripping_upstream_still_completes() {
    let image = Image::new(1, &[1000]);
    let upstream =
        TestUpstream::start(&[("library/app", "1", &image)], |_, response| response.fault(Fault::Drip)).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let (layer, bytes) = image.layer();
    assert_eq!(&dray.get("/v2/library/app/manifests/1?ns=docker.io").await.body, image.index());
    assert_eq!(&dray.get(&format!("/v2/library/app/blobs/{layer}?ns=docker.io")).await.body, bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_or_oversized_manifests_are_rejected() {
    let image = Image::new(1, &[1000]);
    for (spoil, by_tag) in [
        // Bytes that do not match the digest. A tag accepts every document that is declared as a manifest.
        (
            Box::new(|r: Response| Response { body: "{}".into(), ..r })
                as Box<dyn Fn(Response) -> Response + Send + Sync>,
            200,
        ),
        (Box::new(|r: Response| Response { body: vec![b' '; 5 << 20].into(), ..r }), 502),
    ] {
        let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
            if request.method == "GET" { spoil(response) } else { response }
        })
        .await;
        let dray = Start::with_upstream("docker.io", &upstream.url()).run();
        for (reference, status) in [("1", by_tag), (image.digest.as_str(), 502)] {
            let response = dray.get(&format!("/v2/library/app/manifests/{reference}?ns=docker.io")).await;
            assert_eq!(response.status, status, "{reference}: {}", response.text());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tag_digest_is_computed_from_its_bytes() {
    let image = Image::new(1, &[1000]);
    // HEAD fails, so the digest is computed from the bytes; the header is wrong or missing.
    let wrong =
        TestUpstream::start(&[("library/app", "1", &image)], |request, response| match request.method.as_str() {
            "HEAD" => Response::new(405, ""),
            _ => response.with("docker-content-digest", dray_tests::image::digest(b"other")),
        })
        .await;
    let dray = Start::with_upstream("docker.io", &wrong.url()).run();
    let response = dray.get("/v2/library/app/manifests/1?ns=docker.io").await;
    assert_eq!((response.status, response.header("docker-content-digest")), (200, Some(image.digest.as_str())));
    let honest =
        TestUpstream::start(&[("library/app", "1", &image)], |request, response| match request.method.as_str() {
            "HEAD" => Response::new(405, ""),
            _ => response.without("docker-content-digest"),
        })
        .await;
    let dray = Start::with_upstream("docker.io", &honest.url()).run();
    let response = head(&dray.url("/v2/library/app/manifests/1?ns=docker.io")).await;
    assert_eq!((response.status, response.header("docker-content-digest")), (200, Some(image.digest.as_str())));
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_cached_and_renewed() {
    let image = Image::new(1, &[2_000_000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let expired = Arc::new(AtomicUsize::new(0));
    let (cdn_content, expiry) = (content.clone(), expired.clone());
    // The CDN is on the same host and port, as in the configuration.
    let upstream = TestUpstream::with_handler(move |request| {
        if let Some(path) = request.path.strip_prefix("/cdn") {
            let (path, signature) = path.split_once("?signature=").unwrap();
            if signature != expiry.load(Ordering::SeqCst).to_string() {
                return Response::new(403, "expired");
            }
            return cdn_content.respond(&Request { path: path.to_owned(), ..request.clone() });
        }
        if request.is_blob() {
            let target = format!("/cdn{}?signature={}", request.path, expiry.load(Ordering::SeqCst));
            return Response::new(307, "").with("location", target);
        }
        content.respond(request)
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let path = blob_path(&image);
    let bytes = image.layer().1;
    let part = |from: usize| format!("bytes={from}-{}", from + 99);
    for from in [0, 1000, 2000] {
        let response = dray.get_range(&path, &part(from)).await;
        assert_eq!((response.status, &response.body[..]), (206, &bytes[from..from + 100]));
    }
    assert_eq!(
        upstream.count("GET", "/v2/library/app/blobs") - upstream.count("GET", "/cdn"),
        1,
        "one redirect, reused twice"
    );
    expired.fetch_add(1, Ordering::SeqCst);
    let response = dray.get_range(&path, &part(3000)).await;
    assert_eq!((response.status, &response.body[..]), (206, &bytes[3000..3100]));
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_to_loops_and_private_addresses_are_blocked() {
    let secret = TestUpstream::with_handler(|_| Response::new(200, noise(1, 1000))).await;
    let inside = secret.url();
    for target in [
        "/v2/library/app/blobs/x",
        inside.as_str(),
        "https://169.254.169.254/latest",
        "https://127.0.0.1/x",
        "file:///etc/passwd",
        "",
    ] {
        let location = target.to_owned();
        let (_upstream, dray, image) = rig(move |_, _, _| Response::new(307, "").with("location", &location)).await;
        // Either the upstream's response is invalid, or the egress policy blocks the target.
        let response = pull(&dray, &image).await;
        assert!(matches!(response.status, 502 | 403), "{target}: {}", response.status);
    }
    assert_eq!(secret.requests().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn second_upstream_takes_over() {
    let image = Image::new(1, &[2_000_000]);
    let limited = TestUpstream::with_handler(|_| Response::new(429, "")).await;
    let honest = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let config = format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"http://127.0.0.1:1\", \"{}\", \"{}\"]\n",
        limited.url(),
        honest.url()
    );
    let dray = Start::new(config).run();
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
    assert_right(&pull(&dray, &image).await, &image);
}
