//! Relayed blobs: verified blobs that another node owns, kept for a while and without a name. They serve peers that
//! fetch them at the same time, and a second pull on this node. Keeping them longer would waste space: the runtime has
//! written them to this disk already.

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
    entries: HashMap<Digest, RelayedEntry>,
}

struct RelayedEntry {
    blob: Arc<Blob>,
    last_used: Instant,
}

/// Relayed blobs take at most one part in this many of the disk, except that the newest one always fits. Larger: second
/// pulls miss more often. Smaller: copies take more of the disk.
const RELAYED_SHARE: u64 = 8;

/// A relayed blob without requests for this long is dropped. Longer: copies hold space. Shorter: a second pull fetches
/// them again.
const IDLE_TTL: Duration = Duration::from_secs(300);

/// Relayed blobs at a time, each with an open descriptor.
const MAX_RELAYED: usize = 1024;

impl Large {
    /// Keeps a draft for a while, unless the blob is indexed. Call only after its hash matched. Blocks on the disk.
    #[allow(clippy::needless_pass_by_value, reason = "a draft is kept once")]
    pub fn relay(&self, draft: Draft, digest: &Digest) {
        if self.is_owned(digest) {
            return;
        }
        let limit = self.budget.limit() / RELAYED_SHARE;
        let dropped = self.relayed.lock().insert(digest, draft.blob.clone(), limit, Instant::now());
        // Closing a file frees its blocks, which may take a while: not under the lock.
        drop(dropped);
    }
}

impl Relayed {
    /// Returns the blobs that it drops.
    fn insert(&mut self, digest: &Digest, blob: Arc<Blob>, limit: u64, now: Instant) -> Vec<Arc<Blob>> {
        let mut dropped: Vec<_> = self
            .entries
            .insert(digest.clone(), RelayedEntry { blob, last_used: now })
            .map(|entry| entry.blob)
            .into_iter()
            .collect();
        // The newest one is in use now, however large it is.
        while self.entries.len() > 1 && (self.bytes() > limit || self.entries.len() > MAX_RELAYED) {
            dropped.extend(self.take_oldest(|_| true));
        }
        dropped
    }

    pub(super) fn get(&mut self, digest: &Digest, now: Instant) -> Option<Arc<Blob>> {
        let entry = self.entries.get_mut(digest)?;
        if entry.blob.unreadable.load(Ordering::Relaxed) {
            self.entries.remove(digest);
            return None;
        }
        entry.last_used = now;
        Some(entry.blob.clone())
    }

    pub(super) fn take(&mut self, digest: &Digest) -> Option<Arc<Blob>> {
        self.entries.remove(digest).map(|entry| entry.blob)
    }

    pub(super) fn take_all(&mut self, is_taken: impl Fn(&Blob) -> bool) -> Vec<Arc<Blob>> {
        self.entries.extract_if(|_, entry| is_taken(&entry.blob)).map(|(_, entry)| entry.blob).collect()
    }

    /// Takes the blobs that were not requested for a while.
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<Arc<Blob>> {
        let old = self.entries.extract_if(|_, entry| now.duration_since(entry.last_used) >= IDLE_TTL);
        old.map(|(_, entry)| entry.blob).collect()
    }

    /// Takes the least recently used blob without readers.
    pub(super) fn take_idle(&mut self) -> Option<Arc<Blob>> {
        self.take_oldest(|entry| Arc::strong_count(&entry.blob) == 1)
    }

    /// Disk space that dropping the blobs without readers would free.
    pub(super) fn idle_bytes(&self) -> u64 {
        self.entries.values().filter(|entry| Arc::strong_count(&entry.blob) == 1).map(|entry| entry.blob.len).sum()
    }

    fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| entry.blob.len).sum()
    }

    fn take_oldest(&mut self, is_candidate: impl Fn(&RelayedEntry) -> bool) -> Option<Arc<Blob>> {
        let candidates = self.entries.iter().filter(|(_, entry)| is_candidate(entry));
        let oldest = candidates.min_by_key(|(_, entry)| entry.last_used).map(|(digest, _)| digest.clone());
        self.entries.remove(&oldest?).map(|entry| entry.blob)
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
    fn relayed_blob_is_found_without_a_name() {
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
    fn relayed_blobs_are_bounded_and_evicted_first() {
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
    fn relayed_blob_without_requests_expires() {
        let mut relayed = Relayed::default();
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 1 << 20);
        let now = Instant::now();
        for (byte, used) in [(b'a', now), (b'b', now + IDLE_TTL / 2)] {
            let blob = large.draft(1000, provenance()).unwrap().blob.clone();
            relayed.insert(&Digest::of(&[byte]), blob, u64::MAX, used);
        }
        assert_eq!(relayed.take_expired(now + IDLE_TTL).len(), 1);
        assert!(relayed.get(&Digest::of(b"a"), now).is_none());
        assert!(relayed.get(&Digest::of(b"b"), now).is_some());
        assert_eq!(relayed.idle_bytes(), 1000);
    }
}
