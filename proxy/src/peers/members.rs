//! Who takes part, and in which zone.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::ring::Ring;
use crate::config::{Zone, Zones};
use crate::oci::Digest;
use crate::role::Role;

/// All members at one time.
#[derive(Debug, PartialEq, Eq)]
pub struct Members {
    pub(super) own: SocketAddr,
    zone: Zone,
    zones: HashMap<SocketAddr, Zone>,
    policy: Zones,
    /// Of all zones, and of this one only.
    global: Ring,
    local: Ring,
}

/// How far the question of a zone's owner may go, where the zones are not isolated anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    AllZones,
    /// To the origin instead of to another zone.
    OwnZone,
}

/// Whom to ask for a digest, and what they are to be.
#[derive(Debug, PartialEq, Eq)]
pub struct OwnerRoute {
    /// What this node is, having been asked as something.
    pub role: Role,
    /// Those to follow, best first. Empty: the origin.
    pub leaders: Vec<SocketAddr>,
    /// What they are asked as.
    pub asked_as: Role,
}

impl Members {
    /// `zone` is this node's own, if it was told; otherwise it is that of its own address.
    pub fn new(found: &[(Zone, SocketAddr)], listen: SocketAddr, zone: Zone, policy: Zones) -> Self {
        // Of several the same one each time: an address is an identity.
        let own = found.iter().map(|(_, member)| *member).filter(|member| is_own(*member, listen)).min();
        let own = own.unwrap_or(listen);
        let mut zones: HashMap<SocketAddr, Zone> = found.iter().map(|(zone, member)| (*member, zone.clone())).collect();
        let zone = zone.or_else(|| zones.get(&own).cloned().flatten());
        // Others know this process by the address they were given: 0.0.0.0 owns nothing.
        if !own.ip().is_unspecified() {
            zones.insert(own, zone.clone());
        }
        let global: Ring = zones.keys().copied().collect();
        let local: Ring = zones.iter().filter(|(_, other)| **other == zone).map(|(member, _)| *member).collect();
        // In one zone the owner is asked as such: it goes to the origin, whoever it thinks the owner is.
        let policy = if local == global { Zones::Ignore } else { policy };
        Self { own, zone, zones, policy, global, local }
    }

    /// Whether the others know this process as a member.
    pub fn has_own(&self) -> bool {
        !self.own.ip().is_unspecified()
    }

    pub(super) fn len(&self) -> usize {
        self.zones.len()
    }

    /// Each member with its zone's name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SocketAddr, &str)> {
        self.zones.keys().map(|member| (*member, self.zone_of(*member)))
    }

    pub fn contains(&self, peer: SocketAddr) -> bool {
        self.zones.contains_key(&peer)
    }

    /// The zone of a member, by its name.
    pub fn zone_of(&self, member: SocketAddr) -> &str {
        self.zones.get(&member).and_then(|zone| zone.as_deref()).unwrap_or(NO_ZONE)
    }

    /// Whether what comes from a member, or goes there, crosses into another zone.
    pub fn is_far(&self, member: SocketAddr) -> bool {
        self.policy != Zones::Ignore && self.zones.get(&member) != Some(&self.zone)
    }

    /// Whether anything may come from a member, whoever names it: isolated zones send each other nothing.
    pub fn is_within_reach(&self, member: SocketAddr) -> bool {
        self.contains(member) && !(self.policy == Zones::Isolate && self.is_far(member))
    }

    pub fn own_zone(&self) -> &str {
        self.zone.as_deref().unwrap_or(NO_ZONE)
    }

    /// Whom to ask for a digest by somebody who was asked as `role`; `alive` says who can be asked.
    pub fn lead(&self, digest: &Digest, role: Role, scope: Scope, alive: impl Fn(&SocketAddr) -> bool) -> OwnerRoute {
        let before_own = |ring: &Ring| -> Vec<SocketAddr> {
            let first = ring.owners_of(digest, MAX_LEADERS, |member| *member == self.own || alive(member));
            first.into_iter().take_while(|member| *member != self.own).collect()
        };
        if role == Role::Client && self.policy != Zones::Ignore {
            let leaders = before_own(&self.local);
            if !leaders.is_empty() {
                // Isolated, whoever owns it in its zone goes to the origin.
                let asked_as = if self.policy == Zones::Isolate { Role::Global } else { Role::Zone };
                return OwnerRoute { role: Role::Client, leaders, asked_as };
            }
        }
        let ring = match (role, self.policy, scope) {
            (Role::Global, _, _) | (_, Zones::Isolate, _) | (_, Zones::Prefer, Scope::OwnZone) => None,
            (Role::Client | Role::Zone, Zones::Ignore, Scope::OwnZone) => Some(&self.local),
            (Role::Client | Role::Zone, Zones::Prefer | Zones::Ignore, Scope::AllZones) => Some(&self.global),
        };
        let leaders = ring.map(before_own).unwrap_or_default();
        let role = match (leaders.is_empty(), self.policy) {
            (true, _) => Role::Global,
            (false, Zones::Ignore) => Role::Client,
            (false, _) => Role::Zone,
        };
        OwnerRoute { role, leaders, asked_as: Role::Global }
    }

    /// Those who would own a digest if this node did not, best first: they may have fetched it while
    /// it was away. With isolated zones only those of this zone.
    pub fn successors(
        &self,
        digest: &Digest,
        count: usize,
        scope: Scope,
        alive: impl Fn(&SocketAddr) -> bool,
    ) -> Vec<SocketAddr> {
        let own_zone = self.policy == Zones::Isolate || scope == Scope::OwnZone;
        let ring = if own_zone { &self.local } else { &self.global };
        ring.owners_of(digest, count, |member| *member != self.own && alive(member))
    }
}

/// Leaders tried before the origin is asked instead.
const MAX_LEADERS: usize = 3;

/// The name of no zone, in metrics.
const NO_ZONE: &str = "-";

/// Whether a member is this process: it listens on that port, and on that address or on all
/// addresses of which that one is local.
fn is_own(member: SocketAddr, listen: SocketAddr) -> bool {
    member == listen || (member.port() == listen.port() && listen.ip().is_unspecified() && is_local(member.ip()))
}

/// Whether the kernel would talk to this address from itself. (Binding to it says less: with
/// `ip_nonlocal_bind` that always works.)
fn is_local(address: IpAddr) -> bool {
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, 9))?;
        socket.local_addr()
    };
    address.is_loopback() || source().is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_knows_itself() {
        let own = |member: &str, listen: &str| is_own(member.parse().unwrap(), listen.parse().unwrap());
        assert!(own("127.0.0.1:5052", "127.0.0.1:5052"));
        assert!(own("127.0.0.1:5052", "0.0.0.0:5052"));
        assert!(!own("127.0.0.1:5053", "0.0.0.0:5052"));
        assert!(!own("192.0.2.1:5052", "0.0.0.0:5052"));
    }

    /// Two zones of four; the view of each node.
    fn views(policy: Zones) -> Vec<Members> {
        let found: Vec<(Zone, SocketAddr)> = (1..=8u8)
            .map(|n| (Some(if n <= 4 { "a".into() } else { "b".into() }), SocketAddr::from(([192, 0, 2, n], 5052))))
            .collect();
        found.iter().map(|(_, own)| Members::new(&found, *own, None, policy)).collect()
    }

    /// The nodes that a question passes from a client of the first, up to the origin.
    fn way(views: &[Members], from: usize, digest: &Digest) -> Vec<usize> {
        let (mut at, mut role, mut way) = (from, Role::Client, vec![from]);
        loop {
            let lead = views[at].lead(digest, role, Scope::AllZones, |_| true);
            let Some(next) = lead.leaders.first() else { return way };
            at = views.iter().position(|view| view.own == *next).unwrap();
            role = lead.asked_as;
            way.push(at);
        }
    }

    #[test]
    fn isolated_zones_are_out_of_reach_whoever_names_them() {
        let far = SocketAddr::from(([192, 0, 2, 8], 5052));
        let near = SocketAddr::from(([192, 0, 2, 2], 5052));
        let stranger = SocketAddr::from(([192, 0, 2, 9], 5052));
        for (policy, reaches_far) in [(Zones::Isolate, false), (Zones::Prefer, true), (Zones::Ignore, true)] {
            let own = &views(policy)[0];
            assert_eq!(
                [near, far, stranger].map(|peer| own.is_within_reach(peer)),
                [true, reaches_far, false],
                "{policy:?}"
            );
        }
    }

    #[test]
    fn a_digest_crosses_a_zone_once() {
        for n in 0..50u8 {
            let digest = Digest::of(&[n]);
            let ways: Vec<_> = (0..8).map(|from| way(&views(Zones::Prefer), from, &digest)).collect();
            let crossings: std::collections::BTreeSet<_> =
                ways.iter().flat_map(|way| way.windows(2)).filter(|hop| hop[0] / 4 != hop[1] / 4).collect();
            assert_eq!(crossings.len(), 1, "{ways:?}");
            let last: std::collections::BTreeSet<_> = ways.iter().map(|way| way.last().unwrap()).collect();
            assert_eq!(last.len(), 1, "one asks the origin: {ways:?}");
        }
    }

    #[test]
    fn isolated_zones_each_ask_the_upstream_and_ignored_ones_do_not_exist() {
        let digest = Digest::of(b"x");
        for from in 0..8 {
            let isolated = way(&views(Zones::Isolate), from, &digest);
            assert!(isolated.iter().all(|node| node / 4 == from / 4), "{isolated:?}");
            assert!(way(&views(Zones::Ignore), from, &digest).len() <= 2);
            assert!(way(&views(Zones::Prefer), from, &digest).len() <= 3);
        }
        let views = views(Zones::Isolate);
        assert!(
            views[0]
                .successors(&digest, 3, Scope::AllZones, |_| true)
                .iter()
                .all(|member| views[0].zone_of(*member) == "a")
        );
    }

    #[test]
    fn a_scope_of_one_zone_ends_there() {
        let digest = Digest::of(b"x");
        for policy in [Zones::Prefer, Zones::Ignore] {
            for view in views(policy) {
                let lead = view.lead(&digest, Role::Zone, Scope::OwnZone, |_| true);
                assert!(lead.leaders.iter().all(|leader| view.zone_of(*leader) == view.own_zone()), "{lead:?}");
                let successors = view.successors(&digest, 8, Scope::OwnZone, |_| true);
                assert!(successors.iter().all(|peer| view.zone_of(*peer) == view.own_zone()), "{successors:?}");
            }
        }
    }

    /// Whatever each node believes of the members and of who is alive, a question ends.
    #[test]
    fn no_question_travels_in_a_circle() {
        let mut random = fastrand::Rng::with_seed(7);
        let all: Vec<SocketAddr> = (1..=10u8).map(|n| SocketAddr::from(([192, 0, 2, n], 5052))).collect();
        for round in 0..2000u32 {
            let policies = [Zones::Prefer, Zones::Isolate, Zones::Ignore];
            let views: Vec<Members> = all
                .iter()
                .map(|own| {
                    let known = all.iter().filter(|_| random.u8(0..3) > 0).collect::<Vec<_>>();
                    let zone = |random: &mut fastrand::Rng| Some(["a", "b", "c"][random.usize(0..3)].into());
                    let found: Vec<_> = known.iter().map(|member| (zone(&mut random), **member)).collect();
                    Members::new(&found, *own, zone(&mut random), policies[random.usize(0..3)])
                })
                .collect();
            let digest = Digest::of(&round.to_le_bytes());
            let scope = [Scope::AllZones, Scope::OwnZone][random.usize(0..2)];
            let (mut at, mut role, mut hops) = (random.usize(0..all.len()), Role::Client, 0);
            loop {
                let lots = std::cell::RefCell::new(random.fork());
                let lead = views[at].lead(&digest, role, scope, |_| lots.borrow_mut().bool());
                let Some(next) = lead.leaders.first() else { break };
                assert!(lead.asked_as > role, "only upwards");
                at = all.iter().position(|member| member == next).unwrap();
                role = lead.asked_as;
                hops += 1;
                assert!(hops <= 2);
            }
        }
    }
}
