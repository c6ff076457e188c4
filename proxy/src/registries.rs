//! The rules of the configuration: which one applies to a repository, and its upstreams.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use regex::Regex;
use xxhash_rust::xxh64::xxh64;

use crate::bandwidth::RateLimiter;
use crate::config::{
    self, Authorization, ByteRate, ClientCert, Config, Credentials, CrossZonePeers, OnClientAbort, RuleConfig,
    RulePattern, Scheme, Upstream,
};
use crate::oci::route::Names;
use crate::oci::{ImageName, Registry, Repository, Tag};
use crate::principal::Principal;
use crate::provenance::Provenance;

/// The rules of the current configuration, ready for look-ups. A reload replaces them; requests in progress keep theirs.
pub struct Registries {
    rules: ArcSwap<Rules>,
}

/// The rules of one configuration.
pub struct Rules {
    /// In order; the last one matches everything.
    list: Vec<Arc<Rule>>,
    aliases: HashMap<String, Registry>,
    listen: SocketAddr,
    /// The next rule that is created gets this [`Rule::id`].
    next_id: u64,
}

/// One `[[registry]]` table, or the implicit last rule.
pub struct Rule {
    /// Differs between two rules of a process, also of two configurations. A rule that a reload does not change keeps it.
    pub id: u64,
    /// As configured, to find out whether a reload changes it.
    config: RuleConfig,
    pattern: RulePattern,
    upstreams: Vec<Upstream>,
    pub credentials: Option<Credentials>,
    pub tls: RuleTls,
    pub deny: bool,
    tag_ttl: Duration,
    tags: Vec<(Regex, Duration)>,
    pub stale_if_error: Duration,
    pub negative_ttl: Duration,
    pub on_client_abort: OnClientAbort,
    pub cross_zone_peers: CrossZonePeers,
    /// The limit of this rule's downloads from upstreams.
    pub limiter: Arc<RateLimiter>,
    authorization: Authorization,
    immutable_tags: Vec<Regex>,
    fingerprint: String,
}

/// How dray authenticates a rule's upstreams, and itself to them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RuleTls {
    pub ca: Option<PathBuf>,
    pub client_cert: Option<ClientCert>,
}

/// A repository as a client named it, with its rule and the requesting principal.
#[derive(Clone)]
pub struct RepositoryRef {
    pub rule: Arc<Rule>,
    pub registry: Registry,
    pub repository: Repository,
    /// Whose rights the request has.
    pub principal: Principal,
}

/// How far dray trusts an upstream's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UpstreamTrust {
    /// Written in the configuration: trusted as written.
    Configured,
    /// Derived from a client's or an upstream's input: only https to public addresses.
    Derived,
}

impl Registries {
    pub fn new(config: &Config) -> Self {
        let nothing = Rules { list: Vec::new(), aliases: HashMap::new(), listen: config.listen, next_id: 0 };
        Self { rules: ArcSwap::from_pointee(nothing.followed_by(config)) }
    }

    /// The rules after a reload. [`Self::store`] applies them.
    pub fn reloaded(&self, config: &Config) -> Arc<Rules> {
        Arc::new(self.rules.load().followed_by(config))
    }

    /// New look-ups use these rules. Downloads in progress follow the changed limits of their rules.
    pub fn store(&self, rules: Arc<Rules>) {
        rules.iter().for_each(|rule| rule.limiter.set_rate(rule.upstream_rate()));
        self.rules.store(rules);
    }

    /// The first rule that matches.
    pub fn rule(&self, registry: &Registry, repository: &Repository) -> Arc<Rule> {
        self.rules.load().rule(registry, repository).clone()
    }

    /// A repository with its rule. Where the rule leaves authorization to the upstream, no principal is set yet.
    pub fn repo_ref(&self, registry: Registry, repository: Repository) -> RepositoryRef {
        self.rules.load().repo_ref(registry, repository)
    }

    pub fn rules(&self) -> Arc<Rules> {
        self.rules.load_full()
    }

    /// Whether any rule leaves authorization to the upstream.
    pub fn any_passthrough(&self) -> bool {
        self.rules.load().any_passthrough()
    }

    /// Whether no reload has changed or removed a rule.
    pub fn is_current(&self, rule: &Rule) -> bool {
        self.rules.load().iter().any(|current| current.id == rule.id)
    }
}

impl RepositoryRef {
    /// A repository without a principal yet, if its rule leaves authorization to the upstream.
    pub fn new(rule: Arc<Rule>, registry: Registry, repository: Repository) -> Self {
        let principal = if rule.is_passthrough() { Principal::Unauthorized } else { Principal::Shared };
        Self { rule, registry, repository, principal }
    }

    /// The repository's name at an upstream.
    pub fn repository_at(&self, upstream: &Upstream) -> String {
        self.rule.repository_at(upstream, &self.registry, &self.repository)
    }

    /// For caches and shared lookups. A rule that a reload has changed has another key, so that it neither uses nor joins
    /// results that came by its predecessor.
    pub fn rule_key(&self) -> String {
        format!("{} {self}", self.rule.id)
    }

    /// Whether an object came from this repository.
    pub fn is_source_of(&self, from: &Provenance) -> bool {
        from.registry == self.registry.as_str() && from.repository == self.repository.as_str()
    }

    /// The record of objects that come from this repository.
    pub fn provenance(&self) -> Provenance {
        Provenance {
            rule: self.rule.name().to_owned(),
            registry: self.registry.to_string(),
            repository: self.repository.to_string(),
        }
    }
}

impl PartialEq for RepositoryRef {
    /// A repository has one rule, so the names suffice. The principal does not count.
    fn eq(&self, other: &Self) -> bool {
        self.registry == other.registry && self.repository == other.repository
    }
}

impl fmt::Display for RepositoryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)
    }
}

impl Names for Rules {
    fn alias(&self, component: &str) -> Option<Registry> {
        self.aliases.get(component).cloned()
    }

    fn host_is_registry(&self, host: &Registry) -> bool {
        // A rule with `deny` matches all ports, but must not turn this process's own address into a registry.
        let named = |rule: &Arc<Rule>| !rule.pattern.host.is_any() && rule.pattern.host.names(host);
        self.list.iter().any(named) && !self.is_own_address(host)
    }

    /// The registry that the rules name, if all name the same one.
    fn only_registry(&self) -> Option<Registry> {
        let named = self.list.iter().filter(|rule| !rule.pattern.host.is_any());
        let mut names = named.map(|rule| rule.pattern.host.as_str().parse().ok());
        let first: Registry = names.next()??;
        names.all(|name| name.as_ref() == Some(&first)).then_some(first)
    }
}

impl Rules {
    /// The rules of a configuration. A rule that is configured as before keeps its ID.
    fn followed_by(&self, config: &Config) -> Self {
        let implicit = RuleConfig::implicit(config.access.unlisted_registries);
        let written = config.registry.iter().map(|spanned| spanned.get_ref());
        let mut aliases = HashMap::new();
        for rule in written.clone() {
            for alias in &rule.alias {
                if let Ok(registry) = rule.pattern.host.as_str().parse() {
                    aliases.insert(alias.clone(), registry);
                }
            }
        }
        let mut next_id = self.next_id;
        let mut known: HashMap<&str, Vec<&Arc<Rule>>> = HashMap::new();
        self.list.iter().for_each(|rule| known.entry(rule.name()).or_default().push(rule));
        let rule = |rule: &RuleConfig| {
            let fingerprint = fingerprint(rule, &config.egress);
            let of_name = known.get(rule.pattern.as_str()).into_iter().flatten();
            let same = |known: &&&Arc<Rule>| known.config == *rule && known.fingerprint == fingerprint;
            of_name.copied().find(|known| same(&known)).cloned().unwrap_or_else(|| {
                next_id += 1;
                let predecessor = known.get(rule.pattern.as_str()).and_then(|rules| rules.first());
                let limiter = predecessor.map(|rule| rule.limiter.clone());
                Arc::new(Rule::new(next_id, rule, fingerprint, limiter))
            })
        };
        let list = written.chain([&implicit]).map(rule).collect();
        Self { list, aliases, listen: self.listen, next_id }
    }

    /// The first rule that matches.
    pub fn rule(&self, registry: &Registry, repository: &Repository) -> &Arc<Rule> {
        let first = self.list.iter().find(|rule| rule.pattern.matches(registry, repository));
        first.expect("the implicit last rule matches every registry")
    }

    /// A repository with its rule.
    pub fn repo_ref(&self, registry: Registry, repository: Repository) -> RepositoryRef {
        RepositoryRef::new(self.rule(&registry, &repository).clone(), registry, repository)
    }

    /// The repository of an image name, whose first component may be an alias of a registry.
    pub fn of_image(&self, image: &ImageName) -> RepositoryRef {
        let (registry, repository) = (image.registry.clone(), image.repository.clone());
        let first = repository.as_str().split_once('/').filter(|_| registry.is_docker_hub());
        let aliased = first.and_then(|(first, rest)| Some((self.alias(first)?, rest.parse().ok()?)));
        let (registry, repository) = aliased.unwrap_or((registry, repository));
        self.repo_ref(registry, repository)
    }

    /// Whether any rule leaves authorization to the upstream.
    pub fn any_passthrough(&self) -> bool {
        self.list.iter().any(|rule| rule.is_passthrough())
    }

    /// Whether a `Host` names this process instead of a registry.
    fn is_own_address(&self, host: &Registry) -> bool {
        let literal = host.host().trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let same_port = host.port().unwrap_or(80) == self.listen.port();
        host.as_str() == self.listen.to_string() || (same_port && (literal || host.host() == "localhost"))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.list.iter()
    }
}

impl Rule {
    fn new(id: u64, rule: &RuleConfig, fingerprint: String, limiter: Option<Arc<RateLimiter>>) -> Self {
        let own_limiter = || Arc::new(RateLimiter::new(rule.upstream_rate.map(ByteRate::bytes_per_second)));
        Self {
            id,
            config: rule.clone(),
            pattern: rule.pattern.clone(),
            upstreams: rule.upstreams.clone(),
            credentials: rule.credentials.clone(),
            tls: RuleTls { ca: rule.ca.clone(), client_cert: rule.client_cert.clone() },
            deny: rule.deny,
            tag_ttl: rule.tag_ttl.0,
            tags: rule.tags.iter().filter_map(|tag| Some((config::whole_tag(&tag.pattern).ok()?, tag.ttl.0))).collect(),
            stale_if_error: rule.stale_if_error.0,
            negative_ttl: rule.negative_ttl.0,
            on_client_abort: rule.on_client_abort,
            cross_zone_peers: rule.cross_zone_peers,
            limiter: limiter.unwrap_or_else(own_limiter),
            authorization: rule.authorization,
            // Invalid patterns were rejected with the configuration.
            immutable_tags: rule.immutable_tags.iter().filter_map(|p| config::whole_tag(p).ok()).collect(),
            fingerprint,
        }
    }

    /// Bytes a second from its upstreams. None: no limit of its own.
    fn upstream_rate(&self) -> Option<u64> {
        self.config.upstream_rate.map(ByteRate::bytes_per_second)
    }

    /// Equal on nodes that would fetch the same content in the same way.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The rule's name in logs, metrics and records: its pattern.
    pub fn name(&self) -> &str {
        self.pattern.as_str()
    }

    /// The upstreams, in order.
    pub fn upstreams(&self, registry: &Registry) -> Vec<(Upstream, UpstreamTrust)> {
        if self.upstreams.is_empty() {
            let authority = if registry.is_docker_hub() { "registry-1.docker.io" } else { registry.as_str() };
            return vec![(Upstream::new(Scheme::Https, authority), UpstreamTrust::Derived)];
        }
        self.upstreams.iter().map(|upstream| (upstream.clone(), UpstreamTrust::Configured)).collect()
    }

    /// A repository's name at an upstream.
    fn repository_at(&self, upstream: &Upstream, registry: &Registry, repository: &Repository) -> String {
        upstream.repository(&self.pattern, registry, repository)
    }

    /// The TTL of a tag.
    pub fn ttl_of(&self, tag: &Tag) -> Duration {
        if self.immutable_tags.iter().any(|pattern| pattern.is_match(tag.as_str())) {
            return Duration::MAX;
        }
        let of_some = self.tags.iter().find(|(pattern, _)| pattern.is_match(tag.as_str()));
        of_some.map_or(self.tag_ttl, |(_, ttl)| *ttl)
    }

    /// Whether its content may need credentials, so that only authenticated peers get it.
    pub fn is_private(&self) -> bool {
        self.credentials.is_some() || self.tls.client_cert.is_some() || self.is_passthrough()
    }

    /// Whether the upstream decides for each client what it may pull.
    pub fn is_passthrough(&self) -> bool {
        self.authorization == Authorization::Passthrough
    }
}

/// A hash of the settings that decide the sources of content, its authorization and its TTL. It contains neither
/// secrets nor paths, which may differ between nodes.
fn fingerprint(rule: &RuleConfig, egress: &config::EgressConfig) -> String {
    let upstreams: Vec<_> = rule.upstreams.iter().map(Upstream::to_string).collect();
    let credentials = match &rule.credentials {
        None => "none".to_owned(),
        Some(Credentials::DockerConfig { .. }) => "a docker config".to_owned(),
        Some(Credentials::Static { username, .. }) => format!("of {username}"),
        Some(Credentials::Helper { name }) => format!("of the helper {name}"),
        Some(Credentials::Provider { .. }) => "of the kubelet's plugins".to_owned(),
        Some(Credentials::Cloud(cloud)) => format!("of the cloud {}", cloud.as_str()),
    };
    let mut text = format!(
        "{} {upstreams:?} {credentials:?} {} {:?} {:?} {:?}",
        rule.pattern.as_str(),
        rule.deny,
        rule.tag_ttl.0,
        rule.immutable_tags,
        egress.allow_cidrs,
    );
    // Newer settings are added only if they are used, so that nodes with other releases have the same fingerprint.
    if !rule.tags.is_empty() {
        text += &format!(" {:?}", rule.tags);
    }
    if rule.client_cert.is_some() {
        text += " client_cert";
    }
    if rule.authorization == Authorization::Passthrough {
        text += " passthrough";
    }
    format!("{:016x}", xxh64(text.as_bytes(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_covers_the_deciding_settings() {
        let of = |text: &str| registries(text).rules().list[0].fingerprint().to_owned();
        let plain = of("[[registry]]\nmatch = \"a.io\"");
        assert_eq!(plain, "23f3ed28e87080c2", "nodes of two releases would not share private content, nor tags");
        let at = |path: &str| format!("[[registry]]\nmatch = \"a.io\"\nupstreams = [\"https://b.io/{path}\"]");
        assert_ne!(of(&at("x/{repo}")), of(&at("y/{repo}")));
        let none = "[[registry]]\nmatch = \"a.io\"\ncredentials = { username = \"none\", password_env = \"HOME\" }";
        assert_ne!(plain, of(none), "a user named none differs from no credentials");
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
    fn rule_may_match_some_repositories() {
        let registries = registries(
            "[[registry]]\nmatch = \"docker.io/kubeflow/*\"\nupstreams = [\"https://ghcr.io/{repo}\"]\n\
             [[registry]]\nmatch = \"docker.io\"\ndeny = true",
        );
        let rule = |repository: &str| registries.rule(&Registry::docker_hub(), &repository.parse().unwrap());
        assert_eq!(rule("kubeflow/spark-operator").name(), "docker.io/kubeflow/*");
        assert!(rule("library/alpine").deny);
        assert!(registries.rules().host_is_registry(&Registry::docker_hub()));
    }

    fn registries(text: &str) -> Registries {
        Registries::new(&Config::parse(text, "test").unwrap())
    }

    #[test]
    fn first_matching_rule_wins_and_the_last_matches_all() {
        let registries = registries(
            "[[registry]]\nmatch = \"ghcr.io\"\nupstreams = [\"http://m1\", \"https://m2/x/{repo}\"]\n\
             [[registry]]\nmatch = \"*.io\"\ndeny = true",
        );
        let ghcr: Registry = "ghcr.io".parse().unwrap();
        let upstreams = registries.rule(&ghcr, &any()).upstreams(&ghcr);
        assert_eq!(upstreams.len(), 2);
        assert!(upstreams.iter().all(|(_, trust)| *trust == UpstreamTrust::Configured));
        assert!(registries.rule(&"quay.io".parse().unwrap(), &any()).deny);
        let hub = Registry::docker_hub();
        assert_eq!(registries.rule(&"mcr.microsoft.com".parse().unwrap(), &any()).name(), "*");
        assert_eq!(registries.rules().list[2].upstreams(&hub)[0].0.base(), "https://registry-1.docker.io");
    }

    #[test]
    fn reloaded_rule_keeps_its_id_unless_it_changes() {
        let config = |text: &str| Config::parse(text, "test").unwrap();
        let (one, two) = ("[[registry]]\nmatch = \"a.io\"\n", "[[registry]]\nmatch = \"b.io\"\n");
        let registries = registries(&format!("{one}{two}"));
        let ids = |rules: &Rules| rules.list.iter().map(|rule| rule.id).collect::<Vec<_>>();
        let before = ids(&registries.rules());
        let reordered = registries.reloaded(&config(&format!("{two}{one}")));
        assert_eq!(ids(&reordered), [before[1], before[0], before[2]]);
        assert_eq!(ids(&registries.reloaded(&config(&format!("{one}{two}# a comment")))), before);
        let changed = registries.reloaded(&config(&format!("{one}deny = true\n{two}")));
        assert!(!before.contains(&ids(&changed)[0]) && ids(&changed)[1..] == before[1..]);
        let wider = registries.reloaded(&config(&format!("{one}{two}[egress]\nallow_cidrs = [\"10.0.0.0/8\"]")));
        assert!(ids(&wider).iter().all(|id| !before.contains(id)), "other addresses may be reached");
        let old = registries.rule(&"a.io".parse().unwrap(), &any());
        registries.store(changed);
        assert!(!registries.is_current(&old));
        assert!(registries.rule(&"a.io".parse().unwrap(), &any()).deny);
    }

    #[test]
    fn unlisted_registries_are_denied_by_config() {
        let registries = registries("[access]\nunlisted_registries = \"deny\"");
        assert!(registries.rule(&Registry::docker_hub(), &any()).deny);
    }

    #[test]
    fn host_is_a_registry_only_by_rule() {
        let registries = registries(
            "listen = \"0.0.0.0:5050\"\n[[registry]]\nmatch = \"*.io\"\n[[registry]]\nmatch = \"localhost:5050\"\nalias = [\"me\"]",
        );
        let is = |host: &str| registries.rules().host_is_registry(&host.parse().unwrap());
        assert!(is("quay.io"));
        assert!(!is("gcr.example"));
        assert!(!is("localhost:5050"), "our own address");
        assert!(!is("10.0.0.1:5050"), "our own address");
        assert_eq!(registries.rules().alias("me").unwrap().as_str(), "localhost:5050");
    }

    #[test]
    fn immutable_patterns_match_whole_tags() {
        let registries = registries(
            "[[registry]]\nmatch = \"a.io\"\nimmutable_tags = ['v\\d+|x']\n\
             tags = [{ match = 'latest|edge', ttl = \"0s\" }, { match = '.*-rc', ttl = \"1h\" }]",
        );
        let rule = registries.rules().list[0].clone();
        let ttl = |tag: &str| rule.ttl_of(&tag.parse().unwrap());
        assert_eq!([ttl("v12"), ttl("x")], [Duration::MAX; 2]);
        assert_eq!([ttl("v12-rc"), ttl("edge"), ttl("ax")].map(|ttl| ttl.as_secs()), [3600, 0, 60]);
    }
}
