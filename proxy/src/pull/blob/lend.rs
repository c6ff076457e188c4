//! Lets peers download ranges of a blob from the upstream in the owner's stead.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{BlobRequest, BlobService};
use crate::fill::{Fill, Lent};
use crate::oci::Span;
use crate::peers::swarm::{BestSource, PeerDecision};
use crate::peers::{FetchPolicy, PeerRequest, Peers, RangePurpose, RedirectPolicy};
use crate::role::Role;

/// How long a peer's request for a range is held until the range can be lent or another peer has it. Longer: peers wait
/// longer for a slow owner. Shorter: the owner downloads ranges that a peer could soon have downloaded.
const LEND_TIMEOUT: Duration = Duration::from_secs(6);

/// How often a held request is checked. Longer: freed loans are used later. Shorter: more CPU for each held request.
const LEND_POLL_INTERVAL: Duration = Duration::from_millis(50);

impl BlobService {
    /// Whether this node or another source is better for the byte at `at`.
    fn best_source(&self, request: &BlobRequest, at: u64) -> BestSource {
        match self.owner_fill(request) {
            Some(fill) if fill.is_deferred_to_peers(at) => BestSource::OtherHolder,
            _ => BestSource::ThisNode,
        }
    }

    /// Lends a range, or its beginning, to the peer that requested it. Condition: this node downloads the blob from the
    /// upstream as its owner, and has not requested the range yet.
    fn lend(&self, request: &BlobRequest, span: Span, to: SocketAddr) -> Lent {
        // A peer with other rules (`FetchPolicy::CacheOnly`) would use other sources or credentials. A peer that wants only
        // this range would not keep it for others.
        let may_lend_to = request.request_context.fetch_policy == FetchPolicy::Upstream
            && request.request_context.range_purpose == RangePurpose::Whole;
        self.owner_fill(request).filter(|_| may_lend_to).map_or(Lent::No, |fill| fill.lend(span, to))
    }

    /// Decides about a peer's request for a range: serve, redirect or lend it. If no more may be lent now and no peer
    /// has the range, the request waits up to [`LEND_TIMEOUT`] for either.
    pub async fn direct(&self, peer_request: &PeerRequest, request: &BlobRequest, peers: &Peers) -> PeerDecision {
        let (digest, span) = (&request.digest, self.likely_span(request));
        peers.record_report(peer_request, digest);
        if peer_request.terms.redirects == RedirectPolicy::Refused
            && request.request_context.fetch_policy == FetchPolicy::Upstream
            && let Some(member) = peer_request.member()
        {
            peers.fail_as_deputy(peer_request, digest, span.start);
            self.recall(request, span.start, member);
        }
        let until = Instant::now() + LEND_TIMEOUT;
        let decision = loop {
            let decision = peers.direct(peer_request, digest, span, self.best_source(request, span.start));
            let (PeerDecision::Serve, Some(deputy)) = (decision, peer_request.deputy()) else { break decision };
            // If another peer has the range, the owner downloads it from that peer.
            if peers.another_peer_has(deputy, digest, span.start) {
                break PeerDecision::Serve;
            }
            match self.lend(request, span, deputy) {
                Lent::Yes(lent) => {
                    peers.depute(peer_request, digest, lent);
                    break PeerDecision::Depute(lent);
                }
                Lent::Later if Instant::now() < until => tokio::time::sleep(LEND_POLL_INTERVAL).await,
                Lent::Later | Lent::No => break PeerDecision::Serve,
            }
        };
        let granted = if let PeerDecision::Depute(lent) = decision { lent } else { span };
        peers.expect(peer_request, digest, granted);
        decision
    }

    /// The peer `by` needs the byte at `at` from this node, so that a loan of it ends.
    fn recall(&self, request: &BlobRequest, at: u64, by: SocketAddr) {
        if let Some(fill) = self.owner_fill(request) {
            fill.recall(at, by);
        }
    }

    /// The fill that this node runs as the owner.
    fn owner_fill(&self, request: &BlobRequest) -> Option<Arc<Fill>> {
        let is_owner_fill = |fill: &Arc<Fill>| fill.role() == Role::Global && self.role_of(request) == Role::Global;
        self.fills().running(&self.fill_key(request)).filter(is_owner_fill)
    }
}
