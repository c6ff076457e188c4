//! Hosts of client requests and of their redirects, whose idle connections are kept for the next request.
//!
//! Clients can name any number of hosts, and an idle TLS connection costs some 57 KiB and a descriptor. Configured
//! upstreams and their redirect targets are not counted.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::times::IDLE_TIMEOUT;

/// When each host last got a request.
#[derive(Default)]
pub(super) struct RecentHosts(Mutex<HashMap<String, Instant>>);

/// Hosts at a time. More: invented names cost more memory. Fewer: if a cluster pulls from many registries, each request
/// to the others opens a connection.
const MAX_HOSTS: usize = 128;

impl RecentHosts {
    /// Whether the connection of this request may be kept. Extends the host's time if so.
    pub(super) fn touch(&self, host: &str, now: Instant) -> bool {
        self.0.lock().get_mut(host).map(|requested| *requested = now).is_some()
    }

    /// The host has responded: the connections of its next requests are kept, if there is room.
    pub(super) fn record_response(&self, host: &str, now: Instant) {
        let mut hosts = self.0.lock();
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(host) {
            hosts.retain(|_, requested| now < *requested + IDLE_TIMEOUT);
        }
        if hosts.len() < MAX_HOSTS {
            hosts.entry(host.to_owned()).or_insert(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invented_hosts_stay_within_the_bound() {
        let (hosts, start) = (RecentHosts::default(), Instant::now());
        assert!(!hosts.touch("h0.example", start), "it has never responded");
        (0..9_000).for_each(|nth| hosts.record_response(&format!("h{nth}.example"), start));
        let kept = (0..9_000).filter(|nth| hosts.touch(&format!("h{nth}.example"), start)).count();
        assert_eq!(kept, MAX_HOSTS);
        assert!(hosts.touch("h0.example", start + IDLE_TIMEOUT / 2));
        let late = |now| {
            hosts.record_response("late.example", now);
            hosts.touch("late.example", now)
        };
        assert!(!late(start + IDLE_TIMEOUT / 2));
        assert!(late(start + IDLE_TIMEOUT), "idle hosts make room");
        assert_eq!(hosts.0.lock().len(), 2);
    }
}
