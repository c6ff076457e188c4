//! A registry of which one repository is somebody else's, as a proxy project of Harbor or a remote repository of Artifactory:
//! what stands behind it says to have whatever is requested.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use dray_tests::dray::{Dray, Start};
use dray_tests::http::{Answer, get, send};
use dray_tests::image::{INDEX, Image, digest};
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use reqwest::Method;

use super::tenants::{ALICE, BOB};

/// What the server behind bob's repository sends for what it does not have.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// HEAD says 200, GET does not.
    HeadOnly,
    /// Other bytes of the right length, also for ranges.
    OtherBytes,
    /// Other bytes, and no ranges.
    WithoutRanges,
    /// The bytes of the first half, which bob has.
    HalfOfIt,
}

const LIES: [Lie; 4] = [Lie::HeadOnly, Lie::OtherBytes, Lie::WithoutRanges, Lie::HalfOfIt];

fn user_of(request: &Request) -> String {
    let said = request.header("authorization").unwrap_or_default();
    let decoded = said.split_once(' ').and_then(|(_, text)| STANDARD.decode(text).ok()).unwrap_or_default();
    String::from_utf8(decoded).unwrap_or_default()
}

/// `team/app` is alice's; `evil/app` is bob's, and tells of alice's image as if it were there.
async fn lying(image: &Image, lie: Lie) -> TestUpstream {
    let content = Arc::new(Content::new(&[("team/app", "1", image)]));
    let index = image.digest.clone();
    TestUpstream::answering(move |request| {
        let owner = if request.path.starts_with("/v2/team/") { ALICE } else { BOB };
        match user_of(request) {
            user if user == owner || (request.path == "/v2/" && !user.is_empty()) => {}
            user if user.is_empty() => return Response::new(401, "").with("www-authenticate", "Basic realm=\"r\""),
            _ => return Response::new(403, ""),
        }
        if owner == ALICE || request.path == "/v2/" {
            return content.answer(request);
        }
        let path = request.path.replace("/evil/", "/team/");
        let truth = content.answer(&Request { path, headers: Default::default(), ..request.clone() });
        if truth.status != 200 {
            return truth;
        }
        if request.method == "HEAD" {
            return truth.with(
                "docker-content-digest",
                request.path.rsplit('/').next().filter(|it| it.len() > 9).unwrap_or(&index),
            );
        }
        let mut bytes = truth.body.to_vec();
        let kept = if matches!(lie, Lie::HalfOfIt) { bytes.len() / 2 } else { 0 };
        bytes[kept..].fill(b' ');
        let whole = Response { body: Bytes::from(bytes), ..truth };
        match (lie, request.range_start()) {
            (Lie::HeadOnly, _) => Response::new(404, ""),
            (Lie::WithoutRanges, _) | (_, None) => whole,
            (_, Some(start)) => {
                let total = whole.body.len();
                let last = request.header("range").and_then(|range| range.rsplit('-').next()?.parse().ok());
                let end = last.map_or(total, |last: usize| total.min(last + 1)).max(start);
                let range = format!("bytes {start}-{}/{total}", end.max(1) - 1);
                Response { status: 206, body: whole.body.slice(start..end), ..whole }.with("content-range", range)
            }
        }
    })
    .await
}

fn as_user(user: &str) -> (&'static str, String) {
    ("authorization", format!("Basic {}", STANDARD.encode(user)))
}

async fn get_as(dray: &Dray, path: &str, user: &str, range: Option<&str>) -> Answer {
    let (name, value) = as_user(user);
    let mut headers = vec![(name, value.as_str()), ("accept", INDEX)];
    headers.extend(range.map(|range| ("range", range)));
    get(&dray.url(path), &headers).await
}

/// Everything by which bob could come by alice's bytes: what he requests, and what may come of it.
#[tokio::test(flavor = "multi_thread")]
async fn repository_that_only_claims_to_have_a_blob_gets_nothing() {
    let image = Image::new(1, &[700_000, 1_000]);
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "0123456789abcdef-peers").unwrap();
    for lie in LIES {
        let upstream = lying(&image, lie).await;
        let ports = [free_port(), free_port()];
        let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
        let [first, second] = ports.map(|port| {
            let peers = format!(
                "[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\nkey_file = \"{}\"\n",
                key.display()
            );
            let rules = ["reg.example", "other.example"].map(|registry| {
                let url = upstream.url();
                format!("[[registry]]\nmatch = \"{registry}\"\nupstreams = [\"{url}\"]\naccess = \"client\"\n")
            });
            Start::new(rules.join("") + &peers).run()
        });
        let kinds = || {
            let manifests = image.manifests.keys().map(|digest| format!("manifests/{digest}"));
            let blobs = image.blobs.keys().map(|digest| format!("blobs/{digest}"));
            ["manifests/1".to_owned()].into_iter().chain(manifests).chain(blobs)
        };
        for dray in [&first, &second] {
            for kind in kinds() {
                let answer = get_as(dray, &format!("/v2/team/app/{kind}?ns=reg.example"), ALICE, None).await;
                assert_eq!(answer.status, 200, "{kind}: {}", answer.text());
            }
            dray.fills_end().await;
        }
        for (dray, registry) in [(&first, "reg.example"), (&second, "reg.example"), (&first, "other.example")] {
            for kind in kinds() {
                let path = format!("/v2/evil/app/{kind}?ns={registry}");
                let alices = get_as(&first, &format!("/v2/team/app/{kind}?ns=reg.example"), ALICE, None).await.body;
                for range in [None, Some("bytes=0-"), Some("bytes=-9"), Some("bytes=500-")] {
                    let answer = get_as(dray, &path, BOB, range).await;
                    let has_all = answer.status < 300 && answer.complete && alices.ends_with(&answer.body);
                    assert!(!has_all || answer.body.is_empty(), "{lie:?} {path} {range:?}: {}", answer.status);
                    assert!(
                        digest(&answer.body) != digest(&alices) && !["memory", "disk"].contains(&answer.source()),
                        "{lie:?} {path} {range:?}: {} of {}",
                        answer.status,
                        answer.source()
                    );
                }
                // Only what the upstream says itself.
                let (name, value) = as_user(BOB);
                let head = send(Method::HEAD, &dray.url(&path), &[(name, &value)]).await;
                assert!(head.body.is_empty());
            }
        }
        // Nor by alice's own repository.
        for kind in kinds() {
            let answer = get_as(&first, &format!("/v2/team/app/{kind}?ns=reg.example"), BOB, None).await;
            assert_eq!(answer.status, 403, "{lie:?} {kind}");
        }
    }
}
