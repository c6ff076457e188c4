//! Who is shown the status: names of images are nobody else's business.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::{Path, PathBuf};

use arc_swap::ArcSwap;
use http::header::{AUTHORIZATION, HOST};
use pingora::protocols::http::ServerSession;
use ring::hmac::{self, HMAC_SHA256};

use crate::oci::Registry;
use crate::secret::Secret;

/// Whoever knows the token, or sits at the machine where there is none.
pub struct StatusAuth {
    token: Option<AdminToken>,
}

/// Read again when its file changes.
struct AdminToken {
    path: PathBuf,
    key: ArcSwap<hmac::Key>,
}

/// Why somebody is not shown the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusDenied {
    NoToken,
    /// There is no token, and this is not the machine itself.
    NotHere,
}

/// A token of fewer characters can be guessed.
const MIN_TOKEN: usize = 16;

/// Tokens are compared by what this makes of them, which takes as long whether they agree or not.
const COMPARED: &[u8] = b"dray admin";

impl StatusAuth {
    pub fn new(token_file: Option<&Path>) -> Result<Self, String> {
        let token = token_file.map(|path| {
            let key = ArcSwap::from_pointee(read(path)?);
            Ok::<_, String>(AdminToken { path: path.to_owned(), key })
        });
        Ok(Self { token: token.transpose()? })
    }

    /// Reads the token again. What cannot be read changes nothing. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        if let Some(token) = &self.token {
            token.key.store(read(&token.path)?.into());
        }
        Ok(())
    }

    pub fn welcome(&self, session: &ServerSession) -> Result<(), StatusDenied> {
        let text = |name| session.req_header().headers.get(name).and_then(|value| value.to_str().ok());
        match &self.token {
            Some(token) => {
                let shown = text(AUTHORIZATION).and_then(token_of);
                shown.filter(|shown| token.is(shown)).map(drop).ok_or(StatusDenied::NoToken)
            }
            None => {
                let client = session.client_addr().and_then(|address| address.as_inet());
                let is_near = client.is_some_and(|address| address.ip().to_canonical().is_loopback());
                // A page of somebody else's, whose name was made to lead here, has that name.
                let is_named_here = text(HOST).is_some_and(is_of_this_machine);
                if is_near && is_named_here { Ok(()) } else { Err(StatusDenied::NotHere) }
            }
        }
    }
}

impl AdminToken {
    fn is(&self, shown: &str) -> bool {
        let key = self.key.load();
        let tag = hmac::sign(&hmac::Key::new(HMAC_SHA256, shown.as_bytes()), COMPARED);
        hmac::verify(&key, COMPARED, tag.as_ref()).is_ok()
    }
}

fn read(path: &Path) -> Result<hmac::Key, String> {
    let wrong = |why: &str| format!("admin_token_file = \"{}\": {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| wrong(&error.to_string()))?;
    if text.trim().len() < MIN_TOKEN {
        return Err(wrong("holds a token of fewer than 16 characters, which can be guessed"));
    }
    Ok(hmac::Key::new(HMAC_SHA256, text.trim().as_bytes()))
}

/// `Bearer <token>`, or Basic with the token for a password.
fn token_of(authorization: &str) -> Option<String> {
    if let Some(Secret::Password { password, .. }) = Secret::from_basic(authorization) {
        return Some(password);
    }
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
}

fn is_of_this_machine(host: &str) -> bool {
    let Ok(host) = host.parse::<Registry>() else { return false };
    host.host() == "localhost" || host.host().trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_compared_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        let token = AdminToken { path: file.path().to_owned(), key: ArcSwap::from_pointee(read(file.path()).unwrap()) };
        let is = |authorization: &str| token_of(authorization).is_some_and(|shown| token.is(&shown));
        assert!(is("Bearer 0123456789abcdef") && is("bearer 0123456789abcdef"));
        assert!(is(&Secret::Password { username: "me".into(), password: "0123456789abcdef".into() }.basic().unwrap()));
        assert!(!is("Bearer 0123456789abcde") && !is("Bearer ") && !is("0123456789abcdef") && !is(""));
        std::fs::write(file.path(), "short").unwrap();
        assert!(StatusAuth::new(Some(file.path())).err().unwrap().contains("admin_token_file"));
    }

    #[test]
    fn names_that_lead_here_are_not_this_machine() {
        assert!(["localhost:5051", "127.0.0.1:5051", "[::1]:5051", "127.0.0.1"].into_iter().all(is_of_this_machine));
        assert!(!["evil.example:5051", "localhost.evil.example", "", "a b"].into_iter().any(is_of_this_machine));
    }
}
