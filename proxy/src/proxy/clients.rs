//! Which clients are answered, and how much one address may ask for at once.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::config::Access;

/// What `[access]` says of clients, and what each address asks for at the moment.
pub struct Clients {
    networks: Vec<IpNet>,
    most_at_once: Option<u32>,
    most_a_second: Option<u32>,
    known: moka::sync::Cache<IpAddr, Arc<Client>>,
}

struct Client {
    running: AtomicU32,
    allowance: Mutex<Allowance>,
}

/// Requests that may come at once; as many come back each second as may come in one.
struct Allowance {
    left: f64,
    since: Instant,
}

/// A request's place among those of its client.
pub(super) struct Place(Option<Arc<Client>>);

/// Why a client is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unwelcome {
    /// It is in none of the networks.
    Stranger,
    TooManyAtOnce,
    TooOften,
}

/// More addresses than ask within a minute. Those that are forgotten begin anew.
const MAX_CLIENTS: u64 = 100_000;
const REMEMBERED: Duration = Duration::from_secs(60);

impl Clients {
    pub fn new(access: &Access) -> Self {
        Self {
            networks: access.clients.clone(),
            most_at_once: access.requests_at_once.map(|most| u32::from(most.get())),
            most_a_second: access.requests_per_second.map(|most| u32::from(most.get())),
            known: moka::sync::Cache::builder().max_capacity(MAX_CLIENTS).time_to_idle(REMEMBERED).build(),
        }
    }

    /// Lets a request in. Without an address nobody is known to be in a network.
    pub(super) fn admit(&self, address: Option<IpAddr>, now: Instant) -> Result<Place, Unwelcome> {
        let address = address.map(|address| address.to_canonical());
        let is_in = |address: IpAddr| self.networks.iter().any(|network| network.contains(&address));
        if !self.networks.is_empty() && !address.is_some_and(is_in) {
            return Err(Unwelcome::Stranger);
        }
        let (Some(address), true) = (address, self.most_at_once.is_some() || self.most_a_second.is_some()) else {
            return Ok(Place(None));
        };
        let client = self.known.get_with(address, || Arc::new(Client::new(self.most_a_second, now)));
        if self.most_a_second.is_some_and(|most| !client.take(most, now)) {
            return Err(Unwelcome::TooOften);
        }
        let before = client.running.fetch_add(1, Ordering::AcqRel);
        let place = Place(Some(client));
        if self.most_at_once.is_some_and(|most| before >= most) {
            return Err(Unwelcome::TooManyAtOnce);
        }
        Ok(place)
    }
}

impl Client {
    fn new(most_a_second: Option<u32>, now: Instant) -> Self {
        let allowance = Allowance { left: most_a_second.map_or(0.0, f64::from), since: now };
        Self { running: AtomicU32::new(0), allowance: Mutex::new(allowance) }
    }

    /// Takes one request of this second's.
    fn take(&self, most: u32, now: Instant) -> bool {
        // Only two numbers are changed under the lock.
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        let most = f64::from(most);
        let back = now.saturating_duration_since(allowance.since).as_secs_f64() * most;
        allowance.left = (allowance.left + back).min(most);
        allowance.since = now;
        let may = allowance.left >= 1.0;
        if may {
            allowance.left -= 1.0;
        }
        may
    }
}

impl Unwelcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stranger => "this address is in no network of access.clients",
            Self::TooManyAtOnce => "more requests of this address at once than access.requests_at_once",
            Self::TooOften => "more requests of this address a second than access.requests_per_second",
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(client) = &self.0 {
            client.running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn clients(access: &str) -> Clients {
        Clients::new(&Config::parse(&format!("[access]\n{access}"), "test").unwrap().access)
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn outcome(clients: &Clients, address: Option<IpAddr>) -> Result<(), Unwelcome> {
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
        assert_eq!(outcome(&some, None), Err(Unwelcome::Stranger));
        assert_eq!(outcome(&clients(""), None), Ok(()));
    }

    #[test]
    fn an_address_has_so_many_requests_at_once() {
        let few = clients("requests_at_once = 2");
        let now = Instant::now();
        let held: Vec<_> = (0..2).map(|_| few.admit(ip("10.0.0.1"), now).unwrap()).collect();
        assert_eq!(outcome(&few, ip("10.0.0.1")), Err(Unwelcome::TooManyAtOnce));
        assert_eq!(outcome(&few, ip("10.0.0.2")), Ok(()), "another's");
        drop(held);
        assert_eq!(outcome(&few, ip("10.0.0.1")), Ok(()));
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
