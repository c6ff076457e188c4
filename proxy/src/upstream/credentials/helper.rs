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

/// What a helper that has nothing says, with an error's status.
const NOTHING: &str = "credentials not found";

/// By which name Docker Hub stands in credential stores.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// What a helper has for an upstream. None: nothing.
pub(super) async fn ask(name: &str, authority: &str) -> Result<Option<Secret>, CredentialsError> {
    let program = program(name);
    let mut command = Command::new(&program);
    command.arg("get");
    let server = if super::is_docker_hub(authority) { DOCKER_HUB } else { authority };
    let failed = |why: String| CredentialsError::Program(why);
    let said = super::program::ask(command, &program, server.as_bytes()).await.map_err(failed)?;
    if !said.status.success() {
        return match String::from_utf8_lossy(&said.output).contains(NOTHING) {
            true => Ok(None),
            false => Err(failed(format!("{}: {} for {authority}", program.display(), said.status))),
        };
    }
    let answer: HelperOutput = serde_json::from_slice(&said.output)
        .map_err(|_| failed(format!("{}: no JSON with Username and Secret", program.display())))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Secret::Identity(answer.secret),
        _ => Secret::Password { username: answer.username, password: answer.secret },
    }))
}

/// The program of a helper, which stands in a directory of `PATH`.
pub(super) fn program(name: &str) -> PathBuf {
    PathBuf::from(format!("docker-credential-{name}"))
}
