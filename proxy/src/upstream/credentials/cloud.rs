//! Responses of the clouds' token services.

use bytes::{Bytes, BytesMut};
use reqwest::{RequestBuilder, Response};
use serde::de::DeserializeOwned;

use crate::source::root_cause;

/// Characters of a service's own error message that are logged.
const MAX_REASON: usize = 500;

/// Most that is read of a response, in bytes: tokens have some KiB.
const MAX_BYTES: usize = 256 * 1024;

/// Sends a request and parses the JSON of its response. Errors name the service and its reason, without the secret that was sent.
pub(super) async fn read_json<T: DeserializeOwned>(
    request: RequestBuilder,
    service: &str,
    sent: &str,
) -> Result<T, String> {
    let failed = |error: reqwest::Error| format!("{service}: {}", root_cause(&error.without_url()));
    let response = request.send().await.map_err(failed)?;
    let status = response.status();
    let bytes = read_some(response).await.map_err(failed)?;
    if !status.is_success() {
        return Err(format!("{service}: {status}{}", reason(&bytes, sent)));
    }
    serde_json::from_slice(&bytes).map_err(|_| format!("{service}: the response is not a token"))
}

/// A response, up to a length that none of them has.
pub(super) async fn read_some(mut response: Response) -> reqwest::Result<Bytes> {
    let mut bytes = BytesMut::new();
    while bytes.len() < MAX_BYTES
        && let Some(piece) = response.chunk().await?
    {
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

/// Why a request was refused, as Amazon (`message`), Microsoft and Google (`error_description`) say it.
fn reason(body: &[u8], sent: &str) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let texts = ["__type", "message", "Message", "error_description"].into_iter().filter_map(|key| body[key].as_str());
    let told: String = texts.map(|text| format!(": {text}")).collect();
    cut(&if sent.is_empty() { told } else { told.replace(sent, "[secret]") })
}

/// The beginning of what a service says: it may be a whole page.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(MAX_REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_of_each_cloud_is_told() {
        for (body, told) in [
            (&br#"{"__type":"AccessDenied","message":"not authorized"}"#[..], ": AccessDenied: not authorized"),
            (br#"{"error":"invalid_client","error_description":"AADSTS70021"}"#, ": AADSTS70021"),
            (br#"{"message":"who is hush?"}"#, ": who is [secret]?"),
            (b"<html>", ""),
            (br#"["x"]"#, ""),
        ] {
            assert_eq!(reason(body, "hush"), told);
        }
        let long = format!(r#"{{"message":"{}"}}"#, "x".repeat(10_000));
        assert_eq!(reason(long.as_bytes(), "").len(), MAX_REASON);
    }
}
