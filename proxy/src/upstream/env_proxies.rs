//! HTTP proxies of the environment, parsed like Go's clients do (`golang.org/x/net/http/httpproxy`): container runtimes
//! on the same node use the same variables.

use std::net::IpAddr;

use ipnet::IpNet;
use url::{Host, Url};

/// `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in either case.
pub(super) struct EnvProxies {
    http: Option<Url>,
    https: Option<Url>,
    except: Vec<NoProxyEntry>,
}

/// An entry of `NO_PROXY`.
#[derive(Debug, PartialEq)]
enum NoProxyEntry {
    Everything,
    Network(IpNet),
    Address(IpAddr, Option<u16>),
    /// A host and its subdomains.
    Domain(String, Option<u16>),
    /// Only its subdomains.
    Below(String, Option<u16>),
}

impl EnvProxies {
    pub(super) fn of_environment() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }

    fn new(variable: impl Fn(&str) -> Option<String>) -> Self {
        let value = |name: &str| {
            let either = variable(name).filter(|value| !value.is_empty());
            either.or_else(|| variable(&name.to_ascii_lowercase())).filter(|value| !value.is_empty())
        };
        let proxy = |name: &str| {
            let text = value(name).or_else(|| value("ALL_PROXY"))?;
            let url = parse_proxy(&text);
            if url.is_none() {
                tracing::warn!(variable = name, error = "not a valid URL", "proxy variable ignored");
            }
            url
        };
        let except = value("NO_PROXY").unwrap_or_default();
        Self { http: proxy("HTTP_PROXY"), https: proxy("HTTPS_PROXY"), except: except_of(&except) }
    }

    /// The proxy for a URL. Loopback addresses never use one.
    pub(super) fn of(&self, url: &Url) -> Option<Url> {
        let proxy = if url.scheme() == "https" { self.https.as_ref() } else { self.http.as_ref() };
        let port = url.port_or_known_default();
        let is_direct = match url.host()? {
            Host::Domain(name) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                name == "localhost" || self.except.iter().any(|except| except.has_name(&name, port))
            }
            Host::Ipv4(address) => self.is_direct_address(address.into(), port),
            Host::Ipv6(address) => self.is_direct_address(address.into(), port),
        };
        proxy.filter(|_| !is_direct).cloned()
    }

    fn is_direct_address(&self, address: IpAddr, port: Option<u16>) -> bool {
        address.to_canonical().is_loopback() || self.except.iter().any(|except| except.has_address(address, port))
    }
}

/// A URL, or `host:port`.
pub(super) fn parse_proxy(text: &str) -> Option<Url> {
    let parsed = Url::parse(text).ok().filter(Url::has_host);
    parsed.or_else(|| Url::parse(&format!("http://{text}")).ok()).filter(Url::has_host)
}

fn except_of(text: &str) -> Vec<NoProxyEntry> {
    text.split(',').filter_map(|entry| NoProxyEntry::parse(entry.trim().to_ascii_lowercase().as_str())).collect()
}

impl NoProxyEntry {
    fn parse(entry: &str) -> Option<Self> {
        if entry.is_empty() {
            return None;
        }
        if entry == "*" {
            return Some(Self::Everything);
        }
        if let Ok(network) = entry.parse() {
            return Some(Self::Network(network));
        }
        let bare = entry.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse() {
            return Some(Self::Address(address, None));
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry, None),
        };
        if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse() {
            return Some(Self::Address(address, port));
        }
        // "*.corp" and ".corp" match subdomains only, "corp" matches itself as well.
        match host.strip_prefix("*.").or_else(|| host.strip_prefix('.')) {
            Some(below) => Some(Self::Below(below.to_owned(), port)),
            None => Some(Self::Domain(host.to_owned(), port)),
        }
    }

    fn has_name(&self, name: &str, port: Option<u16>) -> bool {
        let is_below = |domain: &str| name.strip_suffix(domain).is_some_and(|front| front.ends_with('.'));
        let fits = |wanted: &Option<u16>| wanted.is_none() || *wanted == port;
        match self {
            Self::Everything => true,
            Self::Domain(domain, wanted) => fits(wanted) && (name == domain || is_below(domain)),
            Self::Below(domain, wanted) => fits(wanted) && is_below(domain),
            Self::Network(_) | Self::Address(..) => false,
        }
    }

    fn has_address(&self, address: IpAddr, port: Option<u16>) -> bool {
        match self {
            Self::Everything => true,
            Self::Network(network) => network.contains(&address),
            Self::Address(known, wanted) => *known == address && (wanted.is_none() || *wanted == port),
            Self::Domain(..) | Self::Below(..) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(no_proxy: &str, url: &str) -> Option<String> {
        let variable = |name: &str| match name {
            "HTTP_PROXY" => Some("proxy.corp:3128".to_owned()),
            "https_proxy" => Some("http://user:secret@secure.corp:3129".to_owned()),
            "NO_PROXY" => Some(no_proxy.to_owned()),
            _ => None,
        };
        EnvProxies::new(variable).of(&Url::parse(url).unwrap()).map(|proxy| proxy.host_str().unwrap().to_owned())
    }

    #[test]
    fn proxy_is_chosen_by_scheme() {
        assert_eq!(of("", "http://a.io/").as_deref(), Some("proxy.corp"));
        assert_eq!(of("", "https://a.io/").as_deref(), Some("secure.corp"));
        let all = |name: &str| (name == "ALL_PROXY").then(|| "socks5://p:1".to_owned());
        assert_eq!(EnvProxies::new(all).of(&Url::parse("https://a.io").unwrap()).unwrap().scheme(), "socks5");
        assert!(EnvProxies::new(|_| None).of(&Url::parse("https://a.io").unwrap()).is_none());
    }

    #[test]
    fn no_proxy_is_parsed_like_in_go() {
        for (no_proxy, url, is_direct) in [
            ("corp.io", "https://corp.io/", true),
            ("corp.io", "https://reg.corp.io/", true),
            ("corp.io", "https://othercorp.io/", false),
            (".corp.io", "https://corp.io/", false),
            (".corp.io", "https://reg.corp.io/", true),
            ("*.corp.io", "https://reg.corp.io/", true),
            ("CORP.io, x.io", "https://reg.corp.IO/", true),
            ("corp.io:5000", "https://corp.io:5000/", true),
            ("corp.io:5000", "https://corp.io/", false),
            ("corp.io:443", "https://corp.io/", true),
            ("*", "https://a.io/", true),
            ("10.0.0.0/8", "http://10.1.2.3:5000/", true),
            ("10.0.0.0/8", "http://11.1.2.3:5000/", false),
            ("10.1.2.3", "http://10.1.2.3:5000/", true),
            ("10.1.2.3:5000", "http://10.1.2.3:5000/", true),
            ("10.1.2.3:5000", "http://10.1.2.3/", false),
            ("fd00::/8", "http://[fd00::1]:5000/", true),
            ("[fd00::1]:5000", "http://[fd00::1]:5000/", true),
            ("corp.io:port,,", "https://corp.io/", false),
            ("", "http://127.0.0.1:5000/", true),
            ("", "http://[::1]:5000/", true),
            ("", "http://localhost:5000/", true),
            ("", "http://localhost.corp.io/", false),
        ] {
            assert_eq!(of(no_proxy, url).is_none(), is_direct, "NO_PROXY={no_proxy} {url}");
        }
    }
}
