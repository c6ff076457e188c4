//! Access to the status, which contains names of images.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::path::{Path, PathBuf};

use arc_swap::ArcSwap;
use http::header::{AUTHORIZATION, HOST};
use pingora::protocols::http::ServerSession;
use ring::hmac::{self, HMAC_SHA256};

use crate::oci::Registry;
use crate::secret::Secret;

/// Allows requests with the admin token. If no token is configured, only requests from loopback.
pub struct StatusAuth {
    token: Option<AdminToken>,
}

/// The admin token, read again when its file changes.
struct AdminToken {
    path: PathBuf,
    key: ArcSwap<hmac::Key>,
}

/// Why access to the status is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusDenied {
    NoToken,
    /// No token is configured, and the request is not from loopback or has a foreign `Host`.
    NotLoopback,
}

/// A shorter token, in bytes, is rejected. Smaller: tokens could be guessed.
const MIN_TOKEN_BYTES: usize = 16;

/// Tokens are compared by their HMAC of this text, in constant time.
const COMPARED_TEXT: &[u8] = b"dray admin";

impl StatusAuth {
    pub fn new(token_file: Option<&Path>) -> Result<Self, String> {
        let token = token_file.map(|path| {
            let key = ArcSwap::from_pointee(read(path)?);
            Ok::<_, String>(AdminToken { path: path.to_owned(), key })
        });
        Ok(Self { token: token.transpose()? })
    }

    /// Reads the token again. After an error the previous token stays valid. Blocks on the disk.
    pub fn reload(&self) -> Result<(), String> {
        if let Some(token) = &self.token {
            token.key.store(read(&token.path)?.into());
        }
        Ok(())
    }

    pub fn authorize(&self, session: &ServerSession) -> Result<(), StatusDenied> {
        let text = |name| session.req_header().headers.get(name).and_then(|value| value.to_str().ok());
        match &self.token {
            Some(token) => {
                let presented = text(AUTHORIZATION).and_then(token_of);
                presented.filter(|presented| token.is(presented)).map(drop).ok_or(StatusDenied::NoToken)
            }
            None => {
                let client = session.client_addr().and_then(|address| address.as_inet());
                let is_loopback = client.is_some_and(|address| address.ip().to_canonical().is_loopback());
                // Against DNS rebinding: a foreign page has its own name as `Host`.
                let is_local_name = text(HOST).is_some_and(is_local_host);
                if is_loopback && is_local_name { Ok(()) } else { Err(StatusDenied::NotLoopback) }
            }
        }
    }
}

impl AdminToken {
    fn is(&self, presented: &str) -> bool {
        let key = self.key.load();
        let tag = hmac::sign(&hmac::Key::new(HMAC_SHA256, presented.as_bytes()), COMPARED_TEXT);
        hmac::verify(&key, COMPARED_TEXT, tag.as_ref()).is_ok()
    }
}

fn read(path: &Path) -> Result<hmac::Key, String> {
    let invalid = |error: &str| format!("admin_token_file = \"{}\": {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| invalid(&error.to_string()))?;
    if text.trim().len() < MIN_TOKEN_BYTES {
        return Err(invalid("the token is shorter than 16 characters and could be guessed: use a longer one"));
    }
    Ok(hmac::Key::new(HMAC_SHA256, text.trim().as_bytes()))
}

/// `Bearer <token>`, or Basic with the token as the password.
fn token_of(authorization: &str) -> Option<String> {
    if let Some(Secret::Password { password, .. }) = Secret::from_basic(authorization) {
        return Some(password);
    }
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
}

fn is_local_host(host: &str) -> bool {
    let Ok(host) = host.parse::<Registry>() else { return false };
    host.host() == "localhost" || host.host().trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_prefix_is_rejected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0123456789abcdef\n").unwrap();
        let token = AdminToken { path: file.path().to_owned(), key: ArcSwap::from_pointee(read(file.path()).unwrap()) };
        let is = |authorization: &str| token_of(authorization).is_some_and(|presented| token.is(&presented));
        assert!(is("Bearer 0123456789abcdef") && is("bearer 0123456789abcdef"));
        assert!(is(&Secret::Password { username: "me".into(), password: "0123456789abcdef".into() }.basic().unwrap()));
        assert!(!is("Bearer 0123456789abcde") && !is("Bearer ") && !is("0123456789abcdef") && !is(""));
        std::fs::write(file.path(), "short").unwrap();
        assert!(StatusAuth::new(Some(file.path())).err().unwrap().contains("admin_token_file"));
    }

    #[test]
    fn foreign_host_name_is_not_local() {
        assert!(["localhost:5051", "127.0.0.1:5051", "[::1]:5051", "127.0.0.1"].into_iter().all(is_local_host));
        assert!(!["evil.example:5051", "localhost.evil.example", "", "a b"].into_iter().any(is_local_host));
    }
}
