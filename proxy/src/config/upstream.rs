//! Upstream URLs: `https://host[:port]`, optionally with a repository template.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error};

use super::Matching;
use crate::oci::Repository;

/// Where a registry's content is fetched from, as written in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    pub scheme: Scheme,
    /// `host` or `host:port`
    pub authority: String,
    /// The repository at the upstream, with `{repo}` for the one that was asked for, or `{rest}` for what the
    /// rule's star stands for.
    template: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

impl Upstream {
    /// An upstream that keeps repository names.
    pub fn new(scheme: Scheme, authority: impl Into<String>) -> Self {
        Self { scheme, authority: authority.into(), template: None }
    }

    /// The repository's path at the upstream.
    pub fn repository(&self, matching: &Matching, repository: &Repository) -> String {
        let rest = matching.rest(repository).unwrap_or(repository.as_str());
        match &self.template {
            Some(template) => template.replace("{repo}", repository.as_str()).replace("{rest}", rest),
            None => repository.to_string(),
        }
    }

    /// Whether its path makes sense for what a rule matches. An error: why not.
    pub fn check(&self, matching: &Matching) -> Result<(), String> {
        let Some(template) = &self.template else { return Ok(()) };
        let holds = |placeholder: &str| template.matches(placeholder).count();
        let places = holds("{repo}") + holds("{rest}");
        if holds("{rest}") > 0 && !matching.has_rest() {
            return Err(format!(
                "\"{self}\": {{rest}} is what a star at the end of match stands for, and \"{matching}\" has none"
            ));
        }
        // One repository may be called anything there.
        if places == 1 || (places == 0 && matching.is_of_one_repository()) {
            return Ok(());
        }
        Err(format!(
            "\"{self}\": the path is the repository there and must hold {{repo}} once, such as \"{}/{template}/{{repo}}\"",
            self.base()
        ))
    }

    /// `scheme://authority`
    pub fn base(&self) -> String {
        format!("{}://{}", self.scheme.as_str(), self.authority)
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
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("upstream \"{text}\": a query has no place here"));
        }
        let host = url.host_str().ok_or_else(|| format!("upstream \"{text}\" has no host"))?;
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let after_scheme = text.split_once("://").map_or("", |(_, rest)| rest);
        let path = after_scheme.split_once('/').map_or("", |(_, path)| path).trim_end_matches('/');
        let template = match path {
            "" | "v2" => None,
            path => Some(path.strip_prefix("v2/").unwrap_or(path).to_owned()),
        };
        if let Some(template) = &template {
            let example = template.replace("{repo}", "a").replace("{rest}", "a");
            if example.parse::<Repository>().is_err() {
                return Err(format!(
                    "upstream \"{text}\": the path is the repository there, with {{repo}} for the one that is asked for, \
                     such as \"https://{authority}/team/{{repo}}\""
                ));
            }
        }
        Ok(Self { scheme, authority, template })
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
        self.template.as_ref().map_or(Ok(()), |template| write!(f, "/{template}"))
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
            assert_eq!(text.parse::<Upstream>().unwrap().repository(&Matching::any(), &repo), want, "{text}");
        }
    }

    #[test]
    fn what_has_moved_is_found() {
        let name = |matching: &str, upstream: &str| {
            let (matching, upstream): (Matching, Upstream) = (matching.parse().unwrap(), upstream.parse().unwrap());
            upstream.check(&matching).map(|()| upstream.repository(&matching, &"team/sub/app".parse().unwrap()))
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
        ] {
            let message = text.parse::<Upstream>().unwrap_err();
            assert!(message.contains(want) && !message.contains("secret"), "{text}: {message}");
        }
    }
}
