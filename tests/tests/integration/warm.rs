//! `dray warm`: images that are there before somebody asks.

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
    let via = dray.url("");
    let said = output(Command::new(binary()).args(["warm", "--via", &via]).args(arguments));
    (said.status.code(), String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_of_the_platforms_that_are_wanted_is_there() {
    let mut hub = Registry::open().await;
    let image = Image::new(1, &[3_000_000, 1000]);
    hub.push("library/app", "1", &image).await;
    let dray = Start::with_upstream("docker.io", &hub.url()).run();
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && said.contains("1 of 1 images warm: 2 manifests, 3 blobs"), "{said}");
    let (code, said) = warm(&dray, &["docker.io/library/app:1", "--all-platforms"]);
    assert!(code == Some(0) && said.contains("3 manifests, 6 blobs") && said.contains("were there already"), "{said}");
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/s390x"]);
    assert!(code == Some(1) && said.contains("only for linux/arm64, linux/amd64"), "{said}");
    // A Deployment on the standard input.
    let yaml = format!("kind: Deployment\nspec:\n  containers:\n  - name: a\n    image: app@{}\n", image.digest);
    let mut command = Command::new(binary());
    command.args(["warm", "--via", &dray.url(""), "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success() && String::from_utf8_lossy(&said.stdout).contains("1 of 1 images warm"));
    dray.fills_end().await;
    hub.stop();
    for (digest, bytes) in &image.blobs {
        assert_eq!(&dray.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await.body, bytes);
    }
}

/// Each node fetches what it owns, and nothing comes twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_prefetched_stays_fresh() {
    let [old, new] = [Image::new(1, &[600_000, 700_000]), Image::new(2, &[800_000])];
    let contents = [&old, &new].map(|image| Content::new(&[("library/app", "1", image)]));
    let now = Arc::new(AtomicUsize::new(0));
    let at = now.clone();
    let upstream = TestUpstream::answering(move |request| contents[at.load(Ordering::SeqCst)].answer(request)).await;
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
        // The first one that starts takes the other for dead.
        for dray in &nodes {
            dray_tests::eventually("they know each other", async || {
                let status = dray_tests::http::get(&format!("http://{}/api/v1/status", dray.admin), &[]).await;
                (!status.text().contains("\"is_well\":false")).then_some(())
            })
            .await;
        }
        now.store(nth, Ordering::SeqCst);
        for layer in &image.layers {
            dray_tests::eventually("it is fetched", async || {
                (upstream.count("GET", layer) > 0 || image.blobs[layer].is_empty()).then_some(())
            })
            .await;
        }
        for dray in &nodes {
            dray.fills_end().await;
        }
        for layer in &image.layers {
            assert!(upstream.count("GET", layer) == 1 || nth == 0, "once, by its owner");
            for dray in &nodes {
                let source = dray.get(&format!("/v2/library/app/blobs/{layer}?ns=docker.io")).await;
                assert!(source.status == 200 && source.source() != "origin", "{}", source.source());
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_outlives_what_is_used_more() {
    let pinned = Image::new(1, &[3_000_000]);
    let others: Vec<Image> = (2..30).map(|seed| Image::new(seed, &[4_000_000])).collect();
    let mut images = vec![("library/pinned".to_owned(), &pinned)];
    images.extend(others.iter().enumerate().map(|(nth, image)| (format!("library/other{nth}"), image)));
    let images: Vec<_> = images.iter().map(|(name, image)| (name.as_str(), "1", *image)).collect();
    let upstream = TestUpstream::start(&images, |_, r| r).await;
    let pin = "[[pin]]\nimages = [\"pinned:1\"]\nplatforms = [\"linux/amd64\"]\n";
    let dray = Start::new(rule("docker.io", &upstream.url()) + pin).disk("64MiB").run();
    let layer = &pinned.layers[0];
    dray_tests::eventually("it is fetched without being asked for", async || {
        (upstream.count("GET", layer) == 1).then_some(())
    })
    .await;
    dray.fills_end().await;
    for _ in 0..2 {
        for (nth, image) in others.iter().enumerate() {
            let blob = format!("/v2/library/other{nth}/blobs/{}?ns=docker.io", image.layers[0]);
            assert_eq!(dray.get(&blob).await.status, 200);
            dray.fills_end().await;
        }
    }
    assert!(dray.metric("dray_evicted_bytes_total").await > 50_000_000);
    let kept = dray.get(&format!("/v2/library/pinned/blobs/{layer}?ns=docker.io")).await;
    assert_eq!((kept.status, kept.source()), (200, "disk"));
}

/// The few pulls that a registry still allows belong to those who wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_is_put_off_while_few_pulls_are_left() {
    let (first, second) = (Image::new(1, &[500_000]), Image::new(2, &[600_000]));
    let images = [("library/first", "1", &first), ("library/second", "1", &second)];
    let left = Arc::new(AtomicUsize::new(24));
    let now = left.clone();
    let upstream = TestUpstream::start(&images, move |_, answer| {
        let remaining = format!("{};w=21600", now.load(Ordering::SeqCst));
        answer.with("ratelimit-limit", "100;w=21600").with("ratelimit-remaining", remaining)
    })
    .await;
    let dray = Start::new(format!(
        "{}tag_ttl = \"0s\"\n[[prefetch]]\nimages = [\"first:1\", \"second:1\"]\nschedule = \"* * * * * *\"\n\
         platforms = [\"linux/amd64\"]\n",
        rule("docker.io", &upstream.url())
    ))
    .run();
    dray_tests::eventually("the first one is there", async || {
        (upstream.count("GET", &first.layers[0]) > 0).then_some(())
    })
    .await;
    // Several more times by the schedule.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(upstream.count("GET", "library/second") + upstream.count("HEAD", "library/second"), 0);
    left.store(90, Ordering::SeqCst);
    // Whoever waits is served, and hears how many are left.
    assert_eq!(dray.get("/v2/library/first/manifests/1?ns=docker.io").await.status, 200);
    dray_tests::eventually("the second one as well", async || {
        (upstream.count("GET", &second.layers[0]) > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_whole_is_not_warm() {
    let (good, bad) = (Image::new(1, &[500_000]), Image::new(2, &[600_000]));
    let wrong = bad.layers[0].clone();
    let images = [("library/good", "1", &good), ("library/bad", "1", &bad)];
    let upstream = TestUpstream::start(&images, move |request, response| match request.path.contains(&wrong) {
        true => Response::new(404, ""),
        false => response,
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    let (code, said) = warm(&dray, &["good:1", "bad:1", "none:1"]);
    assert_eq!(code, Some(1));
    for says in
        ["1 of 3 images warm", "failed: docker.io/library/bad:1: sha256:", "failed: docker.io/library/none:1: 404"]
    {
        assert!(said.contains(says), "{says}: {said}");
    }
    for (arguments, says) in
        [(&[][..], "no image"), (&["UPPER"], "is no image"), (&["-f", "/nonexistent"], "/nonexistent")]
    {
        let (code, said) = warm(&dray, arguments);
        assert!(code == Some(2) && said.contains(says), "{said}");
    }
    let nowhere = format!("127.0.0.1:{}", free_port());
    let nobody = output(Command::new(binary()).args(["warm", "a", "b", "--via", &nowhere]));
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(nobody.status.code() == Some(1) && nobody.stdout.is_empty(), "{said}");
    assert!(said.contains(&format!("no dray at http://{nowhere}")) && said.contains("--via"), "{said}");
}

/// Nothing is warm by being little.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_image_for_the_platform_is_not_warm() {
    let config = json!({"os": "linux", "architecture": "arm64"}).to_string().into_bytes();
    let of_config = digest(&config);
    let descriptor =
        |media_type: &str, digest: &str| json!({"mediaType": media_type, "digest": digest, "size": config.len()});
    let image = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
        "config": descriptor("application/vnd.oci.image.config.v1+json", &of_config)});
    let missing = descriptor(INDEX, &digest(b"nobody has it"));
    let answers = [
        ("arm", MANIFEST, image),
        ("empty", INDEX, json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})),
        ("hello", MANIFEST, json!({"hello": "world"})),
        ("nested", INDEX, json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [missing]})),
    ];
    let upstream = TestUpstream::answering(move |request| {
        let last = request.path.rsplit('/').next().unwrap();
        let manifest = answers.iter().find(|(tag, ..)| *tag == last || digest(&answer(tag, &answers)) == last);
        match manifest {
            Some((tag, media_type, _)) => {
                let body = answer(tag, &answers);
                let response = Response::new(200, body.clone()).with("content-type", media_type);
                response.with("docker-content-digest", digest(&body))
            }
            None if last == of_config => Response::new(200, config.clone()),
            None => Response::new(404, ""),
        }
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    for (tag, says) in [
        ("arm", "it has nothing for linux/amd64, only for linux/arm64"),
        ("empty", "has nothing in it"),
        ("hello", "neither an image nor an index"),
        ("nested", "404"),
    ] {
        let (code, said) = warm(&dray, &[&format!("team/app:{tag}"), "--platform", "linux/amd64"]);
        assert!(code == Some(1) && said.contains(says) && said.contains("0 of 1 images warm"), "{tag}: {said}");
    }
    let (code, said) = warm(&dray, &["team/app:arm", "--platform", "linux/arm64"]);
    assert!(code == Some(0), "{said}");
}

fn answer(tag: &str, answers: &[(&str, &str, serde_json::Value)]) -> Vec<u8> {
    let (.., body) = answers.iter().find(|(known, ..)| *known == tag).unwrap();
    body.to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_passes_through_is_not_warm() {
    let image = Image::new(1, &[80_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::new(rule("docker.io", &upstream.url())).disk("64MiB").run();
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(1) && said.contains("was not kept"), "{said}");
    let registry = Registry::open().await;
    registry.push("library/app", "1", &image).await;
    let arguments = ["warm", "app:1", "--platform", "linux/amd64", "--via", &registry.url()];
    let elsewhere = output(Command::new(binary()).args(arguments));
    let said = String::from_utf8_lossy(&elsewhere.stdout).into_owned();
    assert!(elsewhere.status.code() == Some(1) && said.contains("is no dray"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_is_gone_on_with() {
    let image = Image::new(1, &[4_000_000]);
    let broken = Arc::new(AtomicUsize::new(0));
    let breaks = broken.clone();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], move |request, response| {
        let is_first = request.is_blob() && breaks.fetch_add(1, Ordering::SeqCst) < 2;
        if is_first { response.fault(Fault::CutAfter(1_000_000)) } else { response }
    })
    .await;
    let dray = Start::new(rule("docker.io", &upstream.url())).run();
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && broken.load(Ordering::SeqCst) > 2, "{said}");
}
