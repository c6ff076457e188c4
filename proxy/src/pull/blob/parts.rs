//! Several ranges of a blob in one response, as lazy snapshotters request them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::{BlobExtent, BlobRequest, BlobResponse, BlobService};
use crate::oci::{Multipart, RangeRequest, RangeSet, Span};
use crate::pull::{Body, PullError};
use crate::source::Broken;
use crate::trace;

/// Parts that are opened ahead of the part that is sent. More: more memory for each request. Fewer: each part waits for
/// its source.
pub(in crate::pull) const PARTS_AHEAD: usize = 4;

/// The body of a multipart response.
pub struct Parts {
    multipart: Multipart,
    responses: BoxStream<'static, Result<BlobResponse, PullError>>,
    /// The part that is being sent.
    current: Option<BlobResponse>,
    next: usize,
    ended: bool,
}

impl BlobService {
    /// `GET blobs/<digest>` with several ranges. Each is served by itself: from the cache, a running fill, or its
    /// source.
    pub async fn parts(self: &Arc<Self>, request: &BlobRequest, ranges: &RangeSet) -> Result<BlobResponse, PullError> {
        // The first response brings the total length, without which no range can be clipped.
        let first = match self.blob(&BlobRequest { range: ranges.iter().next(), ..request.clone() }).await {
            Err(PullError::Unsatisfiable { total }) => match ranges.within(total).first() {
                Some(span) => self.part(request, *span).await?,
                None => return Err(PullError::Unsatisfiable { total }),
            },
            other => other?,
        };
        let (total, from) = (first.total, first.from);
        let spans = ranges.within(total);
        if let [span] = spans[..] {
            return if first.extent == BlobExtent::Part(span) { Ok(first) } else { self.part(request, span).await };
        }
        let multipart = Multipart::new(format!("{:032x}", fastrand::u128(..)), total, spans.clone());
        let opened = Some(first).filter(|first| first.extent == BlobExtent::Part(spans[0]));
        let rest = if opened.is_some() { spans[1..].to_vec() } else { spans };
        let (blobs, request) = (self.clone(), request.clone());
        let opening = stream::iter(rest).map(move |span| {
            let (blobs, request) = (blobs.clone(), request.clone());
            async move {
                // In a task of its own, so that a slow client does not use up the part's deadline.
                let opened = tokio::spawn(trace::carried(async move { blobs.part(&request, span).await }));
                opened.await.unwrap_or_else(|_| {
                    Err(PullError::Unavailable("internal error: the task panicked, see dray's log".into()))
                })
            }
        });
        let responses = stream::iter(opened.map(Ok)).chain(opening.buffered(PARTS_AHEAD)).boxed();
        let extent = BlobExtent::Parts(multipart.clone());
        let parts = Parts { multipart, responses, current: None, next: 0, ended: false };
        Ok(BlobResponse { total, extent, from, body: Body::Parts(Box::new(parts)) })
    }

    async fn part(self: &Arc<Self>, request: &BlobRequest, span: Span) -> Result<BlobResponse, PullError> {
        let range = Some(RangeRequest::Bounded(span.start, span.end - 1));
        self.blob(&BlobRequest { range, ..request.clone() }).await
    }
}

impl Parts {
    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        if let Some(current) = &mut self.current {
            if let Some(piece) = Box::pin(current.body.next()).await? {
                return Ok(Some(piece));
            }
            self.current = None;
        }
        let Some(span) = self.multipart.spans().get(self.next).copied() else {
            let end = (!self.ended).then(|| self.multipart.end().into());
            self.ended = true;
            return Ok(end);
        };
        let response = match self.responses.next().await {
            Some(Ok(response)) => response,
            Some(Err(refusal)) => return Err(Broken(format!("a part of the response failed: {refusal}"))),
            None => return Err(Broken("a part of the response is missing".into())),
        };
        if response.extent != BlobExtent::Part(span) {
            return Err(Broken("the source sent another range than requested".into()));
        }
        self.next += 1;
        self.current = Some(response);
        Ok(Some(self.multipart.head(span).into()))
    }
}
