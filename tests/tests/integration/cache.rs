//! Cached content survives crashes, and content that cannot be cached is still served.

use std::os::unix::fs::FileExt;
use std::process::Command;

use dray_tests::dray::{Start, rule};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::mount::Mount;
use dray_tests::process::run;
use dray_tests::upstream::{Fault, TestUpstream};

fn path(digest: &str) -> String {
    format!("/v2/library/app/blobs/{digest}?ns=docker.io")
}

async fn upstream(image: &Image) -> TestUpstream {
    TestUpstream::start(&[("library/app", "1", image)], |_, r| r).await
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_at_any_moment_keeps_complete_blobs() {
    let image = Image::new(1, &[3_000_000, 1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, response| {
        if request.header("user-agent").is_some() && response.body.len() > 2_000_000 {
            response.fault(Fault::GateAfter(1_500_000))
        } else {
            response
        }
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let manifest = "/v2/library/app/manifests/1?ns=docker.io";
    assert_eq!(dray.get(manifest).await.status, 200);
    let small = dray.get(&path(&image.layers[1])).await;
    assert_eq!(small.status, 200);
    // In the middle of a download.
    let url = dray.url(&path(&image.layers[0]));
    let half = tokio::spawn(async move { dray_tests::http::get(&url, &[]).await });
    eventually("the download begins", async || (upstream.count("GET", &image.layers[0]) == 1).then_some(())).await;
    let dray = dray.kill_and_restart();
    // The client has a part of the blob, or no response at all.
    assert!(half.await.map_or(true, |response| !response.complete));
    upstream.open_gate();
    let response = dray.get(&path(&image.layers[0])).await;
    assert!(response.complete && response.body == image.layer().1);
    dray.wait_for_fills().await;
    // And after the download.
    let dray = dray.kill_and_restart();
    drop(upstream);
    assert_eq!(dray.get(manifest).await.status, 200);
    for layer in &image.layers {
        let response = dray.get(&path(layer)).await;
        assert_eq!((response.status, response.source()), (200, "disk"));
        assert!(response.body == image.blobs[layer]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_after_a_machine_crash_is_verified_before_use() {
    let image = Image::new(1, &[3_000_000, 2_000_000]);
    let upstream = upstream(&image).await;
    let mut dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for layer in &image.layers {
        assert_eq!(dray.get(&path(layer)).await.status, 200);
    }
    dray.wait_for_fills().await;
    dray.process().kill();
    let cache = dray.start().cache_dir().clone();
    let hex = |layer: &str| layer.trim_start_matches("sha256:").to_owned();
    let file = |layer: &str| cache.join("v1/blobs/sha256").join(&hex(layer)[..2]).join(hex(layer));
    // A power loss: a page of the first file never reached the disk.
    let damaged = std::fs::File::options().write(true).open(file(&image.layers[0])).unwrap();
    damaged.write_all_at(&[0; 4096], 1_000_000).unwrap();
    std::fs::write(cache.join("v1/state"), "another boot").unwrap();
    let dray = dray.start().clone().run();
    let first = dray.get(&path(&image.layers[0])).await;
    assert_eq!(first.source(), "upstream", "downloaded again before a client notices");
    assert!(first.complete && first.body == image.blobs[&image.layers[0]]);
    let requests = upstream.count("GET", &image.layers[1]);
    let sound = dray.get(&path(&image.layers[1])).await;
    assert!(sound.complete && sound.body == image.blobs[&image.layers[1]]);
    assert_eq!((sound.source(), upstream.count("GET", &image.layers[1])), ("disk", requests));
}

#[tokio::test(flavor = "multi_thread")]
async fn scrub_finds_blobs_corrupted_on_disk() {
    let image = Image::new(1, &[3_000_000, 2_000_000]);
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for layer in &image.layers {
        assert!(dray.get(&path(layer)).await.complete);
    }
    dray.wait_for_fills().await;
    let hex = image.layers[0].trim_start_matches("sha256:");
    let file = dray.start().cache_dir().join("v1/blobs/sha256").join(&hex[..2]).join(hex);
    let rotten = std::fs::File::options().write(true).open(file).unwrap();
    rotten.write_all_at(b"x", 2_000_000).unwrap();
    eventually("the scrub has finished", async || {
        (dray.metric("dray_corrupt_blobs_total").await == 1
            && dray.metric("dray_scrubbed_bytes_total").await > 5_000_000)
            .then_some(())
    })
    .await;
    // A client that has read the corrupt start, under any registry, must not get the end of another copy.
    let other_registry = path(&image.layers[0]).replace("docker.io", "ghcr.io");
    assert_eq!(dray.get_range(&other_registry, "bytes=1000000-").await.status, 404);
    let again = dray.get(&path(&image.layers[0])).await;
    assert!(again.complete && again.source() == "upstream" && again.body == image.blobs[&image.layers[0]]);
    assert_eq!(dray.get(&path(&image.layers[1])).await.source(), "disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_yields_to_other_files_on_its_disk() {
    let image = Image::new(1, &[20_000_000]);
    let upstream = upstream(&image).await;
    let disk = Mount::tmpfs("256m");
    let config = rule("docker.io", &upstream.url()) + "[cache]\nmin_free = \"40%\"\n";
    let dray = Start::new(config).cache(disk.path().join("cache")).disk("50%").run();
    assert!(dray.get(&path(&image.layers[0])).await.complete);
    dray.wait_for_fills().await;
    assert_eq!(dray.get(&path(&image.layers[0])).await.source(), "disk");
    let used = dray.metric("dray_cache_bytes{tier=\"large\"}").await;
    assert!(used > 20_000_000, "{used}");
    std::fs::write(disk.path().join("other-file"), vec![1; 140_000_000]).unwrap();
    eventually("the cache is emptied", async || {
        (dray.metric("dray_cache_bytes{tier=\"large\"}").await == 0).then_some(())
    })
    .await;
    let through = dray.get(&path(&image.layers[0])).await;
    assert!(through.complete && through.body == image.layer().1, "served without being cached");
    std::fs::remove_file(disk.path().join("other-file")).unwrap();
    eventually("the blob is cached again", async || {
        assert!(dray.get(&path(&image.layers[0])).await.complete);
        (dray.metric("dray_cache_bytes{tier=\"large\"}").await > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_cache_directory_is_only_a_miss() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for _ in 0..2 {
        for layer in &image.layers {
            let response = dray.get(&path(layer)).await;
            assert!(response.complete && response.body == image.blobs[layer]);
        }
        assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
        dray.wait_for_fills().await;
        // A record may be written during the removal.
        eventually("the directory is removed", async || std::fs::remove_dir_all(dray.start().cache_dir()).ok()).await;
    }
    assert_eq!(upstream.count("GET", &image.layers[0]), 2);
    let dray = dray.kill_and_restart();
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_stays_within_its_disk_limit() {
    let images: Vec<Image> = (0..8).map(|seed| Image::new(seed, &[20_000_000])).collect();
    let served: Vec<_> = images.iter().map(|image| ("library/app", "1", image)).collect();
    let upstream = TestUpstream::start(&served, |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("160MiB").run();
    for image in &images {
        let (layer, bytes) = image.layer();
        let response = dray.get(&path(layer)).await;
        assert!(response.complete && response.body == bytes);
        dray.wait_for_fills().await;
    }
    let used = run(Command::new("du").arg("-sm").arg(dray.start().cache_dir()));
    let megabytes: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    assert!(megabytes <= 160, "{megabytes} MiB");
    assert!(dray.metric("dray_evicted_bytes_total").await > 20_000_000);
    let newest = dray.get(&path(images[7].layer().0)).await;
    assert_eq!(newest.source(), "disk");
    let oldest = dray.get(&path(images[0].layer().0)).await;
    assert_eq!((oldest.source(), oldest.body == images[0].layer().1), ("upstream", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_that_does_not_fit_bypasses_the_cache() {
    let image = Image::new(1, &[50_000_000]);
    let (layer, bytes) = image.layer();
    // Because of dray's own limit.
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("64MiB").run();
    for range in [None, Some("bytes=49000000-"), Some("bytes=0-")] {
        let response = match range {
            None => dray.get(&path(layer)).await,
            Some(range) => dray.get_range(&path(layer), range).await,
        };
        let from = if range == Some("bytes=49000000-") { 49_000_000 } else { 0 };
        assert!(response.complete && response.body == bytes.slice(from..), "{range:?}");
    }
    assert!(dray.metric("dray_cache_bypass_total{reason=\"no_space\"}").await >= 3);

    // Because other files fill the disk.
    let mount = Mount::tmpfs("90m");
    let start = Start::with_upstream("docker.io", &upstream.url()).disk("85MiB").cache(mount.path().join("cache"));
    let dray = start.run();
    std::fs::write(mount.path().join("others"), vec![1; 30_000_000]).unwrap();
    let response = dray.get(&path(layer)).await;
    assert!(response.complete && response.body == bytes);
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
    assert!(dray.metric("dray_cache_bypass_total{reason=\"no_space\"}").await >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn corrupt_blob_bypassing_the_cache_is_not_completed() {
    let image = Image::new(1, &[50_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, mut response| {
        if request.is_blob() {
            response = response.flipped(500);
        }
        response
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("64MiB").run();
    let response = dray.get(&path(image.layer().0)).await;
    assert!(!response.complete && response.body.len() + 64 * 1024 <= image.layer().1.len());
    let resume = dray.get_range(&path(image.layer().0), "bytes=49000000-").await;
    assert_eq!(resume.status, 404, "the corrupt start is not completed");
    assert_eq!(dray.metric("dray_digest_mismatches_total").await, 1);
}
