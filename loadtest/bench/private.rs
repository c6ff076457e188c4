//! Cached private content for an authorized client, beside public content.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{client, get};
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use serde_json::Value;

use super::rig::{ROUNDS, median, row};
use super::small::Target;

pub(crate) async fn hits() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let login = format!("Basic {}", STANDARD.encode("alice:secret"));
    let open = TestUpstream::start(&[("team/app", "1", &image)], |_, response| response).await;
    let upstream = TestUpstream::with_handler(move |request: &Request| match request.header("authorization") {
        Some(value) if value == login => content.respond(request),
        _ => Response::new(401, "").with("www-authenticate", "Basic realm=\"registry\""),
    })
    .await;
    let rules =
        rule("open.test", &open.url()) + &rule("private.test", &upstream.url()) + "authorization = \"passthrough\"\n";
    let dray = Start::new(rules).env("DRAY_LOG", "error").pinned().run();
    let path = |registry: &str| format!("/v2/team/app/manifests/{}?ns={registry}", image.digest);
    let token = token(&dray).await;
    let private = get(&dray.url(&path("private.test")), &[("authorization", &token)]).await;
    assert_eq!(private.status, 200, "{}", private.text());
    assert_eq!(get(&dray.url(&path("private.test")), &[]).await.status, 401, "denied without a token");
    let target = |path: String, more: &str| Target {
        port: dray.registry.port(),
        request: format!("GET {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n"),
    };
    let ours = target(path("private.test"), &format!("Authorization: {token}\r\n"));
    let public = target(path("open.test"), "");
    let (mut rates, mut ratios) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        let (private, open) = (ours.most(), public.most());
        rates.push(private);
        ratios.push(private / open);
    }
    row(
        "a private manifest that is cached, authorization = \"passthrough\", one core",
        &format!("{:.0} requests/s", median(&rates)),
        &format!("{:.2} x a public one", median(&ratios)),
        "at hit speed",
    );
}

/// Gets a token as a runtime does.
async fn token(dray: &Dray) -> String {
    let form = "grant_type=password&service=private.test&scope=repository:team/app:pull&username=alice&password=secret";
    let request =
        client().post(dray.url("/token")).header("content-type", "application/x-www-form-urlencoded").body(form);
    let response: Value = serde_json::from_slice(&request.send().await.unwrap().bytes().await.unwrap()).unwrap();
    format!("Bearer {}", response["token"].as_str().unwrap())
}
