//! Proves that a registry holds in one repository what is cached from another one, for rules that leave authorization
//! to the upstream.
//!
//! A HEAD is not proof. A proxy project of Harbor or a remote repository of Artifactory forwards to a third party's
//! server. That server could claim the digest of another team's blob, but only one that has the bytes can send them. A
//! manifest or small blob is requested whole. Of a large blob, one range in each of [`SAMPLES`] equal parts is
//! requested and compared with the cache. An object that is not proven is fetched from that repository like any other
//! miss.
//!
//! - A server that holds only the beginning or the end of a blob fails if a whole part is missing.
//! - A server that holds a random half of the bytes passes for one blob in eight.
//! - The offsets are secret to this process and the same at each attempt, so that repeated attempts do not help.
//! - Samples do not protect a blob of which a third party knows nearly all bytes.

use std::ops::Range;
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::{Authorizer, digest_of, kind_of};
use crate::oci::{Digest, Endpoint, Reference, Span};
use crate::registries::RepositoryRef;
use crate::source::{Incoming, Part, SourceError};
use crate::store::{Blob, Found};
use crate::times::UPSTREAM_TIMEOUT;

/// Ranges of a large blob that are compared. More: more requests for each blob that two repositories share. Fewer: a
/// server with a part of a blob passes more often.
const SAMPLES: usize = 3;

/// Length of a sample, in bytes. Longer: more traffic. Shorter: easier to guess; 4 KiB fit into three packets.
const SAMPLE_BYTES: u64 = 4096;

impl Authorizer {
    /// Adds an object that is cached from another repository to this one, if the registry proves that it holds it.
    pub(super) async fn prove_content(&self, repo_ref: &RepositoryRef, endpoint: &Endpoint, accept: &str) {
        let Some(digest) = digest_of(endpoint) else { return };
        let Some(found) = self.of_other_repository(repo_ref, digest, kind_of(endpoint)).await else { return };
        if self.cache.has_failed_proof(repo_ref, digest) {
            return;
        }
        let deadline = Instant::now() + UPSTREAM_TIMEOUT;
        let shown = match found {
            Found::Small { .. } if matches!(endpoint, Endpoint::Manifest(_)) => {
                self.manifest_matches(repo_ref, digest, accept, deadline).await
            }
            Found::Small { object, .. } => {
                self.small_blob_matches(repo_ref, digest, object.bytes.len() as u64, deadline).await
            }
            Found::Large { blob, .. } => self.samples_match(repo_ref, digest, blob, deadline).await,
        };
        match shown {
            Ok(true) => self.cache.record_proof(repo_ref, digest),
            Ok(false) => {
                tracing::warn!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, "content proof failed, upstream bytes differ");
                self.cache.record_failed_proof(repo_ref, digest);
            }
            // A local limit, the credentials or the rate limit failed the check: nothing is known of the content.
            Err(SourceError::Busy | SourceError::NoCredentials(_) | SourceError::Limited { .. }) => {}
            Err(error) => {
                tracing::debug!(registry = %repo_ref.registry, repository = %repo_ref.repository, %digest, %error, "content proof failed");
                self.cache.record_failed_proof(repo_ref, digest);
            }
        }
    }

    async fn manifest_matches(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let reference = Reference::Digest(digest.clone());
        let sent = self.upstream.manifest(repo_ref, &reference, accept, deadline).await?;
        Ok(digest.matches(&sent.bytes))
    }

    async fn small_blob_matches(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        total: u64,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let incoming = self.upstream.blob(repo_ref, digest, Part::From(0), Some(total), deadline).await?;
        Ok(incoming.total == total && digest.matches(&read(incoming, total, deadline).await?))
    }

    async fn samples_match(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        blob: Arc<Blob>,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let mut nth = 0;
        // The same for each repository and attempt: a server cannot repeat attempts until the samples fit its bytes.
        let pick_start = |range: Range<u64>| {
            nth += 1;
            range.start + self.cache.keyed_hash(digest, nth) % (range.end - range.start)
        };
        for span in sample_spans(blob.len, pick_start) {
            let incoming = self.upstream.blob(repo_ref, digest, Part::Span(span), Some(blob.len), deadline).await?;
            if incoming.span != span {
                return Err(SourceError::Malformed("the upstream ignores range requests".into()));
            }
            let sent = read(incoming, span.len(), deadline).await?;
            let blob = blob.clone();
            let kept = tokio::task::spawn_blocking(move || read_cached(&blob, span)).await;
            if !matches!(kept, Ok(Ok(kept)) if kept == sent) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// One span in each of [`SAMPLES`] equal parts of a blob. `place_of` picks where it starts.
fn sample_spans(total: u64, mut pick_start: impl FnMut(Range<u64>) -> u64) -> [Span; SAMPLES] {
    let part = total / SAMPLES as u64;
    std::array::from_fn(|nth| {
        let first = part * nth as u64;
        let start = pick_start(first..first + part.saturating_sub(SAMPLE_BYTES).max(1));
        Span { start, end: total.min(start + SAMPLE_BYTES) }
    })
}

/// Reads a body of this length; a shorter or longer one as far as it came.
async fn read(mut incoming: Incoming, length: u64, deadline: Instant) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    while let Some(piece) = timeout_at(deadline, incoming.next()).await.map_err(|_| SourceError::TimedOut)? {
        bytes.extend_from_slice(&piece.map_err(|broken| SourceError::Unreachable(broken.to_string()))?);
        if bytes.len() as u64 > length {
            break;
        }
    }
    Ok(bytes)
}

/// Blocks on the disk.
#[expect(clippy::disallowed_methods, reason = "runs on a thread for blocking work")]
fn read_cached(blob: &Blob, span: Span) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; usize::try_from(span.len()).unwrap_or(0)];
    blob.file.read_exact_at(&mut bytes, span.start)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_any_length_lie_within_the_blob() {
        for total in [1, SAMPLE_BYTES, SAMPLE_BYTES + 1, 1 << 40] {
            let ends = [sample_spans(total, |range| range.start), sample_spans(total, |range| range.end - 1)];
            for span in ends.into_iter().flatten() {
                assert!(span.start < span.end && span.end <= total, "{total} {span:?}");
            }
        }
    }

    #[test]
    fn samples_cover_each_part_of_the_blob() {
        let total = 3 << 20;
        for pick in [|range: Range<u64>| range.start, |range: Range<u64>| range.end - 1] {
            let parts = sample_spans(total, pick).map(|span| (span.start >> 20, (span.end - 1) >> 20));
            assert_eq!(parts, [(0, 0), (1, 1), (2, 2)]);
        }
    }
}
