//! Real clients pull through dray what they pull directly, from registries with every quirk of this suite.

use std::path::Path;
use std::process::Command;

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::{Start, rule};
use dray_tests::image::Image;
use dray_tests::process::output;
use dray_tests::tool;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};
use serde_json::json;

use super::{REGISTRY, dray_of, upstream_of};

type Quirk = fn(&Request, Response) -> Response;

/// Quirks of registries. None of them alone changes the image.
const QUIRKS: [(&str, Quirk); 10] = [
    ("none", |_, response| response),
    ("blobs in chunks", |request, response| match request.is_blob() && request.method == "GET" {
        true if response.status == 200 => response.chunked(),
        _ => response,
    }),
    ("no Docker-Content-Digest", |_, response| response.without("docker-content-digest")),
    ("a wrong Docker-Content-Digest of blobs", |request, response| match request.is_blob() {
        true => response.with("docker-content-digest", dray_tests::image::digest(b"other")),
        false => response,
    }),
    ("HEAD 405", |request, response| match request.method.as_str() {
        "HEAD" => Response::new(405, ""),
        _ => response,
    }),
    ("HEAD 404", |request, response| match request.method.as_str() {
        "HEAD" => Response::new(404, ""),
        _ => response,
    }),
    ("HEAD 500", |request, response| match request.method.as_str() {
        "HEAD" => Response::new(500, ""),
        _ => response,
    }),
    ("no ranges", |request, response| match (request.header("range"), request.is_blob()) {
        (Some(_), true) => Response::new(400, "no ranges"),
        _ => response,
    }),
    ("a relative redirect", |request, response| match request.is_blob() && !request.path.contains("?hop") {
        true => Response::new(307, "").with("location", format!("{}?hop", request.path)),
        false => response,
    }),
    ("a type with a charset", |request, response| match request.is_blob() {
        true => response.with("content-type", "application/octet-stream; charset=binary"),
        false => response,
    }),
];

/// The manifest that a client pulls. None: the pull fails.
fn skopeo(reference: &str, dir: &Path) -> Option<Vec<u8>> {
    let target = dir.join("image");
    let _ = std::fs::remove_dir_all(&target);
    let mut command = Command::new("skopeo");
    command.args(["copy", "--src-tls-verify=false", &format!("docker://{reference}")]);
    let done = output(command.arg(format!("dir:{}", target.display())));
    done.status.success().then(|| std::fs::read(target.join("manifest.json")).expect("a manifest"))
}

fn crane(reference: &str, dir: &Path) -> Option<Vec<u8>> {
    let target = dir.join("image");
    let _ = std::fs::remove_dir_all(&target);
    let mut command = Command::new(tool("crane"));
    command.args(["pull", "--insecure", "--platform", "linux/amd64", "--format", "oci", reference]);
    let done = output(command.arg(&target));
    done.status.success().then(|| std::fs::read(target.join("index.json")).expect("an index"))
}

#[tokio::test(flavor = "multi_thread")]
async fn client_pulls_by_path_what_it_pulls_directly() {
    let dir = tempfile::tempdir().unwrap();
    let mut pulled = [0, 0];
    for (quirk, spoil) in QUIRKS {
        let image = Image::new(1, &[1_000, 300_000, 2_000_000]);
        let upstream = upstream_of(&image, spoil).await;
        let dray = dray_of(&upstream);
        let direct = format!("{}/a/app:1", upstream.address);
        let through = format!("{}/{REGISTRY}/a/app:1", dray.registry);
        for (nth, client) in [skopeo, crane].into_iter().enumerate() {
            let (wanted, path) = (direct.clone(), dir.path().to_owned());
            let wanted = tokio::task::spawn_blocking(move || client(&wanted, &path)).await.unwrap();
            let (reference, path) = (through.clone(), dir.path().to_owned());
            let given = tokio::task::spawn_blocking(move || client(&reference, &path)).await.unwrap();
            assert!(given.is_some() || wanted.is_none(), "client {nth}, {quirk}: works without dray, fails with it");
            if let (Some(given), Some(wanted)) = (given, wanted) {
                assert_eq!(String::from_utf8_lossy(&given), String::from_utf8_lossy(&wanted), "client {nth}, {quirk}");
                pulled[nth] += 1;
            }
        }
    }
    assert!(pulled.iter().all(|count| *count >= 7), "the clients tolerate most of it directly: {pulled:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_with_any_upstream_quirk_needs_no_fallback() {
    let mut upstreams = Vec::new();
    for (nth, (_, spoil)) in QUIRKS.into_iter().enumerate() {
        upstreams.push(upstream_of(&Image::new(nth as u64, &[1_000, 300_000]), spoil).await);
    }
    let rules = upstreams.iter().enumerate().map(|(nth, upstream)| rule(&format!("q{nth}.example"), &upstream.url()));
    let dray = Start::new(rules.collect::<String>()).run();
    for version in [Version::V1, Version::V2] {
        let containerd = Containerd::start(version).await;
        containerd.use_mirror(&dray);
        for (nth, (quirk, _)) in QUIRKS.iter().enumerate() {
            // The registry itself does not exist, so the image comes from dray.
            containerd.pull(&format!("q{nth}.example/a/app:1")).unwrap_or_else(|e| panic!("{quirk}: {e}"));
        }
    }
}

/// Every page of a list, by a client that follows links.
#[tokio::test(flavor = "multi_thread")]
async fn crane_with_opaque_pages_lists_all_tags() {
    let image = Image::new(1, &[1_000]);
    let content = Content::new(&[("a/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request| {
        let Some((path, query)) = request.path.split_once("/tags/list").filter(|_| request.path.contains("/tags/list"))
        else {
            return content.respond(request);
        };
        let at: usize =
            query.split("next_page=t%2F").nth(1).and_then(|rest| rest.split('&').next()?.parse().ok()).unwrap_or(0);
        let response = Response::new(200, json!({"name": "a/app", "tags": [format!("v{at}")]}).to_string());
        match at {
            0..4 => response.with("link", format!("<{path}/tags/list?next_page=t%2F{}&n=1>; rel=\"next\"", at + 1)),
            _ => response,
        }
    })
    .await;
    let dray = dray_of(&upstream);
    let repository = format!("{}/{REGISTRY}/a/app", dray.registry);
    let listed = tokio::task::spawn_blocking(move || {
        output(Command::new(tool("crane")).args(["ls", "--insecure", &repository]))
    });
    let listed = String::from_utf8(listed.await.unwrap().stdout).unwrap();
    assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), ["v0", "v1", "v2", "v3", "v4"]);
}
