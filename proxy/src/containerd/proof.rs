//! The proof that a mirror works: an image that only dray has comes from it, and through the runtime.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::probe_image::{REGISTRY, REPOSITORY};
use crate::times::SERVICE_TIMEOUT;

/// What a mirror answers to a request such as containerd's.
#[derive(Debug)]
pub enum MirrorResponse {
    /// It is a dray.
    Dray,
    /// Something else answers there.
    Other(u16),
    /// Nobody does.
    Nobody(String),
}

/// What became of a pull through the runtime.
#[derive(Debug)]
pub enum RuntimePull {
    Came,
    Failed(String),
    /// There is no way to ask the runtime from here.
    NotTried(String),
}

/// Where else than in the path distributions have crictl.
const CRICTL: [&str; 3] = ["/usr/local/bin/crictl", "/var/lib/rancher/rke2/bin/crictl", "/opt/bin/crictl"];

/// Asks a mirror as containerd does.
pub async fn ask(mirror: &str, authority: Option<&Path>) -> MirrorResponse {
    let url = format!("{mirror}/v2/{REPOSITORY}/manifests/check?ns={REGISTRY}");
    match head(&url, authority).await {
        Ok(response) if response.status() == 200 && response.headers().contains_key("x-dray-source") => {
            MirrorResponse::Dray
        }
        Ok(response) => MirrorResponse::Other(response.status().as_u16()),
        Err(error) => MirrorResponse::Nobody(error),
    }
}

async fn head(url: &str, authority: Option<&Path>) -> Result<reqwest::Response, String> {
    // The mirror is meant, not a proxy on the way to it.
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

/// Pulls through the CRI plugin, as the kubelet does, and removes what came.
pub fn pull(socket: &Path) -> RuntimePull {
    if !socket.exists() {
        return RuntimePull::NotTried(format!(
            "{} is not there: containerd does not run, or elsewhere",
            socket.display()
        ));
    }
    let Some(crictl) = crictl() else {
        return RuntimePull::NotTried("crictl is not installed".into());
    };
    // A tag of its own, since nothing may have been kept of an earlier one.
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
            RuntimePull::Came
        }
        Ok(output) => RuntimePull::Failed(last_line(&output)),
        Err(error) => RuntimePull::NotTried(format!("{}: {error}", crictl.display())),
    }
}

fn crictl() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let listed: Vec<_> = std::env::split_paths(&path).map(|dir| dir.join("crictl")).collect();
    listed.into_iter().chain(CRICTL.iter().map(PathBuf::from)).find(|file| file.is_file())
}

fn last_line(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned()
}
