//! Bounded ranges of blobs that are not cached: passed through from the source while few bytes are requested.
//!
//! A lazy snapshotter reads 50 KB of a 5 GB blob, which must not download 5 GB. Once a good part of the blob was
//! requested, dray downloads and caches the whole.

use moka::Entry;

use super::{BlobError, BlobRequest, BlobResponse, BlobService, span_of};
use crate::fill::SpanStream;
use crate::oci::{Digest, RangeRequest, Span};
use crate::peers::RangePurpose;
use crate::pull::PullError;
use crate::role::Role;
use crate::times::OBSERVATION_TTL;

/// A blob is downloaded whole once this many bytes, or one in this many bytes of it, were requested. Larger: more
/// ranges are passed through and requested again. Smaller: more is downloaded than clients need.
const FILL_AFTER_BYTES: u64 = 8 * 1024 * 1024;
const FILL_AFTER_SHARE: u64 = 20;

/// How far behind a range a running fill may be for the range to wait for it, in bytes. Larger: ranges wait longer.
/// Smaller: more bytes are downloaded twice.
const MAX_FILL_DISTANCE: u64 = 16 * 1024 * 1024;

/// The bytes that were requested in bounded ranges, by blob.
pub(super) struct RequestedRanges(moka::sync::Cache<Digest, RequestedBytes>);

/// How much of a blob was requested in bounded ranges.
#[derive(Clone, Copy, Default)]
struct RequestedBytes {
    bytes: u64,
    /// Known after the first response.
    total: Option<u64>,
}

/// Blobs whose ranges are counted. Fewer: a blob that is read slowly is never downloaded whole.
const MAX_BLOBS: u64 = 50_000;

impl BlobService {
    /// Passes a bounded range through. None: it is not a bounded range, or a fill serves it.
    pub(super) async fn pass_range(&self, request: &BlobRequest) -> Result<Option<BlobResponse>, BlobError> {
        if request.request_context.range_purpose == RangePurpose::Whole || self.is_ambiguous(request) {
            return Ok(None);
        }
        let Some(span) = self.bounded(request).await? else { return Ok(None) };
        let (key, role) = (self.fill_key(request), self.role_of(request));
        // A fill in a lower role would have to be promoted, and then download the whole from elsewhere.
        if let Some(fill) = self.fills().running(&key)
            && fill.role() >= role
            && fill.is_near(span.start, MAX_FILL_DISTANCE)
        {
            return Ok(None);
        }
        let asked = self.requested_ranges.add(&request.digest, span.len());
        if asked.warrants_fill() {
            // An owner's fill downloads first what readers wait for. In another role a far range is passed through, so
            // that it does not wait for all bytes before it.
            if role == Role::Global || span.start < MAX_FILL_DISTANCE {
                return Ok(None);
            }
            let sources = self.sources(request, RangePurpose::Whole);
            self.fills().join(&key, &request.repo_ref, request.request_context.client, sources, 0);
        }
        let feed = match SpanStream::open(self.sources(request, RangePurpose::Range), span.start, Some(span.end)).await
        {
            Ok(feed) => feed,
            // Beyond the end: a 416 names the total length.
            Err(error) if error.failed_status() == Some(416) => {
                let (total, _) = self.lengths.of_sources(request).await?;
                return Err(PullError::Unsatisfiable { total }.into());
            }
            Err(error) => return Err(error.into()),
        };
        if feed.skips() {
            // The source ignores ranges and sends the whole blob, which is better cached.
            return Ok(None);
        }
        self.requested_ranges.set_total(&request.digest, feed.total());
        self.passing(feed, request).map(Some)
    }

    async fn bounded(&self, request: &BlobRequest) -> Result<Option<Span>, BlobError> {
        match request.range {
            Some(RangeRequest::Bounded(start, last)) if start <= last => {
                Ok(Some(Span { start, end: last.saturating_add(1) }))
            }
            Some(RangeRequest::Suffix(_)) => {
                let (total, _) = self.lengths.of_sources(request).await?;
                Ok(span_of(request.range, total)?)
            }
            _ => Ok(None),
        }
    }
}

impl RequestedRanges {
    pub(super) fn new() -> Self {
        Self(moka::sync::Cache::builder().max_capacity(MAX_BLOBS).time_to_idle(OBSERVATION_TTL).build())
    }

    fn add(&self, digest: &Digest, bytes: u64) -> RequestedBytes {
        let counted = self
            .0
            .entry_by_ref(digest)
            .and_upsert_with(|known| known.map(Entry::into_value).unwrap_or_default().with_bytes(bytes));
        counted.into_value()
    }

    fn set_total(&self, digest: &Digest, total: u64) {
        self.0.entry_by_ref(digest).and_upsert_with(|known| {
            let known = known.map(Entry::into_value).unwrap_or_default();
            RequestedBytes { total: Some(total), ..known }
        });
    }
}

impl RequestedBytes {
    fn with_bytes(self, bytes: u64) -> Self {
        Self { bytes: self.bytes.saturating_add(bytes), ..self }
    }

    fn warrants_fill(self) -> bool {
        self.bytes >= FILL_AFTER_BYTES || self.total.is_some_and(|total| self.bytes >= total / FILL_AFTER_SHARE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parallel_ranges_are_all_counted() {
        let (ranges, digest) = (RequestedRanges::new(), Digest::of(b"x"));
        assert_eq!(ranges.add(&digest, 10).bytes, 10);
        let second = ranges.add(&digest, 5);
        ranges.set_total(&digest, 100);
        let third = ranges.add(&digest, 1);
        assert_eq!((second.bytes, third.bytes, third.total), (15, 16, Some(100)));
    }

    #[test]
    fn blob_is_downloaded_whole_once_a_good_part_was_requested() {
        let requested = |bytes, total| RequestedBytes { bytes, total }.warrants_fill();
        let (large, small) = (Some(5 << 30), Some(20_000));
        assert!(!requested(FILL_AFTER_BYTES - 1, large) && requested(FILL_AFTER_BYTES, large));
        assert!(!requested(999, small) && requested(1000, small));
        assert!(!requested(1000, None), "the length is not known yet");
    }
}
