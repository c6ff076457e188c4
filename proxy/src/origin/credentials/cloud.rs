//! Responses of the clouds' token services.

use reqwest::RequestBuilder;
use serde::de::DeserializeOwned;

use crate::source::root_cause;

/// Characters of a service's own error message that are logged.
const MAX_REASON: usize = 500;

/// Sends a request and parses the JSON of its response. Errors name the service and its reason.
pub(super) async fn read_json<T: DeserializeOwned>(request: RequestBuilder, service: &str) -> Result<T, String> {
    let failed = |error: reqwest::Error| format!("{service}: {}", root_cause(&error.without_url()));
    let response = request.send().await.map_err(failed)?;
    let status = response.status();
    let bytes = response.bytes().await.map_err(failed)?;
    if !status.is_success() {
        return Err(format!("{service}: {status}{}", reason(&bytes)));
    }
    serde_json::from_slice(&bytes).map_err(|_| format!("{service}: the response is not a token"))
}

/// Why a request was refused, as Amazon (`message`), Microsoft and Google (`error_description`) say it.
fn reason(body: &[u8]) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let texts = ["__type", "message", "Message", "error_description"].into_iter().filter_map(|key| body[key].as_str());
    texts.map(|text| format!(": {}", text.chars().take(MAX_REASON).collect::<String>())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_of_each_cloud_is_told() {
        for (body, told) in [
            (&br#"{"__type":"AccessDenied","message":"not authorized"}"#[..], ": AccessDenied: not authorized"),
            (br#"{"error":"invalid_client","error_description":"AADSTS70021"}"#, ": AADSTS70021"),
            (b"<html>", ""),
            (br#"["x"]"#, ""),
        ] {
            assert_eq!(reason(body), told);
        }
        let long = format!(r#"{{"message":"{}"}}"#, "x".repeat(10_000));
        assert_eq!(reason(long.as_bytes()).len(), MAX_REASON + 2);
    }
}
