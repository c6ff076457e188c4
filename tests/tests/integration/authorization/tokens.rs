//! The tokens that dray issues to clients.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::Start;
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use serde_json::{Value, json};

use super::tenants::*;
use dray_tests::http::{ClientResponse, client};
use dray_tests::image::Image;

/// Some clients use one token for a whole pull, and assume that it is valid for at least a minute.
#[tokio::test(flavor = "multi_thread")]
async fn issued_token_is_valid_for_a_minute_at_least() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request: &Request| match request.header("authorization") {
        Some(_) if request.path.starts_with("/token") => {
            Response::new(200, json!({"token": "short-lived", "expires_in": 10}).to_string())
        }
        Some("Bearer short-lived") => content.respond(request),
        _ => {
            let host = request.header("host").unwrap_or_default();
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            Response::new(401, "").with("www-authenticate", challenge)
        }
    })
    .await;
    let rule = format!(
        "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nauthorization = \"passthrough\"\n",
        upstream.url()
    );
    let dray = Start::new(rule).run();
    let parameters = challenge(&dray.get(TAG).await);
    let url = |(_, realm): &(String, String), rest: &[(String, String)]| {
        reqwest::Url::parse_with_params(realm, rest).unwrap()
    };
    let url = url(&parameters[0], &parameters[1..]);
    for nth in 1..=3 {
        let before = upstream.count("GET", "/token");
        let response = client().get(url.clone()).basic_auth("alice", Some("for-a")).send().await.unwrap();
        let response: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
        assert!(response["expires_in"].as_u64().unwrap() >= 60, "{nth}: {response}");
        assert_eq!(
            upstream.count("GET", "/token") - before,
            1,
            "{nth}: the remaining time of an earlier token is too short"
        );
        let bearer = format!("Bearer {}", response["token"].as_str().unwrap());
        assert_eq!(get_as(&dray, TAG, &bearer).await.status, 200);
    }
}

/// A client that copies requests one token for its source and its target.
#[tokio::test(flavor = "multi_thread")]
async fn token_for_several_repositories_is_valid_for_each() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule()).run();
        let basic = format!("Basic {}", STANDARD.encode(BOB));
        for scopes in [
            "scope=repository:b/both:pull,push&scope=repository:b/app:pull",
            "scope=repository:b/app:pull%20repository:b/both:pull",
        ] {
            let response = get_as(&dray, &format!("/token?service=reg.example&{scopes}"), &basic).await;
            assert_eq!(response.status, 200, "{scheme:?}: {}", response.text());
            let token = serde_json::from_slice::<Value>(&response.body).unwrap()["token"].as_str().unwrap().to_owned();
            for (repository, status) in [("b/app", 200), ("b/both", 200), ("a/app", 401)] {
                let path = format!("/v2/{repository}/manifests/1?ns=reg.example");
                assert_eq!(get_as(&dray, &path, &format!("Bearer {token}")).await.status, status, "{scheme:?} {path}");
            }
        }
    }
}

/// Without this error, the client would keep using the token.
#[tokio::test(flavor = "multi_thread")]
async fn invalid_token_is_reported_in_the_challenge() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let dray = Start::new(tenants.rule()).run();
    let error = |response: &ClientResponse| {
        challenge(response).into_iter().find(|(key, _)| key == "error").map(|(_, value)| value)
    };
    assert_eq!(error(&dray.get(TAG).await), None, "no token was presented");
    assert_eq!(error(&get_as(&dray, TAG, "Bearer forged").await).as_deref(), Some("invalid_token"));
    let bobs = token(&dray.get(&TAG.replace("/a/", "/b/")).await, Some(BOB)).await.unwrap();
    assert_eq!(
        error(&get_as(&dray, TAG, &format!("Bearer {bobs}")).await),
        None,
        "the token is valid, but for another repository"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn token_is_accepted_by_nodes_that_share_a_key() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("grants.key");
    std::fs::write(&file, "0123456789abcdef-shared").unwrap();
    let shared = format!("{}[access]\ntoken_key_file = \"{}\"\n", tenants.rule(), file.display());
    let as_peers = || {
        let port = free_port();
        let peers = format!("listen = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"]");
        format!("{}[peers]\n{peers}\nkey_file = \"{}\"\n", tenants.rule(), file.display())
    };
    let each =
        [([shared.clone(), shared], true), ([as_peers(), as_peers()], true), ([tenants.rule(), tenants.rule()], false)];
    for (rules, is_taken) in each {
        let [one, other] = rules.map(|rules| Start::new(rules).run());
        let alices = token(&one.get(TAG).await, Some(ALICE)).await.unwrap();
        let there = get_as(&other, TAG, &format!("Bearer {alices}")).await;
        assert_eq!(there.status, if is_taken { 200 } else { 401 }, "{}", there.text());
    }
}
