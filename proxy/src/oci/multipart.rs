//! Several ranges in one response: `multipart/byteranges` (RFC 9110 section 14.6).

use super::{BLOB_MEDIA_TYPE, Span};

/// The framing of the ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Multipart {
    boundary: String,
    total: u64,
    spans: Vec<Span>,
}

impl Multipart {
    /// For these parts of a blob of `total` bytes. The author of the blob must not be able to guess the boundary, or
    /// the blob could contain it.
    pub fn new(boundary: String, total: u64, spans: Vec<Span>) -> Self {
        Self { boundary, total, spans }
    }

    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The value of `Content-Type`.
    pub fn content_type(&self) -> String {
        format!("multipart/byteranges; boundary={}", self.boundary)
    }

    /// The value of `Content-Length`: all parts with their framing.
    pub fn content_length(&self) -> u64 {
        let parts = self.spans.iter().map(|span| self.head(*span).len() as u64 + span.len());
        parts.sum::<u64>() + self.end().len() as u64
    }

    /// The bytes before a part.
    pub fn head(&self, span: Span) -> String {
        let Self { boundary, total, .. } = self;
        let range = span.content_range(*total);
        format!("\r\n--{boundary}\r\nContent-Type: {BLOB_MEDIA_TYPE}\r\nContent-Range: {range}\r\n\r\n")
    }

    /// The bytes after the last part.
    pub fn end(&self) -> String {
        format!("\r\n--{}--\r\n", self.boundary)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framing_follows_the_rfc() {
        let spans = vec![Span { start: 0, end: 2 }, Span { start: 5, end: 6 }];
        let parts = Multipart::new("SEP".into(), 8, spans.clone());
        let bytes = ["xx", "x"];
        let parts_text: String = spans.iter().zip(bytes).map(|(span, bytes)| parts.head(*span) + bytes).collect();
        let text = parts_text + &parts.end();
        assert_eq!(
            text,
            "\r\n--SEP\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes 0-1/8\r\n\r\nxx\
             \r\n--SEP\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes 5-5/8\r\n\r\nx\
             \r\n--SEP--\r\n"
        );
        assert_eq!(parts.content_length(), text.len() as u64);
    }
}
