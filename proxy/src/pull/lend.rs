//! What an owner leaves to others: ranges that whoever asks for them fetches from the origin, for all.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{BlobRequest, Pull};
use crate::fill::Fill;
use crate::oci::Span;
use crate::peers::swarm::{Comes, Direction};
use crate::peers::{Aim, Peers, Reach, Redirects, Visitor};
use crate::role::Role;

impl Pull {
    /// Where the byte at `at` had better come from.
    fn comes(&self, request: &BlobRequest, at: u64) -> Comes {
        match self.owned(request) {
            Some(fill) if fill.is_better_elsewhere(at) => Comes::Elsewhere,
            _ => Comes::Here,
        }
    }

    /// Leaves a range, or its beginning, to the peer that asks for it, if this node fetches from the origin but has not come to
    /// that range yet.
    fn lend(&self, request: &BlobRequest, span: Span, to: SocketAddr) -> Option<Span> {
        // Who goes by other rules would fetch it elsewhere, or with other credentials.
        let is_equal = request.asking.reach == Reach::Origin && request.asking.aim == Aim::Whole;
        self.owned(request).filter(|_| is_equal).and_then(|fill| fill.lend(span, to))
    }

    /// What to do with a peer's request for a range.
    pub fn direct(&self, visitor: &Visitor, request: &BlobRequest, peers: &Peers) -> Direction {
        let (digest, span) = (&request.digest, self.likely_span(request));
        peers.heard(visitor, digest);
        if visitor.terms.redirects == Redirects::Refused
            && request.asking.reach == Reach::Origin
            && let Some(member) = visitor.member()
        {
            peers.fail_as_deputy(visitor, digest, span.start);
            self.recall(request, span.start, member);
        }
        let direction = peers.direct(visitor, digest, span, self.comes(request, span.start));
        // What a peer has the owner fetches from there.
        let may_depute =
            |deputy: &SocketAddr| direction == Direction::Answer && !peers.another_has(*deputy, digest, span.start);
        let lent = visitor.deputy().filter(may_depute).and_then(|deputy| self.lend(request, span, deputy));
        if let Some(lent) = lent {
            peers.depute(visitor, digest, lent);
        }
        peers.expect(visitor, digest, lent.unwrap_or(span));
        lent.map_or(direction, Direction::Depute)
    }

    /// Whoever asks insists on having the byte at `at` from here.
    fn recall(&self, request: &BlobRequest, at: u64, by: SocketAddr) {
        if let Some(fill) = self.owned(request) {
            fill.recall(at, by);
        }
    }

    /// The fill that this node runs as the owner.
    fn owned(&self, request: &BlobRequest) -> Option<Arc<Fill>> {
        let is_owner = self.role(&request.place, &request.digest, request.asking) == Role::Global;
        let running = self.fills.running(&self.fill_key(request)).filter(|_| is_owner);
        running.filter(|fill| fill.role() == Role::Global)
    }
}
