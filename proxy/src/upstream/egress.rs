//! Egress policy: where dray may connect if a client or an upstream chooses the host (SSRF protection).
//!
//! A configured upstream is trusted as written. Hosts of `ns`, redirects and token realms need https and a public
//! address, or an allowed network. Literal addresses are checked before the request. Resolved addresses are checked
//! when connecting, so that a second DNS response cannot differ from the checked one.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use hickory_resolver::TokioResolver;
use hickory_resolver::net::NetError;
use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::env_proxies::parse_proxy;
use crate::config::Config;
use crate::dns;

#[derive(Clone)]
pub(super) struct EgressPolicy {
    resolver: Arc<TokioResolver>,
    allow: Arc<[IpNet]>,
    /// Hosts of HTTP proxies: a connection to them serves any name.
    proxies: Arc<HashSet<String>>,
}

/// Which addresses a connection may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum EgressScope {
    /// Any address: the upstream is configured.
    Anywhere,
    /// Public addresses and the networks of `[egress] allow_cidrs`.
    Public,
    /// Only the networks of `[egress] allow_cidrs`: for requests without TLS.
    Allowed,
}

/// Why a URL is blocked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EgressError {
    #[error("{0} is neither http nor https")]
    Scheme(String),
    #[error(
        "{0} is not a public address: add its network to [egress] allow_cidrs, or the host as an upstream of a [[registry]] rule"
    )]
    Address(String),
    #[error("{0} is the configured HTTP proxy")]
    Proxy(String),
}

/// Why a name could not be resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum ResolveError {
    #[error("dns: no such host {0}")]
    NoSuchHost(String),
    #[error("dns: the name servers did not resolve {0}: {1}")]
    NoResponse(String, String),
}

impl EgressPolicy {
    /// Must run inside a tokio runtime, which drives the resolver.
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        Ok(Self {
            resolver: Arc::new(dns::resolver(&config.dns.servers)?),
            allow: config.egress.allow_cidrs.clone().into(),
            proxies: Arc::new(proxy_hosts(|name| std::env::var(name).ok())),
        })
    }

    /// Whether the host of a URL has an address, as far as dray can resolve it.
    pub(super) async fn resolves(&self, url: &Url) -> bool {
        match url.host() {
            // In many networks only the proxy resolves public names.
            Some(Host::Domain(name)) => !self.proxies.is_empty() || self.resolver.lookup_ip(name).await.is_ok(),
            Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
            None => false,
        }
    }

    /// The scope for a URL whose host is not configured.
    pub(super) async fn check(&self, url: &Url) -> Result<EgressScope, EgressError> {
        let scope = scope_of(url)?;
        let blocked = || EgressError::Address(url.host_str().unwrap_or_default().to_owned());
        match url.host().ok_or_else(blocked)? {
            Host::Ipv4(address) if !self.permits(scope, address.into()) => Err(blocked()),
            Host::Ipv6(address) if !self.permits(scope, address.into()) => Err(blocked()),
            Host::Domain(name) if self.proxies.contains(name) => Err(EgressError::Proxy(name.to_owned())),
            // Connections through a proxy do not use `EgressResolver`, so the name is resolved now. If that fails, the
            // proxy decides: in many networks only the proxy resolves public names.
            Host::Domain(name) if !self.proxies.is_empty() => match self.resolver.lookup_ip(name).await {
                Ok(found) if !found.iter().all(|a| self.permits(scope, a)) => Err(blocked()),
                _ => Ok(scope),
            },
            _ => Ok(scope),
        }
    }

    /// Checks what needs no resolver: the scheme, literal addresses and `localhost`.
    pub(super) fn check_literal(&self, url: &Url) -> Result<(), EgressError> {
        let scope = scope_of(url)?;
        let address: IpAddr = match url.host() {
            Some(Host::Ipv4(address)) => address.into(),
            Some(Host::Ipv6(address)) => address.into(),
            Some(Host::Domain("localhost")) => Ipv4Addr::LOCALHOST.into(),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self.permits(scope, address) {
            return Ok(());
        }
        Err(EgressError::Address(url.host_str().unwrap_or_default().to_owned()))
    }

    /// A resolver for connections of one scope.
    pub(super) fn resolver(&self, scope: EgressScope) -> Arc<dyn Resolve> {
        Arc::new(EgressResolver { policy: self.clone(), scope })
    }

    fn permits(&self, scope: EgressScope, address: IpAddr) -> bool {
        let allowed = || self.allow.iter().any(|network| network.contains(&address.to_canonical()));
        match scope {
            EgressScope::Anywhere => true,
            EgressScope::Public => is_public(address) || allowed(),
            EgressScope::Allowed => allowed(),
        }
    }
}

fn scope_of(url: &Url) -> Result<EgressScope, EgressError> {
    match url.scheme() {
        "https" => Ok(EgressScope::Public),
        "http" => Ok(EgressScope::Allowed),
        other => Err(EgressError::Scheme(other.to_owned())),
    }
}

struct EgressResolver {
    policy: EgressPolicy,
    scope: EgressScope,
}

impl Resolve for EgressResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (policy, scope) = (self.policy.clone(), self.scope);
        Box::pin(async move {
            let found =
                policy.resolver.lookup_ip(name.as_str()).await.map_err(|error| unresolved(name.as_str(), &error))?;
            let is_proxy = policy.proxies.contains(name.as_str());
            let addresses: Vec<SocketAddr> = found
                .iter()
                .filter(|address| is_proxy || policy.permits(scope, *address))
                .map(|address| SocketAddr::new(address, 0))
                .collect();
            if addresses.is_empty() {
                return Err(EgressError::Address(name.as_str().to_owned()).into());
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

fn unresolved(name: &str, error: &NetError) -> ResolveError {
    match error.is_no_records_found() {
        true => ResolveError::NoSuchHost(name.to_owned()),
        false => ResolveError::NoResponse(name.to_owned(), error.to_string()),
    }
}

/// The hosts of the environment's proxies, in either case of the variables.
fn proxy_hosts(variable: impl Fn(&str) -> Option<String>) -> HashSet<String> {
    ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
        .iter()
        .flat_map(|name| [variable(name), variable(&name.to_ascii_lowercase())])
        .flatten()
        .filter_map(|value| parse_proxy(&value)?.host_str().map(str::to_owned))
        .collect()
}

/// Whether an address belongs to the public Internet, by the special-purpose registries of IANA.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (18..20).contains(&b)))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    // An address with an embedded IPv4 address (NAT64, 6to4) leads to the IPv4 address.
    let embedded = match s {
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
        }
        _ => None,
    };
    if let Some(v4) = embedded {
        return is_public_v4(v4);
    }
    // Global unicast is 2000::/3; of it, Teredo, benchmarks, ORCHID and documentation are not.
    (s[0] & 0xe000) == 0x2000
        && !(s[0] == 0x2001 && s[1] < 0x200)
        && !(s[0] == 0x2001 && s[1] == 0xdb8)
        && !(s[0] == 0x3fff && s[1] < 0x1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str]) -> EgressPolicy {
        let config = Config {
            egress: crate::config::EgressConfig { allow_cidrs: allow.iter().map(|net| net.parse().unwrap()).collect() },
            ..Config::default()
        };
        EgressPolicy { proxies: Arc::default(), ..EgressPolicy::new(&config).unwrap() }
    }

    #[test]
    fn special_addresses_are_not_public() {
        for address in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "192.0.0.1",
            "240.0.0.1",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
            "2002:a00:1::",
            "2001:db8::1",
            "2001::1",
            "::7f00:1",
            "fec0::1",
            "64:ff9b:1::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["1.1.1.1", "104.18.121.25", "2606:4700::1", "::ffff:1.1.1.1", "64:ff9b::101:101"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[tokio::test]
    async fn literals_are_checked_before_connecting() {
        let policy = policy(&["10.0.0.0/8"]);
        for (url, scope) in [
            ("https://1.1.1.1/", Some(EgressScope::Public)),
            ("https://10.0.0.1/", Some(EgressScope::Public)),
            ("http://10.0.0.1/", Some(EgressScope::Allowed)),
            ("https://example.com/", Some(EgressScope::Public)),
            ("http://1.1.1.1/", None),
            ("https://127.0.0.1/", None),
            ("https://2130706433/", None),
            ("https://0x7f.1/", None),
            ("https://[::1]/", None),
            ("https://[::ffff:7f00:1]/", None),
            ("https://169.254.169.254/latest/meta-data", None),
            ("ftp://1.1.1.1/", None),
            ("file:///etc/passwd", None),
        ] {
            assert_eq!(policy.check(&Url::parse(url).unwrap()).await.ok(), scope, "{url}");
        }
    }

    #[tokio::test]
    async fn literals_are_checked_without_a_resolver() {
        let blocked = |allow: &[&str], url: &str| policy(allow).check_literal(&Url::parse(url).unwrap()).is_err();
        for url in ["https://10.0.0.5:5000", "https://[fd00::1]", "https://localhost:5000", "https://169.254.169.254"] {
            assert!(blocked(&[], url), "{url}");
        }
        assert!(!blocked(&["10.0.0.0/8"], "https://10.0.0.5:5000") && !blocked(&["127.0.0.0/8"], "https://localhost"));
        assert!(!blocked(&[], "https://1.1.1.1") && !blocked(&[], "https://registry.corp"));
    }

    #[test]
    fn proxy_hosts_are_read_from_the_environment() {
        let hosts = proxy_hosts(|name| match name {
            "HTTPS_PROXY" => Some("http://user:secret@proxy.corp:3128".into()),
            "http_proxy" => Some("other.corp:80".into()),
            _ => None,
        });
        assert_eq!(hosts, HashSet::from(["proxy.corp".to_owned(), "other.corp".to_owned()]));
    }
}
