//! Bodies on their way in from an upstream or a peer, and why a source sends none.

mod upstream_error;

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, HeaderValue};

pub use self::upstream_error::UpstreamError;
use crate::oci::{ContentRange, RangeRequest, Span};
use crate::times::{STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// A blob's body as an origin or a peer sends it.
pub struct Incoming {
    /// Length of the whole blob, in bytes.
    pub total: u64,
    /// The part of it that comes.
    pub span: Span,
    /// How long to wait for the next piece.
    pub stall_timeout: Duration,
    body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// What a connection has to bring in a time.
#[derive(Clone, Copy, Debug)]
pub struct Floor {
    pub bytes: u64,
    pub window: Duration,
}

/// How fast a connection is, counting only the time spent waiting for it.
#[derive(Default)]
pub struct Speed {
    waited: Duration,
    bytes: u64,
}

/// Which part of a blob to ask a source for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    From(u64),
    Span(Span),
}

/// Where the bytes of an answer came from: the same words in the response, the log and the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedFrom {
    Memory,
    Disk,
    Peer,
    Upstream,
    /// An expired tag, because the origin could not be asked.
    Stale,
}

/// A body ended early, or with an error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the body broke: {0}")]
pub struct Broken(pub String);

/// Why a source gives nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// 404 or 410.
    #[error("the upstream does not have it: {0}")]
    NotFound(UpstreamError),
    /// 401 or 403.
    #[error("the upstream denies access: {0}")]
    Denied(UpstreamError),
    #[error("it is not kept here")]
    NotKept,
    #[error("the origin limits its requests")]
    Limited {
        /// How much later it may be asked again, where it says so.
        again: Option<Duration>,
    },
    #[error("too many fetches at once")]
    Busy,
    /// The source of a rule's credentials fails, which says nothing of the origin.
    #[error("no credentials: {0}")]
    NoCredentials(String),
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// A connection broke before a response came, which may be about this request only: filters do so for some paths.
    #[error("the connection broke: {0}")]
    Interrupted(String),
    #[error("no answer in time")]
    TimedOut,
    /// Any other status.
    #[error("the upstream answered {0}")]
    Failed(UpstreamError),
    #[error("not followed: {0}")]
    Guarded(String),
    #[error("the origin's answer is wrong: {0}")]
    Malformed(String),
}

impl Incoming {
    pub fn new(
        span: Span,
        total: u64,
        body: impl futures_util::Stream<Item = Result<Bytes, Broken>> + Send + 'static,
    ) -> Self {
        Self { total, span, stall_timeout: STALL_TIMEOUT, body: body.boxed() }
    }

    /// A body that cannot be gone on with elsewhere: its source would begin again at the start, so a pause is waited out.
    pub fn not_resumable(self) -> Self {
        Self { stall_timeout: UPSTREAM_TIMEOUT, ..self }
    }

    /// Does something when the last byte has come.
    pub fn followed_by(self, done: impl FnOnce() + Send + 'static) -> Self {
        let (mut left, mut done) = (self.span.len(), Some(done));
        let counted = self.body.inspect(move |piece| {
            left = left.saturating_sub(piece.as_ref().map_or(0, |piece| piece.len() as u64));
            if left == 0 {
                done.take().into_iter().for_each(|done| done());
            }
        });
        Self { body: counted.boxed(), ..self }
    }

    /// The same until this event. A connection that is no longer wanted breaks then.
    pub fn until(self, event: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { body: self.body.take_until(event).boxed(), ..self }
    }

    /// The next piece; None at the end of the body.
    pub async fn next(&mut self) -> Option<Result<Bytes, Broken>> {
        self.body.next().await
    }
}

impl Speed {
    /// Counts a piece. False: the window is over and brought too little.
    pub fn keeps_up(&mut self, floor: Floor, waited: Duration, len: usize) -> bool {
        self.waited += waited;
        self.bytes += len as u64;
        if self.waited < floor.window {
            return true;
        }
        std::mem::take(self).bytes >= floor.bytes
    }
}

impl Part {
    pub fn new(from: u64, end: Option<u64>) -> Self {
        end.map_or(Self::From(from), |end| Self::Span(Span { start: from, end }))
    }

    /// The same as a client would ask for it; None: the whole blob.
    pub fn request(self) -> Option<RangeRequest> {
        match self {
            Self::From(0) => None,
            Self::From(start) => Some(RangeRequest::From(start)),
            Self::Span(span) => Some(RangeRequest::Bounded(span.start, span.end - 1)),
        }
    }

    /// Its first byte.
    pub fn start(self) -> u64 {
        match self {
            Self::From(start) => start,
            Self::Span(span) => span.start,
        }
    }

    /// The value of the `Range` header; None: the whole blob.
    pub fn header(self) -> Option<HeaderValue> {
        let text = match self {
            Self::From(0) => return None,
            Self::From(start) => format!("bytes={start}-"),
            Self::Span(span) => format!("bytes={}-{}", span.start, span.end - 1),
        };
        HeaderValue::from_str(&text).ok()
    }

    /// Which part an answer of status 200 or 206 brings and how long the whole blob is. A 206 is
    /// believed only if it is exactly what was asked for; a 200 brings everything. `known` is the blob's length by
    /// a manifest, for a 200 that does not tell it.
    pub fn brought(self, status: u16, headers: &HeaderMap, known: Option<u64>) -> Result<(Span, u64), SourceError> {
        let malformed = |what: &str| SourceError::Malformed(what.to_owned());
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let length: Option<u64> = text(CONTENT_LENGTH).and_then(|text| text.trim().parse().ok());
        if status != 206 {
            return length
                .or(known)
                .map(|total| (Span::whole(total), total))
                // Another node may have served the manifest that tells it.
                .ok_or_else(|| SourceError::Unreachable("the upstream does not tell the length of the blob".into()));
        }
        let range: ContentRange = text(CONTENT_RANGE)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| malformed("206 without a valid Content-Range"))?;
        let asked = match self {
            Self::From(start) => Span { start, end: range.total },
            Self::Span(span) => Span { start: span.start, end: span.end.min(range.total) },
        };
        if range.span != asked || length.is_some_and(|length| length != asked.len()) {
            return Err(malformed("206 for another range than asked"));
        }
        Ok((range.span, range.total))
    }
}

impl ServedFrom {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Peer => "peer",
            Self::Upstream => "origin",
            Self::Stale => "stale",
        }
    }
}

impl SourceError {
    /// Nothing has it, as far as dray knows without an upstream's word.
    pub fn not_found() -> Self {
        Self::NotFound(UpstreamError::of_status(404))
    }

    /// Access is denied, without a response that says so.
    pub fn denied() -> Self {
        Self::Denied(UpstreamError::of_status(403))
    }

    /// A response of this status, whatever its body.
    pub fn failed(status: u16) -> Self {
        Self::Failed(UpstreamError::of_status(status))
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Denied(_))
    }

    /// Bytes of an upstream's error body that it holds.
    pub fn body_len(&self) -> usize {
        match self {
            Self::NotFound(error) | Self::Denied(error) | Self::Failed(error) => {
                error.json().map_or(0, |json| json.len())
            }
            _ => 0,
        }
    }

    /// The status of a response that is neither "not found" nor "denied".
    pub fn failed_status(&self) -> Option<u16> {
        if let Self::Failed(error) = self { Some(error.status) } else { None }
    }

    /// The outcome's name in logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "not_found",
            Self::Denied(_) => "denied",
            Self::NotKept => "not_kept",
            Self::Limited { .. } => "limited",
            Self::Busy => "busy",
            Self::NoCredentials(_) => "no_credentials",
            Self::Unreachable(_) => "unreachable",
            Self::Interrupted(_) => "interrupted",
            Self::TimedOut => "timed_out",
            Self::Failed(_) => "failed",
            Self::Guarded(_) => "guarded",
            Self::Malformed(_) => "malformed",
        }
    }

    /// Whether the same question may well be answered in a moment.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Interrupted(_))
            || matches!(self.failed_status(), Some(500 | 502 | 503 | 504))
    }

    /// Whether this is about the origin's health, so that an older answer is better than none.
    /// "Not found" and "denied" are answers.
    pub fn is_outage(&self) -> bool {
        !matches!(self, Self::NotFound(_) | Self::Denied(_))
    }

    /// Whether waiting may help: the origin was not there, or said "later".
    pub fn is_passing_outage(&self) -> bool {
        match self {
            Self::Unreachable(_)
            | Self::Interrupted(_)
            | Self::TimedOut
            | Self::Limited { .. }
            | Self::Busy
            | Self::NoCredentials(_) => true,
            Self::Failed(error) => error.status >= 500,
            _ => false,
        }
    }

    /// Whether it may come from asking for a range: the same question without one may be answered.
    pub fn is_about_ranges(&self) -> bool {
        matches!(self, Self::Malformed(_)) || matches!(self.failed_status(), Some(400..=499 | 501))
    }

    /// Of two upstreams' errors the one that says more: an outage of one means that the other's
    /// "not found" is not the whole truth.
    pub fn severer(self, other: Self) -> Self {
        let rank = |error: &Self| match error {
            Self::NotFound(_) | Self::NotKept => 0,
            Self::Denied(_) => 1,
            Self::Guarded(_) => 2,
            Self::Malformed(_) => 3,
            Self::Failed(_) => 4,
            Self::NoCredentials(_) => 5,
            Self::TimedOut => 6,
            Self::Unreachable(_) | Self::Interrupted(_) => 7,
            Self::Limited { .. } => 8,
            Self::Busy => 9,
        };
        if rank(&other) > rank(&self) { other } else { self }
    }
}

/// An error and its causes. What an I/O error wraps is one of them, which `source` passes over.
pub fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| {
        match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        }
    })
}

/// What an error comes from. The layers of an HTTP client around it say nothing more.
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought(part: Part, status: u16, headers: &[(&'static str, &str)]) -> Option<(u64, u64, u64)> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        part.brought(status, &map, None).ok().map(|(span, total)| (span.start, span.end, total))
    }

    #[test]
    fn a_trickle_is_too_slow() {
        let (second, floor) = (Duration::from_secs(1), Floor { bytes: 64 * 1024, window: Duration::from_secs(30) });
        let mut speed = Speed::default();
        assert!((0..29).all(|_| speed.keeps_up(floor, second, 1)));
        assert!(!speed.keeps_up(floor, second, 1));
        assert!((0..100).all(|_| speed.keeps_up(floor, second, 4096)));
    }

    #[test]
    fn only_the_exact_range_is_believed() {
        let span = Part::Span(Span { start: 5, end: 10 });
        let range = |value| [("content-range", value)];
        assert_eq!(brought(Part::From(5), 206, &range("bytes 5-9/10")), Some((5, 10, 10)));
        assert_eq!(brought(Part::From(5), 206, &range("bytes 5-8/10")), None, "not to the end");
        assert_eq!(brought(Part::From(5), 206, &range("bytes 4-9/10")), None);
        assert_eq!(brought(span, 206, &range("bytes 5-9/100")), Some((5, 10, 100)));
        assert_eq!(brought(span, 206, &range("bytes 5-7/8")), Some((5, 8, 8)), "clipped");
        assert_eq!(brought(span, 206, &range("bytes 5-7/100")), None);
        assert_eq!(brought(span, 206, &[]), None);
        assert_eq!(brought(span, 206, &[("content-range", "bytes 5-9/100"), ("content-length", "4")]), None);
        assert_eq!(brought(span, 200, &[("content-length", "100")]), Some((0, 100, 100)));
        assert_eq!(brought(Part::From(0), 200, &[]), None);
        let known = Part::From(7).brought(200, &HeaderMap::new(), Some(9));
        assert_eq!(known, Ok((Span::whole(9), 9)), "the manifest tells what the response does not");
    }

    #[test]
    fn an_outage_outweighs_a_not_found() {
        let outage = SourceError::TimedOut;
        assert_eq!(SourceError::not_found().severer(outage.clone()), outage);
        assert_eq!(outage.clone().severer(SourceError::not_found()), outage);
    }
}
