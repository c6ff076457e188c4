//! Origins that limit, do not answer, or are gone: what is here is served, the rest is refused at once, and nobody
//! but dray has to find out when it is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dray_tests::dray::{Dray, Start};
use dray_tests::image::Image;
use dray_tests::registry::Registry;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use dray_tests::{eventually, eventually_within};

/// How an origin behaves; changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Well,
    /// 429 to everything.
    Limits,
    /// Takes requests and never answers.
    Silent,
}

const MOODS: [Mood; 3] = [Mood::Well, Mood::Limits, Mood::Silent];

#[derive(Clone, Default)]
struct Moody(Arc<AtomicUsize>);

impl Moody {
    fn is(&self, mood: Mood) {
        self.0.store(MOODS.iter().position(|known| *known == mood).unwrap(), Ordering::SeqCst);
    }

    fn answer(&self, request: &Request, well: impl FnOnce(&Request) -> Response) -> Response {
        match MOODS[self.0.load(Ordering::SeqCst)] {
            Mood::Well => {
                well(request).with("ratelimit-limit", "100;w=21600").with("ratelimit-remaining", "76;w=21600")
            }
            Mood::Limits => Response::new(429, "slow down"),
            Mood::Silent => Response::new(200, "").fault(Fault::Silent),
        }
    }
}

/// Longer than a renewal of a tag stays open.
const RENEWAL: Duration = Duration::from_secs(60);

const PATH: &str = "/v2/library/app/manifests/1?ns=docker.io";

/// Two tags, of which a test asks for the first while all is well.
async fn moody() -> (TestUpstream, Moody, Image) {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]);
    let moody = Moody::default();
    let mood = moody.clone();
    let upstream =
        TestUpstream::answering(move |request| mood.answer(request, |request| content.answer(request))).await;
    (upstream, moody, image)
}

fn rule(upstreams: &[&TestUpstream], more: &str) -> String {
    let upstreams: Vec<_> = upstreams.iter().map(|upstream| format!("\"{}\"", upstream.url())).collect();
    let upstreams = upstreams.join(", ");
    format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [{upstreams}]\ntag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n{more}"
    )
}

async fn is_stale(dray: &Dray) -> bool {
    let answer = dray.get(PATH).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.source() == "stale"
}

/// On which somebody is to log in, or that tells of repairs: with 200, and no digest.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_place_of_a_manifest_is_no_meaning_of_a_tag() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]);
    let said = Arc::new(AtomicUsize::new(0));
    let (now, there) = (said.clone(), Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]));
    let pages = [("text/html; charset=utf-8", "<p>Back soon</p>"), ("application/json", "{\"message\":\"Back soon\"}")];
    let first = TestUpstream::answering(move |request| match now.load(Ordering::SeqCst).checked_sub(1) {
        None => content.answer(request),
        Some(nth) => Response::new(200, pages[nth].1).with("content-type", pages[nth].0),
    })
    .await;
    let second = TestUpstream::answering(move |request| there.answer(request)).await;
    let alone = Start::new(rule(&[&first], "")).run();
    let both = Start::new(rule(&[&first, &second], "")).run();
    assert_eq!(alone.get(PATH).await.status, 200);
    for page in 1..=pages.len() {
        said.store(page, Ordering::SeqCst);
        let answer = alone.get(PATH).await;
        assert_eq!((answer.status, answer.source(), &answer.body), (200, "stale", image.index()), "{page}");
        let other = PATH.replace("/1?", "/2?");
        assert_eq!(alone.get(&other).await.status, 502, "{page}: nothing was pulled before");
    }
    said.store(1, Ordering::SeqCst);
    let answer = both.get(PATH).await;
    assert_eq!((answer.status, &answer.body), (200, image.index()), "the next one has it: {}", answer.text());
    let list = alone.get("/v2/library/app/tags/list?ns=docker.io").await;
    assert_eq!(list.status, 502, "{}", list.text());
    said.store(0, Ordering::SeqCst);
    assert!(!is_stale(&alone).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let locked =
        TestUpstream::answering(|_| Response::new(401, "").with("www-authenticate", "Basic realm=\"r\"")).await;
    let config = format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"http://127.0.0.1:1\"]\n\
         [[registry]]\nmatch = \"locked.example\"\nupstreams = [\"{}\"]\n\
         credentials = {{ username = \"robot\", password_env = \"HOME\" }}\n",
        locked.url()
    );
    let dray = Start::new(config).env("DRAY_LOG", "info").log_to(&log).run();
    assert_eq!(dray.get(PATH).await.status, 503);
    for _ in 0..3 {
        assert_eq!(dray.get("/v2/a/b/manifests/1?ns=locked.example").await.status, 403);
    }
    let lines = eventually("the log says so", async || {
        let lines = std::fs::read_to_string(&log).unwrap();
        (lines.matches("access: request").count() == 4).then_some(lines)
    })
    .await;
    let line = |of: &str| lines.lines().filter(|line| line.contains(of)).map(str::to_owned).collect::<Vec<_>>();
    assert!(line("an upstream does not answer")[0].contains("Connection refused"), "{lines}");
    assert!(line("status=503")[0].contains("reason=\""), "{lines}");
    assert!(line("status=403")[0].contains("reason=\""), "{lines}");
    assert_eq!(line("refuses the credentials of its rule").len(), 1, "{lines}");
}

/// Clients can name any: nothing of a registry that is missed may depend on how many.
#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_nobody_ever_heard_of_hide_no_outage() {
    let (upstream, mood, _) = moody().await;
    let dns = "[dns]\nservers = [\"127.0.0.1:1\"]\n";
    let dray = Start::new(format!("{dns}{}", rule(&[&upstream], ""))).run();
    assert_eq!(dray.get(PATH).await.status, 200);
    let strangers =
        (0..400).map(async |nth| dray.get(&format!("/v2/a/b/manifests/1?ns=stranger-{nth}.example")).await.status);
    assert!(futures_util::future::join_all(strangers).await.iter().all(|status| *status == 503));
    mood.is(Mood::Silent);
    assert!(is_stale(&dray).await);
    eventually("it is known", async || (dray.metric("dray_origin_down{rule=\"docker.io\"}").await == 1).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_pulls_under_a_limit_fail_nowhere_and_ask_little() {
    let (upstream, mood, image) = moody().await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert_eq!(dray.get(PATH).await.status, 200);
    let labels = format!("{{rule=\"docker.io\",upstream=\"{}\"}}", upstream.url());
    let [limit, remaining] = ["", "_remaining"].map(|which| format!("dray_origin_rate_limit{which}{labels}"));
    assert_eq!((dray.metric(&limit).await, dray.metric(&remaining).await), (100, 76));
    mood.is(Mood::Limits);
    let asked = upstream.requests().len();
    for _ in 0..200 {
        let answer = dray.get(PATH).await;
        assert_eq!((answer.status, answer.source(), &answer.body), (200, "stale", image.index()));
    }
    let asked = upstream.requests().len() - asked;
    assert!(asked <= 3, "a limit of seconds, and {asked} questions");
    let reason = "dray_stale_total{reason=\"limited\"}";
    assert_eq!(dray.metric(reason).await, 200);
    // What is not here is refused, not with the origin's 429, which containerd hammers.
    let other = dray.get("/v2/library/app/manifests/2?ns=docker.io").await;
    assert_eq!((other.status, other.header("retry-after")), (503, None), "{}", other.text());
    mood.is(Mood::Well);
    eventually("it is asked again when the limit is over", async || (!is_stale(&dray).await).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_how_much_later_is_asked_then() {
    let image = Image::new(1, &[1000]);
    let limited = Arc::new(AtomicUsize::new(0));
    for status in [429, 503] {
        let (content, seen) = (Content::new(&[("library/app", "1", &image)]), limited.clone());
        seen.store(0, Ordering::SeqCst);
        let upstream = TestUpstream::answering(move |request| match seen.fetch_add(1, Ordering::SeqCst) {
            0 => Response::new(status, "").with("retry-after", "1"),
            _ => content.answer(request),
        })
        .await;
        let dray = Start::new(rule(&[&upstream], "")).run();
        let answer = dray.get(PATH).await;
        assert_eq!((answer.status, answer.source()), (200, "origin"), "{status}: {}", answer.text());
        assert_eq!(upstream.count("GET", "/manifests/1"), 2, "once in vain");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limited_upstream_is_passed_by_without_being_asked() {
    let ((first, mood, image), (second, _, _)) = (moody().await, moody().await);
    mood.is(Mood::Limits);
    let dray = Start::new(rule(&[&first, &second], "")).run();
    for _ in 0..5 {
        let answer = dray.get(PATH).await;
        assert_eq!((answer.status, &answer.body), (200, image.index()));
    }
    // A new tag is fetched at once, a known one is asked for by HEAD; each kind has a limit of its own.
    let counts =
        |upstream: &TestUpstream| [upstream.count("GET", "/manifests/1"), upstream.count("HEAD", "/manifests/1")];
    assert_eq!((counts(&first), counts(&second)), ([1, 1], [1, 4]));
    let blob = format!("/v2/library/app/blobs/{}?ns=docker.io", image.layers[0]);
    assert_eq!(dray.get(&blob).await.status, 200);
    assert_eq!(first.count("GET", "/blobs/"), 1, "a limit of manifests says nothing of blobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upstream_is_not_waited_for_alone() {
    let ((first, mood, image), (second, _, _)) = (moody().await, moody().await);
    mood.is(Mood::Silent);
    let dray = Start::new(rule(&[&first, &second], "")).run();
    let answer = dray.get(PATH).await;
    assert_eq!((answer.status, &answer.body), (200, image.index()));
    let count =
        |upstream: &TestUpstream| upstream.count("GET", "/manifests/1") + upstream.count("HEAD", "/manifests/1");
    assert_eq!(count(&second), 1);
    // Nor is the next one kept waiting.
    assert_eq!(dray.get(PATH).await.status, 200);
    assert_eq!((count(&first), count(&second)), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_at_once_is_not_asked_at_once() {
    let upstream = TestUpstream::answering(|_| Response::new(429, "").with("retry-after", "0")).await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    for _ in 0..3 {
        assert_eq!(dray.get(PATH).await.status, 503);
    }
    let asked = upstream.requests().len();
    assert!(asked <= 3, "{asked} questions");
}

/// What takes long at one place says nothing of others.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_list_or_repository_takes_no_registry_down() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let upstream = TestUpstream::answering(move |request| {
        let is_slow = request.path.contains("/tags/list") || request.path.contains("/slow/");
        if is_slow { Response::new(200, "").fault(Fault::Silent) } else { content.answer(request) }
    })
    .await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert!(!is_stale(&dray).await);
    assert_eq!(dray.get("/v2/library/app/tags/list?ns=docker.io").await.status, 503);
    assert_eq!(dray.metric("dray_origin_down{rule=\"docker.io\"}").await, 0);
    assert!(!is_stale(&dray).await);
    assert_eq!(dray.get("/v2/library/slow/manifests/1?ns=docker.io").await.status, 503);
    eventually("it is there", async || (!is_stale(&dray).await).then_some(())).await;
}

/// The one that is left need not hurry because of one that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_upstream_that_is_down_leaves_the_first_its_time() {
    let mut gone = Registry::open().await;
    gone.stop();
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let first = TestUpstream::answering(move |request| {
        if request.path.contains("/manifests/") {
            tokio::task::block_in_place(|| std::thread::sleep(std::time::Duration::from_millis(3500)));
        }
        content.answer(request)
    })
    .await;
    let both = format!("\"{}\", \"{}\"", first.url(), gone.url());
    let dray = Start::new(rule(&[&first], "").replace(&format!("\"{}\"", first.url()), &both)).run();
    assert_eq!(dray.get(PATH).await.status, 503, "in a hurry, since another followed");
    eventually("the first is waited for", async || (dray.get(PATH).await.status == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_off_is_noticed_once_and_missed_by_nobody() {
    let mut hub = Registry::open().await;
    let image = Image::new(1, &[1000]);
    hub.push("library/app", "1", &image).await;
    let dray = Start::new(format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\"]\ntag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n",
        hub.url()
    ))
    .run();
    assert!(!is_stale(&dray).await);
    hub.stop();
    assert!(is_stale(&dray).await);
    let down = "dray_origin_down{rule=\"docker.io\"}";
    assert_eq!(dray.metric(down).await, 1);
    let refused = "dray_origin_requests_total{kind=\"manifest_head\",outcome=\"unreachable\",rule=\"docker.io\"}";
    let asked = dray.metric(refused).await;
    for _ in 0..20 {
        assert!(is_stale(&dray).await);
        let missing = dray.get("/v2/library/app/manifests/2?ns=docker.io").await;
        assert_eq!(missing.status, 503, "{}", missing.text());
    }
    assert_eq!(dray.metric(refused).await, asked, "nobody had to ask");
    hub.start().await;
    eventually("it is asked again", async || (!is_stale(&dray).await).then_some(())).await;
    assert_eq!(dray.metric(down).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_takes_and_never_answers_is_down_as_well() {
    let (upstream, mood, _) = moody().await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert!(!is_stale(&dray).await);
    mood.is(Mood::Silent);
    assert!(is_stale(&dray).await);
    eventually("it counts as down", async || {
        assert!(is_stale(&dray).await);
        (dray.metric("dray_origin_down{rule=\"docker.io\"}").await == 1).then_some(())
    })
    .await;
    mood.is(Mood::Well);
    // What was asked for meanwhile is waited for: the upstream may only be slow.
    eventually_within(RENEWAL, "it is asked again", async || (!is_stale(&dray).await).then_some(())).await;
}

/// A registry that answers, but whose tokens nobody grants, is of no use.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_server_that_is_silent_or_limits_is_an_upstream_in_trouble() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let mood = Moody::default();
    let granting = mood.clone();
    let tokens = TestUpstream::answering(move |request| {
        granting.answer(request, |_| Response::new(200, r#"{"token": "t", "expires_in": 1}"#))
    })
    .await;
    let realm = format!("Bearer realm=\"{}/token\",service=\"s\"", tokens.url());
    let upstream = TestUpstream::answering(move |request| match request.header("authorization") {
        Some("Bearer t") => content.answer(request),
        _ => Response::new(401, "").with("www-authenticate", &realm),
    })
    .await;
    let guard = "[guard]\nallow = [\"127.0.0.0/8\"]\n";
    let dray = Start::new(rule(&[&upstream], guard)).run();
    assert!(!is_stale(&dray).await);
    for trouble in [Mood::Limits, Mood::Silent] {
        mood.is(trouble);
        eventually("the token has expired", async || is_stale(&dray).await.then_some(())).await;
        mood.is(Mood::Well);
        eventually("tokens are granted again", async || (!is_stale(&dray).await).then_some(())).await;
    }
}
