//! The members' addresses, by DNS.

mod srv;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use tokio::time::{Instant, sleep_until};

use self::srv::{SrvLookup, Targets};
use super::members::FoundMember;
use crate::config::{PeersConfig as Config, Zone};
use crate::dns;
use crate::times::{FIRST_RETRY_DELAY, MAX_RETRY_DELAY, RETRY_INTERVAL};

/// Adds a second to the refresh interval for this many members: responses of large clusters are long, and each change
/// moves fewer digests. Larger: more load on DNS. Smaller: changes are seen later.
const MEMBERS_PER_TTL_SECOND: u32 = 200;

/// The service names, and the addresses that each resolved to last.
pub(super) struct Discovery {
    /// For both address families at once, and for each alone: the lookup of one may fail when the other succeeds.
    both: TokioResolver,
    v4: TokioResolver,
    v6: TokioResolver,
    names: Vec<Name>,
    listen: SocketAddr,
}

struct Name {
    name: String,
    zone: Zone,
    /// The last successful results: they stay while lookups fail.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// For a name of SRV records instead, which begins with an underscore (RFC 2782).
    targets: Targets,
    due: Instant,
    last_error: Option<String>,
}

impl Discovery {
    /// Must run inside a tokio runtime.
    pub(super) fn new(config: &Config, servers: &[SocketAddr], listen: SocketAddr) -> Result<Self, String> {
        let name = |(zone, name): &(Zone, String)| Name {
            name: name.clone(),
            zone: zone.clone(),
            v4: Vec::new(),
            v6: Vec::new(),
            targets: Targets::default(),
            due: Instant::now(),
            last_error: None,
        };
        let names = config.service.iter().map(name).collect();
        let v4 = dns::resolver_of(servers, LookupIpStrategy::Ipv4Only)?;
        let v6 = dns::resolver_of(servers, LookupIpStrategy::Ipv6Only)?;
        Ok(Self { both: dns::resolver(servers)?, v4, v6, names, listen })
    }

    pub(super) fn is_needed(&self) -> bool {
        !self.names.is_empty()
    }

    /// Waits until a result expires, resolves again, and returns all known members. None: none is known yet.
    pub(super) async fn next(&mut self) -> Option<Vec<FoundMember>> {
        if let Some(due) = self.names.iter().map(|name| name.due).min() {
            sleep_until(due).await;
        }
        let now = Instant::now();
        for name in self.names.iter_mut().filter(|name| name.due <= now) {
            if name.is_srv() {
                name.resolve_srv(&self.both).await;
            } else {
                name.resolve(&self.both, &self.v4, &self.v6).await;
            }
        }
        let mut found: HashMap<SocketAddr, FoundMember> = HashMap::new();
        for name in &self.names {
            for ip in one_family(&name.v4, &name.v6, self.listen.ip()) {
                let address = SocketAddr::new(*ip, self.listen.port());
                found.insert(address, FoundMember { zone: name.zone.clone(), address, name: None });
            }
        }
        // A member that both kinds of names list has its name.
        for name in &self.names {
            for (address, target) in name.targets.members(self.listen.ip()) {
                let target = Some(target.to_owned());
                found.insert(address, FoundMember { zone: name.zone.clone(), address, name: target });
            }
        }
        (!found.is_empty()).then(|| found.into_values().collect())
    }
}

impl Name {
    async fn resolve(&mut self, both: &TokioResolver, v4: &TokioResolver, v6: &TokioResolver) {
        let refresh_in = match both.lookup_ip(self.name.as_str()).await {
            Ok(lookup) => {
                // The name as it was resolved, with the search domain.
                let name = lookup.query().name().to_string();
                let (found_v4, found_v6) = lookup.iter().partition(IpAddr::is_ipv4);
                let is_complete = update_family(&mut self.v4, found_v4, v4, &name).await
                    & update_family(&mut self.v6, found_v6, v6, &name).await;
                self.last_error = self.last_error.take().filter(|_| !is_complete);
                if !is_complete {
                    self.warn_once("the lookup of one address family failed".to_owned());
                }
                if is_complete { self.refresh_interval(lookup.valid_until()) } else { RETRY_INTERVAL }
            }
            Err(error) => {
                self.warn_once(error.to_string());
                RETRY_INTERVAL
            }
        };
        self.due = Instant::now() + refresh_in.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    fn is_srv(&self) -> bool {
        self.name.starts_with('_')
    }

    async fn resolve_srv(&mut self, resolver: &TokioResolver) {
        let refresh_in = match self.targets.resolve(&self.name, resolver).await {
            Ok(SrvLookup { valid_until, error: None }) => {
                self.last_error = None;
                self.refresh_interval(valid_until)
            }
            Ok(SrvLookup { error: Some(error), .. }) | Err(error) => {
                self.warn_once(error);
                RETRY_INTERVAL
            }
        };
        self.due = Instant::now() + refresh_in.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    fn refresh_interval(&self, valid_until: std::time::Instant) -> Duration {
        let ttl = valid_until.saturating_duration_since(std::time::Instant::now());
        let size = Duration::from_secs(1) * u32::try_from(self.len()).unwrap_or(u32::MAX);
        ttl.max(FIRST_RETRY_DELAY + size / MEMBERS_PER_TTL_SECOND).min(MAX_RETRY_DELAY)
    }

    fn warn_once(&mut self, error: String) {
        if self.last_error.as_ref() != Some(&error) {
            let (name, addresses_kept) = (&self.name, self.len());
            tracing::warn!(name, error, addresses_kept, "peer discovery failed");
            self.last_error = Some(error);
        }
    }

    fn len(&self) -> usize {
        self.v4.len() + self.v6.len() + self.targets.len()
    }
}

/// Updates the addresses of one family. A lookup of both families succeeds although one of them fails, so only a lookup
/// of this family alone can remove all its addresses. False: that failed, and the known addresses stay.
async fn update_family(known: &mut Vec<IpAddr>, found_now: Vec<IpAddr>, alone: &TokioResolver, name: &str) -> bool {
    if found_now.is_empty() && !known.is_empty() {
        match alone.lookup_ip(name).await {
            Ok(lookup) => *known = lookup.iter().collect(),
            Err(error) if error.is_no_records_found() => known.clear(),
            Err(_) => return false,
        }
    } else {
        *known = found_now;
    }
    true
}

/// The addresses of one family only, since a host with both would be two members: IPv4 where there is any, unless this
/// process listens on a specific IPv6 address.
fn one_family<'a>(v4: &'a [IpAddr], v6: &'a [IpAddr], listen: IpAddr) -> &'a [IpAddr] {
    let is_v6 = listen.is_ipv6() && !listen.is_unspecified() || v4.is_empty();
    if is_v6 { v6 } else { v4 }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use hickory_resolver::proto::op::{Message, ResponseCode};
    use hickory_resolver::proto::rr::{RData, Record, RecordType};
    use tokio::net::UdpSocket;

    use super::*;

    fn addresses(text: &[&str]) -> Vec<IpAddr> {
        text.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn host_with_two_families_is_one_member() {
        let (v4, v6) = (addresses(&["10.0.0.1"]), addresses(&["fd00::1"]));
        let chosen = |listen: &str, v4| one_family(v4, &v6, listen.parse().unwrap()).to_vec();
        assert_eq!(chosen("0.0.0.0", &v4), v4);
        assert_eq!(chosen("::", &v4), v4);
        assert_eq!(chosen("fd00::1", &v4), v6);
        assert_eq!(chosen("::", &[]), v6);
        assert_eq!(chosen("0.0.0.0", &[]), v6, "better than no member");
    }

    /// A name server with one address of each family. Lookups of the IPv4 address may fail, or find none.
    async fn server(fails: Arc<AtomicBool>, gone: Arc<AtomicBool>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                let request = Message::from_vec(&buffer[..len]).unwrap();
                let query = request.queries[0].clone();
                let mut response = request.into_response();
                let data = match query.query_type() {
                    RecordType::A if fails.load(Ordering::SeqCst) => {
                        response.metadata.response_code = ResponseCode::ServFail;
                        None
                    }
                    RecordType::A if gone.load(Ordering::SeqCst) => None,
                    RecordType::A => Some(RData::A("10.0.0.1".parse().unwrap())),
                    RecordType::AAAA => Some(RData::AAAA("fd00::1".parse().unwrap())),
                    _ => None,
                };
                response.answers.extend(data.map(|data| Record::from_rdata(query.name().clone(), 0, data)));
                socket.send_to(&response.to_vec().unwrap(), from).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn addresses_stay_while_lookups_of_their_family_fail() {
        let [fails, gone] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let servers = [server(fails.clone(), gone.clone()).await];
        let config = Config { service: vec![(None, "dray.example".to_owned())], ..Config::default() };
        let mut discovery = Discovery::new(&config, &servers, "0.0.0.0:5052".parse().unwrap()).unwrap();
        let mut members = async || {
            discovery.names[0].due = Instant::now();
            let found = discovery.next().await.unwrap_or_default();
            found.into_iter().map(|found| found.address.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(members().await, ["10.0.0.1:5052"]);
        fails.store(true, Ordering::SeqCst);
        assert_eq!(members().await, ["10.0.0.1:5052"], "and not the address of the other family");
        fails.store(false, Ordering::SeqCst);
        gone.store(true, Ordering::SeqCst);
        assert_eq!(members().await, ["[fd00::1]:5052"], "a lookup of IPv4 alone finds no address");
    }
}
