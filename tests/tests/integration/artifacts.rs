//! Artifacts that are not container images, and manifests with very many layers.

use std::collections::BTreeMap;
use std::process::Command;

use bytes::Bytes;
use dray_tests::dray::{Start, binary};
use dray_tests::image::{INDEX, Image, MANIFEST, digest, noise};
use dray_tests::process::output;
use dray_tests::upstream::{Content, TestUpstream};
use serde_json::json;

/// A model in two manifests of files, behind an index without platforms, as ORAS makes them.
fn model() -> Image {
    let mut image =
        Image { digest: String::new(), manifests: BTreeMap::new(), blobs: BTreeMap::new(), layers: Vec::new() };
    let mut children = Vec::new();
    for part in 0..2 {
        let empty = b"{}".to_vec();
        let files = [noise(part, 900_000), noise(part + 10, 5_000)];
        let layers: Vec<_> = files
            .iter()
            .map(|file| {
                json!({"mediaType": "application/vnd.example.weights", "digest": digest(file), "size": file.len(),
                       "annotations": {"org.opencontainers.image.title": format!("part-{part}.bin")}})
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/vnd.example.model",
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(&empty), "size": 2},
            "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        children.push(json!({"mediaType": MANIFEST, "digest": digest(&manifest), "size": manifest.len()}));
        image.manifests.insert(digest(&manifest), (MANIFEST.to_owned(), manifest.into()));
        for blob in files.into_iter().chain([empty]) {
            image.layers.push(digest(&blob));
            image.blobs.insert(digest(&blob), Bytes::from(blob));
        }
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": children}).to_string().into_bytes();
    image.digest = digest(&index);
    image.manifests.insert(image.digest.clone(), (INDEX.to_owned(), index.into()));
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_are_warmed_and_served_by_tag_and_digest() {
    let model = model();
    let mut upstream = Some(TestUpstream::start(&[("team/model", "7b", &model)], |_, response| response).await);
    let dray = Start::with_upstream("docker.io", &upstream.as_ref().unwrap().url()).run();
    let warmed = output(Command::new(binary()).args(["warm", "--server", &dray.url(""), "team/model:7b"]));
    let printed = String::from_utf8_lossy(&warmed.stdout);
    assert!(warmed.status.success() && printed.contains("3 manifests, 5 blobs"), "{printed}");
    dray.wait_for_fills().await;
    drop(upstream.take());
    for reference in ["7b", model.digest.as_str()] {
        let index = dray.get(&format!("/v2/team/model/manifests/{reference}?ns=docker.io")).await;
        assert_eq!((index.status, index.header("content-type")), (200, Some(INDEX)), "{reference}");
    }
    for (digest, bytes) in &model.blobs {
        assert_eq!(&dray.get(&format!("/v2/team/model/blobs/{digest}?ns=docker.io")).await.body, bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_layers_of_one_manifest_are_each_downloaded_once() {
    let image = Image::new(1, &[100; 2_000]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let upstream = TestUpstream::with_handler(move |request| content.respond(request)).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let (mut command, server) = (Command::new(binary()), dray.url(""));
    command.args(["warm", "--server", &server, "--all-platforms", "app:1"]);
    let warmed = output(&mut command);
    let blobs = image.blobs.len();
    let printed = String::from_utf8_lossy(&warmed.stdout);
    assert!(warmed.status.success() && printed.contains(&format!("{blobs} blobs")), "{printed}");
    dray.wait_for_fills().await;
    let requests = upstream.requests();
    let downloads = requests.iter().filter(|request| request.method == "GET" && request.is_blob()).count();
    assert_eq!(downloads, blobs);
    assert!(output(&mut command).status.success());
    let again = upstream.requests()[requests.len()..].iter().filter(|request| request.is_blob()).count();
    assert_eq!(again, 0, "all of them are cached");
}
