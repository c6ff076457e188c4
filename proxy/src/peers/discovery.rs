//! The members' addresses, from the answers of DNS.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use tokio::time::{Instant, sleep_until};

use crate::config::{Peers as Config, Zone};
use crate::dns;

/// An answer is asked for again when it expires, within these bounds.
const SOONEST: Duration = Duration::from_secs(1);
const LATEST: Duration = Duration::from_secs(30);

/// Large clusters ask less often: their answers are long, and each change concerns fewer digests.
const MEMBERS_A_SECOND: u32 = 200;

/// After an error.
const AGAIN: Duration = Duration::from_secs(2);

/// The names to ask, and what they said last.
pub(super) struct Discovery {
    resolver: TokioResolver,
    names: Vec<Name>,
    listen: SocketAddr,
}

struct Name {
    name: String,
    zone: Zone,
    /// The last good answer: what DNS cannot say now has not changed.
    addresses: Vec<IpAddr>,
    due: Instant,
    trouble: Option<String>,
}

impl Discovery {
    /// Must run inside a tokio runtime.
    pub(super) fn new(config: &Config, servers: &[SocketAddr], listen: SocketAddr) -> Result<Self, String> {
        let name = |(zone, name): &(Zone, String)| Name {
            name: name.clone(),
            zone: zone.clone(),
            addresses: Vec::new(),
            due: Instant::now(),
            trouble: None,
        };
        let names = config.service.iter().map(name).collect();
        Ok(Self { resolver: dns::resolver(servers)?, names, listen })
    }

    pub(super) fn is_needed(&self) -> bool {
        !self.names.is_empty()
    }

    /// Waits until answers expire, and asks again: everybody that is known then. None: nobody is
    /// known yet.
    pub(super) async fn next(&mut self) -> Option<Vec<(Zone, SocketAddr)>> {
        if let Some(due) = self.names.iter().map(|name| name.due).min() {
            sleep_until(due).await;
        }
        let now = Instant::now();
        for name in self.names.iter_mut().filter(|name| name.due <= now) {
            name.ask(&self.resolver).await;
        }
        let mut found: HashMap<SocketAddr, Zone> = HashMap::new();
        for name in &self.names {
            for address in one_family(&name.addresses, self.listen.ip()) {
                found.insert(SocketAddr::new(address, self.listen.port()), name.zone.clone());
            }
        }
        (!found.is_empty()).then(|| found.into_iter().map(|(member, zone)| (zone, member)).collect())
    }
}

impl Name {
    async fn ask(&mut self, resolver: &TokioResolver) {
        let answer = resolver.lookup_ip(self.name.as_str()).await;
        let rest = match answer {
            Ok(answer) => {
                self.trouble = None;
                self.addresses = answer.iter().collect();
                let lives = answer.valid_until().saturating_duration_since(std::time::Instant::now());
                let size = Duration::from_secs(1) * u32::try_from(self.addresses.len()).unwrap_or(u32::MAX);
                lives.max(SOONEST + size / MEMBERS_A_SECOND).min(LATEST)
            }
            Err(error) => {
                let error = error.to_string();
                if self.trouble.as_ref() != Some(&error) {
                    let (name, kept) = (&self.name, self.addresses.len());
                    tracing::warn!(name, error, kept, "the peers' name cannot be resolved");
                    self.trouble = Some(error);
                }
                AGAIN
            }
        };
        self.due = Instant::now() + rest.mul_f64(0.75 + fastrand::f64() / 2.0);
    }
}

/// Where a host has addresses of both families it would be two members: IPv4 counts where there is
/// any, unless this process listens on an IPv6 address of its own.
fn one_family(addresses: &[IpAddr], listen: IpAddr) -> Vec<IpAddr> {
    let v6 = listen.is_ipv6() && !listen.is_unspecified() || !addresses.iter().any(IpAddr::is_ipv4);
    addresses.iter().copied().filter(|address| address.is_ipv6() == v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_two_families_is_one_member() {
        let both: Vec<IpAddr> = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap()).to_vec();
        let chosen = |listen: &str, from: &[IpAddr]| one_family(from, listen.parse().unwrap());
        assert_eq!(chosen("0.0.0.0", &both), both[..1]);
        assert_eq!(chosen("::", &both), both[..1]);
        assert_eq!(chosen("fd00::1", &both), both[1..]);
        assert_eq!(chosen("::", &both[1..]), both[1..]);
        assert_eq!(chosen("0.0.0.0", &both[1..]), both[1..], "better than nobody");
    }
}
