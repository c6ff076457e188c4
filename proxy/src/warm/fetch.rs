//! Downloads of manifests and blobs: verified while they are received, resumed after an interruption.

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::{sleep, timeout};

use super::plan::PlannedBlob;
use super::source::{FetchError, ImageSource};
use crate::oci::{DigestVerifier, ImageName, Reference};

/// A blob that was downloaded completely, and verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmedBlob {
    pub bytes: u64,
    /// The blob was a cache hit.
    pub was_cached: bool,
}

/// Retries after the first attempt. More: a source that is down for good is reported later; four with doubling pauses
/// take 7.5 s.
pub(super) const MAX_RETRIES: u32 = 4;

/// An attempt that received this much resets the count of retries. Larger: a source that often interrupts is given up.
/// Smaller: a source that sends a few bytes per attempt is retried without end.
const MIN_PROGRESS_BYTES: u64 = 1 << 20;

/// The pause before the first retry; each further one is twice as long.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Checks whether a downloaded blob is cached, 5 s in total. More: a blob that was not cached is reported later. Fewer:
/// a slow disk is taken for a cache that does not store the blob.
const MAX_CACHE_CHECKS: u32 = 20;
const CACHE_CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Timeout of a response, and of each of its chunks. Shorter than a minute: requests fail that dray still holds open
/// for a slow upstream ([`crate::times::UPSTREAM_TIMEOUT`]).
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(90);

pub(super) async fn manifest(
    source: &dyn ImageSource,
    image: &ImageName,
    reference: &Reference,
) -> Result<Bytes, String> {
    let request = || async {
        let bytes = source.manifest(image, reference).await?;
        match reference {
            Reference::Digest(digest) if !digest.matches(&bytes) => {
                Err(FetchError::Temporary("the manifest does not match its digest".to_owned()))
            }
            _ => Ok(bytes),
        }
    };
    with_retries(request).await
}

/// Reads and verifies a whole blob. `on_chunk` is called with the length of each chunk.
pub(super) async fn blob(
    source: &dyn ImageSource,
    blob: &PlannedBlob,
    on_chunk: impl Fn(u64),
) -> Result<WarmedBlob, String> {
    let mut reading = BlobReading { verifier: blob.digest.verifier(), bytes: 0, was_cached: None };
    let mut attempt = 0;
    loop {
        let before = reading.bytes;
        match reading.resume(source, blob, &on_chunk).await {
            Ok(()) => break,
            Err(FetchError::Temporary(_)) if reading.bytes >= before + MIN_PROGRESS_BYTES || attempt < MAX_RETRIES => {
                if reading.bytes >= before + MIN_PROGRESS_BYTES {
                    attempt = 0;
                }
                pause(&mut attempt).await;
            }
            Err(FetchError::Temporary(problem) | FetchError::Permanent(problem)) => return Err(problem),
        }
    }
    if !reading.verifier.verified() {
        return Err("it does not match its digest".to_owned());
    }
    let was_cached = reading.was_cached.unwrap_or_default();
    if !was_cached {
        check_cached(source, blob).await?;
    }
    Ok(WarmedBlob { bytes: reading.bytes, was_cached })
}

/// Fails if dray did not cache the blob, as with a cache bypass. Waits, because dray publishes the file shortly after
/// it has sent the last byte.
async fn check_cached(source: &dyn ImageSource, blob: &PlannedBlob) -> Result<(), String> {
    for _ in 0..MAX_CACHE_CHECKS {
        match source.is_cached(blob).await {
            Ok(true) => return Ok(()),
            Ok(false) | Err(FetchError::Temporary(_)) => sleep(CACHE_CHECK_INTERVAL).await,
            Err(FetchError::Permanent(problem)) => return Err(problem),
        }
    }
    Err("it was downloaded, but not cached: see dray's log, and check cache.disk and cache.min_free".to_owned())
}

/// The content of a small blob such as an image configuration.
pub(super) async fn small_blob(source: &dyn ImageSource, blob: &PlannedBlob) -> Result<Bytes, String> {
    let request = || async {
        let bytes = read_all(source, blob).await?;
        let matches = blob.digest.matches(&bytes);
        matches.then_some(bytes).ok_or_else(|| FetchError::Permanent("it does not match its digest".to_owned()))
    };
    with_retries(request).await
}

/// Repeats a request after temporary errors.
async fn with_retries<F: Future<Output = Result<Bytes, FetchError>>>(request: impl Fn() -> F) -> Result<Bytes, String> {
    let mut attempt = 0;
    loop {
        let result = timeout(READ_TIMEOUT, request()).await;
        match result.unwrap_or_else(|_| Err(FetchError::Temporary("timed out".to_owned()))) {
            Ok(bytes) => return Ok(bytes),
            Err(FetchError::Temporary(_)) if attempt < MAX_RETRIES => pause(&mut attempt).await,
            Err(FetchError::Temporary(problem) | FetchError::Permanent(problem)) => return Err(problem),
        }
    }
}

async fn read_all(source: &dyn ImageSource, blob: &PlannedBlob) -> Result<Bytes, FetchError> {
    let mut stream = source.blob(blob, 0).await?;
    let mut bytes = BytesMut::new();
    while let Some(chunk) = stream.chunks.next().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > blob.size {
            return Err(FetchError::Permanent(format!(
                "the blob is larger than its size in the manifest, {} bytes",
                blob.size
            )));
        }
    }
    Ok(bytes.freeze())
}

struct BlobReading {
    verifier: DigestVerifier,
    bytes: u64,
    was_cached: Option<bool>,
}

impl BlobReading {
    /// Downloads the rest of the blob.
    async fn resume(
        &mut self,
        source: &dyn ImageSource,
        blob: &PlannedBlob,
        on_chunk: &impl Fn(u64),
    ) -> Result<(), FetchError> {
        let mut stream = source.blob(blob, self.bytes).await?;
        self.was_cached.get_or_insert(stream.was_cached);
        loop {
            let chunk = timeout(READ_TIMEOUT, stream.chunks.next()).await;
            match chunk.map_err(|_| FetchError::Temporary("timed out".to_owned()))?? {
                Some(chunk) => {
                    self.verifier.update(&chunk);
                    self.bytes += chunk.len() as u64;
                    on_chunk(chunk.len() as u64);
                }
                None if self.bytes == blob.size => return Ok(()),
                None => {
                    return Err(FetchError::Permanent(format!(
                        "the blob has {} bytes, but its size in the manifest is {}",
                        self.bytes, blob.size
                    )));
                }
            }
        }
    }
}

pub(super) async fn pause(attempt: &mut u32) {
    sleep(FIRST_RETRY_PAUSE * (1 << *attempt)).await;
    *attempt += 1;
}
