//! Responses of the clouds' token services.

use bytes::{Bytes, BytesMut};
use reqwest::{RequestBuilder, Response};
use serde::de::DeserializeOwned;

use crate::source::root_cause;

/// Characters of a service's own error message that are logged. Fewer: causes are cut off. More: whole pages get into
/// the log.
const MAX_MESSAGE_CHARS: usize = 500;

/// Bytes of a response that are read: tokens have a few KiB. A longer response is cut off and is not a valid token.
const MAX_RESPONSE_BYTES: usize = 256 * 1024;

/// Sends a request and parses the JSON of its response. Errors name the service and its error message, without the
/// secret in `sent`.
pub(super) async fn read_json<T: DeserializeOwned>(
    request: RequestBuilder,
    service: &str,
    sent: &str,
) -> Result<T, String> {
    let failed = |error: reqwest::Error| format!("{service}: {}", root_cause(&error.without_url()));
    let response = request.send().await.map_err(failed)?;
    let status = response.status();
    let bytes = read_bounded(response).await.map_err(failed)?;
    if !status.is_success() {
        return Err(format!("{service}: {status}{}", error_message(&bytes, sent)));
    }
    serde_json::from_slice(&bytes).map_err(|_| format!("{service}: the response is not a token"))
}

/// Reads a response up to `MAX_RESPONSE_BYTES`.
pub(super) async fn read_bounded(mut response: Response) -> reqwest::Result<Bytes> {
    let mut bytes = BytesMut::new();
    while bytes.len() < MAX_RESPONSE_BYTES
        && let Some(piece) = response.chunk().await?
    {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

/// The error message of Amazon (`message`), or of Microsoft and Google (`error_description`).
fn error_message(body: &[u8], sent: &str) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let texts = ["__type", "message", "Message", "error_description"].into_iter().filter_map(|key| body[key].as_str());
    let message: String = texts.map(|text| format!(": {text}")).collect();
    truncated(&if sent.is_empty() { message } else { message.replace(sent, "[secret]") })
}

/// The beginning of a service's message, which may be a whole page.
pub(super) fn truncated(text: &str) -> String {
    text.chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_message_of_each_cloud_is_found() {
        for (body, message) in [
            (&br#"{"__type":"AccessDenied","message":"not authorized"}"#[..], ": AccessDenied: not authorized"),
            (br#"{"error":"invalid_client","error_description":"AADSTS70021"}"#, ": AADSTS70021"),
            (br#"{"message":"bad hush"}"#, ": bad [secret]"),
            (b"<html>", ""),
            (br#"["x"]"#, ""),
        ] {
            assert_eq!(error_message(body, "hush"), message);
        }
        let long = format!(r#"{{"message":"{}"}}"#, "x".repeat(10_000));
        assert_eq!(error_message(long.as_bytes(), "").len(), MAX_MESSAGE_CHARS);
    }
}
