//! Ends the process when a task blocks its worker, in builds with `DRAY_WATCH_WORKERS` in their environment: the builds
//! that the tests run (Makefile).
//!
//! A worker that blocks holds up every request that it carries. A thread that neither runs nor waits for a core (Linux:
//! `/proc/thread-self/schedstat`) is blocked: on the disk, on a lock, or asleep.

#![allow(clippy::disallowed_methods, reason = "reads /proc, which does not block")]

use std::fs::File;
use std::future::{Future, poll_fn};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Longest time that a thread may be blocked within one poll of a task. Longer: other requests of the worker wait
/// noticeably. Shorter: on a loaded machine page faults would end the process.
const MAX_BLOCKED: Duration = Duration::from_millis(100);

thread_local! {
    static SCHEDULER: Option<File> = File::open("/proc/thread-self/schedstat").ok();
}

/// When a poll began.
struct Poll {
    began: Instant,
    /// The time that the thread had been running or ready to run.
    active: Duration,
}

/// The same task, with each poll watched.
///
/// It is boxed: an `async fn` would hold the task twice, before and while it runs, as long as its connection lives.
pub fn watched<F: Future>(task: F) -> impl Future<Output = F::Output> {
    let mut task = Box::pin(task);
    poll_fn(move |context| {
        if option_env!("DRAY_WATCH_WORKERS").is_none() {
            return task.as_mut().poll(context);
        }
        let poll = Poll::begin();
        let result = task.as_mut().poll(context);
        if let Some(blocked) = poll.and_then(|poll| poll.blocked()).filter(|blocked| *blocked > MAX_BLOCKED) {
            let thread = std::thread::current();
            eprintln!("a task blocked the thread {} for {blocked:?}", thread.name().unwrap_or("without a name"));
            std::process::abort();
        }
        result
    })
}

impl Poll {
    fn begin() -> Option<Self> {
        Some(Self { active: active()?, began: Instant::now() })
    }

    /// How long the thread was blocked since.
    fn blocked(&self) -> Option<Duration> {
        let passed = self.began.elapsed();
        // Most polls take microseconds.
        if passed <= MAX_BLOCKED {
            return None;
        }
        Some(passed.saturating_sub(active()?.saturating_sub(self.active)))
    }
}

/// How long this thread has been running, or ready to run.
fn active() -> Option<Duration> {
    SCHEDULER.with(|file| {
        let mut text = [0; 64];
        let len = file.as_ref()?.read_at(&mut text, 0).ok()?;
        let mut fields = std::str::from_utf8(&text[..len]).ok()?.split_ascii_whitespace();
        let mut next = || Some(Duration::from_nanos(fields.next()?.parse().ok()?));
        Some(next()? + next()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_counts_as_blocked_and_computing_does_not() {
        let poll = Poll::begin().unwrap();
        std::thread::sleep(MAX_BLOCKED * 2);
        assert!(poll.blocked().unwrap() > MAX_BLOCKED);
        let poll = Poll::begin().unwrap();
        let until = Instant::now() + MAX_BLOCKED * 2;
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        assert!(poll.blocked().unwrap() < MAX_BLOCKED);
    }
}
