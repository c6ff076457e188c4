//! What this node has cached, as far as a requester may have it.

use std::sync::Arc;

use bytes::Bytes;

use super::serve_policy::ServePolicy;
use super::{BlobRequest, Requester};
use crate::oci::Digest;
use crate::peers::PeerTrust;
use crate::registries::RepositoryRef;
use crate::source::ServedFrom;
use crate::store::{Found, SmallKind, SmallObject, Store};

pub(super) struct CachedContent {
    store: Arc<Store>,
    pub(super) policy: Arc<ServePolicy>,
}

impl CachedContent {
    pub(super) fn new(store: Arc<Store>, policy: Arc<ServePolicy>) -> Self {
        Self { store, policy }
    }

    /// A blob that may be served for this request.
    pub(super) async fn blob(&self, request: &BlobRequest) -> Option<Found> {
        let found = self.store.find(&request.digest, SmallKind::Blob).await?;
        let (requester, repo_ref) = (request.request_context.requester, &request.repo_ref);
        self.policy.allows(&request.digest, found.provenance(), requester, repo_ref).then_some(found)
    }

    pub(super) async fn manifest(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        requester: Requester,
    ) -> Option<(SmallObject, ServedFrom)> {
        match self.store.find(digest, SmallKind::Manifest).await? {
            Found::Small { object, tier }
                if self.policy.allows(digest, Some(&object.provenance), requester, repo_ref) =>
            {
                Some((object, tier.into()))
            }
            _ => None,
        }
    }

    /// A manifest that may go to every node: peers may join the flight that uses it.
    pub(super) async fn shared_manifest(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
    ) -> Option<(SmallObject, ServedFrom)> {
        self.manifest(repo_ref, digest, Requester::Peer(PeerTrust::Authenticated)).await
    }

    pub(super) async fn put_manifest(
        &self,
        repo_ref: &RepositoryRef,
        digest: &Digest,
        media_type: &str,
        bytes: &Bytes,
    ) -> SmallObject {
        // A revalidated tag mostly has the same digest: then nothing is written.
        if let Some((object, _)) = self.shared_manifest(repo_ref, digest).await
            && *object.media_type == *media_type
        {
            return object;
        }
        let object = SmallObject::new(media_type, Arc::new(repo_ref.provenance()), bytes);
        self.store.small.insert(digest, SmallKind::Manifest, object.clone()).await;
        object
    }
}
