//! Host patterns: `*` stands for any run of characters within one label, `**.` for any labels or none, a lone `*` for
//! any host.

use std::fmt;

use crate::oci::Registry;

/// A pattern such as `ghcr.io`, `*.dkr.ecr.*.amazonaws.com`, `**.corp.example`, `reg.corp:5000` or `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPattern {
    text: String,
    ports: PatternPorts,
}

/// The ports that a pattern without a port matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PatternPorts {
    /// Only the host without a port.
    AsWritten,
    /// The host with any port.
    All,
}

/// Precedes a name: matches the name itself and all names below it.
const AND_BELOW: &str = "**.";

impl HostPattern {
    pub fn any() -> Self {
        Self::written("*".to_owned())
    }

    fn written(text: String) -> Self {
        Self { text, ports: PatternPorts::AsWritten }
    }

    /// The same pattern on every port, if it has none.
    pub fn on_every_port(self) -> Self {
        let ports = if port_of(&self.text).is_none() { PatternPorts::All } else { PatternPorts::AsWritten };
        Self { ports, ..self }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether this is the lone `*`.
    pub fn is_any(&self) -> bool {
        self.text == "*"
    }

    pub fn is_glob(&self) -> bool {
        self.text.contains('*')
    }

    pub fn matches(&self, registry: &Registry) -> bool {
        self.matches_text(self.ports, registry.as_str())
    }

    /// Whether it matches literally: a pattern without a port matches a host without a port.
    pub fn names(&self, registry: &Registry) -> bool {
        self.matches_text(PatternPorts::AsWritten, registry.as_str())
    }

    /// Whether everything that `other` matches is matched by `self` too.
    pub fn covers(&self, other: &Self) -> bool {
        // Taking the other pattern's stars as plain characters is right: only a star covers a star.
        let on_all_ports = self.ports == PatternPorts::All || other.ports == PatternPorts::AsWritten;
        let matches_all = match other.text.strip_prefix(AND_BELOW) {
            // A name and all below it include what is below a name below it.
            Some(name) => self.text.starts_with(AND_BELOW) && self.matches_text(self.ports, name),
            None => !other.is_any() && self.matches_text(self.ports, &other.text),
        };
        self.is_any() || (on_all_ports && matches_all)
    }

    fn matches_text(&self, ports: PatternPorts, host: &str) -> bool {
        let host = match (ports, port_of(host)) {
            (PatternPorts::All, Some(port)) => &host[..host.len() - port.len() - 1],
            _ => host,
        };
        match self.text.strip_prefix(AND_BELOW) {
            _ if self.is_any() => true,
            Some(name) => {
                let below = host.match_indices('.').map(|(dot, _)| &host[dot + 1..]);
                std::iter::once(host).chain(below).any(|host| host_matches(name, host))
            }
            None => host_matches(&self.text, host),
        }
    }
}

/// The part after the last colon, which is not one of an IPv6 address in brackets.
fn port_of(host: &str) -> Option<&str> {
    host.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'))
}

/// Whether each label of a host matches that of a pattern.
pub fn host_matches(pattern: &str, host: &str) -> bool {
    if !pattern.contains('*') {
        return pattern == host;
    }
    let mut patterns = pattern.split('.');
    let mut labels = host.split('.');
    loop {
        match (patterns.next(), labels.next()) {
            (None, None) => return true,
            (Some(pattern), Some(label)) if glob(pattern.as_bytes(), label.as_bytes()) => {}
            _ => return false,
        }
    }
}

/// Wildcard match that backtracks at most to the last star, so it is quadratic at worst.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((after_star, from)) = retry {
            retry = Some((after_star, from + 1));
            p = after_star;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

impl std::str::FromStr for HostPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A star may stand wherever a letter may, so the grammar of hosts checks the rest.
        let as_host = text.replace('*', "a").parse::<Registry>();
        match as_host {
            // The port of https is left out, as in the registry names of requests.
            Ok(_) if text.strip_prefix(AND_BELOW).unwrap_or(text).contains("**") => Err(format!(
                "match \"{text}\": two stars are valid at the beginning only, as in \"**.example.com\", which is example.com and \
                 all below it"
            )),
            Ok(host) if text.contains('*') && host.port().is_none() => {
                let bare = text.rsplit_once(':').map_or(text, |(bare, _)| bare);
                Ok(Self::written(bare.to_ascii_lowercase()))
            }
            Ok(_) if text.contains('*') => Ok(Self::written(text.to_ascii_lowercase())),
            // Folds the aliases of Docker Hub, as requests do.
            Ok(_) => text.parse::<Registry>().map(|r| Self::written(r.to_string())).map_err(|e| e.to_string()),
            Err(_) => Err(format!(
                "match \"{text}\" is not a valid host: expected \"ghcr.io\", \"*.example.com\", \"**.example.com\", \"host:port\" or \
                 \"*\" (a rule with deny = true and no port is for all ports)"
            )),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, host: &str) -> bool {
        HostPattern::written(pattern.to_owned()).matches(&host.parse().unwrap())
    }

    #[test]
    fn labels_are_globbed() {
        let ecr = "*.dkr.ecr.*.amazonaws.com";
        assert!(matches(ecr, "123456789012.dkr.ecr.eu-west-1.amazonaws.com"));
        assert!(!matches(ecr, "123456789012.dkr.ecr.eu-west-1.amazonaws.com.cn"));
        assert!(!matches(ecr, "dkr.ecr.eu-west-1.amazonaws.com"));
        assert!(!matches(ecr, "a.b.dkr.ecr.eu-west-1.amazonaws.com"));
        assert!(matches("*-docker.pkg.dev", "europe-docker.pkg.dev"));
        assert!(matches("a*b*c.io", "aXbYbZc.io"));
        assert!(!matches("a*b*c.io", "aXbYbZ.io"));
    }

    #[test]
    fn ports_are_exact_and_a_lone_star_is_everything() {
        assert!(matches("reg.corp:5000", "reg.corp:5000"));
        assert!(!matches("reg.corp", "reg.corp:5000"));
        assert!(!matches("reg.corp:5000", "reg.corp"));
        assert!(matches("*", "reg.corp:5000"));
        assert!(matches("*", "a.b.c.d"));
    }

    #[test]
    fn the_port_of_https_goes_without_saying() {
        for text in ["*.corp:443", "*.corp"] {
            let pattern: HostPattern = text.parse().unwrap();
            assert!(pattern.matches(&"reg.corp".parse().unwrap()) && pattern.matches(&"reg.corp:443".parse().unwrap()));
        }
        assert_eq!("ghcr.io:443".parse::<HostPattern>().unwrap().as_str(), "ghcr.io");
    }

    #[test]
    fn covering_is_about_all_hosts() {
        let covers = |a: &str, b: &str| HostPattern::written(a.into()).covers(&HostPattern::written(b.into()));
        assert!(covers("*", "*.io"));
        assert!(covers("*.io", "ghcr.io"));
        assert!(covers("*.io", "*.io"));
        assert!(covers("*.io", "g*.io"));
        assert!(!covers("g*.io", "*.io"));
        assert!(!covers("ghcr.io", "*.io"));
        assert!(!covers("*.io", "*"));
        assert!(!covers("*.*", "*"));
    }

    #[test]
    fn two_stars_are_a_name_and_all_below_it() {
        let all = "**.evil.example";
        for host in ["evil.example", "a.evil.example", "a.b.evil.example"] {
            assert!(matches(all, host), "{host}");
        }
        assert!(!matches(all, "notevil.example") && !matches(all, "evil.example.com") && !matches(all, "example"));
        assert!(!matches(all, "a.evil.example:8443") && matches("**.evil.example:8443", "a.evil.example:8443"));
        let covers = |a: &str, b: &str| a.parse::<HostPattern>().unwrap().covers(&b.parse().unwrap());
        assert!(covers("**.io", "ghcr.io") && covers("**.io", "*.io") && covers("**.io", "**.a.io"));
        assert!(covers("**.io", "**.io") && covers("*", "**.io") && covers("**.*.io", "**.a.io"));
        assert!(!covers("**.*.io", "**.io") && covers("**.io", "**.*.io"), "one has io itself");
        assert!(!covers("*.io", "**.io") && !covers("**.a.io", "**.io") && !covers("**.io", "*"));
        for text in ["a**.io", "a.**.io", "**a.io", "**"] {
            let message = text.parse::<HostPattern>().unwrap_err();
            assert!(message.contains("**.example.com"), "{message}");
        }
    }

    #[test]
    fn on_every_port_means_all_of_them() {
        let denied = |text: &str| text.parse::<HostPattern>().unwrap().on_every_port();
        let is_denied = |text: &str, host: &str| denied(text).matches(&host.parse().unwrap());
        for host in ["a.evil.example", "a.evil.example:8443", "a.evil.example:443"] {
            assert!(is_denied("*.evil.example", host), "{host}");
        }
        let names = |host: &str| denied("*.evil.example").names(&host.parse().unwrap());
        assert!(names("a.evil.example") && !names("a.evil.example:8443"), "what is written is meant");
        assert!(is_denied("10.0.0.1", "10.0.0.1:5000") && is_denied("[fd00::1]", "[fd00::1]:5000"));
        assert!(is_denied("evil.example:8443", "evil.example:8443") && !is_denied("evil.example:8443", "evil.example"));
        let plain = |text: &str| text.parse::<HostPattern>().unwrap();
        assert!(denied("evil.example").covers(&plain("evil.example:1")), "no client reaches it");
        assert!(denied("evil.example").covers(&denied("evil.example")) && denied("*.io").covers(&denied("a.io")));
        assert!(!plain("evil.example").covers(&denied("evil.example")), "the other ports are still to be denied");
        assert!(plain("*").covers(&denied("evil.example")));
    }
}
