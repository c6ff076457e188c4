//! The members' addresses, from the answers of DNS.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use tokio::time::{Instant, sleep_until};

use crate::config::{PeersConfig as Config, Zone};
use crate::dns;
use crate::times::{FIRST_PAUSE, LONGEST_PAUSE, RETRY_INTERVAL};

/// Large clusters ask less often: their answers are long, and each change concerns fewer digests.
const MEMBERS_A_SECOND: u32 = 200;

/// The names to ask, and what they said last.
pub(super) struct Discovery {
    /// For both families at once, and for each alone: of a name that has both, one may be answered and the other not.
    both: TokioResolver,
    v4: TokioResolver,
    v6: TokioResolver,
    names: Vec<Name>,
    listen: SocketAddr,
}

struct Name {
    name: String,
    zone: Zone,
    /// The last good answers: what DNS cannot say now has not changed.
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    due: Instant,
    trouble: Option<String>,
}

impl Discovery {
    /// Must run inside a tokio runtime.
    pub(super) fn new(config: &Config, servers: &[SocketAddr], listen: SocketAddr) -> Result<Self, String> {
        let name = |(zone, name): &(Zone, String)| Name {
            name: name.clone(),
            zone: zone.clone(),
            v4: Vec::new(),
            v6: Vec::new(),
            due: Instant::now(),
            trouble: None,
        };
        let names = config.service.iter().map(name).collect();
        let v4 = dns::resolver_of(servers, LookupIpStrategy::Ipv4Only)?;
        let v6 = dns::resolver_of(servers, LookupIpStrategy::Ipv6Only)?;
        Ok(Self { both: dns::resolver(servers)?, v4, v6, names, listen })
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
            name.ask(&self.both, &self.v4, &self.v6).await;
        }
        let mut found: HashMap<SocketAddr, Zone> = HashMap::new();
        for name in &self.names {
            for address in one_family(&name.v4, &name.v6, self.listen.ip()) {
                found.insert(SocketAddr::new(*address, self.listen.port()), name.zone.clone());
            }
        }
        (!found.is_empty()).then(|| found.into_iter().map(|(member, zone)| (zone, member)).collect())
    }
}

impl Name {
    async fn ask(&mut self, both: &TokioResolver, v4: &TokioResolver, v6: &TokioResolver) {
        let rest = match both.lookup_ip(self.name.as_str()).await {
            Ok(answer) => {
                // As it was answered, with the domain that was searched.
                let name = answer.query().name().to_string();
                let (said_v4, said_v6) = answer.iter().partition(IpAddr::is_ipv4);
                let is_whole =
                    take(&mut self.v4, said_v4, v4, &name).await & take(&mut self.v6, said_v6, v6, &name).await;
                self.trouble = self.trouble.take().filter(|_| !is_whole);
                if !is_whole {
                    self.complain("one family of its addresses is missing".to_owned());
                }
                let lives = answer.valid_until().saturating_duration_since(std::time::Instant::now());
                let size = Duration::from_secs(1) * u32::try_from(self.len()).unwrap_or(u32::MAX);
                if is_whole {
                    lives.max(FIRST_PAUSE + size / MEMBERS_A_SECOND).min(LONGEST_PAUSE)
                } else {
                    RETRY_INTERVAL
                }
            }
            Err(error) => {
                self.complain(error.to_string());
                RETRY_INTERVAL
            }
        };
        self.due = Instant::now() + rest.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    fn complain(&mut self, error: String) {
        if self.trouble.as_ref() != Some(&error) {
            let (name, kept) = (&self.name, self.len());
            tracing::warn!(name, error, kept, "the peers' name cannot be resolved");
            self.trouble = Some(error);
        }
    }

    fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }
}

/// Takes over what was said of one family. That there are none any more has to be said of that family alone: an answer for
/// both has what could be had. False: it was not, and what was known before is kept.
async fn take(known: &mut Vec<IpAddr>, said: Vec<IpAddr>, alone: &TokioResolver, name: &str) -> bool {
    if said.is_empty() && !known.is_empty() {
        match alone.lookup_ip(name).await {
            Ok(answer) => *known = answer.iter().collect(),
            Err(error) if error.is_no_records_found() => known.clear(),
            Err(_) => return false,
        }
    } else {
        *known = said;
    }
    true
}

/// Where a host has addresses of both families it would be two members: IPv4 counts where there is
/// any, unless this process listens on an IPv6 address of its own.
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
    fn a_host_with_two_families_is_one_member() {
        let (v4, v6) = (addresses(&["10.0.0.1"]), addresses(&["fd00::1"]));
        let chosen = |listen: &str, v4| one_family(v4, &v6, listen.parse().unwrap()).to_vec();
        assert_eq!(chosen("0.0.0.0", &v4), v4);
        assert_eq!(chosen("::", &v4), v4);
        assert_eq!(chosen("fd00::1", &v4), v6);
        assert_eq!(chosen("::", &[]), v6);
        assert_eq!(chosen("0.0.0.0", &[]), v6, "better than nobody");
    }

    /// A name server with one address of each family, of which those of IPv4 may fail or go.
    async fn server(fails: Arc<AtomicBool>, gone: Arc<AtomicBool>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                let question = Message::from_vec(&buffer[..len]).unwrap();
                let query = question.queries[0].clone();
                let mut answer = question.into_response();
                let data = match query.query_type() {
                    RecordType::A if fails.load(Ordering::SeqCst) => {
                        answer.metadata.response_code = ResponseCode::ServFail;
                        None
                    }
                    RecordType::A if gone.load(Ordering::SeqCst) => None,
                    RecordType::A => Some(RData::A("10.0.0.1".parse().unwrap())),
                    RecordType::AAAA => Some(RData::AAAA("fd00::1".parse().unwrap())),
                    _ => None,
                };
                answer.answers.extend(data.map(|data| Record::from_rdata(query.name().clone(), 0, data)));
                socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
            }
        });
        address
    }

    #[tokio::test]
    async fn a_family_that_dns_cannot_say_has_not_changed() {
        let [fails, gone] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let servers = [server(fails.clone(), gone.clone()).await];
        let config = Config { service: vec![(None, "dray.example".to_owned())], ..Config::default() };
        let mut discovery = Discovery::new(&config, &servers, "0.0.0.0:5052".parse().unwrap()).unwrap();
        let mut members = async || {
            discovery.names[0].due = Instant::now();
            let found = discovery.next().await.unwrap_or_default();
            found.into_iter().map(|(_, member)| member.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(members().await, ["10.0.0.1:5052"]);
        fails.store(true, Ordering::SeqCst);
        assert_eq!(members().await, ["10.0.0.1:5052"], "and not the other family's");
        fails.store(false, Ordering::SeqCst);
        gone.store(true, Ordering::SeqCst);
        assert_eq!(members().await, ["[fd00::1]:5052"], "now it is said that there are none");
    }
}
