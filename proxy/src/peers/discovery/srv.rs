//! Members by SRV records, as Kubernetes writes them for the named port of a headless Service. The target's name is the
//! identity of a member: a pod of a StatefulSet keeps its place in the ring when its address changes.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;

use super::one_family;

/// The targets that the records named last, without a trailing dot and in lower case.
#[derive(Default)]
pub(super) struct Targets(BTreeMap<String, Target>);

/// The last successful results: they stay while lookups fail.
struct Target {
    port: u16,
    addresses: Vec<IpAddr>,
}

/// The outcome of a lookup.
pub(super) struct Resolved {
    pub(super) valid_until: Instant,
    /// The first target whose addresses could not be looked up.
    pub(super) error: Option<String>,
}

impl Targets {
    /// Looks up the records, then the addresses of each target.
    pub(super) async fn resolve(&mut self, name: &str, resolver: &TokioResolver) -> Result<Resolved, String> {
        let lookup = resolver.srv_lookup(name).await.map_err(|error| error.to_string())?;
        let mut known = std::mem::take(&mut self.0);
        let mut resolved = Resolved { valid_until: lookup.valid_until(), error: None };
        for record in lookup.answers() {
            let RData::SRV(srv) = &record.data else { continue };
            let target = srv.target.to_utf8().trim_end_matches('.').to_ascii_lowercase();
            let before = known.remove(&target).map(|known| known.addresses).unwrap_or_default();
            let addresses = match resolver.lookup_ip(srv.target.clone()).await {
                Ok(found) => found.iter().collect(),
                // A pod that is being replaced has no address for a while.
                Err(error) if error.is_no_records_found() => Vec::new(),
                Err(error) => {
                    resolved.error.get_or_insert_with(|| format!("{target}: {error}"));
                    before
                }
            };
            self.0.insert(target, Target { port: srv.port, addresses });
        }
        Ok(resolved)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// One address of each target, with its name.
    pub(super) fn members(&self, listen: IpAddr) -> impl Iterator<Item = (SocketAddr, &str)> {
        self.0.iter().filter_map(move |(name, target)| {
            let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = target.addresses.iter().partition(|ip| ip.is_ipv4());
            let address = one_family(&v4, &v6, listen).first().copied()?;
            Some((SocketAddr::new(address, target.port), name.as_str()))
        })
    }
}
