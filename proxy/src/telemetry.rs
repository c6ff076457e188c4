//! Telemetry: logs on stderr, one line per event, as text or JSON; and traces.

#[cfg(feature = "otlp")]
mod otlp;
mod sink;

use std::io::IsTerminal;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

pub use self::sink::Sink;
use crate::config::{LogFilter, Tracing};
use crate::trace::Tracer;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Pingora logs each early close of a client as an error, and the TLS verifier each rejected certificate. dray logs
/// both itself.
const MUTED: &str = "pingora_core=off,foyer=error,foyer_storage=error,rustls_platform_verifier=off,\
                     hickory_resolver=error,hickory_net=error";

/// Where log lines go, and which events become log lines.
pub struct Log {
    /// Must be closed at the end of the process.
    pub sink: Arc<Sink>,
    set_filter: Box<dyn Fn(EnvFilter) + Send + Sync>,
}

impl Log {
    /// From now on logs what this filter selects.
    pub fn set_filter(&self, filter: &LogFilter) {
        (self.set_filter)(directives(filter));
    }
}

fn directives(filter: &LogFilter) -> EnvFilter {
    EnvFilter::new(format!("{},{MUTED}", filter.as_str()))
}

/// Starts logging.
pub fn init(filter: &LogFilter, format: LogFormat) -> Result<Log, String> {
    let sink = Sink::start().map_err(|e| format!("the log thread cannot be started: {e}"))?;
    let urgent = sink.clone();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(directives(filter))
        .with_writer(move || sink::Urgent(urgent.clone()))
        .with_ansi(std::io::stderr().is_terminal());
    let (started, set_filter): (_, Box<dyn Fn(EnvFilter) + Send + Sync>) = match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Box::new(move |filter| drop(handle.reload(filter))))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(false).with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Box::new(move |filter| drop(handle.reload(filter))))
        }
    };
    started.map_err(|e| e.to_string())?;
    Ok(Log { sink, set_filter })
}

/// The tracer that records how long requests take, and where. Must run inside a tokio runtime.
pub fn tracer(settings: &Tracing) -> Result<Tracer, String> {
    #[cfg(feature = "otlp")]
    if let Some(collector) = &settings.otlp {
        let collector = otlp::Otlp::new(collector).map_err(|e| format!("tracing.otlp: {e}"))?;
        return Ok(Tracer::new(collector, settings.sample));
    }
    // Without the feature no configuration names a collector.
    let _ = settings;
    Ok(Tracer::default())
}
