//! Registries, repositories, tags and references.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::digest::Digest;

/// A registry as in an image name: `host`, `host:port` or `[ipv6]:port`, lower case.
///
/// Equal registries have equal text, or a rule could be bypassed: the names of Docker Hub become `docker.io`, the port
/// of https is left out, and addresses have one form.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Registry(Arc<str>);

/// A repository path below its registry, such as `library/alpine`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository(Arc<str>);

/// A tag: up to 128 word characters, dots and dashes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Arc<str>);

/// The last part of the path after `/manifests/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    Tag(Tag),
    Digest(Digest),
}

/// A name that breaks the grammar of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("not a valid registry: expected HOST or HOST:PORT")]
    Registry,
    #[error("not a valid repository name: expected lower-case components such as library/alpine")]
    Repository,
    #[error("not a valid tag: expected up to 128 letters, digits, '_', '.' and '-'")]
    Tag,
}

/// The default port.
const HTTPS_PORT: u16 = 443;

const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ALIASES: [&str; 3] = ["index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"];

// === impl Registry ===

impl Registry {
    pub fn docker_hub() -> Self {
        Self(DOCKER_HUB.into())
    }

    pub fn is_docker_hub(&self) -> bool {
        &*self.0 == DOCKER_HUB
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host without its port.
    pub fn host(&self) -> &str {
        split_port(&self.0).0
    }

    /// The port, when the name carries one.
    pub fn port(&self) -> Option<u16> {
        split_port(&self.0).1
    }

    /// Whether the first component of a path can only be a registry: the rule of image names.
    pub fn looks_like(component: &str) -> bool {
        component == "localhost" || component.contains('.') || component.contains(':')
    }
}

impl FromStr for Registry {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let lower = text.to_ascii_lowercase();
        let (host, port) = split_port(&lower);
        let port_text = lower[host.len()..].strip_prefix(':');
        let port_ok =
            port_text.is_none_or(|text| text.bytes().all(|b| b.is_ascii_digit()) && port.is_some_and(|p| p > 0));
        if text.len() > 255 || !port_ok {
            return Err(NameError::Registry);
        }
        let host = canonical_host(host).ok_or(NameError::Registry)?;
        match port.filter(|port| *port != HTTPS_PORT) {
            Some(port) => Ok(Self(format!("{host}:{port}").into())),
            None if DOCKER_HUB_ALIASES.contains(&&*host) => Ok(Self::docker_hub()),
            None => Ok(Self(host.into())),
        }
    }
}

/// The canonical form of a host. An address has many forms, and all of them lead to the same host.
fn canonical_host(host: &str) -> Option<Cow<'_, str>> {
    let last = host.rsplit('.').next().unwrap_or_default();
    let may_be_address = host.starts_with('[') || last.starts_with(|c: char| c.is_ascii_digit());
    if may_be_address {
        return match url::Host::parse(host).ok()? {
            url::Host::Domain(_) => is_host_name(host).then_some(host.into()),
            address => Some(address.to_string().into()),
        };
    }
    is_host_name(host).then_some(host.into())
}

fn split_port(name: &str) -> (&str, Option<u16>) {
    let after_literal = name.rfind(']').map_or(0, |end| end + 1);
    match name[after_literal..].find(':') {
        Some(colon) => {
            let (host, port) = name.split_at(after_literal + colon);
            (host, port[1..].parse().ok())
        }
        None => (name, None),
    }
}

fn is_host_name(host: &str) -> bool {
    !host.is_empty()
        && host.split('.').all(|label| {
            let bytes = label.as_bytes();
            let inner = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_';
            matches!((bytes.first(), bytes.last()), (Some(first), Some(last))
                if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric())
                && bytes.iter().all(inner)
        })
}

// === impl Repository ===

impl Repository {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Repository {
    type Err = NameError;

    /// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` between slashes, at most 255 bytes in all.
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > 255 || !text.split('/').all(is_path_component) {
            return Err(NameError::Repository);
        }
        Ok(Self(text.into()))
    }
}

fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    bytes
        .split(|b| alphanumeric(*b))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

// === impl Tag ===

impl Tag {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the tag names a digest: the fallback of the referrers API, and cosign's tags of signatures
    /// (`sha256-<hex>`, `sha256-<hex>.sig`).
    pub fn is_of_digest(&self) -> bool {
        let name = self.0.split('.').next().unwrap_or_default();
        name.split_once('-').is_some_and(|(algorithm, hex)| format!("{algorithm}:{hex}").parse::<Digest>().is_ok())
    }
}

impl FromStr for Tag {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let bytes = text.as_bytes();
        let first_ok = bytes.first().is_some_and(|b| is_word(*b));
        let rest_ok = bytes.iter().all(|b| is_word(*b) || *b == b'.' || *b == b'-');
        if !first_ok || !rest_ok || bytes.len() > 128 {
            return Err(NameError::Tag);
        }
        Ok(Self(text.into()))
    }
}

// === impl Reference ===

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse() {
            Ok(digest) => Ok(Self::Digest(digest)),
            Err(_) => text.parse().map(Self::Tag),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.fmt(f),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

macro_rules! displays_its_text {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
displays_its_text!(Registry, Repository, Tag);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_hub_has_one_name() {
        for alias in ["docker.io", "index.docker.io", "registry-1.docker.io", "Docker.IO"] {
            assert!(alias.parse::<Registry>().unwrap().is_docker_hub(), "{alias}");
        }
    }

    #[test]
    fn registry_port_is_optional() {
        let registry: Registry = "Reg.Example:5000".parse().unwrap();
        assert_eq!((registry.host(), registry.port()), ("reg.example", Some(5000)));
        let registry: Registry = "[::1]:5000".parse().unwrap();
        assert_eq!((registry.host(), registry.port()), ("[::1]", Some(5000)));
        assert_eq!("ghcr.io".parse::<Registry>().unwrap().port(), None);
    }

    #[test]
    fn equal_registries_have_equal_text() {
        for (text, one) in [
            ("GHCR.io:443", "ghcr.io"),
            ("ghcr.io:0443", "ghcr.io"),
            ("registry-1.docker.io:443", "docker.io"),
            ("ghcr.io:80", "ghcr.io:80"),
            ("[0:0::1]:5000", "[::1]:5000"),
            ("0x0a.0.0.1:5000", "10.0.0.1:5000"),
            ("167772161", "10.0.0.1"),
            ("10.1", "10.0.0.1"),
            ("a.1b", "a.1b"),
        ] {
            assert_eq!(text.parse::<Registry>().unwrap().as_str(), one, "{text}");
        }
    }

    #[test]
    fn hostile_registries_are_refused() {
        for text in [
            "",
            "a/b",
            "user@host",
            "host:",
            "host:99999",
            "host:0",
            "host:+443",
            "a..b",
            "-a",
            "a b",
            "host?x",
            "[::1",
            "é.io",
            "1.2.3.256",
            "a.1",
            "ghcr.io.",
        ] {
            assert!(text.parse::<Registry>().is_err(), "{text}");
        }
    }

    #[test]
    fn repositories_follow_the_grammar() {
        for text in ["alpine", "library/alpine", "a/b/c", "a__b", "a--b", "a.b_c-d", "0"] {
            assert!(text.parse::<Repository>().is_ok(), "{text}");
        }
        for text in ["", "A", "a//b", "/a", "a/", "a..b", "a___b", ".a", "a.", "_a", "a._b", "a/../b", "a%2fb"] {
            assert!(text.parse::<Repository>().is_err(), "{text}");
        }
    }

    #[test]
    fn references_are_tags_or_digests() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse(), Ok(Reference::Digest(digest)));
        assert!(matches!("v1.0-rc_1".parse(), Ok(Reference::Tag(_))));
        assert!(".INVALID_MANIFEST_NAME".parse::<Reference>().is_err());
        assert!("sha256:baddigeststring".parse::<Reference>().is_err());
        assert!("a".repeat(129).parse::<Reference>().is_err());
    }
}
