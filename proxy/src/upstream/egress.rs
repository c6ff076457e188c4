//! Where dray may connect to when others choose the name: https at public addresses.
//!
//! An upstream written in the configuration is trusted as written. Everything else, which is what
//! `ns` names, what redirects point at and what token realms say, is checked here: as a literal
//! before the request, as a resolved address when connecting, so that no second DNS answer can
//! differ from the one that was checked.

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

/// The rules for names that others choose.
#[derive(Clone)]
pub(super) struct EgressPolicy {
    resolver: Arc<TokioResolver>,
    allow: Arc<[IpNet]>,
    /// Hosts of HTTP proxies, which are connected to on behalf of any name.
    proxies: Arc<HashSet<String>>,
}

/// Which addresses a connection may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum EgressScope {
    /// Anything: the upstream is written in the configuration.
    Anywhere,
    /// Public addresses and the networks of `[guard] allow`.
    Public,
    /// Only the networks of `[guard] allow`: without TLS.
    Allowed,
}

/// Why a URL is not followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EgressError {
    #[error("{0} is neither http nor https")]
    Scheme(String),
    #[error(
        "{0} is not a public address, and no network in [guard] allow holds it: name it there, or as an upstream of a [[registry]] rule"
    )]
    Address(String),
    #[error("{0} is the configured HTTP proxy")]
    Proxy(String),
}

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum ResolveError {
    #[error("dns: no such host {0}")]
    NoSuchHost(String),
    #[error("dns: the name servers do not tell the address of {0}: {1}")]
    NoResponse(String, String),
}

impl EgressPolicy {
    /// Must run inside a tokio runtime, which drives the resolver.
    pub(super) fn new(config: &Config) -> Result<Self, String> {
        Ok(Self {
            resolver: Arc::new(dns::resolver(&config.dns.servers)?),
            allow: config.guard.allow.clone().into(),
            proxies: Arc::new(proxy_hosts(|name| std::env::var(name).ok())),
        })
    }

    /// Whether the name of a URL has any address, as far as the name servers can tell.
    pub(super) async fn resolves(&self, url: &Url) -> bool {
        match url.host() {
            // Inside many networks only the proxy knows public names.
            Some(Host::Domain(name)) => !self.proxies.is_empty() || self.resolver.lookup_ip(name).await.is_ok(),
            Some(Host::Ipv4(_) | Host::Ipv6(_)) => true,
            None => false,
        }
    }

    /// How a URL that others chose may be reached.
    pub(super) async fn check(&self, url: &Url) -> Result<EgressScope, EgressError> {
        let reach = reach_of(url)?;
        let refused = || EgressError::Address(url.host_str().unwrap_or_default().to_owned());
        match url.host().ok_or_else(refused)? {
            Host::Ipv4(address) if !self.permits(reach, address.into()) => Err(refused()),
            Host::Ipv6(address) if !self.permits(reach, address.into()) => Err(refused()),
            Host::Domain(name) if self.proxies.contains(name) => Err(EgressError::Proxy(name.to_owned())),
            // Behind a proxy nobody asks our resolver when connecting. What cannot be resolved
            // here is left to the proxy: inside many networks only it knows public names.
            Host::Domain(name) if !self.proxies.is_empty() => match self.resolver.lookup_ip(name).await {
                Ok(found) if !found.iter().all(|a| self.permits(reach, a)) => Err(refused()),
                _ => Ok(reach),
            },
            _ => Ok(reach),
        }
    }

    /// Why a URL that others chose is refused, where that is known without a resolver.
    pub(super) fn refuses_literally(&self, url: &Url) -> Result<(), EgressError> {
        let reach = reach_of(url)?;
        let address: IpAddr = match url.host() {
            Some(Host::Ipv4(address)) => address.into(),
            Some(Host::Ipv6(address)) => address.into(),
            Some(Host::Domain("localhost")) => Ipv4Addr::LOCALHOST.into(),
            Some(Host::Domain(_)) | None => return Ok(()),
        };
        if self.permits(reach, address) {
            return Ok(());
        }
        Err(EgressError::Address(url.host_str().unwrap_or_default().to_owned()))
    }

    /// A resolver for connections of one reach.
    pub(super) fn resolver(&self, reach: EgressScope) -> Arc<dyn Resolve> {
        Arc::new(EgressResolver { guard: self.clone(), reach })
    }

    fn permits(&self, reach: EgressScope, address: IpAddr) -> bool {
        let allowed = || self.allow.iter().any(|network| network.contains(&address.to_canonical()));
        match reach {
            EgressScope::Anywhere => true,
            EgressScope::Public => is_public(address) || allowed(),
            EgressScope::Allowed => allowed(),
        }
    }
}

fn reach_of(url: &Url) -> Result<EgressScope, EgressError> {
    match url.scheme() {
        "https" => Ok(EgressScope::Public),
        "http" => Ok(EgressScope::Allowed),
        other => Err(EgressError::Scheme(other.to_owned())),
    }
}

struct EgressResolver {
    guard: EgressPolicy,
    reach: EgressScope,
}

impl Resolve for EgressResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, reach) = (self.guard.clone(), self.reach);
        Box::pin(async move {
            let found =
                guard.resolver.lookup_ip(name.as_str()).await.map_err(|error| unresolved(name.as_str(), &error))?;
            let is_proxy = guard.proxies.contains(name.as_str());
            let addresses: Vec<SocketAddr> = found
                .iter()
                .filter(|address| is_proxy || guard.permits(reach, *address))
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

/// The hosts that the environment names as proxies, in either case of the variables.
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
    // Addresses that carry an IPv4 address inside lead where that one leads.
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

    fn guard(allow: &[&str]) -> EgressPolicy {
        let config = Config {
            guard: crate::config::EgressConfig { allow: allow.iter().map(|net| net.parse().unwrap()).collect() },
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
        let guard = guard(&["10.0.0.0/8"]);
        for (url, reach) in [
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
            assert_eq!(guard.check(&Url::parse(url).unwrap()).await.ok(), reach, "{url}");
        }
    }

    #[tokio::test]
    async fn literals_are_known_without_a_resolver() {
        let refused = |allow: &[&str], url: &str| guard(allow).refuses_literally(&Url::parse(url).unwrap()).is_err();
        for url in ["https://10.0.0.5:5000", "https://[fd00::1]", "https://localhost:5000", "https://169.254.169.254"] {
            assert!(refused(&[], url), "{url}");
        }
        assert!(!refused(&["10.0.0.0/8"], "https://10.0.0.5:5000") && !refused(&["127.0.0.0/8"], "https://localhost"));
        assert!(!refused(&[], "https://1.1.1.1") && !refused(&[], "https://registry.corp"));
    }

    #[test]
    fn proxies_are_known_by_their_hosts() {
        let hosts = proxy_hosts(|name| match name {
            "HTTPS_PROXY" => Some("http://user:secret@proxy.corp:3128".into()),
            "http_proxy" => Some("other.corp:80".into()),
            _ => None,
        });
        assert_eq!(hosts, HashSet::from(["proxy.corp".to_owned(), "other.corp".to_owned()]));
    }
}
