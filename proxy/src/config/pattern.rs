//! Host patterns: `*` stands for any run of characters within one label, a lone `*` for any host.

use std::fmt;

use crate::oci::Registry;

/// A pattern such as `ghcr.io`, `*.dkr.ecr.*.amazonaws.com`, `reg.corp:5000` or `*`.
///
/// Without a port the pattern matches the host without one; a port must be written to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPattern(String);

impl HostPattern {
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the lone `*`.
    pub fn is_any(&self) -> bool {
        self.0 == "*"
    }

    pub fn is_glob(&self) -> bool {
        self.0.contains('*')
    }

    pub fn matches(&self, registry: &Registry) -> bool {
        self.is_any() || host_matches(&self.0, registry.as_str())
    }

    /// Whether everything that `other` matches is matched by `self` too.
    pub fn covers(&self, other: &Self) -> bool {
        // Taking the other pattern's stars as plain characters is right: only a star covers a star.
        self.is_any() || (!other.is_any() && host_matches(&self.0, &other.0))
    }
}

/// Whether each label of a host matches that of a pattern.
pub fn host_matches(pattern: &str, host: &str) -> bool {
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

/// Wildcard match that goes back at most to the last star, so it is quadratic at worst.
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
        // A star in a label is as good as a letter there, so the grammar of hosts does the rest.
        let as_host = text.replace('*', "a").parse::<Registry>();
        match as_host {
            // The port of https goes without saying, as in the names of requests.
            Ok(host) if text.contains('*') && host.port().is_none() => {
                let bare = text.rsplit_once(':').map_or(text, |(bare, _)| bare);
                Ok(Self(bare.to_ascii_lowercase()))
            }
            Ok(_) if text.contains('*') => Ok(Self(text.to_ascii_lowercase())),
            // Folds the aliases of Docker Hub, as requests do.
            Ok(_) => text.parse::<Registry>().map(|r| Self(r.to_string())).map_err(|e| e.to_string()),
            Err(_) => Err(format!(
                "match \"{text}\" is no host: write \"ghcr.io\", \"*.example.com\", \"host:port\" or \"*\""
            )),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, host: &str) -> bool {
        HostPattern(pattern.to_owned()).matches(&host.parse().unwrap())
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
        let covers = |a: &str, b: &str| HostPattern(a.into()).covers(&HostPattern(b.into()));
        assert!(covers("*", "*.io"));
        assert!(covers("*.io", "ghcr.io"));
        assert!(covers("*.io", "*.io"));
        assert!(covers("*.io", "g*.io"));
        assert!(!covers("g*.io", "*.io"));
        assert!(!covers("ghcr.io", "*.io"));
        assert!(!covers("*.io", "*"));
        assert!(!covers("*.*", "*"));
    }
}
