//! One fill, from its first request to the published file.
//!
//! | writing ended with | draft | remembered |
//! |---|---|---|
//! | the digest matches | published under its digest; held only for its readers in the client role | |
//! | mismatch, or sources with different lengths | dropped | the content is distrusted |
//! | a part, and the owner no longer serves it | dropped | the content is distrusted |
//! | a part, for other reasons | kept as a partial for a later fill | |
//! | no space left | dropped | the blob bypasses the cache for [`crate::times::PAUSE`] |
//! | disk failure | dropped | all blobs bypass the cache for [`crate::times::MAX_RETRY_DELAY`] |

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::timeout;

use super::engine::{DownloadEnd, Engine};
use super::fills::{Exposure, FillPermit};
use super::progress::Phase;
use super::range_plan::{self, MAX_RANGE_BYTES};
use super::span_stream::{ConnectionMode, FillSources, SpanStream, VerifiedContent};
use super::write::{self, WriteOutcome};
use super::{Fill, Fills, OpenedFill};
use crate::oci::{BLOB_MEDIA_TYPE, Span, Spans};
use crate::provenance::Provenance;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Draft, Found, Large, NoSpace, Partial, SMALL_BYTES, SmallKind, SmallObject, Verification};
use crate::times::{REACH_TIMEOUT, UPSTREAM_TIMEOUT};

/// A running fill. Dropping it, also by a panic, removes it from the list and wakes its readers.
pub(super) struct RunningFill<'a> {
    pub(super) fills: &'a Fills,
    pub(super) fill: &'a Fill,
    pub(super) _permit: FillPermit,
}

impl RunningFill<'_> {
    /// Downloads a blob; the first reader begins at `from`.
    pub(super) async fn fill_from(&self, sources: Arc<dyn FillSources>, from: u64) {
        // An earlier fill may have ended between the lookup of the request and this start. A copy from another registry
        // was not served to that request either.
        let kept = self.fills.store.find(&self.fill.key.digest, SmallKind::Blob).await;
        let from_here = |found: &Found| found.provenance().is_some_and(|known| self.fill.is_same_content(known));
        match kept.filter(from_here) {
            Some(Found::Small { object, .. }) => {
                return self.fill.open(Ok(OpenedFill::Small { object, from: ServedFrom::Memory }));
            }
            Some(Found::Large { blob, proof: Verification::Verified }) => {
                self.fill.open(Ok(OpenedFill::Growing { blob: blob.clone(), from: ServedFrom::Disk }));
                return self.fill.end(Phase::Verified);
            }
            _ => {}
        }
        let (digest, registry) = (&self.fill.key.digest, &self.fill.key.registry);
        // Corrupt content may have been combined from a good and a bad source, so a distrusted blob is downloaded from
        // one source only.
        let distrusted = self.fills.is_distrusted(&self.fill.key.content());
        // A partial of another repository may not be visible to the clients of this one.
        let fits = |known: &Provenance| self.fill.is_same_content(known);
        let partial = match self.fills.store.large.take_partial(digest, registry, fits) {
            dropped if distrusted => {
                self.on_disk(|_| drop(dropped)).await;
                None
            }
            found => found,
        };
        let role = self.fill.role();
        let opened = if distrusted || sources.connections() == ConnectionMode::One {
            SpanStream::open(sources.clone(), 0, None).await
        } else {
            first_range(sources.clone(), partial.as_ref(), from).await
        };
        let (opened, partial) = match (opened, partial) {
            // The owner refuses to resume: the bytes of the partial turned out to be corrupt.
            (Err(SourceError::NotFound(_)), partial @ Some(_)) if role != Role::Global => {
                match SpanStream::open(sources.clone(), 0, None).await {
                    Ok(feed) => {
                        self.on_disk(|_| drop(partial)).await;
                        (Ok(feed), None)
                    }
                    Err(error) => (Err(error), partial),
                }
            }
            opened => opened,
        };
        let feed = match opened {
            Ok(feed) => feed,
            Err(error) => {
                self.restore_partial(partial).await;
                return self.fill.open(Err(error));
            }
        };
        if feed.total() > SMALL_BYTES {
            return self.large(feed, sources, partial).await;
        }
        let whole = timeout(UPSTREAM_TIMEOUT, self.small(feed, sources.clone())).await;
        match whole.unwrap_or(Err(SourceError::TimedOut)) {
            Ok(SmallBlobResult::Small(opened)) => self.fill.open(Ok(opened)),
            Ok(SmallBlobResult::Larger(feed)) => self.large(*feed, sources, None).await,
            Err(error) => self.fill.open(Err(error)),
        }
    }

    /// Downloads a small object whole, and verifies it before any reader gets it.
    async fn small(&self, mut feed: SpanStream, sources: Arc<dyn FillSources>) -> Result<SmallBlobResult, SourceError> {
        if feed.position() > 0 {
            feed = SpanStream::open(sources.clone(), 0, None).await?;
        }
        let mut was_wrong = false;
        let opened = loop {
            if feed.total() > SMALL_BYTES {
                return Ok(SmallBlobResult::Larger(Box::new(feed)));
            }
            let of_peer = feed.served_from() == ServedFrom::Peer;
            match self.read_small(feed).await {
                Err(SourceError::Malformed(_)) if of_peer && !was_wrong => {
                    was_wrong = true;
                    sources.mismatched();
                    // The content is distrusted now, so the next attempt uses the upstream.
                }
                Err(SourceError::TimedOut) if of_peer => {
                    tracing::info!(digest = %self.fill.key.digest, "peer stalled");
                }
                opened => break opened?,
            }
            feed = SpanStream::open(sources.clone(), 0, None).await?;
        };
        if let OpenedFill::Small { object, .. } = &opened {
            sources.matched(VerifiedContent::Bytes(object.bytes.clone()));
        }
        Ok(SmallBlobResult::Small(opened))
    }

    async fn read_small(&self, mut feed: SpanStream) -> Result<OpenedFill, SourceError> {
        let total = usize::try_from(feed.total()).unwrap_or(usize::MAX);
        let _held = self.fills.memory.of_upstreams.wait(&self.fill.key.registry, total).await;
        let mut bytes = bytes::BytesMut::new();
        // If a peer stalls after the beginning, there must be time for another source.
        let read_timeout = if feed.served_from() == ServedFrom::Peer { REACH_TIMEOUT } else { UPSTREAM_TIMEOUT };
        while let Some(piece) = timeout(read_timeout, feed.next()).await.unwrap_or(Err(SourceError::TimedOut))? {
            bytes.extend_from_slice(&piece);
        }
        let bytes = bytes.freeze();
        if !self.fill.key.digest.matches(&bytes) {
            self.fills.distrust(self.fill.key.content());
            return Err(SourceError::Malformed("the content does not match its digest".into()));
        }
        let provenance = Arc::new(self.fill.repo_ref.provenance());
        let object = SmallObject::new(BLOB_MEDIA_TYPE, provenance, &bytes);
        self.fills.store.small.insert(&self.fill.key.digest, SmallKind::Blob, object.clone()).await;
        Ok(OpenedFill::Small { object, from: feed.served_from() })
    }

    async fn large(&self, feed: SpanStream, sources: Arc<dyn FillSources>, partial: Option<Partial>) {
        let (total, from) = (feed.total(), feed.served_from());
        let Some(permit) = self.fills.large.take(&self.fill.key.registry, 1) else {
            self.restore_partial(partial).await;
            return self.bypass_cache(feed, "overloaded");
        };
        if self.fills.disk_failed.contains_key(&()) {
            self.restore_partial(partial).await;
            return self.bypass_cache(feed, "disk");
        }
        // A recent attempt ran out of space, and this one would too.
        if self.fills.has_no_space(&self.fill.key) {
            self.restore_partial(partial).await;
            return self.bypass_cache(feed, "no_space");
        }
        // A partial of another length belongs to other content, and is dropped.
        let resumed = partial.filter(|partial| partial.draft.blob.len == total);
        let (draft, written) = match resumed {
            Some(Partial { draft, written }) => (draft, written),
            None => match self.draft(total).await {
                Ok(draft) => (draft, Spans::default()),
                Err(NoSpace) => return self.bypass_cache(feed, "no_space"),
            },
        };
        if !written.is_empty() {
            tracing::info!(digest = %self.fill.key.digest, bytes = written.len(), total, "download resumed");
            self.fills.metrics.resumed_bytes.inc_by(written.len());
        }
        self.fill.begin(&draft, from, &written);
        let waiting_kib = self.fills.waiting_kib.clone();
        let (writer, writing) = write::start(self.fill, &self.fills.store.large, &draft, written, waiting_kib);
        let engine =
            Engine { fill: self.fill, sources: sources.clone(), connections: &self.fills.connections, total, writer };
        let ended = Box::pin(engine.run(feed)).await;
        let written = writing.await.unwrap_or(WriteOutcome::DiskFailed);
        drop(permit);
        self.conclude(draft, ended, written, &*sources).await;
    }

    async fn draft(&self, total: u64) -> Result<Draft, NoSpace> {
        let (large, provenance) = (self.fills.store.large.clone(), self.fill.repo_ref.provenance());
        tokio::task::spawn_blocking(move || large.draft(total, provenance)).await.unwrap_or(Err(NoSpace))
    }

    async fn conclude(&self, draft: Draft, ended: DownloadEnd, written: WriteOutcome, sources: &dyn FillSources) {
        let digest = &self.fill.key.digest;
        match (written, ended) {
            (WriteOutcome::Verified, _) => {
                sources.matched(VerifiedContent::File(draft.blob.clone()));
                self.publish(draft).await;
            }
            (WriteOutcome::Mismatch, _) | (WriteOutcome::Part(_), DownloadEnd::Disputed) => {
                sources.mismatched();
                self.fills.distrust(self.fill.key.content());
                self.fill.withdraw();
                self.on_disk(|_| draft.discard()).await;
            }
            // The owner refuses to continue: the bytes that it sent turned out to be corrupt.
            (WriteOutcome::Part(spans), DownloadEnd::Broken(SourceError::NotFound(_)))
                if self.fill.role() != Role::Global && !spans.is_empty() =>
            {
                self.fills.distrust(self.fill.key.content());
                self.fill.withdraw();
                self.on_disk(|_| draft.discard()).await;
            }
            (WriteOutcome::Part(spans), ended) => {
                match ended {
                    DownloadEnd::Broken(error) => tracing::warn!(%digest, %error, "download failed"),
                    _ => tracing::info!(%digest, bytes = spans.len(), "download abandoned"),
                }
                self.keep(draft, spans).await;
                // Bytes that were already readable stay in the partial, so that a resumed read loses none.
                self.fill.end(Phase::Failed);
            }
            // Readers that resume bypass the cache.
            (WriteOutcome::NoSpace, _) => {
                tracing::warn!(%digest, "cache space exhausted during download");
                self.fills.no_space.insert(self.fill.key.clone(), ());
                self.fill.end(Phase::Failed);
                self.on_disk(|_| drop(draft)).await;
            }
            (WriteOutcome::DiskFailed, _) => {
                self.fills.disk_failed.insert((), ());
                self.fill.end(Phase::Failed);
                self.on_disk(|_| drop(draft)).await;
            }
        }
    }

    async fn restore_partial(&self, partial: Option<Partial>) {
        if let Some(Partial { draft, written }) = partial {
            self.keep(draft, written).await;
        }
    }

    async fn keep(&self, draft: Draft, written: Spans) {
        let (digest, registry) = (self.fill.key.digest.clone(), self.fill.key.registry.clone());
        self.on_disk(move |large| large.keep_partial(&digest, &registry, draft, written)).await;
    }

    /// Runs work that blocks on the disk, such as freeing the space of a large file.
    async fn on_disk(&self, work: impl FnOnce(&Large) + Send + 'static) {
        let large = self.fills.store.large.clone();
        // It fails only if the process ends.
        let _ = tokio::task::spawn_blocking(move || work(&large)).await;
    }

    /// The blob bypasses the cache: each reader downloads it separately.
    fn bypass_cache(&self, feed: SpanStream, reason: &str) {
        self.fills.metrics.cache_bypass.with_label_values(&[reason]).inc();
        // The entry is not renewed, so that caching is tried again when it expires.
        if !self.fills.has_no_space(&self.fill.key) {
            self.fills.no_space.insert(self.fill.key.clone(), ());
        }
        tracing::warn!(digest = %self.fill.key.digest, total = feed.total(), reason, "cache bypassed");
        let (total, from) = (feed.total(), feed.served_from());
        let feed = Some(feed).filter(|feed| feed.position() == 0);
        self.fill.open(Ok(OpenedFill::Uncached { total, from, feed: Arc::new(Mutex::new(feed)) }));
    }

    /// Releases the tail to the readers, then publishes the file if this node owns the blob.
    async fn publish(&self, draft: Draft) {
        if self.fill.role() == Role::Client {
            let digest = self.fill.key.digest.clone();
            self.on_disk(move |large| large.relay(draft, &digest)).await;
            return self.fill.end(Phase::Verified);
        }
        self.fills.store.large.announce(&draft, &self.fill.key.digest);
        self.fill.end(Phase::Verified);
        let (large, digest) = (self.fills.store.large.clone(), self.fill.key.digest.clone());
        let published = tokio::task::spawn_blocking(move || large.publish(draft, &digest)).await;
        if let Ok(Err(error)) = published {
            tracing::warn!(digest = %self.fill.key.digest, %error, "blob not cached");
        }
    }

    /// Hashes a file that may be corrupt. Blocks on the disk.
    pub(super) fn prove(&self, blob: &Arc<Blob>) {
        self.fill.open(Ok(OpenedFill::Growing { blob: blob.clone(), from: ServedFrom::Disk }));
        let digest = &self.fill.key.digest;
        if write::hash_file(self.fill, blob) {
            self.fills.store.large.prove(digest, blob);
            self.fill.end(Phase::Verified);
        } else {
            // After the withdrawal no new reader gets any byte, so the readers until now are all that exist.
            self.fill.withdraw();
            let seen = if self.fill.readers.had_readers() { Exposure::Maybe } else { Exposure::Never };
            self.fills.drop_corrupt(digest, blob, seen);
        }
    }
}

/// Requests the first range that is both wanted and missing.
async fn first_range(
    sources: Arc<dyn FillSources>,
    partial: Option<&Partial>,
    from: u64,
) -> Result<SpanStream, SourceError> {
    let first = match partial {
        Some(partial) => range_plan::first_range(partial.draft.blob.len, &partial.written, from),
        None => Span { start: from, end: from.saturating_add(MAX_RANGE_BYTES) },
    };
    SpanStream::open_range(sources, first.start, first.end.saturating_sub(first.start)).await
}

/// The result for a blob that a source stated to be small.
enum SmallBlobResult {
    Small(OpenedFill),
    /// This source or the next one states a larger size.
    Larger(Box<SpanStream>),
}

impl Drop for RunningFill<'_> {
    fn drop(&mut self) {
        self.fills.remove(self.fill);
        self.fill.open(Err(SourceError::Unreachable("the download ended".into())));
        self.fill.progress.send_if_modified(|progress| {
            let unfinished = !progress.is_over();
            if unfinished {
                progress.enter(Phase::Failed);
            }
            unfinished
        });
    }
}
