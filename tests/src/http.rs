//! Plain HTTP as a client sees it: status, headers, and how a body ended.

use std::sync::OnceLock;

use bytes::Bytes;
use reqwest::header::HeaderMap;
use reqwest::{Client, Method};

/// A response, read to its end.
#[derive(Debug)]
pub struct ClientResponse {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Whether the body was complete.
    pub complete: bool,
}

impl ClientResponse {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub fn source(&self) -> &str {
        self.header("x-dray-source").unwrap_or("none")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The code of the first error of an OCI error body.
    pub fn code(&self) -> String {
        let json: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        json["errors"][0]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A client without proxies, redirects or retries.
pub fn client() -> Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().expect("a client of constants")
}

pub async fn get(url: &str, headers: &[(&str, &str)]) -> ClientResponse {
    send(Method::GET, url, headers).await
}

pub async fn head(url: &str) -> ClientResponse {
    send(Method::HEAD, url, &[]).await
}

/// Sends a request. Panics if no response arrives.
pub async fn send(method: Method, url: &str, headers: &[(&str, &str)]) -> ClientResponse {
    let mut request = client().request(method, url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = request.send().await.unwrap_or_else(|e| panic!("{url}: {e}"));
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let mut body = Vec::new();
    let complete = loop {
        match response.chunk().await {
            Ok(Some(piece)) => body.extend_from_slice(&piece),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    ClientResponse { status, headers, body: body.into(), complete }
}
