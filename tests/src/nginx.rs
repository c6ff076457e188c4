//! nginx: an upstream of static files with rate limits, and the reference for benchmarks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio::net::TcpStream;

use crate::eventually;
use crate::process::{Process, free_port};

/// A running nginx with one worker.
pub struct Nginx {
    /// Ports of its servers, in the order of their settings.
    pub ports: Vec<u16>,
    dir: PathBuf,
    process: Process,
}

impl Nginx {
    /// One server for each of the settings, all with `<dir>/www` as their root.
    pub async fn start(dir: &Path, servers: &[&str]) -> Self {
        Self::with("", dir, servers).await
    }

    /// The same with settings that apply to all servers.
    pub async fn with(settings: &str, dir: &Path, servers: &[&str]) -> Self {
        Self::run(Command::new(program()), settings, dir, servers).await
    }

    /// The same on the first core only.
    pub async fn pinned(dir: &Path, servers: &[&str]) -> Self {
        let mut command = Command::new("taskset");
        command.args(["-c", "0", program()]);
        Self::run(command, "", dir, servers).await
    }

    async fn run(mut command: Command, settings: &str, dir: &Path, servers: &[&str]) -> Self {
        // nginx drops its privileges: the unprivileged user needs access to the directory.
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a directory of ours");
        fs::create_dir_all(dir.join("www")).expect("a directory");
        let ports: Vec<u16> = servers.iter().map(|_| free_port()).collect();
        let servers = ports.iter().zip(servers).map(|(port, server)| {
            let tls = if server.contains("ssl_certificate") { " ssl" } else { "" };
            format!("  server {{ listen 127.0.0.1:{port}{tls}; {server} }}\n")
        });
        let text = format!(
            "daemon off;\nmaster_process off;\nworker_processes 1;\npid {dir}/nginx.pid;\nerror_log {dir}/error.log;\n\
             events {{}}\nhttp {{\n  log_format short '$status $body_bytes_sent $http_range';\n  \
             access_log {dir}/access.log short;\n  sendfile on;\n  tcp_nopush on;\n  keepalive_requests 100000000;\n  \
             default_type application/octet-stream;\n  root {dir}/www;\n  {settings}\n{}}}\n",
            servers.collect::<String>(),
            dir = dir.display()
        );
        let config = dir.join("nginx.conf");
        fs::write(&config, text).expect("the configuration is written");
        let process = Process::spawn(command.arg("-c").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()));
        for port in &ports {
            eventually("nginx listens", async || TcpStream::connect(("127.0.0.1", *port)).await.ok()).await;
        }
        Self { ports, dir: dir.to_owned(), process }
    }

    /// The URL of a server.
    pub fn url(&self, server: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[server])
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Status, body bytes and range of each request that has ended.
    pub fn log(&self) -> Vec<(u16, u64, String)> {
        let text = fs::read_to_string(self.dir.join("access.log")).unwrap_or_default();
        let line = |line: &str| {
            let mut words = line.splitn(3, ' ');
            let mut word = || words.next().map(str::to_owned);
            Some((word()?.parse().ok()?, word()?.parse().ok()?, word()?))
        };
        text.lines().filter_map(line).collect()
    }
}

/// Debian installs nginx in /usr/sbin, which is not in every PATH.
fn program() -> &'static str {
    if Path::new("/usr/sbin/nginx").exists() { "/usr/sbin/nginx" } else { "nginx" }
}

/// Writes a blob to the path at which a server serves it.
pub fn put_blob(dir: &Path, repository: &str, digest: &str, bytes: &[u8]) {
    let blobs = dir.join("www/v2").join(repository).join("blobs");
    fs::create_dir_all(&blobs).expect("a directory");
    fs::write(blobs.join(digest), bytes).expect("a file");
}
