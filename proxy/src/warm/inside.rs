//! The dray that this process is: what `[[prefetch]]` pulls. Each node only fetches the blobs that it owns, so that a
//! cluster holds an image once, however many nodes have the same configuration.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::door::{Coming, Door, Failed, Pieces};
use super::plan::Blob;
use crate::oci::{ImageName, NamedBy, RangeRequest, Reference, accept};
use crate::pull::{Asker, Asking, BlobRequest, Pull, Refusal};
use crate::source::ServedFrom;

pub struct Inside(pub Arc<Pull>);

#[async_trait]
impl Door for Inside {
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, Failed> {
        let place = self.0.place(image.registry.clone(), image.repository.clone());
        self.0.permit(&place, Asker::Client).map_err(failed)?;
        let accept = accept::merge(std::iter::empty());
        let answer = self.0.manifest(&place, reference, &accept, Asking::CLIENT).await.map_err(failed)?;
        Ok(answer.object.bytes)
    }

    async fn blob(&self, blob: &Blob, from: u64) -> Result<Coming, Failed> {
        let place = self.0.place(blob.image.registry.clone(), blob.image.repository.clone());
        self.0.permit(&place, Asker::Client).map_err(failed)?;
        let range = (from > 0).then_some(RangeRequest::From(from));
        let (digest, asking) = (blob.digest.clone(), Asking::CLIENT);
        let request = BlobRequest { place, digest, range, named_by: NamedBy::Namespace, asking };
        let answer = self.0.blob(&request).await.map_err(failed)?;
        let was_kept = matches!(answer.from, ServedFrom::Memory | ServedFrom::Disk);
        Ok(Coming { pieces: Pieces::Inside(answer.body), was_kept })
    }

    async fn keeps(&self, blob: &Blob) -> Result<bool, Failed> {
        let place = self.0.place(blob.image.registry.clone(), blob.image.repository.clone());
        let (digest, asking) = (blob.digest.clone(), Asking::CLIENT);
        let request = BlobRequest { place, digest, range: None, named_by: NamedBy::Namespace, asking };
        let (_, from) = self.0.blob_length(&request).await.map_err(failed)?;
        Ok(matches!(from, ServedFrom::Memory | ServedFrom::Disk))
    }

    fn wants(&self, blob: &Blob) -> bool {
        let place = self.0.place(blob.image.registry.clone(), blob.image.repository.clone());
        self.0.is_owned_here(&place, &blob.digest)
    }
}

fn failed(refusal: Refusal) -> Failed {
    match refusal {
        Refusal::Unavailable(why) | Refusal::BadOrigin(why) => Failed::Passing(why),
        Refusal::NotFound { message, .. } | Refusal::Denied(message) => Failed::ForGood(message),
        Refusal::NotKept | Refusal::Unsatisfiable { .. } => Failed::ForGood("it cannot be gone on with".to_owned()),
    }
}
