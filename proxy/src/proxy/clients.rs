//! Which clients are served, and how many requests one address may send.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use parking_lot::Mutex;

use crate::config::AccessConfig;
use crate::connections::client;
use crate::times::DEFAULT_TTL;

/// The current requests of each client.
pub struct Clients {
    running: Arc<RunningRequests>,
    allowances: moka::sync::Cache<IpAddr, Arc<Mutex<RateAllowance>>>,
}

/// The limits of a configuration.
pub(super) struct ClientLimits {
    networks: Vec<IpNet>,
    max_concurrent: Option<u32>,
    max_per_second: Option<u32>,
}

/// Requests in progress, by client. A client without any has no entry.
type RunningRequests = Mutex<HashMap<IpAddr, u32>>;

/// A token bucket: its capacity is refilled within one second.
struct RateAllowance {
    tokens: f64,
    refilled_at: Instant,
}

/// Counts a request against its client's limit while it is held.
pub(super) struct ClientPermit(Option<(Arc<RunningRequests>, IpAddr)>);

/// Why a client's request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientDenied {
    /// Its address is in none of the networks.
    NotAllowed,
    TooManyConcurrent,
    RateLimited,
}

/// Bounds the buckets. Smaller: a client that loses its bucket starts with a full one, the requests of one second.
const MAX_CLIENTS: u64 = 100_000;

impl Default for Clients {
    fn default() -> Self {
        Self::new()
    }
}

impl Clients {
    pub fn new() -> Self {
        Self {
            running: Arc::default(),
            allowances: moka::sync::Cache::builder().max_capacity(MAX_CLIENTS).time_to_idle(DEFAULT_TTL).build(),
        }
    }

    /// Admits a request. A client without an address is in none of the networks.
    pub(super) fn admit(
        &self,
        limits: &ClientLimits,
        address: Option<IpAddr>,
        now: Instant,
    ) -> Result<ClientPermit, ClientDenied> {
        let address = address.map(|address| address.to_canonical());
        let is_in = |address: IpAddr| limits.networks.iter().any(|network| network.contains(&address));
        if !limits.networks.is_empty() && !address.is_some_and(is_in) {
            return Err(ClientDenied::NotAllowed);
        }
        let Some(client) = address.map(client) else { return Ok(ClientPermit(None)) };
        if let Some(max) = limits.max_per_second {
            let full = || Arc::new(Mutex::new(RateAllowance { tokens: f64::from(max), refilled_at: now }));
            let allowance = self.allowances.get_with(client, full);
            if !allowance.lock().take(max, now) {
                return Err(ClientDenied::RateLimited);
            }
        }
        let Some(max) = limits.max_concurrent else { return Ok(ClientPermit(None)) };
        let mut running = self.running.lock();
        let count = running.entry(client).or_default();
        if *count >= max {
            return Err(ClientDenied::TooManyConcurrent);
        }
        *count += 1;
        Ok(ClientPermit(Some((self.running.clone(), client))))
    }
}

impl ClientLimits {
    pub(super) fn new(access: &AccessConfig) -> Self {
        Self {
            networks: access.allowed_cidrs.clone(),
            max_concurrent: access.max_concurrent_requests.map(|max| u32::from(max.get())),
            max_per_second: access.max_requests_per_second.map(|max| u32::from(max.get())),
        }
    }
}

impl RateAllowance {
    /// Takes one request from the bucket.
    fn take(&mut self, max: u32, now: Instant) -> bool {
        let max = f64::from(max);
        let refill = now.saturating_duration_since(self.refilled_at).as_secs_f64() * max;
        self.tokens = (self.tokens + refill).min(max);
        self.refilled_at = now;
        let is_allowed = self.tokens >= 1.0;
        if is_allowed {
            self.tokens -= 1.0;
        }
        is_allowed
    }
}

impl ClientDenied {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotAllowed => "the client's address is not in access.allowed_cidrs",
            Self::TooManyConcurrent => "the client's address exceeds access.max_concurrent_requests",
            Self::RateLimited => "the client's address exceeds access.max_requests_per_second",
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

    /// Clients with the limits of a configuration.
    struct Limited(Clients, ClientLimits);

    impl Limited {
        fn admit(&self, address: Option<IpAddr>, now: Instant) -> Result<ClientPermit, ClientDenied> {
            self.0.admit(&self.1, address, now)
        }
    }

    fn clients(access: &str) -> Limited {
        let config = Config::parse(&format!("[access]\n{access}"), "test").unwrap();
        Limited(Clients::new(), ClientLimits::new(&config.access))
    }

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn outcome(clients: &Limited, address: Option<IpAddr>) -> Result<(), ClientDenied> {
        clients.admit(address, Instant::now()).map(drop)
    }

    #[test]
    fn client_outside_allowed_cidrs_is_denied() {
        let some = clients("allowed_cidrs = [\"10.0.0.0/8\", \"fd00::/8\"]");
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
        assert_eq!(outcome(&some, None), Err(ClientDenied::NotAllowed));
        assert_eq!(outcome(&clients(""), None), Ok(()));
    }

    #[test]
    fn address_over_max_concurrent_requests_is_denied() {
        let few = clients("max_concurrent_requests = 2");
        let now = Instant::now();
        let held: Vec<_> = (0..2).map(|_| few.admit(ip("10.0.0.1"), now).unwrap()).collect();
        assert_eq!(outcome(&few, ip("10.0.0.1")), Err(ClientDenied::TooManyConcurrent));
        assert_eq!(outcome(&few, ip("10.0.0.2")), Ok(()), "another's");
        drop(held);
        assert_eq!(outcome(&few, ip("10.0.0.1")), Ok(()));
        assert!(few.0.running.lock().is_empty(), "a client without requests has no entry");
    }

    #[test]
    fn ipv6_network_counts_as_one_client() {
        let few = clients("max_concurrent_requests = 1");
        let _held = few.admit(ip("2001:db8::1"), Instant::now()).unwrap();
        assert_eq!(outcome(&few, ip("2001:db8::2")), Err(ClientDenied::TooManyConcurrent));
        assert_eq!(outcome(&few, ip("2001:db8:0:1::1")), Ok(()));
    }

    #[test]
    fn address_over_max_requests_per_second_is_denied() {
        let few = clients("max_requests_per_second = 10");
        let start = Instant::now();
        let at = |millis: u64| {
            let now = start + Duration::from_millis(millis);
            (0..20).filter(|_| few.admit(ip("10.0.0.1"), now).is_ok()).count()
        };
        assert_eq!([at(0), at(500), at(10_000)], [10, 5, 10]);
    }
}
