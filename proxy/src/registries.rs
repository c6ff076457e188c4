//! Which rule holds for a registry, and where its content is fetched from.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use regex::Regex;
use xxhash_rust::xxh64::xxh64;

use crate::config::{
    self, Authorization, ClientCert, Config, Credentials, CrossZonePeers, OnClientAbort, RulePattern, Scheme, Upstream,
};
use crate::oci::route::Names;
use crate::oci::{Registry, Repository, Tag};
use crate::principal::Principal;
use crate::provenance::Provenance;

/// The rules of a configuration, ready to be asked.
pub struct Registries {
    /// In order; the last one matches everything.
    rules: Vec<Arc<Rule>>,
    aliases: HashMap<String, Registry>,
    listen: SocketAddr,
}

/// What holds for the registries that a pattern matches.
pub struct Rule {
    /// Which of the rules it is.
    pub nth: usize,
    pattern: RulePattern,
    upstreams: Vec<Upstream>,
    pub credentials: Option<Credentials>,
    pub tls: RuleTls,
    pub deny: bool,
    tag_ttl: Duration,
    tags: Vec<(Regex, Duration)>,
    pub stale_for: Duration,
    pub negative_ttl: Duration,
    pub abandoned: OnClientAbort,
    pub far_peers: CrossZonePeers,
    access: Authorization,
    immutable_tags: Vec<Regex>,
    fingerprint: String,
}

/// How a rule's upstreams prove who they are, and dray to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RuleTls {
    pub ca: Option<PathBuf>,
    pub client_cert: Option<ClientCert>,
}

/// A repository as a client named it, with the rule that holds for it.
#[derive(Clone)]
pub struct RepositoryRef {
    pub rule: Arc<Rule>,
    pub registry: Registry,
    pub repository: Repository,
    /// Whose rights it is asked with.
    pub caller: Principal,
}

/// How far an upstream may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpstreamTrust {
    /// Written in the configuration: trusted as written.
    Written,
    /// Derived from what a client or an origin said: https to public addresses only.
    Derived,
}

impl Registries {
    pub fn new(config: &Config) -> Self {
        let implicit = config::RuleConfig::implicit(config.access.unlisted);
        let mut aliases = HashMap::new();
        let written = config.registry.iter().map(|spanned| spanned.get_ref());
        for rule in written.clone() {
            for alias in &rule.alias {
                if let Ok(registry) = rule.pattern.host.as_str().parse() {
                    aliases.insert(alias.clone(), registry);
                }
            }
        }
        let rules = written.chain([&implicit]).enumerate();
        let rules = rules.map(|(nth, rule)| Arc::new(Rule::new(nth, rule, &config.guard))).collect();
        Self { rules, aliases, listen: config.listen }
    }

    /// The first rule that matches.
    pub fn rule(&self, registry: &Registry, repository: &Repository) -> &Arc<Rule> {
        self.rules
            .iter()
            .find(|rule| rule.pattern.matches(registry, repository))
            .expect("the implicit last rule matches every registry")
    }

    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// Whether some rule wants to know who asks.
    pub fn ask_who(&self) -> bool {
        self.rules.iter().any(|rule| rule.asks_who())
    }

    /// Whether a `Host` is this process rather than a registry.
    fn is_own_address(&self, host: &Registry) -> bool {
        let literal = host.host().trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let same_port = host.port().unwrap_or(80) == self.listen.port();
        host.as_str() == self.listen.to_string() || (same_port && (literal || host.host() == "localhost"))
    }
}

impl RepositoryRef {
    /// A place where nobody has been let in yet, if that is what its rule wants.
    pub fn new(rule: Arc<Rule>, registry: Registry, repository: Repository) -> Self {
        let caller = if rule.asks_who() { Principal::Unknown } else { Principal::Everyone };
        Self { rule, registry, repository, caller }
    }

    /// What its repository is called at an upstream.
    pub fn repository_at(&self, upstream: &Upstream) -> String {
        self.rule.repository_at(upstream, &self.registry, &self.repository)
    }

    /// Whether an object came from here.
    pub fn is_source_of(&self, from: &Provenance) -> bool {
        from.registry == self.registry.as_str() && from.repository == self.repository.as_str()
    }

    /// What is remembered of objects that come from here.
    pub fn provenance(&self) -> Provenance {
        Provenance {
            rule: self.rule.name().to_owned(),
            registry: self.registry.to_string(),
            repository: self.repository.to_string(),
        }
    }
}

impl PartialEq for RepositoryRef {
    /// A registry has one rule, so the names say it all.
    fn eq(&self, other: &Self) -> bool {
        self.registry == other.registry && self.repository == other.repository
    }
}

impl fmt::Display for RepositoryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)
    }
}

impl Names for Registries {
    fn alias(&self, component: &str) -> Option<Registry> {
        self.aliases.get(component).cloned()
    }

    fn host_is_registry(&self, host: &Registry) -> bool {
        // A ban is for all ports, but does not make this process, under a name of its own, a registry.
        let named = |rule: &Arc<Rule>| !rule.pattern.host.is_any() && rule.pattern.host.names(host);
        self.rules.iter().any(named) && !self.is_own_address(host)
    }

    fn only_registry(&self) -> Option<Registry> {
        self.only_named()
    }
}

impl Registries {
    /// The one registry that rules name, if they name one.
    fn only_named(&self) -> Option<Registry> {
        let named = self.rules.iter().filter(|rule| !rule.pattern.host.is_any());
        let mut names = named.map(|rule| rule.pattern.host.as_str().parse().ok());
        let first: Registry = names.next()??;
        names.all(|name| name.as_ref() == Some(&first)).then_some(first)
    }
}

impl Rule {
    fn new(nth: usize, rule: &config::RuleConfig, guard: &config::EgressConfig) -> Self {
        Self {
            nth,
            pattern: rule.pattern.clone(),
            upstreams: rule.upstreams.clone(),
            credentials: rule.credentials.clone(),
            tls: RuleTls { ca: rule.ca.clone(), client_cert: rule.client_cert.clone() },
            deny: rule.deny,
            tag_ttl: rule.tag_ttl.0,
            tags: rule.tags.iter().filter_map(|tag| Some((config::whole_tag(&tag.pattern).ok()?, tag.ttl.0))).collect(),
            stale_for: rule.stale_for.0,
            negative_ttl: rule.negative_ttl.0,
            abandoned: rule.abandoned,
            far_peers: rule.far_peers,
            access: rule.access,
            // The configuration refused patterns that do not compile.
            immutable_tags: rule.immutable_tags.iter().filter_map(|p| config::whole_tag(p).ok()).collect(),
            fingerprint: fingerprint(rule, guard),
        }
    }

    /// The same on nodes that would fetch the same in the same way.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The rule's name in logs, metrics and records: its pattern.
    pub fn name(&self) -> &str {
        self.pattern.as_str()
    }

    /// Where to fetch from, in order.
    pub fn upstreams(&self, registry: &Registry) -> Vec<(Upstream, UpstreamTrust)> {
        if self.upstreams.is_empty() {
            let authority = if registry.is_docker_hub() { "registry-1.docker.io" } else { registry.as_str() };
            return vec![(Upstream::new(Scheme::Https, authority), UpstreamTrust::Derived)];
        }
        self.upstreams.iter().map(|upstream| (upstream.clone(), UpstreamTrust::Written)).collect()
    }

    /// What a repository is called at an upstream.
    fn repository_at(&self, upstream: &Upstream, registry: &Registry, repository: &Repository) -> String {
        upstream.repository(&self.pattern, registry, repository)
    }

    /// For how long a tag is believed without asking.
    pub fn lease_of(&self, tag: &Tag) -> Duration {
        if self.immutable_tags.iter().any(|pattern| pattern.is_match(tag.as_str())) {
            return Duration::MAX;
        }
        let of_some = self.tags.iter().find(|(pattern, _)| pattern.is_match(tag.as_str()));
        of_some.map_or(self.tag_ttl, |(_, ttl)| *ttl)
    }

    /// Whether what it fetches may need a secret that other processes do not have.
    pub fn is_private(&self) -> bool {
        self.credentials.is_some() || self.tls.client_cert.is_some() || self.asks_who()
    }

    /// Whether everybody gets only what the registry would give them.
    pub fn asks_who(&self) -> bool {
        self.access == Authorization::Client
    }
}

/// What decides where something comes from, who may have it, and for how long it is believed. Never a
/// secret, and no file's place: nodes may keep theirs elsewhere.
fn fingerprint(rule: &config::RuleConfig, guard: &config::EgressConfig) -> String {
    let upstreams: Vec<_> = rule.upstreams.iter().map(Upstream::to_string).collect();
    let credentials = match &rule.credentials {
        None => "none".to_owned(),
        Some(Credentials::DockerConfig { .. }) => "a docker config".to_owned(),
        Some(Credentials::Static { username, .. }) => format!("of {username}"),
        Some(Credentials::Helper { name }) => format!("of the helper {name}"),
        Some(Credentials::Provider { .. }) => "of the kubelet's plugins".to_owned(),
        Some(Credentials::Cloud(cloud)) => format!("of the cloud {cloud:?}"),
    };
    let mut text = format!(
        "{} {upstreams:?} {credentials:?} {} {:?} {:?} {:?}",
        rule.pattern.as_str(),
        rule.deny,
        rule.tag_ttl.0,
        rule.immutable_tags,
        guard.allow,
    );
    // What earlier releases do not know changes nothing where it is not used.
    if !rule.tags.is_empty() {
        text += &format!(" {:?}", rule.tags);
    }
    if rule.client_cert.is_some() {
        text += " client_cert";
    }
    if rule.access != Authorization::Shared {
        text += &format!(" {:?}", rule.access);
    }
    format!("{:016x}", xxh64(text.as_bytes(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_of_what_decides() {
        let of = |text: &str| registries(text).rules()[0].fingerprint().to_owned();
        let plain = of("[[registry]]\nmatch = \"a.io\"");
        assert_eq!(plain, "23f3ed28e87080c2", "nodes of two releases would not share what is private, nor tags");
        let at = |path: &str| format!("[[registry]]\nmatch = \"a.io\"\nupstreams = [\"https://b.io/{path}\"]");
        assert_ne!(of(&at("x/{repo}")), of(&at("y/{repo}")));
        let none = "[[registry]]\nmatch = \"a.io\"\ncredentials = { username = \"none\", password_env = \"HOME\" }";
        assert_ne!(plain, of(none), "nobody is called that");
        assert_eq!(plain, of("listen = \"127.0.0.1:1\"\n[[registry]]\nmatch = \"a.io\"\nnegative_ttl = \"9s\""));
        let secret = "credentials = { username = \"u\", password_env = ";
        let with = |name: &str| of(&format!("[[registry]]\nmatch = \"a.io\"\n{secret}\"{name}\" }}"));
        assert_eq!(with("A"), with("B"));
        for other in ["deny = true", "upstreams = [\"http://m\"]", "tag_ttl = \"9s\"", "immutable_tags = [\"v\"]"] {
            assert_ne!(plain, of(&format!("[[registry]]\nmatch = \"a.io\"\n{other}")), "{other}");
        }
        assert_ne!(plain, with("A"));
        let shown = "client_cert = { cert = \"c\", key = \"k\" }";
        assert_ne!(plain, of(&format!("[[registry]]\nmatch = \"a.io\"\n{shown}")));
        assert_ne!(plain, of("[[registry]]\nmatch = \"a.io\"\ntags = [{ match = \"x\", ttl = \"9s\" }]"));
    }

    fn any() -> Repository {
        "team/app".parse().unwrap()
    }

    #[test]
    fn a_rule_may_be_about_some_repositories() {
        let registries = registries(
            "[[registry]]\nmatch = \"docker.io/kubeflow/*\"\nupstreams = [\"https://ghcr.io/{repo}\"]\n\
             [[registry]]\nmatch = \"docker.io\"\ndeny = true",
        );
        let rule = |repository: &str| registries.rule(&Registry::docker_hub(), &repository.parse().unwrap());
        assert_eq!(rule("kubeflow/spark-operator").name(), "docker.io/kubeflow/*");
        assert!(rule("library/alpine").deny);
        assert!(registries.host_is_registry(&Registry::docker_hub()));
    }

    fn registries(text: &str) -> Registries {
        Registries::new(&Config::parse(text, "test").unwrap())
    }

    #[test]
    fn the_first_match_wins_and_something_always_matches() {
        let registries = registries(
            "[[registry]]\nmatch = \"ghcr.io\"\nupstreams = [\"http://m1\", \"https://m2/x/{repo}\"]\n\
             [[registry]]\nmatch = \"*.io\"\ndeny = true",
        );
        let ghcr: Registry = "ghcr.io".parse().unwrap();
        let upstreams = registries.rule(&ghcr, &any()).upstreams(&ghcr);
        assert_eq!(upstreams.len(), 2);
        assert!(upstreams.iter().all(|(_, trust)| *trust == UpstreamTrust::Written));
        assert!(registries.rule(&"quay.io".parse().unwrap(), &any()).deny);
        let hub = Registry::docker_hub();
        assert_eq!(registries.rule(&"mcr.microsoft.com".parse().unwrap(), &any()).name(), "*");
        assert_eq!(registries.rules()[2].upstreams(&hub)[0].0.base(), "https://registry-1.docker.io");
    }

    #[test]
    fn unlisted_registries_can_be_denied() {
        let registries = registries("[access]\nunlisted = \"deny\"");
        assert!(registries.rule(&Registry::docker_hub(), &any()).deny);
    }

    #[test]
    fn a_host_is_a_registry_only_by_rule() {
        let registries = registries(
            "listen = \"0.0.0.0:5050\"\n[[registry]]\nmatch = \"*.io\"\n[[registry]]\nmatch = \"localhost:5050\"\nalias = [\"me\"]",
        );
        let is = |host: &str| registries.host_is_registry(&host.parse().unwrap());
        assert!(is("quay.io"));
        assert!(!is("gcr.example"));
        assert!(!is("localhost:5050"), "our own address");
        assert!(!is("10.0.0.1:5050"), "our own address");
        assert_eq!(registries.alias("me").unwrap().as_str(), "localhost:5050");
    }

    #[test]
    fn immutable_patterns_match_whole_tags() {
        let registries = registries(
            "[[registry]]\nmatch = \"a.io\"\nimmutable_tags = ['v\\d+|x']\n\
             tags = [{ match = 'latest|edge', ttl = \"0s\" }, { match = '.*-rc', ttl = \"1h\" }]",
        );
        let rule = &registries.rules()[0];
        let lease = |tag: &str| rule.lease_of(&tag.parse().unwrap());
        assert_eq!([lease("v12"), lease("x")], [Duration::MAX; 2]);
        assert_eq!([lease("v12-rc"), lease("edge"), lease("ax")].map(|lease| lease.as_secs()), [3600, 0, 60]);
    }
}
