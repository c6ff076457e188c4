//! The scope of a rule: registries by pattern, optionally only some of their repositories.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error};

use super::HostPattern;
use crate::oci::{Registry, Repository};

/// `ghcr.io`, `*.example.com`, `docker.io/kubeflow/*` or `docker.io/kubeflow/spark-operator`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulePattern {
    text: String,
    pub host: HostPattern,
    repositories: Repositories,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Repositories {
    All,
    One(String),
    /// All below this one.
    Below(String),
}

impl RulePattern {
    /// Everything.
    pub fn any() -> Self {
        Self { text: "*".to_owned(), host: HostPattern::any(), repositories: Repositories::All }
    }

    /// The same pattern on every port, if it has none.
    pub fn on_every_port(self) -> Self {
        Self { host: self.host.on_every_port(), ..self }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn matches(&self, registry: &Registry, repository: &Repository) -> bool {
        self.host.matches(registry)
            && match &self.repositories {
                Repositories::All => true,
                Repositories::One(name) => name == repository.as_str(),
                Repositories::Below(parent) => below(parent, repository.as_str()).is_some(),
            }
    }

    /// What the star stands for in a repository that matches.
    pub fn rest<'a>(&self, repository: &'a Repository) -> Option<&'a str> {
        match &self.repositories {
            Repositories::Below(parent) => below(parent, repository.as_str()),
            Repositories::All | Repositories::One(_) => None,
        }
    }

    /// Whether it matches whole registries.
    pub fn is_of_registries(&self) -> bool {
        self.repositories == Repositories::All
    }

    pub fn is_of_one_repository(&self) -> bool {
        matches!(self.repositories, Repositories::One(_))
    }

    /// Whether it ends in a star for the rest of a repository's name.
    pub fn has_rest(&self) -> bool {
        matches!(self.repositories, Repositories::Below(_))
    }

    /// Whether everything that `other` matches is matched by `self` too.
    pub fn covers(&self, other: &Self) -> bool {
        let names = match (&self.repositories, &other.repositories) {
            (Repositories::All, _) => true,
            (_, Repositories::All) | (Repositories::One(_), Repositories::Below(_)) => false,
            (Repositories::One(name), Repositories::One(other)) => name == other,
            (Repositories::Below(parent), Repositories::One(other)) => below(parent, other).is_some(),
            (Repositories::Below(parent), Repositories::Below(other)) => {
                parent == other || below(parent, other).is_some()
            }
        };
        names && self.host.covers(&other.host)
    }
}

/// The rest of a repository's name below its parent.
fn below<'a>(parent: &str, name: &'a str) -> Option<&'a str> {
    name.strip_prefix(parent)?.strip_prefix('/').filter(|rest| !rest.is_empty())
}

impl std::str::FromStr for RulePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, path) = text.split_once('/').map_or((text, None), |(host, path)| (host, Some(path)));
        let host: HostPattern = host.parse()?;
        let is_name = |name: &str| name.parse::<Repository>().is_ok();
        let repositories = match path {
            None => Repositories::All,
            Some(path) => match path.strip_suffix("/*") {
                Some(parent) if is_name(parent) => Repositories::Below(parent.to_owned()),
                // Docker Hub's own, as requests name them.
                None if is_name(path) && host.as_str() == "docker.io" && !path.contains('/') => {
                    Repositories::One(format!("library/{path}"))
                }
                None if is_name(path) => Repositories::One(path.to_owned()),
                _ => {
                    return Err(format!(
                        "match \"{text}\": after the host stands a repository, such as \"docker.io/team/app\", or all \
                         below one, such as \"docker.io/team/*\""
                    ));
                }
            },
        };
        let text = match &repositories {
            Repositories::All => host.to_string(),
            Repositories::One(name) => format!("{host}/{name}"),
            Repositories::Below(parent) => format!("{host}/{parent}/*"),
        };
        Ok(Self { text, host, repositories })
    }
}

impl<'de> Deserialize<'de> for RulePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for RulePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching(text: &str) -> RulePattern {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn repositories_are_matched_whole_or_below() {
        let matches = |text: &str, registry: &str, repository: &str| {
            matching(text).matches(&registry.parse().unwrap(), &repository.parse().unwrap())
        };
        assert!(matches("docker.io", "docker.io", "a/b"));
        assert!(matches("docker.io/a/*", "docker.io", "a/b"));
        assert!(matches("docker.io/a/*", "docker.io", "a/b/c"));
        assert!(!matches("docker.io/a/*", "docker.io", "a"));
        assert!(!matches("docker.io/a/*", "docker.io", "ab/c"));
        assert!(!matches("docker.io/a/*", "ghcr.io", "a/b"));
        assert!(matches("*.io/a/b", "ghcr.io", "a/b"));
        assert!(matches("docker.io/nginx", "docker.io", "library/nginx"));
        assert!(matches("index.docker.io/a/b", "docker.io", "a/b"));
        assert!(!matches("docker.io/a/b", "docker.io", "a/b/c"));
        let rest = |text: &str| matching(text).rest(&"a/b/c".parse().unwrap()).map(str::to_owned);
        assert_eq!(
            [rest("docker.io/a/*"), rest("docker.io/a/b/*"), rest("docker.io")],
            [Some("b/c".to_owned()), Some("c".to_owned()), None]
        );
    }

    #[test]
    fn covering_is_about_all_repositories() {
        let covers = |a: &str, b: &str| matching(a).covers(&matching(b));
        assert!(covers("docker.io", "docker.io/a/*") && !covers("docker.io/a/*", "docker.io"));
        assert!(covers("docker.io/a/*", "docker.io/a/b/*") && !covers("docker.io/a/b/*", "docker.io/a/*"));
        assert!(covers("*/a/*", "ghcr.io/a/b") && !covers("ghcr.io/a/b", "ghcr.io/a/*"));
        assert!(!covers("ghcr.io/a", "ghcr.io/b") && covers("*", "ghcr.io/b"));
    }

    #[test]
    fn what_is_no_repository_is_explained() {
        for text in ["docker.io/", "docker.io/*", "docker.io/A/b", "docker.io/a*/b", "docker.io/a//b", "docker.io/a:1"]
        {
            let message = text.parse::<RulePattern>().unwrap_err();
            assert!(message.contains("docker.io/team/*"), "{text}: {message}");
        }
    }
}
