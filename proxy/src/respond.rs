//! Answers: status, headers and body of everything a registry client can get.
//!
//! Only this file knows which status a refusal has. Lengths of manifests and blobs are always known: containerd takes a
//! missing length for an unknown size. Only lists may be sent in chunks.

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, AGE, ALLOW, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, LINK, LOCATION, TRANSFER_ENCODING, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderName, HeaderValue, StatusCode};
use pingora::http::ResponseHeader;

use crate::oci::route::RouteError;
use crate::oci::{BLOB_MEDIA_TYPE, Digest, ErrorCode, RangeRequest, Registry, Span, error, link, manifest};
use crate::peers::{PeerAuthError, wire};
use crate::pull::{BlobExtent, BlobResponse, Body, ListResponse, ManifestResponse, PullError, status_for_client};
use crate::source::{ServedFrom, UpstreamError};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const NAMESPACE: HeaderName = HeaderName::from_static("oci-namespace");
const FILTERS_APPLIED: HeaderName = HeaderName::from_static("oci-filters-applied");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// Keeps content from running in a browser, whatever an upstream calls it: nothing that is served here is a page.
const OF_BROWSERS: [(HeaderName, &str); 3] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'"),
    (CONTENT_DISPOSITION, "attachment"),
];

/// What a client has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PresentedToken {
    None,
    /// A token that is none, or is too old (RFC 6750, section 3.1).
    Invalid,
}

/// An answer, ready to be written.
pub struct PreparedResponse {
    pub status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Body,
    /// Where its content came from; None: it has none.
    pub from: Option<ServedFrom>,
    /// Why there is none, for the log.
    pub reason: Option<String>,
}

impl PreparedResponse {
    /// `GET /v2/`
    pub fn ping() -> Self {
        Self::with_bytes(StatusCode::OK, "application/json", Bytes::from_static(b"{}"))
    }

    pub fn refusal(refusal: &PullError) -> Self {
        match refusal {
            PullError::Upstream { error, code } => Self::upstream_error(error, *code),
            PullError::NotFound { code, message } => Self::error(StatusCode::NOT_FOUND, *code, message),
            PullError::Denied(message) => Self::error(StatusCode::FORBIDDEN, ErrorCode::Denied, message),
            // Never 408 or 429: containerd repeats those at once. And without Retry-After, for
            // which podman would wait instead of asking elsewhere.
            PullError::Unavailable(message) | PullError::Limited(message) => {
                Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, message)
            }
            // Peers have to know what is the origin's word, and what is not.
            PullError::NoWay(message) => Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, message)
                .refused_by_peer(wire::PeerRefusal::NoUpstream),
            PullError::Guarded(message) => Self::error(StatusCode::FORBIDDEN, ErrorCode::Denied, message)
                .refused_by_peer(wire::PeerRefusal::NoUpstream),
            PullError::Busy => {
                Self::error(StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable, "too many requests at once")
                    .refused_by_peer(wire::PeerRefusal::Overloaded)
            }
            PullError::BadOrigin(message) => Self::error(StatusCode::BAD_GATEWAY, ErrorCode::Unavailable, message),
            // What HTTP has for a question that was only for what a cache has.
            PullError::NotKept => {
                Self::error(StatusCode::GATEWAY_TIMEOUT, ErrorCode::Unavailable, "only-if-cached: it is not")
            }
            PullError::Unsatisfiable { total } => {
                let message = format!("the body has {total} bytes");
                Self::error(StatusCode::RANGE_NOT_SATISFIABLE, ErrorCode::RangeInvalid, &message)
                    .header(CONTENT_RANGE, &format!("bytes */{total}"))
            }
        }
    }

    pub fn route_error(error: &RouteError) -> Self {
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::NOT_FOUND);
        Self::error(status, error.code, &error.message)
    }

    /// Anything but GET and HEAD.
    pub fn read_only() -> Self {
        Self::error(
            StatusCode::METHOD_NOT_ALLOWED,
            ErrorCode::Unsupported,
            "this is a pull-through cache: push to the registry itself",
        )
        .header(ALLOW, "GET, HEAD")
    }

    /// Who are you? Bearer for those who know it (RFC 6750, and the distribution's token protocol), Basic for others.
    pub fn challenge(realm: &str, service: &str, repository: Option<&str>, shown: PresentedToken) -> Self {
        let scope = repository.map(|name| format!(",scope=\"repository:{name}:pull\"")).unwrap_or_default();
        let error = if shown == PresentedToken::Invalid { ",error=\"invalid_token\"" } else { "" };
        let message = "this needs the rights that you have at the registry itself";
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, message)
            .header(WWW_AUTHENTICATE, &format!("Bearer realm=\"{realm}\",service=\"{service}\"{scope}{error}"))
            .header(WWW_AUTHENTICATE, "Basic realm=\"dray\"")
    }

    /// A token for a client, good for so many seconds.
    pub fn token(token: &str, seconds: u64) -> Self {
        let body = serde_json::json!({"token": token, "access_token": token, "expires_in": seconds});
        Self::with_bytes(StatusCode::OK, "application/json", body.to_string().into()).header(CACHE_CONTROL, "no-store")
    }

    /// The registry does not take a secret.
    pub fn wrong_secret(message: &str) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, message)
            .header(WWW_AUTHENTICATE, "Basic realm=\"dray\"")
    }

    /// A question for a token that is not understood.
    pub fn no_token(message: &str) -> Self {
        Self::error(StatusCode::BAD_REQUEST, ErrorCode::Unsupported, message)
    }

    /// Whoever asks on the peers' port does not prove who it is.
    pub fn unproven(unproven: PeerAuthError) -> Self {
        Self::error(StatusCode::UNAUTHORIZED, ErrorCode::Unauthorized, unproven.as_str())
            .header(WWW_AUTHENTICATE, "dray-auth")
    }

    /// Another peer has it, and is less busy.
    pub fn redirect(peer: std::net::SocketAddr) -> Self {
        let message = format!("{peer} has it as well");
        Self::error(StatusCode::TEMPORARY_REDIRECT, ErrorCode::Unavailable, &message)
            .header(LOCATION, &peer.to_string())
    }

    /// A peer had better fetch it from the origin itself.
    pub fn depute(span: Span) -> Self {
        let message = "fetch this from the origin, for all of us";
        Self::error(StatusCode::TEMPORARY_REDIRECT, ErrorCode::Unavailable, message)
            .refused_by_peer(wire::PeerRefusal::Deputy(span))
    }

    /// Tells a peer that it is this node which declines, and not the upstream.
    fn refused_by_peer(self, refusal: wire::PeerRefusal) -> Self {
        self.header(wire::REFUSAL, &refusal.text())
    }

    /// What a peer hears beside the answer.
    pub fn telling(mut self, headers: Vec<(HeaderName, HeaderValue)>) -> Self {
        self.headers.extend(headers);
        self
    }

    /// The same without what only peers are to know.
    pub fn for_clients(mut self) -> Self {
        self.headers.retain(|(name, _)| !name.as_str().starts_with(wire::PREFIX));
        self
    }

    /// A manifest, or the part of it that a range means.
    pub fn manifest(answer: &ManifestResponse, range: Option<RangeRequest>) -> Self {
        match BlobResponse::of_bytes(&answer.object.bytes, range, answer.from) {
            Ok(part) => {
                // A browser would show, and run, what an upstream calls a page or an image.
                let stated = &*answer.object.media_type;
                let media_type = if manifest::is_manifest_type(stated) { stated } else { BLOB_MEDIA_TYPE };
                let reply = Self::content(part, &answer.digest, media_type);
                match answer.age {
                    Some(age) => reply.header(AGE, &age.as_secs().to_string()),
                    None => reply,
                }
            }
            Err(refusal) => Self::refusal(&refusal),
        }
    }

    pub fn blob(answer: BlobResponse, digest: &Digest) -> Self {
        Self::content(answer, digest, BLOB_MEDIA_TYPE)
    }

    /// `HEAD` of a blob: its length without its bytes.
    pub fn blob_length(length: u64, from: ServedFrom, digest: &Digest) -> Self {
        let answer = BlobResponse { total: length, extent: BlobExtent::Whole, from, body: Body::Memory(None) };
        Self::blob(answer, digest)
    }

    /// A list as it comes, with its link to the next page led back here.
    pub fn list(answer: ListResponse, path: &str, namespace: Option<&str>) -> Self {
        let reply = Self {
            status: StatusCode::OK,
            headers: Vec::with_capacity(8),
            body: answer.body,
            from: Some(answer.from),
            reason: None,
        };
        let reply = reply.header(CONTENT_TYPE, answer.media_type);
        let reply = match answer.length {
            Some(length) => reply.value(CONTENT_LENGTH, length.into()),
            None => reply.value(TRANSFER_ENCODING, HeaderValue::from_static("chunked")),
        };
        let reply = match answer.encoding {
            Some(encoding) => reply.value(CONTENT_ENCODING, encoding),
            None => reply,
        };
        let age = answer.age.map(|age| (AGE, age.as_secs().to_string()));
        let link = answer.next.map(|query| (LINK, next_page(&query, path, namespace)));
        let filters = answer.filters_applied.map(|filters| (FILTERS_APPLIED, filters));
        [age, link, filters].into_iter().flatten().fold(reply, |reply, (name, value)| reply.header(name, &value))
    }

    /// Says which registry the content belongs to.
    pub fn of_registry(self, registry: &Registry) -> Self {
        self.header(NAMESPACE, registry.as_str())
    }

    /// The head as it is sent, with what every answer has.
    pub fn head(&self, request_id: &str) -> ResponseHeader {
        // Pingora's own way to add a header reads the name anew each time.
        let (mut parts, ()) = http::Response::new(()).into_parts();
        parts.status = self.status;
        parts.headers.reserve(self.headers.len() + 3 + OF_BROWSERS.len());
        parts.headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        parts.headers.extend(OF_BROWSERS.map(|(name, value)| (name, HeaderValue::from_static(value))));
        parts.headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        if let Ok(id) = HeaderValue::from_str(request_id) {
            parts.headers.insert(REQUEST_ID, id);
        }
        if let Some(from) = self.from {
            parts.headers.insert(wire::SOURCE, HeaderValue::from_static(from.as_str()));
        }
        parts.into()
    }

    fn content(answer: BlobResponse, digest: &Digest, media_type: &str) -> Self {
        let BlobResponse { total, extent, from, body } = answer;
        let multipart_type;
        let (status, media_type, length) = match &extent {
            BlobExtent::Whole => (StatusCode::OK, media_type, total),
            BlobExtent::Part(span) => (StatusCode::PARTIAL_CONTENT, media_type, span.len()),
            BlobExtent::Parts(parts) => {
                multipart_type = parts.content_type();
                (StatusCode::PARTIAL_CONTENT, &*multipart_type, parts.content_length())
            }
        };
        let reply = Self { status, headers: Vec::with_capacity(8), body, from: Some(from), reason: None }
            .header(CONTENT_TYPE, media_type)
            .value(CONTENT_LENGTH, length.into())
            .header(CONTENT_DIGEST, digest.as_str())
            .value(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        match extent {
            BlobExtent::Part(span) => reply.header(CONTENT_RANGE, &span.content_range(total)),
            BlobExtent::Whole | BlobExtent::Parts(_) => reply,
        }
    }

    /// An upstream's error as it made it. `code` stands for a body without one.
    fn upstream_error(error: &UpstreamError, code: ErrorCode) -> Self {
        let status = StatusCode::from_u16(status_for_client(error.status)).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let message = format!("the upstream answered {error}");
        match error.json() {
            Some(json) => Self { reason: Some(message), ..Self::with_bytes(status, "application/json", json.clone()) },
            None => Self::error(status, code, &message),
        }
    }

    fn error(status: StatusCode, code: ErrorCode, message: &str) -> Self {
        let reply = Self::with_bytes(status, "application/json", error::body(code, message).into());
        Self { reason: Some(message.to_owned()), ..reply }
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

    /// Adds a header. A value that fits no header is left out: it came from an origin.
    fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }
}

/// A link to the next page here, by the query that the upstream's link has.
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
    fn next_page_leads_back_here() {
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
    fn error_of_an_upstream_is_passed_on_as_it_came() {
        let body = br#"{"errors":[{"code":"NAME_UNKNOWN","message":"x"}]}"#;
        let error = UpstreamError::new(404, body);
        let reply = PreparedResponse::refusal(&PullError::Upstream { error, code: ErrorCode::ManifestUnknown });
        assert_eq!(reply.status, StatusCode::NOT_FOUND);
        assert!(matches!(&reply.body, Body::Memory(Some(bytes)) if bytes[..] == body[..]));
    }

    #[test]
    fn nothing_runs_in_a_browser_and_manifests_have_types_of_manifests() {
        let (rule, registry, repository) = ("*".into(), "reg.io".into(), "a".into());
        let provenance = Arc::new(Provenance { rule, registry, repository });
        let answer = |media_type: &str| {
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
            let head = PreparedResponse::manifest(&answer(stated), None).head("id");
            assert_eq!(head.headers["content-type"], sent);
            for (name, value) in OF_BROWSERS {
                assert_eq!(head.headers[name], value);
            }
        }
    }

    #[test]
    fn clients_are_not_told_what_is_for_peers() {
        let reply = || PreparedResponse::refusal(&PullError::NoWay("x".into()));
        assert_eq!(reply().head("id").headers[wire::REFUSAL], "no-upstream");
        assert!(reply().for_clients().head("id").headers.get(wire::REFUSAL).is_none());
    }

    #[test]
    fn an_outage_never_makes_a_client_hammer() {
        let reply = PreparedResponse::refusal(&PullError::Unavailable("x".into()));
        assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(reply.head("id").headers.get("retry-after").is_none());
    }

    #[test]
    fn an_unsatisfiable_range_says_how_long_the_body_is() {
        let reply = PreparedResponse::refusal(&PullError::Unsatisfiable { total: 7 });
        assert_eq!(reply.status, StatusCode::RANGE_NOT_SATISFIABLE);
        assert_eq!(reply.head("id").headers["content-range"], "bytes */7");
    }
}
