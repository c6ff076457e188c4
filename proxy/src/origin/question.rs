//! A question to a registry, and what an answer without content means.

use std::time::{Duration, SystemTime};

use ::http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use ::http::{HeaderMap, HeaderValue, Method};
use reqwest::Response;
use url::Url;

use crate::config::Upstream;
use crate::oci::Digest;
use crate::registries::Place;
use crate::source::SourceError;

/// One question, without saying to which registry.
#[derive(Clone)]
pub(super) struct Question {
    pub(super) kind: Kind,
    pub(super) method: Method,
    /// Below the repository: `manifests/<reference>`; None: whether the API is there at all.
    path: Option<String>,
    query: Option<String>,
    pub(super) headers: HeaderMap,
    /// The blob whose redirect may be remembered.
    pub(super) blob: Option<Digest>,
    /// What it is about, if that is known: who says that it is something else has something else.
    expects: Option<Digest>,
}

/// What is asked for: registries limit some and not others. The names are those of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Manifest,
    ManifestHead,
    Blob,
    BlobHead,
    List,
    Ping,
}

impl Question {
    pub(super) fn new(kind: Kind, path: String) -> Self {
        let mut headers = HeaderMap::new();
        // Ranges and lengths are those of the stored bytes.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Self { kind, method: kind.method(), path: Some(path), query: None, headers, blob: None, expects: None }
    }

    /// What every registry answers at once, if it answers at all.
    pub(super) fn is_anybody_there() -> Self {
        Self { path: None, ..Self::new(Kind::Ping, String::new()) }
    }

    pub(super) fn accept(mut self, accept: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(accept) {
            self.headers.insert(ACCEPT, value);
        }
        self
    }

    pub(super) fn query(self, query: Option<&str>) -> Self {
        Self { query: query.map(str::to_owned), ..self }
    }

    pub(super) fn of_blob(self, digest: &Digest) -> Self {
        Self { blob: Some(digest.clone()), expects: Some(digest.clone()), ..self }
    }

    pub(super) fn expect(self, digest: Option<&Digest>) -> Self {
        Self { expects: digest.cloned(), ..self }
    }

    /// Refuses an answer about something else: another upstream may have what is meant.
    pub(super) fn believe(&self, response: Response) -> Result<Response, SourceError> {
        // On which somebody is to log in, or that tells of repairs. Blobs are proven by their digests.
        if !self.kind.is_blob() && self.kind != Kind::Ping && is_page(&response) {
            return Err(SourceError::Malformed("a page for people".into()));
        }
        let claimed = claimed_digest(&response);
        let is_other =
            |expected: &Digest, claimed: &Digest| claimed.algorithm() == expected.algorithm() && claimed != expected;
        match (&self.expects, claimed) {
            (Some(expected), Some(claimed)) if is_other(expected, &claimed) => {
                Err(SourceError::Malformed("another digest in Docker-Content-Digest".into()))
            }
            _ => Ok(response),
        }
    }

    pub(super) fn url(&self, upstream: &Upstream, place: &Place) -> Result<Url, SourceError> {
        let repository = place.rule.repository_at(upstream, &place.repository);
        let query = self.query.as_ref().map_or_else(String::new, |query| format!("?{query}"));
        let text = match &self.path {
            Some(path) => format!("{}/v2/{repository}/{path}{query}", upstream.base()),
            None => format!("{}/v2/", upstream.base()),
        };
        Url::parse(&text).map_err(|e| SourceError::Malformed(format!("no URL: {e}")))
    }
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::ManifestHead => "manifest_head",
            Self::Blob => "blob",
            Self::BlobHead => "blob_head",
            Self::List => "list",
            Self::Ping => "ping",
        }
    }

    pub(super) fn is_blob(self) -> bool {
        matches!(self, Self::Blob | Self::BlobHead)
    }

    /// Whether silence means that nobody is there. A blob may have been redirected elsewhere, and a list may take
    /// a registry long.
    pub(super) fn tells_who_is_there(self) -> bool {
        matches!(self, Self::Manifest | Self::ManifestHead | Self::Ping)
    }

    fn method(self) -> Method {
        match self {
            Self::Manifest | Self::Blob | Self::List | Self::Ping => Method::GET,
            Self::ManifestHead | Self::BlobHead => Method::HEAD,
        }
    }
}

fn is_page(response: &Response) -> bool {
    let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let bare = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    matches!(&*bare, "text/html" | "application/xhtml+xml")
}

const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

pub(super) fn claimed_digest(response: &Response) -> Option<Digest> {
    response.headers().get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// A 503 is believed for so long, whatever its `Retry-After`.
const LONGEST_REPAIR: Duration = Duration::from_secs(10);

/// Turns an answer that is no content into an error.
pub(super) fn checked(response: Response) -> Result<Response, SourceError> {
    let again = retry_after(response.headers(), SystemTime::now());
    match response.status().as_u16() {
        200 | 206 => {}
        404 | 410 => return Err(SourceError::NotFound),
        401 | 403 => return Err(SourceError::Denied),
        429 => return Err(SourceError::Limited { again }),
        // It speaks of repairs, and may not know how long they take: somebody has to look.
        503 if again.is_some() => {
            return Err(SourceError::Limited { again: again.map(|again| again.min(LONGEST_REPAIR)) });
        }
        status => return Err(SourceError::Failed(status)),
    }
    let encoding = response.headers().get(CONTENT_ENCODING);
    if encoding.is_some_and(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(SourceError::Malformed("compressed although identity was asked for".into()));
    }
    Ok(response)
}

/// `Retry-After`: seconds, or a date (RFC 9110, section 10.2.3).
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(::http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    fn answer(status: u16, name: &'static str, value: &str) -> Response {
        Response::from(::http::Response::builder().status(status).header(name, value).body("").unwrap())
    }

    #[test]
    fn who_speaks_of_repairs_is_believed_for_a_while_only() {
        let limited = |status, value: &str| match checked(answer(status, "retry-after", value)) {
            Err(SourceError::Limited { again }) => again.map(|again| again.as_secs()),
            other => panic!("{other:?}"),
        };
        assert_eq!([limited(503, "3600"), limited(503, "2"), limited(429, "3600")], [Some(10), Some(2), Some(3600)]);
        assert_eq!(checked(answer(503, "x", "")).err(), Some(SourceError::Failed(503)), "it says nothing of later");
    }

    #[test]
    fn a_page_is_no_answer_but_of_blobs() {
        let believes = |kind, media_type: &str| {
            Question::new(kind, "x".into()).believe(answer(200, "content-type", media_type)).is_ok()
        };
        for media_type in ["text/html", "Text/HTML; charset=utf-8", "application/xhtml+xml"] {
            assert!(!believes(Kind::Manifest, media_type) && !believes(Kind::List, media_type), "{media_type}");
            assert!(believes(Kind::Blob, media_type) && believes(Kind::Ping, media_type), "{media_type}");
        }
        assert!(believes(Kind::Manifest, "application/json") && believes(Kind::ManifestHead, "text/plain"));
    }

    #[test]
    fn later_is_a_number_of_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Thu, 26 Nov 2026 12:00:00 GMT").unwrap();
        let later = |value: &str| retry_after(&headers("retry-after", value), now).map(|later| later.as_secs());
        assert_eq!(later("120"), Some(120));
        assert_eq!(later("Thu, 26 Nov 2026 12:01:30 GMT"), Some(90));
        assert_eq!(later("Thu, 26 Nov 2026 11:00:00 GMT"), Some(0));
        assert_eq!([later("soon"), later("-1"), later("")], [None, None, None]);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
