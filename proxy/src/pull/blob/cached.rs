//! Serves a peer from this node's cache and running fills, without a request to another node or an upstream.

use std::time::Duration;

use tokio::time::timeout;

use super::{BlobError, BlobRequest, BlobResponse, BlobService, span_of};
use crate::oci::{RangeRequest, Span, Spans};
use crate::pull::PullError;
use crate::store::{Found, Verification};
use crate::times::{ALTERNATIVE_TIMEOUT, REACH_TIMEOUT};

/// How long a peer's request waits for bytes that this node has not requested yet. It waits `ALTERNATIVE_TIMEOUT` for
/// requested bytes, and `REACH_TIMEOUT` for those that this node fetches from the upstream in the owner's stead.
/// Longer: the peer's next source is tried later. Shorter: more requests fail for bytes that are about to arrive.
const UNREQUESTED_TIMEOUT: Duration = Duration::from_millis(250);

impl BlobService {
    /// Serves from the cache or a running fill. A fill is followed only after it has reached the range, so that peers
    /// never wait for each other in a circle.
    pub(super) async fn blob_from_node(
        &self,
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
            // It is served while it is hashed: it may be the only copy.
            Some(Found::Large { blob, proof: Verification::Unverified }) => {
                self.verify_cached(request, blob);
            }
            None => {}
        }
        let start = match request.range {
            Some(RangeRequest::From(start) | RangeRequest::Bounded(start, _)) => start,
            Some(RangeRequest::Suffix(_)) => return Err(PullError::NotCached),
            None => 0,
        };
        if let Some(fill) = self.fills().running(&self.fill_key(request)) {
            let time_limit = match fill.is_deputed(start) {
                true => REACH_TIMEOUT,
                false if fill.is_requested(start) => ALTERNATIVE_TIMEOUT,
                false => UNREQUESTED_TIMEOUT,
            };
            if timeout(time_limit, fill.reaches(start)).await == Ok(true) {
                return self.follow(&fill, request).await.map_err(BlobError::into_pull_error);
            }
        }
        Err(PullError::NotCached)
    }

    /// The bytes of a blob on this node, as far as the peer may know of them.
    pub async fn here(&self, request: &BlobRequest) -> Spans {
        if let Some(Found::Large { blob, proof: Verification::Verified }) = self.content.blob(request).await {
            return Span::whole(blob.len).into();
        }
        self.fills().running(&self.fill_key(request)).map_or_else(Spans::default, |fill| fill.written())
    }

    /// The requested range, as far as it is known before the total length.
    pub fn likely_span(&self, request: &BlobRequest) -> Span {
        span_of(request.range, u64::MAX).ok().flatten().unwrap_or(Span::whole(u64::MAX))
    }
}
