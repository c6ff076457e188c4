//! Credentials for a registry.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A secret for one registry. `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub enum Secret {
    Password {
        username: String,
        password: String,
    },
    /// Docker's `identitytoken`: an OAuth2 refresh token.
    Identity(String),
    /// Docker's `registrytoken`, sent to the registry unchanged.
    Bearer(String),
}

impl Secret {
    /// The value of an `Authorization: Basic` header, if there is a password.
    pub fn basic(&self) -> Option<String> {
        match self {
            Self::Password { username, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
            }
            Self::Identity(_) | Self::Bearer(_) => None,
        }
    }

    /// Parses the value of an `Authorization: Basic` header.
    pub fn from_basic(value: &str) -> Option<Self> {
        let (scheme, encoded) = value.split_once(' ')?;
        let decoded = scheme.eq_ignore_ascii_case("basic").then(|| STANDARD.decode(encoded.trim()).ok())??;
        let text = String::from_utf8(decoded).ok()?;
        let (username, password) = text.split_once(':')?;
        Some(Self::Password { username: username.to_owned(), password: password.to_owned() })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn basic_header_round_trips() {
        let secret = Secret::Password { username: "me".into(), password: "s:ecret".into() };
        assert_eq!(Secret::from_basic(&secret.basic().unwrap()), Some(secret));
        for text in ["", "Basic", "Basic !", "Bearer bWU6cw==", "Basic bWU="] {
            assert_eq!(Secret::from_basic(text), None, "{text}");
        }
    }
}
