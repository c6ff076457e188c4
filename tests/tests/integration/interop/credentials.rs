//! Authentication applies to the host that sent the challenge.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};

use super::{FORMS, Form, REGISTRY, pull};

const ROBOT: &str = "robot:s3cret";

fn basic() -> String {
    format!("Basic {}", STANDARD.encode(ROBOT))
}

/// A dray with the robot's credentials that resolves tags on each request.
fn with_credentials(upstream: &TestUpstream) -> Dray {
    let credentials = "credentials = { username = \"robot\", password_env = \"DRAY_TEST_PASSWORD\" }\n";
    Start::new(rule(REGISTRY, &upstream.url()) + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n" + credentials)
        .env("DRAY_TEST_PASSWORD", "s3cret")
        .run()
}

/// Response of a registry to a request without a login.
#[derive(Clone, Copy, Debug)]
enum AnonymousResponse {
    NotFound,
    Forbidden,
    BareUnauthorized,
    LoginPage,
}

const ANONYMOUS_RESPONSES: [AnonymousResponse; 4] = [
    AnonymousResponse::NotFound,
    AnonymousResponse::Forbidden,
    AnonymousResponse::BareUnauthorized,
    AnonymousResponse::LoginPage,
];

fn respond_hiding_content(anonymous_response: AnonymousResponse, content: &Content, request: &Request) -> Response {
    if request.header("authorization") == Some(&*basic()) {
        return content.respond(request);
    }
    if request.path == "/v2/" {
        return Response::new(401, "").with("www-authenticate", "Basic realm=\"packages\"");
    }
    if request.path == "/login" {
        return Response::new(200, "<html>Sign in</html>").with("content-type", "text/html");
    }
    match anonymous_response {
        AnonymousResponse::LoginPage => Response::new(302, "").with("location", "/login"),
        AnonymousResponse::NotFound => Response::new(404, r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#),
        AnonymousResponse::Forbidden => Response::new(403, ""),
        AnonymousResponse::BareUnauthorized => Response::new(401, ""),
    }
}

/// As GitHub Packages and Artifactory do: the challenge is only at `/v2/`.
#[tokio::test(flavor = "multi_thread")]
async fn rule_credentials_reach_upstream_that_hides_content() {
    for anonymous_response in ANONYMOUS_RESPONSES {
        let image = Image::new(1, &[300_000]);
        let content = Content::new(&[("a/app", "1", &image)]);
        let upstream =
            TestUpstream::with_handler(move |request| respond_hiding_content(anonymous_response, &content, request))
                .await;
        for form in FORMS {
            let before = upstream.count("GET", "/v2/");
            pull(&with_credentials(&upstream), form, &image).await;
            assert!(upstream.count("GET", "/v2/") > before);
            let challenge_requests = upstream.requests().iter().filter(|request| request.path == "/v2/").count();
            assert!(
                challenge_requests <= 2,
                "{anonymous_response:?}: {challenge_requests} requests to /v2/ for a challenge"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_credentials_reach_upstream_that_hides_content() {
    for anonymous_response in ANONYMOUS_RESPONSES {
        let image = Image::new(1, &[300_000]);
        let content = Content::new(&[("a/app", "1", &image)]);
        let upstream =
            TestUpstream::with_handler(move |request| respond_hiding_content(anonymous_response, &content, request))
                .await;
        let dray = Start::new(rule(REGISTRY, &upstream.url()) + "authorization = \"passthrough\"\n").run();
        for form in FORMS {
            let (layer, bytes) = image.layer();
            for (below, wanted) in [("manifests/1".to_owned(), image.index()), (format!("blobs/{layer}"), bytes)] {
                let url = dray.url(&form.path(&below));
                let anonymous = dray_tests::http::get(&url, &[]).await;
                assert_eq!(anonymous.status, 401, "{anonymous_response:?}");
                let given = dray_tests::http::get(&url, &[("authorization", &basic())]).await;
                assert_eq!(given.status, 200, "{anonymous_response:?} {form:?} {below}: {}", given.text());
                assert!(given.body == *wanted);
            }
        }
    }
}

/// As lscr.io leads to ghcr.io, or a company's name to Artifact Registry.
#[tokio::test(flavor = "multi_thread")]
async fn redirect_to_challenging_registry_gets_anonymous_token() {
    let image = Image::new(1, &[300_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let target = TestUpstream::with_handler(move |request| {
        if let Some((_, query)) = request.path.split_once("/token?") {
            let is_right = query.contains("scope=repository%3Aa%2Fapp%3Apull") && query.contains("service=target");
            return match request.header("authorization") {
                None if is_right => {
                    Response::new(200, r#"{"token": null, "access_token": "anonymous", "expires_in": null}"#)
                }
                _ => Response::new(403, ""),
            };
        }
        let realm = format!("http://{}/token", request.header("host").unwrap_or_default());
        match request.header("authorization") {
            Some("Bearer anonymous") => content.respond(request),
            _ => Response::new(401, "").with(
                "www-authenticate",
                format!("Bearer realm=\"{realm}\",service=\"target\",scope=\"repository:a/app:pull\""),
            ),
        }
    })
    .await;
    let location = target.url();
    let front = TestUpstream::with_handler(move |request| match request.path.as_str() {
        "/v2/" => Response::new(200, "{}"),
        path => Response::new(307, "").with("location", format!("{location}{path}")),
    })
    .await;
    let guard = "[egress]\nallow_cidrs = [\"127.0.0.0/8\"]\n";
    for form in FORMS {
        let dray = Start::new(rule(REGISTRY, &front.url()) + "tag_ttl = \"0s\"\n" + guard).run();
        pull(&dray, form, &image).await;
    }
    // The rule's own credentials are not sent to the redirect's target.
    let credentials = "credentials = { username = \"robot\", password_env = \"DRAY_TEST_PASSWORD\" }\n";
    let dray = Start::new(rule(REGISTRY, &front.url()) + credentials + guard).env("DRAY_TEST_PASSWORD", "s3cret").run();
    pull(&dray, Form::Path, &image).await;
    let shown = target
        .requests()
        .iter()
        .filter_map(|request| request.header("authorization").map(str::to_owned))
        .collect::<Vec<_>>();
    assert!(!shown.is_empty() && shown.iter().all(|shown| shown == "Bearer anonymous"), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn token_endpoint_redirect_stays_on_its_own_host() {
    let image = Image::new(1, &[1_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let elsewhere = TestUpstream::with_handler(|_| Response::new(200, r#"{"token": "stolen"}"#)).await;
    let (away, leaves) = (elsewhere.url(), Arc::new(AtomicUsize::new(0)));
    let leaving = leaves.clone();
    let upstream = TestUpstream::with_handler(move |request| {
        if request.path.starts_with("/token") {
            let location = if leaving.load(Ordering::SeqCst) == 0 { "/v2/auth?scope=x" } else { &away };
            return Response::new(302, "").with("location", location);
        }
        if request.path.starts_with("/v2/auth") {
            return Response::new(200, r#"{"token": "t", "expires_in": -1}"#);
        }
        let realm = format!("http://{}/token", request.header("host").unwrap_or_default());
        match request.header("authorization") {
            Some("Bearer t") => content.respond(request),
            // Two scopes, in Latin-1.
            _ => Response::new(401, "").with(
                "www-authenticate",
                format!("Bearer realm=\"{realm}\",service=\"caf\u{e9}\",scope=\"repository:a/app:pull repository:b/base:pull\""),
            ),
        }
    })
    .await;
    for form in FORMS {
        pull(&with_credentials(&upstream), form, &image).await;
    }
    let token_request = upstream.requests().into_iter().find(|request| request.path.starts_with("/token")).unwrap();
    assert_eq!(token_request.path.matches("scope=").count(), 2, "several scopes stay several: {}", token_request.path);
    leaves.store(1, Ordering::SeqCst);
    assert!(with_credentials(&upstream).get(&Form::Path.path("manifests/1")).await.status >= 400);
    assert!(elsewhere.requests().is_empty(), "a secret went to another host");
}
