//! The access log: one line a request, text for people or JSON for machines.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::telemetry::{LogFormat, Sink};

/// Where lines go, and how they look.
pub struct AccessLog {
    /// None: nobody wants it.
    format: Option<LogFormat>,
    sink: Arc<Sink>,
}

/// One request and what became of it.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    pub id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<std::net::SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<&'a str>,
    pub method: &'a str,
    pub path: &'a str,
    pub route: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repository: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub named_by: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'a str>,
    pub status: u16,
    pub source: &'static str,
    pub bytes: u64,
    /// Rounded to microseconds, as the next one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_ms: Option<f64>,
    pub total_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<&'a str>,
}

#[derive(Serialize)]
struct Event<'a> {
    timestamp: &'a str,
    level: &'static str,
    target: &'static str,
    message: &'static str,
    #[serde(flatten)]
    line: &'a Line<'a>,
}

impl AccessLog {
    /// Writes in this format, unless the log's filter turns the target `access` off.
    pub fn new(format: LogFormat, sink: Arc<Sink>) -> Self {
        let wanted = tracing::enabled!(target: "access", tracing::Level::INFO);
        Self { format: wanted.then_some(format), sink }
    }

    pub fn add(&self, line: &Line<'_>) {
        let Some(format) = self.format else { return };
        let text = match format {
            LogFormat::Text => as_text(SystemTime::now(), line),
            LogFormat::Json => as_json(SystemTime::now(), line),
        };
        self.sink.gather(text.as_bytes());
    }
}

fn as_json(now: SystemTime, line: &Line<'_>) -> String {
    let timestamp = humantime::format_rfc3339_micros(now).to_string();
    let event = Event { timestamp: &timestamp, level: "INFO", target: "access", message: "request", line };
    serde_json::to_string(&event).unwrap_or_default() + "\n"
}

fn as_text(now: SystemTime, line: &Line<'_>) -> String {
    let mut text = String::with_capacity(512);
    // Writing into a string does not fail.
    let _ = write!(text, "{}  INFO access: request", humantime::format_rfc3339_micros(now));
    word(&mut text, "id", line.id);
    if let Some(client) = line.client {
        let _ = write!(text, " client={client}");
    }
    for (name, value) in [
        ("agent", line.agent),
        ("method", Some(line.method)),
        ("path", Some(line.path)),
        ("route", Some(line.route)),
        ("registry", line.registry),
        ("repository", line.repository),
        ("named_by", line.named_by),
        ("rule", line.rule),
    ] {
        if let Some(value) = value {
            word(&mut text, name, value);
        }
    }
    let _ = write!(text, " status={} source={} bytes={}", line.status, line.source, line.bytes);
    if let Some(first_byte) = line.first_byte_ms {
        let _ = write!(text, " first_byte_ms={first_byte}");
    }
    let _ = write!(text, " total_ms={}", line.total_ms);
    if let Some(failure) = line.failure {
        word(&mut text, "failure", failure);
    }
    text.push('\n');
    text
}

/// What could be taken for another field, or another line, is quoted.
fn word(text: &mut String, name: &str, value: &str) {
    let plain = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
    text.push(' ');
    text.push_str(name);
    text.push('=');
    if plain {
        text.push_str(value);
    } else {
        let _ = write!(text, "{value:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(agent: &'static str) -> Line<'static> {
        Line {
            id: "1f",
            client: Some("10.0.0.1:4000".parse().unwrap()),
            agent: Some(agent),
            method: "GET",
            path: "/v2/",
            route: "ping",
            registry: None,
            repository: None,
            named_by: None,
            rule: Some("*"),
            status: 200,
            source: "none",
            bytes: 2,
            first_byte_ms: Some(0.25),
            total_ms: 1.0,
            failure: None,
        }
    }

    #[test]
    fn a_line_cannot_be_forged() {
        let forging = line("curl/8\nstatus=404 \"x\"");
        assert_eq!(
            as_text(SystemTime::UNIX_EPOCH, &forging),
            "1970-01-01T00:00:00.000000Z  INFO access: request id=1f client=10.0.0.1:4000 \
             agent=\"curl/8\\nstatus=404 \\\"x\\\"\" method=GET path=/v2/ route=ping rule=* status=200 source=none \
             bytes=2 first_byte_ms=0.25 total_ms=1\n"
        );
        let json = as_json(SystemTime::UNIX_EPOCH, &forging);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((read["agent"].as_str(), &read["status"]), (forging.agent, &200.into()));
        assert_eq!(json.lines().count(), 1);
    }
}
