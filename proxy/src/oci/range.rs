//! Byte ranges of client requests (RFC 9110 section 14.1) and upstream responses (section 14.4).

use std::str::FromStr;

use super::Spans;

/// A `Range` header: one range or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeSet(Vec<RangeRequest>);

/// A single range, not yet clipped to a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeRequest {
    /// `bytes=a-`
    From(u64),
    /// `bytes=a-b`, both ends included
    Bounded(u64, u64),
    /// `bytes=-n`: the last n bytes
    Suffix(u64),
}

/// A non-empty part of a body: `start` included, `end` excluded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

/// `Content-Range: bytes a-b/total` of a 206.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    pub span: Span,
    pub total: u64,
}

/// No byte of the body lies in the range: the response has status 416.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsatisfiable;

/// Most ranges in one header. With more, the response is the whole body. Larger: one request causes more reads and
/// framing.
const MAX_RANGES: usize = 256;

// === impl RangeSet ===

impl RangeSet {
    /// Parses a `Range` header. None: the response is the whole body, as servers do with units or syntax that they do
    /// not support.
    pub fn parse(header: &str) -> Option<Self> {
        let (unit, set) = header.trim().split_once('=')?;
        if !unit.trim().eq_ignore_ascii_case("bytes") || set.split(',').count() > MAX_RANGES {
            return None;
        }
        set.split(',').map(RangeRequest::parse).collect::<Option<_>>().map(Self)
    }

    /// The range, if it is only one.
    pub fn single(&self) -> Option<RangeRequest> {
        if let [range] = self.0[..] { Some(range) } else { None }
    }

    pub fn iter(&self) -> impl Iterator<Item = RangeRequest> {
        self.0.iter().copied()
    }

    /// The parts of a body of `total` bytes, in the order of the header. If any overlap or touch, all are joined and
    /// sorted (RFC 9110 section 14.2), so that together they are not longer than the body.
    pub fn within(&self, total: u64) -> Vec<Span> {
        let spans: Vec<Span> = self.iter().filter_map(|range| range.within(total).ok()).collect();
        let joined: Spans = spans.iter().copied().collect();
        if joined.iter().count() == spans.len() { spans } else { joined.iter().collect() }
    }
}

// === impl RangeRequest ===

impl RangeRequest {
    fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.trim().split_once('-')?;
        match (first.trim(), last.trim()) {
            ("", suffix) => Some(Self::Suffix(number(suffix)?)),
            (start, "") => Some(Self::From(number(start)?)),
            (start, end) => Some(Self::Bounded(number(start)?, number(end)?)),
        }
    }

    /// Whether the client may already hold the bytes before the range.
    pub fn is_resumption(self) -> bool {
        !matches!(self, Self::From(0) | Self::Bounded(0, _))
    }

    /// Clips the range to a body of `total` bytes.
    pub fn within(self, total: u64) -> Result<Span, Unsatisfiable> {
        let span = match self {
            Self::From(start) => Span { start, end: total },
            Self::Bounded(start, last) => Span { start, end: total.min(last.saturating_add(1)) },
            Self::Suffix(length) => Span { start: total.saturating_sub(length), end: total },
        };
        if span.start < span.end { Ok(span) } else { Err(Unsatisfiable) }
    }
}

/// Digits only: `u64::from_str` would also take a sign.
fn number(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

// === impl Span ===

impl Span {
    pub fn whole(total: u64) -> Self {
        Self { start: 0, end: total }
    }

    pub fn len(self) -> u64 {
        self.end - self.start
    }

    pub fn contains(self, at: u64) -> bool {
        self.start <= at && at < self.end
    }

    pub fn is_empty(self) -> bool {
        self.end == self.start
    }

    /// The value of `Content-Range` for this part of `total` bytes.
    pub fn content_range(self, total: u64) -> String {
        format!("bytes {}-{}/{total}", self.start, self.end - 1)
    }
}

// === impl ContentRange ===

impl FromStr for ContentRange {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let parts = || {
            let (span, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
            let (first, last) = span.split_once('-')?;
            let (start, end) = (number(first.trim())?, number(last.trim())?.checked_add(1)?);
            let total = number(total.trim())?;
            (start < end && end <= total).then_some(Self { span: Span { start, end }, total })
        };
        parts().ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(header: &str, total: u64) -> Option<Result<(u64, u64), Unsatisfiable>> {
        RangeSet::parse(header).and_then(|set| set.single()).map(|r| r.within(total).map(|s| (s.start, s.end)))
    }

    #[test]
    fn ranges_follow_the_conformance_suite() {
        assert_eq!(span("bytes=500-1499", 3000), Some(Ok((500, 1500))));
        assert_eq!(span("bytes=500-", 3000), Some(Ok((500, 3000))));
        assert_eq!(span("bytes=-500", 3000), Some(Ok((2500, 3000))));
        assert_eq!(span("bytes=2000-5000", 3000), Some(Ok((2000, 3000))));
        assert_eq!(span("bytes=500-0", 3000), Some(Err(Unsatisfiable)));
        assert_eq!(span("bytes=3000-", 3000), Some(Err(Unsatisfiable)));
        assert_eq!(span("bytes=-0", 3000), Some(Err(Unsatisfiable)));
        assert_eq!(span("bytes=-9000", 3000), Some(Ok((0, 3000))));
        assert_eq!(span("bytes=0-18446744073709551615", 10), Some(Ok((0, 10))));
    }

    #[test]
    fn unsupported_ranges_are_ignored() {
        for header in [
            "bytes=",
            "bytes=a-b",
            "bytes=+1-2",
            "lines=1-2",
            "bytes=0-1,x",
            "0-1",
            "bytes=-",
            "bytes=1-99999999999999999999",
        ] {
            assert_eq!(RangeSet::parse(header), None, "{header}");
        }
        assert_eq!(RangeSet::parse(&format!("bytes=0-0{}", ",0-0".repeat(256))), None, "too many");
    }

    #[test]
    fn ranges_keep_their_order_unless_they_overlap() {
        let of = |header: &str| -> Vec<(u64, u64)> {
            RangeSet::parse(header).unwrap().within(100).iter().map(|span| (span.start, span.end)).collect()
        };
        assert_eq!(of("bytes=50-59, 0-1 ,-5"), [(50, 60), (0, 2), (95, 100)]);
        assert_eq!(of("bytes=50-59,0-1,55-200"), [(0, 2), (50, 100)]);
        assert_eq!(of("bytes=0-9,10-19"), [(0, 20)], "they touch");
        assert_eq!(of("bytes=200-,300-400,7-3"), []);
        assert_eq!(of(&format!("bytes=0-{}", ",0-".repeat(200))), [(0, 100)]);
    }

    #[test]
    fn content_range_is_strict() {
        let read: ContentRange = "bytes 5-9/10".parse().unwrap();
        assert_eq!(read, ContentRange { span: Span { start: 5, end: 10 }, total: 10 });
        assert_eq!(read.span.content_range(read.total), "bytes 5-9/10");
        for text in ["bytes 5-9/*", "bytes 9-5/10", "bytes 5-10/10", "bytes */10", "5-9/10", ""] {
            assert!(text.parse::<ContentRange>().is_err(), "{text}");
        }
    }
}
