//! What an owner leaves to others: ranges that whoever asks for them fetches from the origin, for all.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{BlobRequest, Pull};
use crate::fill::{Fill, Lent};
use crate::oci::Span;
use crate::peers::swarm::{BestSource, PeerDecision};
use crate::peers::{FetchPolicy, PeerRequest, Peers, RangePurpose, RedirectPolicy};
use crate::role::Role;

/// For how long a question waits that may be left to whoever asks, and how often that is looked at.
const HELD: Duration = Duration::from_secs(6);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Pull {
    /// Where the byte at `at` had better come from.
    fn comes(&self, request: &BlobRequest, at: u64) -> BestSource {
        match self.owned(request) {
            Some(fill) if fill.is_better_elsewhere(at) => BestSource::Elsewhere,
            _ => BestSource::Here,
        }
    }

    /// Leaves a range, or its beginning, to the peer that asks for it, if this node fetches from the origin but has not come to
    /// that range yet.
    fn lend(&self, request: &BlobRequest, span: Span, to: SocketAddr) -> Lent {
        // Who goes by other rules would fetch it elsewhere, or with other credentials.
        let is_equal = request.asking.reach == FetchPolicy::Origin && request.asking.aim == RangePurpose::Whole;
        self.owned(request).filter(|_| is_equal).map_or(Lent::No, |fill| fill.lend(span, to))
    }

    /// What to do with a peer's question for a range. Where enough is lent for now and nobody brings the range,
    /// it waits a while for one of both.
    pub async fn direct(&self, visitor: &PeerRequest, request: &BlobRequest, peers: &Peers) -> PeerDecision {
        let (digest, span) = (&request.digest, self.likely_span(request));
        peers.heard(visitor, digest);
        if visitor.terms.redirects == RedirectPolicy::Refused
            && request.asking.reach == FetchPolicy::Origin
            && let Some(member) = visitor.member()
        {
            peers.fail_as_deputy(visitor, digest, span.start);
            self.recall(request, span.start, member);
        }
        let until = Instant::now() + HELD;
        let direction = loop {
            let direction = peers.direct(visitor, digest, span, self.comes(request, span.start));
            let (PeerDecision::Answer, Some(deputy)) = (direction, visitor.deputy()) else { break direction };
            // What somebody has the owner fetches from there.
            if peers.another_has(deputy, digest, span.start) {
                break PeerDecision::Answer;
            }
            match self.lend(request, span, deputy) {
                Lent::Yes(lent) => {
                    peers.depute(visitor, digest, lent);
                    break PeerDecision::Depute(lent);
                }
                Lent::Later if Instant::now() < until => tokio::time::sleep(LOOK_AGAIN).await,
                Lent::Later | Lent::No => break PeerDecision::Answer,
            }
        };
        let gets = if let PeerDecision::Depute(lent) = direction { lent } else { span };
        peers.expect(visitor, digest, gets);
        direction
    }

    /// Whoever asks insists on having the byte at `at` from here.
    fn recall(&self, request: &BlobRequest, at: u64, by: SocketAddr) {
        if let Some(fill) = self.owned(request) {
            fill.recall(at, by);
        }
    }

    /// The fill that this node runs as the owner.
    fn owned(&self, request: &BlobRequest) -> Option<Arc<Fill>> {
        let is_owners = |fill: &Arc<Fill>| fill.role() == Role::Global && self.role_of(request) == Role::Global;
        self.fills.running(&self.fill_key(request)).filter(is_owners)
    }
}
