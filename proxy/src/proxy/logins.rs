//! The users that may use this process, if clients must log in (`[access] users_file`).

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use arc_swap::ArcSwap;

use crate::principal::PrincipalId;
use crate::secret::Secret;
use crate::token_issuer::TokenIssuer;

/// The logins of a file, read again when it changes. Memory holds only their keyed hashes.
pub struct Logins {
    path: PathBuf,
    known: ArcSwap<HashSet<PrincipalId>>,
}

impl Logins {
    pub(super) fn load(path: &Path, issuer: &TokenIssuer) -> Result<Self, String> {
        Ok(Self { path: path.to_owned(), known: ArcSwap::from_pointee(read(path, issuer)?) })
    }

    /// Reads the file again. After an error the previous logins stay valid.
    pub(super) fn reload(&self, issuer: &TokenIssuer) -> Result<(), String> {
        self.known.store(read(&self.path, issuer)?.into());
        Ok(())
    }

    pub(super) fn contains(&self, secret: &Secret, issuer: &TokenIssuer) -> bool {
        self.known.load().contains(&issuer.principal_id(secret))
    }
}

fn read(path: &Path, issuer: &TokenIssuer) -> Result<HashSet<PrincipalId>, String> {
    let invalid = |error: String| format!("access.users_file = \"{}\": {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let login = |(nth, line): (usize, &str)| match line.split_once(':') {
        Some((username, password)) if !username.is_empty() && !password.is_empty() => {
            Ok(issuer.principal_id(&Secret::Password { username: username.to_owned(), password: password.to_owned() }))
        }
        _ => Err(invalid(format!("line {}: expected user:password", nth + 1))),
    };
    let known: HashSet<PrincipalId> = lines.map(login).collect::<Result<_, _>>()?;
    if known.is_empty() { Err(invalid("has no login: add at least one line user:password".into())) } else { Ok(known) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(username: &str, password: &str) -> Secret {
        Secret::Password { username: username.into(), password: password.into() }
    }

    #[test]
    fn users_file_error_names_line_without_password() {
        let (file, issuer) = (tempfile::NamedTempFile::new().unwrap(), TokenIssuer::new(None).unwrap());
        std::fs::write(file.path(), "# nodes\nnode:a:b\n\nci:c\n").unwrap();
        let logins = Logins::load(file.path(), &issuer).unwrap();
        assert!(logins.contains(&login("node", "a:b"), &issuer) && logins.contains(&login("ci", "c"), &issuer));
        assert!(!logins.contains(&login("node", "b"), &issuer) && !logins.contains(&login("nod", "ea:b"), &issuer));
        for (text, expected) in [("node:a\nhush\n", "line 2"), ("# none\n", "no login"), (":hush\n", "line 1")] {
            std::fs::write(file.path(), text).unwrap();
            let message = logins.reload(&issuer).unwrap_err();
            assert!(message.contains(expected) && !message.contains("hush"), "{message}");
            assert!(logins.contains(&login("ci", "c"), &issuer));
        }
        std::fs::write(file.path(), "ci:d\n").unwrap();
        logins.reload(&issuer).unwrap();
        assert!(!logins.contains(&login("ci", "c"), &issuer) && logins.contains(&login("ci", "d"), &issuer));
    }
}
