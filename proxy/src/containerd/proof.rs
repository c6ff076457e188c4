//! Tests that a mirror works: requests the probe image from it, and pulls it through the runtime.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::probe_image::{REGISTRY, REPOSITORY};
use crate::times::SERVICE_TIMEOUT;

/// The response of a mirror to a request as containerd sends it.
#[derive(Debug)]
pub enum MirrorResponse {
    Dray,
    /// The status of a server that is not a dray.
    Other(u16),
    /// Why there was no response.
    Unreachable(String),
}

/// The result of a pull through the runtime.
#[derive(Debug)]
pub enum RuntimePull {
    Succeeded,
    Failed(String),
    /// This process cannot use the runtime.
    NotTried(String),
}

/// Where distributions install crictl outside of PATH.
const CRICTL_PATHS: [&str; 3] = ["/usr/local/bin/crictl", "/var/lib/rancher/rke2/bin/crictl", "/opt/bin/crictl"];

/// Requests the probe image from a mirror, as containerd does.
pub async fn probe(mirror: &str, authority: Option<&Path>) -> MirrorResponse {
    let url = format!("{mirror}/v2/{REPOSITORY}/manifests/check?ns={REGISTRY}");
    match head(&url, authority).await {
        Ok(response) if response.status() == 200 && response.headers().contains_key("x-dray-source") => {
            MirrorResponse::Dray
        }
        Ok(response) => MirrorResponse::Other(response.status().as_u16()),
        Err(error) => MirrorResponse::Unreachable(error),
    }
}

async fn head(url: &str, authority: Option<&Path>) -> Result<reqwest::Response, String> {
    // The request must test the mirror, not an HTTP proxy in between.
    let mut client = reqwest::Client::builder().no_proxy().timeout(SERVICE_TIMEOUT);
    if let Some(path) = authority {
        let pem = tokio::fs::read(path).await.map_err(|e| format!("{}: {e}", path.display()))?;
        let certificates =
            reqwest::Certificate::from_pem_bundle(&pem).map_err(|e| format!("{}: {e}", path.display()))?;
        client = certificates.into_iter().fold(client, reqwest::ClientBuilder::add_root_certificate);
    }
    let client = client.build().map_err(|e| crate::source::root_cause(&e))?;
    client.head(url).send().await.map_err(|e| crate::source::root_cause(&e))
}

/// Pulls the probe image through the CRI plugin, as the kubelet does, and removes it.
pub fn pull(socket: &Path) -> RuntimePull {
    if !socket.exists() {
        return RuntimePull::NotTried(format!(
            "{} does not exist: containerd is not running, or uses another socket",
            socket.display()
        ));
    }
    let Some(crictl) = crictl() else {
        return RuntimePull::NotTried("crictl is not installed".into());
    };
    // A random tag, because containerd may still have the image of an earlier check.
    let image = format!("{REGISTRY}/{REPOSITORY}:check-{:08x}", fastrand::u32(..));
    let endpoint = format!("unix://{}", socket.display());
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&crictl);
        command.args(["--config", "/dev/null", "--timeout", "30s", "--runtime-endpoint", &endpoint]);
        command.args(["--image-endpoint", &endpoint]).args(arguments).output()
    };
    match run(&["pull", &image]) {
        Ok(output) if output.status.success() => {
            let _ = run(&["rmi", &image]);
            RuntimePull::Succeeded
        }
        Ok(output) => RuntimePull::Failed(last_line(&output)),
        Err(error) => RuntimePull::NotTried(format!("{}: {error}", crictl.display())),
    }
}

fn crictl() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let listed: Vec<_> = std::env::split_paths(&path).map(|dir| dir.join("crictl")).collect();
    listed.into_iter().chain(CRICTL_PATHS.iter().map(PathBuf::from)).find(|file| file.is_file())
}

fn last_line(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("crictl failed without a message").to_owned()
}
