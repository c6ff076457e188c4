//! Headers that peers add to the registry protocol. Either side may leave them out.
//!
//! | header | in | value |
//! |---|---|---|
//! | `dray-request` | request | what the sender wants of the peer, and on which terms: [`Terms`] |
//! | `dray-have` | both | number of bodies that the sender is sending, and the bytes that it has: `2;0-99+200-299` |
//! | `dray-holders` | response | other holders, each with its load and bytes: `10.0.0.3:5052;2;0-99+200-299, ...` |
//! | `dray-refusal` | response 307, 403, 503 | why the peer itself declines: [`PeerRefusal`] |
//! | `dray-age` | response | for a tag: milliseconds since the upstream last confirmed it |
//! | `dray-authorization` | request | the client's own registry credential; sealed with the shared key |
//! | `dray-auth` | both | the sender's signature with the shared key, where there is one |
//!
//! `cache-control: only-if-cached` requests only what the peer has or is downloading; the response is 504 if it is
//! neither.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::query::{Downstream, RangePurpose, RedirectPolicy};
use crate::bandwidth::Priority;
use crate::oci::{Span, Spans};
use crate::role::Role;

/// The prefix of all headers between peers.
pub const PREFIX: &str = "dray-";

pub const REQUEST: HeaderName = HeaderName::from_static("dray-request");
pub const HAVE: HeaderName = HeaderName::from_static("dray-have");
pub const HOLDERS: HeaderName = HeaderName::from_static("dray-holders");
pub const REFUSAL: HeaderName = HeaderName::from_static("dray-refusal");
pub const AGE: HeaderName = HeaderName::from_static("dray-age");
pub const AUTHORIZATION: HeaderName = HeaderName::from_static("dray-authorization");
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
pub const SOURCE: HeaderName = HeaderName::from_static("x-dray-source");
pub const ONLY_IF_CACHED: &str = "only-if-cached";

/// Spans in one list, and holders in one header. Larger: headers exceed what HTTP servers accept. Smaller: peers know
/// fewer holders and ranges.
const MAX_SPANS: usize = 32;
pub const MAX_HOLDERS: usize = 8;

/// A peer that has some of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub peer: SocketAddr,
    /// Number of bodies that it is sending.
    pub load: u32,
    pub have: Spans,
}

/// A header's text, parsed.
pub fn read<T: std::str::FromStr>(headers: &HeaderMap, name: &HeaderName) -> Option<T> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// What a request wants of a peer: `role=zone; rule=4f1c; deadline=2500; peers=10.0.0.1:5052+10.0.0.2:5052; whole`.
/// What a later release adds is ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// `role`: in which role the peer is requested.
    pub role: Role,
    /// `rule`: the fingerprint of the sender's rule for this repository.
    pub rule: Option<String>,
    /// `deadline`: milliseconds left for the response.
    pub deadline: Option<Duration>,
    /// `peers`: the sender's address as a member, then the peers for which it sends the request.
    pub peers: Downstream,
    /// `whole`: the range is one of many of a download of the whole blob.
    pub range_purpose: RangePurpose,
    /// `background`: no client waits for the response.
    pub priority: Priority,
    /// `no-redirect`: the peer must not redirect to another holder.
    pub redirects: RedirectPolicy,
    /// `deputy`: the sender could download the range from the upstream itself.
    pub may_depute: bool,
}

/// Why a peer itself declines a request. It tells nothing about the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRefusal {
    /// `overloaded` (503): it has too many requests or downloads.
    Overloaded,
    /// `no-upstream` (403, 503): it cannot reach the upstream, or may not.
    NoUpstream,
    /// `deputy=0-99` (307): the sender is to download this span from the upstream, for all peers.
    Deputy(Span),
}

impl Terms {
    /// The terms of a request; without the header the default ones.
    pub fn read(headers: &HeaderMap) -> Self {
        let mut terms = Self::default();
        for (name, value) in parameters(headers, &REQUEST) {
            match name {
                // A peer is an owner, not a client.
                "role" => terms.role = value.parse().ok().filter(|role| *role != Role::Client).unwrap_or(terms.role),
                "rule" => terms.rule = Some(value.to_owned()),
                "deadline" => terms.deadline = value.parse().ok().map(Duration::from_millis),
                "peers" => terms.peers = Downstream::parse(value),
                "whole" => terms.range_purpose = RangePurpose::Whole,
                "background" => terms.priority = Priority::Background,
                "no-redirect" => terms.redirects = RedirectPolicy::Refused,
                "deputy" => terms.may_depute = true,
                _ => {}
            }
        }
        terms
    }

    pub fn write(&self) -> Option<HeaderValue> {
        let mut text = format!("role={}", self.role.as_str());
        if let Some(rule) = &self.rule {
            let _ = write!(text, "; rule={rule}");
        }
        if let Some(deadline) = self.deadline {
            let _ = write!(text, "; deadline={}", deadline.as_millis());
        }
        if self.peers != Downstream::NONE {
            let _ = write!(text, "; peers={}", self.peers);
        }
        let flags = [
            ("whole", self.range_purpose == RangePurpose::Whole),
            ("background", self.priority == Priority::Background),
            ("no-redirect", self.redirects == RedirectPolicy::Refused),
            ("deputy", self.may_depute),
        ];
        for (flag, _) in flags.iter().filter(|(_, is_set)| *is_set) {
            let _ = write!(text, "; {flag}");
        }
        HeaderValue::try_from(text).ok()
    }
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            role: Role::Global,
            rule: None,
            deadline: None,
            peers: Downstream::NONE,
            range_purpose: RangePurpose::Range,
            priority: Priority::Peer,
            redirects: RedirectPolicy::Followed,
            may_depute: false,
        }
    }
}

impl PeerRefusal {
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        match parameters(headers, &REFUSAL).next()? {
            ("overloaded", _) => Some(Self::Overloaded),
            ("no-upstream", _) => Some(Self::NoUpstream),
            ("deputy", span) => parse_span(span).map(Self::Deputy),
            _ => None,
        }
    }

    pub fn text(self) -> String {
        match self {
            Self::Overloaded => "overloaded".to_owned(),
            Self::NoUpstream => "no-upstream".to_owned(),
            Self::Deputy(span) => format!("deputy={}", spans_text(&span.into())),
        }
    }
}

/// The parameters of a header, separated by semicolons: names, and values where there are some.
fn parameters<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = (&'a str, &'a str)> {
    let text = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').map(|part| part.trim().split_once('=').unwrap_or((part.trim(), "")))
}

/// The number of bodies that the sender is sending, and the bytes that it has. None: not reported.
pub fn read_have(headers: &HeaderMap) -> Option<(u32, Spans)> {
    let (load, have) = headers.get(HAVE)?.to_str().ok()?.split_once(';')?;
    Some((load.parse().ok()?, parse_spans(have)?))
}

pub fn write_have(load: u32, have: &Spans) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("{load};{}", spans_text(have))).ok()
}

/// The holders that a response names; malformed ones are left out.
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
    fn written_headers_can_be_read() {
        let holders = [
            Holder { peer: "10.0.0.3:5052".parse().unwrap(), load: 2, have: spans(&[(0, 100), (200, 300)]) },
            Holder { peer: "[fd00::1]:5052".parse().unwrap(), load: 0, have: Spans::default() },
        ];
        let mut headers = HeaderMap::new();
        headers.insert(HOLDERS, write_holders(&holders).unwrap());
        assert_eq!(headers[HOLDERS], "10.0.0.3:5052;2;0-99+200-299, [fd00::1]:5052;0;");
        assert_eq!(read_holders(&headers), holders);
        headers.insert(HAVE, write_have(2, &holders[0].have).unwrap());
        assert_eq!(headers[HAVE], "2;0-99+200-299");
        assert_eq!(read_have(&headers), Some((2, holders[0].have.clone())));
        headers.insert(HAVE, write_have(0, &Spans::default()).unwrap());
        assert_eq!(read_have(&headers), Some((0, Spans::default())));
        for refusal in
            [PeerRefusal::Overloaded, PeerRefusal::NoUpstream, PeerRefusal::Deputy(Span { start: 0, end: 100 })]
        {
            headers.insert(REFUSAL, refusal.text().parse().unwrap());
            assert_eq!(PeerRefusal::read(&headers), Some(refusal));
        }
    }

    #[test]
    fn written_terms_can_be_read() {
        let peers = Downstream::parse("10.0.0.1:5052+[fd00::1]:5052");
        let all = Terms {
            role: Role::Zone,
            rule: Some("4f1c".into()),
            deadline: Some(Duration::from_millis(2500)),
            peers,
            range_purpose: RangePurpose::Whole,
            priority: Priority::Background,
            redirects: RedirectPolicy::Refused,
            may_depute: true,
        };
        let text = "role=zone; rule=4f1c; deadline=2500; peers=10.0.0.1:5052+[fd00::1]:5052; whole; background; no-redirect; deputy";
        for (terms, text) in [(all, text), (Terms::default(), "role=global")] {
            assert_eq!(terms.write().unwrap(), text);
            let later = format!("{text}; added=by a later release; flag");
            for text in [text, &later, &text.replace("; ", ";")] {
                let headers = HeaderMap::from_iter([(REQUEST, text.parse().unwrap())]);
                assert_eq!(Terms::read(&headers), terms, "{text}");
            }
        }
    }

    #[test]
    fn malformed_terms_are_ignored() {
        for text in ["", "role=client", "role=x; deadline=soon; peers=x", ";;=;"] {
            let headers = HeaderMap::from_iter([(REQUEST, text.parse().unwrap())]);
            assert_eq!(Terms::read(&headers), Terms::default(), "{text}");
        }
        assert_eq!(Terms::read(&HeaderMap::new()), Terms::default());
    }

    #[test]
    fn malformed_headers_are_ignored() {
        let mut headers = HeaderMap::new();
        for text in ["x", "1.2.3.4;0;0-1", "1.2.3.4:5;x;0-1", "1.2.3.4:5;0;9-1", "1.2.3.4:5;0;0-18446744073709551615"] {
            headers.insert(HOLDERS, text.parse().unwrap());
            assert!(read_holders(&headers).is_empty(), "{text}");
        }
        for text in ["", "0-1", "0;0-1+x", "x;0-1", "0;9-1"] {
            headers.insert(HAVE, text.parse().unwrap());
            assert_eq!(read_have(&headers), None, "{text}");
        }
        for text in ["", "busy", "deputy", "deputy=9-1"] {
            headers.insert(REFUSAL, text.parse().unwrap());
            assert_eq!(PeerRefusal::read(&headers), None, "{text}");
        }
        let many = vec!["1.2.3.4:5;0;0-1"; 100].join(",");
        headers.insert(HOLDERS, many.parse().unwrap());
        assert_eq!(read_holders(&headers).len(), MAX_HOLDERS);
    }
}
