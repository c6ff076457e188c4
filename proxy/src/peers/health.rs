//! Health of the peers: pure decisions on any clock, for real and for simulated nodes.
//!
//! A peer that could not be reached gets no request until it responds to a ping: no pull waits for it twice.
//!
//! | state | event | next state |
//! |---|---|---|
//! | healthy | slow where no work is needed | suspect: pinged now |
//! | suspect | ping missed | doubted: pinged again now, because a busy peer may miss one |
//! | suspect, doubted | ping answered | healthy |
//! | doubted | ping missed | down |
//! | any | connection failed, silent when probed, or not authenticated | down: pinged after a pause of 1 to 30 s |
//! | down | ping missed | down: the next pause is twice as long |
//! | down | ping answered | healthy: only a successful response resets the pause |
//! | down | left the members | healthy: if it comes back it is a new peer |
//!
//! Ejection is independent of this: a peer that sent corrupt bytes is not used for ten minutes, whatever its pings say.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use super::swarm::Time;
use crate::times::{FIRST_RETRY_DELAY, MAX_RETRY_DELAY, OBSERVATION_TTL};

/// A peer that relayed corrupt bytes this often is ejected: an honest one would have ejected their sender itself.
/// Larger: a malicious relay lasts longer. Smaller: victims of one malicious holder are ejected.
const MAX_RELAYED_CORRUPTIONS: u32 = 3;

/// At this many records the expired ones are purged. Larger: more memory. Smaller: clusters with many failures
/// purge often.
const MAX_RECORDS: usize = 100_000;

/// Failures of peers, as this node's requests observed them. A peer without an entry is healthy.
#[derive(Default)]
pub struct Health(HashMap<SocketAddr, PeerFailure>);

#[derive(Default)]
struct PeerFailure {
    /// It sent corrupt bytes: not used before this time.
    ejected_until: Time,
    /// It could not be reached, and has not responded to a ping since.
    is_down: bool,
    /// It was only slow, and then missed one ping.
    has_missed_ping: bool,
    /// How often it was down since its last successful response.
    consecutive_failures: u32,
    /// When the next ping is due. None while a ping is on its way.
    ping_at: Option<Time>,
    relayed_corruptions: u32,
    /// When this record expires.
    expires_at: Time,
}

impl Health {
    /// Whether a peer is neither down nor ejected.
    pub fn is_available(&self, peer: &SocketAddr, now: Time) -> bool {
        self.0.get(peer).is_none_or(|failure| !failure.is_down && failure.ejected_until <= now)
    }

    /// Whether a peer is ejected for corrupt bytes.
    pub fn is_ejected(&self, peer: &SocketAddr, now: Time) -> bool {
        self.0.get(peer).is_some_and(|failure| failure.ejected_until > now)
    }

    /// The state for operators.
    pub fn state(&self, peer: &SocketAddr, now: Time) -> &'static str {
        match (self.is_ejected(peer, now), self.is_available(peer, now)) {
            (true, _) => "ejected",
            (false, false) => "down",
            (false, true) => "healthy",
        }
    }

    /// Marks a peer as down: it could not be reached, or missed its pings.
    pub fn mark_down(&mut self, peer: SocketAddr, now: Time) {
        let failure = self.failure(peer, now, MAX_RETRY_DELAY + OBSERVATION_TTL);
        // Concurrent requests that fail together count as one failure.
        if failure.is_down && failure.ping_at.is_some() {
            return;
        }
        let pause = FIRST_RETRY_DELAY * 2u32.saturating_pow(failure.consecutive_failures);
        (failure.is_down, failure.has_missed_ping) = (true, false);
        failure.consecutive_failures = (failure.consecutive_failures + 1).min(16);
        failure.ping_at = Some(now + pause.min(MAX_RETRY_DELAY));
    }

    /// Records a missed ping. A peer that was not down may miss one, since it may be busy.
    pub fn record_missed_ping(&mut self, peer: SocketAddr, now: Time) {
        let failure = self.failure(peer, now, OBSERVATION_TTL);
        if failure.is_down || failure.has_missed_ping {
            self.mark_down(peer, now);
        } else {
            (failure.has_missed_ping, failure.ping_at) = (true, Some(now));
        }
    }

    /// Schedules a ping for a peer that was slow although no work was needed.
    pub fn mark_suspect(&mut self, peer: SocketAddr, now: Time) {
        let failure = self.failure(peer, now, OBSERVATION_TTL);
        if !failure.is_down && !failure.has_missed_ping {
            failure.ping_at = Some(now);
        }
    }

    /// Records a ping's response. It proves nothing about other requests, so the pause after the next failure stays.
    pub fn mark_up(&mut self, peer: &SocketAddr) {
        if let Some(failure) = self.0.get_mut(peer) {
            (failure.is_down, failure.has_missed_ping, failure.ping_at) = (false, false, None);
        }
    }

    /// Records a successful response.
    pub fn record_success(&mut self, peer: &SocketAddr) {
        self.mark_up(peer);
        if let Some(failure) = self.0.get_mut(peer) {
            failure.consecutive_failures = 0;
        }
    }

    /// When the next ping is due.
    pub fn next_ping(&self) -> Option<Time> {
        self.0.values().filter_map(|failure| failure.ping_at).min()
    }

    /// Takes up to `limit` peers whose ping is due. The result of each must be recorded: [`Self::mark_up`] or
    /// [`Self::record_missed_ping`].
    pub fn take_due_pings(
        &mut self,
        now: Time,
        limit: usize,
        is_member: impl Fn(&SocketAddr) -> bool,
    ) -> Vec<SocketAddr> {
        let mut due = Vec::new();
        for (peer, failure) in &mut self.0 {
            if failure.ping_at.is_some() && !is_member(peer) {
                // If it comes back it is a new peer.
                (failure.is_down, failure.ping_at) = (false, None);
            }
            if due.len() < limit && failure.ping_at.take_if(|at| *at <= now).is_some() {
                due.push(*peer);
            }
        }
        due
    }

    /// Ejects a peer that sent corrupt bytes which it claimed to have verified.
    pub fn eject(&mut self, peer: SocketAddr, now: Time) {
        self.failure(peer, now, OBSERVATION_TTL).ejected_until = now + OBSERVATION_TTL;
    }

    /// Counts corrupt bytes that a peer relayed unverified. True: it has done so too often.
    pub fn record_relayed_corruption(&mut self, peer: SocketAddr, now: Time) -> bool {
        let failure = self.failure(peer, now, OBSERVATION_TTL);
        failure.relayed_corruptions += 1;
        failure.relayed_corruptions >= MAX_RELAYED_CORRUPTIONS
    }

    /// A peer's failure record, which lasts at least this long from now.
    fn failure(&mut self, peer: SocketAddr, now: Time, lasts: Duration) -> &mut PeerFailure {
        if self.0.len() >= MAX_RECORDS {
            self.0.retain(|_, failure| failure.is_down || failure.expires_at > now);
        }
        let failure = self.0.entry(peer).or_default();
        if failure.expires_at <= now && !failure.is_down {
            *failure = PeerFailure::default();
        }
        failure.expires_at = failure.expires_at.max(now + lasts);
        failure
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
    fn relay_of_corrupt_bytes_three_times_is_reported() {
        let mut health = Health::default();
        assert_eq!(
            [0, 100, 200, 300].map(|now| health.record_relayed_corruption(PEER, at(now))),
            [false, false, true, true]
        );
        assert!(!health.record_relayed_corruption(PEER, at(1000)), "the record has expired");
        assert!(health.is_available(&PEER, at(1000)), "the caller ejects it");
    }

    fn pinged(health: &mut Health, now: u64) -> bool {
        health.take_due_pings(at(now), 1, |_| true) == [PEER]
    }

    #[test]
    fn down_peer_is_unavailable_until_it_answers_a_ping() {
        let mut health = Health::default();
        health.mark_down(PEER, at(10));
        health.mark_down(PEER, at(10));
        let mut pings = Vec::new();
        for now in 10..200 {
            if pinged(&mut health, now) {
                assert!(!health.is_available(&PEER, at(now)));
                health.record_missed_ping(PEER, at(now));
                pings.push(now - 10);
            }
        }
        assert_eq!(pings, [1, 3, 7, 15, 31, 61, 91, 121, 151, 181], "twice as late each time, up to half a minute");
        health.mark_up(&PEER);
        assert!(health.is_available(&PEER, at(200)) && health.next_ping().is_none());
        health.mark_down(PEER, at(201));
        assert_eq!(health.next_ping(), Some(at(231)), "it responds to pings, but to nothing else");
        health.mark_up(&PEER);
        health.record_success(&PEER);
        health.mark_down(PEER, at(300));
        assert_eq!(health.next_ping(), Some(at(301)));
        assert_eq!(health.take_due_pings(at(302), 1, |_| false), [], "it is not a member any more");
        assert!(health.is_available(&PEER, at(302)) && health.next_ping().is_none());
    }

    #[test]
    fn suspect_peer_is_available_until_it_misses_two_pings() {
        let mut health = Health::default();
        health.mark_suspect(PEER, at(10));
        assert!(health.is_available(&PEER, at(10)) && pinged(&mut health, 10) && !pinged(&mut health, 11));
        health.record_missed_ping(PEER, at(11));
        assert!(health.is_available(&PEER, at(11)) && pinged(&mut health, 11), "it may be busy");
        health.record_missed_ping(PEER, at(12));
        assert!(!health.is_available(&PEER, at(12)) && pinged(&mut health, 13));
        health.mark_up(&PEER);
        health.mark_suspect(PEER, at(20));
        assert!(pinged(&mut health, 20));
        health.record_missed_ping(PEER, at(21));
        assert!(health.is_available(&PEER, at(21)), "it has responded since");
    }

    #[test]
    fn ejected_peer_stays_ejected_whatever_its_pings_say() {
        let mut health = Health::default();
        health.eject(PEER, at(20));
        health.mark_down(PEER, at(21));
        health.mark_up(&PEER);
        assert_eq!([26, 619, 620].map(|now| health.is_available(&PEER, at(now))), [false, false, true]);
        assert_eq!([26, 619, 620].map(|now| health.is_ejected(&PEER, at(now))), [true, true, false]);
    }
}
