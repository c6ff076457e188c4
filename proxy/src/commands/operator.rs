//! A client of dray's admin API, for `dray status`, `dray explain` and `dray cache`.

#![allow(clippy::disallowed_methods, reason = "a command has its thread for itself")]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dray::times::STALL_TIMEOUT;
use http::header::CONTENT_TYPE;
use serde::de::DeserializeOwned;
use url::{Host, Url};

use super::Failure;

/// Which process to send requests to, and the token to authenticate with.
#[derive(Args)]
pub(crate) struct AdminApi {
    /// The admin address of the running dray: HOST:PORT or http://HOST:PORT
    #[arg(
        long,
        env = "DRAY_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:5051",
        value_parser = base_url
    )]
    admin: String,
    /// A file with the admin token, if the running dray has one (its `admin_token_file`)
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// Without a line of the response for this long, a change has failed. Longer than dray waits for one node.
const POST_TIMEOUT: Duration = Duration::from_secs(120);

const REGISTRY_PORT: &str =
    "this looks like dray's registry port; pass the admin address with --admin (default: 127.0.0.1:5051)";

impl AdminApi {
    /// The JSON of a path, as text and parsed.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<(String, T), Failure> {
        let response = self
            .send(self.client(|client| client.timeout(STALL_TIMEOUT))?.get(format!("{}{path}", self.admin)))
            .await?;
        let text = response.text().await.map_err(|error| self.failed(&dray::source::root_cause(&error)))?;
        let parsed = serde_json::from_str(&text);
        Ok((text, parsed.map_err(|error| self.failed(&format!("the response is not valid: {error}")))?))
    }

    /// Sends a change, and passes each line of JSON of the response on as soon as it arrives.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &serde_json::Value,
        mut on_line: impl FnMut(T),
    ) -> Result<(), Failure> {
        let request = self.client(|client| client.read_timeout(POST_TIMEOUT))?.post(format!("{}{path}", self.admin));
        let request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        let (mut response, mut rest) = (self.send(request).await?, Vec::new());
        loop {
            let piece = response.chunk().await.map_err(|error| self.failed(&dray::source::root_cause(&error)))?;
            let Some(piece) = piece else { break };
            rest.extend_from_slice(&piece);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let parsed = serde_json::from_slice(&line);
                on_line(parsed.map_err(|error| self.failed(&format!("the response is not valid: {error}")))?);
            }
        }
        if rest.is_empty() { Ok(()) } else { Err(self.failed("the response ended early")) }
    }

    fn client(
        &self,
        with_timeout: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder,
    ) -> Result<reqwest::Client, Failure> {
        let client = with_timeout(reqwest::Client::builder().no_proxy()).build();
        client.map_err(|error| self.failed(&dray::source::root_cause(&error)))
    }

    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<reqwest::Response, Failure> {
        if let Some(file) = &self.token_file {
            let token = std::fs::read_to_string(file)
                .map_err(|error| Failure::Usage(format!("--token-file {}: {error}", file.display())))?;
            request = request.bearer_auth(token.trim());
        }
        let response = request.send().await.map_err(|error| {
            self.failed(&format!(
                "cannot connect: {}; start dray, or pass its admin address with --admin",
                dray::source::root_cause(&error)
            ))
        })?;
        if response.headers().contains_key("docker-distribution-api-version") {
            return Err(self.failed(REGISTRY_PORT));
        }
        let status = response.status().as_u16();
        if status == 200 {
            return Ok(response);
        }
        let text = response.text().await.map_err(|error| self.failed(&dray::source::root_cause(&error)))?;
        Err(match status {
            400 => Failure::Usage(text.trim().to_owned()),
            401 => self.failed(&match &self.token_file {
                Some(file) => format!("the token in {} is not the one in dray's admin_token_file", file.display()),
                None => "this dray requires its admin token: pass --token-file".to_owned(),
            }),
            404 | 405 => self.failed(&format!("{status}: this is not the admin port of dray, or of an older version")),
            _ => self.failed(text.trim()),
        })
    }

    fn failed(&self, what: &str) -> Failure {
        Failure::Failed(format!("{}: {what}", self.admin))
    }
}

/// The base URL of an admin address, without a trailing slash.
fn base_url(address: &str) -> Result<String, String> {
    let wrong = || format!("\"{address}\" is not a valid address: expected HOST:PORT, such as 127.0.0.1:5051");
    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let url = match address.contains("://") {
        true => Url::parse(address),
        false if has_port => Url::parse(&format!("http://{address}")),
        false => return Err(wrong()),
    };
    let mut url = url.ok().filter(|url| url.scheme() == "http" && url.path() == "/").ok_or_else(wrong)?;
    // DRAY_ADMIN may be the address that the server listens on, such as 0.0.0.0:5051.
    let loopback = match url.host() {
        Some(Host::Ipv4(ip)) if ip.is_unspecified() => Some("127.0.0.1"),
        Some(Host::Ipv6(ip)) if ip.is_unspecified() => Some("[::1]"),
        _ => None,
    };
    if loopback.is_some() {
        url.set_host(loopback).map_err(|_| wrong())?;
    }
    Ok(url.origin().ascii_serialization())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_address_with_or_without_scheme_is_accepted() {
        for (address, want) in [
            ("127.0.0.1:5051", "http://127.0.0.1:5051"),
            ("http://127.0.0.1:5051", "http://127.0.0.1:5051"),
            ("http://node-1:5051/", "http://node-1:5051"),
            ("localhost:80", "http://localhost"),
            ("0.0.0.0:5051", "http://127.0.0.1:5051"),
            ("[::]:5051", "http://[::1]:5051"),
        ] {
            assert_eq!(base_url(address).as_deref(), Ok(want), "{address}");
        }
        for address in ["", "5051", "127.0.0.1", "[::1]", "https://a:1", "http://", "http://a:1/metrics", "a b:1"] {
            assert!(base_url(address).unwrap_err().contains("expected HOST:PORT"), "{address}");
        }
    }
}
