//! Registries and token servers in trouble, or that limit: who was let in stays, and nobody else comes in by it.

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

/// Those who were let in stay so when only tokens cannot be had.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_server_that_is_gone_throws_nobody_out() {
    let image = Image::new(1, &[600_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let gone = Arc::new(AtomicUsize::new(0));
    let is_gone = gone.clone();
    let registry = TestUpstream::answering(move |request| {
        if request.path.starts_with("/token") {
            let basic = format!("Basic {}", STANDARD.encode(ALICE));
            return match (is_gone.load(Ordering::SeqCst), request.header("authorization")) {
                (1, _) => Response::new(503, ""),
                (2, _) => Response::new(401, ""),
                (_, Some(said)) if said == basic => {
                    Response::new(200, json!({"token": "t", "expires_in": 5}).to_string())
                }
                (_, None) => Response::new(200, json!({"token": "anybody"}).to_string()),
                _ => Response::new(401, ""),
            };
        }
        let host = request.header("host").unwrap_or_default();
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
        match request.header("authorization") {
            Some("Bearer t") => content.answer(request),
            _ => Response::new(401, "").with("www-authenticate", challenge),
        }
    })
    .await;
    let rule =
        format!("[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\naccess = \"client\"\n", registry.url());
    let dray = Start::new(rule).run();
    let challenged = dray.get(TAG).await;
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
    gone.store(1, Ordering::SeqCst);
    let asked = || {
        let requests = registry.requests();
        let for_somebody =
            |request: &&Request| request.header("authorization").is_some_and(|said| said.starts_with("Basic"));
        requests.iter().filter(|request| request.path.starts_with("/token")).filter(for_somebody).count()
    };
    let before = asked();
    // The registry's token lives for some seconds.
    let given = eventually("a token is asked for in vain", async || {
        let given = token(&challenged, Some(ALICE)).await;
        (asked() > before).then_some(given)
    })
    .await;
    let given = given.expect("she was let in");
    assert_eq!(get_as(&dray, TAG, &format!("Bearer {given}")).await.status, 200);
    assert_ne!(pull_as(&dray, TAG, BOB).await.status, 200);
    // A no ends what a yes began, also when there is trouble later.
    gone.store(2, Ordering::SeqCst);
    eventually("she is refused", async || token(&challenged, Some(ALICE)).await.err()).await;
    gone.store(1, Ordering::SeqCst);
    let before = asked();
    eventually("it is asked again", async || {
        assert!(token(&challenged, Some(ALICE)).await.is_err());
        (asked() > before).then_some(())
    })
    .await;
    assert!(token(&challenged, Some(ALICE)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_in_trouble_those_who_were_let_in_still_are() {
    let tenants = Tenants::new(Wants::Tokens).await;
    let dray = Start::new(tenants.rule() + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n").run();
    let (layer, bytes) = tenants.alices.layer();
    let blob = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
    let challenged = dray.get(TAG).await;
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
    assert_eq!(pull_as(&dray, &blob, ALICE).await.status, 200);
    dray.fills_end().await;
    tenants.is(GONE);
    eventually("it counts as down", async || {
        let token = token(&challenged, Some(ALICE)).await;
        let Ok(token) = token else { return None };
        assert_eq!(get_as(&dray, TAG, &format!("Bearer {token}")).await.status, 200);
        (dray.metric("dray_origin_down{rule=\"reg.example\"}").await == 1).then_some(())
    })
    .await;
    let alices = token(&challenged, Some(ALICE)).await.unwrap();
    assert_eq!(get_as(&dray, &blob, &format!("Bearer {alices}")).await.body, bytes);
    // Who asks first without a word is asked who it is, as ever.
    assert_eq!(pull_as(&dray, &blob, ALICE).await.body, bytes);
    assert_eq!(get_as(&dray, TAG, &format!("Basic {}", STANDARD.encode(ALICE))).await.source(), "stale");
    for stranger in [BOB, "alice:wrong"] {
        if let Ok(token) = token(&challenged, Some(stranger)).await {
            assert_ne!(get_as(&dray, &blob, &format!("Bearer {token}")).await.status, 200, "{stranger}");
        }
    }
    tenants.is(WELL);
    eventually("it is asked again", async || (pull_as(&dray, TAG, ALICE).await.source() == "memory").then_some(()))
        .await;
}

/// Whatever answers 200 for everything opens nothing, then or later.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_place_of_the_registry_opens_nothing() {
    for wants in [Wants::Tokens, Wants::Basic] {
        let tenants = Tenants::new(wants).await;
        let dray = Start::new(tenants.rule() + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n").run();
        let paths = ways(&tenants.alices, "a/app");
        let private: Vec<&String> =
            paths.iter().filter(|path| !path.contains("tags") && !path.contains("referrers")).collect();
        for path in &private {
            assert_eq!(pull_as(&dray, path, ALICE).await.status, 200, "{path}");
        }
        dray.fills_end().await;
        for mood in [PAGE, WELL] {
            tenants.is(mood);
            for path in &private {
                let given = dray.get(path).await;
                assert!(given.status >= 400, "{wants:?} {mood} {path}: {} {}", given.status, given.source());
            }
        }
    }
}

/// Registries count by account.
#[tokio::test(flavor = "multi_thread")]
async fn whom_a_registry_limits_others_do_not_suffer() {
    let tenants = Tenants::new(Wants::Tokens).await;
    let dray = Start::new(tenants.rule()).run();
    tenants.is(LIMITS_STRANGERS);
    assert!(dray.get("/v2/open/app/manifests/7?ns=reg.example").await.status >= 400);
    assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
}

/// Whoever has an account there has another share: the challenge is what makes a runtime say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_whom_a_registry_limits_may_say_who_it_is() {
    let tenants = Tenants::new(Wants::Tokens).await;
    let dray = Start::new(tenants.rule()).run();
    tenants.is(LIMITS_STRANGERS_PULLS);
    let path = "/v2/open/app/manifests/1?ns=reg.example";
    let asked = dray.get(path).await;
    assert!(challenge(&asked).contains(&("scope".into(), "repository:open/app:pull".into())));
    let token = token(&asked, None).await.unwrap();
    assert_eq!(get_as(&dray, path, &format!("Bearer {token}")).await.status, 503, "it has said that it is nobody");
    assert_eq!(pull_as(&dray, path, ALICE).await.status, 200);
}
