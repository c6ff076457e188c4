//! Which peers are left alone for a while, and why: decisions on any clock, for real nodes and simulated ones.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::swarm::Time;

/// A peer that cannot be reached is left alone for this long.
const DOWN: Duration = Duration::from_secs(5);

/// One that sent wrong bytes for this long.
const SHUT_OUT: Duration = Duration::from_secs(600);

/// One that relayed wrong bytes so often: it would have found out by itself who sent them.
const MAX_RELAYED: u32 = 3;

/// More peers in trouble than anybody has.
const MAX_PEERS: usize = 100_000;

/// What is known of the peers' health, from asking them. Of most there is nothing to know.
#[derive(Default)]
pub struct Health(HashMap<SocketAddr, Trouble>);

#[derive(Default)]
struct Trouble {
    /// Not asked before then.
    until: Time,
    relayed_wrong: u32,
    /// When all of this is forgotten.
    forgotten: Time,
}

impl Health {
    /// Whether a peer may be asked.
    pub fn is_well(&self, peer: &SocketAddr, now: Time) -> bool {
        self.0.get(peer).is_none_or(|trouble| trouble.until <= now)
    }

    /// It could not be reached.
    pub fn is_down(&mut self, peer: SocketAddr, now: Time) {
        self.trouble(peer, now, DOWN).leave_alone(now + DOWN);
    }

    /// It sent wrong bytes of which it said that they were right.
    pub fn lies(&mut self, peer: SocketAddr, now: Time) {
        self.trouble(peer, now, SHUT_OUT).leave_alone(now + SHUT_OUT);
    }

    /// It sent wrong bytes that it could not know to be wrong. Whether that is no accident any more.
    pub fn relayed_wrong(&mut self, peer: SocketAddr, now: Time) -> bool {
        let trouble = self.trouble(peer, now, SHUT_OUT);
        trouble.relayed_wrong += 1;
        trouble.relayed_wrong >= MAX_RELAYED
    }

    /// What is known of a peer's trouble, for so long at least.
    fn trouble(&mut self, peer: SocketAddr, now: Time, lasts: Duration) -> &mut Trouble {
        if self.0.len() >= MAX_PEERS {
            self.0.retain(|_, trouble| trouble.forgotten > now);
        }
        let trouble = self.0.entry(peer).or_default();
        if trouble.forgotten <= now {
            *trouble = Trouble::default();
        }
        trouble.forgotten = trouble.forgotten.max(now + lasts);
        trouble
    }
}

impl Trouble {
    fn leave_alone(&mut self, until: Time) {
        self.until = self.until.max(until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 5052);

    fn at(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_relays_wrong_bytes_again_and_again_is_no_victim() {
        let mut health = Health::default();
        assert_eq!([0, 100, 200, 300].map(|now| health.relayed_wrong(PEER, at(now))), [false, false, true, true]);
        assert!(!health.relayed_wrong(PEER, at(1000)), "it is forgotten");
        assert!(health.is_well(&PEER, at(1000)), "who decides says so");
    }

    #[test]
    fn who_cannot_be_reached_is_asked_again_soon_but_a_liar_is_not() {
        let mut health = Health::default();
        health.is_down(PEER, at(10));
        assert_eq!([10, 14, 15].map(|now| health.is_well(&PEER, at(now))), [false, false, true]);
        health.lies(PEER, at(20));
        health.is_down(PEER, at(21));
        assert_eq!([26, 619, 620].map(|now| health.is_well(&PEER, at(now))), [false, false, true]);
    }
}
