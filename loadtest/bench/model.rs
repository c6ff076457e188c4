//! A model of 40 GiB in one layer: three nodes pull it at once, each with 512 MiB of memory and a disk of 60 GiB. Then
//! one node is killed half-way.
//!
//! The disk is btrfs with compression: of the blob's 4 KiB pages only the number is not zero, so that 120 GiB of it fit
//! on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::process::{free_port, output, run};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::rig::{GIB, cpu_seconds, curl, resident, row};

const SIZE: u64 = 40 * GIB;
const MEMORY: u64 = 512 << 20;
const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;

/// Three nodes at once.
pub(crate) async fn shared() {
    with_disk(async |disk, upstream, path| together(disk, upstream, path).await).await;
}

/// One node that is killed half-way and started again.
pub(crate) async fn resumed() {
    with_disk(async |disk, upstream, path| killed(disk, upstream, path).await).await;
}

async fn with_disk(measure: impl AsyncFnOnce(&Disk, &str, &str)) {
    let dir = tempfile::Builder::new().prefix("dray-bench").tempdir_in("/var/tmp").unwrap();
    let Some(disk) = Disk::new(dir.path()) else {
        return row("a layer of 40 GiB", "skipped", "needs root, loop devices, btrfs and cgroup v1", "");
    };
    let upstream = listen().await;
    let digest = tokio::task::spawn_blocking(digest).await.unwrap();
    let path = format!("/v2/library/model/blobs/{digest}?ns=docker.io");
    measure(&disk, &upstream, &path).await;
}

async fn together(disk: &Disk, upstream: &str, path: &str) {
    let ports = [free_port(), free_port(), free_port()];
    let members = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
    let start = |port: u16| {
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n");
        start(disk, &format!("{}{peers}", rule("docker.io", upstream)), &port.to_string())
    };
    let nodes = ports.map(start);
    let (done, pids) = (Arc::new(AtomicBool::new(false)), nodes.each_ref().map(Dray::id));
    let watched = {
        let done = done.clone();
        std::thread::spawn(move || {
            let mut largest = 0;
            while !done.load(Ordering::Relaxed) {
                largest = pids.map(resident).into_iter().fold(largest, u64::max);
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            largest
        })
    };
    let started = Instant::now();
    let urls = nodes.each_ref().map(|node| node.url(path));
    let pulls = urls.map(|url| tokio::task::spawn_blocking(move || curl(&url)));
    for pull in pulls {
        pull.await.unwrap();
    }
    let seconds = started.elapsed().as_secs_f64();
    done.store(true, Ordering::Relaxed);
    let mut received = 0;
    for node in &nodes {
        node.wait_for_fills().await;
        received += node.metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await;
    }
    let cpu: f64 = nodes.iter().map(|node| cpu_seconds(node.id())).sum();
    #[allow(clippy::cast_precision_loss, reason = "ratios for people")]
    let (ratio, of_gigabyte) = (received as f64 / SIZE as f64, cpu / (3 * SIZE) as f64 * 1e9);
    row(
        "a layer of 40 GiB, three nodes at once",
        &format!("{seconds:.0} s, {of_gigabyte:.2} CPU s/GB"),
        &format!("{ratio:.3} x its size from the upstream"),
        "1.000 x",
    );
    row(
        "the same, largest memory of a node",
        &format!("{} MiB", watched.join().unwrap() >> 20),
        "cgroup of 512 MiB",
        "<= 128 MiB",
    );
    drop(nodes);
    ports.iter().for_each(|port| fs::remove_dir_all(disk.dir.join(port.to_string())).unwrap());
}

async fn killed(disk: &Disk, upstream: &str, path: &str) {
    let node = start(disk, &rule("docker.io", upstream), "killed");
    let url = node.url(path);
    let pull = tokio::process::Command::new("curl").args(["-s", "-o", "/dev/null", &url]).spawn().unwrap();
    let received = async |node: &Dray| node.metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await;
    while received(&node).await < SIZE / 2 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let before = received(&node).await;
    let node = node.kill_and_restart();
    pull.wait_with_output().await.unwrap();
    limit_memory(node.id());
    curl(&node.url(path));
    node.wait_for_fills().await;
    let after = received(&node).await;
    #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
    let twice = (before + after).saturating_sub(SIZE) as f64 / SIZE as f64;
    row(
        "a layer of 40 GiB, dray killed half-way",
        &format!("{} MiB downloaded again", (before + after).saturating_sub(SIZE) >> 20),
        &format!("{:.2} % of the layer", twice * 100.0),
        "<= 1 %",
    );
}

fn start(disk: &Disk, config: &str, cache: &str) -> Dray {
    let dray = Start::new(config).cache(disk.dir.join(cache)).disk("45GiB").run();
    limit_memory(dray.id());
    dray
}

fn limit_memory(pid: u32) {
    let group = PathBuf::from(format!("/sys/fs/cgroup/memory/dray-bench-{pid}"));
    fs::create_dir_all(&group).unwrap();
    fs::write(group.join("memory.limit_in_bytes"), MEMORY.to_string()).unwrap();
    fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
}

/// Fills a piece of the blob that begins at `at`, a multiple of the page: each page begins with its number.
fn fill(piece: &mut [u8], at: u64) {
    for (nth, page) in piece.chunks_mut(PAGE).enumerate() {
        let number = at / PAGE as u64 + nth as u64 + 1;
        let head = page.len().min(8);
        page[..head].copy_from_slice(&number.to_le_bytes()[..head]);
    }
}

fn digest() -> String {
    let (mut hash, mut piece) = (Sha256::new(), vec![0; PIECE]);
    for at in (0..SIZE).step_by(PIECE) {
        fill(&mut piece, at);
        hash.update(&piece);
    }
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An upstream that makes the blob while it sends it.
async fn listen() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    url
}

/// Responds to requests of one connection until either side closes it.
async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let (mut head, mut piece) = (Vec::new(), vec![0; PIECE]);
    while stream.read_buf(&mut head).await? > 0 {
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let range = text.lines().find_map(|line| line.strip_prefix("range: bytes=")?.split_once('-'));
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let (start, end) = match range {
            Some((start, last)) => (number(start).unwrap_or(0), number(last).map_or(SIZE, |last| (last + 1).min(SIZE))),
            None => (0, SIZE),
        };
        let is_blob = text.contains("/blobs/");
        let length = if is_blob { end - start } else { 0 };
        let status = match range {
            Some(_) => format!("206 Partial Content\r\ncontent-range: bytes {start}-{}/{SIZE}", end - 1),
            None => "200 OK".to_owned(),
        };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await?;
        let mut at = start;
        while length > 0 && at < end && !text.starts_with("head") {
            let from = at / PAGE as u64 * PAGE as u64;
            fill(&mut piece, from);
            let (skip, until) = (usize::try_from(at - from).unwrap(), (end - from).min(PIECE as u64));
            stream.write_all(&piece[skip..usize::try_from(until).unwrap()]).await?;
            at = from + until;
        }
        head.clear();
    }
    Ok(())
}

/// A compressing file system of 60 GiB.
struct Disk {
    device: String,
    dir: PathBuf,
}

impl Disk {
    fn new(parent: &Path) -> Option<Self> {
        let memory = Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes");
        if !rustix::process::geteuid().is_root() || !memory.exists() {
            return None;
        }
        let (file, dir) = (parent.join("disk"), parent.join("btrfs"));
        fs::File::create(&file).unwrap().set_len(60 * GIB).unwrap();
        let made = output(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&file));
        let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let disk = made.status.success().then_some(Self { device, dir })?;
        if !output(Command::new("mkfs.btrfs").args(["-q", &disk.device])).status.success() {
            return None;
        }
        fs::create_dir_all(&disk.dir).unwrap();
        run(Command::new("mount").args(["-o", "compress-force=lzo", &disk.device]).arg(&disk.dir));
        Some(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = output(Command::new("umount").arg("-l").arg(&self.dir));
        let _ = output(Command::new("losetup").args(["-d", &self.device]));
    }
}
