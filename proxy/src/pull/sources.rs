//! Where a blob is fetched from: its owner among the peers, then the origin.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{FIRST_BYTE, Pull};
use crate::fill::Sources;
use crate::oci::Digest;
use crate::registries::Place;
use crate::source::{Incoming, Part, ServedFrom, SourceError};

/// The sources of one blob.
pub(super) struct BlobSources {
    pub(super) pull: Arc<Pull>,
    pub(super) place: Place,
    pub(super) digest: Digest,
    pub(super) peers: AskPeers,
}

/// Whether peers may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AskPeers {
    /// A client asks: the owner fetches for all.
    Yes,
    /// A peer asks, or peers must not see this: straight to the origin.
    No,
}

#[async_trait]
impl Sources for BlobSources {
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        let part = Part::new(from, end);
        let deadline = Instant::now() + FIRST_BYTE;
        if failures == 0
            && self.peers == AskPeers::Yes
            && let Some(incoming) = self.ask_owner(part, deadline).await?
        {
            return Ok((incoming, ServedFrom::Peer));
        }
        let deadline = Instant::now() + FIRST_BYTE;
        let incoming = self.pull.origin.blob(&self.place, &self.digest, part, deadline).await?;
        Ok((incoming, ServedFrom::Origin))
    }
}

impl BlobSources {
    /// None: this process is the owner, or no owner can be reached.
    async fn ask_owner(&self, part: Part, deadline: Instant) -> Result<Option<Incoming>, SourceError> {
        let Some(peers) = &self.pull.peers else { return Ok(None) };
        for owner in peers.owners(&self.digest) {
            match peers.blob(owner, &self.place, &self.digest, part, deadline).await {
                Ok(incoming) => return Ok(Some(incoming)),
                // The owner has asked the origin with the same credentials: none.
                Err(error @ (SourceError::NotFound | SourceError::Denied)) => return Err(error),
                Err(error) => tracing::info!(%owner, digest = %self.digest, %error, "the owner gives nothing"),
            }
        }
        Ok(None)
    }
}
