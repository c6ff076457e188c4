//! The command line. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use dray::access_log::AccessLog;
use dray::config::{Config, MIN_DISK, Share, Size};
use dray::containerd::{Change, HostsDir, Mode};
use dray::server::{self, Bound, StartError};
use dray::telemetry::{self, LogFormat};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A stateless pull-through cache proxy for container registries.
///
/// Point every container runtime at it once; from then on any image of any registry is fetched
/// once, verified by digest, and served from here. Without a command it serves; options stand
/// before or after that, but not before another command.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve registry clients (the default)
    Serve(Serve),
    /// Check a configuration file and say what is wrong with it
    ///
    /// Does not open the files that it names.
    CheckConfig {
        /// The file
        file: PathBuf,
    },
    /// Point containerd at dray, or take that back
    #[command(subcommand)]
    Containerd(Containerd),
}

#[derive(Args)]
struct Serve {
    /// Configuration file; without one the built-in defaults hold
    #[arg(long, env = "DRAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where container runtimes connect; port 0 takes any free port
    #[arg(long, env = "DRAY_LISTEN", value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// Where operators and probes connect
    #[arg(long, env = "DRAY_ADMIN", value_name = "IP:PORT")]
    admin: Option<SocketAddr>,
    /// The cache directory; it may be deleted at any time
    #[arg(long, env = "DRAY_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Disk to use: a size such as 20GiB, or a share of its file system such as 50%
    #[arg(long, env = "DRAY_CACHE_DISK", value_name = "SIZE")]
    cache_disk: Option<Share>,
    /// Bytes of small objects in memory, such as 64MiB
    #[arg(long, env = "DRAY_CACHE_MEMORY", value_name = "SIZE")]
    cache_memory: Option<Size>,
    /// The name that has the addresses of all drays, such as a headless Service. Unless the file
    /// says where peers connect, opens 0.0.0.0:5052 for them
    #[arg(long, env = "DRAY_PEERS_SERVICE", value_name = "NAME")]
    peers_service: Option<String>,
    /// The zone that this node is in
    #[arg(long, env = "DRAY_ZONE", value_name = "ZONE")]
    zone: Option<String>,
    /// A file with a secret of 16 characters or more that all drays share, by which they prove to each other
    /// who they are; not beside certificates (`[peers] mtls`)
    #[arg(long, env = "DRAY_PEERS_KEY_FILE", value_name = "FILE")]
    peers_key_file: Option<PathBuf>,
    /// What to log: error, warn, info, debug; or by part, such as "warn,access=info"
    #[arg(long, env = "DRAY_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
    /// How log lines look
    #[arg(long, env = "DRAY_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,
}

#[derive(Subcommand)]
enum Containerd {
    /// Write _default/hosts.toml into containerd's hosts directory
    Install {
        /// containerd's config_path, such as /etc/containerd/certs.d
        #[arg(long, value_name = "DIR")]
        hosts_dir: PathBuf,
        /// Where containerd reaches dray, such as http://127.0.0.1:5050
        #[arg(long, value_name = "URL")]
        mirror: String,
        /// Only say what would be written
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove what install wrote, and put back what was there before
    Uninstall {
        /// containerd's config_path, such as /etc/containerd/certs.d
        #[arg(long, value_name = "DIR")]
        hosts_dir: PathBuf,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

/// Where peers meet when only the name of their service is given.
const PEERS_PORT: u16 = 5052;

/// Why a command ends without success.
enum Failure {
    Usage(String),
    Failed(String),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(serve) => serve.run(),
        Command::CheckConfig { file } => check_config(&file),
        Command::Containerd(command) => command.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => fail(&message, 2),
        Err(Failure::Failed(message)) => fail(&message, 1),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "dray: {message}");
    ExitCode::from(code)
}

/// Prints what a command has to say. A closed pipe is the reader's business.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn check_config(file: &std::path::Path) -> Result<(), Failure> {
    Config::load(file).map_err(|e| Failure::Usage(e.to_string()))?;
    say(&format!("{}: ok", file.display()));
    Ok(())
}

impl Serve {
    fn run(self) -> Result<(), Failure> {
        let config = self.merged()?;
        let sink = telemetry::init(&self.log, self.log_format).map_err(Failure::Usage)?;
        // Before anything else may choose another provider.
        rustls::crypto::ring::default_provider()
            .install_default()
            .map_err(|_| Failure::Failed("no TLS provider".into()))?;
        let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
        let access_log = AccessLog::new(self.log_format, sink.clone());
        let ended = server::run(config, access_log, move |bound| announce(bound, scheme));
        sink.close();
        ended.map_err(|error| match error {
            StartError::Config(message) => Failure::Usage(message),
            StartError::Failed(message) => Failure::Failed(message),
        })
    }

    /// The file, overridden by flags and variables.
    fn merged(&self) -> Result<Config, Failure> {
        let mut config = match &self.config {
            Some(file) => Config::load(file).map_err(|e| Failure::Usage(e.to_string()))?,
            None => Config::default(),
        };
        if let Some(listen) = self.listen {
            config.listen = listen;
        }
        if let Some(admin) = self.admin {
            config.admin = admin;
        }
        if let Some(service) = &self.peers_service {
            config.peers.service = vec![(None, service.clone())];
            if config.peers.listen.is_none() {
                config.peers.listen = Some(SocketAddr::from(([0, 0, 0, 0], PEERS_PORT)));
            }
        }
        if let Some(key_file) = &self.peers_key_file {
            config.peers.key_file = Some(key_file.clone());
        }
        if let Some(zone) = &self.zone {
            config.peers.zone = Some(zone.as_str().into());
        }
        config.peers.check().map_err(|(key, problem)| Failure::Usage(format!("{key}: {problem}")))?;
        if let Some(dir) = &self.cache_dir {
            config.cache.dir.clone_from(dir);
        }
        if let Some(disk) = self.cache_disk {
            if disk.is_below(MIN_DISK) {
                return Err(Failure::Usage(format!(
                    "--cache-disk {disk} is too little, at least {MIN_DISK} are needed"
                )));
            }
            config.cache.disk = disk;
        }
        if let Some(memory) = self.cache_memory {
            config.cache.memory = memory;
        }
        Ok(config)
    }
}

/// The start line, which others parse, and something to try at once.
fn announce(bound: Bound, scheme: &str) {
    let peers = bound.peers.map_or_else(|| "-".to_owned(), |peers| peers.to_string());
    say(&format!("listening registry={} admin={} peers={peers}", bound.registry, bound.admin));
    say(&format!(
        "try: curl {scheme}://{0}/v2/docker.io/library/alpine/manifests/latest\n\
         then point containerd here: dray containerd install --hosts-dir /etc/containerd/certs.d --mirror {scheme}://{0}",
        server::reachable(bound.registry)
    ));
}

impl Containerd {
    fn run(self) -> Result<(), Failure> {
        let mode = |dry_run| if dry_run { Mode::DryRun } else { Mode::Apply };
        let change = match self {
            Self::Install { hosts_dir, mirror, dry_run } => HostsDir::new(hosts_dir).install(&mirror, mode(dry_run)),
            Self::Uninstall { hosts_dir, dry_run } => HostsDir::new(hosts_dir).uninstall(mode(dry_run)),
        };
        match change.map_err(|e| Failure::Failed(e.to_string()))? {
            Change::Nothing => say("nothing to do"),
            Change::Wrote { path, content, backup } => {
                if let Some(backup) = backup {
                    say(&format!("{} is kept as {}", path.display(), backup.display()));
                }
                say(&format!("{}:\n{content}", path.display()));
            }
            Change::Restored(path) => say(&format!("{} is as it was before", path.display())),
            Change::Removed(path) => say(&format!("{} is gone", path.display())),
        }
        Ok(())
    }
}
