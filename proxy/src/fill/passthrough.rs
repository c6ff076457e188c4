//! Bytes that pass through without being kept: ranges of blobs that are not here, and whole blobs
//! for which there is no space.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::fills::ContentSource;
use super::span_stream::SpanStream;
use super::{Fills, HELD_BYTES};
use crate::oci::{Digest, digest::DigestVerifier};
use crate::registries::RepositoryRef;
use crate::source::{Broken, ServedFrom};

/// A span of a blob straight from its source.
pub struct PassthroughStream {
    feed: SpanStream,
    /// For a whole blob: hashes what passes, and holds back the tail until the hash agrees.
    check: Option<DigestCheck>,
}

/// What a client that does not read makes a part hold, in bytes, and a whole blob, of which the tail is held back. It may
/// be three times as much (buffers of the connection to the source, measured), of which the budget is aware by its
/// part of the memory. Larger: fewer ranges that lazy snapshotters have in flight.
pub const PART_BYTES: usize = 256 * 1024;
const WHOLE_BYTES: usize = 512 * 1024;

struct DigestCheck {
    verifier: DigestVerifier,
    tail: BytesMut,
    fills: Arc<Fills>,
    content: ContentSource,
}

impl PassthroughStream {
    /// A part of a blob: its reader checks the whole.
    pub fn part(feed: SpanStream) -> Self {
        Self { feed, check: None }
    }

    /// A whole blob, which ends only if it matches its digest.
    pub fn whole(feed: SpanStream, fills: &Arc<Fills>, digest: &Digest, place: &RepositoryRef) -> Self {
        let check = DigestCheck {
            verifier: digest.verifier(),
            tail: BytesMut::new(),
            fills: fills.clone(),
            content: ContentSource::new(place, digest),
        };
        Self { feed, check: Some(check) }
    }

    /// Bytes of memory that it takes while its client does not read: buffers of the connection to the source, and the tail
    /// that is held back.
    pub fn held(&self) -> usize {
        let most = if self.check.is_some() { WHOLE_BYTES } else { PART_BYTES };
        usize::try_from(self.feed.left()).unwrap_or(usize::MAX).min(most)
    }

    /// The client does not read: a part is asked for again where it ended.
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
                        // The owner will not let us go on: what it sent proved wrong there.
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
                        return Err(Broken("the bytes do not match their digest".into()));
                    }
                    return Ok(Some(check.tail.freeze()).filter(|tail| !tail.is_empty()));
                }
            }
        }
    }
}
