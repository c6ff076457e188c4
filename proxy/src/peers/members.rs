//! The members of the cluster, and their zones.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::ring::Ring;
use crate::config::{Zone, Zones};
use crate::oci::Digest;
use crate::role::Role;

/// The members as of one discovery.
#[derive(Debug, PartialEq, Eq)]
pub struct Members {
    pub(super) own: SocketAddr,
    zone: Zone,
    zones: HashMap<SocketAddr, Zone>,
    policy: Zones,
    /// The rings of all zones, and of this node's zone only.
    global: Ring,
    local: Ring,
}

/// How far a zone owner's request may go, where zones are not isolated anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    AllZones,
    /// To the upstream instead of to another zone.
    OwnZone,
}

/// A member as the configuration or DNS lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FoundMember {
    pub zone: Zone,
    pub address: SocketAddr,
    /// Its identity in the ring. None: its address.
    pub name: Option<String>,
}

/// The owners that a request for a digest goes to, and in which role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerRoute {
    /// The role of this node itself.
    pub role: Role,
    /// The owners, best first. Empty: this node requests from the upstream.
    pub owners: Vec<SocketAddr>,
    /// The role in which they are requested.
    pub request_role: Role,
}

impl OwnerRoute {
    /// The route of a node that requests from the upstream.
    pub fn none() -> Self {
        Self { role: Role::Global, owners: Vec::new(), request_role: Role::Global }
    }
}

impl From<(Zone, SocketAddr)> for FoundMember {
    fn from((zone, address): (Zone, SocketAddr)) -> Self {
        Self { zone, address, name: None }
    }
}

impl Members {
    /// `zone` is this node's configured zone. None: that of its address in `found`.
    pub fn new(found: &[FoundMember], listen: SocketAddr, zone: Zone, policy: Zones) -> Self {
        // Of several own addresses always the same one, since it is this node's identity in the ring.
        let own = found.iter().map(|member| member.address).filter(|member| is_own(*member, listen)).min();
        let own = own.unwrap_or(listen);
        let mut zones: HashMap<SocketAddr, Zone> =
            found.iter().map(|member| (member.address, member.zone.clone())).collect();
        let zone = zone.or_else(|| zones.get(&own).cloned().flatten());
        // Peers cannot know this node as 0.0.0.0, so it owns nothing then.
        if !own.ip().is_unspecified() {
            zones.insert(own, zone.clone());
        }
        let names: HashMap<SocketAddr, &str> =
            found.iter().filter_map(|member| Some((member.address, member.name.as_deref()?))).collect();
        let named = |member: &SocketAddr| (*member, names.get(member).copied());
        let global = Ring::of_named(zones.keys().map(named));
        let local = Ring::of_named(zones.iter().filter(|(_, other)| **other == zone).map(|(member, _)| named(member)));
        // With a single zone, requests go to the owner of all zones at once. It requests from the upstream, even
        // if its own list names another owner.
        let policy = if local == global { Zones::Ignore } else { policy };
        Self { own, zone, zones, policy, global, local }
    }

    /// Whether this node's own address is known, so that it owns digests.
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

    /// The name of a member's zone.
    pub fn zone_of(&self, member: SocketAddr) -> &str {
        self.zones.get(&member).and_then(|zone| zone.as_deref()).unwrap_or(NO_ZONE)
    }

    /// Whether traffic to or from a member crosses into another zone.
    pub fn is_cross_zone(&self, member: SocketAddr) -> bool {
        self.policy != Zones::Ignore && self.zones.get(&member) != Some(&self.zone)
    }

    /// Whether a member may be a source, also when another peer names it: isolated zones exchange nothing.
    pub fn is_within_reach(&self, member: SocketAddr) -> bool {
        self.contains(member) && !(self.policy == Zones::Isolate && self.is_cross_zone(member))
    }

    pub fn own_zone(&self) -> &str {
        self.zone.as_deref().unwrap_or(NO_ZONE)
    }

    /// The route to the owners of a digest, for a node that was requested with `role`. `alive` tells which peers are
    /// usable.
    pub fn owner_route(
        &self,
        digest: &Digest,
        role: Role,
        scope: Scope,
        alive: impl Fn(&SocketAddr) -> bool,
    ) -> OwnerRoute {
        let before_own = |ring: &Ring| -> Vec<SocketAddr> {
            let first = ring.owners_of(digest, MAX_OWNERS, |member| *member == self.own || alive(member));
            first.into_iter().take_while(|member| *member != self.own).collect()
        };
        if role == Role::Client && self.policy != Zones::Ignore {
            let owners = before_own(&self.local);
            if !owners.is_empty() {
                // The owner in an isolated zone requests from the upstream.
                let request_role = if self.policy == Zones::Isolate { Role::Global } else { Role::Zone };
                return OwnerRoute { role: Role::Client, owners, request_role };
            }
        }
        let ring = match (role, self.policy, scope) {
            (Role::Global, _, _) | (_, Zones::Isolate, _) | (_, Zones::Prefer, Scope::OwnZone) => None,
            (Role::Client | Role::Zone, Zones::Ignore, Scope::OwnZone) => Some(&self.local),
            (Role::Client | Role::Zone, Zones::Prefer | Zones::Ignore, Scope::AllZones) => Some(&self.global),
        };
        let owners = ring.map(before_own).unwrap_or_default();
        let role = match (owners.is_empty(), self.policy) {
            (true, _) => Role::Global,
            (false, Zones::Ignore) => Role::Client,
            (false, _) => Role::Zone,
        };
        OwnerRoute { role, owners, request_role: Role::Global }
    }

    /// The members that would own a digest without this node, best first: they may have downloaded it while this node
    /// was away. With isolated zones, only members of this zone.
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

/// Owners that are tried before the upstream. Larger: an outage of several peers delays requests more. Smaller: more
/// nodes download from the upstream.
const MAX_OWNERS: usize = 3;

/// Stands for "no zone" in metrics and reports.
const NO_ZONE: &str = "-";

/// Whether a member's address is this process's own: the same port, and the same address or, where it listens on all, a
/// local one.
fn is_own(member: SocketAddr, listen: SocketAddr) -> bool {
    member == listen || (member.port() == listen.port() && listen.ip().is_unspecified() && is_local(member.ip()))
}

/// Whether an address is local: the kernel would connect to it from itself. A test bind proves less, since it always
/// succeeds with `ip_nonlocal_bind`.
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
    fn own_address_is_recognized() {
        let own = |member: &str, listen: &str| is_own(member.parse().unwrap(), listen.parse().unwrap());
        assert!(own("127.0.0.1:5052", "127.0.0.1:5052"));
        assert!(own("127.0.0.1:5052", "0.0.0.0:5052"));
        assert!(!own("127.0.0.1:5053", "0.0.0.0:5052"));
        assert!(!own("192.0.2.1:5052", "0.0.0.0:5052"));
    }

    /// The members as each node of two zones of four sees them.
    fn views(policy: Zones) -> Vec<Members> {
        let found: Vec<FoundMember> = (1..=8u8)
            .map(|n| (Some(if n <= 4 { "a".into() } else { "b".into() }), SocketAddr::from(([192, 0, 2, n], 5052))))
            .map(FoundMember::from)
            .collect();
        found.iter().map(|own| Members::new(&found, own.address, None, policy)).collect()
    }

    /// The nodes that a client's request passes from `from` to the upstream.
    fn path(views: &[Members], from: usize, digest: &Digest) -> Vec<usize> {
        let (mut at, mut role, mut path) = (from, Role::Client, vec![from]);
        loop {
            let route = views[at].owner_route(digest, role, Scope::AllZones, |_| true);
            let Some(next) = route.owners.first() else { return path };
            at = views.iter().position(|view| view.own == *next).unwrap();
            role = route.request_role;
            path.push(at);
        }
    }

    #[test]
    fn isolated_zone_is_not_within_reach() {
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
    fn digest_crosses_zones_once() {
        for n in 0..50u8 {
            let digest = Digest::of(&[n]);
            let paths: Vec<_> = (0..8).map(|from| path(&views(Zones::Prefer), from, &digest)).collect();
            let crossings: std::collections::BTreeSet<_> =
                paths.iter().flat_map(|path| path.windows(2)).filter(|hop| hop[0] / 4 != hop[1] / 4).collect();
            assert_eq!(crossings.len(), 1, "{paths:?}");
            let last: std::collections::BTreeSet<_> = paths.iter().map(|path| path.last().unwrap()).collect();
            assert_eq!(last.len(), 1, "one node requests from the upstream: {paths:?}");
        }
    }

    #[test]
    fn isolated_zones_have_owners_of_their_own() {
        let digest = Digest::of(b"x");
        for from in 0..8 {
            let isolated = path(&views(Zones::Isolate), from, &digest);
            assert!(isolated.iter().all(|node| node / 4 == from / 4), "{isolated:?}");
            assert!(path(&views(Zones::Ignore), from, &digest).len() <= 2);
            assert!(path(&views(Zones::Prefer), from, &digest).len() <= 3);
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
    fn route_and_successors_stay_in_the_scope() {
        let digest = Digest::of(b"x");
        for policy in [Zones::Prefer, Zones::Ignore] {
            for view in views(policy) {
                let route = view.owner_route(&digest, Role::Zone, Scope::OwnZone, |_| true);
                assert!(route.owners.iter().all(|leader| view.zone_of(*leader) == view.own_zone()), "{route:?}");
                let successors = view.successors(&digest, 8, Scope::OwnZone, |_| true);
                assert!(successors.iter().all(|peer| view.zone_of(*peer) == view.own_zone()), "{successors:?}");
            }
        }
    }

    /// A request ends, even if the nodes disagree on the members and on which are alive.
    #[test]
    fn request_never_loops() {
        let mut random = fastrand::Rng::with_seed(7);
        let all: Vec<SocketAddr> = (1..=10u8).map(|n| SocketAddr::from(([192, 0, 2, n], 5052))).collect();
        for round in 0..2000u32 {
            let policies = [Zones::Prefer, Zones::Isolate, Zones::Ignore];
            let views: Vec<Members> = all
                .iter()
                .map(|own| {
                    let known = all.iter().filter(|_| random.u8(0..3) > 0).collect::<Vec<_>>();
                    let zone = |random: &mut fastrand::Rng| Some(["a", "b", "c"][random.usize(0..3)].into());
                    let found: Vec<FoundMember> =
                        known.iter().map(|member| (zone(&mut random), **member).into()).collect();
                    Members::new(&found, *own, zone(&mut random), policies[random.usize(0..3)])
                })
                .collect();
            let digest = Digest::of(&round.to_le_bytes());
            let scope = [Scope::AllZones, Scope::OwnZone][random.usize(0..2)];
            let (mut at, mut role, mut hops) = (random.usize(0..all.len()), Role::Client, 0);
            loop {
                let lots = std::cell::RefCell::new(random.fork());
                let route = views[at].owner_route(&digest, role, scope, |_| lots.borrow_mut().bool());
                let Some(next) = route.owners.first() else { break };
                assert!(route.request_role > role, "only upwards");
                at = all.iter().position(|member| member == next).unwrap();
                role = route.request_role;
                hops += 1;
                assert!(hops <= 2);
            }
        }
    }
}
