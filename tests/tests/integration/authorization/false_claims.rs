//! A registry with one repository under foreign control, as a proxy project of Harbor or a remote repository of
//! Artifactory. The server behind it claims to have every requested digest.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use dray_tests::dray::{Dray, Start};
use dray_tests::http::{ClientResponse, get, send};
use dray_tests::image::{INDEX, Image, digest};
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use reqwest::Method;

use super::tenants::{ALICE, BOB};

/// What the server behind bob's repository sends for content that it does not have.
#[derive(Clone, Copy, Debug)]
enum FalseClaim {
    /// HEAD responds 200, GET 404.
    HeadOnly,
    /// Other bytes of the right length, also for ranges.
    OtherBytes,
    /// Other bytes, and no ranges.
    WithoutRanges,
    /// The bytes of the first half, which bob has.
    HalfOfBytes,
}

const FALSE_CLAIMS: [FalseClaim; 4] =
    [FalseClaim::HeadOnly, FalseClaim::OtherBytes, FalseClaim::WithoutRanges, FalseClaim::HalfOfBytes];

fn user_of(request: &Request) -> String {
    let authorization = request.header("authorization").unwrap_or_default();
    let decoded = authorization.split_once(' ').and_then(|(_, text)| STANDARD.decode(text).ok()).unwrap_or_default();
    String::from_utf8(decoded).unwrap_or_default()
}

/// `team/app` belongs to alice. `evil/app` belongs to bob and claims to have alice's image.
async fn false_claimant(image: &Image, claim: FalseClaim) -> TestUpstream {
    let content = Arc::new(Content::new(&[("team/app", "1", image)]));
    let index = image.digest.clone();
    TestUpstream::with_handler(move |request| {
        let user_of_repository = if request.path.starts_with("/v2/team/") { ALICE } else { BOB };
        match user_of(request) {
            user if user == user_of_repository || (request.path == "/v2/" && !user.is_empty()) => {}
            user if user.is_empty() => return Response::new(401, "").with("www-authenticate", "Basic realm=\"r\""),
            _ => return Response::new(403, ""),
        }
        if user_of_repository == ALICE || request.path == "/v2/" {
            return content.respond(request);
        }
        let path = request.path.replace("/evil/", "/team/");
        let right = content.respond(&Request { path, headers: Default::default(), ..request.clone() });
        if right.status != 200 {
            return right;
        }
        if request.method == "HEAD" {
            return right.with(
                "docker-content-digest",
                request.path.rsplit('/').next().filter(|it| it.len() > 9).unwrap_or(&index),
            );
        }
        let mut bytes = right.body.to_vec();
        let kept = if matches!(claim, FalseClaim::HalfOfBytes) { bytes.len() / 2 } else { 0 };
        bytes[kept..].fill(b' ');
        let whole = Response { body: Bytes::from(bytes), ..right };
        match (claim, request.range_start()) {
            (FalseClaim::HeadOnly, _) => Response::new(404, ""),
            (FalseClaim::WithoutRanges, _) | (_, None) => whole,
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

async fn get_as(dray: &Dray, path: &str, user: &str, range: Option<&str>) -> ClientResponse {
    let (name, value) = as_user(user);
    let mut headers = vec![(name, value.as_str()), ("accept", INDEX)];
    headers.extend(range.map(|range| ("range", range)));
    get(&dray.url(path), &headers).await
}

/// Every request by which bob might get alice's bytes.
#[tokio::test(flavor = "multi_thread")]
async fn repository_falsely_claiming_a_blob_gets_nothing() {
    let image = Image::new(1, &[700_000, 1_000]);
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "0123456789abcdef-peers").unwrap();
    for claim in FALSE_CLAIMS {
        let upstream = false_claimant(&image, claim).await;
        let ports = [free_port(), free_port()];
        let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
        let [first, second] = ports.map(|port| {
            let peers = format!(
                "[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\nkey_file = \"{}\"\n",
                key.display()
            );
            let rules = ["reg.example", "other.example"].map(|registry| {
                let url = upstream.url();
                format!(
                    "[[registry]]\nmatch = \"{registry}\"\nupstreams = [\"{url}\"]\nauthorization = \"passthrough\"\n"
                )
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
                let response = get_as(dray, &format!("/v2/team/app/{kind}?ns=reg.example"), ALICE, None).await;
                assert_eq!(response.status, 200, "{kind}: {}", response.text());
            }
            dray.wait_for_fills().await;
        }
        for (dray, registry) in [(&first, "reg.example"), (&second, "reg.example"), (&first, "other.example")] {
            for kind in kinds() {
                let path = format!("/v2/evil/app/{kind}?ns={registry}");
                let alices = get_as(&first, &format!("/v2/team/app/{kind}?ns=reg.example"), ALICE, None).await.body;
                for range in [None, Some("bytes=0-"), Some("bytes=-9"), Some("bytes=500-")] {
                    let response = get_as(dray, &path, BOB, range).await;
                    let has_all = response.status < 300 && response.complete && alices.ends_with(&response.body);
                    assert!(!has_all || response.body.is_empty(), "{claim:?} {path} {range:?}: {}", response.status);
                    assert!(
                        digest(&response.body) != digest(&alices) && !["memory", "disk"].contains(&response.source()),
                        "{claim:?} {path} {range:?}: {} of {}",
                        response.status,
                        response.source()
                    );
                }
                // HEAD passes on the upstream's claim, but no bytes.
                let (name, value) = as_user(BOB);
                let head = send(Method::HEAD, &dray.url(&path), &[(name, &value)]).await;
                assert!(head.body.is_empty());
            }
        }
        // Alice's own repository is denied to bob.
        for kind in kinds() {
            let response = get_as(&first, &format!("/v2/team/app/{kind}?ns=reg.example"), BOB, None).await;
            assert_eq!(response.status, 403, "{claim:?} {kind}");
        }
    }
}
