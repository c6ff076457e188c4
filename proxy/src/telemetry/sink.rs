//! All log lines on their way to stderr.
//!
//! They are gathered and written together by a thread of their own: a write for each request would be
//! the dearest part of a small answer, and who reads the log slowly, or not at all, must not hold up a
//! request.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::times::FAREWELL;

/// How long a line may wait to be written.
const WRITTEN_EVERY: Duration = Duration::from_millis(200);

/// Lines together of this size are written at once; beyond the other they are dropped, and counted.
const FULL: usize = 32 * 1024;
const MOST: usize = 4 * 1024 * 1024;

/// Where lines are gathered.
#[derive(Default)]
pub struct Sink {
    state: Mutex<SinkState>,
    changed: Condvar,
}

#[derive(Default)]
struct SinkState {
    lines: Vec<u8>,
    dropped: u64,
    writing: bool,
    closed: bool,
}

/// Takes what is to be written soon.
pub(super) struct Urgent(pub(super) Arc<Sink>);

impl Sink {
    /// Starts the thread that writes.
    pub fn start() -> io::Result<Arc<Self>> {
        let sink = Arc::new(Self::default());
        let writing = sink.clone();
        std::thread::Builder::new().name("log".into()).spawn(move || writing.write_until_closed())?;
        Ok(sink)
    }

    /// Adds a line that may wait for others.
    pub fn gather(&self, line: &[u8]) {
        if self.add(line) > FULL {
            self.changed.notify_all();
        }
    }

    /// Writes what has gathered; later lines are lost.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        self.changed.notify_all();
        let unwritten = |state: &mut SinkState| state.writing || !state.lines.is_empty();
        self.changed.wait_while_for(&mut state, unwritten, FAREWELL);
    }

    /// How much has gathered.
    fn add(&self, line: &[u8]) -> usize {
        let mut state = self.state.lock();
        if state.lines.len() > MOST {
            state.dropped += 1;
        } else {
            state.lines.extend_from_slice(line);
        }
        state.lines.len()
    }

    /// The lock is never held while something is written.
    fn write_until_closed(&self) {
        let mut spare = Vec::new();
        loop {
            let mut state = self.state.lock();
            if state.lines.len() <= FULL && !state.closed {
                self.changed.wait_for(&mut state, WRITTEN_EVERY);
            }
            let (dropped, closed) = (std::mem::take(&mut state.dropped), state.closed);
            std::mem::swap(&mut state.lines, &mut spare);
            state.writing = true;
            drop(state);
            if dropped > 0 {
                tracing::warn!(lines = dropped, "the log is read too slowly, lines are missing");
            }
            // Nobody is left to be told that the log cannot be written.
            let _ = io::stderr().write_all(&spare);
            spare.clear();
            self.state.lock().writing = false;
            self.changed.notify_all();
            if closed {
                return;
            }
        }
    }
}

impl Write for Urgent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.add(bytes);
        self.0.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
