//! Layers that images of several registries have in common.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::Start;
use dray_tests::upstream::Request;

use super::tenants::*;

/// Each has sent it: so it is fetched once from each, and is there when one of them is gone.
#[tokio::test(flavor = "multi_thread")]
async fn what_two_registries_have_sent_is_given_for_both() {
    let (one, other) = (Tenants::new(Wants::Tokens).await, Tenants::new(Wants::Tokens).await);
    let dray = Start::new(one.rule() + &other.rule().replace("reg.example", "other.example")).run();
    let (layer, _) = one.alices.layer();
    let (manifest, config) = (one.alices.digest.clone(), one.alices.layers[1].clone());
    let paths = [format!("blobs/{layer}"), format!("blobs/{config}"), format!("manifests/{manifest}")];
    let path = |rest: &str, registry: &str| format!("/v2/a/app/{rest}?ns={registry}");
    for round in 0..3 {
        for registry in ["reg.example", "other.example"] {
            for rest in &paths {
                let answer = pull_as(&dray, &path(rest, registry), ALICE).await;
                assert_eq!(answer.status, 200, "{round} {registry} {rest}: {}", answer.text());
                assert!(round == 0 || ["memory", "disk"].contains(&answer.source()), "{round} {registry} {rest}");
            }
            dray.fills_end().await;
        }
    }
    // Nobody else's rights come with it.
    for registry in ["reg.example", "other.example"] {
        let answer = pull_as(&dray, &path(&paths[0], registry), BOB).await;
        assert_eq!(answer.status, 403, "{}", answer.text());
    }
    other.is(GONE);
    assert_eq!(pull_as(&dray, &path(&paths[0], "other.example"), ALICE).await.status, 200);
}

/// The registry shows by samples that it holds it there as well, so that it is not transferred twice.
#[tokio::test(flavor = "multi_thread")]
async fn layer_of_two_repositories_is_compared_and_not_sent_again() {
    for wants in [Wants::Basic, Wants::Tokens] {
        let tenants = Tenants::new(wants).await;
        let dray = Start::new(tenants.rule()).run();
        for (digest, bytes) in &tenants.alices.blobs {
            let path = |repository| format!("/v2/{repository}/blobs/{digest}?ns=reg.example");
            assert_eq!(pull_as(&dray, &path("a/app"), ALICE).await.body, bytes);
            dray.fills_end().await;
            for _ in 0..3 {
                let answer = pull_as(&dray, &path("b/both"), BOB).await;
                assert!(answer.body == *bytes && ["memory", "disk"].contains(&answer.source()), "{}", answer.source());
            }
            let asked = tenants.upstream.requests();
            let of_bob =
                asked.iter().filter(|request| request.method == "GET" && request.path.contains("b/both/blobs"));
            let of_bob: Vec<_> = of_bob.filter(|request| request.path.contains(digest.as_str())).collect();
            let is_large = bytes.len() > 256 * 1024;
            let most = if is_large { 3 } else { 1 };
            let is_bobs =
                |it: &&&Request| it.header("authorization").is_some_and(|said| said.contains(&STANDARD.encode(BOB)));
            let shown: Vec<_> = of_bob.iter().filter(is_bobs).collect();
            assert_eq!(shown.len(), most, "{wants:?} {} bytes", bytes.len());
            assert!(!is_large || shown.iter().all(|request| request.header("range").is_some()));
        }
        let manifest = format!("/v2/b/both/manifests/{}?ns=reg.example", tenants.alices.digest);
        assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200);
        assert_eq!(pull_as(&dray, &manifest, BOB).await.body, tenants.alices.index());
    }
}
