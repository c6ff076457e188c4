//! `[[registry]]`: what holds for some registries or repositories.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigDuration, Credentials, RulePattern, UnlistedRegistries, Upstream, lists, units};
use crate::oci::Registry;

/// What holds for the registries that a pattern matches.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    #[serde(rename = "match")]
    pub pattern: RulePattern,
    /// Names without a port by which clients may call this registry in a path.
    #[serde(default, deserialize_with = "lists::list")]
    pub alias: Vec<String>,
    /// Where to fetch from, in order. Empty: the registry itself.
    #[serde(default, deserialize_with = "lists::list")]
    pub upstreams: Vec<Upstream>,
    #[serde(default)]
    pub credentials: Option<Credentials>,
    /// Further roots to trust for this rule's upstreams, or the very certificates that they show, PEM.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// What this rule's upstreams are shown where they want to know who connects, PEM.
    #[serde(default)]
    pub client_cert: Option<ClientCert>,
    #[serde(default)]
    pub deny: bool,
    #[serde(default)]
    pub access: Authorization,
    /// For how long a tag is believed without asking.
    #[serde(default = "default_tag_ttl")]
    pub tag_ttl: ConfigDuration,
    /// The same for some tags; the first that matches holds.
    #[serde(default, deserialize_with = "lists::list")]
    pub tags: Vec<TagTtl>,
    /// Regular expressions of tags that never change.
    #[serde(default, deserialize_with = "units::regexes")]
    pub immutable_tags: Vec<String>,
    /// For how long after it was last asked a tag is served while the origin is in trouble.
    #[serde(default = "default_stale_for")]
    pub stale_for: ConfigDuration,
    /// For how long a "not found" is believed.
    #[serde(default = "default_negative_ttl")]
    pub negative_ttl: ConfigDuration,
    #[serde(default)]
    pub abandoned: OnClientAbort,
    #[serde(default)]
    pub far_peers: CrossZonePeers,
}

/// A certificate and its key, as files.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCert {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// For how long some tags are believed without asking.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagTtl {
    /// A regular expression of the whole tag.
    #[serde(rename = "match", deserialize_with = "units::regex")]
    pub pattern: String,
    pub ttl: ConfigDuration,
}

/// Whether peers in other zones are asked for what a registry serves, where `peers.zones` lets them be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CrossZonePeers {
    #[default]
    Always,
    /// Unless the registry was found to be faster.
    UnlessSlower,
    Never,
}

/// What becomes of a blob that is being fetched when everybody who asked for it has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnClientAbort {
    /// Fetching stops, unless little is left; what is there is kept for a while.
    #[default]
    Keep,
    /// It is fetched to its end.
    Finish,
}

/// Who may have what a rule can pull.
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authorization {
    /// Every caller.
    #[default]
    Shared,
    /// Whoever could pull it from the registry itself.
    Client,
}

impl RuleConfig {
    /// The rule that stands behind all others.
    pub fn implicit(unlisted: UnlistedRegistries) -> Self {
        Self {
            pattern: RulePattern::any(),
            alias: Vec::new(),
            upstreams: Vec::new(),
            credentials: None,
            ca: None,
            client_cert: None,
            deny: unlisted == UnlistedRegistries::Deny,
            access: Authorization::Shared,
            tag_ttl: default_tag_ttl(),
            tags: Vec::new(),
            immutable_tags: Vec::new(),
            stale_for: default_stale_for(),
            negative_ttl: default_negative_ttl(),
            abandoned: OnClientAbort::Keep,
            far_peers: CrossZonePeers::Always,
        }
    }

    /// The key and the problem, where something in it makes no sense by itself.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.deny && self.client_cert.is_some() {
            return Err(("registry.client_cert", "a denied registry is shown no certificate".to_owned()));
        }
        if self.deny && (!self.upstreams.is_empty() || self.credentials.is_some()) {
            return Err(("registry.deny", "a denied registry has no upstreams and no credentials".to_owned()));
        }
        for upstream in &self.upstreams {
            upstream.check(&self.pattern).map_err(|problem| ("registry.upstreams", problem))?;
        }
        if self.access == Authorization::Client {
            self.check_clients_access().map_err(|(key, problem)| (key, problem.to_owned()))?;
        }
        let one_secret = self.credentials.as_ref().is_some_and(Credentials::is_one_secret);
        if one_secret && self.upstreams.is_empty() && self.pattern.host.is_glob() {
            let problem = format!(
                "a username for every host that \"{}\" matches would send the password to hosts that others choose: \
                 name the upstreams, or use credentials = {{ file = ... }}",
                self.pattern
            );
            return Err(("registry.credentials", problem));
        }
        if self.client_cert.is_some() && self.upstreams.is_empty() && self.pattern.host.is_glob() {
            let problem = format!(
                "one certificate for every host that \"{}\" matches would be shown to hosts that others choose: name the \
                 upstreams",
                self.pattern
            );
            return Err(("registry.client_cert", problem));
        }
        self.alias.iter().try_for_each(|alias| self.check_alias(alias).map_err(|problem| ("registry.alias", problem)))
    }

    /// What a rule by which callers come with their own rights cannot have.
    fn check_clients_access(&self) -> Result<(), (&'static str, &'static str)> {
        if self.credentials.is_some() {
            return Err(("registry.credentials", "are of no use with access = \"client\": callers bring their own"));
        }
        if self.upstreams.len() > 1 {
            let problem = "access = \"client\" takes one: a caller's rights are those at one registry";
            return Err(("registry.upstreams", problem));
        }
        Ok(())
    }

    fn check_alias(&self, alias: &str) -> Result<(), String> {
        if Registry::looks_like(alias) || alias.contains('/') || alias.is_empty() {
            return Err(format!("\"{alias}\" must be a plain name: no dot, colon or slash"));
        }
        if !self.pattern.is_of_registries() {
            return Err(format!("\"{alias}\" stands for a registry, but \"{}\" is about repositories", self.pattern));
        }
        if self.pattern.host.is_glob() {
            return Err(format!("\"{alias}\" cannot stand for the many hosts of \"{}\"", self.pattern));
        }
        Ok(())
    }
}

fn default_tag_ttl() -> ConfigDuration {
    ConfigDuration::seconds(60)
}

fn default_stale_for() -> ConfigDuration {
    ConfigDuration::seconds(30 * 24 * 3600)
}

fn default_negative_ttl() -> ConfigDuration {
    ConfigDuration::seconds(2)
}
