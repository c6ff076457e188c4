//! The comparison benchmark: dray beside a direct pull and beside nginx, in one run on one machine.
//!
//! Every figure is a ratio to something measured in the same run, the median of several rounds.
//! Run it with `make bench`; what it printed last stands in RESULTS.md.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark prints, and stops at the first surprise")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dray_tests::dray::{Dray, Start, binary};
use dray_tests::eventually;
use dray_tests::image::noise;
use dray_tests::process::{Process, free_port, output, run};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const GIB: u64 = 1 << 30;
const ROUNDS: usize = 5;
/// What the origin sends to one connection, in bytes a second.
const ORIGIN_RATE: u64 = 125_000_000;

#[tokio::main]
async fn main() {
    // Names of parts on the command line; none: all of them.
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let runs = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    let bench = Bench::new().await;
    println!("| what | measured | compared with | bar |\n|---|---|---|---|");
    if runs("cold") {
        bench.cold().await;
    }
    if runs("warm") {
        bench.warm().await;
    }
    if runs("crowd") {
        bench.crowd().await;
    }
    if runs("memory") {
        bench.memory().await;
    }
    if runs("start") {
        bench.start().await;
    }
}

/// nginx as a slow origin and as a fast one, over the same blob of 1 GiB.
struct Bench {
    dir: tempfile::TempDir,
    digest: String,
    slow: u16,
    fast: u16,
    _nginx: Process,
}

/// One transfer as curl saw it.
#[derive(Clone, Copy)]
struct Transfer {
    seconds: f64,
    first_byte: f64,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("dray-bench").tempdir_in("/var/tmp").unwrap();
        // nginx drops its privileges, so it must get here.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let blobs = dir.path().join("www/v2/library/app/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let digest = write_blob(&blobs, GIB);
        let (slow, fast) = (free_port(), free_port());
        let nginx = nginx(dir.path(), slow, fast);
        for port in [slow, fast] {
            eventually("nginx listens", async || TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        }
        Self { dir, digest, slow, fast, _nginx: nginx }
    }

    fn path(&self) -> String {
        format!("/v2/library/app/blobs/{}", self.digest)
    }

    fn dray(&self, origin: u16) -> Dray {
        let cache = tempfile::Builder::new().prefix("cache").tempdir_in(self.dir.path()).unwrap().keep();
        Start::with_upstream("docker.io", &format!("http://127.0.0.1:{origin}")).disk("8GiB").cache(cache).run()
    }

    /// First pull: no slower than direct, and begun as soon.
    async fn cold(&self) {
        let (mut ratios, mut delays, mut directs, mut pulls) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            let direct = curl(&format!("http://127.0.0.1:{}{}", self.slow, self.path()));
            let dray = self.dray(self.slow);
            let pull = curl(&dray.url(&self.path()));
            ratios.push(pull.seconds / direct.seconds);
            delays.push((pull.first_byte - direct.first_byte) * 1e3);
            directs.push(direct.seconds);
            pulls.push(pull.seconds);
            clean(dray);
        }
        row(
            "1 GiB cold, origin at 125 MB/s",
            &format!("{:.2} s", median(&pulls)),
            &format!("{:.3} x direct ({:.2} s)", median(&ratios), median(&directs)),
            "<= 1.03 x",
        );
        row("its first byte", &format!("{:+.1} ms", median(&delays)), "after the origin's", "<= 5 ms");
    }

    /// Later pulls: at the speed of the kernel.
    async fn warm(&self) {
        let dray = self.dray(self.fast);
        curl(&dray.url(&self.path()));
        dray.fills_end().await;
        let (mut rates, mut costs, mut nginx_rates, mut ratios) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS * 2 {
            let before = cpu_seconds(dray.id());
            let pull = curl(&dray.url(&self.path()));
            costs.push((cpu_seconds(dray.id()) - before) / 1.073_741_824);
            let direct = curl(&format!("http://127.0.0.1:{}{}", self.fast, self.path()));
            rates.push(gigabytes(pull.seconds));
            nginx_rates.push(gigabytes(direct.seconds));
            ratios.push(direct.seconds / pull.seconds);
        }
        row(
            "1 GiB warm, one client",
            &format!("{:.2} GB/s", median(&rates)),
            &format!("{:.2} x nginx ({:.2} GB/s)", median(&ratios), median(&nginx_rates)),
            ">= 2.5 GB/s",
        );
        row("its cost", &format!("{:.2} CPU s/GB", median(&costs)), "", "<= 0.35");
        clean(dray);
    }

    /// Twenty clients at once on a cold blob.
    async fn crowd(&self) {
        let (mut ratios, mut shares) = (vec![], vec![]);
        for _ in 0..3 {
            let alone = self.dray(self.slow);
            let one = curl(&alone.url(&self.path()));
            clean(alone);
            let dray = self.dray(self.slow);
            let url = dray.url(&self.path());
            let started = Instant::now();
            let clients: Vec<_> = (0..20)
                .map(|_| {
                    let url = url.clone();
                    std::thread::spawn(move || curl(&url))
                })
                .collect();
            for client in clients {
                client.join().unwrap();
            }
            ratios.push(started.elapsed().as_secs_f64() / one.seconds);
            #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
            let share = dray.metric("dray_origin_bytes_total{rule=\"docker.io\"}").await as f64 / GIB as f64;
            shares.push(share);
            clean(dray);
        }
        row("20 clients, one cold GiB", &format!("{:.2} x one client's time", median(&ratios)), "", "<= 1.15 x");
        row("its origin bytes", &format!("{:.3} x the blob", median(&shares)), "", "<= 1.01 x");
    }

    /// Memory when idle, and with 500 readers that read slowly.
    async fn memory(&self) {
        let dray = self.dray(self.fast);
        tokio::time::sleep(Duration::from_secs(1)).await;
        row("memory, idle", &format!("{} MiB", resident(dray.id()) >> 20), "16 MiB memory tier", "<= tier + 64 MiB");
        curl(&dray.url(&self.path()));
        dray.fills_end().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = resident(dray.id());
        let mut readers = Vec::new();
        for _ in 0..500 {
            let mut stream = TcpStream::connect(dray.registry).await.unwrap();
            let request = format!("GET {} HTTP/1.1\r\nhost: x\r\n\r\n", self.path());
            stream.write_all(request.as_bytes()).await.unwrap();
            readers.push(stream);
        }
        let mut most = 0;
        let mut buffer = vec![0; 16 * 1024];
        for _ in 0..20 {
            for reader in &mut readers {
                reader.read_exact(&mut buffer).await.unwrap();
            }
            most = most.max(resident(dray.id()));
        }
        let added = most.saturating_sub(before) >> 20;
        row("memory, 500 slow readers add", &format!("{added} MiB"), "", "<= 64 MiB");
        drop(readers);
        clean(dray);
    }

    /// The binary, and a start with many blobs on disk.
    async fn start(&self) {
        let cache = self.dir.path().join("many");
        let blobs = cache.join("v1/blobs/sha256");
        for n in 0..10_000_u32 {
            let hex: String = Sha256::digest(n.to_le_bytes()).iter().map(|b| format!("{b:02x}")).collect();
            let dir = blobs.join(&hex[..2]);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(hex), [0; 64]).unwrap();
        }
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let started = Instant::now();
            let dray = Start::new("").cache(&cache).run();
            times.push(started.elapsed().as_secs_f64());
            drop(dray);
        }
        row("start with 10,000 blobs on disk", &format!("{:.2} s", median(&times)), "", "< 1 s");
        let stripped = self.dir.path().join("dray");
        run(Command::new("strip").arg("-o").arg(&stripped).arg(binary()));
        let megabytes = fs::metadata(&stripped).unwrap().len() / 1_000_000;
        row("stripped binary", &format!("{megabytes} MB"), "", "<= 25 MB");
    }
}

fn row(what: &str, measured: &str, compared: &str, bar: &str) {
    println!("| {what} | {measured} | {compared} | {bar} |");
    std::io::stdout().flush().unwrap();
}

/// Writes a blob under its digest; returns that.
fn write_blob(dir: &Path, len: u64) -> String {
    let temporary = dir.join("new");
    let mut file = fs::File::create(&temporary).unwrap();
    let mut hash = Sha256::new();
    let piece = 16 << 20;
    for seed in 0..len / piece {
        let bytes = noise(seed, usize::try_from(piece).unwrap());
        hash.update(&bytes);
        file.write_all(&bytes).unwrap();
    }
    let hex: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let digest = format!("sha256:{hex}");
    fs::rename(temporary, dir.join(&digest)).unwrap();
    digest
}

fn nginx(dir: &Path, slow: u16, fast: u16) -> Process {
    let config = dir.join("nginx.conf");
    let text = format!(
        "daemon off;\nmaster_process off;\nworker_processes 1;\npid {dir}/nginx.pid;\nerror_log {dir}/error.log;\nevents {{}}\n\
         http {{\n  access_log off;\n  sendfile on;\n  default_type application/octet-stream;\n  root {dir}/www;\n  \
         server {{ listen 127.0.0.1:{slow}; limit_rate {ORIGIN_RATE}; }}\n  \
         server {{ listen 127.0.0.1:{fast}; }}\n}}\n",
        dir = dir.display()
    );
    fs::write(&config, text).unwrap();
    let program: PathBuf =
        if Path::new("/usr/sbin/nginx").exists() { "/usr/sbin/nginx".into() } else { "nginx".into() };
    Process::spawn(Command::new(program).arg("-c").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()))
}

fn curl(url: &str) -> Transfer {
    let output = output(
        Command::new("curl")
            .args(["-s", "--fail", "--noproxy", "*", "-o", "/dev/null", "-w", "%{time_total} %{time_starttransfer}"])
            .arg(url),
    );
    assert!(output.status.success(), "{url}: {}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let (seconds, first_byte) = text.split_once(' ').unwrap();
    Transfer { seconds: seconds.parse().unwrap(), first_byte: first_byte.parse().unwrap() }
}

/// Ends a dray and removes its cache.
fn clean(dray: Dray) {
    let cache = dray.start().cache_dir().clone();
    drop(dray);
    fs::remove_dir_all(cache).unwrap();
}

fn gigabytes(seconds: f64) -> f64 {
    1.073_741_824 / seconds
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// User and system time of a process so far.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u32 = [11, 12].iter().map(|field| fields[*field].parse::<u32>().unwrap()).sum();
    f64::from(ticks) / 100.0
}

/// Resident bytes of a process.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
