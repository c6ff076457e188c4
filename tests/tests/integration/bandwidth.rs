//! Bandwidth limits between real processes. `make bench PARTS=limits` measures the rates. These tests show that a
//! download under a limit takes no less than its time, and the order of downloads is by priority.

use std::time::{Duration, Instant};

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::TestUpstream;
use rustix::process::Signal;

const MIB: usize = 1 << 20;

fn blob_path(repository: &str, image: &Image) -> String {
    format!("/v2/{repository}/blobs/{}?ns=docker.io", image.layer().0)
}

async fn upstream(images: &[(&str, &Image)]) -> TestUpstream {
    let images: Vec<_> = images.iter().map(|(name, image)| (*name, "1", *image)).collect();
    TestUpstream::start(&images, |_, response| response).await
}

/// Requests a blob as `dray warm` does.
async fn in_background(dray: &Dray, path: &str) -> Instant {
    let response = get(&dray.url(path), &[("priority", "u=7")]).await;
    assert!(response.status == 200 && response.complete, "{response:?}");
    Instant::now()
}

async fn as_client(dray: &Dray, path: &str) -> Instant {
    let response = dray.get(path).await;
    assert!(response.status == 200 && response.complete, "{response:?}");
    Instant::now()
}

#[tokio::test(flavor = "multi_thread")]
async fn limited_downloads_take_their_time_together() {
    let images: Vec<Image> = (0..8).map(|seed| Image::new(seed, &[MIB / 2])).collect();
    let names: Vec<String> = (0..8).map(|nth| format!("library/app{nth}")).collect();
    let served: Vec<_> = names.iter().map(String::as_str).zip(&images).collect();
    let upstream = upstream(&served).await;
    let config = format!("[limits]\nupstream = \"1MiB/s\"\n{}", rule("docker.io", &upstream.url()));
    let (dray, began) = (Start::new(config).run(), Instant::now());
    let pulls = served.iter().map(async |(name, image)| {
        let response = dray.get(&blob_path(name, image)).await;
        assert!(response.complete && response.body == *image.layer().1, "{}", response.status);
    });
    futures_util::future::join_all(pulls).await;
    // The first burst, and the last piece of each connection, do not wait.
    assert!(began.elapsed() >= Duration::from_secs(3), "4 MiB at 1 MiB/s came after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn limit_of_a_rule_leaves_other_rules_alone() {
    let (slow, fast) = (Image::new(1, &[2 * MIB]), Image::new(2, &[2 * MIB]));
    let upstream = upstream(&[("library/slow", &slow), ("library/fast", &fast)]).await;
    let config = format!(
        "[[registry]]\nmatch = \"docker.io/library/slow\"\nupstreams = [\"{0}\"]\nupstream_rate = \"256KiB/s\"\n{1}",
        upstream.url(),
        rule("docker.io", &upstream.url())
    );
    let dray = Start::new(config).run();
    let (slow, fast) = (blob_path("library/slow", &slow), blob_path("library/fast", &fast));
    let (slow, fast) = tokio::join!(as_client(&dray, &slow), as_client(&dray, &fast));
    assert!(fast < slow, "the limited rule delays the other one");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_overtakes_background_downloads() {
    let (prefetched, pulled) = (Image::new(1, &[3 * MIB]), Image::new(2, &[2 * MIB]));
    let upstream = upstream(&[("library/prefetched", &prefetched), ("library/pulled", &pulled)]).await;
    let config = format!("[limits]\nupstream = \"1MiB/s\"\n{}", rule("docker.io", &upstream.url()));
    let dray = Start::new(config).run();
    let (prefetched, pulled) = (blob_path("library/prefetched", &prefetched), blob_path("library/pulled", &pulled));
    let later = async {
        dray.wait_for_fill_start().await;
        as_client(&dray, &pulled).await
    };
    let (background, client) = tokio::join!(in_background(&dray, &prefetched), later);
    assert!(client < background, "the download without a client came first");
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_to_peers_is_limited() {
    let image = Image::new(1, &[3 * MIB]);
    let upstream = upstream(&[("library/app", &image)]).await;
    let ports = [free_port(), free_port()];
    let start = |port: u16| {
        let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n");
        let limits = "[limits]\npeer_upload = \"1MiB/s\"\n";
        Start::new(format!("{}\n{peers}{limits}", rule("docker.io", &upstream.url()))).run()
    };
    let (nodes, path) = (ports.map(start), blob_path("library/app", &image));
    let mut slowest = Duration::ZERO;
    for node in &nodes {
        let began = Instant::now();
        let response = node.get(&path).await;
        assert!(response.complete && response.body == *image.layer().1);
        slowest = slowest.max(began.elapsed());
    }
    assert_eq!(upstream.count("GET", image.layer().0), 1, "one of them had it from the other");
    assert!(slowest >= Duration::from_secs(2), "3 MiB at 1 MiB/s came after {slowest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reload_ends_the_limit_of_a_running_download() {
    let image = Image::new(1, &[16 * MIB]);
    let upstream = upstream(&[("library/app", &image)]).await;
    let unlimited = rule("docker.io", &upstream.url());
    let mut dray = Start::new(format!("[limits]\nupstream = \"64KiB/s\"\n{unlimited}")).run();
    let url = dray.url(&blob_path("library/app", &image));
    let pull = tokio::spawn(async move { get(&url, &[]).await });
    dray.wait_for_fill_start().await;
    std::fs::write(dray.start().dir().join("dray.toml"), unlimited).unwrap();
    dray.process().signal(Signal::HUP);
    // With the limit it would take four minutes.
    let response = tokio::time::timeout(Duration::from_secs(60), pull).await.expect("the limit has ended").unwrap();
    assert!(response.complete && response.body == *image.layer().1);
}
