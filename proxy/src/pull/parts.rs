//! Several ranges of a blob in one answer, as lazy snapshotters ask for them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::{BlobExtent, BlobRequest, BlobResponse, Body, Pull, PullError};
use crate::oci::{Multipart, RangeRequest, RangeSet, Span};
use crate::source::Broken;
use crate::trace;

/// Parts that are opened before their turn.
pub(super) const AHEAD: usize = 4;

/// The parts of an answer, one after the other.
pub struct Parts {
    multipart: Multipart,
    answers: BoxStream<'static, Result<BlobResponse, PullError>>,
    /// The part that is being sent.
    current: Option<BlobResponse>,
    next: usize,
    ended: bool,
}

impl Pull {
    /// `GET blobs/<digest>` with several ranges. Each is served on its own: kept, from a running
    /// fill, or from its source.
    pub async fn blob_parts(
        self: &Arc<Self>,
        request: &BlobRequest,
        ranges: &RangeSet,
    ) -> Result<BlobResponse, PullError> {
        // Some answer tells the length, without which no range can be clipped.
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
        let (pull, request) = (self.clone(), request.clone());
        let opening = stream::iter(rest).map(move |span| {
            let (pull, request) = (pull.clone(), request.clone());
            async move {
                // On its own, so that a slow client does not use up its deadline.
                let opened = tokio::spawn(trace::carried(async move { pull.part(&request, span).await }));
                opened.await.unwrap_or_else(|_| Err(PullError::Unavailable("a part was not opened".into())))
            }
        });
        let answers = stream::iter(opened.map(Ok)).chain(opening.buffered(AHEAD)).boxed();
        let extent = BlobExtent::Parts(multipart.clone());
        let parts = Parts { multipart, answers, current: None, next: 0, ended: false };
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
        let answer = match self.answers.next().await {
            Some(Ok(answer)) => answer,
            Some(Err(refusal)) => return Err(Broken(format!("a part was refused: {refusal:?}"))),
            None => return Err(Broken("a part is missing".into())),
        };
        if answer.extent != BlobExtent::Part(span) {
            return Err(Broken("another part than asked for".into()));
        }
        self.next += 1;
        self.current = Some(answer);
        Ok(Some(self.multipart.head(span).into()))
    }
}
