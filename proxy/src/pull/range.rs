//! Bounded ranges of blobs that are not here: straight from the source, while little is asked for.
//!
//! A lazy snapshotter reads 50 KB of a 5 GB blob; that must not fetch 5 GB. But once a good part was
//! asked for, the whole is worth having.

use std::sync::Arc;

use super::blob::{Fetch, span_of};
use super::{BlobRequest, BlobResponse, Pull, PullError};
use crate::fill::SpanStream;
use crate::oci::{RangeRequest, Span};
use crate::peers::RangePurpose;
use crate::role::Role;

/// A blob is filled once this much, or this share, of it was asked for.
const FILL_AFTER_BYTES: u64 = 8 * 1024 * 1024;
const FILL_AFTER_SHARE: u64 = 20;

/// A range waits for a running fill that is at most this far behind it.
const WAIT_FOR_FILL: u64 = 16 * 1024 * 1024;

/// What was asked for of a blob, in bounded ranges.
#[derive(Clone, Copy, Default)]
pub(super) struct RequestedRanges {
    bytes: u64,
    /// Known after the first answer.
    total: Option<u64>,
}

impl Pull {
    /// Passes a bounded range through. None: it is no such range, or a fill serves it.
    pub(super) async fn pass_range(self: &Arc<Self>, request: &BlobRequest) -> Result<Option<BlobResponse>, Fetch> {
        if request.asking.aim == RangePurpose::Whole || self.is_ambiguous(request) {
            return Ok(None);
        }
        let Some(span) = self.bounded(request).await? else { return Ok(None) };
        let (key, role) = (self.fill_key(request), self.role_of(request));
        // A fill in a lower role would have to be promoted, and then download the whole from elsewhere.
        if let Some(fill) = self.fills.running(&key)
            && fill.role() >= role
            && fill.is_near(span.start, WAIT_FOR_FILL)
        {
            return Ok(None);
        }
        let asked = self.asked.get(&request.digest).unwrap_or_default().plus(span.len());
        self.asked.insert(request.digest.clone(), asked);
        if asked.is_much() {
            // An owner's fill brings first what is waited for. Behind another's, what lies far into
            // the blob need not wait for all that comes before.
            if role == Role::Global || span.start < WAIT_FOR_FILL {
                return Ok(None);
            }
            let sources = self.sources(request, RangePurpose::Whole);
            self.fills.join(&key, &request.place, request.asking.client, sources, 0);
        }
        let feed = match SpanStream::open(self.sources(request, RangePurpose::Range), span.start, Some(span.end)).await
        {
            Ok(feed) => feed,
            // Beyond the end: say where that is.
            Err(error) if error.failed_status() == Some(416) => {
                let (total, _) = self.length_elsewhere(request).await?;
                return Err(PullError::Unsatisfiable { total }.into());
            }
            Err(error) => return Err(error.into()),
        };
        if feed.skips() {
            // Its source knows no ranges: then all of it may as well be kept.
            return Ok(None);
        }
        self.asked.insert(request.digest.clone(), RequestedRanges { total: Some(feed.total()), ..asked });
        self.passing(feed, request).map(Some)
    }

    async fn bounded(self: &Arc<Self>, request: &BlobRequest) -> Result<Option<Span>, Fetch> {
        match request.range {
            Some(RangeRequest::Bounded(start, last)) if start <= last => {
                Ok(Some(Span { start, end: last.saturating_add(1) }))
            }
            Some(RangeRequest::Suffix(_)) => {
                let (total, _) = self.length_elsewhere(request).await?;
                Ok(span_of(request.range, total)?)
            }
            _ => Ok(None),
        }
    }
}

impl RequestedRanges {
    fn plus(self, bytes: u64) -> Self {
        Self { bytes: self.bytes.saturating_add(bytes), ..self }
    }

    fn is_much(self) -> bool {
        self.bytes >= FILL_AFTER_BYTES || self.total.is_some_and(|total| self.bytes >= total / FILL_AFTER_SHARE)
    }
}
