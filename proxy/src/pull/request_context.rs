//! The requester of a pull, and which sources may be used for it.

use std::net::IpAddr;
use std::time::Duration;

use crate::bandwidth::Priority;
use crate::oci::RegistryFrom;
use crate::peers::{Downstream, FetchPolicy, PeerTrust, RangePurpose};
use crate::role::Role;
use crate::times::UPSTREAM_TIMEOUT;

/// The kind of requester.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requester {
    /// A container runtime.
    Client,
    /// A client of the peer port: another dray, or a stranger.
    Peer(PeerTrust),
}

/// The circumstances of a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestContext {
    pub requester: Requester,
    /// The client whose share of common limits the request takes. None: it takes none.
    pub client: Option<IpAddr>,
    /// The role that the requester assigns to this node.
    pub role: Role,
    pub fetch_policy: FetchPolicy,
    pub range_purpose: RangePurpose,
    pub priority: Priority,
    /// The peers that wait for the response.
    pub downstream: Downstream,
    /// How long the requester waits for a response.
    pub time_limit: Duration,
}

/// Time limit of a client that names the registry by `ns`: it can pull from the upstream itself. Longer: clients fall
/// back after more than ten seconds. Shorter: slow upstreams are bypassed.
const FALLBACK_TIMEOUT: Duration = Duration::from_millis(9500);

impl Requester {
    pub fn is_peer(self) -> bool {
        matches!(self, Self::Peer(_))
    }

    /// Whether it gets what a rule fetches with credentials.
    pub(super) fn is_trusted(self) -> bool {
        matches!(self, Self::Client | Self::Peer(PeerTrust::Authenticated))
    }
}

impl RequestContext {
    /// A container runtime's request, with the widest policy.
    pub const CLIENT: Self = Self {
        requester: Requester::Client,
        client: None,
        role: Role::Client,
        fetch_policy: FetchPolicy::Upstream,
        range_purpose: RangePurpose::Range,
        priority: Priority::Client,
        downstream: Downstream::NONE,
        time_limit: UPSTREAM_TIMEOUT,
    };

    /// A prefetch of this process: nothing waits for the bytes.
    pub const PREFETCH: Self = Self { priority: Priority::Background, ..Self::CLIENT };

    /// A client's request. Only one that names the registry by `ns` falls back to the upstream after an error.
    pub fn of_client(registry_from: RegistryFrom) -> Self {
        let time_limit = if registry_from == RegistryFrom::Namespace { FALLBACK_TIMEOUT } else { UPSTREAM_TIMEOUT };
        Self { time_limit, ..Self::CLIENT }
    }

    /// The time limit for a peer that waits this long. A tenth is left for the error response to reach the peer.
    pub fn peer_time_limit(left: Option<Duration>) -> Duration {
        left.map_or(UPSTREAM_TIMEOUT, |left| UPSTREAM_TIMEOUT.min(left.mul_f64(0.9)))
    }

    /// Whether the requester is a client without another source.
    pub(super) fn has_no_fallback(&self) -> bool {
        self.requester == Requester::Client && self.time_limit > FALLBACK_TIMEOUT
    }

    /// The same context, with less time left.
    pub fn after(self, waited: Duration) -> Self {
        Self { time_limit: self.time_limit.saturating_sub(waited), ..self }
    }

    /// Whether a peer downloads the whole blob to serve its own clients.
    pub(super) fn is_follower(&self) -> bool {
        self.requester.is_peer()
            && self.range_purpose == RangePurpose::Whole
            && self.fetch_policy == FetchPolicy::Upstream
    }
}
