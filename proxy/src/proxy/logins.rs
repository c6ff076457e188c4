//! Who may use this process at all, where clients have to log in: `[access] logins_file`.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use arc_swap::ArcSwap;

use crate::principal::PrincipalId;
use crate::secret::Secret;
use crate::token_issuer::TokenIssuer;

/// The logins of a file, read again when it changes. Only their keyed hashes are kept.
pub(super) struct Logins {
    path: PathBuf,
    known: ArcSwap<HashSet<PrincipalId>>,
}

impl Logins {
    pub(super) fn load(path: &Path, grants: &TokenIssuer) -> Result<Self, String> {
        Ok(Self { path: path.to_owned(), known: ArcSwap::from_pointee(read(path, grants)?) })
    }

    /// Reads the file again. What cannot be read changes nothing.
    pub(super) fn reload(&self, grants: &TokenIssuer) -> Result<(), String> {
        self.known.store(read(&self.path, grants)?.into());
        Ok(())
    }

    pub(super) fn know(&self, secret: &Secret, grants: &TokenIssuer) -> bool {
        self.known.load().contains(&grants.who(secret))
    }
}

fn read(path: &Path, grants: &TokenIssuer) -> Result<HashSet<PrincipalId>, String> {
    let wrong = |why: String| format!("access.logins_file = \"{}\": {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let login = |(nth, line): (usize, &str)| match line.split_once(':') {
        Some((username, password)) if !username.is_empty() && !password.is_empty() => {
            Ok(grants.who(&Secret::Password { username: username.to_owned(), password: password.to_owned() }))
        }
        _ => Err(wrong(format!("line {}: expected user:password", nth + 1))),
    };
    let known: HashSet<PrincipalId> = lines.map(login).collect::<Result<_, _>>()?;
    if known.is_empty() { Err(wrong("has no login, so nobody could use this process".into())) } else { Ok(known) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(username: &str, password: &str) -> Secret {
        Secret::Password { username: username.into(), password: password.into() }
    }

    #[test]
    fn logins_are_lines_and_mistakes_are_named_without_them() {
        let (file, grants) = (tempfile::NamedTempFile::new().unwrap(), TokenIssuer::new(None).unwrap());
        std::fs::write(file.path(), "# nodes\nnode:a:b\n\nci:c\n").unwrap();
        let logins = Logins::load(file.path(), &grants).unwrap();
        assert!(logins.know(&login("node", "a:b"), &grants) && logins.know(&login("ci", "c"), &grants));
        assert!(!logins.know(&login("node", "b"), &grants) && !logins.know(&login("nod", "ea:b"), &grants));
        for (text, says) in [("node:a\nhush\n", "line 2"), ("# none\n", "no login"), (":hush\n", "line 1")] {
            std::fs::write(file.path(), text).unwrap();
            let message = logins.reload(&grants).unwrap_err();
            assert!(message.contains(says) && !message.contains("hush"), "{message}");
            assert!(logins.know(&login("ci", "c"), &grants));
        }
        std::fs::write(file.path(), "ci:d\n").unwrap();
        logins.reload(&grants).unwrap();
        assert!(!logins.know(&login("ci", "c"), &grants) && logins.know(&login("ci", "d"), &grants));
    }
}
