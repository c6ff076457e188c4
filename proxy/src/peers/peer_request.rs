//! A peer's question, as the one who is asked sees it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::CACHE_CONTROL;
use http::request::Parts;
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;

use super::swarm::{BestSource, PeerDecision, Tracker};
use super::wire::{Holder, Terms};
use super::{FetchPolicy, PeerAuthError, PeerTrust, Peers, RedirectPolicy, Seal, wire};
use crate::oci::{Digest, Span, Spans};
use crate::principal::{self, Principal, PrincipalId};
use crate::registries::Rule;

/// Who asks, and what it said of itself.
#[derive(Clone, Debug)]
pub struct PeerRequest {
    /// None: no member, or one that does not say so. It is answered, but nobody is sent to it.
    peer: Option<SocketAddr>,
    /// What it asks of this node.
    pub terms: Terms,
    circle: Locality,
    reach: FetchPolicy,
    have: Spans,
    load: u32,
    /// Whether it has proven who it is, and what proves the answer.
    standing: PeerTrust,
    pub seal: Option<Seal>,
    /// What the registry is shown for its client.
    authorization: Option<HeaderValue>,
}

/// Those who are told of each other, since what passes between them costs the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Locality {
    OwnZone,
    OtherZones,
}

/// A body on its way to a peer, counted for as long as it is held.
pub struct PeerBody(Arc<Peers>);

impl PeerRequest {
    /// Reads a question that came from `from` to `at`, the ends of its connection. An error: it is no
    /// peer's.
    pub fn read(
        request: &Parts,
        from: Option<IpAddr>,
        at: Option<SocketAddr>,
        peers: &Peers,
    ) -> Result<Self, PeerAuthError> {
        let headers = &request.headers;
        let proven = peers.proof.check(at, &request.method, &request.uri, headers);
        let (standing, seal) = proven.inspect_err(|why| {
            peers.metrics.unproven.with_label_values(&["question"]).inc();
            tracing::debug!(?from, why = why.as_str(), "a question that no peer has signed");
        })?;
        let cache_control = headers.get(CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kept = cache_control.split(',').any(|word| word.trim() == wire::ONLY_IF_CACHED);
        let terms = Terms::read(headers);
        let (load, have) = wire::read_have(headers).unwrap_or_default();
        // Others are sent to it: it has to be a member, and where it says it is. Who proves to be one is believed: with
        // several addresses it may call from another one.
        let members = peers.members.load();
        let is_proven = standing == PeerTrust::Member;
        let is_true = |peer: &SocketAddr| members.contains(*peer) && (is_proven || Some(peer.ip()) == from);
        let peer = terms.peers.nearest().filter(is_true);
        let is_far = peer.is_some_and(|peer| members.is_far(peer));
        Ok(Self {
            peer,
            terms,
            circle: if is_far { Locality::OtherZones } else { Locality::OwnZone },
            reach: if kept { FetchPolicy::Kept } else { FetchPolicy::Origin },
            have,
            load,
            authorization: headers.get(wire::AUTHORIZATION).and_then(|sealed| peers.proof.open(sealed)),
            standing,
            seal,
        })
    }

    /// A member that could fetch the range in this node's stead.
    pub fn deputy(&self) -> Option<SocketAddr> {
        self.peer.filter(|_| self.terms.may_depute && self.terms.rule.is_some())
    }

    /// With whose rights it asks, where a rule wants to know: it has let its client in.
    pub fn caller(&self) -> Principal {
        match &self.authorization {
            Some(authorization) => {
                let who = PrincipalId::lent(authorization);
                let mut authorization = authorization.clone();
                authorization.set_sensitive(true);
                Principal::Holder(Arc::new(principal::VerifiedPrincipal { who, authorization: Some(authorization) }))
            }
            None => Principal::Anonymous,
        }
    }

    /// By which address it is known as a member.
    pub fn member(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// As what it is treated in what a rule is for. Whoever goes by another rule gets what is kept
    /// and everybody may have: this node would fetch it elsewhere, or with other credentials.
    pub fn within(&self, rule: &Rule) -> (PeerTrust, FetchPolicy) {
        match &self.terms.rule {
            Some(theirs) if theirs != rule.fingerprint() => (PeerTrust::Stranger, FetchPolicy::Kept),
            Some(_) => (self.standing, self.reach),
            None => (PeerTrust::Stranger, self.reach),
        }
    }
}

impl Peers {
    /// Whether to answer a question for a range of a blob, the first byte of which `comes` from there, or who
    /// else could.
    pub fn direct(&self, visitor: &PeerRequest, digest: &Digest, span: Span, comes: BestSource) -> PeerDecision {
        let tracker = self.tracker_of(visitor, digest);
        if visitor.terms.redirects == RedirectPolicy::Refused || visitor.peer.is_none() {
            return PeerDecision::Answer;
        }
        loop {
            let direction = tracker.lock().direct(visitor.peer, span, comes, self.sending(), self.now());
            match direction {
                // Whoever was sent there would come back.
                PeerDecision::Redirect(other) if !self.may_be_named(&other) => tracker.lock().forget(&other),
                direction => return direction,
            }
        }
    }

    /// A visitor is answered, or goes where it was sent: it gets this now.
    pub fn expect(&self, visitor: &PeerRequest, digest: &Digest, span: Span) {
        if visitor.terms.redirects == RedirectPolicy::Followed {
            self.tracker_of(visitor, digest).lock().expect(visitor.peer, span, self.now());
        }
    }

    /// A visitor said what it has of a blob.
    pub fn heard(&self, visitor: &PeerRequest, digest: &Digest) {
        if let Some(peer) = visitor.peer.filter(|peer| !self.health.lock().is_shut_out(peer, self.now())) {
            self.tracker_of(visitor, digest).lock().heard(peer, &visitor.have, visitor.load, self.now());
        }
    }

    /// Whether a visitor said to have all of this.
    pub fn is_elsewhere(&self, digest: &Digest, span: Span) -> bool {
        self.visitors_of(digest).iter().any(|tracker| tracker.lock().is_elsewhere(span))
    }

    /// Whether another visitor has the byte at `at`, or gets it from the origin.
    pub fn another_has(&self, visitor: SocketAddr, digest: &Digest, at: u64) -> bool {
        self.visitors_of(digest).iter().any(|tracker| tracker.lock().another_has(visitor, at))
    }

    /// Whether a peer's requests say what it has of a blob.
    pub(super) fn is_told_by(&self, peer: &SocketAddr, digest: &Digest) -> bool {
        let now = self.now();
        self.visitors_of(digest).iter().any(|tracker| tracker.lock().is_told_by(peer, now))
    }

    /// The visitors who have the byte at `at`, or get it from the origin.
    pub fn who_visited_has(&self, digest: &Digest, at: u64) -> Vec<Holder> {
        let found = self.visitors_of(digest).into_iter().flat_map(|tracker| tracker.lock().who_has(at));
        found.filter(|holder| self.may_be_named(&holder.peer)).collect()
    }

    /// Whether others could get something from it.
    fn may_be_named(&self, peer: &SocketAddr) -> bool {
        self.members.load().is_within_reach(*peer) && self.is_well(peer)
    }

    /// A visitor fetches this from the origin in this node's stead.
    pub fn depute(&self, visitor: &PeerRequest, digest: &Digest, span: Span) {
        if let Some(peer) = visitor.peer {
            self.tracker_of(visitor, digest).lock().depute(peer, span);
        }
    }

    /// It does not after all.
    pub fn fail_as_deputy(&self, visitor: &PeerRequest, digest: &Digest, at: u64) {
        if let Some(peer) = visitor.peer {
            self.tracker_of(visitor, digest).lock().fail_as_deputy(peer, at);
        }
    }

    fn tracker_of(&self, visitor: &PeerRequest, digest: &Digest) -> Arc<Mutex<Tracker>> {
        let tracker = || Arc::new(Mutex::new(Tracker::new(self.count())));
        self.trackers.get_with((digest.clone(), visitor.circle), tracker)
    }

    fn visitors_of(&self, digest: &Digest) -> Vec<Arc<Mutex<Tracker>>> {
        let circles = [Locality::OwnZone, Locality::OtherZones].into_iter();
        circles.filter_map(|circle| self.trackers.get(&(digest.clone(), circle))).collect()
    }

    /// What an answer tells of others, and of this node, which has `have`.
    pub fn told(&self, visitor: &PeerRequest, digest: &Digest, have: &Spans) -> Vec<(HeaderName, HeaderValue)> {
        let tracker = self.trackers.get(&(digest.clone(), visitor.circle));
        let holders = tracker.and_then(|tracker| wire::write_holders(&tracker.lock().holders(visitor.peer)));
        let have = if have.is_empty() { None } else { wire::write_have(self.sending(), have) };
        let told = [holders.map(|value| (wire::HOLDERS, value)), have.map(|value| (wire::HAVE, value))];
        told.into_iter().flatten().collect()
    }

    /// Counts a body that is sent to a peer.
    pub fn send(self: &Arc<Self>) -> PeerBody {
        self.sending.fetch_add(1, Ordering::Relaxed);
        PeerBody(self.clone())
    }

    fn sending(&self) -> u32 {
        self.sending.load(Ordering::Relaxed)
    }
}

impl Drop for PeerBody {
    fn drop(&mut self) {
        self.0.sending.fetch_sub(1, Ordering::Relaxed);
    }
}
