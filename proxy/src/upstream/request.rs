//! A request to a registry, and the error for a response without content.

use std::time::{Duration, SystemTime};

use ::http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, RETRY_AFTER};
use ::http::{HeaderMap, HeaderValue, Method};
use futures_util::{StreamExt, stream};
use reqwest::Response;
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::ListKind;
use crate::config::Upstream;
use crate::oci::Digest;
use crate::registries::RepositoryRef;
use crate::source::{SourceError, root_cause};
use crate::times::PAUSE;

/// A request that is independent of the upstream.
#[derive(Clone)]
pub(super) struct UpstreamRequest {
    pub(super) kind: RequestKind,
    pub(super) method: Method,
    path: Path,
    query: Option<String>,
    pub(super) headers: HeaderMap,
    /// The blob whose redirect may be remembered.
    pub(super) blob: Option<Digest>,
    /// The digest that `Docker-Content-Digest` must have, if the response has this header.
    expects: Option<Digest>,
}

/// The requested part of the API.
#[derive(Clone)]
enum Path {
    /// `/v2/`
    Api,
    /// `/v2/_catalog`
    Catalog,
    /// Below the repository: `manifests/<reference>`.
    InRepository(String),
}

/// Registries limit some kinds and not others. The names are metric label values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum RequestKind {
    Manifest,
    ManifestHead,
    Blob,
    BlobHead,
    List,
    Ping,
}

impl UpstreamRequest {
    pub(super) fn new(kind: RequestKind, path: String) -> Self {
        let mut headers = HeaderMap::new();
        // Ranges and lengths are those of the stored bytes.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let path = Path::InRepository(path);
        Self { kind, method: kind.method(), path, query: None, headers, blob: None, expects: None }
    }

    pub(super) fn list(list: &ListKind) -> Self {
        match list {
            ListKind::Tags => Self::new(RequestKind::List, "tags/list".to_owned()),
            ListKind::Referrers(digest) => Self::new(RequestKind::List, format!("referrers/{digest}")),
            ListKind::Catalog => Self { path: Path::Catalog, ..Self::new(RequestKind::List, String::new()) },
        }
    }

    /// `GET /v2/`: every registry responds to it quickly, if at all.
    pub(super) fn ping() -> Self {
        Self { path: Path::Api, ..Self::new(RequestKind::Ping, String::new()) }
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
        Self { blob: Some(digest.clone()), ..self }
    }

    pub(super) fn expect(self, digest: Option<&Digest>) -> Self {
        Self { expects: digest.cloned(), ..self }
    }

    /// Rejects a web page and a response for another digest: another upstream may have the content.
    pub(super) async fn validate(&self, response: Response, deadline: Instant) -> Result<Response, SourceError> {
        let response = if self.may_be_page(&response) { without_page(response, deadline).await? } else { response };
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

    /// Whether a response is labelled as a web page, such as a login or maintenance page. Blobs are verified by their
    /// digests instead.
    pub(super) fn may_be_page(&self, response: &Response) -> bool {
        !self.kind.is_blob() && self.kind != RequestKind::Ping && is_labelled_page(response)
    }

    pub(super) fn url(&self, upstream: &Upstream, repo_ref: &RepositoryRef) -> Result<Url, SourceError> {
        let repository = repo_ref.repository_at(upstream);
        let queries = [self.query.clone(), upstream.namespace(&repo_ref.registry)];
        let query = queries.into_iter().flatten().collect::<Vec<_>>().join("&");
        let query = if query.is_empty() { query } else { format!("?{query}") };
        let text = match &self.path {
            Path::InRepository(path) => format!("{}/{repository}/{path}{query}", upstream.api()),
            Path::Catalog if !upstream.keeps_names() => return Err(SourceError::not_found()),
            Path::Catalog => format!("{}/_catalog{query}", upstream.api()),
            Path::Api => format!("{}/", upstream.api()),
        };
        Url::parse(&text).map_err(|e| SourceError::Malformed(format!("\"{text}\" is not a valid URL: {e}")))
    }
}

impl RequestKind {
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

    /// Whether a missing response means that the upstream is down. A blob request may hang at a redirect target, and a
    /// list may take long.
    pub(super) fn silence_means_down(self) -> bool {
        matches!(self, Self::Manifest | Self::ManifestHead | Self::Ping)
    }

    fn method(self) -> Method {
        match self {
            Self::Manifest | Self::Blob | Self::List | Self::Ping => Method::GET,
            Self::ManifestHead | Self::BlobHead => Method::HEAD,
        }
    }
}

/// The same response, unless its first byte is that of a web page: the label may be wrong. Without a body, as for HEAD,
/// the label decides.
async fn without_page(mut response: Response, deadline: Instant) -> Result<Response, SourceError> {
    let mut begun = Vec::new();
    loop {
        let piece = timeout_at(deadline, response.chunk()).await.map_err(|_| SourceError::TimedOut)?;
        let piece = piece.map_err(|error| SourceError::Unreachable(root_cause(&error.without_url())))?;
        let page = || SourceError::Malformed("a web page instead of content".into());
        let piece = piece.ok_or_else(page)?;
        let first = piece.iter().copied().find(|byte| !byte.is_ascii_whitespace());
        begun.push(Ok(piece));
        match first {
            Some(b'<') => return Err(page()),
            Some(_) => break,
            None => {}
        }
    }
    let (status, headers) = (response.status(), response.headers().clone());
    let body = stream::iter(begun).chain(response.bytes_stream());
    let mut same = ::http::Response::new(reqwest::Body::wrap_stream(body));
    (*same.status_mut(), *same.headers_mut()) = (status, headers);
    Ok(same.into())
}

fn is_labelled_page(response: &Response) -> bool {
    let media_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let bare = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    matches!(&*bare, "text/html" | "application/xhtml+xml")
}

const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

pub(super) fn claimed_digest(response: &Response) -> Option<Digest> {
    response.headers().get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// Turns a response without content into an error with the upstream's body. The labels of a successful one, such as
/// `Content-Encoding`, are ignored: the digest of the body decides.
pub(super) async fn checked(response: Response, deadline: Instant) -> Result<Response, SourceError> {
    let again = retry_after(response.headers(), SystemTime::now());
    match response.status().as_u16() {
        200 | 206 => Ok(response),
        429 => Err(SourceError::Limited { again }),
        // Maintenance may end earlier than announced, so the limit is `PAUSE` at most.
        503 if again.is_some() => Err(SourceError::Limited { again: again.map(|again| again.min(PAUSE)) }),
        _ => Err(SourceError::of_response(response, deadline).await),
    }
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

    fn response(status: u16, name: &'static str, value: &str) -> Response {
        Response::from(::http::Response::builder().status(status).header(name, value).body("").unwrap())
    }

    async fn error(status: u16, name: &'static str, value: &str) -> SourceError {
        checked(response(status, name, value), Instant::now() + PAUSE).await.unwrap_err()
    }

    #[tokio::test]
    async fn retry_after_of_503_is_capped() {
        let mut limits = Vec::new();
        for (status, value) in [(503, "3600"), (503, "2"), (429, "3600")] {
            match error(status, "retry-after", value).await {
                SourceError::Limited { again } => limits.push(again.map(|again| again.as_secs())),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(limits, [Some(10), Some(2), Some(3600)]);
        assert_eq!(error(503, "x", "").await, SourceError::failed(503), "without Retry-After it is not a limit");
    }

    #[tokio::test]
    async fn error_keeps_status_and_body_of_the_upstream() {
        let body = r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no such repository"}]}"#;
        for (status, kind) in [(404, "not_found"), (410, "not_found"), (401, "denied"), (403, "denied")] {
            let response = Response::from(::http::Response::builder().status(status).body(body).unwrap());
            let error = checked(response, Instant::now() + PAUSE).await.unwrap_err();
            assert_eq!(error.as_str(), kind);
            let (SourceError::NotFound(error) | SourceError::Denied(error)) = error else { panic!("{error}") };
            assert_eq!((error.status, error.code()), (status, Some("NAME_UNKNOWN")));
        }
        assert_eq!(error(413, "x", "").await, SourceError::failed(413));
    }

    #[tokio::test]
    async fn web_page_is_detected_by_first_byte() {
        let validate = async |kind, media_type: &str, body: &'static str| {
            let response = ::http::Response::builder().header(CONTENT_TYPE, media_type).body(body).unwrap();
            let deadline = Instant::now() + PAUSE;
            let validated = UpstreamRequest::new(kind, "x".into()).validate(Response::from(response), deadline).await;
            validated.ok()?.text().await.ok()
        };
        let (page, json) = (" \n<!doctype html>", " {\"tags\":[]}");
        for media_type in ["text/html", "Text/HTML; charset=utf-8", "application/xhtml+xml"] {
            for kind in [RequestKind::Manifest, RequestKind::List] {
                assert_eq!(validate(kind, media_type, page).await, None, "{media_type}");
                assert_eq!(validate(kind, media_type, json).await.as_deref(), Some(json), "{media_type}");
            }
            assert_eq!(validate(RequestKind::ManifestHead, media_type, "").await, None);
            assert_eq!(validate(RequestKind::Blob, media_type, page).await.as_deref(), Some(page));
            assert_eq!(validate(RequestKind::Ping, media_type, page).await.as_deref(), Some(page));
        }
        assert!(validate(RequestKind::ManifestHead, "text/plain", "").await.is_some());
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Thu, 26 Nov 2026 12:00:00 GMT").unwrap();
        let later = |value: &str| retry_after(&headers("retry-after", value), now).map(|later| later.as_secs());
        assert_eq!(later("120"), Some(120));
        assert_eq!(later("Thu, 26 Nov 2026 12:01:30 GMT"), Some(90));
        assert_eq!(later("Thu, 26 Nov 2026 11:00:00 GMT"), Some(0));
        assert_eq!([later("soon"), later("-1"), later("")], [None, None, None]);
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }
}
