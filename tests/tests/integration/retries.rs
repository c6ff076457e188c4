//! How far one client request is multiplied into upstream requests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dray_tests::dray::{Start, rule};
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use futures_util::stream::{self, StreamExt};
use tokio::time::timeout;

/// Upper bound of upstream requests for one client request if each of them fails, without redirect hops and token
/// requests (`upstream/retry.rs`). Larger: a failing registry gets a multiple of the load.
const MAX_UPSTREAM_REQUESTS: usize = 12;

/// How long a client without a fall-back waits. Longer: more retries would be allowed than clients cause.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(70);

/// Cases at the same time, each with its own upstream and dray. More: slower cases on a small machine.
const MAX_CONCURRENT_CASES: usize = 24;

type Spoil = fn(&Request, Response, &str, usize) -> Response;

/// Failures of every request. The text is the upstream's own URL, the number counts the requests before.
const FAILURES: [(&str, Spoil); 18] = [
    ("500", |_, _, _, _| Response::new(500, "")),
    ("503", |_, _, _, _| Response::new(503, "")),
    ("503, later", |_, _, _, _| Response::new(503, "").with("retry-after", "1")),
    ("429", |_, _, _, _| Response::new(429, "")),
    ("429, later", |_, _, _, _| Response::new(429, "").with("retry-after", "1")),
    ("403", |_, _, _, _| Response::new(403, "")),
    ("404", |_, _, _, _| Response::new(404, "")),
    ("401", |_, _, _, _| Response::new(401, "")),
    ("401 Basic", |_, _, _, _| Response::new(401, "").with("www-authenticate", "Basic realm=\"x\"")),
    ("401 Bearer", |request, _, url, _| match request.path.starts_with("/token") {
        true => Response::new(200, r#"{"token": "x"}"#),
        false => Response::new(401, "").with("www-authenticate", format!("Bearer realm=\"{url}/token\",service=\"x\"")),
    }),
    ("no tokens", |request, _, url, _| match request.path.starts_with("/token") {
        true => Response::new(503, ""),
        false => Response::new(401, "").with("www-authenticate", format!("Bearer realm=\"{url}/token\",service=\"x\"")),
    }),
    ("in turns", |_, _, _, nth| match nth % 3 {
        2 => Response::new(429, "").with("retry-after", "1"),
        _ => Response::new(503, ""),
    }),
    ("redirects", |_, _, url, _| Response::new(307, "").with("location", format!("{url}/elsewhere"))),
    ("closed", |_, response, _, _| response.fault(Fault::Closed)),
    ("cut", |_, response, _, _| response.fault(Fault::CutAfter(0))),
    ("reset", |_, response, _, _| response.fault(Fault::ResetAfter(0))),
    ("cut within", |_, response, _, _| response.fault(Fault::CutAfter(10))),
    ("other bytes", |_, response, _, _| Response { body: vec![b'x'; response.body.len()].into(), ..response }),
];

/// One client request by `prefix` and `query`, whether it was served, and the number of upstream requests.
async fn cause(failure: &str, spoil: Spoil, image: &Image, path: &str, form: [&str; 2]) -> (String, bool, usize) {
    let content = Content::new(&[("a/app", "1", image)]);
    let own = Arc::new(OnceLock::new());
    let (url, count) = (own.clone(), AtomicUsize::new(0));
    let upstream = TestUpstream::with_handler(move |request| {
        let nth = count.fetch_add(1, Ordering::Relaxed);
        spoil(request, content.respond(request), url.get().map_or("", String::as_str), nth)
    })
    .await;
    own.set(upstream.url()).unwrap();
    let dray = Start::new(rule("reg.example", &upstream.url())).run();
    let [prefix, query] = form;
    let response = timeout(CLIENT_TIMEOUT, dray.get(&format!("{prefix}{path}{query}"))).await;
    let is_served = response.is_ok_and(|response| response.status == 200 && response.complete);
    (
        format!("{failure}: GET {prefix}{path:.20}{query}"),
        is_served,
        upstream.count("GET", "/v2/") + upstream.count("HEAD", "/v2/"),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_requests_per_client_request_are_bounded() {
    let image = Image::new(1, &[300_000]);
    let paths = [
        "manifests/1".to_owned(),
        format!("manifests/{}", image.digest),
        format!("blobs/{}", image.layer().0),
        "tags/list".to_owned(),
    ];
    let forms = [["/v2/reg.example/a/app/", ""], ["/v2/a/app/", "?ns=reg.example"]];
    let mut cases = Vec::new();
    for (failure, spoil) in FAILURES {
        for path in &paths {
            cases.extend(forms.map(|form| cause(failure, spoil, &image, path, form)));
        }
    }
    let caused: Vec<_> = stream::iter(cases).buffer_unordered(MAX_CONCURRENT_CASES).collect().await;
    let over: Vec<_> = caused.iter().filter(|(_, _, count)| *count > MAX_UPSTREAM_REQUESTS).collect();
    let served: Vec<_> = caused.iter().filter(|(_, is_served, _)| *is_served).collect();
    assert!(served.is_empty(), "{served:#?}");
    assert!(over.is_empty(), "more than {MAX_UPSTREAM_REQUESTS} upstream requests: {over:#?}");
    assert!(caused.iter().all(|(_, _, count)| *count > 0));
}
