//! The registry port in a real browser: no content runs, and pages of other origins read nothing.

use std::process::Command;

use dray_tests::dray::{Start, rule};
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::run;
use dray_tests::tool;
use dray_tests::upstream::{Content, Response, TestUpstream};

#[tokio::test(flavor = "multi_thread")]
async fn foreign_page_cannot_read_run_or_send() {
    let image = Image::new(1, &[1_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let script = r#"{"schemaVersion": 2, "x": "<script>document.title='ran';parent.postMessage('ran','*')</script>"}"#;
    let upstream = TestUpstream::with_handler(move |request| match request.path.contains("/page/") {
        true => Response::new(200, script).with("content-type", "image/svg+xml"),
        false => content.respond(request),
    })
    .await;
    let attacker =
        TestUpstream::with_handler(|_| Response::new(200, "<html></html>").with("content-type", "text/html")).await;
    let others = format!("[[registry]]\nmatch = \"sent.example\"\nupstreams = [\"{}\"]\n", upstream.url());
    let dray = Start::new(rule("reg.example", &upstream.url()) + &others).run();
    let (private, page) = ("/v2/reg.example/a/app/manifests/1", "/v2/reg.example/page/x/manifests/1");
    let served = get(&dray.url(page), &[]).await;
    assert_eq!((served.status, served.header("content-type")), (200, Some("application/octet-stream")));
    for path in [private, page, "/v2/", "/v2/reg.example/a/app/tags/list", "/nothing"] {
        let response = get(&dray.url(path), &[]).await;
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(response.header("content-security-policy"), Some("sandbox; default-src 'none'"), "{path}");
        assert_eq!(response.header("content-disposition"), Some("attachment"), "{path}");
    }
    run(Command::new("python3")
        .env("PYTHONPATH", tool("python"))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/foreign_pages.py"))
        .args([dray.url("").trim_end_matches('/'), &attacker.address.port().to_string(), private, page]));
    assert_eq!(
        upstream.count("GET", "/from/") + upstream.count("HEAD", "/from/"),
        0,
        "a page caused an upstream request"
    );
}
