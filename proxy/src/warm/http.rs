//! The registry port of a dray as a source.

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, RANGE};
use http::{HeaderMap, HeaderValue, Method};
use reqwest::{Client, Response};
use tokio::time::timeout;
use url::Url;

use super::fetch::{self, READ_TIMEOUT};
use super::plan::PlannedBlob;
use super::source::{BlobStream, Chunks, FetchError, ImageSource};
use crate::bandwidth::{BACKGROUND, PRIORITY};
use crate::oci::{ImageName, MAX_MANIFEST_BYTES, Reference, accept};
use crate::source::root_cause;

/// A dray in another process.
pub struct HttpSource {
    client: Client,
    base: String,
    headers: HeaderMap,
}

impl HttpSource {
    /// `address` is `host:port` or a URL; `authorization` is the header to authenticate with.
    pub fn new(address: &str, authorization: Option<HeaderValue>) -> Result<Self, String> {
        let base = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let is_url = Url::parse(&base).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if !is_url {
            return Err(format!(
                "{address:?} is not a valid address: expected HOST:PORT or a URL, such as http://127.0.0.1:5050"
            ));
        }
        let client = Client::builder()
            .user_agent(concat!("dray-warm/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| root_cause(&error))?;
        let mut headers = HeaderMap::new();
        headers.extend(authorization.map(|value| (AUTHORIZATION, value)));
        // No client waits for what is warmed.
        headers.insert(PRIORITY, HeaderValue::from_static(BACKGROUND));
        Ok(Self { client, base: base.trim_end_matches('/').to_owned(), headers })
    }

    /// Waits until the address accepts connections; fails after some seconds.
    pub async fn wait_until_reachable(&self) -> Result<(), String> {
        let mut attempt = 0;
        loop {
            let request = self.client.get(format!("{}/v2/", self.base)).headers(self.headers.clone()).send();
            match timeout(READ_TIMEOUT, request).await {
                Ok(Err(error)) if error.is_connect() && attempt < fetch::MAX_RETRIES => {
                    fetch::pause(&mut attempt).await;
                }
                Ok(Err(error)) if error.is_connect() => {
                    return Err(format!("cannot connect to {}: {}", self.base, root_cause(&error.without_url())));
                }
                // Other errors are reported for each image.
                _ => return Ok(()),
            }
        }
    }

    async fn send(
        &self,
        method: Method,
        image: &ImageName,
        rest: &str,
        more: HeaderMap,
    ) -> Result<Response, FetchError> {
        let url = format!("{}/v2/{}/{rest}?ns={}", self.base, image.repository, image.registry);
        let request = self.client.request(method, url).headers(self.headers.clone()).headers(more).send();
        let response = match timeout(READ_TIMEOUT, request).await {
            Err(_) => return Err(FetchError::Temporary("timed out".to_owned())),
            Ok(Err(error)) => return Err(FetchError::Temporary(root_cause(&error.without_url()))),
            Ok(Ok(response)) => response,
        };
        let status = response.status().as_u16();
        match status {
            200 | 206 if source(&response).is_none() => {
                Err(FetchError::Permanent("the server is not a dray: its response has no x-dray-source".to_owned()))
            }
            200 | 206 => Ok(response),
            500.. | 408 | 429 => Err(FetchError::Temporary(error_text(status, response).await)),
            _ => Err(FetchError::Permanent(error_text(status, response).await)),
        }
    }
}

#[async_trait]
impl ImageSource for HttpSource {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, FetchError> {
        let accept = HeaderValue::from_str(&accept::merge(std::iter::empty())).ok();
        let accept = accept.map(|accept| (ACCEPT, accept)).into_iter().collect();
        let response = self.send(Method::GET, image, &format!("manifests/{reference}"), accept).await?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(FetchError::Permanent(
                "the manifest is too large, or its response has no content-length".to_owned(),
            ));
        }
        response.bytes().await.map_err(|error| FetchError::Temporary(root_cause(&error.without_url())))
    }

    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, FetchError> {
        let range = (from > 0).then(|| HeaderValue::from_str(&format!("bytes={from}-")).ok()).flatten();
        let headers = range.map(|range| (RANGE, range)).into_iter().collect();
        let response = self.send(Method::GET, &blob.image, &format!("blobs/{}", blob.digest), headers).await?;
        if from > 0 && response.status() != 206 {
            return Err(FetchError::Permanent(
                "the download cannot be resumed: the response ignores the range".to_owned(),
            ));
        }
        let was_cached = is_cached(&response);
        Ok(BlobStream { chunks: Chunks::Http(Box::new(response)), was_cached })
    }

    async fn is_cached(&self, blob: &PlannedBlob) -> Result<bool, FetchError> {
        let path = format!("blobs/{}", blob.digest);
        let response = self.send(Method::HEAD, &blob.image, &path, HeaderMap::new()).await?;
        Ok(is_cached(&response))
    }

    /// The dray that receives the request forwards it to the owner.
    fn is_responsible_for(&self, _: &PlannedBlob) -> bool {
        true
    }
}

/// The source that dray reports; None for a server that is not a dray.
fn source(response: &Response) -> Option<&str> {
    response.headers().get("x-dray-source")?.to_str().ok()
}

fn is_cached(response: &Response) -> bool {
    matches!(source(response), Some("memory" | "disk"))
}

/// The status and the message of an error response.
async fn error_text(status: u16, response: Response) -> String {
    let body = timeout(READ_TIMEOUT, response.bytes()).await.ok().and_then(Result::ok).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let first = &json["errors"][0];
    match first["message"].as_str().filter(|message| !message.is_empty()).or(first["code"].as_str()) {
        Some(message) => format!("{status}: {message}"),
        None => format!("status {status}"),
    }
}
