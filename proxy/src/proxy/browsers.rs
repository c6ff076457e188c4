//! Web browsers at the registry port: a page of another origin must neither read what is served here nor make dray send
//! requests to a registry of its choice.
//!
//! No container client is a browser. A browser says so itself, by headers that pages cannot remove: `Sec-Fetch-Site` (W3C
//! Fetch Metadata) where it trusts the address, `UpstreamClient`, `Accept-Language` and its `User-Agent` everywhere. Where it does
//! not send `Sec-Fetch-Site`, a page of another origin is known by `UpstreamClient`, and a page whose name was made to lead here (DNS
//! rebinding) by its `Host`, which is nobody's here.

use std::collections::HashSet;
use std::net::IpAddr;

use http::header::{ACCEPT_LANGUAGE, HOST, ORIGIN, USER_AGENT};
use http::request::Parts;

use crate::config::Config;
use crate::oci::Registry;

/// By which names browsers may find this process.
pub struct Browsers {
    names: HashSet<String>,
    scheme: ClientScheme,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientScheme {
    Http,
    /// Browsers hold the name in the address against the certificate: another name does not get here.
    Https,
}

/// Why a browser gets nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BrowserDenied {
    /// A page of another origin sent the request.
    CrossSite,
    UnknownHost,
}

const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Names below these are given by cluster, host or local network, never by the Internet.
const LOCAL_SUFFIXES: [&str; 5] = [".svc", ".cluster.local", ".localhost", ".local", ".internal"];

impl Browsers {
    pub fn new(config: &Config) -> Self {
        let mirror = config.containerd.mirror.as_ref().and_then(|mirror| mirror.host().parse::<Registry>().ok());
        let mirror = mirror.map(|mirror| mirror.host().to_owned());
        let names = mirror.into_iter().chain(config.access.hosts.iter().cloned());
        let scheme = if config.tls.cert.is_some() { ClientScheme::Https } else { ClientScheme::Http };
        Self { names: names.map(|name| name.to_ascii_lowercase()).collect(), scheme }
    }

    /// Whether a request may be answered: it is no browser's, or of dray's own origin.
    pub(super) fn admit(&self, request: &Parts) -> Result<(), BrowserDenied> {
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
        match self.scheme == ClientScheme::Https || host.is_some_and(|host| self.knows(host)) {
            true => Ok(()),
            false => Err(BrowserDenied::UnknownHost),
        }
    }

    /// Whether nobody else can make this name lead here. An address is no name at all.
    fn knows(&self, host: &str) -> bool {
        let Ok(host) = host.to_ascii_lowercase().parse::<Registry>() else { return false };
        let name = host.host().trim_end_matches('.');
        name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
            || !name.contains('.')
            || LOCAL_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
            || self.names.contains(name)
    }
}

impl BrowserDenied {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::CrossSite => "a web page of another origin gets nothing here",
            Self::UnknownHost => {
                "a web browser gets nothing by a name that is not dray's: add the name to access.hosts, or use the address"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHROMIUM: (&str, &str) = ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) HeadlessChrome/130.0");

    fn admit(config: &str, host: &str, headers: &[(&str, &str)]) -> Result<(), BrowserDenied> {
        let browsers = Browsers::new(&Config::parse(config, "test").unwrap());
        let mut request = http::Request::get("/v2/").header("host", host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        browsers.admit(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn container_clients_are_no_browsers() {
        for host in ["evil.example", "10.0.0.1:5050", "dray.example:5050", "", "a b"] {
            for agent in ["containerd/2.1.0", "skopeo/1.9", "go-containerregistry/v0.20", "Helm/3.19", "oras-go"] {
                assert_eq!(admit("", host, &[("user-agent", agent), ("accept", "*/*")]), Ok(()), "{host} {agent}");
            }
        }
    }

    #[test]
    fn page_of_another_origin_gets_nothing() {
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
    fn name_that_others_can_give_gets_nothing() {
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
