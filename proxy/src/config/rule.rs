//! `[[registry]]`: a rule for some registries or repositories.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ByteRate, ConfigDuration, Credentials, RulePattern, UnlistedRegistries, Upstream, lists, units};
use crate::oci::Registry;

/// The settings of the registries that a pattern matches.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    #[serde(rename = "match")]
    pub pattern: RulePattern,
    /// Names without a port that stand for this registry in a path.
    #[serde(default, deserialize_with = "lists::list")]
    pub alias: Vec<String>,
    /// In order of preference. Empty: the registry itself.
    #[serde(default, deserialize_with = "lists::list")]
    pub upstreams: Vec<Upstream>,
    #[serde(default)]
    pub credentials: Option<Credentials>,
    /// Additional roots to trust for this rule's upstreams, or the certificates themselves that they present, PEM.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// The client certificate for upstreams that require one, PEM.
    #[serde(default)]
    pub client_cert: Option<ClientCert>,
    #[serde(default)]
    pub deny: bool,
    #[serde(default)]
    pub authorization: Authorization,
    /// How long a tag resolution is fresh.
    #[serde(default = "default_tag_ttl")]
    pub tag_ttl: ConfigDuration,
    /// The same for some tags; the first match wins.
    #[serde(default, deserialize_with = "lists::list")]
    pub tags: Vec<TagTtl>,
    /// Regular expressions of tags that never change.
    #[serde(default, deserialize_with = "units::regexes")]
    pub immutable_tags: Vec<String>,
    /// How long after its last confirmation a tag is served stale while the upstream fails.
    #[serde(default = "default_stale_if_error")]
    pub stale_if_error: ConfigDuration,
    /// How long "not found" is cached.
    #[serde(default = "default_negative_ttl")]
    pub negative_ttl: ConfigDuration,
    #[serde(default)]
    pub on_client_abort: OnClientAbort,
    #[serde(default)]
    pub cross_zone_peers: CrossZonePeers,
    /// Bytes per second from this rule's upstreams. None: no limit of its own.
    #[serde(default)]
    pub upstream_rate: Option<ByteRate>,
}

/// A certificate and its key, as files.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCert {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// How long the resolutions of some tags are fresh.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagTtl {
    /// A regular expression of the whole tag.
    #[serde(rename = "match", deserialize_with = "units::regex")]
    pub pattern: String,
    pub ttl: ConfigDuration,
}

/// Whether peers in other zones are used for a registry, if `peers.zones` allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CrossZonePeers {
    #[default]
    Always,
    /// Unless the registry was measured to be faster.
    UnlessSlower,
    Never,
}

/// What to do with a download when all its clients have disconnected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnClientAbort {
    /// Stop it, unless little is left; the received bytes are kept for a while.
    #[default]
    Stop,
    /// Complete it.
    Finish,
}

/// Which clients may pull what dray can pull by a rule.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authorization {
    /// Every client.
    #[default]
    Shared,
    /// A client that may pull it from the registry with its own pull secret.
    Passthrough,
}

impl RuleConfig {
    /// The rule behind all others.
    pub fn implicit(unlisted: UnlistedRegistries) -> Self {
        Self {
            pattern: RulePattern::any(),
            alias: Vec::new(),
            upstreams: Vec::new(),
            credentials: None,
            ca: None,
            client_cert: None,
            deny: unlisted == UnlistedRegistries::Deny,
            authorization: Authorization::Shared,
            tag_ttl: default_tag_ttl(),
            tags: Vec::new(),
            immutable_tags: Vec::new(),
            stale_if_error: default_stale_if_error(),
            negative_ttl: default_negative_ttl(),
            on_client_abort: OnClientAbort::Stop,
            cross_zone_peers: CrossZonePeers::Always,
            upstream_rate: None,
        }
    }

    /// The first key that is wrong by itself, and the problem.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.deny && self.client_cert.is_some() {
            return Err(("registry.client_cert", "has no effect with deny = true: remove it".to_owned()));
        }
        if self.deny && (!self.upstreams.is_empty() || self.credentials.is_some()) {
            return Err(("registry.deny", "a denied registry has no upstreams and no credentials".to_owned()));
        }
        if self.deny && self.upstream_rate.is_some() {
            return Err(("registry.upstream_rate", "has no effect with deny = true: remove it".to_owned()));
        }
        for upstream in &self.upstreams {
            upstream.check(&self.pattern).map_err(|problem| ("registry.upstreams", problem))?;
        }
        if self.authorization == Authorization::Passthrough {
            self.check_clients_access().map_err(|(key, problem)| (key, problem.to_owned()))?;
        }
        let one_secret = self.credentials.as_ref().is_some_and(Credentials::is_one_secret);
        if one_secret && self.upstreams.is_empty() && self.pattern.host.is_glob() {
            let problem = format!(
                "\"{}\" matches hosts that a client chooses, and each would get the password: set upstreams, or \
                 credentials = {{ file = ... }}",
                self.pattern
            );
            return Err(("registry.credentials", problem));
        }
        if self.client_cert.is_some() && self.upstreams.is_empty() && self.pattern.host.is_glob() {
            let problem = format!(
                "\"{}\" matches hosts that a client chooses, and each would get the certificate: set upstreams",
                self.pattern
            );
            return Err(("registry.client_cert", problem));
        }
        self.alias.iter().try_for_each(|alias| self.check_alias(alias).map_err(|problem| ("registry.alias", problem)))
    }

    /// Keys that exclude `authorization = "passthrough"`.
    fn check_clients_access(&self) -> Result<(), (&'static str, &'static str)> {
        if self.credentials.is_some() {
            return Err((
                "registry.credentials",
                "have no effect with authorization = \"passthrough\": each client has its own",
            ));
        }
        if self.upstreams.len() > 1 {
            let problem = "authorization = \"passthrough\" supports exactly one upstream: the rights of a client are those at one registry";
            return Err(("registry.upstreams", problem));
        }
        Ok(())
    }

    fn check_alias(&self, alias: &str) -> Result<(), String> {
        if Registry::looks_like(alias) || alias.contains('/') || alias.is_empty() {
            return Err(format!("\"{alias}\" must be a plain name: no dot, colon or slash"));
        }
        if !self.pattern.is_of_registries() {
            return Err(format!(
                "\"{alias}\" is a name for a registry, but \"{}\" is about repositories",
                self.pattern
            ));
        }
        if self.pattern.host.is_glob() {
            return Err(format!("\"{alias}\" needs a rule for one host, and \"{}\" matches several", self.pattern));
        }
        Ok(())
    }
}

fn default_tag_ttl() -> ConfigDuration {
    ConfigDuration::seconds(60)
}

fn default_stale_if_error() -> ConfigDuration {
    ConfigDuration::seconds(30 * 24 * 3600)
}

fn default_negative_ttl() -> ConfigDuration {
    ConfigDuration::seconds(2)
}
