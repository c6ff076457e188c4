//! Several ranges of a blob in one answer, as lazy snapshotters ask for them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

use super::{BlobAnswer, BlobRequest, Body, Extent, Pull, Refusal};
use crate::oci::{Multipart, RangeRequest, RangeSet, Span};
use crate::source::Broken;

/// Parts that are opened before their turn.
const AHEAD: usize = 4;

/// The parts of an answer, one after the other.
pub struct Parts {
    multipart: Multipart,
    answers: BoxStream<'static, Result<BlobAnswer, Refusal>>,
    /// The part that is being sent.
    current: Option<BlobAnswer>,
    next: usize,
    ended: bool,
}

impl Pull {
    /// `GET blobs/<digest>` with several ranges. Each is served on its own: kept, from a running
    /// fill, or from its source.
    pub async fn blob_parts(self: &Arc<Self>, request: &BlobRequest, ranges: &RangeSet) -> Result<BlobAnswer, Refusal> {
        // The first one that can be served tells the length, without which none can be clipped.
        let mut first = None;
        let mut unsatisfiable = None;
        for range in ranges.iter() {
            match self.blob(&BlobRequest { range: Some(range), ..request.clone() }).await {
                Ok(answer) => {
                    first = Some(answer);
                    break;
                }
                Err(refusal @ Refusal::Unsatisfiable { .. }) => unsatisfiable = Some(refusal),
                Err(refusal) => return Err(refusal),
            }
        }
        let Some(first) = first else {
            let message = "no range asks for anything".to_owned();
            return Err(unsatisfiable.unwrap_or(Refusal::BadOrigin(message)));
        };
        let (total, from) = (first.total, first.from);
        let spans = ranges.within(total);
        if let [span] = spans[..] {
            return if first.extent == Extent::Part(span) { Ok(first) } else { self.part(request, span).await };
        }
        let multipart = Multipart::new(format!("{:032x}", fastrand::u128(..)), total, spans.clone());
        let opened = Some(first).filter(|first| first.extent == Extent::Part(spans[0]));
        let rest = if opened.is_some() { spans[1..].to_vec() } else { spans };
        let (pull, request) = (self.clone(), request.clone());
        let opening = stream::iter(rest).map(move |span| {
            let (pull, request) = (pull.clone(), request.clone());
            async move { pull.part(&request, span).await }
        });
        let answers = stream::iter(opened.map(Ok)).chain(opening.buffered(AHEAD)).boxed();
        let extent = Extent::Parts(multipart.clone());
        let parts = Parts { multipart, answers, current: None, next: 0, ended: false };
        Ok(BlobAnswer { total, extent, from, body: Body::Parts(Box::new(parts)) })
    }

    async fn part(self: &Arc<Self>, request: &BlobRequest, span: Span) -> Result<BlobAnswer, Refusal> {
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
            let end = (!self.ended).then(|| self.multipart.end());
            self.ended = true;
            return Ok(end);
        };
        let answer = match self.answers.next().await {
            Some(Ok(answer)) => answer,
            Some(Err(refusal)) => return Err(Broken(format!("a part was refused: {refusal:?}"))),
            None => return Err(Broken("a part is missing".into())),
        };
        if answer.extent != Extent::Part(span) {
            return Err(Broken("another part than asked for".into()));
        }
        self.next += 1;
        self.current = Some(answer);
        Ok(Some(self.multipart.head(span)))
    }
}
