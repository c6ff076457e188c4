//! The commands, and how each ends.

pub(crate) mod containerd;
pub(crate) mod explain;
pub(crate) mod hand_over;
mod operator;
pub(crate) mod runtime;
pub(crate) mod serve;
pub(crate) mod status;
mod table;
pub(crate) mod warm;

use std::future::Future;
use std::io::Write;
use std::path::Path;

use dray::config::{ConfigError, KeyConflict, SourceText};
use dray::server;
use dray::telemetry::{self, Filter, LogFormat};
use dray::upstream::credentials_are_here;

use self::serve::Serve;

/// Why a command ends without success.
pub(crate) enum Failure {
    Usage(String),
    Failed(String),
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
    say(&format!("{}: ok", file.display()));
    // Flags and variables may bring what is missing.
    if let Err(wrong) = config.check_together() {
        say(&format!("note: {}", text.locate(wrong)));
    }
    Ok(())
}

/// `dray check-config --here`.
pub(crate) fn check_config_here(file: &Path) -> Result<(), Failure> {
    let (config, text) = Serve::here(file)?.config()?;
    block_on(async { server::check(&config) })?.map_err(|e| Failure::Usage(format!("{}: {e}", file.display())))?;
    for rule in &config.registry {
        let Some(credentials) = &rule.get_ref().credentials else { continue };
        credentials_are_here(credentials).map_err(|problem| {
            located(text.as_ref(), KeyConflict::of_rule(rule.span().start, "registry.credentials", problem))
        })?;
    }
    say(&format!("{}: ok, and so is what it names here", file.display()));
    Ok(())
}

/// Says where it stands, if a file says it.
fn located(text: Option<&SourceText>, wrong: KeyConflict) -> Failure {
    match text {
        Some(text) => text.locate(wrong).into(),
        None => Failure::Usage(wrong.to_string()),
    }
}

/// Prints what a command has to say. A closed pipe is the reader's business.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Each of them once, in the order in which they came.
fn once<T: PartialEq>(all: Vec<T>) -> Vec<T> {
    all.into_iter().fold(Vec::new(), |mut known, one| {
        if !known.contains(&one) {
            known.push(one);
        }
        known
    })
}

/// For commands that ask others.
fn block_on<T>(asking: impl Future<Output = T>) -> Result<T, Failure> {
    install_tls()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(|e| Failure::Failed(e.to_string()))?.block_on(asking))
}

/// For commands that stay.
fn log_to_stderr() -> Result<(), Failure> {
    telemetry::init(&Filter::default(), LogFormat::Text).map(drop).map_err(Failure::Usage)
}

/// Before anything else may choose another provider.
fn install_tls() -> Result<(), Failure> {
    let installed = rustls::crypto::ring::default_provider().install_default();
    installed.map_err(|_| Failure::Failed("no TLS provider".into()))
}
