//! Upstream URLs: `https://host[:port]`, optionally with the path of the API and a template of the repository.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error};

use super::RulePattern;
use crate::oci::{Registry, Repository};

/// A server that dray downloads from, as written in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    pub scheme: Scheme,
    /// `host` or `host:port`
    pub authority: String,
    /// The root of the API, as containerd's `override_path` has it: `/v2`, or a longer path that ends so.
    root: String,
    /// The repository at the upstream. `{repo}` is the requested one, `{registry}` its registry, and `{rest}` what the rule's
    /// star matches.
    template: Option<String>,
    naming: RegistryParameter,
}

/// How a request to the upstream contains the name of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RegistryParameter {
    ByPath,
    /// `?ns={registry}`, for another mirror such as dray.
    ByNamespace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

const ROOT: &str = "/v2";
const REGISTRY: &str = "{registry}";
const BY_NAMESPACE: &str = "ns={registry}";

impl Upstream {
    /// An upstream that keeps repository names.
    pub fn new(scheme: Scheme, authority: impl Into<String>) -> Self {
        Self {
            scheme,
            authority: authority.into(),
            root: ROOT.to_owned(),
            template: None,
            naming: RegistryParameter::ByPath,
        }
    }

    /// The repository's path at the upstream.
    pub fn repository(&self, matching: &RulePattern, registry: &Registry, repository: &Repository) -> String {
        let rest = matching.rest(repository).unwrap_or(repository.as_str());
        match &self.template {
            Some(template) => template
                .replace(REGISTRY, registry.as_str())
                .replace("{repo}", repository.as_str())
                .replace("{rest}", rest),
            None => repository.to_string(),
        }
    }

    /// The query with the name of the registry.
    pub fn namespace(&self, registry: &Registry) -> Option<String> {
        let value = || url::form_urlencoded::byte_serialize(registry.as_str().as_bytes()).collect::<String>();
        (self.naming == RegistryParameter::ByNamespace).then(|| format!("ns={}", value()))
    }

    /// Checks its path against the pattern of its rule.
    pub fn check(&self, matching: &RulePattern) -> Result<(), String> {
        let Some(template) = &self.template else { return Ok(()) };
        let holds = |placeholder: &str| template.matches(placeholder).count();
        let places = holds("{repo}") + holds("{rest}");
        if holds("{rest}") > 0 && !matching.has_rest() {
            return Err(format!("\"{self}\": {{rest}} needs a match that ends in a star, and \"{matching}\" does not"));
        }
        // A single repository may have any name at the upstream.
        if places == 1 || (places == 0 && matching.is_of_one_repository()) {
            return Ok(());
        }
        Err(format!(
            "\"{self}\": the path must contain {{repo}} once, such as \"{}/{template}/{{repo}}\", or end in /v2 as the root of the \
             API",
            self.base()
        ))
    }

    /// Whether repositories have the same names at the upstream. Otherwise its catalog is not served: names would not match, and
    /// it may list other repositories as well.
    pub fn keeps_names(&self) -> bool {
        self.template.is_none()
    }

    /// `scheme://authority`
    pub fn base(&self) -> String {
        format!("{}://{}", self.scheme.as_str(), self.authority)
    }

    /// `scheme://authority/v2`, or another root of its API.
    pub fn api(&self) -> String {
        self.base() + &self.root
    }
}

impl Scheme {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl std::str::FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url =
            url::Url::parse(text).map_err(|e| format!("upstream \"{text}\": {e}: write it as \"https://host\""))?;
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            other => return Err(format!("upstream \"{text}\": {other} is neither http nor https")),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(format!(
                "upstream at {}: a password belongs into credentials",
                url.host_str().unwrap_or_default()
            ));
        }
        let (text_without_query, query) = text.split_once('?').unwrap_or((text, ""));
        let naming = match query {
            "" => RegistryParameter::ByPath,
            BY_NAMESPACE => RegistryParameter::ByNamespace,
            _ => {
                return Err(format!(
                    "upstream \"{text}\": the only query that an upstream may have is ?{BY_NAMESPACE}"
                ));
            }
        };
        if url.fragment().is_some() {
            return Err(format!("upstream \"{text}\": a fragment is not allowed"));
        }
        let host = url.host_str().ok_or_else(|| format!("upstream \"{text}\" has no host"))?;
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let after_scheme = text_without_query.split_once("://").map_or("", |(_, rest)| rest);
        let path = after_scheme.split_once('/').map_or("", |(_, path)| path).trim_end_matches('/');
        let (root, template) = split_path(path);
        if let Some(template) = &template {
            let example = template.replace("{repo}", "a").replace("{rest}", "a").replace(REGISTRY, "a");
            if example.parse::<Repository>().is_err() {
                return Err(format!(
                    "upstream \"{text}\": the path must be a repository, with {{repo}} for the requested one, such as \
                     \"https://{authority}/team/{{repo}}\", or end in /v2 as the root of the API"
                ));
            }
        }
        Ok(Self { scheme, authority, root, template, naming })
    }
}

/// The root of the API and the template of repositories: the path up to `/v2`, and after it.
fn split_path(path: &str) -> (String, Option<String>) {
    let template = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let slashed = format!("/{path}/");
    match slashed.split_once("/v2/") {
        Some((before, behind)) => (format!("{before}{ROOT}"), template(behind.trim_end_matches('/'))),
        None => (ROOT.to_owned(), template(path)),
    }
}

impl<'de> Deserialize<'de> for Upstream {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base())?;
        if self.root != ROOT {
            f.write_str(&self.root)?;
        }
        self.template.as_ref().map_or(Ok(()), |template| write!(f, "/{template}"))?;
        if self.naming == RegistryParameter::ByNamespace { write!(f, "?{BY_NAMESPACE}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_rewrite_repositories() {
        let repo: Repository = "team/app".parse().unwrap();
        for (text, want) in [
            ("https://ghcr.io", "team/app"),
            ("https://ghcr.io/", "team/app"),
            ("https://ghcr.io/v2/", "team/app"),
            ("https://harbor.corp/hub/{repo}", "hub/team/app"),
            ("https://harbor.corp/v2/hub/{repo}", "hub/team/app"),
            ("https://ghcr.io/{repo}-mirror", "team/app-mirror"),
        ] {
            let upstream = text.parse::<Upstream>().unwrap();
            assert_eq!(upstream.repository(&RulePattern::any(), &quay(), &repo), want, "{text}");
        }
    }

    fn quay() -> Registry {
        "quay.io".parse().unwrap()
    }

    #[test]
    fn parent_caches_are_told_the_registry() {
        let repo: Repository = "team/app".parse().unwrap();
        for (text, api, want, query) in [
            ("https://harbor.corp/{registry}/{repo}", "https://harbor.corp/v2", "quay.io/team/app", None),
            ("http://parent:5050?ns={registry}", "http://parent:5050/v2", "team/app", Some("ns=quay.io")),
            ("http://parent:5050/v2?ns={registry}", "http://parent:5050/v2", "team/app", Some("ns=quay.io")),
        ] {
            let upstream: Upstream = text.parse().unwrap();
            assert_eq!(upstream.check(&RulePattern::any()), Ok(()), "{text}");
            assert_eq!((upstream.api().as_str(), upstream.namespace(&quay()).as_deref()), (api, query), "{text}");
            assert_eq!(upstream.repository(&RulePattern::any(), &quay(), &repo), want, "{text}");
        }
    }

    #[test]
    fn api_below_a_path_is_found_by_its_end() {
        let repo: Repository = "team/app".parse().unwrap();
        for (text, api, want) in [
            (
                "https://art.corp/artifactory/api/docker/hub/v2",
                "https://art.corp/artifactory/api/docker/hub/v2",
                "team/app",
            ),
            ("https://art.corp/Nexus/v2/", "https://art.corp/Nexus/v2", "team/app"),
            ("https://art.corp/api/v2/hub/{repo}", "https://art.corp/api/v2", "hub/team/app"),
        ] {
            let upstream: Upstream = text.parse().unwrap();
            assert_eq!(upstream.api(), api, "{text}");
            assert_eq!(upstream.repository(&RulePattern::any(), &quay(), &repo), want, "{text}");
            assert_eq!(upstream.to_string(), text.trim_end_matches('/'));
        }
    }

    #[test]
    fn what_has_moved_is_found() {
        let name = |matching: &str, upstream: &str| {
            let (matching, upstream): (RulePattern, Upstream) = (matching.parse().unwrap(), upstream.parse().unwrap());
            upstream
                .check(&matching)
                .map(|()| upstream.repository(&matching, &quay(), &"team/sub/app".parse().unwrap()))
        };
        assert_eq!(name("docker.io/team/*", "https://ghcr.io/new/{rest}").unwrap(), "new/sub/app");
        assert_eq!(name("docker.io/team/*", "https://ghcr.io/new/{repo}").unwrap(), "new/team/sub/app");
        assert_eq!(name("docker.io/team/sub/app", "https://ghcr.io/new/controller").unwrap(), "new/controller");
        for (matching, upstream) in [
            ("docker.io", "https://ghcr.io/new/{rest}"),
            ("docker.io/team/*", "https://ghcr.io/new"),
            ("docker.io/team/*", "https://ghcr.io/{repo}/{rest}"),
        ] {
            let problem = name(matching, upstream).unwrap_err();
            assert!(problem.contains(upstream), "{problem}");
        }
    }

    #[test]
    fn mistakes_are_explained() {
        for (text, want) in [
            ("ghcr.io", "https://host"),
            ("ftp://ghcr.io", "neither http"),
            ("https://user:secret@ghcr.io", "credentials"),
            ("https://harbor.corp/UP/{repo}", "{repo}"),
            ("https://harbor.corp/x?y=z", "?ns={registry}"),
        ] {
            let message = text.parse::<Upstream>().unwrap_err();
            assert!(message.contains(want) && !message.contains("secret"), "{text}: {message}");
        }
    }
}
