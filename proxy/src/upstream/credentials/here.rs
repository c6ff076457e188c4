//! Checks that the files, variables and programs of credentials exist on this machine. Runs no program and requests no
//! secret.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::Path;

use rustix::fs::{Access, access};

use super::{CredentialsError, docker, helper, provider, read_file};
use crate::config::{Credentials, PasswordSource};

/// The error names what is missing.
pub fn check(source: &Credentials) -> Result<(), String> {
    find(source).map_err(|error| error.to_string())
}

fn find(source: &Credentials) -> Result<(), CredentialsError> {
    match source {
        Credentials::Static { password: PasswordSource::File(path), .. } => read_file(path).map(drop),
        Credentials::Static { password: PasswordSource::Variable(name), .. } => match std::env::var_os(name) {
            Some(_) => Ok(()),
            None => Err(CredentialsError::Variable(name.clone())),
        },
        Credentials::DockerConfig { file } => docker::helpers(file)?.iter().try_for_each(|name| is_in_path(name)),
        Credentials::Helper { name } => is_in_path(name),
        Credentials::Provider { config, bin_dir } => provider::programs(config)?.iter().try_for_each(|name| {
            let program = bin_dir.join(name);
            is_program(&program).then_some(()).ok_or_else(|| missing(&program, "does not exist or is not executable"))
        }),
        Credentials::Cloud(_) => Ok(()),
    }
}

fn is_in_path(name: &str) -> Result<(), CredentialsError> {
    let program = helper::program(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_found = std::env::split_paths(&path).any(|dir| is_program(&dir.join(&program)));
    is_found.then_some(()).ok_or_else(|| missing(&program, "is not in a directory of PATH"))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, Access::EXEC_OK).is_ok()
}

fn missing(program: &Path, why: &str) -> CredentialsError {
    CredentialsError::Program(format!("{} {why}", program.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn missing_source_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let provider = |name: &str| {
            let config = write(
                "provider.yaml",
                &format!(
                    "kind: CredentialProviderConfig\nproviders:\n- name: {name}\n  matchImages: [a.io]\n  apiVersion: v1\n"
                ),
            );
            Credentials::Provider { config, bin_dir: dir.path().to_owned() }
        };
        let password = |password| Credentials::Static { username: "u".into(), password };
        for (missing, want) in [
            (password(PasswordSource::File("/nowhere".into())), "/nowhere"),
            (password(PasswordSource::Variable("DRAY_TEST_UNSET".into())), "DRAY_TEST_UNSET"),
            (Credentials::Helper { name: "dray-nowhere".into() }, "docker-credential-dray-nowhere"),
            (Credentials::DockerConfig { file: "/nowhere".into() }, "/nowhere"),
            (Credentials::DockerConfig { file: write("bad.json", "{") }, "bad.json"),
            (
                Credentials::DockerConfig { file: write("stores.json", "{\"credsStore\": \"dray-nowhere\"}") },
                "docker-credential-dray-nowhere",
            ),
            (provider("plugin"), "plugin"),
        ] {
            let problem = check(&missing).unwrap_err();
            assert!(problem.contains(want), "{problem}");
        }
        let plugin = write("plugin", "#!/bin/false\n");
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        let file = write("config.json", "{\"auths\": {}}");
        for there in [
            password(PasswordSource::File(file.clone())),
            password(PasswordSource::Variable("PATH".into())),
            Credentials::DockerConfig { file },
            provider("plugin"),
        ] {
            assert_eq!(check(&there), Ok(()));
        }
    }
}
