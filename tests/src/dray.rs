//! dray as a process, with a configuration file, flags and a cache directory.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::http::{ClientResponse, get};
use crate::process::Process;
use crate::{build_dir, eventually};

/// A running dray.
pub struct Dray {
    pub registry: SocketAddr,
    pub admin: SocketAddr,
    pub peers: Option<SocketAddr>,
    process: Process,
    start: Start,
}

/// How to start dray, also repeatedly.
#[derive(Clone)]
pub struct Start {
    config: String,
    dir: std::sync::Arc<TempDir>,
    cache: PathBuf,
    disk: String,
    env: Vec<(String, String)>,
    log: Option<PathBuf>,
    cores: Cores,
    program: Option<PathBuf>,
}

/// The cores that dray can use.
#[derive(Clone, Copy)]
enum Cores {
    All,
    First,
}

impl Start {
    /// With a configuration and an empty cache directory.
    pub fn new(config: impl Into<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let cache = dir.path().join("cache");
        Self {
            config: config.into(),
            dir: dir.into(),
            cache,
            disk: "4GiB".into(),
            env: Vec::new(),
            log: None,
            cores: Cores::All,
            program: None,
        }
    }

    /// With one rule, which maps `registry` to `upstream`.
    pub fn with_upstream(registry: &str, upstream: &str) -> Self {
        Self::new(rule(registry, upstream))
    }

    pub fn cache(mut self, cache: impl Into<PathBuf>) -> Self {
        self.cache = cache.into();
        self
    }

    pub fn disk(mut self, disk: &str) -> Self {
        self.disk = disk.to_owned();
        self
    }

    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Writes the log to a file.
    pub fn log_to(mut self, file: &std::path::Path) -> Self {
        self.log = Some(file.to_owned());
        self
    }

    /// On the first core only.
    pub fn pinned(mut self) -> Self {
        self.cores = Cores::First;
        self
    }

    /// Runs another program than the one that cargo built beside this test.
    pub fn with_program(mut self, program: &std::path::Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    pub fn cache_dir(&self) -> &PathBuf {
        &self.cache
    }

    /// A temporary directory that exists as long as this value.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// The command, not started.
    pub fn command(&self) -> Command {
        let file = self.dir.path().join("dray.toml");
        std::fs::write(&file, &self.config).expect("the configuration is written");
        let mut command = match self.cores {
            Cores::All => Command::new(self.program.clone().unwrap_or_else(binary)),
            Cores::First => {
                let mut command = Command::new("taskset");
                command.args(["-c", "0"]).arg(binary());
                command
            }
        };
        command
            .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"])
            .arg(file)
            .arg("--cache-dir")
            .arg(&self.cache)
            .args(["--cache-disk", &self.disk, "--cache-memory", "16MiB"])
            .stdout(Stdio::piped());
        if self.config.contains("[log]") {
            // The variable overrides the file.
            command.env_remove("DRAY_LOG");
        } else if std::env::var_os("DRAY_LOG").is_none() {
            command.env("DRAY_LOG", "error");
        }
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        if let Some(log) = &self.log {
            command.stderr(std::fs::File::create(log).expect("a log file"));
        }
        command
    }

    pub fn run(self) -> Dray {
        let mut process = Process::spawn(&mut self.command());
        let line = process.line("listening ");
        let field = |name: &str| {
            let value = line.split(' ').find_map(|field| field.strip_prefix(name)).expect("a field of the start line");
            value.parse().ok()
        };
        Dray {
            registry: field("registry=").expect("an address"),
            admin: field("admin=").expect("an address"),
            peers: field("peers="),
            process,
            start: self,
        }
    }
}

impl Dray {
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.registry)
    }

    /// `GET` of a path of the registry port.
    pub async fn get(&self, path: &str) -> ClientResponse {
        get(&self.url(path), &[]).await
    }

    pub async fn get_range(&self, path: &str, range: &str) -> ClientResponse {
        get(&self.url(path), &[("range", range)]).await
    }

    /// The value of a metric, with its labels as in the exposition. 0: the metric is missing.
    pub async fn metric(&self, name: &str) -> u64 {
        let text = get(&format!("http://{}/metrics", self.admin), &[]).await.text();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Waits until every running download is published or aborted.
    pub async fn wait_for_fills(&self) {
        eventually("no download runs", async || (self.metric("dray_downloads_in_progress").await == 0).then_some(()))
            .await;
    }

    /// Waits until a download runs.
    pub async fn wait_for_fill_start(&self) {
        eventually("a download runs", async || (self.metric("dray_downloads_in_progress").await > 0).then_some(()))
            .await;
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    pub fn start(&self) -> &Start {
        &self.start
    }

    /// Stops with SIGTERM and starts again.
    pub fn restart(mut self) -> Self {
        self.process.signal(Signal::TERM);
        self.process.wait();
        self.start.clone().run()
    }

    /// Stops with SIGINT, which does not wait for requests, and starts again.
    pub fn interrupt_and_restart(mut self) -> Self {
        self.process.signal(Signal::INT);
        self.process.wait();
        self.start.clone().run()
    }

    /// Kills with SIGKILL and starts again.
    pub fn kill_and_restart(mut self) -> Self {
        self.process.kill();
        self.start.clone().run()
    }
}

/// The program of the previous commit. None: this is the first commit.
pub fn previous_program() -> Option<PathBuf> {
    previous_file("dray")
}

/// The chart of the previous commit.
pub fn previous_chart() -> Option<PathBuf> {
    previous_file("chart")
}

fn previous_file(name: &str) -> Option<PathBuf> {
    let path = crate::project().join("target/previous").join(name);
    path.exists().then_some(path)
}

/// A `[[registry]]` table.
pub fn rule(registry: &str, upstream: &str) -> String {
    format!("[[registry]]\nmatch = \"{registry}\"\nupstreams = [\"{upstream}\"]\n")
}

/// The binary that cargo built beside this test.
pub fn binary() -> PathBuf {
    let path = build_dir().join("dray");
    assert!(path.exists(), "{} is missing: run `make test`", path.display());
    path
}
