//! A response with a blob or a part of it.

use std::sync::Arc;

use bytes::Bytes;

use crate::fill::Reader;
use crate::oci::{Multipart, RangeRequest, Span};
use crate::pull::{Body, PullError};
use crate::source::ServedFrom;
use crate::store::{Blob, Tier};

/// A blob or a part of it, ready to be sent.
pub struct BlobResponse {
    pub total: u64,
    pub extent: BlobExtent,
    pub from: ServedFrom,
    pub body: Body,
}

/// Which bytes of a blob a response holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobExtent {
    Whole,
    Part(Span),
    /// Several parts, with the multipart headers between them.
    Parts(Multipart),
}

/// The part of a blob that a range names; None: the whole.
pub(in crate::pull) fn span_of(range: Option<RangeRequest>, total: u64) -> Result<Option<Span>, PullError> {
    range.map(|range| range.within(total)).transpose().map_err(|_| PullError::Unsatisfiable { total })
}

impl From<Option<Span>> for BlobExtent {
    fn from(span: Option<Span>) -> Self {
        span.map_or(Self::Whole, Self::Part)
    }
}

impl From<Tier> for ServedFrom {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Memory => Self::Memory,
            Tier::Disk => Self::Disk,
        }
    }
}

impl BlobResponse {
    /// A part of an object in memory.
    pub fn of_bytes(bytes: &Bytes, range: Option<RangeRequest>, from: ServedFrom) -> Result<Self, PullError> {
        let total = bytes.len() as u64;
        let span = span_of(range, total)?;
        let Span { start, end } = span.unwrap_or(Span::whole(total));
        // Both lie within the bytes, so they fit.
        let part = bytes.slice(usize::try_from(start).unwrap_or(0)..usize::try_from(end).unwrap_or(0));
        Ok(Self { total, extent: span.into(), from, body: Body::Memory(Some(part)) })
    }

    pub(in crate::pull) fn of_blob(blob: Arc<Blob>, range: Option<RangeRequest>) -> Result<Self, PullError> {
        let total = blob.len;
        let span = span_of(range, total)?;
        let reader = Reader::of_blob(blob, span.unwrap_or(Span::whole(total)));
        Ok(Self { total, extent: span.into(), from: ServedFrom::Disk, body: Body::File(reader) })
    }
}
