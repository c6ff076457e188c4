//! The members' addresses, from the answers of DNS.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use tokio::join;
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
    /// One for each family: of a name that has both, one may be answered and the other not.
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

/// A name's addresses of one family, none included, and for how long that holds. An error: DNS does not say.
type Said = Result<(Vec<IpAddr>, Duration), String>;

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
        Ok(Self { v4, v6, names, listen })
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
            let (v4, v6) = join!(ask(&self.v4, &name.name), ask(&self.v6, &name.name));
            name.hear(v4, v6);
        }
        let mut found: HashMap<SocketAddr, Zone> = HashMap::new();
        for name in &self.names {
            for address in one_family(&name.v4, &name.v6, self.listen.ip()) {
                found.insert(SocketAddr::new(address, self.listen.port()), name.zone.clone());
            }
        }
        (!found.is_empty()).then(|| found.into_iter().map(|(member, zone)| (zone, member)).collect())
    }
}

async fn ask(resolver: &TokioResolver, name: &str) -> Said {
    match resolver.lookup_ip(name).await {
        Ok(answer) => {
            let lives = answer.valid_until().saturating_duration_since(std::time::Instant::now());
            Ok((answer.iter().collect(), lives))
        }
        Err(error) if error.is_no_records_found() => Ok((Vec::new(), LATEST)),
        Err(error) => Err(error.to_string()),
    }
}

impl Name {
    fn hear(&mut self, v4: Said, v6: Said) {
        let rest = match self.take(v4, v6) {
            Ok(lives) => {
                self.trouble = None;
                let size = Duration::from_secs(1) * u32::try_from(self.len()).unwrap_or(u32::MAX);
                lives.max(SOONEST + size / MEMBERS_A_SECOND).min(LATEST)
            }
            Err(error) => {
                if self.trouble.as_ref() != Some(&error) {
                    let (name, kept) = (&self.name, self.len());
                    tracing::warn!(name, error, kept, "the peers' name cannot be resolved");
                    self.trouble = Some(error);
                }
                AGAIN
            }
        };
        self.due = Instant::now() + rest.mul_f64(0.75 + fastrand::f64() / 2.0);
    }

    /// Takes over what DNS says, and for how long that holds. An error: what is missing.
    fn take(&mut self, v4: Said, v6: Said) -> Result<Duration, String> {
        match (v4, v6) {
            (Ok((v4, _)), Ok((v6, _))) if v4.is_empty() && v6.is_empty() => Err("it has no addresses".to_owned()),
            (Ok((v4, lives)), Ok((v6, as_long))) => {
                (self.v4, self.v6) = (v4, v6);
                Ok(lives.min(as_long))
            }
            (Ok((v4, lives)), Err(error)) => take_one(v4, lives, error, &mut self.v4, &self.v6),
            (Err(error), Ok((v6, lives))) => take_one(v6, lives, error, &mut self.v6, &self.v4),
            (Err(error), Err(_)) => Err(error),
        }
    }

    fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }
}

/// Takes over what is said of one family where nothing is said of the other. That is trouble only where it would be missed.
fn take_one(
    said: Vec<IpAddr>,
    lives: Duration,
    error: String,
    known: &mut Vec<IpAddr>,
    other: &[IpAddr],
) -> Result<Duration, String> {
    let is_enough = !said.is_empty() && other.is_empty();
    // That there are none is believed only with the other's word.
    if !said.is_empty() {
        *known = said;
    }
    if is_enough { Ok(lives) } else { Err(error) }
}

/// Where a host has addresses of both families it would be two members: IPv4 counts where there is
/// any, unless this process listens on an IPv6 address of its own.
fn one_family<'a>(v4: &'a [IpAddr], v6: &'a [IpAddr], listen: IpAddr) -> impl Iterator<Item = IpAddr> + use<'a> {
    let is_v6 = listen.is_ipv6() && !listen.is_unspecified() || v4.is_empty();
    let (chosen, family) =
        if is_v6 { (v6, IpAddr::is_ipv6 as fn(&IpAddr) -> bool) } else { (v4, IpAddr::is_ipv4 as _) };
    chosen.iter().copied().filter(family)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVES: Duration = Duration::from_secs(5);

    fn addresses(text: &[&str]) -> Vec<IpAddr> {
        text.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    fn said(text: &[&str]) -> Said {
        Ok((addresses(text), LIVES))
    }

    fn failed() -> Said {
        Err("timed out".to_owned())
    }

    #[test]
    fn a_host_with_two_families_is_one_member() {
        let (v4, v6) = (addresses(&["10.0.0.1"]), addresses(&["fd00::1"]));
        let chosen =
            |listen: &str, v4: &[IpAddr]| one_family(v4, &v6, listen.parse().unwrap()).collect::<Vec<IpAddr>>();
        assert_eq!(chosen("0.0.0.0", &v4), v4);
        assert_eq!(chosen("::", &v4), v4);
        assert_eq!(chosen("fd00::1", &v4), v6);
        assert_eq!(chosen("::", &[]), v6);
        assert_eq!(chosen("0.0.0.0", &[]), v6, "better than nobody");
    }

    #[test]
    fn what_dns_cannot_say_has_not_changed() {
        let mut name =
            Name { name: "a".into(), zone: None, v4: Vec::new(), v6: Vec::new(), due: Instant::now(), trouble: None };
        assert!(name.take(failed(), failed()).is_err() && name.len() == 0);
        assert_eq!(name.take(said(&["10.0.0.1"]), said(&["fd00::1"])), Ok(LIVES));
        // One family's answer outlives the other's in some cache.
        assert!(name.take(failed(), said(&["fd00::1", "fd00::2"])).is_err());
        assert_eq!((&name.v4, &name.v6), (&addresses(&["10.0.0.1"]), &addresses(&["fd00::1", "fd00::2"])));
        assert!(name.take(said(&[]), failed()).is_err() && name.len() == 3);
        assert!(name.take(said(&[]), said(&[])).is_err() && name.len() == 3, "a name without addresses is a mistake");
        assert_eq!(name.take(said(&["10.0.0.1"]), said(&[])), Ok(LIVES));
        assert_eq!((name.v4.len(), name.v6.len()), (1, 0));
        assert_eq!(name.take(said(&["10.0.0.2"]), failed()), Ok(LIVES), "nothing is missed");
        assert_eq!(name.v4, addresses(&["10.0.0.2"]));
    }
}
