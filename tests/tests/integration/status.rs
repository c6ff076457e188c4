//! What people see: the status as JSON, on a page and at a terminal, and who is shown it.

use std::process::Command;

use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::http::{client, get};
use dray_tests::image::Image;
use dray_tests::process::{free_port, output};
use dray_tests::upstream::{Response, TestUpstream};
use serde_json::Value;

async fn json(dray: &Dray, path: &str) -> Value {
    let answer = get(&format!("http://{}{path}", dray.admin), &[]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    serde_json::from_slice(&answer.body).unwrap()
}

fn command(dray: &Dray, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(binary());
    let said = output(command.args(arguments).args(["--admin", &dray.admin.to_string()]));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (said.status.code(), text(&said.stdout), text(&said.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_what_was_done_and_from_where() {
    let image = Image::new(1, &[2_000_000]);
    let hub =
        TestUpstream::start(&[("library/app", "1", &image)], |_, r| r.with("ratelimit-remaining", "76;w=21600")).await;
    let gone = TestUpstream::answering(|_| Response::new(503, "")).await;
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
    dray.fills_end().await;
    let again = dray.get(&blob).await;
    assert_eq!(dray.get("/v2/a/manifests/1?ns=gone.example").await.status, 503);
    let status = dray_tests::eventually("the last answer is noted", async || {
        let status = json(&dray, "/api/v1/status").await;
        (status["recent"].as_array().unwrap().len() == 4).then_some(status)
    })
    .await;
    assert!(!status.to_string().contains("hush"));
    for (source, requests) in [("origin", 2), ("disk", 1), ("none", 1)] {
        assert_eq!(status["sources"][source]["requests"], requests, "{status}");
    }
    let recent = &status["recent"][1];
    assert_eq!(recent["id"], again.header("x-request-id").unwrap());
    assert_eq!((&recent["image"], &recent["reference"]), (&"docker.io/library/app".into(), &layer.into()));
    assert_eq!((recent["source"].as_str(), recent["bytes"].as_u64()), (Some("disk"), Some(again.body.len() as u64)));
    assert_eq!(status["traffic"]["saved_bytes"].as_u64().unwrap(), again.body.len() as u64);
    assert_eq!(status["images"][0]["image"], "docker.io/library/app");
    assert!(status["cache"]["blobs_bytes"].as_u64().unwrap() >= again.body.len() as u64);
    let hub_row = status["origins"].as_array().unwrap().iter().find(|row| row["rule"] == "docker.io").unwrap();
    assert_eq!((&hub_row["state"], &hub_row["rate_limit_remaining"]), (&"well".into(), &76.into()));

    let (code, shown, _) = command(&dray, &["status"]);
    assert!(code == Some(0) && shown.contains("docker.io/library/app") && !shown.contains('\x1b'), "{shown}");
    let (code, shown, _) = command(&dray, &["status", "--json"]);
    assert!(code == Some(0) && serde_json::from_str::<Value>(&shown).unwrap()["recent"].is_array());

    let (code, shown, _) = command(&dray, &["explain", "app:1"]);
    assert_eq!(code, Some(0));
    for says in ["docker.io/library/app:1", "the user robot", &hub.url(), &image.digest, "served from memory"] {
        assert!(shown.contains(says), "{says}: {shown}");
    }
    let (_, shown, _) =
        command(&dray, &["explain", &format!("gone.example/a@{}", dray_tests::image::digest(b"not here"))]);
    assert!(shown.contains("the registry is asked") && shown.contains("gone.example/a@sha256"), "{shown}");
    for (image, host) in [("10.0.0.5:5000/app", "10.0.0.5"), ("localhost:5000/app", "localhost")] {
        let (_, shown, _) = command(&dray, &["explain", image]);
        for says in ["refused with 403", &format!("{host} is not a public address"), "[guard] allow", "upstream"] {
            assert!(shown.contains(says), "{says}: {shown}");
        }
    }
    let (code, _, error) = command(&dray, &["explain", "UPPER:x y"]);
    assert!(code == Some(2) && error.contains("repository[:tag]"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fill_is_seen_while_it_runs() {
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
    let fill = dray_tests::eventually("it is being fetched", async || {
        let status = json(&dray, "/api/v1/status").await;
        status["fills"].get(0).filter(|fill| fill["written_bytes"].as_u64() >= Some(500_000)).cloned()
    })
    .await;
    assert_eq!(
        (&fill["image"], fill["total_bytes"].as_u64()),
        (&"docker.io/library/app".into(), Some(bytes.len() as u64))
    );
    upstream.open_gate();
    assert_eq!(pulling.await.unwrap(), bytes.len());
    dray.fills_end().await;
    assert_eq!(json(&dray, "/api/v1/status").await["fills"], Value::Array(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_is_for_the_machine_or_for_those_with_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "0123456789abcdef\n").unwrap();
    let shown = ["/", "/api/v1/status", "/api/v1/events", "/api/v1/explain?image=a"];
    let near = Start::new("").run();
    for path in shown {
        // A page of somebody else's, whose name was made to lead here.
        let rebound = get(&format!("http://{}{path}", near.admin), &[("host", "evil.example")]).await;
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
        assert_eq!(get(&url(open), &[]).await.status, 200, "probes know no token");
    }
    let (code, _, error) = command(&guarded, &["status"]);
    assert!(code == Some(1) && error.contains("--token-file"), "{error}");
    let (code, _, error) = command(&guarded, &["status", "--token-file", file.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{error}");
    let wrong = dir.path().join("wrong");
    std::fs::write(&wrong, "0123456789abcdeg\n").unwrap();
    let (code, _, error) = command(&guarded, &["status", "--token-file", wrong.to_str().unwrap()]);
    assert!(code == Some(1) && error.contains("wrong is not the one in its admin_token_file"), "{error}");
    let registry = output(Command::new(binary()).args(["status", "--admin", &near.registry.to_string()]));
    let said = String::from_utf8_lossy(&registry.stderr);
    assert!(registry.status.code() == Some(1) && said.contains("registry port") && said.contains("5051"), "{said}");
    let nobody = output(Command::new(binary()).args(["status", "--admin", &format!("127.0.0.1:{}", free_port())]));
    assert!(nobody.status.code() == Some(1) && String::from_utf8_lossy(&nobody.stderr).contains("is dray running"));
}

/// In Chromium, with a thousand peers. `DRAY_SCREENSHOTS=DIR` keeps what it looked like.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_readable_by_day_by_night_and_on_a_phone() {
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
    let looks = dray_tests::page::look(dray.admin, shots);
    assert_eq!(looks.len(), 3);
    assert_ne!(looks[0]["background"], looks[1]["background"], "night is darker");
    for look in &looks {
        let text = look["text"].as_str().unwrap();
        assert!(text.contains("docker.io/library/app") && text.contains("1000 nodes in 1 zone"), "{text}");
        assert_eq!(look["peers"], 20, "the rest when asked for");
    }
}
