//! What a peer is asked, and in which manner.

use std::fmt;
use std::net::SocketAddr;

use tokio::time::Instant;

use super::Scope;
use crate::oci::Digest;
use crate::registries::RepositoryRef;
use crate::role::Role;

/// A question to a peer.
pub struct PeerQuery<'a> {
    pub place: &'a RepositoryRef,
    pub digest: &'a Digest,
    pub manner: PeerRequestMode,
    pub redirects: RedirectPolicy,
    pub aim: RangePurpose,
    /// Which peers may be asked, where it is for any of them.
    pub scope: Scope,
    /// The peers for which this one sends the request.
    pub downstream: Downstream,
    pub deadline: Instant,
}

/// The peers that a request has passed before it reached this one, the nearest first. All of them wait for the response, so
/// none of them has what it requests. They may well have an older answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downstream([Option<SocketAddr>; MAX_DOWNSTREAM]);

/// From the node of a client by the owners of a tag, then of its digest, each in its zone and then in all: more peers than
/// any request passes. Fewer: the last owner requests from peers what they lack.
const MAX_DOWNSTREAM: usize = 4;

impl Downstream {
    pub const NONE: Self = Self([None; MAX_DOWNSTREAM]);

    /// Peers that are separated by `+`.
    pub(super) fn parse(text: &str) -> Self {
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

    /// The same as a request names them that a peer sends for them.
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
    /// One that the peer is to answer itself.
    pub fn about(place: &'a RepositoryRef, digest: &'a Digest, manner: PeerRequestMode, deadline: Instant) -> Self {
        Self {
            place,
            digest,
            manner,
            redirects: RedirectPolicy::Refused,
            aim: RangePurpose::Whole,
            scope: Scope::AllZones,
            downstream: Downstream::NONE,
            deadline,
        }
    }
}

/// How a peer is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRequestMode {
    /// For what it has, or gets now.
    IfKept,
    /// To get it, being that.
    As(Role),
}

/// Whether a busy peer may name another one instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedirectPolicy {
    Followed,
    /// Those that it named could not help, or it was named by another one.
    Refused,
}

/// What a range is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangePurpose {
    /// Somebody wants just that.
    Range,
    /// All the others follow.
    Whole,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 5052))
    }

    #[test]
    fn downstream_peers_are_carried_on_the_nearest_first() {
        let received = |sent: Downstream| Downstream::parse(&sent.to_string());
        let first = received(Downstream::NONE.behind(peer(1)));
        let second = received(first.behind(peer(2)));
        assert_eq!((first.nearest(), second.nearest()), (Some(peer(1)), Some(peer(2))));
        assert!(second.contains(&peer(1)) && second.contains(&peer(2)) && !second.contains(&peer(3)));
        let long = (3..9).fold(second, |so_far, nth| received(so_far.behind(peer(nth))));
        assert_eq!((1..9).filter(|nth| long.contains(&peer(*nth))).collect::<Vec<_>>(), [5, 6, 7, 8]);
    }

    #[test]
    fn text_that_names_no_peer_is_read_as_none() {
        assert_eq!(Downstream::parse("somebody+192.0.2.1:5052"), Downstream::NONE);
        assert_eq!(Downstream::parse(""), Downstream::NONE);
    }
}
