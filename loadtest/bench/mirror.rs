//! A pull by containerd with a dead mirror, beside one without a mirror.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::{Dray, Start, binary};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::process::{free_port, run};
use dray_tests::registry::Registry;
use rustix::process::Signal;

use super::rig::{ROUNDS, median, row};

/// State of the dray that is containerd's mirror.
#[derive(Clone, Copy)]
enum Mirror {
    /// containerd has no mirror.
    None,
    NeverStarted,
    Killed,
    /// dray drains after SIGTERM: it still sends a blob to a client, and its mirror configuration is still there.
    Draining,
    /// dray has stopped after SIGTERM.
    Stopped,
}

const MIRRORS: [(Mirror, &str); 4] = [
    (Mirror::NeverStarted, "never started"),
    (Mirror::Killed, "killed"),
    (Mirror::Draining, "draining"),
    (Mirror::Stopped, "stopped"),
];

pub(crate) async fn dead() {
    let registry = Registry::open().await;
    registry.push("team/app", "1", &Image::new(1, &[60_000_000, 20_000_000, 5_000_000])).await;
    for (version, name) in [(Version::V1, "1.6"), (Version::V2, "2.x")] {
        let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); 1 + MIRRORS.len()];
        for _ in 0..ROUNDS {
            for (nth, mirror) in [Mirror::None].into_iter().chain(MIRRORS.map(|(mirror, _)| mirror)).enumerate() {
                seconds[nth].push(pull(&registry, version, mirror).await);
            }
        }
        let direct = median(&seconds[0]);
        for ((_, what), seconds) in MIRRORS.iter().zip(&seconds[1..]) {
            let took = median(seconds);
            row(
                &format!("containerd {name}'s pull, 85 MB, its mirror {what}"),
                &format!("{took:.2} s"),
                &format!("{:.2} x none ({direct:.2} s)", took / direct),
                "<= 1.1 x + 0.3 s",
            );
        }
    }
}

async fn pull(registry: &Registry, version: Version, mirror: Mirror) -> f64 {
    let containerd = Containerd::start(version).await;
    let configure = |url: &str| {
        let mut command = Command::new(binary());
        run(command.args(["containerd", "install", "--mirror", url, "--hosts-dir"]).arg(containerd.hosts_dir()));
    };
    let mut running: Option<(Dray, tokio::task::JoinHandle<()>)> = None;
    match mirror {
        Mirror::None => {}
        Mirror::NeverStarted => configure(&format!("http://127.0.0.1:{}", free_port())),
        Mirror::Killed => {
            let mut dray = Start::new("").run();
            configure(&dray.url(""));
            dray.process().kill();
        }
        Mirror::Draining => {
            let mut dray = Start::with_upstream("slow.test", &registry.url()).run();
            configure(&dray.url(""));
            let reading = tokio::spawn(read_slowly(dray.registry.to_string()));
            dray.wait_for_fill_start().await;
            dray.process().signal(Signal::TERM);
            // The listeners stay open for a second.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            running = Some((dray, reading));
        }
        Mirror::Stopped => {
            let start = Start::new(format!("[containerd]\nhosts_dir = \"{}\"\n", containerd.hosts_dir().display()));
            let mut dray = start.run();
            let file = containerd.hosts_dir().join("_default/hosts.toml");
            eventually("the mirror is configured", async || fs::metadata(&file).ok()).await;
            dray.process().signal(Signal::TERM);
            dray.process().wait();
        }
    }
    let image = format!("127.0.0.1:{}/team/app:1", registry.port);
    let began = Instant::now();
    containerd.pull(&image).unwrap();
    let took = began.elapsed().as_secs_f64();
    if let Some((dray, reading)) = running {
        reading.abort();
        drop(dray);
    }
    took
}

/// Requests a large blob and does not read it.
async fn read_slowly(at: String) {
    use tokio::io::AsyncWriteExt;
    let mut stream = tokio::net::TcpStream::connect(&at).await.unwrap();
    let digest = Image::new(1, &[60_000_000, 20_000_000, 5_000_000]).layer().0.to_string();
    let request = format!("GET /v2/team/app/blobs/{digest}?ns=slow.test HTTP/1.1\r\nHost: {at}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
}
