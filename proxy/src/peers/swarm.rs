//! Who has which bytes of a blob: pure decisions, for real nodes and simulated ones.
//!
//! A [`Tracker`] is kept by whoever is asked: it remembers what those who ask have, tells others of
//! them, and sends a question on once others can answer it as well as itself. A [`View`] is kept by
//! whoever fetches: it knows what the answers told, and picks for each range the least loaded that is
//! ahead. Both are hints. Whoever is asked for what it does not have says so, and a digest proves
//! what came.

mod tracker;
mod view;

use std::net::SocketAddr;
use std::time::Duration;

pub use self::tracker::Tracker;
pub use self::view::View;
use super::ring;
use crate::oci::{Span, Spans};

/// Pieces that a peer's part of a blob may be in: of more only the last word counts.
const MAX_SPANS: usize = 256;

/// A time in any clock.
pub type Time = Duration;

/// What a peer sent: to be compared once the truth is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contribution {
    pub peer: SocketAddr,
    pub claim: Claim,
    /// How long it said that the whole is, in bytes.
    pub total: u64,
    pub span: Span,
    /// xxHash64 of the bytes.
    pub checksum: u64,
}

/// What a peer says of the bytes that it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Claim {
    /// It has the whole, and has hashed it.
    Verified,
    /// They come to it at the moment: it cannot know.
    Relayed,
}

/// Where a byte had better come from that a node was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BestSource {
    /// From here, or from somebody who is less busy.
    Here,
    /// From whoever else has it: this node is slow, or left it to others.
    Elsewhere,
}

/// What to do with a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerDecision {
    Answer,
    Redirect(SocketAddr),
    /// Whoever asks fetches this part of it from the origin, for all.
    Depute(Span),
}

/// Whether somebody with these bytes is left far behind by one that has so many: it takes longer than
/// others to get them, and so to send them. What it asks for it gets, but little is asked of it.
fn is_slow(have: &Spans, has: u64) -> bool {
    have.len() < has / 2
}

/// An order of peers that differs from lot to lot.
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
