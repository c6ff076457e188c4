//! Where images are pulled: a dray's registry port, or the dray that this process is.

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::Response;

use super::plan::PlannedBlob;
use crate::oci::{ImageName, Reference};
use crate::pull::Body;
use crate::source::root_cause;

/// What answers as a registry does.
#[async_trait]
pub trait ImageSource: Send + Sync {
    /// A manifest, not yet verified.
    async fn manifest(&self, image: &ImageName, reference: &Reference) -> Result<Bytes, Failed>;
    /// A blob from a byte on.
    async fn blob(&self, blob: &PlannedBlob, from: u64) -> Result<BlobStream, Failed>;
    /// Whether a blob is kept, now.
    async fn keeps(&self, blob: &PlannedBlob) -> Result<bool, Failed>;
    /// Whether a blob is wanted here: others may be who keeps it.
    fn wants(&self, blob: &PlannedBlob) -> bool;
}

/// A blob on its way.
pub struct BlobStream {
    pub pieces: Pieces,
    /// Whether it was there before.
    pub was_kept: bool,
}

pub enum Pieces {
    Http(Box<Response>),
    Inside(Body),
}

/// Why there is nothing, and whether to try again.
#[derive(Debug)]
pub enum Failed {
    Passing(String),
    ForGood(String),
}

impl Pieces {
    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failed> {
        match self {
            Self::Http(response) => {
                response.chunk().await.map_err(|error| Failed::Passing(root_cause(&error.without_url())))
            }
            Self::Inside(body) => body.next().await.map_err(|broken| Failed::Passing(broken.to_string())),
        }
    }
}
