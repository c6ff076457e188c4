//! Partials: unfinished blobs, kept for a while so that a later pull resumes them, also after a restart.

use std::time::Instant;

use super::draft::Draft;
use super::large::Blob;
use crate::oci::{Digest, Registry, Spans};
use crate::provenance::Provenance;
use crate::times::OBSERVATION_TTL;

/// A blob with some of its bytes, none of them verified.
pub struct Partial {
    pub draft: Draft,
    /// The bytes that are present.
    pub written: Spans,
}

/// All partials, oldest first.
#[derive(Default)]
pub(super) struct Partials {
    entries: Vec<PartialEntry>,
}

struct PartialEntry {
    digest: Digest,
    /// Bytes of one registry do not serve another: they are verified only when the blob is whole.
    registry: Registry,
    partial: Partial,
    since: Instant,
}

/// Partials at a time, each with an open descriptor. Fewer: fewer downloads can resume.
const MAX_PARTIALS: usize = 64;

impl Partials {
    /// Keeps a partial, replacing one of the same blob and registry. All together take at most `limit` bytes of disk,
    /// except that the newest and the largest one always fit: the download of a very large blob must not begin again.
    /// Returns the partials that it drops.
    pub(super) fn insert(
        &mut self,
        digest: &Digest,
        registry: &Registry,
        partial: Partial,
        limit: u64,
        now: Instant,
    ) -> Vec<Partial> {
        let is_replaced = |entry: &mut PartialEntry| (&entry.digest, &entry.registry) == (digest, registry);
        let mut dropped: Vec<_> = self.entries.extract_if(.., is_replaced).map(|entry| entry.partial).collect();
        let (digest, registry) = (digest.clone(), registry.clone());
        self.entries.push(PartialEntry { digest, registry, partial, since: now });
        while self.entries.len() > MAX_PARTIALS || self.bytes() > limit {
            let newest = self.entries.len().saturating_sub(1);
            let largest = (0..self.entries.len()).max_by_key(|nth| self.entries[*nth].bytes());
            let Some(victim) = (0..newest).find(|nth| Some(*nth) != largest) else { break };
            dropped.push(self.entries.remove(victim).partial);
        }
        dropped
    }

    /// Takes a partial whose provenance `fits`; others stay.
    pub(super) fn take(
        &mut self,
        digest: &Digest,
        registry: &Registry,
        fits: impl Fn(&Provenance) -> bool,
    ) -> Option<Partial> {
        let is_match = |entry: &PartialEntry| {
            let from = entry.partial.draft.blob.provenance.as_ref();
            (&entry.digest, &entry.registry) == (digest, registry) && from.is_some_and(&fits)
        };
        let at = self.entries.iter().position(is_match)?;
        Some(self.entries.remove(at).partial)
    }

    /// Takes the partials of a blob, of whichever registry.
    pub(super) fn take_all(&mut self, digest: &Digest) -> Vec<Partial> {
        self.entries.extract_if(.., |entry| entry.digest == *digest).map(|entry| entry.partial).collect()
    }

    pub(super) fn take_where(&mut self, is_taken: impl Fn(&Blob) -> bool) -> Vec<Partial> {
        self.entries.extract_if(.., |entry| is_taken(&entry.partial.draft.blob)).map(|entry| entry.partial).collect()
    }

    /// Takes the partials that no download resumed within [`OBSERVATION_TTL`].
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<Partial> {
        let old = self.entries.extract_if(.., |entry| now.duration_since(entry.since) >= OBSERVATION_TTL);
        old.map(|entry| entry.partial).collect()
    }

    /// Takes the oldest partial.
    pub(super) fn take_oldest(&mut self) -> Option<Partial> {
        (!self.entries.is_empty()).then(|| self.entries.remove(0).partial)
    }

    /// Disk space of all partials.
    pub(super) fn bytes(&self) -> u64 {
        self.entries.iter().map(PartialEntry::bytes).sum()
    }
}

impl PartialEntry {
    fn bytes(&self) -> u64 {
        self.partial.draft.blob.charge.bytes()
    }
}
