//! `dray serve`, and `dray` without a command.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{Args, FromArgMatches};
use dray::access_log::AccessLog;
use dray::config::{self, Config, DiskShare, MIN_DISK, Size, SourceText};
use dray::server::{self, Bound, StartError};
use dray::telemetry::{self, Filter, LogFormat};

use super::{Failure, install_tls, located, say};

#[derive(Args)]
pub(crate) struct Serve {
    /// Configuration file; without one the built-in defaults hold
    #[arg(long, env = "DRAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where container runtimes connect; port 0 takes any free port
    #[arg(long, env = "DRAY_LISTEN", value_name = "IP:PORT", value_parser = config::address)]
    listen: Option<SocketAddr>,
    /// Where operators and probes connect
    #[arg(long, env = "DRAY_ADMIN", value_name = "IP:PORT", value_parser = config::address)]
    admin: Option<SocketAddr>,
    /// The cache directory; it may be deleted at any time
    #[arg(long, env = "DRAY_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Disk to use: a size such as 20GiB, or a share of its file system such as 50%
    #[arg(long, env = "DRAY_CACHE_DISK", value_name = "SIZE")]
    cache_disk: Option<DiskShare>,
    /// Bytes of small objects in memory, such as 64MiB
    #[arg(long, env = "DRAY_CACHE_MEMORY", value_name = "SIZE")]
    cache_memory: Option<Size>,
    /// The name that has the addresses of all drays, such as a headless Service. Unless the file
    /// says where peers connect, opens 0.0.0.0:5052 for them
    #[arg(long, env = "DRAY_PEERS_SERVICE", value_name = "NAME", value_parser = config::service_name)]
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
    log: Filter,
    /// How log lines look
    #[arg(long, env = "DRAY_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,
}

/// Where peers meet when only the name of their service is given.
const PEERS_PORT: u16 = 5052;

impl Serve {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (config, text) = self.config()?;
        let sink = telemetry::init(&self.log, self.log_format).map_err(Failure::Usage)?;
        // Before anything else may choose another provider.
        install_tls()?;
        let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
        let access_log = AccessLog::new(self.log_format, sink.clone());
        let ended = server::run(config, access_log, move |bound| announce(bound, scheme));
        sink.close();
        ended.map_err(|error| match error {
            StartError::Config(message) => Failure::Usage(match text {
                Some(text) => format!("{}: {message}", text.file()),
                None => message,
            }),
            StartError::Failed(message) => Failure::Failed(message),
        })
    }

    /// As it would start with a file in the environment of this process.
    pub(crate) fn here(file: &Path) -> Result<Self, Failure> {
        let arguments = [OsStr::new("dray"), OsStr::new("--config"), file.as_os_str()];
        let matches = Self::augment_args(clap::Command::new("dray")).try_get_matches_from(arguments);
        let here = matches.and_then(|matches| Self::from_arg_matches(&matches));
        here.map_err(|error| Failure::Usage(error.to_string()))
    }

    /// The file, overridden by flags and variables, and its text.
    pub(crate) fn config(&self) -> Result<(Config, Option<SourceText>), Failure> {
        let text = self.config.as_deref().map(SourceText::read).transpose()?;
        let mut config = text.as_ref().map_or_else(|| Ok(Config::default()), SourceText::parse)?;
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
        config.check_together().map_err(|wrong| located(text.as_ref(), wrong))?;
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
        Ok((config, text))
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
