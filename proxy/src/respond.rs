//! Responses: status, headers and body of everything that a registry client can get.
//!
//! Only this file maps an error to a status. Manifests and blobs always have a `Content-Length`: containerd takes a
//! missing one for an unknown size. Only lists may be chunked.

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, AGE, ALLOW, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, LINK, LOCATION, TRANSFER_ENCODING, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderName, HeaderValue, StatusCode};
use pingora::http::ResponseHeader;
use serde::Serialize;

use crate::oci::route::RouteError;
use crate::oci::{BLOB_MEDIA_TYPE, Digest, ErrorCode, RangeRequest, Registry, Span, error, link, manifest};
use crate::peers::{PeerAuthError, wire};
use crate::pull::{BlobExtent, BlobResponse, Body, ListResponse, ManifestResponse, PullError, status_for_client};
use crate::source::{ServedFrom, UpstreamError};

const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// Keep content from running in a browser, whatever media type the upstream claims: the registry port serves no pages.
const BROWSER_SECURITY_HEADERS: [(HeaderName, &str); 3] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'"),
    (CONTENT_DISPOSITION, "attachment"),
];

/// The token that a client presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PresentedToken {
    None,
    /// Expired, or not issued with this key (RFC 6750, section 3.1).
    Invalid,
}

/// A response, ready to be written.
pub struct PreparedResponse {
    pub status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Body,
    /// The source of the content. None: the response has no content.
    pub from: Option<ServedFrom>,
    /// Why there is no content, for the access log.
    pub reason: Option<String>,
}

impl PreparedResponse {
    /// The result of an operation for a peer. Its digest is signed with the head.
    pub fn operation(result: &impl Serialize) -> Self {
        let json = serde_json::to_vec(result).unwrap_or_default();
        let digest = Digest::of(&json);
        Self::with_bytes(StatusCode::OK, "application/json", json.into()).header(CONTENT_DIGEST, digest.as_str())
    }

    /// `GET /v2/`
    pub fn ping() -> Self {
        Self::with_bytes(StatusCode::OK, "application/json", Bytes::from_static(b"{}"))
    }

    pub fn refusal(refusal: &PullError) -> Self {
        match refusal {
            PullError::Upstream { error, code } => Self::upstream_error(error, *code),
            PullError::NotFound { code, message } => Self::error(StatusCode::NOT_FOUND, *code, message),
            PullError::BadRequest(message) => Self::error(StatusCode::BAD_REQUEST, ErrorCode::Unsupported, message),
            PullError::Denied(message) => Self::error(StatusCode::FORBIDDEN, ErrorCode::Denied, message),
            // Never 408 or 429: containerd retries those at once. No Retry-After: podman would wait instead of
            // falling back.
            PullError::Unavailable(message) | PullError::Limited(message) => {
                Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, message)
            }
            // The header tells a peer that the error is this node's, not the upstream's.
            PullError::UpstreamUnreachable(message) => {
                Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, message)
                    .with_peer_refusal(wire::PeerRefusal::NoUpstream)
            }
            PullError::Blocked(message) => Self::error(StatusCode::FORBIDDEN, ErrorCode::Denied, message)
                .with_peer_refusal(wire::PeerRefusal::NoUpstream),
            PullError::Busy => Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, &refusal.message())
                .with_peer_refusal(wire::PeerRefusal::Overloaded),
            PullError::InvalidUpstreamResponse(message) => {
                Self::error(StatusCode::BAD_GATEWAY, ErrorCode::Unavailable, message)
            }
            // The status for an unfulfilled `only-if-cached` (RFC 9111, section 5.2.1.7).
            PullError::NotCached => {
                Self::error(StatusCode::GATEWAY_TIMEOUT, ErrorCode::Unavailable, &refusal.message())
            }
            PullError::Unsatisfiable { total } => {
                Self::error(StatusCode::RANGE_NOT_SATISFIABLE, ErrorCode::RangeInvalid, &refusal.message())
                    .header(CONTENT_RANGE, &format!("bytes */{total}"))
            }
        }
    }

    pub fn route_error(error: &RouteError) -> Self {
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::NOT_FOUND);
        Self::error(status, error.code, &error.message)
    }

    /// 405: any method but GET and HEAD.
    pub fn read_only() -> Self {
        Self::error(
            StatusCode::METHOD_NOT_ALLOWED,
            ErrorCode::Unsupported,
            "this is a pull-through cache: push to the registry itself",
        )
        .header(ALLOW, "GET, HEAD")
    }

    /// 401 with two challenges: Bearer (RFC 6750, the distribution's token protocol), and Basic for clients without it.
    pub fn challenge(realm: &str, service: &str, repository: Option<&str>, presented: PresentedToken) -> Self {
        let scope = repository.map(|name| format!(",scope=\"repository:{name}:pull\"")).unwrap_or_default();
        let error = if presented == PresentedToken::Invalid { ",error=\"invalid_token\"" } else { "" };
        let message = "authentication required: use your credentials for the registry";
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, message)
            .header(WWW_AUTHENTICATE, &format!("Bearer realm=\"{realm}\",service=\"{service}\"{scope}{error}"))
            .header(WWW_AUTHENTICATE, "Basic realm=\"dray\"")
    }

    /// The response of the token endpoint. `seconds` is the token's lifetime.
    pub fn token(token: &str, seconds: u64) -> Self {
        let body = serde_json::json!({"token": token, "access_token": token, "expires_in": seconds});
        Self::with_bytes(StatusCode::OK, "application/json", body.to_string().into()).header(CACHE_CONTROL, "no-store")
    }

    /// 401: the credential is missing or was rejected, and a token would not help.
    pub fn credential_rejected(message: &str) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, message)
            .header(WWW_AUTHENTICATE, "Basic realm=\"dray\"")
    }

    /// 400: a malformed token request.
    pub fn malformed_token_request(message: &str) -> Self {
        Self::error(StatusCode::BAD_REQUEST, ErrorCode::Unsupported, message)
    }

    /// 400: a peer's operation lacks something.
    pub fn malformed_operation(problem: &str) -> Self {
        Self::error(StatusCode::BAD_REQUEST, ErrorCode::Unsupported, problem)
    }

    /// 404: a later release may know it.
    pub fn unknown_operation() -> Self {
        Self::error(StatusCode::NOT_FOUND, ErrorCode::Unsupported, "this release does not know the operation")
    }

    /// 401: a request on the peer port that is not authenticated.
    pub fn unauthenticated(unauthenticated: PeerAuthError) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, unauthenticated.as_str())
            .header(WWW_AUTHENTICATE, "dray-auth")
    }

    /// 307: the peer should use a less loaded holder.
    pub fn redirect(peer: std::net::SocketAddr) -> Self {
        let message = format!("{peer} is a less loaded holder");
        Self::error(StatusCode::TEMPORARY_REDIRECT, ErrorCode::Unavailable, &message)
            .header(LOCATION, &peer.to_string())
    }

    /// 307: the peer should download the range from the upstream, for all peers.
    pub fn delegate(span: Span) -> Self {
        let message = "download this range from the upstream, for all peers";
        Self::error(StatusCode::TEMPORARY_REDIRECT, ErrorCode::Unavailable, message)
            .with_peer_refusal(wire::PeerRefusal::Deputy(span))
    }

    /// Tells a peer that this node declines, not the upstream.
    fn with_peer_refusal(self, refusal: wire::PeerRefusal) -> Self {
        self.header(wire::REFUSAL, &refusal.text())
    }

    /// Adds headers for a peer.
    pub fn with_headers(mut self, headers: Vec<(HeaderName, HeaderValue)>) -> Self {
        self.headers.extend(headers);
        self
    }

    /// Removes the headers that are for peers only.
    pub fn for_clients(mut self) -> Self {
        self.headers.retain(|(name, _)| !name.as_str().starts_with(wire::PREFIX));
        if let Some(from) = self.from {
            self.headers.push((CACHE_STATUS, HeaderValue::from_static(cache_status(from))));
        }
        self
    }

    /// A manifest, or the requested range of it.
    pub fn manifest(found: &ManifestResponse, range: Option<RangeRequest>) -> Self {
        match BlobResponse::of_bytes(&found.object.bytes, range, found.from) {
            Ok(part) => {
                // A browser would run what an upstream labels as HTML or SVG.
                let stated = &*found.object.media_type;
                let media_type = if manifest::is_manifest_type(stated) { stated } else { BLOB_MEDIA_TYPE };
                let response = Self::content(part, &found.digest, media_type);
                match found.age {
                    Some(age) => response.header(AGE, &age.as_secs().to_string()),
                    None => response,
                }
            }
            Err(refusal) => Self::refusal(&refusal),
        }
    }

    pub fn blob(blob: BlobResponse, digest: &Digest) -> Self {
        Self::content(blob, digest, BLOB_MEDIA_TYPE)
    }

    /// `HEAD` of a blob: its length without its bytes.
    pub fn blob_length(length: u64, from: ServedFrom, digest: &Digest) -> Self {
        let blob = BlobResponse { total: length, extent: BlobExtent::Whole, from, body: Body::Memory(None) };
        Self::blob(blob, digest)
    }

    /// A list as the upstream sends it, with its link to the next page rewritten to this node.
    pub fn list(list: ListResponse, path: &str, namespace: Option<&str>) -> Self {
        let response = Self {
            status: StatusCode::OK,
            headers: Vec::with_capacity(8),
            body: list.body,
            from: Some(list.from),
            reason: None,
        };
        let response = response.header(CONTENT_TYPE, list.media_type);
        let response = match list.length {
            Some(length) => response.value(CONTENT_LENGTH, length.into()),
            None => response.value(TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
        };
        let response = match list.encoding {
            Some(encoding) => response.value(CONTENT_ENCODING, encoding),
            None => response,
        };
        let age = list.age.map(|age| (AGE, age.as_secs().to_string()));
        let link = list.next.map(|query| (LINK, next_page(&query, path, namespace)));
        let filters = list.filters_applied.map(|filters| (FILTERS_APPLIED, filters));
        [age, link, filters]
            .into_iter()
            .flatten()
            .fold(response, |response, (name, value)| response.header(name, &value))
    }

    /// Names the registry of the content.
    pub fn of_registry(self, registry: &Registry) -> Self {
        self.header(NAMESPACE, registry.as_str())
    }

    /// The response head, with the headers that every response has.
    pub fn head(&self, request_id: &str) -> ResponseHeader {
        // Pingora's `insert_header` would parse each name again.
        let (mut parts, ()) = http::Response::new(()).into_parts();
        parts.status = self.status;
        parts.headers.reserve(self.headers.len() + 3 + BROWSER_SECURITY_HEADERS.len());
        parts.headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        parts.headers.extend(BROWSER_SECURITY_HEADERS.map(|(name, value)| (name, HeaderValue::from_static(value))));
        parts.headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        if let Ok(id) = HeaderValue::from_str(request_id) {
            parts.headers.insert(REQUEST_ID, id);
        }
        if let Some(from) = self.from {
            parts.headers.insert(wire::SOURCE, HeaderValue::from_static(from.as_str()));
        }
        parts.into()
    }

    fn content(blob: BlobResponse, digest: &Digest, media_type: &str) -> Self {
        let BlobResponse { total, extent, from, body } = blob;
        let multipart_type;
        let (status, media_type, length) = match &extent {
            BlobExtent::Whole => (StatusCode::OK, media_type, total),
            BlobExtent::Part(span) => (StatusCode::PARTIAL_CONTENT, media_type, span.len()),
            BlobExtent::Parts(parts) => {
                multipart_type = parts.content_type();
                (StatusCode::PARTIAL_CONTENT, &*multipart_type, parts.content_length())
            }
        };
        let response = Self { status, headers: Vec::with_capacity(8), body, from: Some(from), reason: None }
            .header(CONTENT_TYPE, media_type)
            .value(CONTENT_LENGTH, length.into())
            .header(CONTENT_DIGEST, digest.as_str())
            .value(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        match extent {
            BlobExtent::Part(span) => response.header(CONTENT_RANGE, &span.content_range(total)),
            BlobExtent::Whole | BlobExtent::Parts(_) => response,
        }
    }

    /// An upstream's error with its own JSON body. Without one, `code` makes the body.
    fn upstream_error(error: &UpstreamError, code: ErrorCode) -> Self {
        let status = StatusCode::from_u16(status_for_client(error.status)).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let message = format!("the upstream responded with {error}");
        match error.json() {
            Some(json) => Self { reason: Some(message), ..Self::with_bytes(status, "application/json", json.clone()) },
            None => Self::error(status, code, &message),
        }
    }

    fn error(status: StatusCode, code: ErrorCode, message: &str) -> Self {
        let response = Self::with_bytes(status, "application/json", error::body(code, message).into());
        Self { reason: Some(message.to_owned()), ..response }
    }

    fn with_bytes(status: StatusCode, media_type: &str, bytes: Bytes) -> Self {
        let length = bytes.len().to_string();
        Self { status, headers: Vec::new(), body: Body::Memory(Some(bytes)), from: None, reason: None }
            .header(CONTENT_TYPE, media_type)
            .header(CONTENT_LENGTH, &length)
    }

    fn value(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Adds a header. A value that is not valid in a header is dropped: it came from an upstream.
    fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }
}

/// `Cache-Status` (RFC 9211): for clients and proxies that know no header of dray.
fn cache_status(from: ServedFrom) -> &'static str {
    match from {
        ServedFrom::Memory => "dray; hit; detail=memory",
        ServedFrom::Disk => "dray; hit; detail=disk",
        ServedFrom::Stale => "dray; hit; detail=stale",
        ServedFrom::Peer => "dray; fwd=miss; detail=peer",
        ServedFrom::Upstream => "dray; fwd=miss",
    }
}

/// The link to the next page on this node, with the query of the upstream's link.
fn next_page(query: &str, path: &str, namespace: Option<&str>) -> String {
    let mut query = link::without_namespace(query);
    if let Some(namespace) = namespace {
        let value: String = url::form_urlencoded::byte_serialize(namespace.as_bytes()).collect();
        query += &format!("{}ns={value}", if query.is_empty() { "" } else { "&" });
    }
    format!("<{path}?{query}>; rel=\"next\"")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::oci::INDEX_MEDIA_TYPE;
    use crate::provenance::Provenance;
    use crate::store::SmallObject;

    #[test]
    fn next_page_link_points_to_this_node() {
        let of = |query: &str, ns| next_page(query, "/v2/library/alpine/tags/list", ns);
        assert_eq!(
            of("last=a%2Bb&n=2", Some("reg.io:5000")),
            "</v2/library/alpine/tags/list?last=a%2Bb&n=2&ns=reg.io%3A5000>; rel=\"next\""
        );
        assert_eq!(
            of("next_page=gAAA%3D&ns=up.io", None),
            "</v2/library/alpine/tags/list?next_page=gAAA%3D>; rel=\"next\""
        );
    }

    #[test]
    fn upstream_error_body_is_passed_on_unchanged() {
        let body = br#"{"errors":[{"code":"NAME_UNKNOWN","message":"x"}]}"#;
        let error = UpstreamError::new(404, body);
        let response = PreparedResponse::refusal(&PullError::Upstream { error, code: ErrorCode::ManifestUnknown });
        assert_eq!(response.status, StatusCode::NOT_FOUND);
        assert!(matches!(&response.body, Body::Memory(Some(bytes)) if bytes[..] == body[..]));
    }

    #[test]
    fn manifest_with_foreign_media_type_is_sent_as_blob() {
        let (rule, registry, repository) = ("*".into(), "reg.io".into(), "a".into());
        let provenance = Arc::new(Provenance { rule, registry, repository });
        let response_of = |media_type: &str| {
            let object = SmallObject::new(media_type, provenance.clone(), b"<script>");
            let digest = Digest::of(b"<script>");
            ManifestResponse { digest, object, from: ServedFrom::Memory, age: None }
        };
        for (stated, sent) in [
            (INDEX_MEDIA_TYPE, INDEX_MEDIA_TYPE),
            (
                "application/vnd.docker.distribution.manifest.v2+json",
                "application/vnd.docker.distribution.manifest.v2+json",
            ),
            ("text/html", BLOB_MEDIA_TYPE),
            ("image/svg+xml", BLOB_MEDIA_TYPE),
            ("application/vnd.oci.image.manifest.v1+json;x=text/html", BLOB_MEDIA_TYPE),
        ] {
            let head = PreparedResponse::manifest(&response_of(stated), None).head("id");
            assert_eq!(head.headers["content-type"], sent);
            for (name, value) in BROWSER_SECURITY_HEADERS {
                assert_eq!(head.headers[name], value);
            }
        }
    }

    #[test]
    fn response_for_client_has_no_peer_headers() {
        let response = || PreparedResponse::refusal(&PullError::UpstreamUnreachable("x".into()));
        assert_eq!(response().head("id").headers[wire::REFUSAL], "no-upstream");
        assert!(response().for_clients().head("id").headers.get(wire::REFUSAL).is_none());
    }

    #[test]
    fn unavailable_response_has_no_retry_after() {
        let response = PreparedResponse::refusal(&PullError::Unavailable("x".into()));
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(response.head("id").headers.get("retry-after").is_none());
    }

    #[test]
    fn unsatisfiable_range_states_content_length() {
        let response = PreparedResponse::refusal(&PullError::Unsatisfiable { total: 7 });
        assert_eq!(response.status, StatusCode::RANGE_NOT_SATISFIABLE);
        assert_eq!(response.head("id").headers["content-range"], "bytes */7");
    }
}
