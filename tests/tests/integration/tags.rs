//! Tags are leases: believed for a while, asked again, served stale rather than failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::Start;
use dray_tests::http::Answer;
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};

const PATH: &str = "/v2/library/app/manifests/1?ns=docker.io";

/// How the origin behaves by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    First,
    Second,
    Fails,
    Limits,
    Silent,
    Gone,
    Denies,
}

const MOODS: [Mood; 7] = [Mood::First, Mood::Second, Mood::Fails, Mood::Limits, Mood::Silent, Mood::Gone, Mood::Denies];

struct Rig {
    upstream: TestUpstream,
    mood: Arc<AtomicUsize>,
    images: [Image; 2],
}

impl Rig {
    async fn new() -> Self {
        let images = [Image::new(1, &[1000]), Image::new(2, &[1000])];
        let contents = images.each_ref().map(|image| Content::new(&[("library/app", "1", image)]));
        let mood = Arc::new(AtomicUsize::new(0));
        let now = mood.clone();
        let upstream = TestUpstream::answering(move |request| match MOODS[now.load(Ordering::SeqCst)] {
            Mood::First => contents[0].answer(request),
            Mood::Second => contents[1].answer(request),
            Mood::Fails => Response::new(500, ""),
            Mood::Limits => Response::new(429, ""),
            Mood::Silent => Response::new(200, "").fault(Fault::Silent),
            Mood::Gone => Response::new(404, ""),
            Mood::Denies => Response::new(403, ""),
        })
        .await;
        Self { upstream, mood, images }
    }

    fn is(&self, mood: Mood) {
        let nth = MOODS.iter().position(|m| *m == mood).unwrap();
        self.mood.store(nth, Ordering::SeqCst);
    }

    fn start(&self, more: &str) -> Start {
        Start::new(format!(
            "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\"]\nnegative_ttl = \"0s\"\n{more}",
            self.upstream.url()
        ))
    }

    fn assert_is(&self, answer: &Answer, nth: usize) {
        assert_eq!((answer.status, &answer.body), (200, self.images[nth].index()), "{}", answer.text());
        assert_eq!(answer.header("docker-content-digest"), Some(self.images[nth].digest.as_str()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn within_its_time_a_tag_is_not_asked_for_again() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"1h\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    let asked = rig.upstream.requests().len();
    rig.is(Mood::Second);
    let again = dray.get(PATH).await;
    rig.assert_is(&again, 0);
    assert_eq!((rig.upstream.requests().len(), again.source()), (asked, "memory"));
    assert!(again.header("age").is_some());
    // Not even after a kill: the lease is on disk.
    let dray = dray.kill_and_restart();
    rig.assert_is(&dray.get(PATH).await, 0);
    assert_eq!(rig.upstream.requests().len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_its_time_a_head_finds_the_new_meaning() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.assert_is(&dray.get(PATH).await, 0);
    assert_eq!((rig.upstream.count("HEAD", "/1"), rig.upstream.count("GET", "/")), (1, 1), "unchanged: no second GET");
    rig.is(Mood::Second);
    rig.assert_is(&dray.get(PATH).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_in_trouble_means_stale_and_says_so() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    for mood in [Mood::Fails, Mood::Limits, Mood::Silent] {
        rig.is(mood);
        let stale = dray.get(PATH).await;
        rig.assert_is(&stale, 0);
        assert_eq!(stale.source(), "stale", "{mood:?}");
    }
    // The silent one is not asked before the limit's end.
    assert_eq!(dray.metric("dray_stale_total{reason=\"limited\"}").await, 2);
    let start = dray.start().clone();
    drop((rig.upstream, dray));
    let dray = start.run();
    let off = dray.get(PATH).await;
    assert_eq!((off.status, off.source()), (200, "stale"));
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_and_denied_are_answers_and_not_trouble() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.is(Mood::Denies);
    assert_eq!(dray.get(PATH).await.status, 403);
    rig.is(Mood::Gone);
    assert_eq!(dray.get(PATH).await.status, 404);
    rig.is(Mood::Fails);
    assert_eq!(dray.get(PATH).await.status, 503, "a deleted tag does not come back as stale");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_date_from_a_wrong_clock_is_not_believed() {
    let rig = Rig::new().await;
    let mut dray = rig.start("tag_ttl = \"1h\"").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    let start = dray.start().clone();
    let records = start.cache_dir().join("v1/records");
    let record = dray_tests::eventually("the lease is written", async || {
        let files = std::fs::read_dir(&records).ok()?.flatten();
        // Not one that is still to get its name.
        let named = files.filter(|file| !file.file_name().as_encoded_bytes().starts_with(b".")).map(|file| file.path());
        named.into_iter().find(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("checked_at")))
    })
    .await;
    dray.process().kill();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    rig.is(Mood::Second);
    for date in [4_000_000_000, u64::MAX] {
        json["checked_at"] = date.into();
        std::fs::write(&record, json.to_string()).unwrap();
        let mut dray = start.clone().run();
        rig.assert_is(&dray.get(PATH).await, 1);
        dray.process().kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn immutable_tags_are_never_asked_for_again() {
    let rig = Rig::new().await;
    let dray = rig.start("tag_ttl = \"0s\"\nimmutable_tags = ['\\d+']").run();
    rig.assert_is(&dray.get(PATH).await, 0);
    rig.is(Mood::Second);
    rig.assert_is(&dray.get(PATH).await, 0);
}

/// Otherwise anybody could hide a blob by asking for a manifest of its digest.
#[tokio::test(flavor = "multi_thread")]
async fn that_there_is_no_such_manifest_says_nothing_of_a_blob() {
    let image = Image::new(1, &[300_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let ask = async |endpoint: &str| {
        dray.get(&format!("/v2/library/app/{endpoint}/{}?ns=docker.io", image.layers[0])).await.status
    };
    assert_eq!(ask("manifests").await, 404);
    assert_eq!(ask("blobs").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn not_found_is_believed_for_a_moment_only() {
    let rig = Rig::new().await;
    rig.is(Mood::Gone);
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
    let elsewhere = ["quay.io", "ghcr.io"].map(|registry| format!("/v2/library/app/manifests/1?ns={registry}"));
    for path in &elsewhere {
        assert_eq!(dray.get(path).await.status, 404);
    }
    rig.is(Mood::First);
    assert_eq!(dray.get(PATH).await.status, 404, "still believed");
    for path in &elsewhere {
        rig.assert_is(&dray.get(path).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ask_for_a_tag_and_one_request_goes_out() {
    let rig = Rig::new().await;
    let dray = rig.start("").run();
    let mut pulls = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let url = dray.url(PATH);
        pulls.spawn(async move { dray_tests::http::get(&url, &[]).await });
    }
    while let Some(answer) = pulls.join_next().await {
        rig.assert_is(&answer.unwrap(), 0);
    }
    assert_eq!((rig.upstream.count("HEAD", "/1"), rig.upstream.count("GET", "/manifests/")), (0, 1));
}
