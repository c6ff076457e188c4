//! From a request's path, query and `Host` to a registry, a repository and an endpoint.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode_str;

use super::digest::Digest;
use super::error::ErrorCode;
use super::name::{Reference, Registry, Repository};

/// A request that dray understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `GET /v2/`
    Ping,
    /// Anything below a repository of a registry.
    Content { registry: Registry, repository: Repository, endpoint: Endpoint, registry_from: RegistryFrom },
}

/// The requested part of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Manifest(Reference),
    Blob(Digest),
    Tags,
    Referrers(Digest),
    /// The repositories of a registry. It has no repository; [`CATALOG`] stands in for its name.
    Catalog,
}

/// The repository name under which a list of repositories is cached.
pub const CATALOG: &str = "catalog";

/// Which part of the request named the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegistryFrom {
    /// The `ns` query parameter of containerd and BuildKit.
    Namespace,
    /// The first component of the path: podman, CRI-O, Docker's URL style.
    Path,
    /// The `Host` header: the name of the registry resolves to dray.
    Host,
    /// No part: Docker's `registry-mirrors`, lazy snapshotters.
    Default,
}

/// The configuration that the naming rule needs.
pub trait Names {
    /// The registry of an alias without a port.
    fn alias(&self, component: &str) -> Option<Registry>;
    /// Whether a `Host` is a registry that a rule names, and not dray itself.
    fn host_is_registry(&self, host: &Registry) -> bool;
    /// The only configured registry, if there is only one.
    fn only_registry(&self) -> Option<Registry>;
}

/// A request that is not a valid registry request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteError {
    pub status: u16,
    pub code: ErrorCode,
    pub message: String,
}

/// Parses the target of a request.
///
/// `path` is the raw path, `query` the raw query without its question mark, `host` the value of
/// the `Host` header. The naming rule: `ns` wins; then a first path component that looks like a
/// host or is an alias; then a `Host` that a rule names; then Docker Hub.
pub fn parse(path: &str, query: Option<&str>, host: Option<&str>, names: &dyn Names) -> Result<Route, RouteError> {
    let path = percent_decode_str(path).decode_utf8().map_err(|_| not_found("the path is not UTF-8"))?;
    let below = match path.as_ref() {
        "/v2" | "/v2/" => return Ok(Route::Ping),
        other => other.strip_prefix("/v2/").ok_or_else(|| outside_api(other))?,
    };
    let namespace = namespace(query, names)?;
    if below == "_catalog" {
        return catalog(namespace, host, names);
    }
    let (name, endpoint) = split_endpoint(below)?;
    let (registry, registry_from, name) = resolve_registry(name, namespace, host, names)?;
    if name == "v2" || name.starts_with("v2/") {
        return Err(second_v2(&registry));
    }
    let repository = repository(&registry, name)?;
    Ok(Route::Content { registry, repository, endpoint: endpoint.parse()?, registry_from })
}

/// The value of a query parameter, decoded.
pub fn query_value<'a>(query: Option<&'a str>, key: &str) -> Option<Cow<'a, str>> {
    url::form_urlencoded::parse(query?.as_bytes()).find(|(k, _)| k == key).map(|(_, value)| value)
}

/// The registry whose repositories are listed: by `ns`, by `Host`, or the only one that is configured.
fn catalog(namespace: Option<Registry>, host: Option<&str>, names: &dyn Names) -> Result<Route, RouteError> {
    let by_host = || host.and_then(|host| host.parse().ok()).filter(|host| names.host_is_registry(host));
    let named = namespace.map(|registry| (registry, RegistryFrom::Namespace));
    let named = named.or_else(|| Some((by_host()?, RegistryFrom::Host)));
    let named = named.or_else(|| Some((names.only_registry()?, RegistryFrom::Default)));
    let (registry, registry_from) =
        named.ok_or_else(|| not_found("the request names no registry: add the query parameter ns=REGISTRY"))?;
    let repository = CATALOG.parse().expect("a repository name");
    Ok(Route::Content { registry, repository, endpoint: Endpoint::Catalog, registry_from })
}

enum RawEndpoint<'a> {
    Manifest(&'a str),
    Blob(&'a str),
    Tags,
    Referrers(&'a str),
}

/// Splits from the end: a repository may itself be called `a/manifests/b`.
fn split_endpoint(below: &str) -> Result<(&str, RawEndpoint<'_>), RouteError> {
    if let Some(name) = below.strip_suffix("/tags/list") {
        return Ok((name, RawEndpoint::Tags));
    }
    let (rest, last) = below.rsplit_once('/').ok_or_else(|| not_found("not an endpoint of the registry API"))?;
    let (name, kind) = rest.rsplit_once('/').ok_or_else(|| not_found("not an endpoint of the registry API"))?;
    match kind {
        "manifests" => Ok((name, RawEndpoint::Manifest(last))),
        "blobs" => Ok((name, RawEndpoint::Blob(last))),
        "referrers" => Ok((name, RawEndpoint::Referrers(last))),
        _ => Err(not_found("not an endpoint of the registry API")),
    }
}

fn namespace(query: Option<&str>, names: &dyn Names) -> Result<Option<Registry>, RouteError> {
    let Some(value) = query_value(query, "ns").filter(|v| !v.is_empty()) else {
        return Ok(None);
    };
    if let Some(registry) = names.alias(&value) {
        return Ok(Some(registry));
    }
    value.parse().map(Some).map_err(|_| RouteError {
        status: 400,
        code: ErrorCode::NameInvalid,
        message: format!("ns={value:?} is not a valid registry: expected HOST or HOST:PORT"),
    })
}

fn resolve_registry<'a>(
    name: &'a str,
    namespace: Option<Registry>,
    host: Option<&str>,
    names: &dyn Names,
) -> Result<(Registry, RegistryFrom, &'a str), RouteError> {
    let prefix = name.split_once('/').and_then(|(first, rest)| {
        let registry =
            names.alias(first).or_else(|| Registry::looks_like(first).then(|| first.parse().ok()).flatten())?;
        Some((registry, rest))
    });
    match (namespace, prefix) {
        // BuildKit sends both. If they agree, the prefix is not part of the repository.
        (Some(ns), Some((prefix, rest))) if prefix == ns => Ok((ns, RegistryFrom::Namespace, rest)),
        (Some(ns), _) => Ok((ns, RegistryFrom::Namespace, name)),
        (None, Some((prefix, rest))) => Ok((prefix, RegistryFrom::Path, rest)),
        (None, None) => {
            let named = host.and_then(|h| h.parse().ok()).filter(|h| names.host_is_registry(h));
            match named {
                Some(host) => Ok((host, RegistryFrom::Host, name)),
                None => Ok((Registry::docker_hub(), RegistryFrom::Default, name)),
            }
        }
    }
}

/// Docker Hub's official images live in `library/`, which some clients leave out.
fn repository(registry: &Registry, name: &str) -> Result<Repository, RouteError> {
    let official = registry.is_docker_hub() && !name.contains('/');
    let name = if official { Cow::Owned(format!("library/{name}")) } else { Cow::Borrowed(name) };
    name.parse().map_err(|_| RouteError {
        status: 404,
        code: ErrorCode::NameInvalid,
        message: format!(
            "{name:?} is not a valid repository name: expected lower-case components such as library/alpine"
        ),
    })
}

fn not_found(message: &str) -> RouteError {
    RouteError { status: 404, code: ErrorCode::Unsupported, message: message.to_owned() }
}

/// `override_path = true` with a mirror URL that lacks its `/v2`.
fn outside_api(path: &str) -> RouteError {
    let endpoint = ["/manifests/", "/blobs/", "/tags/list", "/referrers/"];
    if endpoint.iter().any(|part| path.contains(part)) {
        return not_found(
            "the path does not begin with /v2/: with override_path = true in hosts.toml the mirror's \
             URL must end in /v2; preferably remove override_path",
        );
    }
    not_found("not an endpoint of the registry API, whose paths begin with /v2/")
}

/// A mirror URL with a path but without `override_path = true`.
fn second_v2(registry: &Registry) -> RouteError {
    not_found(&format!(
        "the path contains a second v2/ after {registry}: a mirror URL with a path needs \
         override_path = true in hosts.toml, or preferably a URL without a path"
    ))
}

// === impl RawEndpoint ===

impl RawEndpoint<'_> {
    fn parse(self) -> Result<Endpoint, RouteError> {
        let digest = |text: &str| {
            text.parse::<Digest>().map_err(|error| RouteError {
                status: 400,
                code: ErrorCode::DigestInvalid,
                message: format!("{text:?}: {error}"),
            })
        };
        match self {
            Self::Manifest(text) => match text.parse() {
                Ok(reference) => Ok(Endpoint::Manifest(reference)),
                // The conformance suite requires 404 where a reference breaks the grammar.
                Err(_) => Err(RouteError {
                    status: 404,
                    code: ErrorCode::ManifestUnknown,
                    message: format!("{text:?} is neither a tag nor a sha256 or sha512 digest"),
                }),
            },
            Self::Blob(text) => digest(text).map(Endpoint::Blob),
            Self::Tags => Ok(Endpoint::Tags),
            Self::Referrers(text) => digest(text).map(Endpoint::Referrers),
        }
    }
}

// === impl RegistryFrom ===

impl RegistryFrom {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "ns",
            Self::Path => "path",
            Self::Host => "host",
            Self::Default => "default",
        }
    }
}

impl Route {
    /// The endpoint's name in logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Content { endpoint, .. } => match endpoint {
                Endpoint::Manifest(_) => "manifest",
                Endpoint::Blob(_) => "blob",
                Endpoint::Tags => "tags",
                Endpoint::Referrers(_) => "referrers",
                Endpoint::Catalog => "catalog",
            },
        }
    }
}

impl fmt::Display for RouteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed;

    impl Names for Fixed {
        fn alias(&self, component: &str) -> Option<Registry> {
            (component == "corp").then(|| "reg.corp:5000".parse().unwrap())
        }

        fn host_is_registry(&self, host: &Registry) -> bool {
            host.as_str() == "quay.io"
        }

        fn only_registry(&self) -> Option<Registry> {
            None
        }
    }

    fn named(path: &str, query: &str, host: &str) -> (String, String, &'static str) {
        match parse(path, Some(query), Some(host), &Fixed).unwrap() {
            Route::Content { registry, repository, registry_from, .. } => {
                (registry.to_string(), repository.to_string(), registry_from.as_str())
            }
            Route::Ping => panic!("a ping"),
        }
    }

    #[test]
    fn every_url_form_finds_its_registry() {
        let me = "127.0.0.1:5050";
        for (path, query, host, want) in [
            ("/v2/library/alpine/manifests/3", "ns=docker.io", me, ("docker.io", "library/alpine", "ns")),
            ("/v2/library/alpine/manifests/3", "ns=registry-1.docker.io", me, ("docker.io", "library/alpine", "ns")),
            ("/v2/app/manifests/3", "ns=myreg.io%3A5000", me, ("myreg.io:5000", "app", "ns")),
            ("/v2/app/manifests/3", "ns=corp", me, ("reg.corp:5000", "app", "ns")),
            ("/v2/docker.io/library/alpine/manifests/3", "ns=docker.io", me, ("docker.io", "library/alpine", "ns")),
            (
                "/v2/index.docker.io/library/alpine/manifests/3",
                "ns=docker.io",
                me,
                ("docker.io", "library/alpine", "ns"),
            ),
            ("/v2/ghcr.io/team/app/manifests/3", "ns=docker.io", me, ("docker.io", "ghcr.io/team/app", "ns")),
            ("/v2/ghcr.io/team/app/manifests/3", "", me, ("ghcr.io", "team/app", "path")),
            ("/v2/docker.io/alpine/manifests/3", "", me, ("docker.io", "library/alpine", "path")),
            ("/v2/localhost/app/manifests/3", "", me, ("localhost", "app", "path")),
            ("/v2/reg.io%3A5000/app/manifests/3", "", me, ("reg.io:5000", "app", "path")),
            ("/v2/reg.io:5000/app/manifests/3", "", me, ("reg.io:5000", "app", "path")),
            ("/v2/corp/app/manifests/3", "", me, ("reg.corp:5000", "app", "path")),
            ("/v2/team/app/manifests/3", "", "quay.io", ("quay.io", "team/app", "host")),
            ("/v2/team/app/manifests/3", "", me, ("docker.io", "team/app", "default")),
            ("/v2/alpine/manifests/3", "", me, ("docker.io", "library/alpine", "default")),
            ("/v2/a/manifests/b/manifests/3", "ns=x.io", me, ("x.io", "a/manifests/b", "ns")),
        ] {
            let (registry, repository, by) = named(path, query, host);
            assert_eq!((registry.as_str(), repository.as_str(), by), want, "{path}?{query}");
        }
    }

    #[test]
    fn endpoints_are_parsed() {
        let digest = Digest::of(b"");
        let of = |path: &str| parse(path, None, None, &Fixed).map(|r| r.as_str());
        assert_eq!(of("/v2/"), Ok("ping"));
        assert_eq!(of("/v2"), Ok("ping"));
        assert_eq!(of("/v2/a/tags/list"), Ok("tags"));
        assert_eq!(of(&format!("/v2/a/blobs/{digest}")), Ok("blob"));
        assert_eq!(of(&format!("/v2/a/referrers/{digest}")), Ok("referrers"));
        assert_eq!(parse("/v2/_catalog", Some("ns=ghcr.io&n=2"), None, &Fixed).map(|r| r.as_str()), Ok("catalog"));
        assert_eq!(parse("/v2/_catalog", None, Some("quay.io"), &Fixed).map(|r| r.as_str()), Ok("catalog"));
    }

    #[test]
    fn invalid_requests_have_specified_statuses() {
        for (path, status, code) in [
            ("/v2/a/manifests/.INVALID_MANIFEST_NAME", 404, ErrorCode::ManifestUnknown),
            ("/v2/a/manifests/sha256:baddigeststring", 404, ErrorCode::ManifestUnknown),
            ("/v2/a/blobs/sha256:baddigeststring", 400, ErrorCode::DigestInvalid),
            ("/v2/A/manifests/x", 404, ErrorCode::NameInvalid),
            ("/v2/_catalog", 404, ErrorCode::Unsupported),
            ("/v1/search", 404, ErrorCode::Unsupported),
            ("/v2/..%2f..%2fetc/manifests/x", 404, ErrorCode::NameInvalid),
            ("/v2/%ff/manifests/x", 404, ErrorCode::Unsupported),
        ] {
            let error = parse(path, None, None, &Fixed).unwrap_err();
            assert_eq!((error.status, error.code), (status, code), "{path}");
        }
        let error = parse("/v2/a/manifests/x", Some("ns=http://x"), None, &Fixed).unwrap_err();
        assert_eq!(error.status, 400);
    }

    #[test]
    fn override_path_mistakes_are_explained() {
        let error = parse("/v2/docker.io/v2/library/alpine/manifests/3", Some("ns=docker.io"), None, &Fixed);
        assert!(error.unwrap_err().message.contains("override_path = true"));
        let error = parse("/library/alpine/manifests/3", Some("ns=docker.io"), None, &Fixed);
        assert!(error.unwrap_err().message.contains("must end in /v2"));
    }
}
