//! The access log: one line a request on stderr, text for people or JSON for machines.
//!
//! Lines are gathered and written together by a thread of their own, at the latest after
//! [`WRITTEN_EVERY`]: a write for each would be the dearest part of a small answer, and who reads them
//! slowly must not hold up a request.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::telemetry::LogFormat;

/// How long a line may wait to be written.
const WRITTEN_EVERY: Duration = Duration::from_millis(200);

/// Lines together of this size are written at once; beyond the other they are dropped, and counted.
const FULL: usize = 32 * 1024;
const MOST: usize = 4 * 1024 * 1024;

/// At the end the last lines have this long to be written.
const FAREWELL: Duration = Duration::from_secs(1);

/// Where lines are gathered.
pub struct AccessLog {
    format: Option<LogFormat>,
    gathered: Arc<Gathered>,
}

#[derive(Default)]
struct Gathered {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    dropped: u64,
    writing: bool,
    closed: bool,
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
    pub fn new(format: LogFormat) -> Self {
        let wanted = tracing::enabled!(target: "access", tracing::Level::INFO);
        let gathered = Arc::new(Gathered::default());
        if wanted {
            let writing = gathered.clone();
            std::thread::spawn(move || writing.write_until_closed());
        }
        Self { format: wanted.then_some(format), gathered }
    }

    pub fn add(&self, line: &Line<'_>) {
        let Some(format) = self.format else { return };
        let text = match format {
            LogFormat::Text => as_text(SystemTime::now(), line),
            LogFormat::Json => as_json(SystemTime::now(), line),
        };
        let mut state = self.gathered.state();
        if state.lines.len() > MOST {
            state.dropped += 1;
            return;
        }
        state.lines.extend_from_slice(text.as_bytes());
        if state.lines.len() > FULL {
            self.gathered.changed.notify_all();
        }
    }

    /// Writes what has gathered; later lines are lost.
    pub fn close(&self) {
        let mut state = self.gathered.state();
        state.closed = true;
        self.gathered.changed.notify_all();
        let unwritten = |state: &mut State| state.writing || !state.lines.is_empty();
        let _ = self.gathered.changed.wait_timeout_while(state, FAREWELL, unwritten);
    }
}

impl Gathered {
    /// The lock is never held while something is written.
    fn write_until_closed(&self) {
        let mut spare = Vec::new();
        loop {
            let mut state = self.state();
            if state.lines.len() <= FULL && !state.closed {
                let waited = self.changed.wait_timeout(state, WRITTEN_EVERY);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            let (dropped, closed) = (std::mem::take(&mut state.dropped), state.closed);
            std::mem::swap(&mut state.lines, &mut spare);
            state.writing = true;
            drop(state);
            // Nobody is left to be told that the log cannot be written.
            let _ = std::io::stderr().write_all(&spare);
            spare.clear();
            if dropped > 0 {
                tracing::warn!(lines = dropped, "the access log is read too slowly, lines are missing");
            }
            self.state().writing = false;
            self.changed.notify_all();
            if closed {
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Only appended to, emptied and looked at under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
