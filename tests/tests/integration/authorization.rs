//! `authorization = "passthrough"`: clients get what they could pull from the registry itself, cached or not, and
//! nothing else.

mod false_claims;
mod shared_layers;
mod tenants;
mod tokens;
mod upstream_failures;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::{Dray, Start};
use dray_tests::eventually;
use dray_tests::http::{get, send};
use dray_tests::image::Image;
use dray_tests::process::{free_port, output};
use dray_tests::registry::{Registry, htpasswd};
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};
use reqwest::Method;
use serde_json::json;

use self::tenants::*;

#[tokio::test(flavor = "multi_thread")]
async fn cached_content_is_served_to_authorized_clients_only() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let nothing = TestUpstream::with_handler(|_| Response::new(404, "")).await;
        let others = format!("[[registry]]\nmatch = \"*\"\nupstreams = [\"{}\"]\n", nothing.url());
        let dray = Start::new(tenants.rule() + &others).run();
        let alices = &tenants.alices;
        let (layer, bytes) = alices.layer();
        let blob = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
        assert_eq!(pull_as(&dray, TAG, ALICE).await.body, alices.index(), "{scheme:?}");
        assert_eq!(pull_as(&dray, &blob, ALICE).await.body, bytes);
        let manifest = format!("/v2/a/app/manifests/{}?ns=reg.example", alices.digest);
        assert_eq!(pull_as(&dray, &manifest, ALICE).await.body, alices.index());
        dray.wait_for_fills().await;

        // Cache hits cause no upstream request.
        let token_of_alice = token(&dray.get(&blob).await, Some(ALICE)).await.unwrap();
        let requests = tenants.upstream.requests().len();
        for path in [TAG, &manifest, &blob] {
            let again = get_as(&dray, path, &format!("Bearer {token_of_alice}")).await;
            assert!(again.status == 200 && ["memory", "disk"].contains(&again.source()), "{path}: {}", again.source());
            let basic = format!("Basic {}", STANDARD.encode(ALICE));
            assert_eq!(get_as(&dray, path, &basic).await.status, 200, "{path}");
        }
        assert_eq!(tenants.upstream.requests().len(), requests);

        // Other clients are denied for every path, with and without a challenge.
        let basic = |login: &str| format!("Basic {}", STANDARD.encode(login));
        for path in all_paths(alices, "a/app") {
            let challenged = dray.get(&path).await;
            assert_eq!(challenged.status, 401, "{path}");
            assert_eq!(send(Method::HEAD, &dray.url(&path), &[]).await.status, 401, "{path}");
            assert_eq!(dray.get_range(&path, "bytes=0-9").await.status, 401, "{path}");
            assert_eq!(get_as(&dray, &path, "Bearer forged").await.status, 401, "{path}");
            assert_eq!(get_as(&dray, &path, &basic(BOB)).await.status, 403, "{path}");
            assert_eq!(get_as(&dray, &path, &basic("alice:wrong")).await.status, 403, "{path}");
            let anonymous = token(&challenged, None).await.unwrap();
            assert_eq!(get_as(&dray, &path, &format!("Bearer {anonymous}")).await.status, 403, "{path}");
            let wrong = token(&challenged, Some("alice:wrong")).await;
            match scheme {
                AuthScheme::Tokens => assert_eq!(wrong, Err(401), "{path}"),
                // Only the registry itself can verify the password.
                AuthScheme::Basic => {
                    assert_eq!(get_as(&dray, &path, &format!("Bearer {}", wrong.unwrap())).await.status, 403, "{path}");
                }
            }
            let bobs = token(&challenged, Some(BOB)).await.unwrap();
            assert_eq!(get_as(&dray, &path, &format!("Bearer {bobs}")).await.status, 403, "{path}");
        }
        // Bob's repository does not have the content, even if he knows the digest. His token is valid for his
        // repository only.
        for path in [blob.replace("/a/app", "/b/app"), manifest.replace("/a/app", "/b/app")] {
            assert_eq!(pull_as(&dray, &path, BOB).await.status, 404, "{path}");
        }
        let bobs = token(&dray.get(&TAG.replace("/a/", "/b/")).await, Some(BOB)).await.unwrap();
        assert_eq!(get_as(&dray, &blob, &format!("Bearer {bobs}")).await.status, 401, "a token for another repository");
        // A name of another registry does not return it either.
        for other in ["docker.io", "other.example"] {
            assert_ne!(dray.get(&blob.replace("reg.example", other)).await.status, 200);
        }
        assert_ne!(dray.get(&format!("/v2/a/app/blobs/{layer}")).await.status, 200);
        // Content that his repository has as well is not downloaded again.
        let fetched = tenants.upstream.sent();
        assert_eq!(pull_as(&dray, &blob.replace("/a/app", "/b/both"), BOB).await.body, bytes);
        // Except for the samples by which the registry proves that it has the content.
        assert!(tenants.upstream.sent() - fetched < 20_000, "{scheme:?}: {}", tenants.upstream.sent() - fetched);
        assert_eq!(pull_as(&dray, "/v2/b/app/manifests/1?ns=reg.example", BOB).await.body, tenants.bobs.index());
    }
}

/// A list is passed through from the registry, and authorizes no client.
#[tokio::test(flavor = "multi_thread")]
async fn list_does_not_authorize() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule() + "immutable_tags = [\"1\"]\n").run();
        let (layer, _) = tenants.alices.layer();
        let blob = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
        for path in [TAG, &blob] {
            let authorization = format!("Basic {}", STANDARD.encode(ALICE));
            assert_eq!(get_as(&dray, path, &authorization).await.status, 200);
        }
        dray.wait_for_fills().await;
        for login in ["", BOB, "alice:wrong", "mallory:guess"] {
            let authorization = format!("Basic {}", STANDARD.encode(login));
            for list in ["tags/list".to_owned(), format!("referrers/{}", tenants.alices.digest)] {
                get_as(&dray, &format!("/v2/a/app/{list}?ns=reg.example"), &authorization).await;
            }
            for path in [TAG, &blob] {
                let refused = get_as(&dray, path, &authorization).await.status;
                assert!([401, 403].contains(&refused), "{scheme:?} {login}: {refused}");
            }
        }
    }
}

/// Rules of one registry may be for other clients, or lead to other upstreams.
#[tokio::test(flavor = "multi_thread")]
async fn other_rule_of_the_registry_does_not_authorize() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let yes = TestUpstream::with_handler(|request| match request.method.as_str() {
        "HEAD" => Response::new(200, ""),
        _ => Response::new(404, ""),
    })
    .await;
    let others = format!(
        "[[registry]]\nmatch = \"reg.example/public/*\"\nupstreams = [\"{0}/{{repo}}\"]\n\
         [[registry]]\nmatch = \"reg.example/partner/*\"\nupstreams = [\"{0}/{{rest}}\"]\nauthorization = \"passthrough\"\n",
        yes.url()
    );
    let dray = Start::new(others + &tenants.rule()).run();
    // Small and large blobs have different code paths.
    for digest in tenants.alices.blobs.keys() {
        let blob = format!("/v2/a/app/blobs/{digest}?ns=reg.example");
        assert_eq!(pull_as(&dray, &blob, ALICE).await.body, tenants.alices.blobs[digest]);
        dray.wait_for_fills().await;
        for repository in ["public/x", "partner/x"] {
            let stolen = dray.get(&blob.replace("a/app", repository)).await;
            // An upstream that claims to have everything proves nothing.
            let status = if repository == "public/x" { 404 } else { 401 };
            assert_eq!(stolen.status, status, "{repository} {digest}: {}", stolen.source());
        }
        assert_eq!(
            pull_as(&dray, &blob, ALICE).await.source(),
            if tenants.alices.blobs[digest].len() > 256 * 1024 { "disk" } else { "memory" }
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn public_content_is_served_without_a_challenge() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule()).run();
        let (layer, bytes) = tenants.open.layer();
        assert_eq!(dray.get("/v2/open/app/manifests/1?ns=reg.example").await.body, tenants.open.index());
        let blob = format!("/v2/open/app/blobs/{layer}?ns=reg.example");
        assert_eq!(dray.get(&blob).await.body, bytes);
        assert_eq!(dray.get("/v2/open/app/tags/list?ns=reg.example").await.status, 200);
        assert_eq!(get_as(&dray, &blob, &format!("Basic {}", STANDARD.encode(BOB))).await.status, 200);
        let missing = "/v2/open/app/manifests/2?ns=reg.example";
        assert_eq!(dray.get(missing).await.status, 404);
        // While no client is authorized, a missing tag may be hidden from anonymous clients.
        let dray = Start::new(tenants.rule()).run();
        let anonymous = token(&dray.get(missing).await, None).await.unwrap();
        assert_eq!(get_as(&dray, missing, &format!("Bearer {anonymous}")).await.status, 404);
    }
}

/// A registry decides about its own content only.
#[tokio::test(flavor = "multi_thread")]
async fn registry_falsely_claiming_a_blob_does_not_authorize() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let (layer, bytes) = tenants.alices.layer();
    let (claims, length) = (layer.to_owned(), bytes.len());
    let claimant = TestUpstream::with_handler(move |request| {
        let body = if request.method == "HEAD" { vec![0; length] } else { vec![1; length] };
        let is_manifest = request.path.contains("/manifests/");
        let response = Response::new(200, body).with("docker-content-digest", &claims);
        if is_manifest { response.with("content-type", "application/vnd.oci.image.manifest.v1+json") } else { response }
    })
    .await;
    for authorization in ["shared", "passthrough"] {
        let lying = format!(
            "[[registry]]\nmatch = \"claimant.example\"\nupstreams = [\"{}\"]\nauthorization = \"{authorization}\"\n",
            claimant.url()
        );
        let dray = Start::new(tenants.rule() + &lying).run();
        let blob = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
        assert_eq!(pull_as(&dray, &blob, ALICE).await.body, bytes);
        dray.wait_for_fills().await;
        let stolen = dray.get(&blob.replace("reg.example", "claimant.example")).await;
        assert!(!stolen.complete || stolen.body != bytes, "{authorization}: {}", stolen.status);
        let by_range = dray.get_range(&blob.replace("reg.example", "claimant.example"), "bytes=0-99").await;
        assert_ne!(by_range.body, bytes[..100], "{authorization}");
        assert_eq!(pull_as(&dray, &blob, ALICE).await.body, bytes, "alice's blob is unchanged");
    }
}

/// At most sixteen wrong credentials a second, whatever their form. The bound holds on a slow machine too: waiting only
/// adds time.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_throttled() {
    let guesses: Vec<String> = (0..40).map(|nth| format!("alice:{nth}")).collect();
    let list = "/v2/a/app/tags/list?ns=reg.example";
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        let dray = Start::new(tenants.rule()).run();
        let by_challenge = async || {
            let responses = guesses.iter().map(|guess| pull_as(&dray, TAG, guess));
            futures_util::future::join_all(responses).await
        };
        let at_once = async |path: &str| {
            let responses = guesses.iter().map(async |guess| {
                get_as(&dray, path, &format!("Basic {}", STANDARD.encode(format!("{guess}{path}")))).await
            });
            futures_util::future::join_all(responses).await
        };
        for form in 0..3 {
            let began = std::time::Instant::now();
            let responses = match form {
                0 => by_challenge().await,
                1 => at_once(TAG).await,
                _ => at_once(list).await,
            };
            assert!(responses.iter().all(|response| response.status >= 400), "{scheme:?} {form}");
            let took = began.elapsed();
            assert!(took >= std::time::Duration::from_secs(2), "{scheme:?} {form}: {took:?} for three rounds");
        }
        assert_eq!(pull_as(&dray, TAG, ALICE).await.status, 200, "the right password is still accepted");
    }
}

/// The token of the first client may expire before a large download ends.
#[tokio::test(flavor = "multi_thread")]
async fn fill_continues_with_credentials_of_a_later_client() {
    let image = Image::new(1, &[80_000_000]);
    let (layer, bytes) = image.layer();
    let content = Content::new(&[("a/app", "1", &image)]);
    let over = Arc::new(AtomicUsize::new(0));
    let is_over = over.clone();
    let registry = TestUpstream::with_handler(move |request| {
        let authorization = request.header("authorization").unwrap_or_default().to_owned();
        if request.path.starts_with("/token") {
            let user = authorization.strip_prefix("Basic ").unwrap_or("bm9ib2R5");
            return Response::new(200, json!({ "token": user }).to_string());
        }
        let host = request.header("host").unwrap_or_default();
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
        let token = |login| format!("Bearer {}", STANDARD.encode(login));
        let is_allowed =
            authorization == token(BOB) || (authorization == token(ALICE) && is_over.load(Ordering::SeqCst) == 0);
        match is_allowed {
            true if request.is_blob() && authorization == token(ALICE) => {
                content.respond(request).fault(Fault::GateAfter(1_000_000))
            }
            true => content.respond(request),
            false => Response::new(401, "").with("www-authenticate", challenge),
        }
    })
    .await;
    let rule = format!(
        "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nauthorization = \"passthrough\"\n",
        registry.url()
    );
    let dray = Start::new(rule).run();
    let path = format!("/v2/a/app/blobs/{layer}?ns=reg.example");
    let others = async {
        dray.wait_for_fill_start().await;
        let others = pull_as(&dray, &path, BOB);
        let then = async {
            eventually("bob is authorized", async || {
                let name = "dray_client_authorizations_total{outcome=\"allow\",rule=\"reg.example\"}";
                (dray.metric(name).await >= 2).then_some(())
            })
            .await;
            over.store(1, Ordering::SeqCst);
            registry.open_gate();
        };
        tokio::join!(others, then).0
    };
    let (first, second) = tokio::join!(pull_as(&dray, &path, ALICE), others);
    for response in [first, second] {
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == bytes);
    }
}

/// The owner downloads with the token that the registry issued to the client. It never receives the client's password.
#[tokio::test(flavor = "multi_thread")]
async fn peers_download_private_content_once() {
    for scheme in [AuthScheme::Tokens, AuthScheme::Basic] {
        let tenants = Tenants::new(scheme).await;
        pull_by_peers(&tenants, scheme).await;
    }
}

async fn pull_by_peers(tenants: &Tenants, scheme: AuthScheme) {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "0123456789abcdef-peers").unwrap();
    let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
    let members = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect::<Vec<_>>().join(", ");
    let node = |port: &u16| {
        let peers =
            format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\nkey_file = \"{}\"\n", key.display());
        Start::new(tenants.rule() + &peers).run()
    };
    let nodes: Vec<Dray> = ports.iter().map(node).collect();
    for digest in &tenants.alices.layers {
        let blob = format!("/v2/a/app/blobs/{digest}?ns=reg.example");
        for dray in &nodes {
            assert_eq!(pull_as(dray, TAG, ALICE).await.body, tenants.alices.index());
            assert_eq!(pull_as(dray, &blob, ALICE).await.body, tenants.alices.blobs[digest]);
            dray.wait_for_fills().await;
        }
        let gets = tenants
            .upstream
            .requests()
            .iter()
            .filter(|request| request.method == "GET" && request.path.contains(digest))
            .filter(|request| {
                request
                    .header("authorization")
                    .is_some_and(|authorization| authorization.contains(&STANDARD.encode(ALICE)))
            })
            .count();
        match scheme {
            AuthScheme::Tokens => assert_eq!(gets, 1, "one download for all nodes"),
            // No peer receives a password. A node first looks up which peers have the blob.
            AuthScheme::Basic => assert!((1..=nodes.len()).contains(&gets), "{gets}"),
        }
        for (dray, port) in nodes.iter().zip(&ports) {
            assert_eq!(dray.get(&blob).await.status, 401);
            assert_eq!(pull_as(dray, &blob, BOB).await.status, 403);
            let unauthenticated = get(&format!("http://127.0.0.1:{port}{blob}"), &[]).await;
            assert_eq!(unauthenticated.status, 401, "peers must authenticate");
        }
    }
    // Bob's repository has the same layers. What the owners learn for him authorizes no other client.
    for digest in &tenants.alices.layers {
        let blob = format!("/v2/b/both/blobs/{digest}?ns=reg.example");
        for dray in &nodes {
            assert_eq!(pull_as(dray, &blob, BOB).await.body, tenants.alices.blobs[digest]);
        }
        for dray in &nodes {
            assert_eq!(dray.get(&blob).await.status, 401);
            assert_eq!(pull_as(dray, &blob, ALICE).await.status, 403);
        }
    }
    let manifests = tenants.upstream.count("GET", &tenants.alices.digest);
    assert!(manifests == 1 || scheme == AuthScheme::Basic, "{manifests}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_peers_fail_the_start() {
    let tenants = Tenants::new(AuthScheme::Tokens).await;
    let port = free_port();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [\"127.0.0.1:{port}\"]\n");
    let authorization = output(&mut Start::new(tenants.rule() + &peers).command());
    let error = String::from_utf8_lossy(&authorization.stderr);
    assert!(authorization.status.code() == Some(2) && error.contains("peers.key_file"), "{error}");
}

/// A real registry with a password, and real clients.
#[tokio::test(flavor = "multi_thread")]
async fn containerd_and_skopeo_use_their_own_credentials() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::with(&htpasswd(dir.path(), "alice", "for-a")).await;
    let image = Image::new(1, &[3_000_000, 1000]);
    registry.push("team/app", "1", &image).await;
    let rule = format!(
        "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nauthorization = \"passthrough\"\n",
        registry.url()
    );
    let dray = Start::new(rule).run();
    for version in [Version::V1, Version::V2] {
        let containerd = Containerd::start(version).await;
        containerd.use_mirror(&dray);
        let hosts = containerd.hosts_dir();
        let pull = |more: &[&str]| {
            let mut args = vec!["images", "pull", "--snapshotter", "native", "--hosts-dir", hosts.to_str().unwrap()];
            args.extend(more);
            args.push("reg.example/team/app:1");
            containerd.ctr(&args)
        };
        let anonymous = pull(&[]);
        assert!(!anonymous.status.success());
        let wrong = pull(&["--user", "alice:wrong"]);
        assert!(!wrong.status.success());
        let pulled = pull(&["--user", "alice:for-a"]);
        assert!(
            pulled.status.success(),
            "{version:?}: {}\n{}",
            String::from_utf8_lossy(&pulled.stderr),
            containerd.log()
        );
    }
    let port = dray.url("").rsplit(':').next().unwrap().trim_matches('/').to_owned();
    let copy = |login: &str, to: &str| {
        let from = format!("docker://127.0.0.1:{port}/reg.example/team/app:1");
        let to = format!("dir:{}", dir.path().join(to).display());
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--src-tls-verify=false"]);
        if login.is_empty() {
            skopeo.arg("--src-no-creds")
        } else {
            skopeo.args(["--src-creds", login])
        };
        output(skopeo.args([&from, &to]))
    };
    assert!(!copy("", "anonymous").status.success());
    assert!(!copy("alice:wrong", "wrong").status.success());
    let copied = copy("alice:for-a", "copied");
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
}
