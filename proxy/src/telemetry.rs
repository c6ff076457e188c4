//! Telemetry: logs on stderr, one line per event, as text or JSON; and traces.

mod filter;
#[cfg(feature = "otlp")]
mod otlp;
mod sink;

use std::io::IsTerminal;
use std::sync::Arc;

pub use self::filter::Filter;
pub use self::sink::Sink;
use crate::config::Tracing;
use crate::trace::Tracer;

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Starts logging. The sink must be closed at the end of the process.
pub fn init(filter: &Filter, format: LogFormat) -> Result<Arc<Sink>, String> {
    let sink = Sink::start().map_err(|e| format!("the log thread cannot be started: {e}"))?;
    let urgent = sink.clone();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter.directives())
        .with_writer(move || sink::Urgent(urgent.clone()))
        .with_ansi(std::io::stderr().is_terminal());
    let started = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    started.map_err(|e| e.to_string())?;
    Ok(sink)
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
