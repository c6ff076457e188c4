//! The status for people: as JSON, on a page and in a terminal, and the access control of it.

use std::process::Command;

use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::http::{client, get};
use dray_tests::image::Image;
use dray_tests::process::{free_port, output};
use dray_tests::upstream::{Response, TestUpstream};
use serde_json::Value;

async fn json(dray: &Dray, path: &str) -> Value {
    let response = get(&format!("http://{}{path}", dray.admin), &[]).await;
    assert_eq!(response.status, 200, "{}", response.text());
    serde_json::from_slice(&response.body).unwrap()
}

fn command(dray: &Dray, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(binary());
    let output = output(command.args(arguments).args(["--admin", &dray.admin.to_string()]));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_requests_and_their_sources() {
    let image = Image::new(1, &[2_000_000]);
    let hub =
        TestUpstream::start(&[("library/app", "1", &image)], |_, r| r.with("ratelimit-remaining", "76;w=21600")).await;
    let gone = TestUpstream::with_handler(|_| Response::new(503, "")).await;
    let dir = tempfile::tempdir().unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, "hush-hush").unwrap();
    let config = format!(
        "{}credentials = {{ username = \"robot\", password_file = \"{}\" }}\n{}",
        rule("docker.io", &hub.url()),
        password.display(),
        rule("gone.example", &gone.url())
    );
    let dray = Start::new(config).run();
    let (layer, _) = image.layer();
    let blob = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let tag = "/v2/library/app/manifests/1?ns=docker.io";
    for path in [tag, &blob] {
        assert_eq!(dray.get(path).await.status, 200);
    }
    dray.wait_for_fills().await;
    let again = dray.get(&blob).await;
    assert_eq!(dray.get("/v2/a/manifests/1?ns=gone.example").await.status, 503);
    let status = dray_tests::eventually("the last response is listed", async || {
        let status = json(&dray, "/api/v1/status").await;
        (status["recent_requests"].as_array().unwrap().len() == 4).then_some(status)
    })
    .await;
    assert!(!status.to_string().contains("hush"));
    for (source, requests) in [("upstream", 2), ("disk", 1), ("none", 1)] {
        assert_eq!(status["sources"][source]["requests"], requests, "{status}");
    }
    let recent = &status["recent_requests"][1];
    assert_eq!(recent["id"], again.header("x-request-id").unwrap());
    assert_eq!((&recent["image"], &recent["reference"]), (&"docker.io/library/app".into(), &layer.into()));
    assert_eq!((recent["source"].as_str(), recent["bytes"].as_u64()), (Some("disk"), Some(again.body.len() as u64)));
    let traffic = |key: &str| status["traffic"][key].as_u64().unwrap();
    // The body of the 503 counts as well.
    let (saved, blob) = (traffic("sent_bytes") - traffic("upstream_bytes"), again.body.len() as u64);
    assert!((blob..blob + 1000).contains(&saved), "{saved} saved, {blob} from the cache");
    assert_eq!(status["top_images"][0]["image"], "docker.io/library/app");
    assert!(status["cache"]["blobs_bytes"].as_u64().unwrap() >= again.body.len() as u64);
    let hub_row = status["upstreams"].as_array().unwrap().iter().find(|row| row["rule"] == "docker.io").unwrap();
    assert_eq!((&hub_row["state"], &hub_row["rate_limit_remaining"]), (&"healthy".into(), &76.into()));

    let (code, shown, _) = command(&dray, &["status"]);
    assert!(code == Some(0) && shown.contains("docker.io/library/app") && !shown.contains('\x1b'), "{shown}");
    let (code, shown, _) = command(&dray, &["status", "--json"]);
    assert!(code == Some(0) && serde_json::from_str::<Value>(&shown).unwrap()["recent_requests"].is_array());

    let (code, shown, _) = command(&dray, &["explain", "app:1"]);
    assert_eq!(code, Some(0));
    for expected in ["docker.io/library/app:1", "the user robot", &hub.url(), &image.digest, "served from memory"] {
        assert!(shown.contains(expected), "{expected}: {shown}");
    }
    let (_, shown, _) =
        command(&dray, &["explain", &format!("gone.example/a@{}", dray_tests::image::digest(b"missing"))]);
    assert!(shown.contains("requested from the upstream") && shown.contains("gone.example/a@sha256"), "{shown}");
    for (image, host) in [("10.0.0.5:5000/app", "10.0.0.5"), ("localhost:5000/app", "localhost")] {
        let (_, shown, _) = command(&dray, &["explain", image]);
        for expected in
            ["refused with 403", &format!("{host} is not a public address"), "[egress] allow_cidrs", "upstream"]
        {
            assert!(shown.contains(expected), "{expected}: {shown}");
        }
    }
    let (code, _, error) = command(&dray, &["explain", "UPPER:x y"]);
    assert!(code == Some(2) && error.contains("repository[:tag]"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fill_is_shown_while_it_runs() {
    use dray_tests::upstream::Fault;
    let image = Image::new(1, &[3_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, response| match request.is_blob() {
        true => response.fault(Fault::GateAfter(1_000_000)),
        false => response,
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let (layer, bytes) = image.layer();
    let url = dray.url(&format!("/v2/library/app/blobs/{layer}?ns=docker.io"));
    let pulling = tokio::spawn(async move { client().get(url).send().await.unwrap().bytes().await.unwrap().len() });
    let fill = dray_tests::eventually("the download is listed", async || {
        let status = json(&dray, "/api/v1/status").await;
        status["downloads"].get(0).filter(|fill| fill["written_bytes"].as_u64() >= Some(500_000)).cloned()
    })
    .await;
    assert_eq!(
        (&fill["image"], fill["total_bytes"].as_u64()),
        (&"docker.io/library/app".into(), Some(bytes.len() as u64))
    );
    upstream.open_gate();
    assert_eq!(pulling.await.unwrap(), bytes.len());
    dray.wait_for_fills().await;
    assert_eq!(json(&dray, "/api/v1/status").await["downloads"], Value::Array(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn status_needs_a_local_host_name_or_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "0123456789abcdef\n").unwrap();
    let shown = ["/", "/api/v1/status", "/api/v1/events", "/api/v1/explain?image=a"];
    let local = Start::new("").run();
    for path in shown {
        // A page of another origin, whose host name resolves to this address (DNS rebinding).
        let rebound = get(&format!("http://{}{path}", local.admin), &[("host", "evil.example")]).await;
        assert_eq!(rebound.status, 403, "{path}");
    }
    let guarded = Start::new(format!("admin_token_file = \"{}\"\n", file.display())).run();
    let url = |path: &str| format!("http://{}{path}", guarded.admin);
    for path in shown {
        for wrong in ["", "Bearer 0123456789abcdeg", "Basic Og=="] {
            let refused = get(&url(path), &[("authorization", wrong)]).await;
            assert_eq!(refused.status, 401, "{path}");
            assert!(refused.header("www-authenticate").unwrap().starts_with("Basic "));
        }
    }
    assert_eq!(get(&url("/"), &[("authorization", "Bearer 0123456789abcdef")]).await.status, 200);
    for open in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(get(&url(open), &[]).await.status, 200, "probes need no token");
    }
    let (code, _, error) = command(&guarded, &["status"]);
    assert!(code == Some(1) && error.contains("--token-file"), "{error}");
    let (code, _, error) = command(&guarded, &["status", "--token-file", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{error}");
    let wrong = dir.path().join("wrong");
    std::fs::write(&wrong, "0123456789abcdeg\n").unwrap();
    let (code, _, error) = command(&guarded, &["status", "--token-file", wrong.to_str().unwrap()]);
    assert!(code == Some(1) && error.contains("wrong is not the one in dray's admin_token_file"), "{error}");
    let registry = output(Command::new(binary()).args(["status", "--admin", &local.registry.to_string()]));
    let error = String::from_utf8_lossy(&registry.stderr);
    assert!(registry.status.code() == Some(1) && error.contains("registry port") && error.contains("5051"), "{error}");
    let unreachable = output(Command::new(binary()).args(["status", "--admin", &format!("127.0.0.1:{}", free_port())]));
    assert!(
        unreachable.status.code() == Some(1)
            && String::from_utf8_lossy(&unreachable.stderr).contains("start dray, or pass its admin address")
    );
}

/// In Chromium, with a thousand peers. `DRAY_SCREENSHOTS=DIR` keeps the screenshots.
#[tokio::test(flavor = "multi_thread")]
async fn status_page_is_readable_in_light_dark_and_on_a_phone() {
    let image = Image::new(1, &[2_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let port = free_port();
    let members = (0..1000).map(|nth| format!("\"127.0.{}.{}:{port}\"", nth / 250, nth % 250 + 1)).collect::<Vec<_>>();
    let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{}]\n", members.join(", "));
    let dray = Start::new(rule("docker.io", &upstream.url()) + &peers).run();
    dray.get("/v2/library/app/manifests/1?ns=docker.io").await;
    dray.get("/v2/library/%3Cimg%20src=x%3E/manifests/1?ns=docker.io").await;
    let page = get(&format!("http://{}/", dray.admin), &[]).await;
    assert!(
        page.body.len() < 100_000 && page.header("content-security-policy").unwrap().contains("default-src 'none'")
    );
    let kept = std::env::var_os("DRAY_SCREENSHOTS");
    let dir = tempfile::tempdir().unwrap();
    let shots = kept.as_deref().map_or(dir.path(), std::path::Path::new);
    let captures = dray_tests::page::capture(dray.admin, shots, None);
    assert_eq!(captures.len(), 3);
    assert_ne!(captures[0]["background"], captures[1]["background"], "the dark variant has another background");
    for capture in &captures {
        let text = capture["text"].as_str().unwrap();
        assert!(text.contains("docker.io/library/app") && text.contains("1000 nodes in 1 zone"), "{text}");
        assert_eq!(capture["peers"], 20, "the rest on demand");
    }
}
