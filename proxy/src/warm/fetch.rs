//! Manifests and blobs, checked as they come, gone on with where they broke.

use std::future::Future;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::{sleep, timeout};

use super::plan::PlannedBlob;
use super::source::{Failed, ImageSource};
use crate::oci::{DigestVerifier, ImageName, Reference};

/// A blob that came whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarmedBlob {
    pub bytes: u64,
    /// It was there before.
    pub was_kept: bool,
}

/// Tries beyond the first, in a row that bring little, each after a longer pause.
pub(super) const RETRIES: u32 = 4;
const LITTLE: u64 = 1 << 20;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// So often is looked whether it is kept.
const LOOKS: u32 = 20;
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// dray holds some questions for a minute.
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) async fn manifest(
    door: &dyn ImageSource,
    image: &ImageName,
    reference: &Reference,
) -> Result<Bytes, String> {
    let asking = || async {
        let bytes = door.manifest(image, reference).await?;
        match reference {
            Reference::Digest(digest) if !digest.matches(&bytes) => {
                Err(Failed::Passing("the manifest does not match its digest".to_owned()))
            }
            _ => Ok(bytes),
        }
    };
    retried(asking).await
}

/// Reads a blob whole. `came` is told of each piece.
pub(super) async fn blob(door: &dyn ImageSource, blob: &PlannedBlob, came: impl Fn(u64)) -> Result<WarmedBlob, String> {
    let mut reading = BlobReading { verifier: blob.digest.verifier(), bytes: 0, was_kept: None };
    let mut attempt = 0;
    loop {
        let before = reading.bytes;
        match reading.go_on(door, blob, &came).await {
            Ok(()) => break,
            Err(Failed::Passing(_)) if reading.bytes >= before + LITTLE || attempt < RETRIES => {
                if reading.bytes >= before + LITTLE {
                    attempt = 0;
                }
                pause(&mut attempt).await;
            }
            Err(Failed::Passing(problem) | Failed::ForGood(problem)) => return Err(problem),
        }
    }
    if !reading.verifier.verified() {
        return Err("it does not match its digest".to_owned());
    }
    let was_kept = reading.was_kept.unwrap_or_default();
    if !was_kept {
        is_kept_now(door, blob).await?;
    }
    Ok(WarmedBlob { bytes: reading.bytes, was_kept })
}

/// What came may have passed through without being kept. A file gets its name a moment after its last byte has left.
async fn is_kept_now(door: &dyn ImageSource, blob: &PlannedBlob) -> Result<(), String> {
    for _ in 0..LOOKS {
        match door.keeps(blob).await {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Failed::Passing(_)) => sleep(LOOK_AGAIN).await,
            Err(Failed::ForGood(problem)) => return Err(problem),
        }
    }
    Err("it came, but was not kept: is there room for it? dray's log says why (cache.disk, cache.keep_free)".to_owned())
}

/// A blob of some KiB, with its bytes.
pub(super) async fn small_blob(door: &dyn ImageSource, blob: &PlannedBlob) -> Result<Bytes, String> {
    let asking = || async {
        let bytes = whole(door, blob).await?;
        let matches = blob.digest.matches(&bytes);
        matches.then_some(bytes).ok_or_else(|| Failed::ForGood("it does not match its digest".to_owned()))
    };
    retried(asking).await
}

/// Asks for something small again where that may help.
async fn retried<F: Future<Output = Result<Bytes, Failed>>>(asking: impl Fn() -> F) -> Result<Bytes, String> {
    let mut attempt = 0;
    loop {
        let asked = timeout(PATIENCE, asking()).await;
        match asked.unwrap_or_else(|_| Err(Failed::Passing("it stalls".to_owned()))) {
            Ok(bytes) => return Ok(bytes),
            Err(Failed::Passing(_)) if attempt < RETRIES => pause(&mut attempt).await,
            Err(Failed::Passing(problem) | Failed::ForGood(problem)) => return Err(problem),
        }
    }
}

async fn whole(door: &dyn ImageSource, blob: &PlannedBlob) -> Result<Bytes, Failed> {
    let mut coming = door.blob(blob, 0).await?;
    let mut bytes = BytesMut::new();
    while let Some(piece) = coming.pieces.next().await? {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > blob.size {
            return Err(Failed::ForGood(format!("more than {} bytes came", blob.size)));
        }
    }
    Ok(bytes.freeze())
}

struct BlobReading {
    verifier: DigestVerifier,
    bytes: u64,
    was_kept: Option<bool>,
}

impl BlobReading {
    async fn go_on(&mut self, door: &dyn ImageSource, blob: &PlannedBlob, came: &impl Fn(u64)) -> Result<(), Failed> {
        let mut coming = door.blob(blob, self.bytes).await?;
        self.was_kept.get_or_insert(coming.was_kept);
        loop {
            let piece = timeout(PATIENCE, coming.pieces.next()).await;
            match piece.map_err(|_| Failed::Passing("it stalls".to_owned()))?? {
                Some(piece) => {
                    self.verifier.update(&piece);
                    self.bytes += piece.len() as u64;
                    came(piece.len() as u64);
                }
                None if self.bytes == blob.size => return Ok(()),
                None => return Err(Failed::ForGood(format!("{} bytes came, not {}", self.bytes, blob.size))),
            }
        }
    }
}

pub(super) async fn pause(attempt: &mut u32) {
    sleep(FIRST_PAUSE * (1 << *attempt)).await;
    *attempt += 1;
}
