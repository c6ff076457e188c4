//! An error response as the upstream registry sent it: the status and code reach the client unchanged, because clients
//! branch on them.

use bytes::Bytes;
use reqwest::Response;
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::SourceError;
use crate::times::ALTERNATIVE_TIMEOUT;

/// Status and `errors` body of an upstream's response without content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamError {
    pub status: u16,
    body: Option<ErrorBody>,
}

/// An error body of the distribution specification: `{"errors": [{"code", "message"}]}`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ErrorBody {
    json: Bytes,
    /// Code and message of the first error, for dray's messages and log.
    code: String,
    message: String,
}

/// Longest error body that is passed on, in bytes; a longer one is cut to its first error. Larger: cached errors take
/// more memory. Smaller: details are lost; registries need a few hundred bytes.
const MAX_BODY_BYTES: usize = 2048;

/// Longest code and message of a body that is cut, in characters. Larger: the cut body may exceed [`MAX_BODY_BYTES`].
const MAX_TEXT_CHARS: usize = 256;

/// Bytes of an error body that are read. Larger: more memory for each failed request. Smaller: long error bodies lose
/// their code; web pages are dropped in any case.
const MAX_READ_BYTES: usize = 64 * 1024;

impl SourceError {
    /// The error of a response without content, from an upstream or from a peer that relays an upstream.
    pub async fn of_response(mut response: Response, deadline: Instant) -> Self {
        let deadline = deadline.min(Instant::now() + ALTERNATIVE_TIMEOUT);
        let mut body = Vec::new();
        while let Ok(Ok(Some(piece))) = timeout_at(deadline, response.chunk()).await
            && body.len() + piece.len() <= MAX_READ_BYTES
        {
            body.extend_from_slice(&piece);
        }
        let error = UpstreamError::new(response.status().as_u16(), &body);
        match error.status {
            404 | 410 => Self::NotFound(error),
            401 | 403 => Self::Denied(error),
            _ => Self::Failed(error),
        }
    }
}

impl UpstreamError {
    /// A response without a valid error body.
    pub fn of_status(status: u16) -> Self {
        Self { status, body: None }
    }

    /// A response with this body, which is dropped if it is not error JSON, such as a web page.
    pub fn new(status: u16, body: &[u8]) -> Self {
        Self { status, body: ErrorBody::parse(body) }
    }

    /// The body to pass on to the client.
    pub fn json(&self) -> Option<&Bytes> {
        self.body.as_ref().map(|body| &body.json)
    }

    /// The first error's code, such as `NAME_UNKNOWN`.
    pub fn code(&self) -> Option<&str> {
        self.body.as_ref().map(|body| body.code.as_str())
    }

    /// The same error with a status that fits the request of the client better.
    pub fn with_status(self, status: u16) -> Self {
        Self { status, ..self }
    }
}

impl std::fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.status)?;
        match &self.body {
            Some(ErrorBody { code, message, .. }) if message.is_empty() => write!(f, " {code}"),
            Some(ErrorBody { code, message, .. }) => write!(f, " {code}: {message}"),
            None => Ok(()),
        }
    }
}

impl ErrorBody {
    fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct ErrorsShape {
            errors: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            code: Option<String>,
            message: Option<String>,
        }
        let first = serde_json::from_slice::<ErrorsShape>(body).ok()?.errors.into_iter().next()?;
        let text = |text: Option<String>| text.unwrap_or_default().chars().take(MAX_TEXT_CHARS).collect::<String>();
        let (code, message) = (text(first.code), text(first.message));
        let json = if body.len() <= MAX_BODY_BYTES {
            Bytes::copy_from_slice(body)
        } else {
            serde_json::json!({"errors": [{"code": &code, "message": &message}]}).to_string().into()
        };
        Some(Self { json, code, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_body_is_passed_on_unchanged() {
        let body = br#"{"errors":[{"code":"TOO_MANY_TAGS_REQUESTED","message":"n is too large","detail":{"n":7}}]}"#;
        let error = UpstreamError::new(413, body);
        assert_eq!(error.json().map(|json| &json[..]), Some(&body[..]));
        assert_eq!(error.code(), Some("TOO_MANY_TAGS_REQUESTED"));
        assert_eq!(error.to_string(), "413 TOO_MANY_TAGS_REQUESTED: n is too large");
    }

    #[test]
    fn body_of_another_shape_is_dropped() {
        let bodies: [&[u8]; 6] =
            [b"", b"<html>", b"{}", b"[]", br#"{"errors": []}"#, br#"{"errors": "x", "message": "y"}"#];
        for body in bodies {
            assert_eq!(UpstreamError::new(404, body), UpstreamError::of_status(404));
        }
        assert_eq!(UpstreamError::new(404, br#"{"errors": [{"code": null}]}"#).code(), Some(""));
    }

    #[test]
    fn long_body_is_cut_to_its_first_error() {
        let long = "x".repeat(5000);
        let body = serde_json::json!({"errors": [{"code": "DENIED", "message": long, "detail": long}]}).to_string();
        let error = UpstreamError::new(403, body.as_bytes());
        assert!(error.json().unwrap().len() < MAX_BODY_BYTES);
        assert_eq!(error.code(), Some("DENIED"));
    }
}
