//! Ordinary operation for a long time: tags move, layers are added and evicted. Memory, descriptors, threads and disk
//! do not grow.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dray_tests::dray::{Dray, Start};
use dray_tests::http::client;
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::{Content, Response, TestUpstream};
use tokio::task::JoinSet;

use super::rounds;

/// Resources of one process at one time.
#[derive(Clone, Copy, Debug)]
struct Usage {
    at: Duration,
    measured: [u64; GROWTH_BOUNDS.len()],
    disk: u64,
}

/// The measured resources, and how much each can grow over the measured time.
const GROWTH_BOUNDS: [(&str, u64); 3] = [("resident bytes", 24 << 20), ("descriptors", 48), ("threads", 12)];

/// Disk limit of each cache, in bytes.
const CACHE_DISK: u64 = 160 << 20;

/// Number of repositories with moving tags.
const REPOSITORIES: usize = 8;

/// Time between two moves. Shorter: more new content, and more evictions.
const TAG_MOVE_INTERVAL: Duration = Duration::from_millis(250);

/// A registry with moving tags and the latest image of each repository.
struct MovingTags {
    upstream: TestUpstream,
    images: Arc<Mutex<Vec<(Image, Content)>>>,
}

fn image(repository: usize, generation: u64) -> (Image, Content) {
    let image = Image::new(generation, &[600_000, 40_000, 900]);
    let content = Content::new(&[(&name(repository), "1", &image)]);
    (image, content)
}

fn name(repository: usize) -> String {
    format!("team/app{repository}")
}

impl MovingTags {
    async fn start() -> Self {
        let images: Vec<_> = (0..REPOSITORIES).map(|nth| image(nth, nth as u64)).collect();
        let images = Arc::new(Mutex::new(images));
        let served = images.clone();
        let upstream = TestUpstream::with_handler(move |request| {
            let nth = request.path.strip_prefix("/v2/team/app").and_then(|rest| rest.get(..1)?.parse::<usize>().ok());
            match nth {
                Some(_) if request.path.contains("/tags/list") => Response::new(200, r#"{"name":"x","tags":["1"]}"#),
                Some(nth) => served.lock().unwrap()[nth].1.respond(request),
                None => Response::new(200, "{}"),
            }
        })
        .await;
        Self { upstream, images }
    }

    fn move_tag(&self, generation: u64) {
        let nth = usize::try_from(generation).unwrap() % REPOSITORIES;
        let new = image(nth, generation + REPOSITORIES as u64);
        self.images.lock().unwrap()[nth] = new;
    }
}

/// Pulls as nodes do: some clients disconnect early, some tags do not exist, and some requests are lists.
async fn pull(
    base: String,
    images: Arc<Mutex<Vec<(Image, Content)>>>,
    seed: u64,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
) {
    let (client, mut random) = (client(), fastrand::Rng::with_seed(seed));
    while !stop.load(Ordering::Relaxed) {
        let nth = random.usize(0..REPOSITORIES);
        let blobs: Vec<String> = images.lock().unwrap()[nth].0.blobs.keys().cloned().collect();
        let below = match random.u8(0..10) {
            0 => "tags/list".to_owned(),
            1 => format!("manifests/none{}", random.u32(..)),
            2..6 => "manifests/1".to_owned(),
            _ => format!("blobs/{}", blobs[random.usize(0..blobs.len())]),
        };
        let url = format!("{base}/v2/{}/{below}?ns=moving.example", name(nth));
        let Ok(response) = client.get(url).send().await else { continue };
        if random.u8(0..8) > 0 && response.bytes().await.is_ok() {
            done.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
}

fn usage(dray: &Dray, begun: Instant) -> Usage {
    let proc = format!("/proc/{}", dray.id());
    let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let descriptors = std::fs::read_dir(format!("{proc}/fd")).unwrap().count() as u64;
    let measured = [field("VmRSS:") * 1024, descriptors, field("Threads:")];
    Usage { at: begun.elapsed(), measured, disk: disk(dray.start().cache_dir()) }
}

/// Bytes of all files below a directory.
fn disk(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

/// The median of the slopes between samples of the first and the second half, in units a second (Theil and Sen). Single
/// peaks do not change it.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let (first, second) = samples.split_at(samples.len() / 2);
    let pairs = first.iter().zip(second);
    let mut slopes: Vec<f64> = pairs.map(|(a, b)| (b.1 - a.1) / (b.0 - a.0)).collect();
    slopes.sort_by(f64::total_cmp);
    slopes[slopes.len() / 2]
}

#[test]
fn slope_ignores_single_peaks() {
    let flat: Vec<_> = (0..20).map(|nth| (f64::from(nth), if nth == 7 { 1e9 } else { 5.0 })).collect();
    assert_eq!(slope(&flat), 0.0);
    let rising: Vec<_> = (0..20).map(|nth| (f64::from(nth), 3.0 * f64::from(nth))).collect();
    assert_eq!(slope(&rising), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_in_ordinary_operation_do_not_grow() {
    let seconds = rounds(45, 1200) as u64;
    let moving = MovingTags::start().await;
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("peers.key");
    std::fs::write(&key, "0123456789abcdef-peers").unwrap();
    let ports = [free_port(), free_port()];
    let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
    let nodes = ports.map(|port| {
        let url = moving.upstream.url();
        let rule = format!("[[registry]]\nmatch = \"moving.example\"\nupstreams = [\"{url}\"]\ntag_ttl = \"1s\"\n");
        let peers =
            format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\nkey_file = \"{}\"\n", key.display());
        Start::new(rule + &peers).disk(&format!("{}MiB", CACHE_DISK >> 20)).run()
    });
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for (nth, node) in nodes.iter().enumerate() {
        for client in 0..3 {
            let (images, stop, done) = (moving.images.clone(), stop.clone(), done.clone());
            clients.spawn(pull(node.url(""), images, nth as u64 * 10 + client, stop, done));
        }
    }
    let (begun, mut samples) = (Instant::now(), [Vec::new(), Vec::new()]);
    let mut generation = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(TAG_MOVE_INTERVAL).await;
        moving.move_tag(generation);
        generation += 1;
        if generation % 4 == 0 {
            nodes.iter().zip(&mut samples).for_each(|(node, samples)| samples.push(usage(node, begun)));
        }
    }
    stop.store(true, Ordering::Relaxed);
    while clients.join_next().await.is_some() {}
    assert!(done.load(Ordering::Relaxed) > seconds * 50, "{} requests in {seconds} s", done.load(Ordering::Relaxed));
    for samples in &samples {
        // At first, caches fill and pools grow.
        let measured = &samples[samples.len() / 3..];
        let disk = samples.iter().map(|usage| usage.disk).max().unwrap_or_default();
        println!("bytes on disk: {disk} at most of {CACHE_DISK}");
        assert!(disk <= CACHE_DISK, "{disk} bytes on disk");
        let lasted = (measured[measured.len() - 1].at - measured[0].at).as_secs_f64();
        for (nth, (what, bound)) in GROWTH_BOUNDS.into_iter().enumerate() {
            let values: Vec<_> =
                measured.iter().map(|usage| (usage.at.as_secs_f64(), usage.measured[nth] as f64)).collect();
            let grown = slope(&values) * lasted;
            println!(
                "{what}: {} at first, {} at the end, {grown:.0} grown in {lasted:.0} s",
                values[0].1,
                values[values.len() - 1].1
            );
            assert!(grown <= bound as f64, "{what} grew by {grown:.0} in {lasted:.0} s: {values:?}");
        }
    }
}
