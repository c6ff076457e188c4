//! The configuration file. A loaded configuration is complete: every default is filled in.
//!
//! Unknown keys, wrong units, unreachable rules and duplicates are errors that name file, line and
//! key. An accepted key is never ignored.

mod addresses;
mod containerd;
mod credentials;
mod lists;
mod log;
mod pattern;
mod peers;
mod prefetch;
mod renamed;
mod rule;
mod rule_pattern;
mod text;
mod tracing;
mod units;
mod upstream;
mod zones;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use toml::Spanned;

pub use addresses::address;
pub use containerd::{ContainerdConfig, Mirror, WrongMirror};
pub use credentials::{Cloud, Credentials, PasswordSource};
pub use log::{LogConfig, LogFilter};
pub use pattern::{HostPattern, host_matches};
pub use peers::{Mtls, PeersConfig, Zone, Zones};
pub use prefetch::{Pin, Prefetch, Schedule, platform};
pub use rule::{Authorization, ClientCert, CrossZonePeers, OnClientAbort, RuleConfig, TagTtl};
pub use rule_pattern::RulePattern;
pub use text::{KeyConflict, SourceText};
pub use tracing::Tracing;
pub use units::{ByteRate, ConfigDuration, DiskShare, Size, whole_tag};
pub use upstream::{Scheme, Upstream};
pub use zones::service_name;

/// The whole configuration, with every default filled in.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The version of the keys. A file for a later version is refused.
    #[serde(deserialize_with = "units::version")]
    pub version: u64,
    /// The registry port, for container runtimes and other clients.
    #[serde(deserialize_with = "addresses::one")]
    pub listen: SocketAddr,
    /// The admin port, for operators and probes.
    #[serde(deserialize_with = "addresses::one")]
    pub admin: SocketAddr,
    /// The file with the token for the status page. None: the page is shown on loopback only.
    pub admin_token_file: Option<PathBuf>,
    pub cache: CacheConfig,
    pub access: AccessConfig,
    pub egress: EgressConfig,
    pub limits: LimitsConfig,
    pub dns: DnsConfig,
    pub tls: TlsConfig,
    /// Rules in order; the first match wins.
    #[serde(deserialize_with = "lists::list")]
    pub registry: Vec<Spanned<RuleConfig>>,
    #[serde(deserialize_with = "lists::list")]
    pub prefetch: Vec<Prefetch>,
    #[serde(deserialize_with = "lists::list")]
    pub pin: Vec<Pin>,
    pub peers: PeersConfig,
    pub containerd: ContainerdConfig,
    pub tracing: Tracing,
    pub log: LogConfig,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    pub dir: PathBuf,
    /// Disk space in all.
    pub disk: DiskShare,
    /// Free space of the file system that dray never uses.
    pub min_free: DiskShare,
    /// Bytes per second that the scrub reads; 0: no scrub.
    pub scrub_rate: Size,
    /// Memory for small objects.
    pub memory: Size,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessConfig {
    /// Registries that no rule matches.
    pub unlisted_registries: UnlistedRegistries,
    /// Networks of clients that may connect. Empty: all.
    #[serde(deserialize_with = "addresses::networks")]
    pub allowed_cidrs: Vec<IpNet>,
    /// Names, beside its addresses, under which web browsers may reach this process.
    #[serde(deserialize_with = "addresses::hosts")]
    pub hosts: Vec<String>,
    /// Open requests of one client address.
    pub max_concurrent_requests: Option<NonZeroU16>,
    pub max_requests_per_second: Option<NonZeroU16>,
    /// Users by lines of `user:password`. None: no login is required.
    pub users_file: Option<PathBuf>,
    /// A secret with which instances accept each other's client tokens.
    pub token_key_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnlistedRegistries {
    #[default]
    Allow,
    Deny,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressConfig {
    /// Networks, beside the public Internet, that requests to hosts outside of this file may reach.
    #[serde(deserialize_with = "addresses::networks")]
    pub allow_cidrs: Vec<IpNet>,
}

/// Bandwidth limits of this process. None: unlimited.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// From all upstreams.
    pub upstream: Option<ByteRate>,
    /// To all peers.
    pub peer_upload: Option<ByteRate>,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DnsConfig {
    /// Name servers to use instead of the system's.
    #[serde(deserialize_with = "addresses::many")]
    pub servers: Vec<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Certificate chain of the registry listener, PEM.
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    /// Clients must present a certificate signed by this CA.
    pub client_ca: Option<PathBuf>,
    /// Additional roots to trust for every upstream, PEM.
    pub ca: Option<PathBuf>,
}

/// The version of the keys below. Removing a key, or changing its meaning, increments it.
const VERSION: u64 = 1;

/// The smallest cache. Smaller: the preallocated files for small objects leave no room for blobs.
pub const MIN_DISK: Size = Size(64 << 20);

/// An error in a configuration, and its place.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{file}: cannot be read: {source}")]
    Unreadable { file: String, source: std::io::Error },
    #[error("{file}: {error}{}", renamed::hint(&error.to_string()))]
    Syntax { file: String, error: Box<toml::de::Error> },
    /// `place` is the file, with the line if there is one; `written` is the text of that line.
    #[error("{place}: {wrong}{written}")]
    Invalid { place: String, wrong: KeyConflict, written: String },
}

// === impl Config ===

impl Config {
    /// Parses and checks a text; `file` is only for messages.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        SourceText::new(text, file).parse()
    }

    /// A client must not get around a rule that denies by adding a port.
    fn deny_on_every_port(&mut self) {
        for rule in self.registry.iter_mut().map(Spanned::get_mut).filter(|rule| rule.deny) {
            rule.pattern = rule.pattern.clone().on_every_port();
        }
    }

    /// A hash of what all nodes of a cluster have in common.
    pub fn hash(&self) -> String {
        let mut common = self.clone();
        let any = Self::default();
        (common.listen, common.admin, common.cache.dir) = (any.listen, any.admin, any.cache.dir);
        (common.peers.listen, common.peers.zone) = (any.peers.listen, any.peers.zone);
        // The position of a rule in the file has no effect.
        common.registry = common.registry.into_iter().map(|rule| Spanned::new(0..0, rule.into_inner())).collect();
        let digest = Sha256::digest(format!("{common:?}"));
        digest[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn check(&self, text: &SourceText) -> Result<(), KeyConflict> {
        if self.cache.disk.is_below(MIN_DISK) {
            let problem = format!("\"{}\" is too small: at least {MIN_DISK} is needed", self.cache.disk);
            return Err(KeyConflict::new("cache.disk", problem));
        }
        self.check_addresses()?;
        if self.tls.cert.is_some() != self.tls.key.is_some() {
            return Err(KeyConflict::new("tls", "cert and key must be set together"));
        }
        if self.tls.client_ca.is_some() && self.tls.cert.is_none() {
            return Err(KeyConflict::new("tls.client_ca", "needs cert and key"));
        }
        self.peers.check()?;
        if let Some(key) = self.containerd.is_useless() {
            return Err(KeyConflict::new(key, "has no effect without containerd.hosts_dir"));
        }
        if let Some(key) = self.tracing.is_useless() {
            return Err(KeyConflict::new(key, "has no effect without tracing.otlp"));
        }
        self.check_rules(text)
    }

    /// Checks what flags and environment variables can still change.
    pub fn check_together(&self) -> Result<(), KeyConflict> {
        self.peers.check()?;
        self.check_addresses()?;
        let is_passthrough = |rule: &&Spanned<RuleConfig>| rule.get_ref().authorization == Authorization::Passthrough;
        match self.registry.iter().find(is_passthrough) {
            Some(rule) if self.peers.listen.is_some() && !self.peers.are_authenticated() => {
                let problem = format!(
                    "\"passthrough\" of \"{}\" with peers needs peers.key_file (or --peers-key-file, DRAY_PEERS_KEY_FILE) or \
                     peers.mtls: otherwise every client of the peer port could act as a peer",
                    rule.get_ref().pattern
                );
                Err(KeyConflict::of_rule(rule.span().start, "registry.authorization", problem))
            }
            _ => Ok(()),
        }
    }

    /// The kernel would let two listeners share an address, and distribute the connections over both.
    fn check_addresses(&self) -> Result<(), KeyConflict> {
        let all = [("listen", Some(self.listen)), ("admin", Some(self.admin)), ("peers.listen", self.peers.listen)];
        let all: Vec<_> = all.into_iter().filter_map(|(key, address)| Some((key, address?))).collect();
        for (nth, (key, address)) in all.iter().enumerate() {
            let is_same = |(_, other): &&(&str, SocketAddr)| {
                let (one, two) = (address.ip(), other.ip());
                let meets = one == two || one.is_unspecified() || two.is_unspecified();
                address.port() == other.port() && address.port() != 0 && meets
            };
            if let Some((other, _)) = all[nth + 1..].iter().find(is_same) {
                let problem =
                    format!("{key} and {other} have the same address, {address}: each needs an address of its own");
                return Err(KeyConflict::new(other, problem));
            }
        }
        Ok(())
    }

    fn check_rules(&self, text: &SourceText) -> Result<(), KeyConflict> {
        let mut aliases: HashMap<&str, &RulePattern> = HashMap::new();
        for (index, spanned) in self.registry.iter().enumerate() {
            let (rule, start) = (spanned.get_ref(), spanned.span().start);
            let mut earlier = self.registry[..index].iter();
            if let Some(cover) = earlier.find(|earlier| earlier.get_ref().pattern.covers(&rule.pattern)) {
                let (line, cover) = (text.line_at(cover.span().start), &cover.get_ref().pattern);
                let problem =
                    format!("\"{}\" is never reached: \"{cover}\" of line {line} matches first", rule.pattern);
                return Err(KeyConflict::of_rule(start, "registry.match", problem));
            }
            rule.check().map_err(|(key, problem)| KeyConflict::of_rule(start, key, problem))?;
            if rule.authorization == Authorization::Passthrough && self.access.users_file.is_some() {
                let problem =
                    "\"passthrough\" cannot be combined with access.users_file: a client sends only one credential";
                return Err(KeyConflict::of_rule(start, "registry.authorization", problem));
            }
            for alias in &rule.alias {
                if let Some(other) = aliases.insert(alias, &rule.pattern) {
                    let problem = format!("\"{alias}\" is already the alias of \"{other}\"");
                    return Err(KeyConflict::of_rule(start, "registry.alias", problem));
                }
            }
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: VERSION,
            listen: SocketAddr::from(([127, 0, 0, 1], 5050)),
            admin: SocketAddr::from(([127, 0, 0, 1], 5051)),
            admin_token_file: None,
            cache: CacheConfig::default(),
            access: AccessConfig::default(),
            egress: EgressConfig::default(),
            limits: LimitsConfig::default(),
            dns: DnsConfig::default(),
            tls: TlsConfig::default(),
            registry: Vec::new(),
            prefetch: Vec::new(),
            pin: Vec::new(),
            peers: PeersConfig::default(),
            containerd: ContainerdConfig::default(),
            tracing: Tracing::default(),
            log: LogConfig::default(),
        }
    }
}

// === impl Cache ===

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: default_dir(),
            disk: DiskShare::Size(Size(20 << 30)),
            min_free: DiskShare::Percent(5),
            scrub_rate: Size(8 << 20),
            memory: Size(64 << 20),
        }
    }
}

/// `/var/cache/dray` for root, otherwise `dray` in the user's XDG cache home.
fn default_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/cache/dray");
    }
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map_or_else(|| PathBuf::from("/var/cache/dray"), |cache| cache.join("dray"))
}

#[cfg(test)]
mod tests;
