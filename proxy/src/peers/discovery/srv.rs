//! Members by SRV records, as Kubernetes writes them for the named port of a headless Service. The target's name is the
//! identity of a member: a pod of a StatefulSet keeps its place in the ring when its address changes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use futures_util::stream::{self, StreamExt};
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;

use super::one_family;

/// The targets that the records named last, without a trailing dot and in lower case.
#[derive(Default)]
pub(super) struct Targets(BTreeMap<SrvTarget, Vec<IpAddr>>);

/// A target, whose addresses of the last successful lookup stay while lookups fail.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct SrvTarget {
    name: String,
    port: u16,
}

/// The outcome of a lookup.
pub(super) struct SrvLookup {
    pub(super) valid_until: Instant,
    /// The first target whose addresses could not be looked up.
    pub(super) error: Option<String>,
}

/// Lookups at the same time. More: a burst at the name server. Fewer: with a slow one, members are found later.
const MAX_LOOKUPS: usize = 16;

impl Targets {
    /// Looks up the records, then the addresses of each target.
    pub(super) async fn resolve(&mut self, name: &str, resolver: &TokioResolver) -> Result<SrvLookup, String> {
        let lookup = resolver.srv_lookup(name).await.map_err(|error| error.to_string())?;
        let mut targets = Vec::new();
        for record in lookup.answers() {
            if let RData::SRV(srv) = &record.data {
                targets.push((srv.target.clone(), srv.port));
            }
        }
        let lookups = stream::iter(targets).map(|(target, port)| async move {
            let name = target.to_utf8().trim_end_matches('.').to_ascii_lowercase();
            (SrvTarget { name, port }, resolver.lookup_ip(target).await)
        });
        let found: Vec<_> = lookups.buffer_unordered(MAX_LOOKUPS).collect().await;
        let mut known = std::mem::take(&mut self.0);
        let mut resolved = SrvLookup { valid_until: lookup.valid_until(), error: None };
        for (target, found) in found {
            let before = known.remove(&target).unwrap_or_default();
            let addresses = match found {
                Ok(found) => merged(before, found.iter().collect()),
                // A pod that is being replaced has no address for a while.
                Err(error) if error.is_no_records_found() => Vec::new(),
                Err(error) => {
                    resolved.error.get_or_insert_with(|| format!("{}: {error}", target.name));
                    before
                }
            };
            self.0.insert(target, addresses);
        }
        Ok(resolved)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// One address of each target, with its name.
    pub(super) fn members(&self, listen: IpAddr) -> impl Iterator<Item = (SocketAddr, &str)> {
        self.0.iter().filter_map(move |(target, addresses)| {
            let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv4());
            let address = one_family(&v4, &v6, listen).first().copied()?;
            Some((SocketAddr::new(address, target.port), target.name.as_str()))
        })
    }
}

/// A lookup of both families succeeds although that of IPv4 alone fails. A member must not change its address for that.
fn merged(before: Vec<IpAddr>, found: Vec<IpAddr>) -> Vec<IpAddr> {
    let lost_v4 = before.iter().any(IpAddr::is_ipv4) && !found.iter().any(IpAddr::is_ipv4);
    if lost_v4 { before } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_keeps_its_address_while_ipv4_cannot_be_looked_up() {
        let ips = |text: &[&str]| text.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
        let both = ips(&["10.0.0.1", "fd00::1"]);
        assert_eq!(merged(both.clone(), ips(&["fd00::1"])), both);
        assert_eq!(merged(both, ips(&["10.0.0.2", "fd00::2"])), ips(&["10.0.0.2", "fd00::2"]));
        assert_eq!(merged(ips(&["fd00::1"]), ips(&["fd00::2"])), ips(&["fd00::2"]));
    }
}
