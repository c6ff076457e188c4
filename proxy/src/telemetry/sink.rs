//! The path of all log lines to stderr.
//!
//! One thread writes them together: a write for each request would cost more than the rest of a small response. A
//! reader of the log that is slow, or has stopped, must not hold up a request.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::times::CLOSE_TIMEOUT;

/// A line is written after this time at the latest. Longer: lines appear late. Shorter: more writes.
const FLUSH_INTERVAL: Duration = Duration::from_millis(200);

/// Buffered lines of this size are written at once. Larger: fewer writes, of more bytes.
const FLUSH_BYTES: usize = 32 * 1024;

/// With more bytes of lines in the buffer, further lines are dropped and counted. Larger: a stopped reader costs more
/// memory. Smaller: bursts lose lines.
const MAX_BUFFERED_BYTES: usize = 4 * 1024 * 1024;

/// The buffer of log lines.
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

/// Writes its lines without waiting for others.
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
        if self.add(line) > FLUSH_BYTES {
            self.changed.notify_all();
        }
    }

    /// Writes the buffer. Later lines are lost.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        self.changed.notify_all();
        let unwritten = |state: &mut SinkState| state.writing || !state.lines.is_empty();
        self.changed.wait_while_for(&mut state, unwritten, CLOSE_TIMEOUT);
    }

    /// Adds a line, and returns the length of the buffer.
    fn add(&self, line: &[u8]) -> usize {
        let mut state = self.state.lock();
        if state.lines.len() > MAX_BUFFERED_BYTES {
            state.dropped += 1;
        } else {
            state.lines.extend_from_slice(line);
        }
        state.lines.len()
    }

    /// The lock is not held during a write, so that requests can add lines.
    fn write_until_closed(&self) {
        let mut spare = Vec::new();
        loop {
            let mut state = self.state.lock();
            if state.lines.len() <= FLUSH_BYTES && !state.closed {
                self.changed.wait_for(&mut state, FLUSH_INTERVAL);
            }
            let (dropped, closed) = (std::mem::take(&mut state.dropped), state.closed);
            std::mem::swap(&mut state.lines, &mut spare);
            state.writing = true;
            drop(state);
            if dropped > 0 {
                tracing::warn!(lines = dropped, "log lines dropped, the reader is too slow");
            }
            // If stderr fails, there is no other place to report it.
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
