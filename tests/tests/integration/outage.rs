//! Upstreams that limit, do not respond, or are down: cached content is served, other requests fail at once. Only dray
//! probes for the recovery.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dray_tests::dray::{Dray, Start};
use dray_tests::image::Image;
use dray_tests::registry::Registry;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use dray_tests::{eventually, eventually_within};

/// How an upstream behaves; changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Healthy,
    /// Responds 429 to every request.
    RateLimited,
    /// Reads requests and never responds.
    Silent,
}

const MODES: [Mode; 3] = [Mode::Healthy, Mode::RateLimited, Mode::Silent];

#[derive(Clone, Default)]
struct ModeSwitch(Arc<AtomicUsize>);

impl ModeSwitch {
    fn set(&self, mode: Mode) {
        self.0.store(MODES.iter().position(|known| *known == mode).unwrap(), Ordering::SeqCst);
    }

    fn respond(&self, request: &Request, healthy: impl FnOnce(&Request) -> Response) -> Response {
        match MODES[self.0.load(Ordering::SeqCst)] {
            Mode::Healthy => {
                healthy(request).with("ratelimit-limit", "100;w=21600").with("ratelimit-remaining", "76;w=21600")
            }
            Mode::RateLimited => Response::new(429, "slow down"),
            Mode::Silent => Response::new(200, "").fault(Fault::Silent),
        }
    }
}

/// A background renewal of a tag stays open for less than this. Shorter: the test fails while dray waits for the
/// upstream.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(60);

const PATH: &str = "/v2/library/app/manifests/1?ns=docker.io";

/// An upstream with two tags; tests request the first one while the upstream is healthy.
async fn switchable_upstream() -> (TestUpstream, ModeSwitch, Image) {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]);
    let switch = ModeSwitch::default();
    let mode = switch.clone();
    let upstream =
        TestUpstream::with_handler(move |request| mode.respond(request, |request| content.respond(request))).await;
    (upstream, switch, image)
}

fn rule(upstreams: &[&TestUpstream], more: &str) -> String {
    let upstreams: Vec<_> = upstreams.iter().map(|upstream| format!("\"{}\"", upstream.url())).collect();
    let upstreams = upstreams.join(", ");
    format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [{upstreams}]\ntag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n{more}"
    )
}

async fn is_stale(dray: &Dray) -> bool {
    let response = dray.get(PATH).await;
    assert_eq!(response.status, 200, "{}", response.text());
    response.source() == "stale"
}

/// A login or maintenance page with status 200 and no digest.
#[tokio::test(flavor = "multi_thread")]
async fn web_page_instead_of_manifest_does_not_resolve_a_tag() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]);
    let page_sent = Arc::new(AtomicUsize::new(0));
    let (now, there) = (page_sent.clone(), Content::new(&[("library/app", "1", &image), ("library/app", "2", &image)]));
    let pages = [("text/html; charset=utf-8", "<p>Back soon</p>"), ("application/json", "{\"message\":\"Back soon\"}")];
    let first = TestUpstream::with_handler(move |request| match now.load(Ordering::SeqCst).checked_sub(1) {
        None => content.respond(request),
        Some(nth) => Response::new(200, pages[nth].1).with("content-type", pages[nth].0),
    })
    .await;
    let second = TestUpstream::with_handler(move |request| there.respond(request)).await;
    let alone = Start::new(rule(&[&first], "")).run();
    let both = Start::new(rule(&[&first, &second], "")).run();
    assert_eq!(alone.get(PATH).await.status, 200);
    for page in 1..=pages.len() {
        page_sent.store(page, Ordering::SeqCst);
        let response = alone.get(PATH).await;
        assert_eq!((response.status, response.source(), &response.body), (200, "stale", image.index()), "{page}");
        let other = PATH.replace("/1?", "/2?");
        assert_eq!(alone.get(&other).await.status, 502, "{page}: this tag was never resolved");
    }
    page_sent.store(1, Ordering::SeqCst);
    let response = both.get(PATH).await;
    assert_eq!(
        (response.status, &response.body),
        (200, image.index()),
        "the next upstream has it: {}",
        response.text()
    );
    let list = alone.get("/v2/library/app/tags/list?ns=docker.io").await;
    assert_eq!(list.status, 502, "{}", list.text());
    page_sent.store(0, Ordering::SeqCst);
    assert!(!is_stale(&alone).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn log_of_an_upstream_failure_names_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let locked =
        TestUpstream::with_handler(|_| Response::new(401, "").with("www-authenticate", "Basic realm=\"r\"")).await;
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
    let lines = eventually("the requests are logged", async || {
        let lines = std::fs::read_to_string(&log).unwrap();
        (lines.matches("access: request").count() == 4).then_some(lines)
    })
    .await;
    let line = |of: &str| lines.lines().filter(|line| line.contains(of)).map(str::to_owned).collect::<Vec<_>>();
    assert!(line("upstream down")[0].contains("Connection refused"), "{lines}");
    assert!(line("status=503")[0].contains("error=\""), "{lines}");
    assert!(line("status=403")[0].contains("error=\""), "{lines}");
    assert_eq!(line("upstream denied credentials").len(), 1, "{lines}");
}

/// Clients can name any host: the detection of an outage must not depend on their number.
#[tokio::test(flavor = "multi_thread")]
async fn outage_is_detected_among_many_unknown_hosts() {
    let (upstream, mode, _) = switchable_upstream().await;
    let dns = "[dns]\nservers = [\"127.0.0.1:1\"]\n";
    let dray = Start::new(format!("{dns}{}", rule(&[&upstream], ""))).run();
    assert_eq!(dray.get(PATH).await.status, 200);
    let statuses =
        (0..400).map(async |nth| dray.get(&format!("/v2/a/b/manifests/1?ns=unknown-{nth}.example")).await.status);
    assert!(futures_util::future::join_all(statuses).await.iter().all(|status| *status == 503));
    mode.set(Mode::Silent);
    assert!(is_stale(&dray).await);
    eventually("the outage is detected", async || {
        (dray.metric("dray_upstream_down{rule=\"docker.io\"}").await == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_upstream_serves_stale_with_few_requests() {
    let (upstream, mode, image) = switchable_upstream().await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert_eq!(dray.get(PATH).await.status, 200);
    let labels = format!("{{rule=\"docker.io\",upstream=\"{}\"}}", upstream.url());
    let [limit, remaining] = ["", "_remaining"].map(|which| format!("dray_upstream_rate_limit{which}{labels}"));
    assert_eq!((dray.metric(&limit).await, dray.metric(&remaining).await), (100, 76));
    mode.set(Mode::RateLimited);
    let requests = upstream.requests().len();
    for _ in 0..200 {
        let response = dray.get(PATH).await;
        assert_eq!((response.status, response.source(), &response.body), (200, "stale", image.index()));
    }
    let requests = upstream.requests().len() - requests;
    assert!(requests <= 3, "a limit of seconds, and {requests} requests");
    let reason = "dray_stale_total{reason=\"rate_limited\"}";
    assert_eq!(dray.metric(reason).await, 200);
    // Content that is not cached is refused with 503. With the upstream's 429, containerd would retry at once.
    let other = dray.get("/v2/library/app/manifests/2?ns=docker.io").await;
    assert_eq!((other.status, other.header("retry-after")), (503, None), "{}", other.text());
    mode.set(Mode::Healthy);
    eventually("the upstream is used again after the limit", async || (!is_stale(&dray).await).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_of_one_second_is_waited_for() {
    let image = Image::new(1, &[1000]);
    let limited = Arc::new(AtomicUsize::new(0));
    for status in [429, 503] {
        let (content, seen) = (Content::new(&[("library/app", "1", &image)]), limited.clone());
        seen.store(0, Ordering::SeqCst);
        let upstream = TestUpstream::with_handler(move |request| match seen.fetch_add(1, Ordering::SeqCst) {
            0 => Response::new(status, "").with("retry-after", "1"),
            _ => content.respond(request),
        })
        .await;
        let dray = Start::new(rule(&[&upstream], "")).run();
        let response = dray.get(PATH).await;
        assert_eq!((response.status, response.source()), (200, "upstream"), "{status}: {}", response.text());
        assert_eq!(upstream.count("GET", "/manifests/1"), 2, "one request fails, one succeeds");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_upstream_is_skipped_for_the_next() {
    let ((first, mode, image), (second, _, _)) = (switchable_upstream().await, switchable_upstream().await);
    mode.set(Mode::RateLimited);
    let dray = Start::new(rule(&[&first, &second], "")).run();
    for _ in 0..5 {
        let response = dray.get(PATH).await;
        assert_eq!((response.status, &response.body), (200, image.index()));
    }
    // A new tag is requested by GET, a known one by HEAD. Each kind has its own limit.
    let counts =
        |upstream: &TestUpstream| [upstream.count("GET", "/manifests/1"), upstream.count("HEAD", "/manifests/1")];
    assert_eq!((counts(&first), counts(&second)), ([1, 1], [1, 4]));
    let blob = format!("/v2/library/app/blobs/{}?ns=docker.io", image.layers[0]);
    assert_eq!(dray.get(&blob).await.status, 200);
    assert_eq!(first.count("GET", "/blobs/"), 1, "a limit of manifests does not apply to blobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_upstream_is_replaced_by_the_next() {
    let ((first, mode, image), (second, _, _)) = (switchable_upstream().await, switchable_upstream().await);
    mode.set(Mode::Silent);
    let dray = Start::new(rule(&[&first, &second], "")).run();
    let response = dray.get(PATH).await;
    assert_eq!((response.status, &response.body), (200, image.index()));
    let count =
        |upstream: &TestUpstream| upstream.count("GET", "/manifests/1") + upstream.count("HEAD", "/manifests/1");
    assert_eq!(count(&second), 1);
    // The next request does not wait for the first upstream.
    assert_eq!(dray.get(PATH).await.status, 200);
    assert_eq!((count(&first), count(&second)), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_of_zero_is_not_retried_at_once() {
    let upstream = TestUpstream::with_handler(|_| Response::new(429, "").with("retry-after", "0")).await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    for _ in 0..3 {
        assert_eq!(dray.get(PATH).await.status, 503);
    }
    let requests = upstream.requests().len();
    assert!(requests <= 3, "{requests} requests");
}

/// A slow list or repository says nothing about the rest of the upstream.
#[tokio::test(flavor = "multi_thread")]
async fn slow_list_or_repository_does_not_mark_upstream_down() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request| {
        let is_slow = request.path.contains("/tags/list") || request.path.contains("/slow/");
        if is_slow { Response::new(200, "").fault(Fault::Silent) } else { content.respond(request) }
    })
    .await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert!(!is_stale(&dray).await);
    assert_eq!(dray.get("/v2/library/app/tags/list?ns=docker.io").await.status, 503);
    assert_eq!(dray.metric("dray_upstream_down{rule=\"docker.io\"}").await, 0);
    assert!(!is_stale(&dray).await);
    assert_eq!(dray.get("/v2/library/slow/manifests/1?ns=docker.io").await.status, 503);
    eventually("the upstream is used", async || (!is_stale(&dray).await).then_some(())).await;
}

/// The timeout is short because a second upstream follows. Once the second one is down, the first gets its full time.
#[tokio::test(flavor = "multi_thread")]
async fn first_upstream_keeps_its_time_while_second_is_down() {
    let mut gone = Registry::open().await;
    gone.stop();
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let first = TestUpstream::with_handler(move |request| {
        if request.path.contains("/manifests/") {
            tokio::task::block_in_place(|| std::thread::sleep(std::time::Duration::from_millis(3500)));
        }
        content.respond(request)
    })
    .await;
    let both = format!("\"{}\", \"{}\"", first.url(), gone.url());
    let dray = Start::new(rule(&[&first], "").replace(&format!("\"{}\"", first.url()), &both)).run();
    assert_eq!(dray.get(PATH).await.status, 503, "the timeout is short, since a second upstream follows");
    eventually("the first upstream gets its full time", async || (dray.get(PATH).await.status == 200).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_off_is_detected_once_and_serves_stale() {
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
    let down = "dray_upstream_down{rule=\"docker.io\"}";
    assert_eq!(dray.metric(down).await, 1);
    let unreachable = "dray_upstream_requests_total{kind=\"manifest_head\",outcome=\"unreachable\",rule=\"docker.io\"}";
    let failures = dray.metric(unreachable).await;
    for _ in 0..20 {
        assert!(is_stale(&dray).await);
        let missing = dray.get("/v2/library/app/manifests/2?ns=docker.io").await;
        assert_eq!(missing.status, 503, "{}", missing.text());
    }
    assert_eq!(dray.metric(unreachable).await, failures, "no client request reaches the upstream");
    let row = upstream_row(&dray, "docker.io").await;
    assert_eq!(row["state"], "down", "{row}");
    assert!(row["last_error"].as_str().unwrap().contains("Connection refused"), "{row}");
    assert!(row["since_seconds"].as_u64().is_some() && row["last_error_seconds"].as_u64().is_some(), "{row}");
    assert!(row["next_probe_seconds"].as_f64().is_some_and(|next| next <= 10.0), "{row}");
    hub.start().await;
    eventually("the upstream is used again", async || (!is_stale(&dray).await).then_some(())).await;
    assert_eq!(dray.metric(down).await, 0);
    let row = upstream_row(&dray, "docker.io").await;
    assert_eq!(row["state"], "healthy", "{row}");
    assert!(
        row["since_seconds"].as_u64().is_some_and(|since| since < 60) && row["next_probe_seconds"].is_null(),
        "{row}"
    );
    assert!(row["last_error"].is_string(), "the last error is still shown: {row}");
}

/// The upstream of a rule in the status.
async fn upstream_row(dray: &Dray, rule: &str) -> serde_json::Value {
    let status = dray_tests::http::get(&format!("http://{}/api/v1/status", dray.admin), &[]).await.text();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let rows = status["upstreams"].as_array().unwrap();
    rows.iter().find(|row| row["rule"] == rule).unwrap_or_else(|| panic!("{rule}: {rows:?}")).clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn host_blocked_by_the_egress_policy_is_listed_as_blocked() {
    let dray = Start::new("").run();
    assert_eq!(dray.get("/v2/a/b/manifests/1?ns=10.1.2.3").await.status, 403);
    let row = upstream_row(&dray, "*").await;
    assert_eq!((&row["state"], &row["upstream"]), (&"blocked".into(), &"https://10.1.2.3".into()), "{row}");
    assert!(row["last_error"].as_str().unwrap().contains("allow_cidrs"), "{row}");
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_upstream_is_marked_down() {
    let (upstream, mode, _) = switchable_upstream().await;
    let dray = Start::new(rule(&[&upstream], "")).run();
    assert!(!is_stale(&dray).await);
    mode.set(Mode::Silent);
    assert!(is_stale(&dray).await);
    eventually("the upstream is marked down", async || {
        assert!(is_stale(&dray).await);
        (dray.metric("dray_upstream_down{rule=\"docker.io\"}").await == 1).then_some(())
    })
    .await;
    mode.set(Mode::Healthy);
    // Requests of the meantime are still open: the upstream may only be slow.
    eventually_within(RENEWAL_TIMEOUT, "the upstream is used again", async || (!is_stale(&dray).await).then_some(()))
        .await;
}

/// A registry that responds is unusable while its token server issues no tokens.
#[tokio::test(flavor = "multi_thread")]
async fn token_server_silent_or_limited_serves_stale() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let mode = ModeSwitch::default();
    let granting = mode.clone();
    let tokens = TestUpstream::with_handler(move |request| {
        granting.respond(request, |_| Response::new(200, r#"{"token": "t", "expires_in": 1}"#))
    })
    .await;
    let realm = format!("Bearer realm=\"{}/token\",service=\"s\"", tokens.url());
    let upstream = TestUpstream::with_handler(move |request| match request.header("authorization") {
        Some("Bearer t") => content.respond(request),
        _ => Response::new(401, "").with("www-authenticate", &realm),
    })
    .await;
    let guard = "[egress]\nallow_cidrs = [\"127.0.0.0/8\"]\n";
    let dray = Start::new(rule(&[&upstream], guard)).run();
    assert!(!is_stale(&dray).await);
    for trouble in [Mode::RateLimited, Mode::Silent] {
        mode.set(trouble);
        eventually("the token has expired", async || is_stale(&dray).await.then_some(())).await;
        mode.set(Mode::Healthy);
        eventually("tokens are granted again", async || (!is_stale(&dray).await).then_some(())).await;
    }
}
