//! Manifests and blobs through a dray, checked as they come, gone on with where they broke.

use std::time::Duration;

use http::header::{ACCEPT, RANGE};
use http::{HeaderMap, HeaderValue};
use reqwest::{Client, Response};
use tokio::time::{sleep, timeout};

use super::plan::Blob;
use crate::oci::{ImageName, MAX_MANIFEST_BYTES, Reference, Verifier, accept};
use crate::source::error_chain;

/// Where images are pulled: a dray's registry listener.
pub struct Door {
    client: Client,
    base: String,
    headers: HeaderMap,
}

/// A blob that came whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub bytes: u64,
    /// It was there before.
    pub was_kept: bool,
}

/// Tries beyond the first, in a row without a byte, each after a longer pause.
const RETRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// dray holds some questions for a minute.
const PATIENCE: Duration = Duration::from_secs(90);

impl Door {
    /// `base` is such as `http://127.0.0.1:5050`; `authorization` what is shown there, if anything is wanted.
    pub fn new(base: &str, authorization: Option<HeaderValue>) -> Result<Self, String> {
        let client = Client::builder()
            .user_agent(concat!("dray-warm/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| error_chain(&error))?;
        let mut headers = HeaderMap::new();
        headers.extend(authorization.map(|value| (http::header::AUTHORIZATION, value)));
        Ok(Self { client, base: base.trim_end_matches('/').to_owned(), headers })
    }

    async fn get(&self, image: &ImageName, rest: &str, more: HeaderMap) -> Result<Response, Failed> {
        let url = format!("{}/v2/{}/{rest}?ns={}", self.base, image.repository, image.registry);
        let asked = self.client.get(url).headers(self.headers.clone()).headers(more).send();
        let response = match timeout(PATIENCE, asked).await {
            Err(_) => return Err(Failed::Passing("no answer in time".to_owned())),
            Ok(Err(error)) => return Err(Failed::Passing(error_chain(&error.without_url()))),
            Ok(Ok(response)) => response,
        };
        let status = response.status().as_u16();
        match status {
            200 | 206 => Ok(response),
            500.. | 408 | 429 => Err(Failed::Passing(said(status, response).await)),
            _ => Err(Failed::ForGood(said(status, response).await)),
        }
    }
}

/// Why there is nothing, and whether to try again.
enum Failed {
    Passing(String),
    ForGood(String),
}

/// What dray says of it.
async fn said(status: u16, response: Response) -> String {
    let body = timeout(PATIENCE, response.bytes()).await.ok().and_then(Result::ok).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    match json["errors"][0]["message"].as_str() {
        Some(message) => format!("{status}: {message}"),
        None => format!("status {status}"),
    }
}

pub(super) async fn manifest(door: &Door, image: &ImageName, reference: &Reference) -> Result<Vec<u8>, String> {
    let mut attempt = 0;
    loop {
        match manifest_once(door, image, reference).await {
            Ok(bytes) => return Ok(bytes),
            Err(Failed::Passing(_)) if attempt < RETRIES => pause(&mut attempt).await,
            Err(Failed::Passing(problem) | Failed::ForGood(problem)) => return Err(problem),
        }
    }
}

async fn manifest_once(door: &Door, image: &ImageName, reference: &Reference) -> Result<Vec<u8>, Failed> {
    let accept = HeaderValue::from_str(&accept::merge(std::iter::empty())).ok();
    let accept = accept.map(|accept| (ACCEPT, accept)).into_iter().collect();
    let response = door.get(image, &format!("manifests/{reference}"), accept).await?;
    if response.content_length().is_none_or(|length| length > MAX_MANIFEST_BYTES) {
        return Err(Failed::ForGood("a manifest without an acceptable length".to_owned()));
    }
    let bytes = timeout(PATIENCE, response.bytes()).await.map_err(|_| Failed::Passing("it stalls".to_owned()))?;
    let bytes = bytes.map_err(|error| Failed::Passing(error_chain(&error.without_url())))?;
    match reference {
        Reference::Digest(digest) if !digest.matches(&bytes) => {
            Err(Failed::Passing("the manifest does not match its digest".to_owned()))
        }
        _ => Ok(bytes.to_vec()),
    }
}

/// Reads a blob whole. `came` is told of each piece.
pub(super) async fn blob(door: &Door, blob: &Blob, came: impl Fn(u64)) -> Result<Fetched, String> {
    let mut reading = Reading { verifier: blob.digest.verifier(), bytes: 0, was_kept: None };
    let mut attempt = 0;
    loop {
        let before = reading.bytes;
        match reading.go_on(door, blob, &came).await {
            Ok(()) => break,
            Err(Failed::Passing(_)) if reading.bytes > before || attempt < RETRIES => {
                if reading.bytes > before {
                    attempt = 0;
                }
                pause(&mut attempt).await;
            }
            Err(Failed::Passing(problem) | Failed::ForGood(problem)) => return Err(problem),
        }
    }
    if !reading.verifier.verified() {
        return Err("it does not match its digest".to_owned());
    }
    Ok(Fetched { bytes: reading.bytes, was_kept: reading.was_kept.unwrap_or_default() })
}

struct Reading {
    verifier: Verifier,
    bytes: u64,
    was_kept: Option<bool>,
}

impl Reading {
    async fn go_on(&mut self, door: &Door, blob: &Blob, came: &impl Fn(u64)) -> Result<(), Failed> {
        let mut headers = HeaderMap::new();
        if self.bytes > 0 {
            headers.extend(HeaderValue::from_str(&format!("bytes={}-", self.bytes)).ok().map(|value| (RANGE, value)));
        }
        let mut response = door.get(&blob.image, &format!("blobs/{}", blob.digest), headers).await?;
        if self.bytes > 0 && response.status() != 206 {
            return Err(Failed::ForGood("it cannot be gone on with".to_owned()));
        }
        let source = response.headers().get("x-dray-source").and_then(|source| source.to_str().ok());
        self.was_kept.get_or_insert(matches!(source, Some("memory" | "disk")));
        loop {
            let piece = timeout(PATIENCE, response.chunk()).await;
            let piece = piece.map_err(|_| Failed::Passing("it stalls".to_owned()))?;
            match piece.map_err(|error| Failed::Passing(error_chain(&error.without_url())))? {
                Some(piece) => {
                    self.verifier.update(&piece);
                    self.bytes += piece.len() as u64;
                    came(piece.len() as u64);
                }
                None if self.bytes == blob.size => return Ok(()),
                None => {
                    return Err(Failed::ForGood(format!("{} bytes came, not {}", self.bytes, blob.size)));
                }
            }
        }
    }
}

async fn pause(attempt: &mut u32) {
    sleep(FIRST_PAUSE * (1 << *attempt)).await;
    *attempt += 1;
}
