//! Where a blob is fetched from: its owner among the peers, then the origin.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{FIRST_BYTE, Pull};
use crate::fill::{Side, Sources};
use crate::oci::Digest;
use crate::registries::Place;
use crate::source::{Incoming, Part, ServedFrom, SourceError};

/// The sources of one blob.
pub(super) struct BlobSources {
    pub(super) pull: Arc<Pull>,
    pub(super) place: Place,
    pub(super) digest: Digest,
    pub(super) side: Side,
}

/// After so many broken sources the owners are no longer asked.
const ASK_OWNERS: u32 = 3;

#[async_trait]
impl Sources for BlobSources {
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        let part = Part::new(from, end);
        // When a connection breaks, the owner still has, or fetches, what comes next: asking it
        // again keeps every follower from going to the origin.
        if self.side == Side::Follower
            && failures < ASK_OWNERS
            && let Some(incoming) = self.ask_owners(part).await?
        {
            return Ok((incoming, ServedFrom::Peer));
        }
        if failures > 0 {
            self.pull.origin.forget_redirects(&self.place, &self.digest).await;
        }
        let deadline = Instant::now() + FIRST_BYTE;
        let incoming = self.pull.origin.blob(&self.place, &self.digest, part, deadline).await?;
        Ok((incoming, ServedFrom::Origin))
    }

    /// An owner is asked for everything in one stream: it fetches by ranges itself.
    fn gives_ranges(&self) -> bool {
        self.side == Side::Owner
    }
}

impl BlobSources {
    /// None: this process is the owner, or no owner can be reached. A silent owner is followed by
    /// its successor, not by everybody's going to the origin.
    async fn ask_owners(&self, part: Part) -> Result<Option<Incoming>, SourceError> {
        let Some(peers) = &self.pull.peers else { return Ok(None) };
        for owner in peers.owners(&self.digest) {
            let deadline = Instant::now() + FIRST_BYTE;
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
