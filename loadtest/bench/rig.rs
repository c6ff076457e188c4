//! Shared by all parts: a blob, its servers, and their measurement.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use dray_tests::dray::{Dray, Start};
use dray_tests::image::noise;
use dray_tests::nginx::Nginx;
use dray_tests::process::output;
use dray_tests::tls::{Authority, Files};
use sha2::{Digest, Sha256};

pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const ROUNDS: usize = 5;

/// The servers of nginx.
#[derive(Clone, Copy)]
pub(crate) enum Server {
    /// 125 MB/s a connection.
    Gigabit,
    /// 40 MB/s a connection.
    Limited,
    Fast,
    Tls,
    /// Caches the responses of the fast server.
    Cache,
    /// 125 MB/s in total: it accepts one connection at a time.
    Single,
}

/// One nginx that serves one blob of 1 GiB.
pub(crate) struct Rig {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) digest: String,
    pub(crate) nginx: Nginx,
    pub(crate) tls: Files,
}

/// One transfer as measured by curl.
#[derive(Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) seconds: f64,
    pub(crate) first_byte: f64,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("dray-bench").tempdir_in("/var/tmp").unwrap();
        let blobs = dir.path().join("www/v2/library/app/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let digest = write_blob(&blobs, GIB);
        let tls = Authority::new(dir.path()).files(&["localhost"]);
        fs::set_permissions(&tls.key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let path = dir.path().display();
        let settings = format!(
            "proxy_cache_path {path}/proxy_cache keys_zone=blobs:1m max_size=8g; \
             limit_conn_zone $server_port zone=single:1m;"
        );
        let fast = "location = /v2/ { default_type application/json; return 200 '{}'; }";
        let with_tls = format!("ssl_certificate {}; ssl_certificate_key {};", tls.cert.display(), tls.key.display());
        let cache = "location / { proxy_cache blobs; proxy_cache_valid 200 1h; proxy_buffering on; \
                     proxy_pass http://unix:FAST; }";
        let socket = format!("{path}/fast.sock");
        let fast = format!("listen unix:{socket}; {fast}");
        let cache = cache.replace("FAST", &format!("{socket}:"));
        let single = "limit_rate 125000000; limit_conn single 1;";
        let servers = ["limit_rate 125000000;", "limit_rate 40000000;", &fast, &with_tls, &cache, single];
        let nginx = Nginx::with(&settings, dir.path(), &servers).await;
        Self { dir, digest, nginx, tls }
    }

    pub(crate) fn path(&self) -> String {
        format!("/v2/library/app/blobs/{}", self.digest)
    }

    /// The blob's URL at one of nginx's servers.
    pub(crate) fn url(&self, server: Server) -> String {
        let scheme = if matches!(server, Server::Tls) { "https" } else { "http" };
        format!("{scheme}://localhost:{}{}", self.nginx.ports[server as usize], self.path())
    }

    /// A start of dray with an empty cache, and one of nginx's servers as its upstream.
    pub(crate) fn start(&self, upstream: Server) -> Start {
        let cache = tempfile::Builder::new().prefix("cache").tempdir_in(self.dir.path()).unwrap().keep();
        Start::with_upstream("docker.io", &self.nginx.url(upstream as usize)).disk("8GiB").cache(cache)
    }

    pub(crate) fn dray(&self, upstream: Server) -> Dray {
        self.start(upstream).run()
    }
}

pub(crate) fn row(what: &str, measured: &str, compared: &str, bar: &str) {
    println!("| {what} | {measured} | {compared} | {bar} |");
    std::io::stdout().flush().unwrap();
}

/// Downloads a URL and discards the body.
pub(crate) fn curl(url: &str) -> Transfer {
    let output = output(
        Command::new("curl")
            .args(["-s", "-4", "-k", "--fail", "--http1.1", "--noproxy", "*", "-o", "/dev/null"])
            .args(["-w", "%{time_total} %{time_starttransfer}"])
            .arg(url),
    );
    assert!(output.status.success(), "{url}: {}", output.status);
    let text = String::from_utf8(output.stdout).unwrap();
    let (seconds, first_byte) = text.split_once(' ').unwrap();
    Transfer { seconds: seconds.parse().unwrap(), first_byte: first_byte.parse().unwrap() }
}

/// Downloads a URL by this number of clients at once. Returns the seconds until the last one is done.
pub(crate) fn curls(url: &str, clients: usize) -> f64 {
    let started = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| curl(url));
        }
    });
    started.elapsed().as_secs_f64()
}

/// Ends a dray and removes its cache.
pub(crate) fn clean(dray: Dray) {
    let cache = dray.start().cache_dir().clone();
    drop(dray);
    fs::remove_dir_all(cache).unwrap();
}

pub(crate) fn gigabytes(seconds: f64) -> f64 {
    1.073_741_824 / seconds
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// User and system time of a process so far.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u32 = [11, 12].iter().map(|field| fields[*field].parse::<u32>().unwrap()).sum();
    f64::from(ticks) / 100.0
}

/// Resident bytes of a process.
pub(crate) fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Disk usage of a directory in bytes.
pub(crate) fn disk_usage(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let (mut dirs, mut blocks) = (vec![PathBuf::from(dir)], 0);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => dirs.push(entry.path()),
                Ok(meta) => blocks += meta.blocks(),
                Err(_) => {}
            }
        }
    }
    blocks * 512
}

/// Writes a blob under its digest and returns the digest.
pub(crate) fn write_blob(dir: &Path, len: u64) -> String {
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
