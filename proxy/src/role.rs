//! What a node is for a digest. Questions travel one way only, from client to zone to global to the
//! origin, so that no request ever travels in a circle, whatever the nodes believe of each other.

use std::str::FromStr;

/// Which part a node plays, as whoever asks it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It fetches for its own clients, from the owner of its zone.
    Client,
    /// It owns the digest in its zone, and fetches for that, from the owner of all zones.
    Zone,
    /// It owns the digest, and fetches from the origin: whatever its own view of the members.
    Global,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Zone => "zone",
            Self::Global => "global",
        }
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Client, Self::Zone, Self::Global].into_iter().find(|role| role.as_str() == text).ok_or(())
    }
}
