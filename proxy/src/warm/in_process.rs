//! The dray that this process is: what `[[prefetch]]` pulls. Each node only fetches the blobs that it owns, so that a
//! cluster holds an image once, however many nodes have the same configuration.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::plan::PlannedBlob;
use super::source::{BlobStream, Failed, ImageSource, Pieces};
use crate::oci::{ImageName, RangeRequest, Reference, RegistryFrom, accept};
use crate::pull::{BlobRequest, Pull, PullError, RequestContext, Requester};
use crate::registries::RepositoryRef;
use crate::source::ServedFrom;

pub struct InProcessSource(pub Arc<Pull>);

#[async_trait]
impl ImageSource for InProcessSource {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, Failed> {
        let place = self.place(image);
        self.0.permit(&place, Requester::Client).map_err(failed)?;
        let accept = accept::merge(std::iter::empty());
        let answer = self.0.manifest(&place, reference, &accept, RequestContext::CLIENT).await.map_err(failed)?;
        Ok(answer.object.bytes)
    }

    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, Failed> {
        let request = self.request(blob, (from > 0).then_some(RangeRequest::From(from)));
        self.0.permit(&request.place, Requester::Client).map_err(failed)?;
        let answer = self.0.blob(&request).await.map_err(failed)?;
        Ok(BlobStream { pieces: Pieces::Inside(answer.body), was_kept: is_kept(answer.from) })
    }

    async fn keeps(&self, blob: &PlannedBlob) -> Result<bool, Failed> {
        let (_, from) = self.0.blob_length(&self.request(blob, None)).await.map_err(failed)?;
        Ok(is_kept(from))
    }

    fn wants(&self, blob: &PlannedBlob) -> bool {
        self.0.is_owned_here(&self.place(&blob.image), &blob.digest)
    }
}

impl InProcessSource {
    /// Where an image is pulled from.
    pub fn place(&self, image: &ImageName) -> RepositoryRef {
        self.0.place(image.registry.clone(), image.repository.clone())
    }

    fn request(&self, blob: &PlannedBlob, range: Option<RangeRequest>) -> BlobRequest {
        let (place, digest) = (self.place(&blob.image), blob.digest.clone());
        BlobRequest { place, digest, range, named_by: RegistryFrom::Namespace, asking: RequestContext::CLIENT }
    }
}

fn is_kept(from: ServedFrom) -> bool {
    matches!(from, ServedFrom::Memory | ServedFrom::Disk)
}

fn failed(refusal: PullError) -> Failed {
    match refusal {
        PullError::Upstream { error, .. } if error.status >= 500 => Failed::Passing(error.to_string()),
        PullError::Upstream { error, .. } => Failed::ForGood(error.to_string()),
        PullError::Busy => Failed::Passing("too many requests at once".into()),
        PullError::Unavailable(why) | PullError::NoWay(why) | PullError::Limited(why) | PullError::BadOrigin(why) => {
            Failed::Passing(why)
        }
        PullError::NotFound { message, .. } | PullError::Denied(message) | PullError::Guarded(message) => {
            Failed::ForGood(message)
        }
        PullError::NotKept | PullError::Unsatisfiable { .. } => Failed::ForGood("it cannot be gone on with".to_owned()),
    }
}
