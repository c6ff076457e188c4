//! `dray serve`, and `dray` without a command.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, FromArgMatches};
use dray::access_log::AccessLog;
use dray::config::{self, Config, DiskShare, LogFilter, MIN_DISK, Size, SourceText};
use dray::server::{self, Bound, ConfigSource, StartError};
use dray::telemetry::{self, LogFormat};

use super::{Failure, install_tls, located, print};

#[derive(Args, Clone)]
pub(crate) struct Serve {
    /// The configuration file; without one, the built-in defaults apply
    #[arg(long, env = "DRAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// The address on which container runtimes connect; port 0 selects a free port
    #[arg(long, env = "DRAY_LISTEN", value_name = "IP:PORT", value_parser = config::address)]
    listen: Option<SocketAddr>,
    /// The address for operators, metrics and probes
    #[arg(long, env = "DRAY_ADMIN", value_name = "IP:PORT", value_parser = config::address)]
    admin: Option<SocketAddr>,
    /// The cache directory; its content can be deleted at any time
    #[arg(long, env = "DRAY_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// The disk space for the cache: a size such as 20GiB, or a share of its file system such as 50%
    #[arg(long, env = "DRAY_CACHE_DISK", value_name = "SIZE")]
    cache_disk: Option<DiskShare>,
    /// The memory for small objects such as manifests: a size such as 64MiB
    #[arg(long, env = "DRAY_CACHE_MEMORY", value_name = "SIZE")]
    cache_memory: Option<Size>,
    /// The DNS name that resolves to the addresses of all peers, such as a headless Service. Unless the
    /// configuration file sets peers.listen, also listens on 0.0.0.0:5052 for peers
    #[arg(long, env = "DRAY_PEERS_SERVICE", value_name = "NAME", value_parser = config::service_name)]
    peers_service: Option<String>,
    /// The zone of this node
    #[arg(long, env = "DRAY_ZONE", value_name = "ZONE")]
    zone: Option<String>,
    /// A file with a secret of at least 16 characters that all peers share and authenticate each other with;
    /// cannot be combined with client certificates (`[peers] mtls`)
    #[arg(long, env = "DRAY_PEERS_KEY_FILE", value_name = "FILE")]
    peers_key_file: Option<PathBuf>,
    /// The log level: error, warn, info (the default) or debug; also by part, such as "warn,access=info"
    #[arg(long, env = "DRAY_LOG", value_name = "FILTER")]
    log: Option<LogFilter>,
    /// The format of log lines
    #[arg(long, env = "DRAY_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    log_format: LogFormat,
}

/// A larger configuration file is not reloaded, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;

/// The port for peers if only the name of their service is configured.
const PEERS_PORT: u16 = 5052;

impl Serve {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (config, text) = self.config()?;
        let log = Arc::new(telemetry::init(&config.log.filter, self.log_format).map_err(Failure::Usage)?);
        install_tls()?;
        let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
        let access_log = AccessLog::new(self.log_format, log.sink.clone());
        let text_at_start = text.as_ref().map(|text| text.as_str().to_owned());
        let source = Arc::new(ServeSource { serve: self.clone(), text_at_start });
        let ended = server::run(config, source, access_log, log.clone(), move |bound| announce(bound, scheme));
        log.sink.close();
        ended.map_err(|error| match error {
            StartError::Config(message) => Failure::Usage(match text {
                Some(text) => format!("{}: {message}", text.file()),
                None => message,
            }),
            StartError::Failed(message) => Failure::Failed(message),
        })
    }

    /// The options of `serve --config FILE` in the environment of this process.
    pub(crate) fn from_environment(file: &Path) -> Result<Self, Failure> {
        let arguments = [OsStr::new("dray"), OsStr::new("--config"), file.as_os_str()];
        let matches = Self::augment_args(clap::Command::new("dray")).try_get_matches_from(arguments);
        let serve = matches.and_then(|matches| Self::from_arg_matches(&matches));
        serve.map_err(|error| Failure::Usage(error.to_string()))
    }

    /// The configuration: the file, overridden by flags and variables; and the file's text.
    pub(crate) fn config(&self) -> Result<(Config, Option<SourceText>), Failure> {
        self.config_of(self.config.as_deref().map(SourceText::read).transpose()?)
    }

    fn config_of(&self, text: Option<SourceText>) -> Result<(Config, Option<SourceText>), Failure> {
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
        config.check_together().map_err(|conflict| located(text.as_ref(), conflict))?;
        if let Some(dir) = &self.cache_dir {
            config.cache.dir.clone_from(dir);
        }
        if let Some(disk) = self.cache_disk {
            if disk.is_below(MIN_DISK) {
                return Err(Failure::Usage(format!("--cache-disk {disk} is too small: the minimum is {MIN_DISK}")));
            }
            config.cache.disk = disk;
        }
        if let Some(memory) = self.cache_memory {
            config.cache.memory = memory;
        }
        if let Some(filter) = &self.log {
            config.log.filter.clone_from(filter);
        }
        Ok((config, text))
    }
}

/// The file that `serve` reads, and its flags and variables.
struct ServeSource {
    serve: Serve,
    text_at_start: Option<String>,
}

impl ConfigSource for ServeSource {
    fn text_at_start(&self) -> Option<String> {
        self.text_at_start.clone()
    }

    #[expect(clippy::disallowed_methods, reason = "runs on threads for blocking work")]
    fn text(&self) -> Option<Result<String, String>> {
        let file = self.serve.config.as_deref()?;
        let failed = |error: String| format!("{}: {error}", file.display());
        // A pipe would block, and a huge file would be read again and again.
        let text = match std::fs::metadata(file) {
            Err(error) => Err(failed(error.to_string())),
            Ok(found) if !found.is_file() => Err(failed("is not a regular file".into())),
            Ok(found) if found.len() > MAX_CONFIG_BYTES => Err(failed("has more than 4 MiB".into())),
            Ok(_) => SourceText::read(file).map(|text| text.as_str().to_owned()).map_err(|error| error.to_string()),
        };
        Some(text)
    }

    fn parse(&self, text: &str) -> Result<Config, String> {
        let file = self.serve.config.as_deref().map_or_else(String::new, |file| file.display().to_string());
        let config = self.serve.config_of(Some(SourceText::new(text, &file)));
        config.map(|(config, _)| config).map_err(|failure| failure.message().to_owned())
    }
}

/// Prints the start line, which scripts parse, and two commands to try.
fn announce(bound: Bound, scheme: &str) {
    let peers = bound.peers.map_or_else(|| "-".to_owned(), |peers| peers.to_string());
    print(&format!("listening registry={} admin={} peers={peers}", bound.registry, bound.admin));
    print(&format!(
        "try: curl {scheme}://{0}/v2/docker.io/library/alpine/manifests/latest\n\
         to use dray as containerd's mirror: dray containerd install --hosts-dir /etc/containerd/certs.d --mirror {scheme}://{0}",
        server::reachable(bound.registry)
    ));
}
