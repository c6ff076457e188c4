//! Which peers hold which bytes of a blob: pure decisions, for real and for simulated nodes.
//!
//! - [`Tracker`], on the serving node: remembers what its requesters have, names them to each other, and redirects
//!   requests that another holder can serve as well.
//! - [`View`], on the downloading node: knows the holders that responses named, and picks the least loaded one for each
//!   range.
//!
//! Both hold hints only. A peer without the requested bytes responds so, and the digest verifies what comes.

mod tracker;
mod view;

use std::net::SocketAddr;
use std::time::Duration;

pub use self::tracker::Tracker;
pub use self::view::View;
use super::ring;
use crate::oci::{Span, Spans};

/// Spans remembered of one peer's part of a blob; beyond this only its last report counts. Larger: more memory.
/// Smaller: holders of scattered parts are forgotten.
const MAX_SPANS: usize = 256;

/// A time on any clock.
pub type Time = Duration;

/// What a peer sent, to be compared with the verified blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contribution {
    pub peer: SocketAddr,
    pub claim: Claim,
    /// The length of the whole blob that the peer reported.
    pub total: u64,
    pub span: Span,
    /// xxHash64 of the bytes.
    pub checksum: u64,
}

/// What a peer claims of the bytes that it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// It has the whole blob, and has verified its digest.
    Verified,
    /// It is downloading the blob itself: it cannot know whether they are corrupt.
    Relayed,
}

/// The better source of a byte that was requested from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BestSource {
    /// This node, or a less loaded holder.
    ThisNode,
    /// Any other holder: this node is slow, or has left the range to a deputy.
    OtherHolder,
}

/// How to respond to a request for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerDecision {
    Serve,
    Redirect(SocketAddr),
    /// The requester becomes this owner's deputy: it downloads this span from the upstream, for all peers.
    Depute(Span),
}

/// Whether a peer with these bytes has less than half of the requester's `has`: it receives slowly, and so sends
/// slowly. Its own requests are served, but it is the last choice as a source.
fn is_slow(have: &Spans, has: u64) -> bool {
    have.len() < has / 2
}

/// An order of the peers that differs with each lot, so that equally good ones share the load.
fn scatter(peer: SocketAddr, lot: u64) -> u64 {
    let port = u64::from(peer.port());
    let address = match peer {
        SocketAddr::V4(v4) => u64::from(v4.ip().to_bits()),
        #[allow(clippy::cast_possible_truncation, reason = "any bits will do")]
        SocketAddr::V6(v6) => v6.ip().to_bits() as u64,
    };
    ring::splitmix(address ^ port.rotate_left(48) ^ lot)
}

#[cfg(test)]
mod tests;
