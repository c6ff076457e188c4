//! `dray warm`, prefetch and pins: images that are cached before a client requests them.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::image::{INDEX, Image, MANIFEST, digest};
use dray_tests::process::{free_port, output};
use dray_tests::registry::Registry;
use dray_tests::upstream::{Content, Fault, Response, TestUpstream};
use serde_json::json;

fn warm(dray: &Dray, arguments: &[&str]) -> (Option<i32>, String) {
    let server = dray.url("");
    let printed = output(Command::new(binary()).args(["warm", "--server", &server]).args(arguments));
    (
        printed.status.code(),
        String::from_utf8_lossy(&printed.stdout).into_owned() + &String::from_utf8_lossy(&printed.stderr),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_command_downloads_the_wanted_platforms() {
    let mut hub = Registry::open().await;
    let image = Image::new(1, &[3_000_000, 1000]);
    hub.push("library/app", "1", &image).await;
    let dray = Start::with_upstream("docker.io", &hub.url()).run();
    let (code, printed) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && printed.contains("1 of 1 images warm: 2 manifests, 3 blobs"), "{printed}");
    let (code, printed) = warm(&dray, &["docker.io/library/app:1", "--all-platforms"]);
    assert!(
        code == Some(0) && printed.contains("3 manifests, 6 blobs") && printed.contains("were cached already"),
        "{printed}"
    );
    let (code, printed) = warm(&dray, &["app:1", "--platform", "linux/s390x"]);
    assert!(code == Some(1) && printed.contains("only for linux/arm64, linux/amd64"), "{printed}");
    // A Deployment on standard input.
    let yaml = format!("kind: Deployment\nspec:\n  containers:\n  - name: a\n    image: app@{}\n", image.digest);
    let mut command = Command::new(binary());
    command.args(["warm", "--server", &dray.url(""), "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
    let printed = child.wait_with_output().unwrap();
    assert!(printed.status.success() && String::from_utf8_lossy(&printed.stdout).contains("1 of 1 images warm"));
    dray.wait_for_fills().await;
    hub.stop();
    for (digest, bytes) in &image.blobs {
        assert_eq!(&dray.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await.body, bytes);
    }
}

/// Each node downloads what it owns, and nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn prefetched_images_stay_fresh() {
    let [old, new] = [Image::new(1, &[600_000, 700_000]), Image::new(2, &[800_000])];
    let contents = [&old, &new].map(|image| Content::new(&[("library/app", "1", image)]));
    let now = Arc::new(AtomicUsize::new(0));
    let at = now.clone();
    let upstream =
        TestUpstream::with_handler(move |request| contents[at.load(Ordering::SeqCst)].respond(request)).await;
    let ports: Vec<u16> = (0..2).map(|_| free_port()).collect();
    let members = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect::<Vec<_>>().join(", ");
    let node = |port: &u16| {
        let rule = rule("docker.io", &upstream.url());
        Start::new(format!(
            "{rule}tag_ttl = \"0s\"\n[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n\
             [[prefetch]]\nimages = [\"app:1\"]\nschedule = \"*/2 * * * * *\"\nplatforms = [\"linux/amd64\"]\n"
        ))
        .run()
    };
    let nodes: Vec<Dray> = ports.iter().map(node).collect();
    for (nth, image) in [&old, &new].into_iter().enumerate() {
        // The first node that starts marks the other one as down.
        for dray in &nodes {
            dray_tests::eventually("the nodes are healthy", async || {
                let status = dray_tests::http::get(&format!("http://{}/api/v1/status", dray.admin), &[]).await;
                (!status.text().contains("\"state\":\"down\"")).then_some(())
            })
            .await;
        }
        now.store(nth, Ordering::SeqCst);
        for layer in &image.layers {
            dray_tests::eventually("the image is downloaded", async || {
                (upstream.count("GET", layer) > 0 || image.blobs[layer].is_empty()).then_some(())
            })
            .await;
        }
        for dray in &nodes {
            dray.wait_for_fills().await;
        }
        for layer in &image.layers {
            assert!(upstream.count("GET", layer) == 1 || nth == 0, "one download, by the owner");
            for dray in &nodes {
                let source = dray.get(&format!("/v2/library/app/blobs/{layer}?ns=docker.io")).await;
                assert!(source.status == 200 && source.source() != "upstream", "{}", source.source());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_image_outlives_images_used_more() {
    let pinned = Image::new(1, &[3_000_000]);
    let others: Vec<Image> = (2..30).map(|seed| Image::new(seed, &[4_000_000])).collect();
    let mut images = vec![("library/pinned".to_owned(), &pinned)];
    images.extend(others.iter().enumerate().map(|(nth, image)| (format!("library/other{nth}"), image)));
    let images: Vec<_> = images.iter().map(|(name, image)| (name.as_str(), "1", *image)).collect();
    let upstream = TestUpstream::start(&images, |_, r| r).await;
    let pin = "[[pin]]\nimages = [\"pinned:1\"]\nplatforms = [\"linux/amd64\"]\n";
    let dray = Start::new(rule("docker.io", &upstream.url()) + pin).disk("64MiB").run();
    let layer = &pinned.layers[0];
    dray_tests::eventually("the pin is downloaded", async || (upstream.count("GET", layer) == 1).then_some(())).await;
    dray.wait_for_fills().await;
    for _ in 0..2 {
        for (nth, image) in others.iter().enumerate() {
            let blob = format!("/v2/library/other{nth}/blobs/{}?ns=docker.io", image.layers[0]);
            assert_eq!(dray.get(&blob).await.status, 200);
            dray.wait_for_fills().await;
        }
    }
    assert!(dray.metric("dray_evicted_bytes_total").await > 50_000_000);
    let kept = dray.get(&format!("/v2/library/pinned/blobs/{layer}?ns=docker.io")).await;
    assert_eq!((kept.status, kept.source()), (200, "disk"));
}

/// When few pulls remain, they belong to clients that wait.
#[tokio::test(flavor = "multi_thread")]
async fn prefetch_waits_while_rate_limit_remaining_is_low() {
    let (first, second) = (Image::new(1, &[500_000]), Image::new(2, &[600_000]));
    let images = [("library/first", "1", &first), ("library/second", "1", &second)];
    let left = Arc::new(AtomicUsize::new(24));
    let now = left.clone();
    let upstream = TestUpstream::start(&images, move |_, response| {
        let remaining = format!("{};w=21600", now.load(Ordering::SeqCst));
        response.with("ratelimit-limit", "100;w=21600").with("ratelimit-remaining", remaining)
    })
    .await;
    let dray = Start::new(format!(
        "{}tag_ttl = \"0s\"\n[[prefetch]]\nimages = [\"first:1\", \"second:1\"]\nschedule = \"* * * * * *\"\n\
         platforms = [\"linux/amd64\"]\n",
        rule("docker.io", &upstream.url())
    ))
    .run();
    dray_tests::eventually("the first image is downloaded", async || {
        (upstream.count("GET", &first.layers[0]) > 0).then_some(())
    })
    .await;
    // The schedule runs several more times.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(upstream.count("GET", "library/second") + upstream.count("HEAD", "library/second"), 0);
    left.store(90, Ordering::SeqCst);
    // A waiting client is served, and the response updates the remaining limit.
    assert_eq!(dray.get("/v2/library/first/manifests/1?ns=docker.io").await.status, 200);
    dray_tests::eventually("the second image is downloaded", async || {
        (upstream.count("GET", &second.layers[0]) > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_image_is_not_warm() {
    let (good, bad) = (Image::new(1, &[500_000]), Image::new(2, &[600_000]));
    let wrong = bad.layers[0].clone();
    let images = [("library/good", "1", &good), ("library/bad", "1", &bad)];
    let upstream = TestUpstream::start(&images, move |request, response| match request.path.contains(&wrong) {
        true => Response::new(404, ""),
        false => response,
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    let (code, printed) = warm(&dray, &["good:1", "bad:1", "none:1"]);
    assert_eq!(code, Some(1));
    for expected in
        ["1 of 3 images warm", "failed: docker.io/library/bad:1: sha256:", "failed: docker.io/library/none:1: 404"]
    {
        assert!(printed.contains(expected), "{expected}: {printed}");
    }
    for (arguments, expected) in
        [(&[][..], "no image"), (&["UPPER"], "is not a valid image name"), (&["-f", "/nonexistent"], "/nonexistent")]
    {
        let (code, printed) = warm(&dray, arguments);
        assert!(code == Some(2) && printed.contains(expected), "{printed}");
    }
    let nowhere = format!("127.0.0.1:{}", free_port());
    let unreachable = output(Command::new(binary()).args(["warm", "a", "b", "--server", &nowhere]));
    let printed = String::from_utf8_lossy(&unreachable.stderr).into_owned();
    assert!(unreachable.status.code() == Some(1) && unreachable.stdout.is_empty(), "{printed}");
    assert!(
        printed.contains(&format!("cannot connect to http://{nowhere}")) && printed.contains("--server"),
        "{printed}"
    );
}

/// An empty or unusable image does not count as warm.
#[tokio::test(flavor = "multi_thread")]
async fn image_without_the_platform_is_not_warm() {
    let config = json!({"os": "linux", "architecture": "arm64"}).to_string().into_bytes();
    let of_config = digest(&config);
    let descriptor =
        |media_type: &str, digest: &str| json!({"mediaType": media_type, "digest": digest, "size": config.len()});
    let image = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
        "config": descriptor("application/vnd.oci.image.config.v1+json", &of_config)});
    let missing = descriptor(INDEX, &digest(b"missing"));
    let manifests = [
        ("arm", MANIFEST, image),
        ("empty", INDEX, json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})),
        ("hello", MANIFEST, json!({"hello": "world"})),
        ("nested", INDEX, json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [missing]})),
    ];
    let upstream = TestUpstream::with_handler(move |request| {
        let last = request.path.rsplit('/').next().unwrap();
        let manifest =
            manifests.iter().find(|(tag, ..)| *tag == last || digest(&manifest_body(tag, &manifests)) == last);
        match manifest {
            Some((tag, media_type, _)) => {
                let body = manifest_body(tag, &manifests);
                let response = Response::new(200, body.clone()).with("content-type", media_type);
                response.with("docker-content-digest", digest(&body))
            }
            None if last == of_config => Response::new(200, config.clone()),
            None => Response::new(404, ""),
        }
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    for (tag, expected) in [
        ("arm", "it has no image for linux/amd64, only for linux/arm64"),
        ("empty", "is empty"),
        ("hello", "neither an image nor an index"),
        ("nested", "404"),
    ] {
        let (code, printed) = warm(&dray, &[&format!("team/app:{tag}"), "--platform", "linux/amd64"]);
        assert!(
            code == Some(1) && printed.contains(expected) && printed.contains("0 of 1 images warm"),
            "{tag}: {printed}"
        );
    }
    let (code, printed) = warm(&dray, &["team/app:arm", "--platform", "linux/arm64"]);
    assert!(code == Some(0), "{printed}");
}

fn manifest_body(tag: &str, manifests: &[(&str, &str, serde_json::Value)]) -> Vec<u8> {
    let (.., body) = manifests.iter().find(|(known, ..)| *known == tag).unwrap();
    body.to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn image_bypassing_the_cache_is_not_warm() {
    let image = Image::new(1, &[80_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::new(rule("docker.io", &upstream.url())).disk("64MiB").run();
    let (code, printed) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(1) && printed.contains("but not cached"), "{printed}");
    let registry = Registry::open().await;
    registry.push("library/app", "1", &image).await;
    let arguments = ["warm", "app:1", "--platform", "linux/amd64", "--server", &registry.url()];
    let other_server = output(Command::new(binary()).args(arguments));
    let printed = String::from_utf8_lossy(&other_server.stdout).into_owned();
    assert!(other_server.status.code() == Some(1) && printed.contains("is not a dray"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_download_is_resumed_by_warm() {
    let image = Image::new(1, &[4_000_000]);
    let broken = Arc::new(AtomicUsize::new(0));
    let breaks = broken.clone();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
        let is_first = request.is_blob() && breaks.fetch_add(1, Ordering::SeqCst) < 2;
        if is_first { response.fault(Fault::CutAfter(1_000_000)) } else { response }
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    let (code, printed) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && broken.load(Ordering::SeqCst) > 2, "{printed}");
}
