//! Which peers are sources for a repository, and in which role this node fetches an object.

use std::sync::Arc;

use super::RequestContext;
use super::throughput::ThroughputEstimates;
use crate::config::CrossZonePeers;
use crate::oci::{Digest, Tag};
use crate::peers::{Peers, Scope};
use crate::registries::RepositoryRef;
use crate::role::Role;

/// The peers, and what was measured of them.
pub(super) struct PeerRouting {
    peers: Option<Arc<Peers>>,
    pub(super) throughput: ThroughputEstimates,
}

impl PeerRouting {
    pub(super) fn new(peers: Option<Peers>) -> Self {
        Self { peers: peers.map(Arc::new), throughput: ThroughputEstimates::new() }
    }

    /// All peers, whatever may be shared with them.
    pub(super) fn peers(&self) -> Option<&Arc<Peers>> {
        self.peers.as_ref()
    }

    /// The peers, if this repository may be shared with them: content that needs credentials only with authenticated
    /// ones.
    pub(super) fn peers_for(&self, repo_ref: &RepositoryRef) -> Option<&Arc<Peers>> {
        self.peers().filter(|peers| peers.are_authenticated() || !repo_ref.rule.is_private())
    }

    /// Authenticated peers only: no digest proves what a tag resolves to.
    pub(super) fn peers_for_tags(&self) -> Option<&Arc<Peers>> {
        self.peers().filter(|peers| peers.are_authenticated())
    }

    /// The role in which this node fetches a digest. It downloads from the upstream if it is the owner, or is requested
    /// as the owner. It also does so if peers may not get the repository or the principal's credential.
    pub(super) fn role(&self, repo_ref: &RepositoryRef, digest: &Digest, request_context: RequestContext) -> Role {
        self.role_among(self.peers_for(repo_ref), repo_ref, digest, request_context)
    }

    /// The role in which this node resolves a tag.
    pub(super) fn tag_role(&self, repo_ref: &RepositoryRef, tag: &Tag, request_context: RequestContext) -> Role {
        self.role_among(self.peers_for_tags(), repo_ref, &tag_key(repo_ref, tag), request_context)
    }

    fn role_among(
        &self,
        peers: Option<&Arc<Peers>>,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        request_context: RequestContext,
    ) -> Role {
        let peers = peers.filter(|_| repo_ref.principal.may_be_forwarded());
        peers.map_or(Role::Global, |peers| peers.owner_route(digest, request_context.role, self.scope(repo_ref)).role)
    }

    /// Whether peers of other zones are sources for this repository.
    pub(super) fn scope(&self, repo_ref: &RepositoryRef) -> Scope {
        match repo_ref.rule.cross_zone_peers {
            CrossZonePeers::UnlessSlower if self.throughput.upstream_is_faster(repo_ref.rule.name()) => Scope::OwnZone,
            CrossZonePeers::Always | CrossZonePeers::UnlessSlower => Scope::AllZones,
            CrossZonePeers::Never => Scope::OwnZone,
        }
    }
}

/// The peers to request from when the upstream is down: slow peers are better than none.
pub(super) fn outage_scope(repo_ref: &RepositoryRef) -> Scope {
    if repo_ref.rule.cross_zone_peers == CrossZonePeers::Never { Scope::OwnZone } else { Scope::AllZones }
}

/// The key that selects a tag's owner.
pub(super) fn tag_key(repo_ref: &RepositoryRef, tag: &Tag) -> Digest {
    Digest::of(format!("{repo_ref}:{tag}").as_bytes())
}
