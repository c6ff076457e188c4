//! Repeated faults under a mixed load: no corrupt body is ever sent whole, and afterwards every object can be pulled.
//! `make soak` runs many more rounds.

mod growth;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dray_tests::dray::{Dray, Start};
use dray_tests::http::client;
use dray_tests::image::Image;
use dray_tests::mount::Mount;
use dray_tests::upstream::TestUpstream;
use tokio::task::JoinSet;

/// The number of rounds or seconds, in CI and in `make soak`.
fn rounds(few: usize, many: usize) -> usize {
    std::env::var("DRAY_SOAK").map_or(few, |times| many * times.parse::<usize>().expect("DRAY_SOAK is a number"))
}

/// The requested paths and their correct bytes.
type Objects = Arc<Vec<(String, Bytes)>>;

/// Blobs of many sizes, more than the cache holds, and their manifests.
async fn rig() -> (TestUpstream, Objects) {
    let images: Vec<Image> =
        (0..6).map(|seed| Image::new(seed, &[12_000_000, 3_000_000, 400_000, 60_000, 900])).collect();
    let served: Vec<_> = images.iter().map(|image| ("library/app", "1", image)).collect();
    let upstream = TestUpstream::start(&served, |_, response| response).await;
    let mut objects = Vec::new();
    for image in &images {
        let blobs = image.blobs.iter().map(|(digest, bytes)| (format!("blobs/{digest}"), bytes.clone()));
        let manifests =
            image.manifests.iter().map(|(digest, (_, bytes))| (format!("manifests/{digest}"), bytes.clone()));
        objects.extend(blobs.chain(manifests));
    }
    let with_path = |(path, bytes)| (format!("/v2/library/app/{path}?ns=docker.io"), bytes);
    (upstream, Arc::new(objects.into_iter().map(with_path).collect()))
}

/// Clients that read random objects, whole or in part, until stopped. They panic on wrong bytes.
struct Load {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
    complete: Arc<AtomicU64>,
}

impl Load {
    fn start(dray: &Dray, objects: &Objects, seed: u64) -> Self {
        let (stop, complete) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for nth in 0..6 {
            let (objects, stop, complete, base) = (objects.clone(), stop.clone(), complete.clone(), dray.url(""));
            let mut random = fastrand::Rng::with_seed(seed * 100 + nth);
            clients.spawn(async move {
                let client = client();
                while !stop.load(Ordering::Relaxed) {
                    let (path, bytes) = &objects[random.usize(0..objects.len())];
                    let start = if random.u8(0..4) == 0 { random.usize(0..bytes.len()) } else { 0 };
                    let mut request = client.get(format!("{base}{path}"));
                    if start > 0 {
                        request = request.header("range", format!("bytes={start}-"));
                    }
                    let Ok(response) = request.send().await else { continue };
                    if !response.status().is_success() {
                        continue;
                    }
                    if random.u8(0..10) == 0 {
                        // Some disconnect early.
                        continue;
                    }
                    if let Ok(body) = response.bytes().await {
                        assert!(body == bytes.slice(start..), "wrong bytes sent whole: {path} from {start}");
                        complete.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        Self { stop, clients, complete }
    }

    /// Stops the clients. Returns the number of complete responses.
    async fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.expect("no client saw wrong bytes");
        }
        self.complete.load(Ordering::Relaxed)
    }
}

/// The upstream is available, so every object can be pulled.
async fn assert_all_right(dray: &Dray, objects: &Objects, round: usize) {
    for (path, bytes) in objects.iter() {
        let response = dray.get(path).await;
        assert_eq!((response.status, response.complete), (200, true), "round {round}: {path}: {}", response.text());
        assert!(response.body == bytes, "round {round}: wrong bytes of {path}");
    }
}

/// The published files.
fn published(cache: &Path) -> Vec<PathBuf> {
    let shards = std::fs::read_dir(cache.join("v1/blobs/sha256")).into_iter().flatten().flatten();
    let files = shards.flat_map(|shard| std::fs::read_dir(shard.path()).into_iter().flatten().flatten());
    files.map(|file| file.path()).filter(|path| path.extension().is_none()).collect()
}

/// As after a power loss: some files hold zeros or a flipped bit, and the kernel has another boot ID.
fn corrupt(cache: &Path, random: &mut fastrand::Rng) {
    use std::os::unix::fs::FileExt;
    for path in published(cache) {
        if random.u8(0..3) > 0 {
            continue;
        }
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let at = random.u64(0..len);
        if random.bool() {
            let zeros = vec![0; usize::try_from((len - at).min(100_000)).unwrap()];
            file.write_all_at(&zeros, at).unwrap();
        } else {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << random.u8(0..8))], at).unwrap();
        }
    }
    for block in std::fs::read_dir(cache.join("v1/small/blobs")).into_iter().flatten().flatten() {
        let file = std::fs::File::options().write(true).open(block.path()).unwrap();
        file.write_all_at(b"rot", random.u64(0..1_000_000)).unwrap();
    }
    std::fs::write(cache.join("v1/state"), "another-boot 0").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cache_killed_at_random_moments_stays_correct() {
    let (upstream, objects) = rig().await;
    let mut random = fastrand::Rng::with_seed(11);
    let mut dray = Start::with_upstream("docker.io", &upstream.url()).disk("96MiB").run();
    let mut complete = 0;
    for round in 0..rounds(20, 200) {
        let load = Load::start(&dray, &objects, round as u64);
        tokio::time::sleep(Duration::from_millis(random.u64(20..500))).await;
        dray.process().kill();
        complete += load.end().await;
        let start = dray.start().clone();
        if round % 3 == 2 {
            corrupt(start.cache_dir(), &mut random);
        }
        dray = start.run();
        if round % 5 == 4 {
            assert_all_right(&dray, &objects, round).await;
        }
    }
    assert_all_right(&dray, &objects, usize::MAX).await;
    assert!(complete > 100, "{complete} complete responses");
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_succeed_while_others_fill_the_disk() {
    let (upstream, objects) = rig().await;
    let disk = Mount::tmpfs("200m");
    let dray = Start::with_upstream("docker.io", &upstream.url()).disk("90%").cache(disk.path().join("cache")).run();
    let others = disk.path().join("others");
    for round in 0..rounds(3, 20) {
        let load = Load::start(&dray, &objects, round as u64);
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Fills the disk completely, even while dray evicts.
        let (piece, mut file) = (vec![1; 1 << 20], std::fs::File::create(&others).unwrap());
        let filling = tokio::task::spawn_blocking(move || {
            use std::io::Write;
            let deadline = std::time::Instant::now() + Duration::from_secs(2);
            while std::time::Instant::now() < deadline {
                if file.write_all(&piece).is_err() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        filling.await.unwrap();
        assert!(load.end().await > 0);
        assert_all_right(&dray, &objects, round).await;
        std::fs::remove_file(&others).unwrap();
    }
    assert_all_right(&dray, &objects, usize::MAX).await;
}
