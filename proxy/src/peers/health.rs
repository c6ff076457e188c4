//! Which peers are left alone for a while, and why: decisions on any clock, for real nodes and simulated ones.
//!
//! Who could not be reached is not asked again before it has answered a ping: no pull waits for it twice.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::swarm::Time;
use crate::times::{FIRST_PAUSE, LONGEST_PAUSE, OBSERVATION_TTL};

/// One that relayed wrong bytes so often: it would have found out by itself who sent them.
const MAX_RELAYED: u32 = 3;

/// More peers in trouble than anybody has.
const MAX_PEERS: usize = 100_000;

/// What is known of the peers' health, from asking them. Of most there is nothing to know.
#[derive(Default)]
pub struct Health(HashMap<SocketAddr, PeerFailure>);

#[derive(Default)]
struct PeerFailure {
    /// It lied: not asked before then.
    shut_out: Time,
    /// It could not be reached, and has not answered since.
    is_down: bool,
    /// A ping was not answered of one that had only taken long.
    is_doubted: bool,
    /// How often it was down since it last gave something.
    strikes: u32,
    /// When to ask whether it is there.
    ping_at: Option<Time>,
    relayed_wrong: u32,
    /// When all of this is forgotten.
    forgotten: Time,
}

impl Health {
    /// Whether a peer may be asked.
    pub fn is_well(&self, peer: &SocketAddr, now: Time) -> bool {
        self.0.get(peer).is_none_or(|trouble| !trouble.is_down && trouble.shut_out <= now)
    }

    /// Whether it lied lately.
    pub fn is_shut_out(&self, peer: &SocketAddr, now: Time) -> bool {
        self.0.get(peer).is_some_and(|trouble| trouble.shut_out > now)
    }

    /// It could not be reached, or did not answer a ping.
    pub fn is_down(&mut self, peer: SocketAddr, now: Time) {
        let trouble = self.trouble(peer, now, LONGEST_PAUSE + OBSERVATION_TTL);
        // Several questions that fail at the same time are one failure.
        if trouble.is_down && trouble.ping_at.is_some() {
            return;
        }
        let pause = FIRST_PAUSE * 2u32.saturating_pow(trouble.strikes);
        (trouble.is_down, trouble.is_doubted) = (true, false);
        trouble.strikes = (trouble.strikes + 1).min(16);
        trouble.ping_at = Some(now + pause.min(LONGEST_PAUSE));
    }

    /// It did not answer a ping. A busy one may miss one.
    pub fn is_missed(&mut self, peer: SocketAddr, now: Time) {
        let trouble = self.trouble(peer, now, OBSERVATION_TTL);
        if trouble.is_down || trouble.is_doubted {
            self.is_down(peer, now);
        } else {
            (trouble.is_doubted, trouble.ping_at) = (true, Some(now));
        }
    }

    /// It took long for what needs no time: worth a ping.
    pub fn is_suspect(&mut self, peer: SocketAddr, now: Time) {
        let trouble = self.trouble(peer, now, OBSERVATION_TTL);
        if !trouble.is_down && !trouble.is_doubted {
            trouble.ping_at = Some(now);
        }
    }

    /// It answered a ping. How well it answers questions is not known by that.
    pub fn is_up(&mut self, peer: &SocketAddr) {
        if let Some(trouble) = self.0.get_mut(peer) {
            (trouble.is_down, trouble.is_doubted, trouble.ping_at) = (false, false, None);
        }
    }

    /// It gave what it was asked for.
    pub fn gives(&mut self, peer: &SocketAddr) {
        self.is_up(peer);
        if let Some(trouble) = self.0.get_mut(peer) {
            trouble.strikes = 0;
        }
    }

    /// When somebody is to be pinged next.
    pub fn next_ping(&self) -> Option<Time> {
        self.0.values().filter_map(|trouble| trouble.ping_at).min()
    }

    /// So many of those to be pinged now. Each has then to be said to be up or missed.
    pub fn to_ping(&mut self, now: Time, most: usize, is_member: impl Fn(&SocketAddr) -> bool) -> Vec<SocketAddr> {
        let mut due = Vec::new();
        for (peer, trouble) in &mut self.0 {
            if trouble.ping_at.is_some() && !is_member(peer) {
                // Should it come back it is a new one.
                (trouble.is_down, trouble.ping_at) = (false, None);
            }
            if due.len() < most && trouble.ping_at.take_if(|at| *at <= now).is_some() {
                due.push(*peer);
            }
        }
        due
    }

    /// It sent wrong bytes of which it said that they were right.
    pub fn lies(&mut self, peer: SocketAddr, now: Time) {
        self.trouble(peer, now, OBSERVATION_TTL).shut_out = now + OBSERVATION_TTL;
    }

    /// It sent wrong bytes that it could not know to be wrong. Whether that is no accident any more.
    pub fn relayed_wrong(&mut self, peer: SocketAddr, now: Time) -> bool {
        let trouble = self.trouble(peer, now, OBSERVATION_TTL);
        trouble.relayed_wrong += 1;
        trouble.relayed_wrong >= MAX_RELAYED
    }

    /// What is known of a peer's trouble, for so long at least.
    fn trouble(&mut self, peer: SocketAddr, now: Time, lasts: Duration) -> &mut PeerFailure {
        if self.0.len() >= MAX_PEERS {
            self.0.retain(|_, trouble| trouble.is_down || trouble.forgotten > now);
        }
        let trouble = self.0.entry(peer).or_default();
        if trouble.forgotten <= now && !trouble.is_down {
            *trouble = PeerFailure::default();
        }
        trouble.forgotten = trouble.forgotten.max(now + lasts);
        trouble
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

    fn pinged(health: &mut Health, now: u64) -> bool {
        health.to_ping(at(now), 1, |_| true) == [PEER]
    }

    #[test]
    fn who_cannot_be_reached_is_not_asked_before_it_answers_a_ping() {
        let mut health = Health::default();
        health.is_down(PEER, at(10));
        health.is_down(PEER, at(10));
        let mut pings = Vec::new();
        for now in 10..200 {
            if pinged(&mut health, now) {
                assert!(!health.is_well(&PEER, at(now)));
                health.is_missed(PEER, at(now));
                pings.push(now - 10);
            }
        }
        assert_eq!(pings, [1, 3, 7, 15, 31, 61, 91, 121, 151, 181], "twice as late each time, up to half a minute");
        health.is_up(&PEER);
        assert!(health.is_well(&PEER, at(200)) && health.next_ping().is_none());
        health.is_down(PEER, at(201));
        assert_eq!(health.next_ping(), Some(at(231)), "it answers pings, and nothing else");
        health.is_up(&PEER);
        health.gives(&PEER);
        health.is_down(PEER, at(300));
        assert_eq!(health.next_ping(), Some(at(301)));
        assert_eq!(health.to_ping(at(302), 1, |_| false), [], "it is no member any more");
        assert!(health.is_well(&PEER, at(302)) && health.next_ping().is_none());
    }

    #[test]
    fn who_is_suspected_is_well_until_it_does_not_answer() {
        let mut health = Health::default();
        health.is_suspect(PEER, at(10));
        assert!(health.is_well(&PEER, at(10)) && pinged(&mut health, 10) && !pinged(&mut health, 11));
        health.is_missed(PEER, at(11));
        assert!(health.is_well(&PEER, at(11)) && pinged(&mut health, 11), "it may be busy");
        health.is_missed(PEER, at(12));
        assert!(!health.is_well(&PEER, at(12)) && pinged(&mut health, 13));
        health.is_up(&PEER);
        health.is_suspect(PEER, at(20));
        assert!(pinged(&mut health, 20));
        health.is_missed(PEER, at(21));
        assert!(health.is_well(&PEER, at(21)), "it answered since");
    }

    #[test]
    fn a_liar_is_left_alone_whatever_it_answers() {
        let mut health = Health::default();
        health.lies(PEER, at(20));
        health.is_down(PEER, at(21));
        health.is_up(&PEER);
        assert_eq!([26, 619, 620].map(|now| health.is_well(&PEER, at(now))), [false, false, true]);
        assert_eq!([26, 619, 620].map(|now| health.is_shut_out(&PEER, at(now))), [true, true, false]);
    }
}
