//! Who asks, and how far a question may go.

use std::time::Duration;

use crate::peers::{Aim, Reach, Standing};
use crate::role::Role;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A container runtime.
    Client,
    /// Another dray, or whoever else found the port.
    Peer(Standing),
}

/// A question's circumstances.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    pub asker: Asker,
    /// What this node is asked as.
    pub role: Role,
    pub reach: Reach,
    pub aim: Aim,
    /// What is left of the time to answer, where whoever asks said so.
    pub left: Option<Duration>,
}

impl Asker {
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Peer(_))
    }

    /// Whether it gets what a rule fetches with credentials.
    pub(super) fn is_trusted(self) -> bool {
        matches!(self, Self::Client | Self::Peer(Standing::Member))
    }
}

impl Asking {
    /// A container runtime asks for anything.
    pub const CLIENT: Self =
        Self { asker: Asker::Client, role: Role::Client, reach: Reach::Origin, aim: Aim::Range, left: None };

    /// Whether a peer fetches the whole, to give it to its clients.
    pub(super) fn is_follower(&self) -> bool {
        self.asker.is_peer() && self.aim == Aim::Whole && self.reach == Reach::Origin
    }

    /// How long a source may take, and leave whoever asks some time to hear of it.
    pub(super) fn at_most(&self, limit: Duration) -> Duration {
        self.left.map_or(limit, |left| limit.min(left.mul_f64(0.9)))
    }
}
