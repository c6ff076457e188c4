//! The commands of the command line, and what they share.

pub(crate) mod cache;
mod cluster;
pub(crate) mod completions;
pub(crate) mod containerd;
pub(crate) mod explain;
pub(crate) mod man;
mod operator;
mod prepare;
pub(crate) mod runtime;
pub(crate) mod serve;
pub(crate) mod status;
mod table;
pub(crate) mod warm;

use std::future::Future;
use std::io::Write;
use std::path::Path;

use dray::config::{ConfigError, KeyConflict, LogFilter, SourceText};
use dray::server;
use dray::telemetry::{self, LogFormat};
use dray::upstream::check_credentials;

use self::serve::Serve;

/// Why a command failed; `Usage` ends with exit code 2, `Failed` with 1.
pub(crate) enum Failure {
    Usage(String),
    Failed(String),
}

impl Failure {
    fn message(&self) -> &str {
        match self {
            Self::Usage(message) | Self::Failed(message) => message,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Usage(error.to_string())
    }
}

/// `dray check-config`.
pub(crate) fn check_config(file: &Path) -> Result<(), Failure> {
    let text = SourceText::read(file)?;
    let config = text.parse()?;
    print(&format!("{}: ok, hash {}", file.display(), config.hash()));
    // A note, not an error: a flag or variable of `serve` may set the missing key.
    if let Err(conflict) = config.check_together() {
        print(&format!("note: {}", text.locate(conflict)));
    }
    Ok(())
}

/// `dray check-config --check-files`.
pub(crate) fn check_config_files(file: &Path) -> Result<(), Failure> {
    let (config, text) = Serve::from_environment(file)?.config()?;
    block_on(async { server::check(&config) })?.map_err(|e| Failure::Usage(format!("{}: {e}", file.display())))?;
    for rule in &config.registry {
        let Some(credentials) = &rule.get_ref().credentials else { continue };
        check_credentials(credentials).map_err(|problem| {
            located(text.as_ref(), KeyConflict::of_rule(rule.span().start, "registry.credentials", problem))
        })?;
    }
    print(&format!(
        "{}: ok, including the files and credentials that it names, hash {}",
        file.display(),
        config.hash()
    ));
    Ok(())
}

/// Adds the position in the configuration file, if there is a file.
fn located(text: Option<&SourceText>, conflict: KeyConflict) -> Failure {
    match text {
        Some(text) => text.locate(conflict).into(),
        None => Failure::Usage(conflict.to_string()),
    }
}

/// Prints a line to standard output. A write to a closed pipe is not an error: `dray status | head` succeeds.
fn print(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Removes duplicates and keeps the order.
fn deduplicated<T: PartialEq>(items: Vec<T>) -> Vec<T> {
    items.into_iter().fold(Vec::new(), |mut unique, item| {
        if !unique.contains(&item) {
            unique.push(item);
        }
        unique
    })
}

/// For commands that send requests.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    install_tls()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|e| Failure::Failed(e.to_string()))?.block_on(future))
}

/// For commands that run until a signal.
fn log_to_stderr() -> Result<(), Failure> {
    telemetry::init(&LogFilter::default(), LogFormat::Text).map(drop).map_err(Failure::Usage)
}

/// Must run before a library installs another TLS provider: the first one wins.
fn install_tls() -> Result<(), Failure> {
    let installed = rustls::crypto::ring::default_provider().install_default();
    installed.map_err(|_| Failure::Failed("the TLS provider is already installed".into()))
}
