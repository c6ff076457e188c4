//! The access log: one line per request, as text or JSON.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Serialize, Serializer};

use crate::telemetry::{LogFormat, Sink};

/// The destination and format of the lines.
pub struct AccessLog {
    format: LogFormat,
    sink: Arc<Sink>,
}

/// One request and its outcome.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    pub id: &'a str,
    /// The trace that the request belongs to (W3C Trace Context).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<SocketAddr>,
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
    pub registry_from: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<&'a str>,
    pub status: u16,
    pub source: &'static str,
    pub bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_byte_ms: Option<Millis>,
    pub total_ms: Millis,
    /// Why there is no content, or why the body ended early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'a str>,
}

/// Written in milliseconds, to the microsecond.
#[derive(Clone, Copy, Debug)]
pub struct Millis(pub Duration);

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
    pub fn new(format: LogFormat, sink: Arc<Sink>) -> Self {
        Self { format, sink }
    }

    /// Writes a line, unless the log's filter turns the target `access` off.
    pub fn add(&self, line: &Line<'_>) {
        if !tracing::enabled!(target: "access", tracing::Level::INFO) {
            return;
        }
        let text = match self.format {
            LogFormat::Text => as_text(SystemTime::now(), line),
            LogFormat::Json => as_json(SystemTime::now(), line),
        };
        self.sink.gather(text.as_bytes());
    }
}

fn as_json(now: SystemTime, line: &Line<'_>) -> String {
    let mut timestamp = String::with_capacity(32);
    write_time(&mut timestamp, now);
    let event = Event { timestamp: &timestamp, level: "INFO", target: "access", message: "request", line };
    serde_json::to_string(&event).unwrap_or_default() + "\n"
}

/// Without `format!`: it would cost more than the rest of the line, and every request writes one.
fn as_text(now: SystemTime, line: &Line<'_>) -> String {
    let mut text = String::with_capacity(512);
    write_time(&mut text, now);
    text.push_str("  INFO access: request");
    write_field(&mut text, " id=", line.id);
    if let Some(trace) = line.trace {
        write_field(&mut text, " trace=", trace);
    }
    if let Some(client) = line.client {
        text.push_str(" client=");
        write_address(&mut text, client);
    }
    for (name, value) in [
        (" agent=", line.agent),
        (" method=", Some(line.method)),
        (" path=", Some(line.path)),
        (" route=", Some(line.route)),
        (" registry=", line.registry),
        (" repository=", line.repository),
        (" registry_from=", line.registry_from),
        (" rule=", line.rule),
    ] {
        if let Some(value) = value {
            write_field(&mut text, name, value);
        }
    }
    write_number(&mut text, " status=", line.status.into());
    write_field(&mut text, " source=", line.source);
    write_number(&mut text, " bytes=", line.bytes);
    if let Some(first_byte) = line.first_byte_ms {
        text.push_str(" first_byte_ms=");
        first_byte.write(&mut text);
    }
    text.push_str(" total_ms=");
    line.total_ms.write(&mut text);
    if let Some(error) = line.error {
        write_field(&mut text, " error=", error);
    }
    text.push('\n');
    text
}

/// Quotes a value that could be taken for another field or another line.
fn write_field(text: &mut String, name: &str, value: &str) {
    // A fold without early exit is vectorized; nearly every value is plain.
    let plain = value.bytes().fold(!value.is_empty(), |plain, byte| plain & byte.is_ascii_graphic() & (byte != b'"'));
    text.push_str(name);
    if plain {
        text.push_str(value);
    } else {
        // Writing into a string does not fail.
        let _ = write!(text, "{value:?}");
    }
}

fn write_number(text: &mut String, name: &str, value: u64) {
    text.push_str(name);
    text.push_str(itoa::Buffer::new().format(value));
}

fn write_address(text: &mut String, address: SocketAddr) {
    let SocketAddr::V4(v4) = address else {
        let _ = write!(text, "{address}");
        return;
    };
    let mut digits = itoa::Buffer::new();
    for (nth, octet) in v4.ip().octets().into_iter().enumerate() {
        if nth > 0 {
            text.push('.');
        }
        text.push_str(digits.format(octet));
    }
    text.push(':');
    text.push_str(digits.format(v4.port()));
}

/// RFC 3339, to the microsecond. The part up to the second is formatted once a second.
fn write_time(text: &mut String, now: SystemTime) {
    thread_local! {
        static SECOND: RefCell<(u64, String)> = const { RefCell::new((u64::MAX, String::new())) };
    }
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SECOND.with_borrow_mut(|(known, written)| {
        if *known != since.as_secs() {
            let second = SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs());
            *written = humantime::format_rfc3339_seconds(second).to_string();
            *known = since.as_secs();
        }
        text.push_str(written.trim_end_matches('Z'));
    });
    text.push('.');
    write_padded(text, since.subsec_micros(), 6);
    text.push('Z');
}

/// Pads with leading zeros.
fn write_padded(text: &mut String, value: u32, digits: usize) {
    let mut buffer = itoa::Buffer::new();
    let value = buffer.format(value);
    (value.len()..digits).for_each(|_| text.push('0'));
    text.push_str(value);
}

impl Millis {
    fn write(self, text: &mut String) {
        let micros = u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX);
        text.push_str(itoa::Buffer::new().format(micros / 1000));
        text.push('.');
        write_padded(text, u32::try_from(micros % 1000).unwrap_or(0), 3);
    }

    /// A number of milliseconds.
    pub fn number(self) -> f64 {
        (self.0.as_secs_f64() * 1e6).round() / 1e3
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.number())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(agent: &'static str) -> Line<'static> {
        Line {
            id: "1f",
            trace: None,
            client: Some("10.0.0.1:4000".parse().unwrap()),
            agent: Some(agent),
            method: "GET",
            path: "/v2/",
            route: "ping",
            registry: None,
            repository: None,
            registry_from: None,
            rule: Some("*"),
            status: 200,
            source: "none",
            bytes: 2,
            first_byte_ms: Some(Millis(Duration::from_micros(250))),
            total_ms: Millis(Duration::from_millis(1)),
            error: None,
        }
    }

    #[test]
    fn value_with_line_break_is_quoted() {
        let forging = line("curl/8\nstatus=404 \"x\"");
        assert_eq!(
            as_text(SystemTime::UNIX_EPOCH, &forging),
            "1970-01-01T00:00:00.000000Z  INFO access: request id=1f client=10.0.0.1:4000 \
             agent=\"curl/8\\nstatus=404 \\\"x\\\"\" method=GET path=/v2/ route=ping rule=* status=200 source=none \
             bytes=2 first_byte_ms=0.250 total_ms=1.000\n"
        );
        let json = as_json(SystemTime::UNIX_EPOCH, &forging);
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((read["agent"].as_str(), &read["status"]), (forging.agent, &200.into()));
        assert_eq!(json.lines().count(), 1);
        assert_eq!((&read["timestamp"], &read["first_byte_ms"]), (&"1970-01-01T00:00:00.000000Z".into(), &0.25.into()));
    }

    #[test]
    fn timestamp_matches_rfc3339_formatter() {
        for micros in [0, 1, 999_999, 1_000_000, 1_779_800_000_123_456] {
            let now = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
            let mut text = String::new();
            write_time(&mut text, now);
            assert_eq!(text, humantime::format_rfc3339_micros(now).to_string());
        }
    }
}
