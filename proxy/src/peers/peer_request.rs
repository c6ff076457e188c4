//! A peer's request, on the node that serves it.

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

/// A request of a peer, and what that reported of itself.
#[derive(Clone, Debug)]
pub struct PeerRequest {
    /// The sender's address as a member. None: it is not a member, or does not say so. It is served, but not named to
    /// others.
    peer: Option<SocketAddr>,
    pub terms: Terms,
    locality: Locality,
    policy: FetchPolicy,
    have: Spans,
    load: u32,
    /// Whether the sender is authenticated, and what signs the response.
    trust: PeerTrust,
    pub seal: Option<Seal>,
    /// The registry credential of its client.
    authorization: Option<HeaderValue>,
}

/// Peers are named only to peers of the same locality, since traffic between these costs the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Locality {
    OwnZone,
    OtherZones,
}

/// A body that is being sent to a peer, counted until it is dropped.
pub struct PeerBody(Arc<Peers>);

impl PeerRequest {
    /// Reads a request. `from` and `at` are the ends of its connection. Error: its sender fails to authenticate.
    pub fn read(
        request: &Parts,
        from: Option<IpAddr>,
        at: Option<SocketAddr>,
        peers: &Peers,
    ) -> Result<Self, PeerAuthError> {
        let headers = &request.headers;
        let checked = peers.auth.check(at, &request.method, &request.uri, headers);
        let (trust, seal) = checked.inspect_err(|error| {
            peers.metrics.peer_auth_failures.with_label_values(&["request"]).inc();
            tracing::debug!(
                peer = at.map(tracing::field::display),
                error = error.as_str(),
                "peer request not authenticated"
            );
        })?;
        let cache_control = headers.get(CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_cache_only = cache_control.split(',').any(|directive| directive.trim() == wire::ONLY_IF_CACHED);
        let terms = Terms::read(headers);
        let (load, have) = wire::read_have(headers).unwrap_or_default();
        // Other peers are redirected to this address, so it must be a member's, and the sender's own. An authenticated
        // peer with several addresses may connect from another one.
        let members = peers.members.load();
        let is_authenticated = trust == PeerTrust::Authenticated;
        let is_own_address =
            |peer: &SocketAddr| members.contains(*peer) && (is_authenticated || Some(peer.ip()) == from);
        let peer = terms.peers.nearest().filter(is_own_address);
        let is_cross_zone = peer.is_some_and(|peer| members.is_cross_zone(peer));
        Ok(Self {
            peer,
            terms,
            locality: if is_cross_zone { Locality::OtherZones } else { Locality::OwnZone },
            policy: if is_cache_only { FetchPolicy::CacheOnly } else { FetchPolicy::Upstream },
            have,
            load,
            authorization: headers.get(wire::AUTHORIZATION).and_then(|sealed| peers.auth.open(sealed)),
            trust,
            seal,
        })
    }

    /// The member that could be this owner's deputy for the range.
    pub fn deputy(&self) -> Option<SocketAddr> {
        self.peer.filter(|_| self.terms.may_depute && self.terms.rule.is_some())
    }

    /// The principal of the request, where a rule depends on it: the peer has authorized its client.
    pub fn principal(&self) -> Principal {
        match &self.authorization {
            Some(authorization) => {
                let id = PrincipalId::forwarded(authorization);
                let mut authorization = authorization.clone();
                authorization.set_sensitive(true);
                Principal::Verified(Arc::new(principal::VerifiedPrincipal { id, authorization: Some(authorization) }))
            }
            None => Principal::Anonymous,
        }
    }

    pub fn is_authenticated(&self) -> bool {
        self.trust == PeerTrust::Authenticated
    }

    /// The sender's address as a member.
    pub fn member(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// The trust and the sources of this request under a rule. A peer with another rule gets only public content that
    /// is cached: this node would download it from another upstream, or with other credentials.
    pub fn within(&self, rule: &Rule) -> (PeerTrust, FetchPolicy) {
        match &self.terms.rule {
            Some(theirs) if theirs != rule.fingerprint() => (PeerTrust::Unauthenticated, FetchPolicy::CacheOnly),
            Some(_) => (self.trust, self.policy),
            None => (PeerTrust::Unauthenticated, self.policy),
        }
    }
}

impl Peers {
    /// Decides whether this node serves a range of a blob, or which other holder does. `best_source` is the better
    /// source of the range's first byte.
    pub fn direct(&self, request: &PeerRequest, digest: &Digest, span: Span, best_source: BestSource) -> PeerDecision {
        let tracker = self.tracker_of(request, digest);
        if request.terms.redirects == RedirectPolicy::Refused || request.peer.is_none() {
            return PeerDecision::Serve;
        }
        loop {
            let decision = tracker.lock().decide(request.peer, span, best_source, self.sending(), self.now());
            match decision {
                // The requester could not use it, and would come back.
                PeerDecision::Redirect(other) if !self.may_be_named(&other) => tracker.lock().forget(&other),
                decision => return decision,
            }
        }
    }

    /// Records that the requester gets this span now, from this node or from the redirect's target.
    pub fn expect(&self, request: &PeerRequest, digest: &Digest, span: Span) {
        if request.terms.redirects == RedirectPolicy::Followed {
            self.tracker_of(request, digest).lock().record_in_flight(request.peer, span, self.now());
        }
    }

    /// Records what the requester has of a blob.
    pub fn record_report(&self, request: &PeerRequest, digest: &Digest) {
        if let Some(peer) = request.peer.filter(|peer| !self.health.lock().is_ejected(peer, self.now())) {
            self.tracker_of(request, digest).lock().record(peer, &request.have, request.load, self.now());
        }
    }

    /// Whether a requester has all of this span.
    pub fn is_at_a_peer(&self, digest: &Digest, span: Span) -> bool {
        self.trackers_of(digest).iter().any(|tracker| tracker.lock().is_at_a_peer(span))
    }

    /// Whether another requester has the byte at `at`, or downloads it from the upstream as a deputy.
    pub fn another_peer_has(&self, requester: SocketAddr, digest: &Digest, at: u64) -> bool {
        self.trackers_of(digest).iter().any(|tracker| tracker.lock().another_peer_has(requester, at))
    }

    /// Whether a peer's own requests report what it has of a blob.
    pub(super) fn reports_have(&self, peer: &SocketAddr, digest: &Digest) -> bool {
        let now = self.now();
        self.trackers_of(digest).iter().any(|tracker| tracker.lock().reports_have(peer, now))
    }

    /// The requesters that have the byte at `at`, or download it from the upstream as deputies.
    pub fn requesting_holders(&self, digest: &Digest, at: u64) -> Vec<Holder> {
        let found = self.trackers_of(digest).into_iter().flat_map(|tracker| tracker.lock().holders_of_byte(at));
        found.filter(|holder| self.may_be_named(&holder.peer)).collect()
    }

    /// Whether a peer may be named to others as a holder.
    fn may_be_named(&self, peer: &SocketAddr) -> bool {
        self.members.load().is_within_reach(*peer) && self.is_available(peer)
    }

    /// Records that the requester is this owner's deputy for a span.
    pub fn depute(&self, request: &PeerRequest, digest: &Digest, span: Span) {
        if let Some(peer) = request.peer {
            self.tracker_of(request, digest).lock().depute(peer, span);
        }
    }

    /// Records that the requester failed as a deputy, from `at` on.
    pub fn fail_as_deputy(&self, request: &PeerRequest, digest: &Digest, at: u64) {
        if let Some(peer) = request.peer {
            self.tracker_of(request, digest).lock().fail_as_deputy(peer, at);
        }
    }

    fn tracker_of(&self, request: &PeerRequest, digest: &Digest) -> Arc<Mutex<Tracker>> {
        let tracker = || Arc::new(Mutex::new(Tracker::new(self.count())));
        self.trackers.get_with((digest.clone(), request.locality), tracker)
    }

    fn trackers_of(&self, digest: &Digest) -> Vec<Arc<Mutex<Tracker>>> {
        let localities = [Locality::OwnZone, Locality::OtherZones].into_iter();
        localities.filter_map(|locality| self.trackers.get(&(digest.clone(), locality))).collect()
    }

    /// The response headers that name other holders, and report that this node has `have`.
    pub fn response_headers(
        &self,
        request: &PeerRequest,
        digest: &Digest,
        have: &Spans,
    ) -> Vec<(HeaderName, HeaderValue)> {
        let tracker = self.trackers.get(&(digest.clone(), request.locality));
        let holders = tracker.and_then(|tracker| wire::write_holders(&tracker.lock().holders(request.peer)));
        let have = if have.is_empty() { None } else { wire::write_have(self.sending(), have) };
        let headers = [holders.map(|value| (wire::HOLDERS, value)), have.map(|value| (wire::HAVE, value))];
        headers.into_iter().flatten().collect()
    }

    /// Counts a body that is being sent to a peer.
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
