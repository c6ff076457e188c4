//! Docker's credential helpers: `docker-credential-<name> get`, the registry on standard input.

use std::path::PathBuf;

use serde::Deserialize;
use tokio::process::Command;

use super::CredentialsError;
use crate::secret::Secret;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperOutput {
    username: String,
    secret: String,
}

/// The output of a helper without a secret, whose status is an error then.
const NOT_FOUND_OUTPUT: &str = "credentials not found";

/// The key of Docker Hub in credential stores.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The secret of a helper for an upstream. None: it has none.
pub(super) async fn get(name: &str, authority: &str) -> Result<Option<Secret>, CredentialsError> {
    let program = program(name);
    let mut command = Command::new(&program);
    command.arg("get");
    let server = if super::is_docker_hub(authority) { DOCKER_HUB } else { authority };
    let failed = |why: String| CredentialsError::Program(why);
    let output = super::program::run(command, &program, server.as_bytes()).await.map_err(failed)?;
    if !output.status.success() {
        return match String::from_utf8_lossy(&output.stdout).contains(NOT_FOUND_OUTPUT) {
            true => Ok(None),
            false => Err(failed(format!("{}: {} for {authority}", program.display(), output.status))),
        };
    }
    let response: HelperOutput = serde_json::from_slice(&output.stdout)
        .map_err(|_| failed(format!("{}: its output is not JSON with Username and Secret", program.display())))?;
    Ok(Some(match response.username.as_str() {
        "<token>" => Secret::Identity(response.secret),
        _ => Secret::Password { username: response.username, password: response.secret },
    }))
}

/// The program of a helper, in a directory of `PATH`.
pub(super) fn program(name: &str) -> PathBuf {
    PathBuf::from(format!("docker-credential-{name}"))
}
