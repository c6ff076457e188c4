//! Which clients are answered, and how much one address may ask for at once.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use parking_lot::Mutex;

use crate::config::AccessConfig;
use crate::connections::client;
use crate::times::DEFAULT_TTL;

/// What `[access]` says of clients, and what each address asks for at the moment.
pub struct Clients {
    networks: Vec<IpNet>,
    most_at_once: Option<u32>,
    most_a_second: Option<u32>,
    running: Arc<RunningRequests>,
    allowances: moka::sync::Cache<IpAddr, Arc<Mutex<RateAllowance>>>,
}

/// Requests that are being answered, by client. Whoever has none is not in it.
type RunningRequests = Mutex<HashMap<IpAddr, u32>>;

/// Requests that may come at once; as many come back each second as may come in one.
struct RateAllowance {
    left: f64,
    since: Instant,
}

/// A request's place among those of its client.
pub(super) struct ClientPermit(Option<(Arc<RunningRequests>, IpAddr)>);

/// Why a client is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientDenied {
    /// It is in none of the networks.
    Stranger,
    TooManyAtOnce,
    TooOften,
}

/// More addresses than ask within a minute. Those that are forgotten begin anew, with what a second gives anyway.
const MAX_CLIENTS: u64 = 100_000;

impl Clients {
    pub fn new(access: &AccessConfig) -> Self {
        Self {
            networks: access.clients.clone(),
            most_at_once: access.requests_at_once.map(|most| u32::from(most.get())),
            most_a_second: access.requests_per_second.map(|most| u32::from(most.get())),
            running: Arc::default(),
            allowances: moka::sync::Cache::builder().max_capacity(MAX_CLIENTS).time_to_idle(DEFAULT_TTL).build(),
        }
    }

    /// Lets a request in. Without an address nobody is known to be in a network.
    pub(super) fn admit(&self, address: Option<IpAddr>, now: Instant) -> Result<ClientPermit, ClientDenied> {
        let address = address.map(|address| address.to_canonical());
        let is_in = |address: IpAddr| self.networks.iter().any(|network| network.contains(&address));
        if !self.networks.is_empty() && !address.is_some_and(is_in) {
            return Err(ClientDenied::Stranger);
        }
        let Some(client) = address.map(client) else { return Ok(ClientPermit(None)) };
        if let Some(most) = self.most_a_second {
            let full = || Arc::new(Mutex::new(RateAllowance { left: f64::from(most), since: now }));
            let allowance = self.allowances.get_with(client, full);
            if !allowance.lock().take(most, now) {
                return Err(ClientDenied::TooOften);
            }
        }
        let Some(most) = self.most_at_once else { return Ok(ClientPermit(None)) };
        let mut running = self.running.lock();
        let count = running.entry(client).or_default();
        if *count >= most {
            return Err(ClientDenied::TooManyAtOnce);
        }
        *count += 1;
        Ok(ClientPermit(Some((self.running.clone(), client))))
    }
}

impl RateAllowance {
    /// Takes one request of this second's.
    fn take(&mut self, most: u32, now: Instant) -> bool {
        let most = f64::from(most);
        let back = now.saturating_duration_since(self.since).as_secs_f64() * most;
        self.left = (self.left + back).min(most);
        self.since = now;
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

impl ClientDenied {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stranger => "this address is in no network of access.clients",
            Self::TooManyAtOnce => "more requests of this address at once than access.requests_at_once",
            Self::TooOften => "more requests of this address a second than access.requests_per_second",
        }
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let Some((running, client)) = &self.0 else { return };
        let mut running = running.lock();
        if let Some(count) = running.get_mut(client) {
            *count -= 1;
            if *count == 0 {
                running.remove(client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Config;

    fn clients(access: &str) -> Clients {
        Clients::new(&Config::parse(&format!("[access]\n{access}"), "test").unwrap().access)
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn outcome(clients: &Clients, address: Option<IpAddr>) -> Result<(), ClientDenied> {
        clients.admit(address, Instant::now()).map(drop)
    }

    #[test]
    fn only_those_in_the_networks_are_answered() {
        let some = clients("clients = [\"10.0.0.0/8\", \"fd00::/8\"]");
        for (address, is_in) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("fd00::1", true),
            ("11.0.0.1", false),
            ("::1", false),
            ("::ffff:11.0.0.1", false),
        ] {
            assert_eq!(outcome(&some, ip(address)).is_ok(), is_in, "{address}");
        }
        assert_eq!(outcome(&some, None), Err(ClientDenied::Stranger));
        assert_eq!(outcome(&clients(""), None), Ok(()));
    }

    #[test]
    fn an_address_has_so_many_requests_at_once() {
        let few = clients("requests_at_once = 2");
        let now = Instant::now();
        let held: Vec<_> = (0..2).map(|_| few.admit(ip("10.0.0.1"), now).unwrap()).collect();
        assert_eq!(outcome(&few, ip("10.0.0.1")), Err(ClientDenied::TooManyAtOnce));
        assert_eq!(outcome(&few, ip("10.0.0.2")), Ok(()), "another's");
        drop(held);
        assert_eq!(outcome(&few, ip("10.0.0.1")), Ok(()));
        assert!(few.running.lock().is_empty(), "whoever asks for nothing costs nothing");
    }

    #[test]
    fn a_network_of_ipv6_is_one_client() {
        let few = clients("requests_at_once = 1");
        let _held = few.admit(ip("2001:db8::1"), Instant::now()).unwrap();
        assert_eq!(outcome(&few, ip("2001:db8::2")), Err(ClientDenied::TooManyAtOnce));
        assert_eq!(outcome(&few, ip("2001:db8:0:1::1")), Ok(()));
    }

    #[test]
    fn an_address_has_so_many_requests_a_second() {
        let few = clients("requests_per_second = 10");
        let start = Instant::now();
        let at = |millis: u64| {
            let now = start + Duration::from_millis(millis);
            (0..20).filter(|_| few.admit(ip("10.0.0.1"), now).is_ok()).count()
        };
        assert_eq!([at(0), at(500), at(10_000)], [10, 5, 10]);
    }
}
