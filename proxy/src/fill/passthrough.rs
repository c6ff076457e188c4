//! Streams that bypass the cache: ranges of blobs that are not cached, and whole blobs without space in the cache.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::fills::ContentSource;
use super::span_stream::SpanStream;
use super::{Fills, HELD_BYTES};
use crate::oci::{Digest, digest::DigestVerifier};
use crate::registries::RepositoryRef;
use crate::source::{Broken, ServedFrom};

/// A span of a blob, streamed from its source.
pub struct PassthroughStream {
    feed: SpanStream,
    /// For a whole blob: hashes the stream, and withholds its tail until the digest matches.
    check: Option<DigestCheck>,
}

/// Memory, in bytes, of a part of a blob whose client does not read. The connection to the source may buffer three
/// times as much (measured); the budget is a small enough share of the process memory for that. Larger: lazy
/// snapshotters can have fewer ranges in flight. Smaller: the memory of the process may exceed its limit.
pub const PART_BYTES: usize = 256 * 1024;

/// The same for a whole blob, of which the tail is withheld.
const WHOLE_BYTES: usize = 512 * 1024;

struct DigestCheck {
    verifier: DigestVerifier,
    tail: BytesMut,
    fills: Arc<Fills>,
    content: ContentSource,
}

impl PassthroughStream {
    /// A part of a blob, which is not verified: the client verifies the whole.
    pub fn part(feed: SpanStream) -> Self {
        Self { feed, check: None }
    }

    /// A whole blob, which completes only if it matches its digest.
    pub fn whole(feed: SpanStream, fills: &Arc<Fills>, digest: &Digest, repo_ref: &RepositoryRef) -> Self {
        let check = DigestCheck {
            verifier: digest.verifier(),
            tail: BytesMut::new(),
            fills: fills.clone(),
            content: ContentSource::new(repo_ref, digest),
        };
        Self { feed, check: Some(check) }
    }

    /// Memory, in bytes, that the stream takes while its client does not read.
    pub fn held(&self) -> usize {
        let limit = if self.check.is_some() { WHOLE_BYTES } else { PART_BYTES };
        usize::try_from(self.feed.left()).unwrap_or(usize::MAX).min(limit)
    }

    /// The client does not read: closes the connection to the source, and a part is requested again from its position.
    pub fn release(&mut self) {
        if self.check.is_none() {
            self.feed.release();
        }
    }

    pub fn served_from(&self) -> ServedFrom {
        self.feed.served_from()
    }

    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let piece = match self.feed.next().await {
                Ok(piece) => piece,
                Err(error) => {
                    if let Some(check) = &self.check
                        && error.is_not_found()
                        && self.feed.served_from() == ServedFrom::Peer
                    {
                        // The owner refuses to continue: its bytes turned out to be corrupt.
                        check.fills.distrust(check.content.clone());
                    }
                    return Err(Broken(error.to_string()));
                }
            };
            let Some(check) = &mut self.check else {
                return Ok(piece);
            };
            match piece {
                Some(piece) => {
                    check.verifier.update(&piece);
                    check.tail.extend_from_slice(&piece);
                    let held = usize::try_from(HELD_BYTES).unwrap_or(usize::MAX);
                    if check.tail.len() > held {
                        let ready = check.tail.len() - held;
                        return Ok(Some(check.tail.split_to(ready).freeze()));
                    }
                }
                None => {
                    let Some(check) = self.check.take() else { return Ok(None) };
                    if !check.verifier.verified() {
                        check.fills.distrust(check.content.clone());
                        return Err(Broken("the content does not match its digest".into()));
                    }
                    return Ok(Some(check.tail.freeze()).filter(|tail| !tail.is_empty()));
                }
            }
        }
    }
}
