//! Manifests and small blobs: requests a second, and the latency at half of that rate.

use std::path::Path;
use std::time::{Duration, Instant};

use dray_tests::dray::Start;
use dray_tests::image::digest;
use dray_tests::nginx::{Nginx, put_blob};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::rig::{Rig, clean, median, row};

const CONNECTIONS: usize = 32;
const SECONDS: u64 = 3;
const SMALL: usize = 4096;

/// Server and client have one core each; both servers write an access log.
pub(crate) async fn rates(rig: &Rig) {
    let dir = tempfile::tempdir_in(rig.dir.path()).unwrap();
    let manifest = manifest();
    let (manifest_digest, blob) = (digest(&manifest), vec![7; SMALL]);
    let blob_digest = digest(&blob);
    put_blob(dir.path(), "library/app", &blob_digest, &blob);
    put(&dir.path().join("www/v2/library/app/manifests"), &manifest_digest, &manifest);
    let nginx = Nginx::pinned(dir.path(), &[""]).await;
    let cache = tempfile::Builder::new().prefix("cache").tempdir_in(rig.dir.path()).unwrap().keep();
    let start = Start::with_upstream("docker.io", &nginx.url(0)).cache(cache).env("DRAY_LOG", "info");
    let dray = start.log_to(&dir.path().join("dray.log")).pinned().run();
    for (what, path) in [
        ("manifests", format!("/v2/library/app/manifests/{manifest_digest}")),
        ("blobs of 4 KiB", format!("/v2/library/app/blobs/{blob_digest}")),
    ] {
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let request =
            |path: &str| format!("GET {path}?ns=docker.io HTTP/1.1\r\nHost: x\r\nAccept: {media_type}\r\n\r\n");
        let ours = Target { port: dray.registry.port(), request: request(&path) };
        let theirs = Target { port: nginx.ports[0], request: request(&path) };
        let (mut rates, mut their_rates, mut ratios) = (vec![], vec![], vec![]);
        for _ in 0..5 {
            let (our_rate, their_rate) = (ours.most(), theirs.most());
            rates.push(our_rate);
            their_rates.push(their_rate);
            ratios.push(our_rate / their_rate);
        }
        row(
            &format!("warm {what}, one core"),
            &format!("{:.0} requests/s", median(&rates)),
            &format!("{:.2} x nginx ({:.0}/s)", median(&ratios), median(&their_rates)),
            ">= 0.91 x",
        );
        let (half, their_half) = (median(&rates) / 2.0, median(&their_rates) / 2.0);
        let (mut slowest, mut their_slowest) = (vec![], vec![]);
        for _ in 0..5 {
            slowest.push(ours.p99(half) * 1e3);
            their_slowest.push(theirs.p99(their_half) * 1e3);
        }
        row(
            "p99 at half of that",
            &format!("{:.2} ms", median(&slowest)),
            &format!("{:.2} x nginx ({:.2} ms)", median(&slowest) / median(&their_slowest), median(&their_slowest)),
            "<= 3 x",
        );
    }
    clean(dray);
}

fn manifest() -> Vec<u8> {
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let layer = |n: u32| format!("{{\"digest\":\"{}\",\"size\":{n}}}", digest(&n.to_le_bytes()));
    let layers: Vec<String> = (0..8).map(layer).collect();
    format!("{{\"schemaVersion\":2,\"mediaType\":\"{media_type}\",\"layers\":[{}]}}", layers.join(",")).into_bytes()
}

fn put(dir: &Path, name: &str, bytes: &[u8]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(name), bytes).unwrap();
}

/// A server and the request that is sent repeatedly.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) port: u16,
    pub(crate) request: String,
}

impl Target {
    /// Requests a second when each connection sends its next request at once.
    pub(crate) fn most(&self) -> f64 {
        let begun = Instant::now();
        let latencies = self.drive(|_| begun);
        f64::from(u32::try_from(latencies.len()).unwrap()) / begun.elapsed().as_secs_f64()
    }

    /// The p99 latency in seconds, counted from the time when each request was due.
    pub(crate) fn p99(&self, rate: f64) -> f64 {
        let begun = Instant::now();
        let mut latencies = self.drive(|nth| begun + Duration::from_secs_f64(f64::from(nth) / rate));
        latencies.sort_by(f64::total_cmp);
        latencies[latencies.len() * 99 / 100]
    }

    /// Sends requests when they are due, on its own thread. Returns the seconds that each took.
    fn drive(&self, due: impl Fn(u32) -> Instant + Clone + Send + Sync) -> Vec<f64> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    pin_to_last_core();
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(async {
                        let connections = (0..CONNECTIONS).map(|nth| self.request_repeatedly(nth, &due));
                        futures_util::future::join_all(connections).await.concat()
                    })
                })
                .join()
                .unwrap()
        })
    }

    async fn request_repeatedly(&self, nth: usize, due: &impl Fn(u32) -> Instant) -> Vec<f64> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let end = Instant::now() + Duration::from_secs(SECONDS);
        let (mut buffer, mut latencies) = (vec![0; 64 * 1024], Vec::new());
        let mut count = u32::try_from(nth).unwrap();
        while Instant::now() < end {
            let due = due(count);
            // A timer is too coarse, and this core has no other work.
            while Instant::now() < due {
                tokio::task::yield_now().await;
            }
            let sent_at = due.max(Instant::now() - Duration::from_secs(SECONDS));
            stream.write_all(self.request.as_bytes()).await.unwrap();
            read_response(&mut stream, &mut buffer).await;
            latencies.push(sent_at.elapsed().as_secs_f64());
            count += u32::try_from(CONNECTIONS).unwrap();
        }
        latencies
    }
}

async fn read_response(stream: &mut TcpStream, buffer: &mut [u8]) {
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).await.unwrap();
        assert!(count > 0, "the server closed the connection");
        filled += count;
        let Some(head) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let text = std::str::from_utf8(&buffer[..head]).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let name = "content-length: ";
        let length = text.lines().find_map(|line| {
            let (start, value) = line.split_at_checked(name.len())?;
            start.eq_ignore_ascii_case(name).then(|| value.parse::<usize>().unwrap())
        });
        if filled == head + 4 + length.unwrap() {
            return;
        }
    }
}

/// The servers run on the first core.
fn pin_to_last_core() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = rustix::thread::CpuSet::new();
    set.set(cores - 1);
    rustix::thread::sched_setaffinity(None, &set).unwrap();
}
