//! This process as a source, for `[[prefetch]]` and `[[pin]]`. Each node downloads only the blobs that it owns: a
//! cluster caches an image once, although all its nodes have the same configuration.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::plan::PlannedBlob;
use super::source::{BlobStream, Chunks, FetchError, ImageSource};
use crate::oci::{ImageName, RangeRequest, Reference, RegistryFrom, accept};
use crate::pull::{BlobRequest, Pull, PullError, RequestContext, Requester, check_rule};
use crate::registries::RepositoryRef;
use crate::source::ServedFrom;

pub struct InProcessSource(pub Arc<Pull>);

#[async_trait]
impl ImageSource for InProcessSource {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, FetchError> {
        let repository = self.repository(image);
        check_rule(&repository, Requester::Client).map_err(fetch_error)?;
        let accept = accept::merge(std::iter::empty());
        let response = self.0.manifests.manifest(&repository, reference, &accept, RequestContext::PREFETCH).await;
        Ok(response.map_err(fetch_error)?.object.bytes)
    }

    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, FetchError> {
        let request = self.request(blob, (from > 0).then_some(RangeRequest::From(from)));
        check_rule(&request.repo_ref, Requester::Client).map_err(fetch_error)?;
        let response = self.0.blobs.blob(&request).await.map_err(fetch_error)?;
        Ok(BlobStream { chunks: Chunks::InProcess(response.body), was_cached: is_cached(response.from) })
    }

    async fn is_cached(&self, blob: &PlannedBlob) -> Result<bool, FetchError> {
        let (_, from) = self.0.blobs.length(&self.request(blob, None)).await.map_err(fetch_error)?;
        Ok(is_cached(from))
    }

    fn is_responsible_for(&self, blob: &PlannedBlob) -> bool {
        self.0.blobs.is_owner(&self.repository(&blob.image), &blob.digest)
    }
}

impl InProcessSource {
    /// The repository of an image.
    pub fn repository(&self, image: &ImageName) -> RepositoryRef {
        self.0.registries().repo_ref(image.registry.clone(), image.repository.clone())
    }

    fn request(&self, blob: &PlannedBlob, range: Option<RangeRequest>) -> BlobRequest {
        let (repo_ref, digest) = (self.repository(&blob.image), blob.digest.clone());
        BlobRequest {
            repo_ref,
            digest,
            range,
            registry_from: RegistryFrom::Namespace,
            request_context: RequestContext::PREFETCH,
        }
    }
}

fn is_cached(from: ServedFrom) -> bool {
    matches!(from, ServedFrom::Memory | ServedFrom::Disk)
}

fn fetch_error(error: PullError) -> FetchError {
    match error {
        PullError::Upstream { error, .. } if error.status >= 500 => FetchError::Temporary(error.to_string()),
        PullError::Upstream { error, .. } => FetchError::Permanent(error.to_string()),
        PullError::Busy => FetchError::Temporary("too many concurrent requests".into()),
        PullError::Unavailable(why)
        | PullError::UpstreamUnreachable(why)
        | PullError::Limited(why)
        | PullError::InvalidUpstreamResponse(why) => FetchError::Temporary(why),
        PullError::BadRequest(message) => FetchError::Permanent(message.to_owned()),
        PullError::NotFound { message, .. } | PullError::Denied(message) | PullError::Blocked(message) => {
            FetchError::Permanent(message)
        }
        PullError::NotCached | PullError::Unsatisfiable { .. } => {
            FetchError::Permanent("the download cannot be resumed".to_owned())
        }
    }
}
