//! Blobs that were begun and left: kept for a while, so that a later pull goes on where they stopped.

use std::time::Instant;

use super::draft::Draft;
use crate::oci::{Digest, Registry, Spans};
use crate::provenance::Provenance;
use crate::times::OBSERVATION_TTL;

/// A blob of which some bytes are there. Nothing about them is proven.
pub struct Partial {
    pub draft: Draft,
    /// Which bytes are there.
    pub written: Spans,
}

/// All partials, oldest first.
#[derive(Default)]
pub(super) struct Partials {
    kept: Vec<PartialEntry>,
}

struct PartialEntry {
    digest: Digest,
    /// Bytes of one registry are no help to another: they are proven only at their end.
    registry: Registry,
    partial: Partial,
    since: Instant,
}

const MAX_COUNT: usize = 64;

impl Partials {
    /// Keeps a partial; all together take at most `limit` bytes of disk. Gives what had to go.
    pub(super) fn keep(
        &mut self,
        digest: &Digest,
        registry: &Registry,
        partial: Partial,
        limit: u64,
        now: Instant,
    ) -> Vec<Partial> {
        let is_replaced = |kept: &mut PartialEntry| (&kept.digest, &kept.registry) == (digest, registry);
        let mut dropped: Vec<_> = self.kept.extract_if(.., is_replaced).map(|kept| kept.partial).collect();
        let (digest, registry) = (digest.clone(), registry.clone());
        self.kept.push(PartialEntry { digest, registry, partial, since: now });
        while self.kept.len() > MAX_COUNT || self.bytes() > limit {
            dropped.push(self.kept.remove(0).partial);
        }
        dropped
    }

    /// Takes one that `fits`; another one stays for whom it does.
    pub(super) fn take(
        &mut self,
        digest: &Digest,
        registry: &Registry,
        fits: impl Fn(&Provenance) -> bool,
    ) -> Option<Partial> {
        let is_it = |kept: &PartialEntry| {
            let from = kept.partial.draft.blob.provenance.as_ref();
            (&kept.digest, &kept.registry) == (digest, registry) && from.is_some_and(&fits)
        };
        let at = self.kept.iter().position(is_it)?;
        Some(self.kept.remove(at).partial)
    }

    /// Takes those that nobody went on with in a while.
    pub(super) fn take_old(&mut self, now: Instant) -> Vec<Partial> {
        let old = self.kept.extract_if(.., |kept| now.duration_since(kept.since) >= OBSERVATION_TTL);
        old.map(|kept| kept.partial).collect()
    }

    /// Takes the oldest.
    pub(super) fn take_one(&mut self) -> Option<Partial> {
        (!self.kept.is_empty()).then(|| self.kept.remove(0).partial)
    }

    /// Disk space that they hold.
    pub(super) fn bytes(&self) -> u64 {
        self.kept.iter().map(|kept| kept.partial.draft.blob.charge.bytes()).sum()
    }
}
