//! What is kept survives, and what cannot be kept is served all the same.

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
async fn a_kill_at_any_moment_loses_nothing_that_was_whole() {
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
    // In the middle of a fill.
    let url = dray.url(&path(&image.layers[0]));
    let half = tokio::spawn(async move { dray_tests::http::get(&url, &[]).await });
    eventually("the fill begins", async || (upstream.count("GET", &image.layers[0]) == 1).then_some(())).await;
    let dray = dray.kill_and_restart();
    // Whoever asked has half of it, or not even an answer.
    assert!(half.await.map_or(true, |answer| !answer.complete));
    upstream.open_gate();
    let answer = dray.get(&path(&image.layers[0])).await;
    assert!(answer.complete && answer.body == image.layer().1);
    dray.fills_end().await;
    // And after it.
    let dray = dray.kill_and_restart();
    drop(upstream);
    assert_eq!(dray.get(manifest).await.status, 200);
    for layer in &image.layers {
        let answer = dray.get(&path(layer)).await;
        assert_eq!((answer.status, answer.source()), (200, "disk"));
        assert!(answer.body == image.blobs[layer]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_of_the_machine_files_are_hashed_before_they_are_believed() {
    let image = Image::new(1, &[3_000_000, 2_000_000]);
    let upstream = upstream(&image).await;
    let mut dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for layer in &image.layers {
        assert_eq!(dray.get(&path(layer)).await.status, 200);
    }
    dray.fills_end().await;
    dray.process().kill();
    let cache = dray.start().cache_dir().clone();
    let hex = |layer: &str| layer.trim_start_matches("sha256:").to_owned();
    let file = |layer: &str| cache.join("v1/blobs/sha256").join(&hex(layer)[..2]).join(hex(layer));
    // Power went: a page of the first never reached the disk.
    let damaged = std::fs::File::options().write(true).open(file(&image.layers[0])).unwrap();
    damaged.write_all_at(&[0; 4096], 1_000_000).unwrap();
    std::fs::write(cache.join("v1/state"), "another boot").unwrap();
    let dray = dray.start().clone().run();
    let first = dray.get(&path(&image.layers[0])).await;
    assert_eq!(first.source(), "origin", "fetched anew before anybody notices");
    assert!(first.complete && first.body == image.blobs[&image.layers[0]]);
    let asked = upstream.count("GET", &image.layers[1]);
    let sound = dray.get(&path(&image.layers[1])).await;
    assert!(sound.complete && sound.body == image.blobs[&image.layers[1]]);
    assert_eq!((sound.source(), upstream.count("GET", &image.layers[1])), ("disk", asked));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrub_finds_what_the_disk_has_damaged() {
    let image = Image::new(1, &[3_000_000, 2_000_000]);
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for layer in &image.layers {
        assert!(dray.get(&path(layer)).await.complete);
    }
    dray.fills_end().await;
    let hex = image.layers[0].trim_start_matches("sha256:");
    let file = dray.start().cache_dir().join("v1/blobs/sha256").join(&hex[..2]).join(hex);
    let rotten = std::fs::File::options().write(true).open(file).unwrap();
    rotten.write_all_at(b"x", 2_000_000).unwrap();
    eventually("the scrub is through", async || {
        (dray.metric("dray_damaged_blobs_total").await == 1
            && dray.metric("dray_scrubbed_bytes_total").await > 5_000_000)
            .then_some(())
    })
    .await;
    // Whoever read its beginning, from whatever registry, must not get another copy's end.
    let elsewhere = path(&image.layers[0]).replace("docker.io", "ghcr.io");
    assert_eq!(dray.get_range(&elsewhere, "bytes=1000000-").await.status, 404);
    let again = dray.get(&path(&image.layers[0])).await;
    assert!(again.complete && again.source() == "origin" && again.body == image.blobs[&image.layers[0]]);
    assert_eq!(dray.get(&path(&image.layers[1])).await.source(), "disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn others_on_the_same_disk_are_yielded_to() {
    let image = Image::new(1, &[20_000_000]);
    let upstream = upstream(&image).await;
    let disk = Mount::tmpfs("256m");
    let config = rule("docker.io", &upstream.url()) + "[cache]\nkeep_free = \"40%\"\n";
    let dray = Start::new(config).cache(disk.path().join("cache")).disk("50%").run();
    assert!(dray.get(&path(&image.layers[0])).await.complete);
    dray.fills_end().await;
    assert_eq!(dray.get(&path(&image.layers[0])).await.source(), "disk");
    let used = dray.metric("dray_cache_bytes{tier=\"large\"}").await;
    assert!(used > 20_000_000, "{used}");
    std::fs::write(disk.path().join("somebody-elses"), vec![1; 140_000_000]).unwrap();
    eventually("the cache is smaller", async || {
        (dray.metric("dray_cache_bytes{tier=\"large\"}").await == 0).then_some(())
    })
    .await;
    let through = dray.get(&path(&image.layers[0])).await;
    assert!(through.complete && through.body == image.layer().1, "served all the same");
    std::fs::remove_file(disk.path().join("somebody-elses")).unwrap();
    eventually("it is kept again", async || {
        assert!(dray.get(&path(&image.layers[0])).await.complete);
        (dray.metric("dray_cache_bytes{tier=\"large\"}").await > 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_directory_is_only_a_miss() {
    let image = Image::new(1, &[2_000_000, 1000]);
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for _ in 0..2 {
        for layer in &image.layers {
            let answer = dray.get(&path(layer)).await;
            assert!(answer.complete && answer.body == image.blobs[layer]);
        }
        assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
        dray.fills_end().await;
        // A record may still be on its way there.
        eventually("it is gone", async || std::fs::remove_dir_all(dray.start().cache_dir()).ok()).await;
    }
    assert_eq!(upstream.count("GET", &image.layers[0]), 2);
    let dray = dray.kill_and_restart();
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_stays_within_its_bound() {
    let images: Vec<Image> = (0..8).map(|seed| Image::new(seed, &[20_000_000])).collect();
    let served: Vec<_> = images.iter().map(|image| ("library/app", "1", image)).collect();
    let upstream = TestUpstream::start(&served, |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("160MiB").run();
    for image in &images {
        let (layer, bytes) = image.layer();
        let answer = dray.get(&path(layer)).await;
        assert!(answer.complete && answer.body == bytes);
        dray.fills_end().await;
    }
    let used = run(Command::new("du").arg("-sm").arg(dray.start().cache_dir()));
    let megabytes: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    assert!(megabytes <= 160, "{megabytes} MiB");
    assert!(dray.metric("dray_evicted_bytes_total").await > 20_000_000);
    let newest = dray.get(&path(images[7].layer().0)).await;
    assert_eq!(newest.source(), "disk");
    let oldest = dray.get(&path(images[0].layer().0)).await;
    assert_eq!((oldest.source(), oldest.body == images[0].layer().1), ("origin", true));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_passes_through() {
    let image = Image::new(1, &[50_000_000]);
    let (layer, bytes) = image.layer();
    // By its own bound.
    let upstream = upstream(&image).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("64MiB").run();
    for range in [None, Some("bytes=49000000-"), Some("bytes=0-")] {
        let answer = match range {
            None => dray.get(&path(layer)).await,
            Some(range) => dray.get_range(&path(layer), range).await,
        };
        let from = if range == Some("bytes=49000000-") { 49_000_000 } else { 0 };
        assert!(answer.complete && answer.body == bytes.slice(from..), "{range:?}");
    }
    assert!(dray.metric("dray_uncached_total{reason=\"no_space\"}").await >= 3);

    // Because others filled the disk.
    let mount = Mount::tmpfs("90m");
    let start = Start::with_upstream("docker.io", &upstream.url()).disk("85MiB").cache(mount.path().join("cache"));
    let dray = start.run();
    std::fs::write(mount.path().join("others"), vec![1; 30_000_000]).unwrap();
    let answer = dray.get(&path(layer)).await;
    assert!(answer.complete && answer.body == bytes);
    assert_eq!(dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status, 200);
    assert!(dray.metric("dray_uncached_total{reason=\"no_space\"}").await >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_pass_through_no_more_than_elsewhere() {
    let image = Image::new(1, &[50_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, mut response| {
        if request.is_blob() {
            response = response.flipped(500);
        }
        response
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("64MiB").run();
    let answer = dray.get(&path(image.layer().0)).await;
    assert!(!answer.complete && answer.body.len() + 64 * 1024 <= image.layer().1.len());
    let resume = dray.get_range(&path(image.layer().0), "bytes=49000000-").await;
    assert_eq!(resume.status, 404, "the wrong beginning is not completed");
    assert_eq!(dray.metric("dray_digest_mismatches_total").await, 1);
}
