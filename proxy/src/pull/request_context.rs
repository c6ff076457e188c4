//! Who asks, and how far a question may go.

use std::net::IpAddr;
use std::time::Duration;

use crate::oci::RegistryFrom;
use crate::peers::{Downstream, FetchPolicy, PeerTrust, RangePurpose};
use crate::role::Role;
use crate::times::UPSTREAM_TIMEOUT;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// A container runtime.
    Client,
    /// Another dray, or whoever else found the port.
    Peer(PeerTrust),
}

/// A question's circumstances.
#[derive(Clone, Copy, Debug)]
pub struct RequestContext {
    pub asker: Requester,
    /// Whose share of what all clients share it takes. None: nobody's.
    pub client: Option<IpAddr>,
    /// What this node is asked as.
    pub role: Role,
    pub reach: FetchPolicy,
    pub aim: RangePurpose,
    /// The peers that wait for the response.
    pub downstream: Downstream,
    /// How long the requester waits for a response.
    pub patience: Duration,
}

/// A client that names the registry by `ns` can go to the upstream itself: it hears within ten seconds.
const FALLBACK_TIMEOUT: Duration = Duration::from_millis(9500);

impl Requester {
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Peer(_))
    }

    /// Whether it gets what a rule fetches with credentials.
    pub(super) fn is_trusted(self) -> bool {
        matches!(self, Self::Client | Self::Peer(PeerTrust::Member))
    }
}

impl RequestContext {
    /// A container runtime asks for anything.
    pub const CLIENT: Self = Self {
        asker: Requester::Client,
        client: None,
        role: Role::Client,
        reach: FetchPolicy::Origin,
        aim: RangePurpose::Range,
        downstream: Downstream::NONE,
        patience: UPSTREAM_TIMEOUT,
    };

    /// A client's request. Only one that names the registry by `ns` falls back to the upstream after an error.
    pub fn of_client(named_by: RegistryFrom) -> Self {
        let patience = if named_by == RegistryFrom::Namespace { FALLBACK_TIMEOUT } else { UPSTREAM_TIMEOUT };
        Self { patience, ..Self::CLIENT }
    }

    /// The patience of a peer that waits for this long: it needs some of it to hear of an error.
    pub fn patience_of_peer(left: Option<Duration>) -> Duration {
        left.map_or(UPSTREAM_TIMEOUT, |left| UPSTREAM_TIMEOUT.min(left.mul_f64(0.9)))
    }

    /// Whether it is a client that can request it from nowhere else.
    pub(super) fn has_no_fallback(&self) -> bool {
        self.asker == Requester::Client && self.patience > FALLBACK_TIMEOUT
    }

    /// The same once some of the time has passed.
    pub fn after(self, waited: Duration) -> Self {
        Self { patience: self.patience.saturating_sub(waited), ..self }
    }

    /// Whether a peer fetches the whole, to give it to its clients.
    pub(super) fn is_follower(&self) -> bool {
        self.asker.is_peer() && self.aim == RangePurpose::Whole && self.reach == FetchPolicy::Origin
    }
}
