//! Which peers are left alone for a while, and why.

use std::net::SocketAddr;
use std::time::Duration;

/// A peer that cannot be reached is left alone for this long.
const DOWN: Duration = Duration::from_secs(5);

/// One that sent wrong bytes for this long.
const SHUT_OUT: Duration = Duration::from_secs(600);

/// One that relayed wrong bytes so often: it would have found out by itself who sent them.
const MAX_RELAYED: u32 = 3;

/// More peers than anybody has.
const MAX_PEERS: u64 = 100_000;

/// What is known of the peers' health, from asking them.
pub(super) struct Health {
    down: moka::sync::Cache<SocketAddr, ()>,
    lying: moka::sync::Cache<SocketAddr, ()>,
    relayed_wrong: moka::sync::Cache<SocketAddr, u32>,
}

impl Health {
    pub(super) fn new() -> Self {
        let cache = |time| moka::sync::Cache::builder().max_capacity(MAX_PEERS).time_to_live(time).build();
        let relayed_wrong = moka::sync::Cache::builder().max_capacity(MAX_PEERS).time_to_live(SHUT_OUT).build();
        Self { down: cache(DOWN), lying: cache(SHUT_OUT), relayed_wrong }
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

    /// It sent wrong bytes that it could not know to be wrong. Whether that is no accident any more.
    pub(super) fn relayed_wrong(&self, peer: SocketAddr) -> bool {
        let counted =
            self.relayed_wrong.entry(peer).and_upsert_with(|known| known.map_or(1, |known| known.into_value() + 1));
        counted.into_value() >= MAX_RELAYED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_relays_wrong_bytes_again_and_again_is_no_victim() {
        let (health, peer) = (Health::new(), SocketAddr::from(([192, 0, 2, 1], 5052)));
        assert_eq!([(); 4].map(|()| health.relayed_wrong(peer)), [false, false, true, true]);
        assert!(!health.relayed_wrong(SocketAddr::from(([192, 0, 2, 2], 5052))));
    }
}
