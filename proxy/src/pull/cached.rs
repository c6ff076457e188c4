//! What a peer may have of a blob without anybody else being asked.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::blob::{Fetch, span_of};
use super::{BlobRequest, BlobResponse, Pull, PullError};
use crate::oci::{RangeRequest, Span, Spans};
use crate::store::{Found, Verification};
use crate::times::{ALTERNATIVE_TIMEOUT, REACH_TIMEOUT};

/// What may come here is waited for so long; longer what this node has asked for already; and longest what an
/// origin is to send, which waits for nobody.
const MAY_COME: Duration = Duration::from_millis(250);

impl Pull {
    /// What is kept, or comes now. A running fill is followed only where it is ahead: whoever asks can
    /// then never wait for itself, through however many others.
    pub(super) async fn blob_here(
        self: &Arc<Self>,
        request: &BlobRequest,
        kept: Option<Found>,
    ) -> Result<BlobResponse, PullError> {
        match kept {
            Some(Found::Small { object, tier }) => {
                return BlobResponse::of_bytes(&object.bytes, request.range, tier.into());
            }
            Some(Found::Large { blob, proof: Verification::Verified }) => {
                return BlobResponse::of_blob(blob, request.range);
            }
            // It is passed on while it is hashed: nobody else may have it.
            Some(Found::Large { blob, proof: Verification::Unproven }) => {
                self.verify_kept(request, blob);
            }
            None => {}
        }
        let start = match request.range {
            Some(RangeRequest::From(start) | RangeRequest::Bounded(start, _)) => start,
            Some(RangeRequest::Suffix(_)) => return Err(PullError::NotKept),
            None => 0,
        };
        if let Some(fill) = self.fills.running(&self.fill_key(request)) {
            let patience = match fill.is_deputed(start) {
                true => REACH_TIMEOUT,
                false if fill.is_asked_for(start) => ALTERNATIVE_TIMEOUT,
                false => MAY_COME,
            };
            if timeout(patience, fill.reaches(start)).await == Ok(true) {
                return self.follow(&fill, request).await.map_err(Fetch::into_refusal);
            }
        }
        Err(PullError::NotKept)
    }

    /// The bytes of a blob that this node has, by what a peer may know of it.
    pub async fn here(&self, request: &BlobRequest) -> Spans {
        if let Some(Found::Large { blob, proof: Verification::Verified }) = self.kept_blob(request).await {
            return Span::whole(blob.len).into();
        }
        self.fills.running(&self.fill_key(request)).map_or_else(Spans::default, |fill| fill.written())
    }

    /// The range that a request means, as far as that is known before its answer.
    pub fn likely_span(&self, request: &BlobRequest) -> Span {
        span_of(request.range, u64::MAX).ok().flatten().unwrap_or(Span::whole(u64::MAX))
    }
}
