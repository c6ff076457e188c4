//! How many connections there are, and whose: nobody takes them all.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The connections of one listener.
pub(super) struct Crowd {
    most: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    all: usize,
    /// Whoever has none is not in it.
    of_clients: HashMap<IpAddr, usize>,
}

/// A connection's place.
pub(super) struct Entry {
    crowd: Arc<Crowd>,
    client: Option<IpAddr>,
}

/// One client has at most one in so many of them: many may come from one address, such as a load balancer's.
const OF_ONE: usize = 2;

impl Crowd {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, open: Mutex::default() })
    }

    /// Counts a connection. None: there is no room for it.
    pub(super) fn enter(self: &Arc<Self>, from: Option<IpAddr>) -> Option<Entry> {
        let client = from.map(|from| client(from.to_canonical()));
        let mut open = self.lock();
        let its = client.and_then(|client| open.of_clients.get(&client)).copied().unwrap_or(0);
        if open.all >= self.most || its >= self.most / OF_ONE {
            return None;
        }
        open.all += 1;
        if let Some(client) = client {
            open.of_clients.insert(client, its + 1);
        }
        Some(Entry { crowd: self.clone(), client })
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // Numbers are only looked up and changed under it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.crowd.lock();
        open.all -= 1;
        if let Some(client) = self.client
            && let Some(its) = open.of_clients.get_mut(&client)
        {
            *its -= 1;
            if *its == 0 {
                open.of_clients.remove(&client);
            }
        }
    }
}

/// As whom an address counts: one host has a whole network of IPv6 addresses (RFC 4291, section 2.5.4).
pub fn client(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_connections() {
        let crowd = Crowd::new(8);
        let enter = |from: &str| crowd.enter(Some(from.parse().unwrap()));
        let mut held: Vec<_> = (0..4).map(|_| enter("10.0.0.1").unwrap()).collect();
        assert!(enter("10.0.0.1").is_none() && enter("::ffff:10.0.0.1").is_none());
        held.extend((0..4).map(|nth| enter(&format!("2001:db8::{nth}")).unwrap()));
        assert!(enter("10.0.0.2").is_none() && crowd.enter(None).is_none(), "there are no more");
        held.pop();
        assert!(enter("2001:db8::9").is_some());
        drop(held);
        assert!(crowd.lock().of_clients.is_empty() && crowd.lock().all == 0, "whoever has none costs nothing");
    }
}
