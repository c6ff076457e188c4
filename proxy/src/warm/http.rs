//! A dray's registry port.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, RANGE};
use http::{HeaderMap, HeaderValue, Method};
use reqwest::{Client, Response};
use tokio::time::timeout;
use url::Url;

use super::fetch;
use super::plan::PlannedBlob;
use super::source::{BlobStream, Failed, ImageSource, Pieces};
use crate::oci::{ImageName, MAX_MANIFEST_BYTES, Reference, accept};
use crate::source::root_cause;

/// Somewhere else than in this process.
pub struct HttpSource {
    client: Client,
    base: String,
    headers: HeaderMap,
}

/// dray holds some questions for a minute.
const PATIENCE: Duration = Duration::from_secs(90);

impl HttpSource {
    /// `base` is such as `http://127.0.0.1:5050`; `authorization` what is shown there, if anything is wanted.
    pub fn new(base: &str, authorization: Option<HeaderValue>) -> Result<Self, String> {
        let base = if base.contains("://") { base.to_owned() } else { format!("http://{base}") };
        let is_url = Url::parse(&base).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        if !is_url {
            return Err(format!("{base:?} is no address of a dray: write it as http://127.0.0.1:5050"));
        }
        let client = Client::builder()
            .user_agent(concat!("dray-warm/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| root_cause(&error))?;
        let mut headers = HeaderMap::new();
        headers.extend(authorization.map(|value| (AUTHORIZATION, value)));
        Ok(Self { client, base: base.trim_end_matches('/').to_owned(), headers })
    }

    /// Whether anybody listens there, if need be in some seconds. An error says why not.
    pub async fn is_there(&self) -> Result<(), String> {
        let mut attempt = 0;
        loop {
            let asked = self.client.get(format!("{}/v2/", self.base)).headers(self.headers.clone()).send();
            match timeout(PATIENCE, asked).await {
                Ok(Err(error)) if error.is_connect() && attempt < fetch::RETRIES => fetch::pause(&mut attempt).await,
                Ok(Err(error)) if error.is_connect() => {
                    return Err(format!("no dray at {}: {}", self.base, root_cause(&error.without_url())));
                }
                // Whatever else is wrong is told of each image.
                _ => return Ok(()),
            }
        }
    }

    async fn ask(&self, method: Method, image: &ImageName, rest: &str, more: HeaderMap) -> Result<Response, Failed> {
        let url = format!("{}/v2/{}/{rest}?ns={}", self.base, image.repository, image.registry);
        let asked = self.client.request(method, url).headers(self.headers.clone()).headers(more).send();
        let response = match timeout(PATIENCE, asked).await {
            Err(_) => return Err(Failed::Passing("no answer in time".to_owned())),
            Ok(Err(error)) => return Err(Failed::Passing(root_cause(&error.without_url()))),
            Ok(Ok(response)) => response,
        };
        let status = response.status().as_u16();
        match status {
            200 | 206 if source(&response).is_none() => Err(Failed::ForGood(
                "whoever answers there is no dray: it does not say where it has it from".to_owned(),
            )),
            200 | 206 => Ok(response),
            500.. | 408 | 429 => Err(Failed::Passing(said(status, response).await)),
            _ => Err(Failed::ForGood(said(status, response).await)),
        }
    }
}

#[async_trait]
impl ImageSource for HttpSource {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, Failed> {
        let accept = HeaderValue::from_str(&accept::merge(std::iter::empty())).ok();
        let accept = accept.map(|accept| (ACCEPT, accept)).into_iter().collect();
        let response = self.ask(Method::GET, image, &format!("manifests/{reference}"), accept).await?;
        if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
            return Err(Failed::ForGood("a manifest without an acceptable length".to_owned()));
        }
        response.bytes().await.map_err(|error| Failed::Passing(root_cause(&error.without_url())))
    }

    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, Failed> {
        let range = (from > 0).then(|| HeaderValue::from_str(&format!("bytes={from}-")).ok()).flatten();
        let headers = range.map(|range| (RANGE, range)).into_iter().collect();
        let response = self.ask(Method::GET, &blob.image, &format!("blobs/{}", blob.digest), headers).await?;
        if from > 0 && response.status() != 206 {
            return Err(Failed::ForGood("it cannot be gone on with".to_owned()));
        }
        let was_kept = is_kept(&response);
        Ok(BlobStream { pieces: Pieces::Http(Box::new(response)), was_kept })
    }

    async fn keeps(&self, blob: &PlannedBlob) -> Result<bool, Failed> {
        let path = format!("blobs/{}", blob.digest);
        let response = self.ask(Method::HEAD, &blob.image, &path, HeaderMap::new()).await?;
        Ok(is_kept(&response))
    }

    /// Whoever is asked sees to where it belongs.
    fn wants(&self, _: &PlannedBlob) -> bool {
        true
    }
}

/// Where a dray has it from.
fn source(response: &Response) -> Option<&str> {
    response.headers().get("x-dray-source")?.to_str().ok()
}

fn is_kept(response: &Response) -> bool {
    matches!(source(response), Some("memory" | "disk"))
}

/// What dray says of it.
async fn said(status: u16, response: Response) -> String {
    let body = timeout(PATIENCE, response.bytes()).await.ok().and_then(Result::ok).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let first = &json["errors"][0];
    match first["message"].as_str().filter(|message| !message.is_empty()).or(first["code"].as_str()) {
        Some(message) => format!("{status}: {message}"),
        None => format!("status {status}"),
    }
}
