//! Byte ranges, as asked by clients (RFC 9110 section 14.1) and as answered by origins (14.4).

use std::str::FromStr;

/// A `Range` header with a single range, not yet held against a length.
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

/// No byte of the body lies in the range: the answer is 416.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsatisfiable;

// === impl RangeRequest ===

impl RangeRequest {
    /// Reads a `Range` header. None means: answer with the whole body, which is what a server does
    /// with units, syntax or sets of ranges it does not serve.
    pub fn parse(header: &str) -> Option<Self> {
        let (unit, set) = header.trim().split_once('=')?;
        if !unit.trim().eq_ignore_ascii_case("bytes") {
            return None;
        }
        let (first, last) = set.trim().split_once('-')?;
        match (first.trim(), last.trim()) {
            ("", suffix) => Some(Self::Suffix(number(suffix)?)),
            (start, "") => Some(Self::From(number(start)?)),
            (start, end) => Some(Self::Bounded(number(start)?, number(end)?)),
        }
    }

    /// Whether whoever asks may hold what comes before.
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
        RangeRequest::parse(header).map(|r| r.within(total).map(|s| (s.start, s.end)))
    }

    #[test]
    fn the_cases_of_the_conformance_suite() {
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
    fn what_is_not_understood_is_answered_whole() {
        for header in [
            "bytes=",
            "bytes=a-b",
            "bytes=+1-2",
            "lines=1-2",
            "bytes=0-1,4-5",
            "0-1",
            "bytes=-",
            "bytes=1-99999999999999999999",
        ] {
            assert_eq!(RangeRequest::parse(header), None, "{header}");
        }
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
