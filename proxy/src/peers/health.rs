//! Which peers are left alone for a while, and why.

use std::net::SocketAddr;
use std::time::Duration;

/// A peer that cannot be reached is left alone for this long.
const DOWN: Duration = Duration::from_secs(5);

/// One that sent wrong bytes for this long.
const SHUT_OUT: Duration = Duration::from_secs(600);

/// More peers than anybody has.
const MAX_PEERS: u64 = 100_000;

/// What is known of the peers' health, from asking them.
pub(super) struct Health {
    down: moka::sync::Cache<SocketAddr, ()>,
    lying: moka::sync::Cache<SocketAddr, ()>,
}

impl Health {
    pub(super) fn new() -> Self {
        let cache = |time| moka::sync::Cache::builder().max_capacity(MAX_PEERS).time_to_live(time).build();
        Self { down: cache(DOWN), lying: cache(SHUT_OUT) }
    }

    /// Whether a peer may be asked.
    pub(super) fn is_well(&self, peer: &SocketAddr) -> bool {
        !self.down.contains_key(peer) && !self.lying.contains_key(peer)
    }

    pub(super) fn is_down(&self, peer: SocketAddr) {
        self.down.insert(peer, ());
    }

    pub(super) fn lies(&self, peer: SocketAddr) {
        self.lying.insert(peer, ());
    }
}
