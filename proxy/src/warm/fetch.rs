//! Manifests and blobs, checked as they come, gone on with where they broke.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use super::door::{Door, Failed};
use super::plan::Blob;
use crate::oci::{ImageName, Reference, Verifier};

/// A blob that came whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub bytes: u64,
    /// It was there before.
    pub was_kept: bool,
}

/// Tries beyond the first, in a row without a byte, each after a longer pause.
const RETRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// dray holds some questions for a minute.
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) async fn manifest(door: &dyn Door, image: &ImageName, reference: &Reference) -> Result<Bytes, String> {
    let mut attempt = 0;
    loop {
        let asked = timeout(PATIENCE, door.manifest(image, reference)).await;
        let problem = match asked.unwrap_or_else(|_| Err(Failed::Passing("it stalls".to_owned()))) {
            Ok(bytes) => match reference {
                Reference::Digest(digest) if !digest.matches(&bytes) => {
                    Failed::Passing("the manifest does not match its digest".to_owned())
                }
                _ => return Ok(bytes),
            },
            Err(problem) => problem,
        };
        match problem {
            Failed::Passing(_) if attempt < RETRIES => pause(&mut attempt).await,
            Failed::Passing(problem) | Failed::ForGood(problem) => return Err(problem),
        }
    }
}

/// Reads a blob whole. `came` is told of each piece.
pub(super) async fn blob(door: &dyn Door, blob: &Blob, came: impl Fn(u64)) -> Result<Fetched, String> {
    let mut reading = Reading { verifier: blob.digest.verifier(), bytes: 0, was_kept: None };
    let mut attempt = 0;
    loop {
        let before = reading.bytes;
        match reading.go_on(door, blob, &came).await {
            Ok(()) => break,
            Err(Failed::Passing(_)) if reading.bytes > before || attempt < RETRIES => {
                if reading.bytes > before {
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
    Ok(Fetched { bytes: reading.bytes, was_kept: reading.was_kept.unwrap_or_default() })
}

struct Reading {
    verifier: Verifier,
    bytes: u64,
    was_kept: Option<bool>,
}

impl Reading {
    async fn go_on(&mut self, door: &dyn Door, blob: &Blob, came: &impl Fn(u64)) -> Result<(), Failed> {
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

async fn pause(attempt: &mut u32) {
    sleep(FIRST_PAUSE * (1 << *attempt)).await;
    *attempt += 1;
}
