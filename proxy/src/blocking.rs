//! Work that would block a worker, and with it every request of that worker: reading files, and parsing the largest
//! documents of upstreams and peers.

use bytes::Bytes;
use tokio::task::spawn_blocking;

/// Longest document that is parsed on the worker, in bytes: some 0.3 ms. Larger: other requests of the worker wait
/// longer. Smaller: more documents pay for a change of threads.
const MAX_INLINE_BYTES: usize = 64 * 1024;

/// Runs work on a thread that may block. A panic of the work continues in the task that awaits it.
pub async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime shuts down, and the process ends.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Runs work that nothing waits for on a thread of the lowest priority, inside the runtime. An error: it panicked.
///
/// The priority of a thread can be lowered but not raised again, so the thread is not one of the pool.
pub async fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (sender, done) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let thread = std::thread::Builder::new().name("background".to_owned()).spawn(move || {
        // On Linux this is about the calling thread only. If it is not allowed, the work takes its normal share.
        let _ = rustix::process::setpriority_process(None, 19);
        let _inside = runtime.enter();
        let _ = sender.send(work());
    });
    thread.map_err(|error| error.to_string())?;
    done.await.map_err(|_| "the work panicked, see dray's log".to_owned())
}

/// Parses a document, on the worker if it is short.
pub async fn parsed<T: Send + 'static>(bytes: &Bytes, parse: impl FnOnce(&[u8]) -> T + Send + 'static) -> T {
    if bytes.len() <= MAX_INLINE_BYTES {
        return parse(bytes);
    }
    let bytes = bytes.clone();
    on_thread(move || parse(&bytes)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_documents_are_parsed_on_another_thread() {
        let worker = std::thread::current().id();
        for (len, is_inline) in [(1, true), (MAX_INLINE_BYTES, true), (MAX_INLINE_BYTES + 1, false)] {
            let parse = |bytes: &[u8]| (bytes.len(), std::thread::current().id());
            let (parsed_len, on) = parsed(&Bytes::from(vec![0; len]), parse).await;
            assert_eq!((parsed_len, on == worker), (len, is_inline));
        }
    }
}
