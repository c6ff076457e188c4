//! Tag resolutions have a TTL: fresh ones are used, stale ones are resolved again, or served if the upstream fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::Start;
use dray_tests::http::ClientResponse;
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};

const PATH: &str = "/v2/library/app/manifests/1?ns=docker.io";

/// The upstream's current behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    First,
    Second,
    Failing,
    RateLimited,
    Silent,
    Gone,
    Denying,
}

const MODES: [Mode; 7] =
    [Mode::First, Mode::Second, Mode::Failing, Mode::RateLimited, Mode::Silent, Mode::Gone, Mode::Denying];

struct Rig {
    upstream: TestUpstream,
    mode: Arc<AtomicUsize>,
    images: [Image; 2],
}

impl Rig {
    async fn new() -> Self {
        let images = [Image::new(1, &[1000]), Image::new(2, &[1000])];
        let contents = images.each_ref().map(|image| Content::new(&[("library/app", "1", image)]));
        let mode = Arc::new(AtomicUsize::new(0));
        let now = mode.clone();
        let upstream = TestUpstream::with_handler(move |request| match MODES[now.load(Ordering::SeqCst)] {
            Mode::First => contents[0].respond(request),
            Mode::Second => contents[1].respond(request),
            Mode::Failing => Response::new(500, ""),
            Mode::RateLimited => Response::new(429, ""),
            Mode::Silent => Response::new(200, "").fault(Fault::Silent),
            Mode::Gone => Response::new(404, ""),
            Mode::Denying => Response::new(403, ""),
        })
        .await;
        Self { upstream, mode, images }
    }

    fn set(&self, mode: Mode) {
        let nth = MODES.iter().position(|m| *m == mode).unwrap();
        self.mode.store(nth, Ordering::SeqCst);
    }

    fn start(&self, more: &str) -> Start {
        Start::new(format!(
            "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\"]\nnegative_ttl = \"0s\"\n{more}",
            self.upstream.url()
        ))
    }

    fn assert_is(&self, response: &ClientResponse, nth: usize) {
        assert_eq!((response.status, &response.body), (200, self.images[nth].index()), "{}", response.text());
        assert_eq!(response.header("docker-content-digest"), Some(self.images[nth].digest.as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fresh_tag_is_not_requested_again() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"1h\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    let requests = rig.upstream.requests().len();
    rig.set(Mode::Second);
    let again = dray.get(PATH).await;
    rig.assert_is(&again, 0);
    assert_eq!((rig.upstream.requests().len(), again.source()), (requests, "memory"));
    assert!(again.header("age").is_some());
    // Not even after a kill: the resolution is on disk.
    let dray = dray.kill_and_restart();
    rig.assert_is(&dray.get(PATH).await, 0);
    assert_eq!(rig.upstream.requests().len(), requests);
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_tag_is_resolved_by_head() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.assert_is(&dray.get(PATH).await, 0);
    assert_eq!(
        (rig.upstream.count("HEAD", "/1"), rig.upstream.count("GET", "/")),
        (1, 1),
        "an unchanged tag needs no second GET"
    );
    rig.set(Mode::Second);
    rig.assert_is(&dray.get(PATH).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_upstream_serves_stale_tag() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    for mode in [Mode::Failing, Mode::RateLimited, Mode::Silent] {
        rig.set(mode);
        let stale = dray.get(PATH).await;
        rig.assert_is(&stale, 0);
        assert_eq!(stale.source(), "stale", "{mode:?}");
    }
    // The silent upstream is not requested before its limit ends.
    assert_eq!(dray.metric("dray_stale_total{reason=\"rate_limited\"}").await, 2);
    let start = dray.start().clone();
    drop((rig.upstream, dray));
    let dray = start.run();
    let off = dray.get(PATH).await;
    assert_eq!((off.status, off.source()), (200, "stale"));
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_and_denied_tags_are_not_served_stale() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.set(Mode::Denying);
    assert_eq!(dray.get(PATH).await.status, 403);
    rig.set(Mode::Gone);
    assert_eq!(dray.get(PATH).await.status, 404);
    rig.set(Mode::Failing);
    assert_eq!(dray.get(PATH).await.status, 503, "a deleted tag does not come back as stale");
}

#[tokio::test(flavor = "multi_thread")]
async fn tag_date_of_a_wrong_clock_is_not_trusted() {
    let rig = Rig::new().await;
    let mut dray = rig.start("tag_ttl = \"1h\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    let start = dray.start().clone();
    let records = start.cache_dir().join("v1/records");
    let record = dray_tests::eventually("the resolution is written", async || {
        let files = std::fs::read_dir(&records).ok()?.flatten();
        // Without files that are still being written.
        let named = files.filter(|file| !file.file_name().as_encoded_bytes().starts_with(b".")).map(|file| file.path());
        named.into_iter().find(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("checked_at")))
    })
    .await;
    dray.process().kill();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    rig.set(Mode::Second);
    for date in [4_000_000_000, u64::MAX] {
        json["checked_at"] = date.into();
        std::fs::write(&record, json.to_string()).unwrap();
        let mut dray = start.clone().run();
        rig.assert_is(&dray.get(PATH).await, 1);
        dray.process().kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn immutable_tag_is_never_requested_again() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"\nimmutable_tags = ['\\d+']").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.set(Mode::Second);
    rig.assert_is(&dray.get(PATH).await, 0);
}

/// Otherwise a request for a manifest of its digest would hide a blob from all clients.
#[tokio::test(flavor = "multi_thread")]
async fn missing_manifest_does_not_hide_a_blob_of_its_digest() {
    let image = Image::new(1, &[300_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let status_of = async |endpoint: &str| {
        dray.get(&format!("/v2/library/app/{endpoint}/{}?ns=docker.io", image.layers[0])).await.status
    };
    assert_eq!(status_of("manifests").await, 404);
    assert_eq!(status_of("blobs").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_found_is_cached_for_its_ttl_only() {
    let rig = Rig::new().await;
    rig.set(Mode::Gone);
    let config = format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{0}\"]\nnegative_ttl = \"1h\"\n\
         [[registry]]\nmatch = \"quay.io\"\nupstreams = [\"{0}\"]\nnegative_ttl = \"0s\"\n\
         [[registry]]\nmatch = \"ghcr.io\"\nupstreams = [\"{0}\"]\nnegative_ttl = \"1h\"\ntag_ttl = \"0s\"",
        rig.upstream.url()
    );
    let dray = Start::new(config).run();
    for _ in 0..5 {
        assert_eq!(dray.get(PATH).await.status, 404);
    }
    assert_eq!(rig.upstream.count("GET", "/1"), 1);
    let other_paths = ["quay.io", "ghcr.io"].map(|registry| format!("/v2/library/app/manifests/1?ns={registry}"));
    for path in &other_paths {
        assert_eq!(dray.get(path).await.status, 404);
    }
    rig.set(Mode::First);
    assert_eq!(dray.get(PATH).await.status, 404, "still cached");
    for path in &other_paths {
        rig.assert_is(&dray.get(path).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_requests_for_a_tag_are_coalesced() {
    let rig = Rig::new().await;
    let dray = rig.start("").run();
    let mut pulls = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let url = dray.url(PATH);
        pulls.spawn(async move { dray_tests::http::get(&url, &[]).await });
    }
    while let Some(response) = pulls.join_next().await {
        rig.assert_is(&response.unwrap(), 0);
    }
    assert_eq!((rig.upstream.count("HEAD", "/1"), rig.upstream.count("GET", "/manifests/")), (0, 1));
}
