//! Work that would hold up a worker, and with it every request that the worker carries: reading files, and parsing the
//! largest documents that upstreams and peers send.

use bytes::Bytes;
use tokio::task::spawn_blocking;

/// Longest document that is parsed at once, in bytes: some 0.3 ms. Longer ones are parsed on a thread for blocking work.
const SHORT: usize = 64 * 1024;

/// Runs work on a thread that may block. Work that panics does so in its caller.
pub async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The process ends.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Parses a document.
pub async fn parsed<T: Send + 'static>(bytes: &Bytes, parse: impl FnOnce(&[u8]) -> T + Send + 'static) -> T {
    if bytes.len() <= SHORT {
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
        let here = std::thread::current().id();
        for (len, is_here) in [(1, true), (SHORT, true), (SHORT + 1, false)] {
            let parse = |bytes: &[u8]| (bytes.len(), std::thread::current().id());
            let (parsed_len, on) = parsed(&Bytes::from(vec![0; len]), parse).await;
            assert_eq!((parsed_len, on == here), (len, is_here));
        }
    }
}
