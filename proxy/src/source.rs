//! Response bodies from an upstream or a peer, and the errors of a source.

mod upstream_error;

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use http::{HeaderMap, HeaderValue};

pub use self::upstream_error::UpstreamError;
use crate::bandwidth::{CurrentPriority, Throttle};
use crate::oci::{ContentRange, RangeRequest, Span};
use crate::times::{STALL_TIMEOUT, UPSTREAM_TIMEOUT};

/// The body of a blob as an upstream or a peer sends it.
pub struct Incoming {
    /// Length of the whole blob, in bytes.
    pub total: u64,
    /// The range that this body contains.
    pub span: Span,
    /// Read timeout for the next piece.
    pub stall_timeout: Duration,
    throttle: Option<Throttle>,
    body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// The minimum throughput of a connection: `bytes` in each `window`.
#[derive(Clone, Copy, Debug)]
pub struct MinRate {
    pub bytes: u64,
    pub window: Duration,
}

/// Throughput of a connection. It counts only the time spent on waiting for bytes, so a slow reader does not reduce it.
#[derive(Default)]
pub struct Speed {
    waited: Duration,
    bytes: u64,
}

/// The part of a blob to request from a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    From(u64),
    Span(Span),
}

/// The source of the bytes of a response. The response, the log and the metrics use the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedFrom {
    Memory,
    Disk,
    Peer,
    Upstream,
    /// An expired tag, because the upstream fails.
    Stale,
}

/// A body that ended early or with an error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the response body ended early: {0}")]
pub struct Broken(pub String);

/// Why a source sends no content.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// 404 or 410.
    #[error("the upstream does not have this content: {0}")]
    NotFound(UpstreamError),
    /// 401 or 403.
    #[error("the upstream denies access: {0}")]
    Denied(UpstreamError),
    #[error("not cached on this node")]
    NotCached,
    #[error("the upstream limits the rate of requests; try again later")]
    Limited {
        /// How long the upstream wants no further requests, if it states that.
        again: Option<Duration>,
    },
    #[error("too many concurrent requests; try again later")]
    Busy,
    /// The provider of a rule's credentials fails, which is independent of the upstream's health.
    #[error("no credentials: {0}")]
    NoCredentials(String),
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// A connection was interrupted before the response began. The cause may be this request alone: some content
    /// filters reset connections for certain paths.
    #[error("the connection was interrupted: {0}")]
    Interrupted(String),
    #[error("no response in time")]
    TimedOut,
    /// Any other status.
    #[error("the upstream responded with {0}")]
    Failed(UpstreamError),
    #[error("blocked by the egress policy: {0}")]
    Blocked(String),
    #[error("invalid response: {0}")]
    Malformed(String),
}

/// A blob of this size does not wait for bandwidth limits: that of a small object.
const UNTHROTTLED_BYTES: u64 = 256 * 1024;

impl Incoming {
    pub fn new(
        span: Span,
        total: u64,
        body: impl futures_util::Stream<Item = Result<Bytes, Broken>> + Send + 'static,
    ) -> Self {
        Self { total, span, stall_timeout: STALL_TIMEOUT, throttle: None, body: body.boxed() }
    }

    /// A body that cannot be resumed from another connection: its source would begin again at the first byte, so a
    /// longer pause is tolerated.
    pub fn not_resumable(self) -> Self {
        Self { stall_timeout: UPSTREAM_TIMEOUT, ..self }
    }

    /// The same body under bandwidth limits.
    pub fn throttled(self, throttle: Option<Throttle>) -> Self {
        Self { throttle, ..self }
    }

    /// Whose download it is, for bandwidth limits.
    pub fn for_priority(self, priority: CurrentPriority) -> Self {
        Self { throttle: self.throttle.map(|throttle| throttle.with_priority(priority)), ..self }
    }

    /// Calls `done` when the last byte has arrived.
    pub fn on_complete(self, done: impl FnOnce() + Send + 'static) -> Self {
        let (mut left, mut done) = (self.span.len(), Some(done));
        let counted = self.body.inspect(move |piece| {
            left = left.saturating_sub(piece.as_ref().map_or(0, |piece| piece.len() as u64));
            if left == 0 {
                done.take().into_iter().for_each(|done| done());
            }
        });
        Self { body: counted.boxed(), ..self }
    }

    /// The same body, cut off at this event: a connection that is no longer wanted ends then.
    pub fn until(self, event: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { body: self.body.take_until(event).boxed(), ..self }
    }

    /// Waits for the bandwidth limits. A reader that skips it is counted, but does not wait. Nor does a small blob: the
    /// pull of an image waits for it, and its timeouts are short.
    pub async fn ready(&mut self) {
        if let Some(throttle) = &mut self.throttle
            && self.total > UNTHROTTLED_BYTES
        {
            throttle.ready().await;
        }
    }

    /// The next piece; None at the end of the body.
    pub async fn next(&mut self) -> Option<Result<Bytes, Broken>> {
        let piece = self.body.next().await;
        if let (Some(throttle), Some(Ok(bytes))) = (&mut self.throttle, &piece) {
            throttle.count(bytes.len() as u64);
        }
        piece
    }
}

impl Speed {
    /// Counts a piece. False: the window has passed with fewer bytes than `floor` demands.
    pub fn meets_minimum(&mut self, floor: MinRate, waited: Duration, len: usize) -> bool {
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

    /// The same as a range request; None: the whole blob.
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

    /// The range that a response of status 200 or 206 contains, and the length of the whole blob. A 206 must match the
    /// requested range exactly; a 200 contains everything. `known` is the length from a manifest, for a 200 without
    /// `Content-Length`.
    pub fn brought(self, status: u16, headers: &HeaderMap, known: Option<u64>) -> Result<(Span, u64), SourceError> {
        let malformed = |what: &str| SourceError::Malformed(what.to_owned());
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let length: Option<u64> = text(CONTENT_LENGTH).and_then(|text| text.trim().parse().ok());
        if status != 206 {
            return length
                .or(known)
                .map(|total| (Span::whole(total), total))
                // Not malformed, so that it can be retried: another node may know the length from the manifest.
                .ok_or_else(|| SourceError::Unreachable("the upstream does not state the length of the blob".into()));
        }
        let range: ContentRange = text(CONTENT_RANGE)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| malformed("206 without a valid Content-Range"))?;
        let requested = match self {
            Self::From(start) => Span { start, end: range.total },
            Self::Span(span) => Span { start: span.start, end: span.end.min(range.total) },
        };
        if range.span != requested || length.is_some_and(|length| length != requested.len()) {
            return Err(malformed("206 for another range than requested"));
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
            Self::Upstream => "upstream",
            Self::Stale => "stale",
        }
    }
}

impl SourceError {
    /// "Not found" as decided by dray, without a response of an upstream.
    pub fn not_found() -> Self {
        Self::NotFound(UpstreamError::of_status(404))
    }

    /// "Denied" as decided by dray, without a response of an upstream.
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
            Self::NotCached => "miss",
            Self::Limited { .. } => "rate_limited",
            Self::Busy => "overloaded",
            Self::NoCredentials(_) => "no_credentials",
            Self::Unreachable(_) => "unreachable",
            Self::Interrupted(_) => "interrupted",
            Self::TimedOut => "timed_out",
            Self::Failed(_) => "failed",
            Self::Blocked(_) => "blocked",
            Self::Malformed(_) => "malformed",
        }
    }

    /// Whether an immediate retry of the same request may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Interrupted(_))
            || matches!(self.failed_status(), Some(500 | 502 | 503 | 504))
    }

    /// Whether the error is about the source's health, so that a stale response is better than the error. "Not found"
    /// and "denied" are responses.
    pub fn is_outage(&self) -> bool {
        !matches!(self, Self::NotFound(_) | Self::Denied(_))
    }

    /// Whether a later retry may succeed: the upstream is unavailable, or limits its requests.
    pub fn is_transient_outage(&self) -> bool {
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

    /// Whether the `Range` header may be the cause: the same request without it may succeed.
    pub fn is_about_ranges(&self) -> bool {
        matches!(self, Self::Malformed(_)) || matches!(self.failed_status(), Some(400..=499 | 501))
    }

    /// Of the errors of two upstreams, the one with more information. If one upstream fails, the "not found" of the
    /// other is not conclusive.
    pub fn more_severe(self, other: Self) -> Self {
        let rank = |error: &Self| match error {
            Self::NotFound(_) | Self::NotCached => 0,
            Self::Denied(_) => 1,
            Self::Blocked(_) => 2,
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

/// An error and its causes, including those that an I/O error wraps, which `Error::source` skips.
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

/// The innermost cause of an error. The layers of an HTTP client around it add no information.
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
    fn trickle_is_below_the_floor() {
        let (second, floor) = (Duration::from_secs(1), MinRate { bytes: 64 * 1024, window: Duration::from_secs(30) });
        let mut speed = Speed::default();
        assert!((0..29).all(|_| speed.meets_minimum(floor, second, 1)));
        assert!(!speed.meets_minimum(floor, second, 1));
        assert!((0..100).all(|_| speed.meets_minimum(floor, second, 4096)));
    }

    #[test]
    fn only_the_exact_range_is_accepted() {
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
        assert_eq!(known, Ok((Span::whole(9), 9)), "the length from the manifest");
    }

    #[test]
    fn outage_outranks_not_found() {
        let outage = SourceError::TimedOut;
        assert_eq!(SourceError::not_found().more_severe(outage.clone()), outage);
        assert_eq!(outage.clone().more_severe(SourceError::not_found()), outage);
    }
}
