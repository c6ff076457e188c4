//! The two sources to pull images through: the registry port of a dray, or this process.

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::Response;

use super::plan::PlannedBlob;
use crate::oci::{ImageName, Reference};
use crate::pull::Body;
use crate::source::root_cause;

/// A source of manifests and blobs.
#[async_trait]
pub trait ImageSource: Send + Sync {
    /// A manifest; the caller verifies its digest.
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, FetchError>;
    /// A blob, from the byte `from` to its end.
    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, FetchError>;
    /// Whether the blob is in the cache now.
    async fn is_cached(&self, blob: &PlannedBlob) -> Result<bool, FetchError>;
    /// Whether to warm the blob through this source; false if another peer owns the blob.
    fn is_responsible_for(&self, blob: &PlannedBlob) -> bool;
}

/// A blob that is being received.
pub struct BlobStream {
    pub chunks: Chunks,
    /// The blob was a cache hit.
    pub was_cached: bool,
}

pub enum Chunks {
    Http(Box<Response>),
    InProcess(Body),
}

/// Why a request failed, and whether a retry may help.
#[derive(Debug)]
pub enum FetchError {
    Temporary(String),
    Permanent(String),
}

impl Chunks {
    /// The next chunk; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        match self {
            Self::Http(response) => {
                response.chunk().await.map_err(|error| FetchError::Temporary(root_cause(&error.without_url())))
            }
            Self::InProcess(body) => body.next().await.map_err(|error| FetchError::Temporary(error.to_string())),
        }
    }
}
