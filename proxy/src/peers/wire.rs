//! What peers tell each other beside the registry protocol: headers that either side may leave out.
//!
//! | header | in | value |
//! |---|---|---|
//! | `dray-role` | question | `zone` or `global`: what the one who is asked is to be; without it global |
//! | `dray-peer` | question | the address by which the members know the peer that asks; of a manifest also those of the peers for which it does |
//! | `dray-have` | both | the bytes that the sender has: `0-99+200-299` |
//! | `dray-load` | both | how many bodies the sender sends at the moment |
//! | `dray-whole` | question | `yes`: the range is one of many that make the whole blob |
//! | `dray-deadline` | question | milliseconds that are left to answer in |
//! | `dray-redirect` | question | `no`: nobody else could help, do it yourself |
//! | `dray-busy` | answer 503 | `yes`: the sender has too much to do, which says nothing of the origin |
//! | `dray-way` | answer 503, 403 | `no`: the sender has no way to the origin, which says nothing of others' |
//! | `dray-deputy` | question | `yes`: whoever asks could fetch the range from the origin itself |
//! | `dray-deputy` | answer 307 | `0-99`: do so for this part of it, nobody else does |
//! | `dray-rules` | question | the fingerprint of the rule by which whoever asks would fetch it |
//! | `dray-age` | answer | for a tag: milliseconds since its origin was asked |
//! | `dray-authorization` | question | what the registry is shown, where a client comes with its own rights; sealed by a shared key |
//! | `dray-auth` | both | the proof that the sender knows the shared key, where there is one |
//! | `dray-holders` | answer | others that have some: `10.0.0.3:5052;2;0-99+200-299, ...` |
//!
//! `cache-control: only-if-cached` asks for what is there or on its way; 504 says that it is not.

use std::fmt::Write;
use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::oci::{Span, Spans};

/// What the names of all headers between peers begin with.
pub const PREFIX: &str = "dray-";

pub const ROLE: HeaderName = HeaderName::from_static("dray-role");
pub const PEER: HeaderName = HeaderName::from_static("dray-peer");
pub const HAVE: HeaderName = HeaderName::from_static("dray-have");
pub const LOAD: HeaderName = HeaderName::from_static("dray-load");
pub const WAY: HeaderName = HeaderName::from_static("dray-way");
pub const BUSY: HeaderName = HeaderName::from_static("dray-busy");
pub const WHOLE: HeaderName = HeaderName::from_static("dray-whole");
pub const DEADLINE: HeaderName = HeaderName::from_static("dray-deadline");
pub const REDIRECT: HeaderName = HeaderName::from_static("dray-redirect");
pub const HOLDERS: HeaderName = HeaderName::from_static("dray-holders");
pub const DEPUTY: HeaderName = HeaderName::from_static("dray-deputy");
pub const RULES: HeaderName = HeaderName::from_static("dray-rules");
pub const AUTHORIZATION: HeaderName = HeaderName::from_static("dray-authorization");
pub const AGE: HeaderName = HeaderName::from_static("dray-age");
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
pub const SOURCE: HeaderName = HeaderName::from_static("x-dray-source");
pub const ONLY_IF_CACHED: &str = "only-if-cached";
pub const NO: &str = "no";
pub const YES: &str = "yes";

/// Told at most: more would make headers that nobody takes.
const MAX_SPANS: usize = 32;
pub const MAX_HOLDERS: usize = 8;

/// A peer that has some of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub peer: SocketAddr,
    /// Bodies that it sends at the moment.
    pub load: u32,
    pub have: Spans,
}

/// A header's text, parsed.
pub fn read<T: std::str::FromStr>(headers: &HeaderMap, name: &HeaderName) -> Option<T> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// The bytes that a peer has; none if it does not say, or makes no sense.
pub fn read_have(headers: &HeaderMap) -> Spans {
    read_spans(headers, &HAVE)
}

/// The bytes that a header names; none if it is missing or wrong.
pub fn read_spans(headers: &HeaderMap, name: &HeaderName) -> Spans {
    headers.get(name).and_then(|value| value.to_str().ok()).and_then(parse_spans).unwrap_or_default()
}

pub fn write_spans(spans: &Spans) -> Option<HeaderValue> {
    let text = spans_text(spans);
    (!text.is_empty()).then(|| HeaderValue::from_str(&text).ok()).flatten()
}

/// The holders that an answer names; what makes no sense is left out.
pub fn read_holders(headers: &HeaderMap) -> Vec<Holder> {
    let text = headers.get(HOLDERS).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(',').take(MAX_HOLDERS).filter_map(|holder| parse_holder(holder.trim())).collect()
}

pub fn write_holders(holders: &[Holder]) -> Option<HeaderValue> {
    let mut text = String::new();
    for Holder { peer, load, have } in holders.iter().take(MAX_HOLDERS) {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}{peer};{load};{}", spans_text(have));
    }
    (!text.is_empty()).then(|| HeaderValue::from_str(&text).ok()).flatten()
}

fn parse_holder(text: &str) -> Option<Holder> {
    let mut parts = text.splitn(3, ';');
    let (peer, load) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    Some(Holder { peer, load, have: parse_spans(parts.next()?)? })
}

fn spans_text(spans: &Spans) -> String {
    let mut text = String::new();
    for span in spans.iter().take(MAX_SPANS) {
        let separator = if text.is_empty() { "" } else { "+" };
        let _ = write!(text, "{separator}{}-{}", span.start, span.end - 1);
    }
    text
}

fn parse_spans(text: &str) -> Option<Spans> {
    text.split('+').take(MAX_SPANS).filter(|part| !part.is_empty()).map(parse_span).collect()
}

fn parse_span(text: &str) -> Option<Span> {
    let (start, last) = text.split_once('-')?;
    let (start, last): (u64, u64) = (start.parse().ok()?, last.parse().ok()?);
    let end = last.checked_add(1)?;
    (start < end).then_some(Span { start, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(all: &[(u64, u64)]) -> Spans {
        all.iter().map(|(start, end)| Span { start: *start, end: *end }).collect()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let holders = [
            Holder { peer: "10.0.0.3:5052".parse().unwrap(), load: 2, have: spans(&[(0, 100), (200, 300)]) },
            Holder { peer: "[fd00::1]:5052".parse().unwrap(), load: 0, have: Spans::default() },
        ];
        let mut headers = HeaderMap::new();
        headers.insert(HOLDERS, write_holders(&holders).unwrap());
        assert_eq!(headers[HOLDERS], "10.0.0.3:5052;2;0-99+200-299, [fd00::1]:5052;0;");
        assert_eq!(read_holders(&headers), holders);
        headers.insert(HAVE, write_spans(&holders[0].have).unwrap());
        assert_eq!(read_have(&headers), holders[0].have);
        assert_eq!(write_spans(&Spans::default()), None);
    }

    #[test]
    fn nonsense_is_nothing() {
        let mut headers = HeaderMap::new();
        for text in ["x", "1.2.3.4;0;0-1", "1.2.3.4:5;x;0-1", "1.2.3.4:5;0;9-1", "1.2.3.4:5;0;0-18446744073709551615"] {
            headers.insert(HOLDERS, text.parse().unwrap());
            assert!(read_holders(&headers).is_empty(), "{text}");
        }
        headers.insert(HAVE, "0-1+x".parse().unwrap());
        assert!(read_have(&headers).is_empty());
        let many = vec!["1.2.3.4:5;0;0-1"; 100].join(",");
        headers.insert(HOLDERS, many.parse().unwrap());
        assert_eq!(read_holders(&headers).len(), MAX_HOLDERS);
    }
}
