//! A query to a peer, and how it is to be served.

use std::fmt;
use std::net::SocketAddr;

use tokio::time::Instant;

use super::Scope;
use crate::bandwidth::Priority;
use crate::oci::Digest;
use crate::registries::RepositoryRef;
use crate::role::Role;

/// A query to a peer, for one digest.
pub struct PeerQuery<'a> {
    pub repo_ref: &'a RepositoryRef,
    pub digest: &'a Digest,
    pub mode: PeerRequestMode,
    pub redirects: RedirectPolicy,
    pub range_purpose: RangePurpose,
    pub priority: Priority,
    /// Which peers may be queried, where any holder will do.
    pub scope: Scope,
    /// The peers for which this one sends the request.
    pub downstream: Downstream,
    pub deadline: Instant,
}

/// The peers that a request has passed before it reached this one, the nearest first. All of them wait for the
/// response, so none of them has what it requests. They may well have an older one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downstream([Option<SocketAddr>; MAX_DOWNSTREAM]);

/// From the node of a client by the owners of a tag, then of its digest, each in its zone and then in all: more peers
/// than any request passes. Fewer: the last owner requests from peers what they lack.
const MAX_DOWNSTREAM: usize = 4;

impl Downstream {
    pub const NONE: Self = Self([None; MAX_DOWNSTREAM]);

    /// Peers that are separated by `+`.
    pub(crate) fn parse(text: &str) -> Self {
        let mut peers = text.split('+').map_while(|peer| peer.parse().ok()).fuse();
        Self(std::array::from_fn(|_| peers.next()))
    }

    /// The peer that sent the request.
    pub(super) fn nearest(&self) -> Option<SocketAddr> {
        self.0[0]
    }

    pub fn contains(&self, peer: &SocketAddr) -> bool {
        self.0.contains(&Some(*peer))
    }

    /// The list in the request that the peer `own` sends for these.
    #[must_use]
    pub(super) fn behind(self, own: SocketAddr) -> Self {
        let mut peers = std::iter::once(own).chain(self.0.into_iter().flatten());
        Self(std::array::from_fn(|_| peers.next()))
    }
}

impl fmt::Display for Downstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, peer) in self.0.iter().flatten().enumerate() {
            write!(f, "{}{peer}", if nth == 0 { "" } else { "+" })?;
        }
        Ok(())
    }
}

impl<'a> PeerQuery<'a> {
    /// A query that the peer serves itself, without a redirect.
    pub fn about(repo_ref: &'a RepositoryRef, digest: &'a Digest, mode: PeerRequestMode, deadline: Instant) -> Self {
        Self {
            repo_ref,
            digest,
            mode,
            redirects: RedirectPolicy::Refused,
            range_purpose: RangePurpose::Whole,
            priority: Priority::Peer,
            scope: Scope::AllZones,
            downstream: Downstream::NONE,
            deadline,
        }
    }
}

/// How far a peer may go to serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRequestMode {
    /// Only what it has, or is downloading.
    OnlyIfCached,
    /// Download it if necessary, in this role.
    As(Role),
}

/// Whether a loaded peer may redirect to another holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedirectPolicy {
    Followed,
    /// The requester was redirected to this peer, or its redirects led to no bytes.
    Refused,
}

/// What a range is requested for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangePurpose {
    /// A client requested just this range.
    Range,
    /// The whole blob is being downloaded, range by range.
    Whole,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 5052))
    }

    #[test]
    fn downstream_peers_are_nearest_first() {
        let received = |sent: Downstream| Downstream::parse(&sent.to_string());
        let first = received(Downstream::NONE.behind(peer(1)));
        let second = received(first.behind(peer(2)));
        assert_eq!((first.nearest(), second.nearest()), (Some(peer(1)), Some(peer(2))));
        assert!(second.contains(&peer(1)) && second.contains(&peer(2)) && !second.contains(&peer(3)));
        let long = (3..9).fold(second, |so_far, nth| received(so_far.behind(peer(nth))));
        assert_eq!((1..9).filter(|nth| long.contains(&peer(*nth))).collect::<Vec<_>>(), [5, 6, 7, 8]);
    }

    #[test]
    fn text_without_a_peer_is_no_downstream() {
        assert_eq!(Downstream::parse("x+192.0.2.1:5052"), Downstream::NONE);
        assert_eq!(Downstream::parse(""), Downstream::NONE);
    }
}
