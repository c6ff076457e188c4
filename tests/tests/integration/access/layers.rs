//! Layers that images of several registries have in common.

use dray_tests::dray::Start;

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
