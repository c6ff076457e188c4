//! The hosts named by clients or redirects whose idle connections are kept for the next request.
//!
//! Clients can name any number of hosts, and an idle TLS connection costs some 57 KiB and a descriptor. The hosts of
//! configured upstreams are not counted.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// When each host last got a request.
#[derive(Default)]
pub(super) struct KeptHosts(Mutex<HashMap<String, Instant>>);

/// How long an idle connection is kept. Longer: more connections stay open for nothing. Shorter: pulls that follow each
/// other connect anew.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Hosts at a time. More: invented names cost more memory. Fewer: a cluster that pulls from many registries connects anew
/// for each request to the others.
const MAX_HOSTS: usize = 128;

impl KeptHosts {
    /// Whether the connection of a request to this host may be kept.
    pub(super) fn keeps(&self, host: &str, now: Instant) -> bool {
        // Only looked up and changed under the lock.
        let mut hosts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requested) = hosts.get_mut(host) {
            *requested = now;
            return true;
        }
        if hosts.len() >= MAX_HOSTS {
            hosts.retain(|_, requested| now < *requested + IDLE_TIMEOUT);
        }
        if hosts.len() >= MAX_HOSTS {
            return false;
        }
        hosts.insert(host.to_owned(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invented_hosts_are_not_kept_beyond_the_bound() {
        let (hosts, start) = (KeptHosts::default(), Instant::now());
        let kept = (0..9_000).filter(|nth| hosts.keeps(&format!("h{nth}.example"), start)).count();
        assert_eq!(kept, MAX_HOSTS);
        assert!(hosts.keeps("h0.example", start + IDLE_TIMEOUT / 2), "it is one of them");
        assert!(!hosts.keeps("late.example", start + IDLE_TIMEOUT / 2));
        assert!(hosts.keeps("late.example", start + IDLE_TIMEOUT), "the idle ones make room");
        assert_eq!(hosts.0.lock().unwrap().len(), 2);
    }
}
