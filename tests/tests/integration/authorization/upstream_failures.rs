//! Failing or rate-limiting registries and token servers: authorized clients stay authorized, and no other client
//! becomes authorized.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::Start;
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use serde_json::json;

use super::tenants::*;

/// If only tokens are unavailable, authorized clients stay authorized.
#[tokio::test(flavor = "multi_thread")]
async fn allowed_client_stays_allowed_without_token_server() {
    let image = Image::new(1, &[600_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let switch = Arc::new(AtomicUsize::new(0));
    let mode = switch.clone();
    let registry = TestUpstream::with_handler(move |request| {
        if request.path.starts_with("/token") {
            let basic = format!("Basic {}", STANDARD.encode(ALICE));
            return match (mode.load(Ordering::SeqCst), request.header("authorization")) {
                (1, _) => Response::new(503, ""),
                (2, _) => Response::new(401, ""),
                (_, Some(value)) if value == basic => {
                    Response::new(200, json!({"token": "t", "expires_in": 5}).to_string())
                }
                (_, None) => Response::new(200, json!({"token": "anonymous"}).to_string()),
                _ => Response::new(401, ""),
            };
        }
        let host = request.header("host").unwrap_or_default();
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
        match request.header("authorization") {
            Some("Bearer t") => content.respond(request),
            _ => Response::new(401, "").with("www-authenticate", challenge),
        }
    })
    .await;
    let rule = format!(
        "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nauthorization = \"passthrough\"\n",
        registry.url()
    );
    let dray = Start::new(rule).run();
    let challenged = dray.get(TAG).await;
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
    switch.store(1, Ordering::SeqCst);
    let token_requests = || {
        let requests = registry.requests();
        let has_credentials =
            |request: &&Request| request.header("authorization").is_some_and(|value| value.starts_with("Basic"));
        requests.iter().filter(|request| request.path.starts_with("/token")).filter(has_credentials).count()
    };
    let before = token_requests();
    // The registry's token expires after some seconds.
    let given = eventually("a token request fails", async || {
        let given = token(&challenged, Some(ALICE)).await;
        (token_requests() > before).then_some(given)
    })
    .await;
    let given = given.expect("alice is authorized");
    assert_eq!(get_as(&dray, TAG, &format!("Bearer {given}")).await.status, 200);
    assert_ne!(pull_as(&dray, TAG, BOB).await.status, 200);
    // A denial ends an authorization, also if the registry fails later.
    switch.store(2, Ordering::SeqCst);
    eventually("alice is denied", async || token(&challenged, Some(ALICE)).await.err()).await;
    switch.store(1, Ordering::SeqCst);
    let before = token_requests();
    eventually("the token server is requested again", async || {
        assert!(token(&challenged, Some(ALICE)).await.is_err());
        (token_requests() > before).then_some(())
    })
    .await;
    assert!(token(&challenged, Some(ALICE)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn allowed_client_stays_allowed_while_upstream_is_down() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let dray = Start::new(tenants.rule() + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n").run();
    let (layer, bytes) = tenants.alices.layer();
    let blob = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
    let challenged = dray.get(TAG).await;
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
    assert_eq!(pull_as(&dray, &blob, ALICE).await.status, 200);
    dray.wait_for_fills().await;
    tenants.set_mode(SILENT);
    eventually("the registry is marked down", async || {
        let token = token(&challenged, Some(ALICE)).await;
        let Ok(token) = token else { return None };
        assert_eq!(get_as(&dray, TAG, &format!("Bearer {token}")).await.status, 200);
        (dray.metric("dray_upstream_down{rule=\"reg.example\"}").await == 1).then_some(())
    })
    .await;
    let alices = token(&challenged, Some(ALICE)).await.unwrap();
    assert_eq!(get_as(&dray, &blob, &format!("Bearer {alices}")).await.body, bytes);
    // A request without credentials is challenged, as always.
    assert_eq!(pull_as(&dray, &blob, ALICE).await.body, bytes);
    assert_eq!(get_as(&dray, TAG, &format!("Basic {}", STANDARD.encode(ALICE))).await.source(), "stale");
    for login in [BOB, "alice:wrong"] {
        if let Ok(token) = token(&challenged, Some(login)).await {
            assert_ne!(get_as(&dray, &blob, &format!("Bearer {token}")).await.status, 200, "{login}");
        }
    }
    tenants.set_mode(HEALTHY);
    eventually("the registry is used again", async || {
        (pull_as(&dray, TAG, ALICE).await.source() == "memory").then_some(())
    })
    .await;
}

/// An upstream that responds 200 to every request authorizes no client, neither then nor later.
#[tokio::test(flavor = "multi_thread")]
async fn web_page_instead_of_registry_does_not_authorize() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule() + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n").run();
        let paths = all_paths(&tenants.alices, "a/app");
        let private: Vec<&String> =
            paths.iter().filter(|path| !path.contains("tags") && !path.contains("referrers")).collect();
        for path in &private {
            assert_eq!(pull_as(&dray, path, ALICE).await.status, 200, "{path}");
        }
        dray.wait_for_fills().await;
        for mode in [WEB_PAGE, HEALTHY] {
            tenants.set_mode(mode);
            for path in &private {
                let given = dray.get(path).await;
                assert!(given.status >= 400, "{scheme:?} {mode} {path}: {} {}", given.status, given.source());
            }
        }
    }
}

/// Registries count requests per account.
#[tokio::test(flavor = "multi_thread")]
async fn rate_limit_of_anonymous_clients_spares_other_clients() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let dray = Start::new(tenants.rule()).run();
    tenants.set_mode(LIMITS_ANONYMOUS);
    assert!(dray.get("/v2/open/app/manifests/7?ns=reg.example").await.status >= 400);
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
}

/// An account has its own rate limit: the challenge makes a runtime present its credentials.
#[tokio::test(flavor = "multi_thread")]
async fn rate_limited_anonymous_client_is_challenged() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let dray = Start::new(tenants.rule()).run();
    tenants.set_mode(LIMITS_ANONYMOUS_PULLS);
    let path = "/v2/open/app/manifests/1?ns=reg.example";
    let challenged = dray.get(path).await;
    assert!(challenge(&challenged).contains(&("scope".into(), "repository:open/app:pull".into())));
    let token = token(&challenged, None).await.unwrap();
    assert_eq!(get_as(&dray, path, &format!("Bearer {token}")).await.status, 503, "the token is anonymous");
    assert_eq!(pull_as(&dray, path, ALICE).await.status, 200);
}
