//! What a peer is asked, and in which manner.

use tokio::time::Instant;

use super::Scope;
use crate::oci::Digest;
use crate::registries::Place;
use crate::role::Role;

/// A question to a peer.
pub struct Question<'a> {
    pub place: &'a Place,
    pub digest: &'a Digest,
    pub manner: Manner,
    pub redirects: Redirects,
    pub aim: Aim,
    /// Which peers may be asked, where it is for any of them.
    pub scope: Scope,
    pub deadline: Instant,
}

impl<'a> Question<'a> {
    /// One that the peer is to answer itself.
    pub fn about(place: &'a Place, digest: &'a Digest, manner: Manner, deadline: Instant) -> Self {
        Self { place, digest, manner, redirects: Redirects::Refused, aim: Aim::Whole, scope: Scope::AllZones, deadline }
    }
}

/// How a peer is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// For what it has, or gets now.
    IfKept,
    /// To get it, being that.
    As(Role),
}

/// Whether a busy peer may name another one instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    Followed,
    /// Those that it named could not help, or it was named by another one.
    Refused,
}

/// What a range is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// Somebody wants just that.
    Range,
    /// All the others follow.
    Whole,
}
