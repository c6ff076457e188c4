//! One fill from its first question to the file under its name.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::timeout;

use super::engine::{DownloadEnd, Engine};
use super::fills::{Exposure, FillPermit};
use super::progress::Phase;
use super::range_plan::{LARGEST_RANGE, RangePlan};
use super::span_stream::{ConnectionMode, FillSources, SpanStream, VerifiedContent};
use super::write::{self, WriteOutcome};
use super::{Fill, Fills, OpenedFill};
use crate::oci::{BLOB_MEDIA_TYPE, Span, Spans};
use crate::provenance::Provenance;
use crate::role::Role;
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Draft, Found, Large, NoSpace, Partial, SMALL_BYTES, SmallKind, SmallObject, Verification};
use crate::times::{REACH_TIMEOUT, UPSTREAM_TIMEOUT};

/// A fill while it runs; dropping it, also by a panic, takes it off the list and wakes its readers.
pub(super) struct RunningFill<'a> {
    pub(super) fills: &'a Fills,
    pub(super) fill: &'a Fill,
    pub(super) _turn: FillPermit,
}

impl RunningFill<'_> {
    /// Fetches a blob; whoever asks first wants to read from `from`.
    pub(super) async fn fill_from(&self, sources: Arc<dyn FillSources>, from: u64) {
        // An earlier fill may have ended between our request's look-up and our start. What came from
        // another registry was not given to that request either.
        let kept = self.fills.store.find(&self.fill.key.digest, SmallKind::Blob).await;
        let from_here = |found: &Found| found.provenance().is_some_and(|known| self.fill.is_of_same(known));
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
        // What proved wrong may have been put together from a good and a bad source: then all of it
        // comes from one.
        let distrusted = self.fills.is_distrusted(&self.fill.key.content());
        // Another one's beginning is nothing that everybody here may have.
        let fits = |known: &Provenance| self.fill.is_of_same(known);
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
            // The owner will not let us go on with what we have: it proved wrong there.
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
                self.keep_again(partial).await;
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

    /// Takes a small object whole, and verifies it before anybody sees it.
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
            match self.small_of(feed).await {
                Err(SourceError::Malformed(_)) if of_peer && !was_wrong => {
                    was_wrong = true;
                    sources.mismatched();
                    // Now it is distrusted, and comes from the origin.
                }
                Err(SourceError::TimedOut) if of_peer => {
                    tracing::info!(digest = %self.fill.key.digest, "a peer sends nothing, going on with another");
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

    async fn small_of(&self, mut feed: SpanStream) -> Result<OpenedFill, SourceError> {
        let total = usize::try_from(feed.total()).unwrap_or(usize::MAX);
        let _held = self.fills.memory.of_upstreams.wait(&self.fill.key.registry, total).await;
        let mut bytes = bytes::BytesMut::new();
        // Where a peer sends no more than the beginning there is time to ask somebody else.
        let patience = if feed.served_from() == ServedFrom::Peer { REACH_TIMEOUT } else { UPSTREAM_TIMEOUT };
        while let Some(piece) = timeout(patience, feed.next()).await.unwrap_or(Err(SourceError::TimedOut))? {
            bytes.extend_from_slice(&piece);
        }
        let (bytes, place) = (bytes.freeze(), &self.fill.place);
        if !self.fill.key.digest.matches(&bytes) {
            self.fills.distrust(self.fill.key.content());
            return Err(SourceError::Malformed("the bytes do not match their digest".into()));
        }
        let provenance = Arc::new(place.provenance());
        let object = SmallObject::new(BLOB_MEDIA_TYPE, provenance, &bytes);
        self.fills.store.small.insert(&self.fill.key.digest, SmallKind::Blob, object.clone()).await;
        Ok(OpenedFill::Small { object, from: feed.served_from() })
    }

    async fn large(&self, feed: SpanStream, sources: Arc<dyn FillSources>, partial: Option<Partial>) {
        let (total, from) = (feed.total(), feed.served_from());
        let Some(permit) = self.fills.large.take(&self.fill.key.registry, 1) else {
            self.keep_again(partial).await;
            return self.pass(feed, "busy");
        };
        if self.fills.disk_failed.contains_key(&()) {
            self.keep_again(partial).await;
            return self.pass(feed, "disk");
        }
        // Its space was used up lately, half-way: it would be again.
        if self.fills.has_no_room(&self.fill.key) {
            self.keep_again(partial).await;
            return self.pass(feed, "no_space");
        }
        // A blob of another length is another blob: its partial is dropped.
        let resumed = partial.filter(|partial| partial.draft.blob.len == total);
        let (draft, written) = match resumed {
            Some(Partial { draft, written }) => (draft, written),
            None => match self.draft(total).await {
                Ok(draft) => (draft, Spans::default()),
                Err(NoSpace) => return self.pass(feed, "no_space"),
            },
        };
        if !written.is_empty() {
            tracing::info!(digest = %self.fill.key.digest, bytes = written.len(), total, "going on with a partial");
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
        let (large, provenance) = (self.fills.store.large.clone(), self.fill.place.provenance());
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
                self.fill.disown();
                self.on_disk(|_| drop(draft)).await;
            }
            // The owner will not let us go on: what we have from it proved wrong there.
            (WriteOutcome::Part(spans), DownloadEnd::Broken(SourceError::NotFound(_)))
                if self.fill.role() != Role::Global && !spans.is_empty() =>
            {
                self.fills.distrust(self.fill.key.content());
                self.fill.disown();
                self.on_disk(|_| drop(draft)).await;
            }
            (WriteOutcome::Part(spans), ended) => {
                match ended {
                    DownloadEnd::Broken(error) => tracing::warn!(%digest, %error, "a fill failed"),
                    _ => tracing::info!(%digest, bytes = spans.len(), "nobody waits for a blob any more"),
                }
                self.keep(draft, spans).await;
                // What was released stays readable, so that a resume loses nothing.
                self.fill.end(Phase::Failed);
            }
            // Whoever goes on gets it uncached.
            (WriteOutcome::NoSpace, _) => {
                tracing::warn!(%digest, "the space for a blob is used up before its end");
                self.fills.no_room.insert(self.fill.key.clone(), ());
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

    async fn keep_again(&self, partial: Option<Partial>) {
        if let Some(Partial { draft, written }) = partial {
            self.keep(draft, written).await;
        }
    }

    async fn keep(&self, draft: Draft, written: Spans) {
        let (digest, registry) = (self.fill.key.digest.clone(), self.fill.key.registry.clone());
        self.on_disk(move |large| large.keep_partial(&digest, &registry, draft, written)).await;
    }

    /// Does what blocks on the disk, such as freeing the space of a large file.
    async fn on_disk(&self, work: impl FnOnce(&Large) + Send + 'static) {
        let large = self.fills.store.large.clone();
        // It fails only where the process ends.
        let _ = tokio::task::spawn_blocking(move || work(&large)).await;
    }

    /// Leaves it to each reader to fetch for itself.
    fn pass(&self, feed: SpanStream, reason: &str) {
        self.fills.metrics.uncached.with_label_values(&[reason]).inc();
        // Not again and again: then it is tried once more.
        if !self.fills.has_no_room(&self.fill.key) {
            self.fills.no_room.insert(self.fill.key.clone(), ());
        }
        tracing::warn!(digest = %self.fill.key.digest, total = feed.total(), reason, "passing through uncached");
        let (total, from) = (feed.total(), feed.served_from());
        let feed = Some(feed).filter(|feed| feed.position() == 0);
        self.fill.open(Ok(OpenedFill::Uncached { total, from, feed: Arc::new(Mutex::new(feed)) }));
    }

    /// Lets the readers have the tail, then gives the file its name if this node owns the blob.
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
            tracing::warn!(digest = %self.fill.key.digest, %error, "a blob could not be kept");
        }
    }

    /// Hashes a file that may have been damaged. Blocks on the disk.
    pub(super) fn prove(&self, blob: &Arc<Blob>) {
        self.fill.open(Ok(OpenedFill::Growing { blob: blob.clone(), from: ServedFrom::Disk }));
        let digest = &self.fill.key.digest;
        if write::hash_file(self.fill, blob) {
            self.fills.store.large.prove(digest, blob);
            self.fill.end(Phase::Verified);
        } else {
            // Nobody can read it any more: now it is known who did.
            self.fill.disown();
            let seen = if self.fill.audience.had_readers() { Exposure::Maybe } else { Exposure::Never };
            self.fills.damaged(digest, blob, seen);
        }
    }
}

/// Asks for the first range that is wanted and missing.
async fn first_range(
    sources: Arc<dyn FillSources>,
    partial: Option<&Partial>,
    from: u64,
) -> Result<SpanStream, SourceError> {
    let first = match partial {
        Some(partial) => {
            let total = partial.draft.blob.len;
            RangePlan::new(total, partial.written.clone()).next(0, &[from], 1).unwrap_or(Span::whole(total))
        }
        None => Span { start: from, end: from.saturating_add(LARGEST_RANGE) },
    };
    SpanStream::open_range(sources, first.start, first.end.saturating_sub(first.start)).await
}

/// What became of a blob that a source said to be small.
enum SmallBlobResult {
    Small(OpenedFill),
    /// It lied, or the next one does.
    Larger(Box<SpanStream>),
}

impl Drop for RunningFill<'_> {
    fn drop(&mut self) {
        self.fills.leave(self.fill);
        self.fill.open(Err(SourceError::Unreachable("the fill ended".into())));
        self.fill.progress.send_if_modified(|progress| {
            let unfinished = !progress.is_over();
            if unfinished {
                progress.enter(Phase::Failed);
            }
            unfinished
        });
    }
}
