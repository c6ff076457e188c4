//! The dray that this process is: what `[[prefetch]]` pulls. Each node only fetches the blobs that it owns, so that a
//! cluster holds an image once, however many nodes have the same configuration.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::door::{Coming, Door, Failed, Pieces};
use super::plan::Blob;
use crate::oci::{ImageName, NamedBy, RangeRequest, Reference, accept};
use crate::pull::{Asker, Asking, BlobRequest, Pull, Refusal};
use crate::registries::Place;
use crate::source::ServedFrom;

pub struct Inside(pub Arc<Pull>);

#[async_trait]
impl Door for Inside {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, Failed> {
        let place = self.place(image);
        self.0.permit(&place, Asker::Client).map_err(failed)?;
        let accept = accept::merge(std::iter::empty());
        let answer = self.0.manifest(&place, reference, &accept, Asking::CLIENT).await.map_err(failed)?;
        Ok(answer.object.bytes)
    }

    async fn blob(&self, blob: &Blob, from: u64) -> Result<Coming, Failed> {
        let request = self.request(blob, (from > 0).then_some(RangeRequest::From(from)));
        self.0.permit(&request.place, Asker::Client).map_err(failed)?;
        let answer = self.0.blob(&request).await.map_err(failed)?;
        Ok(Coming { pieces: Pieces::Inside(answer.body), was_kept: is_kept(answer.from) })
    }

    async fn keeps(&self, blob: &Blob) -> Result<bool, Failed> {
        let (_, from) = self.0.blob_length(&self.request(blob, None)).await.map_err(failed)?;
        Ok(is_kept(from))
    }

    fn wants(&self, blob: &Blob) -> bool {
        self.0.is_owned_here(&self.place(&blob.image), &blob.digest)
    }
}

impl Inside {
    /// Where an image is pulled from.
    pub fn place(&self, image: &ImageName) -> Place {
        self.0.place(image.registry.clone(), image.repository.clone())
    }

    fn request(&self, blob: &Blob, range: Option<RangeRequest>) -> BlobRequest {
        let (place, digest) = (self.place(&blob.image), blob.digest.clone());
        BlobRequest { place, digest, range, named_by: NamedBy::Namespace, asking: Asking::CLIENT }
    }
}

fn is_kept(from: ServedFrom) -> bool {
    matches!(from, ServedFrom::Memory | ServedFrom::Disk)
}

fn failed(refusal: Refusal) -> Failed {
    match refusal {
        Refusal::Upstream { error, .. } if error.status >= 500 => Failed::Passing(error.to_string()),
        Refusal::Upstream { error, .. } => Failed::ForGood(error.to_string()),
        Refusal::Busy => Failed::Passing("too many requests at once".into()),
        Refusal::Unavailable(why) | Refusal::NoWay(why) | Refusal::Limited(why) | Refusal::BadOrigin(why) => {
            Failed::Passing(why)
        }
        Refusal::NotFound { message, .. } | Refusal::Denied(message) | Refusal::Guarded(message) => {
            Failed::ForGood(message)
        }
        Refusal::NotKept | Refusal::Unsatisfiable { .. } => Failed::ForGood("it cannot be gone on with".to_owned()),
    }
}
