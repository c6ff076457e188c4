//! Verifies cached blobs again, slowly, to find those that are corrupt on the disk.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, sleep_until};

use super::Fills;
use super::fills::Exposure;
use crate::oci::Digest;
use crate::store::Verification;
use crate::times::{COMPLETION_GRACE, DAY};

/// Bytes of one read; a multiple of [`ALIGNMENT`]. Larger: bursts of disk load at low rates. Smaller: more reads.
const PIECE_BYTES: usize = 1024 * 1024;

/// Alignment of direct reads, in bytes. Smaller: the disk may reject them.
const ALIGNMENT: usize = 4096;

impl Fills {
    /// Hashes every large blob, at most `rate` bytes a second, until dropped; a pass begins at most once a day. Blobs
    /// that are unverified since a crash are verified by this.
    pub async fn scrub(self: &Arc<Self>, rate: u64) {
        if rate == 0 {
            return;
        }
        sleep(COMPLETION_GRACE).await;
        loop {
            let next_pass = Instant::now() + DAY;
            for digest in self.store.large.digests() {
                if let Err(error) = self.scrub_one(&digest, rate).await {
                    tracing::debug!(%digest, %error, "scrub failed");
                }
            }
            sleep_until(next_pass).await;
        }
    }

    async fn scrub_one(self: &Arc<Self>, digest: &Digest, rate: u64) -> io::Result<()> {
        let Some((blob, proof)) = self.store.large.peek(digest) else { return Ok(()) };
        let file = Arc::new(self.store.large.open_direct(digest)?);
        let mut verifier = digest.verifier();
        let mut position = 0;
        while position < blob.len {
            let begun = Instant::now();
            let reading = file.clone();
            let (hashed, count) = spawn_blocking(move || {
                let count = read_aligned(&reading, position, |bytes| verifier.update(bytes))?;
                io::Result::Ok((verifier, count))
            })
            .await
            .map_err(io::Error::other)?
            .inspect_err(|error| blob.failed(error))?;
            verifier = hashed;
            if count == 0 {
                break;
            }
            position += count as u64;
            self.metrics.scrubbed_bytes.inc_by(count as u64);
            sleep_until(begun + Duration::from_secs(1).mul_f64(count as f64 / rate as f64)).await;
        }
        if position != blob.len || !verifier.verified() {
            self.drop_corrupt(digest, &blob, Exposure::Maybe);
        } else if proof == Verification::Unverified {
            let fills = self.clone();
            let digest = digest.clone();
            spawn_blocking(move || fills.store.large.prove(&digest, &blob)).await.map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Reads a piece into memory that is aligned for direct reads.
#[expect(clippy::disallowed_methods, reason = "runs on a thread for blocking work")]
fn read_aligned(file: &std::fs::File, position: u64, use_bytes: impl FnOnce(&[u8])) -> io::Result<usize> {
    let mut memory = vec![0; PIECE_BYTES + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    let piece = &mut memory[start..start + PIECE_BYTES];
    let count = file.read_at(piece, position)?;
    use_bytes(&piece[..count]);
    Ok(count)
}
