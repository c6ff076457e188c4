//! Asking a running dray: what `dray status` and `dray explain` have in common.

#![allow(clippy::disallowed_methods, reason = "a command has its thread for itself")]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use dray::config::address;
use dray::server::reachable;
use serde::de::DeserializeOwned;

use super::Failure;
use dray::times::STALL_TIMEOUT;

/// Which process, and what it wants to see.
#[derive(Args)]
pub(crate) struct Process {
    /// Where its admin port is
    #[arg(long, env = "DRAY_ADMIN", value_name = "IP:PORT", default_value = "127.0.0.1:5051", value_parser = address)]
    admin: SocketAddr,
    /// The file with its admin token, where it has one (`admin_token_file`)
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

const REGISTRY_PORT: &str =
    "this looks like dray's registry port; its admin port is 127.0.0.1:5051 by default: --admin";

impl Process {
    /// The JSON of a path, as text and understood.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, path: &str) -> Result<(String, T), Failure> {
        let failed = |what: &str| Failure::Failed(format!("http://{}: {what}", self.admin));
        let client = reqwest::Client::builder().no_proxy().timeout(STALL_TIMEOUT).build();
        let client = client.map_err(|error| failed(&dray::source::root_cause(&error)))?;
        let mut request = client.get(format!("http://{}{path}", reachable(self.admin)));
        if let Some(file) = &self.token_file {
            let token = std::fs::read_to_string(file)
                .map_err(|error| Failure::Usage(format!("--token-file {}: {error}", file.display())))?;
            request = request.bearer_auth(token.trim());
        }
        let response = request.send().await.map_err(|error| {
            failed(&format!("{}; is dray running, and is this its admin port?", dray::source::root_cause(&error)))
        })?;
        if response.headers().contains_key("docker-distribution-api-version") {
            return Err(failed(REGISTRY_PORT));
        }
        let status = response.status();
        let text = response.text().await.map_err(|error| failed(&dray::source::root_cause(&error)))?;
        match status.as_u16() {
            200 => {
                let understood = serde_json::from_str(&text);
                Ok((text, understood.map_err(|error| failed(&format!("its answer is not understood: {error}")))?))
            }
            400 => Err(Failure::Usage(text.trim().to_owned())),
            401 => Err(failed(&match &self.token_file {
                Some(file) => format!("the token in {} is not the one in its admin_token_file", file.display()),
                None => "it wants a token: --token-file".to_owned(),
            })),
            404 => Err(failed("it is older than this program: it has no status")),
            _ => Err(failed(text.trim())),
        }
    }
}
