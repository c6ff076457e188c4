//! Upstreams that require authentication: Basic, Bearer, and every failure of either.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start};
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::registry::{Registry, htpasswd};
use dray_tests::tokens::TokenServer;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use serde_json::json;

const MANIFEST: &str = "/v2/team/app/manifests/1?ns=reg.example";

fn image() -> Image {
    Image::new(1, &[500_000])
}

fn config(upstream: &str, credentials: &str) -> String {
    format!(
        "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{upstream}\"]\nnegative_ttl = \"0s\"\n{credentials}\n"
    )
}

async fn assert_pulls(dray: &Dray, image: &Image) {
    let manifest = dray.get(MANIFEST).await;
    assert_eq!((manifest.status, &manifest.body), (200, image.index()), "{}", manifest.text());
    let (layer, bytes) = image.layer();
    let blob = dray.get(&format!("/v2/team/app/blobs/{layer}?ns=reg.example")).await;
    assert!(blob.status == 200 && blob.body == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn real_registry_with_a_password_is_pulled_from() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::with(&htpasswd(dir.path(), "robot", "s3cret:x")).await;
    registry.push("team/app", "1", &image()).await;
    let anonymous = Start::new(config(&registry.url(), "")).run();
    let refused = anonymous.get(MANIFEST).await;
    assert_eq!(
        (refused.status, refused.header("www-authenticate")),
        (403, None),
        "the upstream's challenge is not passed on"
    );

    let file = dir.path().join("password");
    std::fs::write(&file, "s3cret:x\n").unwrap();
    let by_file = format!("credentials = {{ username = \"robot\", password_file = \"{}\" }}", file.display());
    assert_pulls(&Start::new(config(&registry.url(), &by_file)).run(), &image()).await;

    let by_variable = "credentials = { username = \"robot\", password_env = \"REG_PASSWORD\" }";
    let dray = Start::new(config(&registry.url(), by_variable)).env("REG_PASSWORD", "s3cret:x").run();
    assert_pulls(&dray, &image()).await;

    let docker = dir.path().join("config.json");
    let entry = json!({"auths": {format!("127.0.0.1:{}", registry.port): {"auth": STANDARD.encode("robot:s3cret:x")}}});
    std::fs::write(&docker, entry.to_string()).unwrap();
    let by_docker = format!("credentials = {{ file = \"{}\" }}", docker.display());
    assert_pulls(&Start::new(config(&registry.url(), &by_docker)).run(), &image()).await;

    std::fs::write(&file, "wrong").unwrap();
    assert_eq!(Start::new(config(&registry.url(), &by_file)).run().get(MANIFEST).await.status, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn real_registry_with_tokens_is_pulled_from() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = TokenServer::start(dir.path(), None).await;
    let registry = Registry::with(tokens.settings()).await;
    registry.push("team/app", "1", &image()).await;
    // The realm is on another port than the upstream, so the egress policy must allow it.
    let guard = "\n[egress]\nallow_cidrs = [\"127.0.0.0/8\"]";
    let dray = Start::new(config(&registry.url(), guard)).run();
    assert_pulls(&dray, &image()).await;
    assert_pulls(&dray, &image()).await;
    assert_eq!(tokens.upstream.requests().len(), 1, "one token for the whole pull");
    let status = get(&format!("http://{}/api/v1/status", dray.admin), &[]).await.text();
    assert!(status.contains("\"tokens\":1"), "{status}");

    let tokens = TokenServer::start(dir.path(), Some(("robot", "hush"))).await;
    let registry = Registry::with(tokens.settings()).await;
    registry.push("team/app", "1", &image()).await;
    let anonymous = Start::new(config(&registry.url(), guard)).run();
    assert_eq!(anonymous.get(MANIFEST).await.status, 403);
    let credentials = format!("credentials = {{ username = \"robot\", password_env = \"P\" }}{guard}");
    assert_pulls(&Start::new(config(&registry.url(), &credentials)).env("P", "hush").run(), &image()).await;
}

/// A scripted upstream with a token endpoint on the same host and port.
async fn scripted(
    challenge: impl Fn(&str) -> String + Send + Sync + 'static,
    token: impl Fn(usize, &Request) -> Response + Send + Sync + 'static,
    accepts: impl Fn(&str) -> bool + Send + Sync + 'static,
) -> TestUpstream {
    let image = image();
    let content = Content::new(&[("team/app", "1", &image)]);
    let token_requests = AtomicUsize::new(0);
    TestUpstream::with_handler(move |request| {
        if request.path.starts_with("/token") {
            return token(token_requests.fetch_add(1, Ordering::SeqCst), request);
        }
        if request.header("authorization").is_some_and(&accepts) {
            return content.respond(request);
        }
        let host = request.header("host").unwrap_or_default();
        Response::new(401, "").with("www-authenticate", challenge(&format!("http://{host}/token")))
    })
    .await
}

fn bearer(realm: &str) -> String {
    format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"repository:team/app:pull\"")
}

fn granted(token: &str, expires_in: u64) -> Response {
    Response::new(200, json!({"access_token": token, "expires_in": expires_in}).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn several_challenges_in_one_header_are_parsed() {
    let upstream = scripted(
        |realm| format!("Negotiate, Basic realm=\"x\", {}", bearer(realm)),
        |_, _| granted("t", 300),
        |a| a == "Bearer t",
    )
    .await;
    assert_pulls(&Start::new(config(&upstream.url(), "")).run(), &image()).await;
    let token_request = upstream.requests().into_iter().find(|r| r.path.starts_with("/token")).unwrap();
    assert!(
        token_request.path.contains("service=s") && token_request.path.contains("scope=repository%3Ateam%2Fapp%3Apull"),
        "{}",
        token_request.path
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn token_endpoint_that_only_takes_post_is_used() {
    let upstream = scripted(
        bearer,
        |_, request| match request.method.as_str() {
            "POST" => {
                let form = String::from_utf8(request.body.clone()).unwrap();
                assert!(form.contains("grant_type=password") && form.contains("password=hush"), "{form}");
                granted("t", 300)
            }
            _ => Response::new(405, ""),
        },
        |a| a == "Bearer t",
    )
    .await;
    let credentials = "credentials = { username = \"robot\", password_env = \"P\" }";
    assert_pulls(&Start::new(config(&upstream.url(), credentials)).env("P", "hush").run(), &image()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn identity_token_is_exchanged_by_post() {
    let upstream = scripted(
        bearer,
        |_, request| {
            let form = String::from_utf8(request.body.clone()).unwrap();
            assert!(form.contains("grant_type=refresh_token") && form.contains("refresh_token=id"), "{form}");
            granted("t", 300)
        },
        |a| a == "Bearer t",
    )
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    std::fs::write(&file, json!({"auths": {upstream.address.to_string(): {"identitytoken": "id"}}}).to_string())
        .unwrap();
    let credentials = format!("credentials = {{ file = \"{}\" }}", file.display());
    assert_pulls(&Start::new(config(&upstream.url(), &credentials)).run(), &image()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_token_is_replaced() {
    let valid = Arc::new(AtomicUsize::new(0));
    let (now, checked) = (valid.clone(), valid.clone());
    let upstream = scripted(
        bearer,
        move |_, _| granted(&format!("t{}", now.load(Ordering::SeqCst)), 300),
        move |a| a == format!("Bearer t{}", checked.load(Ordering::SeqCst)),
    )
    .await;
    let ttl = "tag_ttl = \"0s\"";
    let dray = Start::new(config(&upstream.url(), ttl)).run();
    assert_pulls(&dray, &image()).await;
    valid.fetch_add(1, Ordering::SeqCst);
    let response = dray.get(MANIFEST).await;
    assert_eq!((response.status, response.source()), (200, "memory"), "revalidated with a new token");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_challenges_end_as_denied() {
    let upstream = scripted(bearer, |_, _| granted("never good enough", 300), |_| false).await;
    let dray = Start::new(config(&upstream.url(), "")).run();
    assert_eq!(dray.get(MANIFEST).await.status, 403);
    assert!(upstream.requests().len() < 8, "{}", upstream.requests().len());
    for token in [Response::new(200, "no json"), Response::new(200, "{}"), Response::new(500, "")] {
        let upstream = scripted(bearer, move |_, _| token.clone(), |_| false).await;
        let status = Start::new(config(&upstream.url(), "")).run().get(MANIFEST).await.status;
        assert!(matches!(status, 502 | 503), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_sent_to_their_upstream_only() {
    // Both the realm and the redirect lead to another host.
    let other_host = TestUpstream::with_handler(|_| Response::new(200, "{\"token\":\"x\"}")).await;
    let target = other_host.url();
    let realm = scripted(move |_| bearer(&format!("{target}/token")), |_, _| Response::new(500, ""), |_| false).await;
    let credentials = "credentials = { username = \"robot\", password_env = \"P\" }";
    let dray = Start::new(config(&realm.url(), credentials)).env("P", "hush").run();
    assert_eq!(dray.get(MANIFEST).await.status, 403);
    assert_eq!(other_host.requests().len(), 0, "the egress policy blocks a private address");

    let image = image();
    let content = Content::new(&[("team/app", "1", &image)]);
    let cdn_content = content.clone();
    let cdn = TestUpstream::with_handler(move |request| cdn_content.respond(request)).await;
    let cdn_url = cdn.url();
    let registry = TestUpstream::with_handler(move |request| {
        if request.header("authorization").is_none() {
            return Response::new(401, "").with("www-authenticate", "Basic realm=\"x\"");
        }
        match request.is_blob() {
            true => Response::new(307, "").with("location", format!("{cdn_url}{}", request.path)),
            false => content.respond(request),
        }
    })
    .await;
    let allowed = format!("{credentials}\n[egress]\nallow_cidrs = [\"127.0.0.0/8\"]");
    let dray = Start::new(config(&registry.url(), &allowed)).env("P", "hush").run();
    assert_pulls(&dray, &image).await;
    assert!(cdn.requests().iter().all(|request| request.header("authorization").is_none()));
    assert!(!cdn.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_do_not_appear_in_logs_or_metrics() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::with(&htpasswd(dir.path(), "robot", "s3cret")).await;
    registry.push("team/app", "1", &image()).await;
    let credentials = "credentials = { username = \"robot\", password_env = \"REG_PASSWORD\" }";
    let start = Start::new(config(&registry.url(), credentials)).env("REG_PASSWORD", "s3cret").env("DRAY_LOG", "trace");
    let log = start.dir().join("log");
    let mut dray = start.clone().log_to(&log).run();
    assert_pulls(&dray, &image()).await;
    let metrics = dray_tests::http::get(&format!("http://{}/metrics", dray.admin), &[]).await.text();
    dray.process().kill();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.len() > 1000, "the log is not empty");
    for secret in ["s3cret", &STANDARD.encode("robot:s3cret")] {
        assert!(!log.contains(secret) && !metrics.contains(secret), "{secret} leaked");
    }
}
