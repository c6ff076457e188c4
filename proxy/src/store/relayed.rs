//! Blobs that another node owns: verified, but kept only for a while and without a name, for the peers
//! that fetch them at the same time and for a second pull on this node. The runtime that asked has
//! written them to this disk once already.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::draft::Draft;
use super::large::{Blob, Large};
use crate::oci::Digest;

/// All relayed blobs.
#[derive(Default)]
pub(super) struct Relayed {
    kept: HashMap<Digest, RelayedEntry>,
}

struct RelayedEntry {
    blob: Arc<Blob>,
    last_used: Instant,
}

/// Together they take at most this part of the disk, however small the last one is.
const RELAYED_PART: u64 = 8;

/// One that nobody has asked for this long is given up.
const UNUSED: Duration = Duration::from_secs(300);

/// Each takes a descriptor.
const MAX_COUNT: usize = 1024;

impl Large {
    /// Keeps a draft for a while, unless there is another copy. Call it only after its hash agreed. Blocks on the disk.
    #[allow(clippy::needless_pass_by_value, reason = "a draft is kept once")]
    pub fn relay(&self, draft: Draft, digest: &Digest) {
        if self.is_owned(digest) {
            return;
        }
        let limit = self.budget.limit() / RELAYED_PART;
        let dropped = self.relayed.lock().keep(digest, draft.blob.clone(), limit, Instant::now());
        // Closing them frees their space, which may take a while: not under the lock.
        drop(dropped);
    }
}

impl Relayed {
    /// Gives what had to go.
    fn keep(&mut self, digest: &Digest, blob: Arc<Blob>, limit: u64, now: Instant) -> Vec<Arc<Blob>> {
        let mut dropped: Vec<_> = self
            .kept
            .insert(digest.clone(), RelayedEntry { blob, last_used: now })
            .map(|kept| kept.blob)
            .into_iter()
            .collect();
        // The last one is wanted now, however large it is.
        while self.kept.len() > 1 && (self.bytes() > limit || self.kept.len() > MAX_COUNT) {
            dropped.extend(self.take_oldest(|_| true));
        }
        dropped
    }

    pub(super) fn get(&mut self, digest: &Digest, now: Instant) -> Option<Arc<Blob>> {
        let kept = self.kept.get_mut(digest)?;
        if kept.blob.unreadable.load(Ordering::Relaxed) {
            self.kept.remove(digest);
            return None;
        }
        kept.last_used = now;
        Some(kept.blob.clone())
    }

    /// Takes those that were not asked for in a while.
    pub(super) fn take_old(&mut self, now: Instant) -> Vec<Arc<Blob>> {
        let old = self.kept.extract_if(|_, kept| now.duration_since(kept.last_used) >= UNUSED);
        old.map(|(_, kept)| kept.blob).collect()
    }

    /// Takes the one that was not asked for the longest, of those that nobody reads.
    pub(super) fn take_one(&mut self) -> Option<Arc<Blob>> {
        self.take_oldest(|kept| Arc::strong_count(&kept.blob) == 1)
    }

    /// Disk space that giving them up would free.
    pub(super) fn idle_bytes(&self) -> u64 {
        self.kept.values().filter(|kept| Arc::strong_count(&kept.blob) == 1).map(|kept| kept.blob.len).sum()
    }

    fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.blob.len).sum()
    }

    fn take_oldest(&mut self, counts: impl Fn(&RelayedEntry) -> bool) -> Option<Arc<Blob>> {
        let candidates = self.kept.iter().filter(|(_, kept)| counts(kept));
        let oldest = candidates.min_by_key(|(_, kept)| kept.last_used).map(|(digest, _)| digest.clone());
        self.kept.remove(&oldest?).map(|kept| kept.blob)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::super::layout::Layout;
    use super::*;
    use crate::metrics::Metrics;
    use crate::provenance::Provenance;

    fn provenance() -> Provenance {
        Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "library/a".into() }
    }

    fn large(dir: &Path, limit: u64) -> Large {
        Large::open(&Layout::open(dir).unwrap(), limit, &Metrics::new()).unwrap()
    }

    fn relay(large: &Large, byte: u8, len: usize) -> Digest {
        let bytes = vec![byte; len];
        let digest = Digest::of(&bytes);
        let draft = large.draft(len as u64, provenance()).unwrap();
        large.reserve(&draft.blob, len as u64).and_then(|()| large.write(&draft.blob, &bytes, 0)).unwrap();
        large.relay(draft, &digest);
        digest
    }

    #[test]
    fn a_relayed_blob_is_found_and_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let digest = {
            let large = large(dir.path(), 1 << 20);
            let digest = relay(&large, b'a', 1000);
            let (blob, _) = large.get(&digest).unwrap();
            let mut read = [0; 1000];
            blob.file.read_exact_at(&mut read, 0).unwrap();
            assert_eq!((read[0], blob.provenance.clone()), (b'a', Some(provenance())));
            assert_eq!(std::fs::read_dir(dir.path().join("v1/fills")).unwrap().count(), 0);
            assert!(!large.path(&digest).exists());
            digest
        };
        assert!(large(dir.path(), 1 << 20).get(&digest).is_none());
    }

    #[test]
    fn relayed_blobs_take_a_small_part_of_the_disk_and_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 800_000);
        let [a, b, c] = [b'a', b'b', b'c'].map(|byte| relay(&large, byte, 45_000));
        assert!(large.get(&a).is_none(), "an eighth is room for two");
        assert!(large.get(&b).is_some());
        let reader = large.get(&c).unwrap();
        let d = relay(&large, b'd', 300_000);
        assert!(large.get(&d).is_some() && large.get(&b).is_none(), "the last one, however large");
        drop(reader);
        let draft = large.draft(700_000, provenance()).unwrap();
        assert!(large.get(&d).is_some(), "what is only announced takes nothing");
        assert!(large.reserve(&draft.blob, 700_000).is_ok(), "it makes room for what is owned");
        assert!(large.get(&d).is_none());
    }

    #[test]
    fn what_nobody_asks_for_is_given_up() {
        let mut relayed = Relayed::default();
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 1 << 20);
        let now = Instant::now();
        for (byte, used) in [(b'a', now), (b'b', now + UNUSED / 2)] {
            let blob = large.draft(1000, provenance()).unwrap().blob.clone();
            relayed.keep(&Digest::of(&[byte]), blob, u64::MAX, used);
        }
        assert_eq!(relayed.take_old(now + UNUSED).len(), 1);
        assert!(relayed.get(&Digest::of(b"a"), now).is_none());
        assert!(relayed.get(&Digest::of(b"b"), now).is_some());
        assert_eq!(relayed.idle_bytes(), 1000);
    }
}
