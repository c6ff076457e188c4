//! Whether a registry holds in one repository what is cached from another one, where each repository has readers of its own
//! (`access = "client"`).
//!
//! A HEAD proves nothing: behind a proxy project of Harbor or a remote repository of Artifactory stands a server of
//! somebody else's, who could name the digest of another team's blob. Only who has the bytes can send them. A manifest
//! or small blob is requested whole. Of a large blob [`SAMPLES`] ranges are requested, one at a random place of each of as many
//! equal parts, and compared with the cache. What is not proven is fetched from that repository like any other miss.
//!
//! A server that holds only the beginning or the end of a blob fails, as long as a whole part is missing. A server that
//! holds a random half passes for one blob in eight. The places are a secret of this process and the same at each attempt,
//! so that attempts cannot be repeated until they fit. Samples do not guard a blob of which all but a little is known.

use std::ops::Range;
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::Pull;
use super::authorization::{digest_of, kind_of};
use crate::oci::{Digest, Endpoint, Reference, Span};
use crate::registries::RepositoryRef;
use crate::source::{Incoming, Part, SourceError};
use crate::store::{Blob, Found};
use crate::times::UPSTREAM_TIMEOUT;

/// Ranges of a large blob that are compared. More: more requests for each blob that two repositories share. Fewer: who has
/// a part of a blob more often passes for having all.
const SAMPLES: usize = 3;

/// Length of one, in bytes: one packet or two, and more than can be guessed.
const SAMPLE_BYTES: u64 = 4096;

impl Pull {
    /// Lets a repository have what is cached from another one, if the registry shows that it holds it there too.
    pub(super) async fn bring_in_proven(self: &Arc<Self>, place: &RepositoryRef, endpoint: &Endpoint, accept: &str) {
        let Some(digest) = digest_of(endpoint) else { return };
        let Some(found) = self.foreign(place, digest, kind_of(endpoint)).await else { return };
        if self.entitlements.has_failed_to_show(place, digest) {
            return;
        }
        let deadline = Instant::now() + UPSTREAM_TIMEOUT;
        let shown = match found {
            Found::Small { .. } if matches!(endpoint, Endpoint::Manifest(_)) => {
                self.shows_manifest(place, digest, accept, deadline).await
            }
            Found::Small { object, .. } => self.shows_small(place, digest, object.bytes.len() as u64, deadline).await,
            Found::Large { blob, .. } => self.shows_samples(place, digest, blob, deadline).await,
        };
        match shown {
            Ok(true) => self.entitlements.took(place, digest),
            Ok(false) => {
                tracing::warn!(%place, %digest, "the registry says that it has this, and does not send its bytes");
                self.entitlements.failed_to_show(place, digest);
            }
            // It says nothing of the registry.
            Err(SourceError::Busy | SourceError::NoCredentials(_) | SourceError::Limited { .. }) => {}
            Err(error) => {
                tracing::debug!(%place, %digest, %error, "the registry does not show that it has this there");
                self.entitlements.failed_to_show(place, digest);
            }
        }
    }

    async fn shows_manifest(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        accept: &str,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let reference = Reference::Digest(digest.clone());
        let sent = self.upstream.manifest(place, &reference, accept, deadline).await?;
        Ok(digest.matches(&sent.bytes))
    }

    async fn shows_small(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        total: u64,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let incoming = self.upstream.blob(place, digest, Part::From(0), Some(total), deadline).await?;
        Ok(incoming.total == total && digest.matches(&read(incoming, total, deadline).await?))
    }

    async fn shows_samples(
        self: &Arc<Self>,
        place: &RepositoryRef,
        digest: &Digest,
        blob: Arc<Blob>,
        deadline: Instant,
    ) -> Result<bool, SourceError> {
        let mut nth = 0;
        // The same for each repository and each try, so that nobody can go on until what is looked at is what it has.
        let place_of = |range: Range<u64>| {
            nth += 1;
            range.start + self.entitlements.secret_of(digest, nth) % (range.end - range.start)
        };
        for span in sample_spans(blob.len, place_of) {
            let incoming = self.upstream.blob(place, digest, Part::Span(span), Some(blob.len), deadline).await?;
            if incoming.span != span {
                return Err(SourceError::Malformed("the upstream does not honour ranges".into()));
            }
            let sent = read(incoming, span.len(), deadline).await?;
            let blob = blob.clone();
            let kept = tokio::task::spawn_blocking(move || read_kept(&blob, span)).await;
            if !matches!(kept, Ok(Ok(kept)) if kept == sent) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// One span in each of [`SAMPLES`] equal parts of a blob. `place_of` picks where it starts.
fn sample_spans(total: u64, mut place_of: impl FnMut(Range<u64>) -> u64) -> [Span; SAMPLES] {
    let part = total / SAMPLES as u64;
    std::array::from_fn(|nth| {
        let first = part * nth as u64;
        let start = place_of(first..first + part.saturating_sub(SAMPLE_BYTES).max(1));
        Span { start, end: total.min(start + SAMPLE_BYTES) }
    })
}

/// A body of this length, or what came of it.
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
fn read_kept(blob: &Blob, span: Span) -> std::io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; usize::try_from(span.len()).unwrap_or(0)];
    blob.file.read_exact_at(&mut bytes, span.start)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_within_the_blob() {
        for total in [1, SAMPLE_BYTES, SAMPLE_BYTES + 1, 1 << 40] {
            let ends = [sample_spans(total, |range| range.start), sample_spans(total, |range| range.end - 1)];
            for span in ends.into_iter().flatten() {
                assert!(span.start < span.end && span.end <= total, "{total} {span:?}");
            }
        }
    }

    #[test]
    fn samples_look_into_each_part_of_the_blob() {
        let total = 3 << 20;
        for pick in [|range: Range<u64>| range.start, |range: Range<u64>| range.end - 1] {
            let parts = sample_spans(total, pick).map(|span| (span.start >> 20, (span.end - 1) >> 20));
            assert_eq!(parts, [(0, 0), (1, 1), (2, 2)]);
        }
    }
}
