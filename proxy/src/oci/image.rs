//! Image names as users write them.

use std::fmt;
use std::str::FromStr;

use super::name::{Reference, Registry, Repository};

/// `[registry/]repository[:tag][@digest]`, Docker Hub's by default.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    pub registry: Registry,
    pub repository: Repository,
    pub reference: Reference,
}

impl FromStr for ImageName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || format!("{text:?} is not a valid image name: expected [registry/]repository[:tag][@digest]");
        let (name, digest) = text.split_once('@').map_or((text, None), |(name, digest)| (name, Some(digest)));
        let (name, tag) = match name.rsplit_once(':') {
            // A colon before the last slash begins a port.
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if Registry::looks_like(first) => (first.parse().map_err(|_| invalid())?, rest),
            _ => (Registry::docker_hub(), name),
        };
        let path =
            if registry.is_docker_hub() && !path.contains('/') { format!("library/{path}") } else { path.into() };
        // If both are present, the digest selects the image.
        let reference: Reference = digest.or(tag).unwrap_or("latest").parse().map_err(|_| invalid())?;
        if digest.is_some() != matches!(reference, Reference::Digest(_)) {
            return Err(invalid());
        }
        Ok(Self { registry, repository: path.parse().map_err(|_| invalid())?, reference })
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if matches!(self.reference, Reference::Digest(_)) { '@' } else { ':' };
        write!(f, "{}/{}{separator}{}", self.registry, self.repository, self.reference)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_names_expand_as_in_runtimes() {
        let digest = crate::oci::Digest::of(b"x");
        for (text, name) in [
            ("alpine", "docker.io/library/alpine:latest".to_owned()),
            ("team/app:1", "docker.io/team/app:1".to_owned()),
            ("docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("reg.corp:5000/a/b", "reg.corp:5000/a/b:latest".to_owned()),
            ("localhost/a:1", "localhost/a:1".to_owned()),
            (&*format!("ghcr.io/a:1@{digest}"), format!("ghcr.io/a@{digest}")),
        ] {
            assert_eq!(text.parse::<ImageName>().unwrap().to_string(), name, "{text}");
        }
        for text in ["", "UPPER", "a b", "a@b", "a:", "/a", "a/", "https://a/b"] {
            assert!(text.parse::<ImageName>().unwrap_err().contains("is not a valid image name"), "{text}");
        }
    }
}
