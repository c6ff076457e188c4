//! Layers that images of several registries share.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::Start;
use dray_tests::upstream::Request;

use super::tenants::*;

/// Both registries have sent the layer. So it is downloaded once from each, and is served for both while one is down.
#[tokio::test(flavor = "multi_thread")]
async fn layer_sent_by_two_registries_is_served_for_both() {
    let (one, other) = (Tenants::new(AuthScheme::Tokens).await, Tenants::new(AuthScheme::Tokens).await);
    let dray = Start::new(one.rule() + &other.rule().replace("reg.example", "other.example")).run();
    let (layer, _) = one.alices.layer();
    let (manifest, config) = (one.alices.digest.clone(), one.alices.layers[1].clone());
    let paths = [format!("blobs/{layer}"), format!("blobs/{config}"), format!("manifests/{manifest}")];
    let path = |rest: &str, registry: &str| format!("/v2/a/app/{rest}?ns={registry}");
    for round in 0..3 {
        for registry in ["reg.example", "other.example"] {
            for rest in &paths {
                let response = pull_as(&dray, &path(rest, registry), ALICE).await;
                assert_eq!(response.status, 200, "{round} {registry} {rest}: {}", response.text());
                assert!(round == 0 || ["memory", "disk"].contains(&response.source()), "{round} {registry} {rest}");
            }
            dray.wait_for_fills().await;
        }
    }
    // This authorizes no other client.
    for registry in ["reg.example", "other.example"] {
        let response = pull_as(&dray, &path(&paths[0], registry), BOB).await;
        assert_eq!(response.status, 403, "{}", response.text());
    }
    other.set_mode(SILENT);
    assert_eq!(pull_as(&dray, &path(&paths[0], "other.example"), ALICE).await.status, 200);
}

/// The registry proves by samples that the second repository holds the layer as well, so that it is not transferred
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn layer_of_two_repositories_is_compared_not_sent_again() {
    for scheme in [AuthScheme::Basic, AuthScheme::Tokens] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule()).run();
        for (digest, bytes) in &tenants.alices.blobs {
            let path = |repository| format!("/v2/{repository}/blobs/{digest}?ns=reg.example");
            assert_eq!(pull_as(&dray, &path("a/app"), ALICE).await.body, bytes);
            dray.wait_for_fills().await;
            for _ in 0..3 {
                let response = pull_as(&dray, &path("b/both"), BOB).await;
                assert!(
                    response.body == *bytes && ["memory", "disk"].contains(&response.source()),
                    "{}",
                    response.source()
                );
            }
            let requests = tenants.upstream.requests();
            let of_bob =
                requests.iter().filter(|request| request.method == "GET" && request.path.contains("b/both/blobs"));
            let of_bob: Vec<_> = of_bob.filter(|request| request.path.contains(digest.as_str())).collect();
            let is_large = bytes.len() > 256 * 1024;
            let most = if is_large { 3 } else { 1 };
            let is_bobs =
                |it: &&&Request| it.header("authorization").is_some_and(|value| value.contains(&STANDARD.encode(BOB)));
            let shown: Vec<_> = of_bob.iter().filter(is_bobs).collect();
            assert_eq!(shown.len(), most, "{scheme:?} {} bytes", bytes.len());
            assert!(!is_large || shown.iter().all(|request| request.header("range").is_some()));
        }
        let manifest = format!("/v2/b/both/manifests/{}?ns=reg.example", tenants.alices.digest);
        assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
        assert_eq!(pull_as(&dray, &manifest, BOB).await.body, tenants.alices.index());
    }
}
