//! Web browsers at the registry port. A foreign page must neither read content from dray nor make dray send requests to
//! a registry of its choice.
//!
//! Container clients are not browsers. Browsers send headers that pages cannot remove: `Sec-Fetch-Site` (W3C Fetch
//! Metadata) only to addresses that they trust; `Origin`, `Accept-Language` and `User-Agent` to all. Without
//! `Sec-Fetch-Site`, the `Origin` reveals a foreign page, and an unknown `Host` reveals DNS rebinding.

use std::collections::HashSet;
use std::net::IpAddr;

use http::header::{ACCEPT_LANGUAGE, HOST, ORIGIN, USER_AGENT};
use http::request::Parts;

use crate::config::Config;
use crate::oci::Registry;

/// The host names by which browsers may reach this process.
pub struct Browsers {
    scheme: ClientScheme,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientScheme {
    Http,
    /// The browser checks the host name against the certificate, which excludes DNS rebinding.
    Https,
}

/// Why a browser's request is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BrowserDenied {
    /// A foreign page sent the request: its scheme, host or port is another one.
    CrossSite,
    UnknownHost,
}

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// The Internet's DNS has no names with these suffixes: a cluster, a host or a local network assigns them.
const LOCAL_SUFFIXES: [&str; 5] = [".svc", ".cluster.local", ".localhost", ".local", ".internal"];

impl Browsers {
    pub fn new(config: &Config) -> Self {
        let scheme = if config.tls.cert.is_some() { ClientScheme::Https } else { ClientScheme::Http };
        Self { scheme }
    }

    /// Allows a request that is not from a browser, or is from a page of dray itself.
    pub(super) fn admit(&self, names: &HashSet<String>, request: &Parts) -> Result<(), BrowserDenied> {
        let header = |name: &str| request.headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let host = header(HOST.as_str()).or_else(|| request.uri.authority().map(|authority| authority.as_str()));
        let (site, origin) = (header(SEC_FETCH_SITE), header(ORIGIN.as_str()));
        let is_browser = site.is_some()
            || origin.is_some()
            || request.headers.contains_key(ACCEPT_LANGUAGE)
            || header(USER_AGENT.as_str()).is_some_and(|agent| agent.contains("Mozilla/"));
        if !is_browser {
            return Ok(());
        }
        let is_other = |origin: &str| origin.split_once("://").is_none_or(|(_, authority)| Some(authority) != host);
        if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) || origin.is_some_and(is_other) {
            return Err(BrowserDenied::CrossSite);
        }
        match self.scheme == ClientScheme::Https || host.is_some_and(|host| is_own_name(names, host)) {
            true => Ok(()),
            false => Err(BrowserDenied::UnknownHost),
        }
    }
}

/// Whether DNS rebinding is impossible with this name. An address is not looked up at all.
fn is_own_name(names: &HashSet<String>, host: &str) -> bool {
    let Ok(host) = host.to_ascii_lowercase().parse::<Registry>() else { return false };
    let name = host.host().trim_end_matches('.');
    name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
        || !name.contains('.')
        || LOCAL_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
        || names.contains(name)
}

/// The names of `[access] hosts`, and that of the mirror.
pub(super) fn names(config: &Config) -> HashSet<String> {
    let mirror = config.containerd.mirror.as_ref().and_then(|mirror| mirror.host().parse::<Registry>().ok());
    let mirror = mirror.map(|mirror| mirror.host().to_owned());
    let names = mirror.into_iter().chain(config.access.hosts.iter().cloned());
    names.map(|name| name.to_ascii_lowercase()).collect()
}

impl BrowserDenied {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::CrossSite => "requests from pages of other web origins are denied",
            Self::UnknownHost => {
                "this host name is denied to web browsers: add it to access.hosts, or use the IP address"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHROMIUM: (&str, &str) = ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) HeadlessChrome/130.0");

    fn admit(config: &str, host: &str, headers: &[(&str, &str)]) -> Result<(), BrowserDenied> {
        let config = Config::parse(config, "test").unwrap();
        let browsers = Browsers::new(&config);
        let mut request = http::Request::get("/v2/").header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        browsers.admit(&names(&config), &request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn container_client_is_not_a_browser() {
        for host in ["evil.example", "10.0.0.1:5050", "dray.example:5050", "", "a b"] {
            for agent in ["containerd/2.1.0", "skopeo/1.9", "go-containerregistry/v0.20", "Helm/3.19", "oras-go"] {
                assert_eq!(admit("", host, &[("user-agent", agent), ("accept", "*/*")]), Ok(()), "{host} {agent}");
            }
        }
    }

    #[test]
    fn cross_origin_request_is_denied() {
        let of = |headers: &[(&str, &str)]| admit("", "10.0.0.1:5050", headers);
        for site in ["cross-site", "same-site", "anything"] {
            assert_eq!(of(&[("sec-fetch-site", site)]), Err(BrowserDenied::CrossSite), "{site}");
        }
        for site in ["none", "same-origin"] {
            assert_eq!(of(&[CHROMIUM, ("sec-fetch-site", site)]), Ok(()), "{site}");
        }
        for origin in ["http://evil.example", "null", "http://10.0.0.1:8080", "http://10.0.0.1:5050.evil.example"] {
            assert_eq!(of(&[CHROMIUM, ("origin", origin)]), Err(BrowserDenied::CrossSite), "{origin}");
        }
        assert_eq!(of(&[CHROMIUM, ("origin", "http://10.0.0.1:5050")]), Ok(()));
    }

    #[test]
    fn browser_with_unknown_host_is_denied() {
        let config = "[access]\nhosts = [\"dray.corp.example\"]\n[[registry]]\nmatch = \"reg.corp.example\"\n";
        for host in [
            "127.0.0.1:5050",
            "[::1]:5050",
            "localhost:5050",
            "dray",
            "dray.kube-system.svc:5050",
            "node7.local",
            "dray.kube-system.svc.cluster.local",
            "Dray.Corp.example:5050",
        ] {
            assert_eq!(admit(config, host, &[CHROMIUM]), Ok(()), "{host}");
        }
        for host in [
            "evil.example:5050",
            "reg.corp.example",
            "x.svc.evil.example",
            "127.0.0.1.evil.example",
            "corp.example",
            "",
            "a b",
        ] {
            let browser = [("accept-language", "en")];
            assert_eq!(admit(config, host, &browser), Err(BrowserDenied::UnknownHost), "{host}");
            assert_eq!(admit("[tls]\ncert = \"c\"\nkey = \"k\"\n", host, &browser), Ok(()), "the certificate tells");
        }
    }
}
