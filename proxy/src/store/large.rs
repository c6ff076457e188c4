//! Large blobs: one verified file each, least recently used out first.
//!
//! Order of publication: the hash agrees, the blob is announced and its readers get the tail; then its
//! record and itself get their names. The kernel writes them to the disk when it likes, so as not to
//! hold up whoever else writes: a crash of the machine begins a new epoch, in which a blob is hashed
//! before it is believed. Bytes are written once per inode; a file under its final name is never
//! written again, only unlinked.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::{Mutex, RwLock};
use prometheus::IntCounter;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::budget::{Budget, Charge};
use super::draft::{Draft, Promise};
use super::evict::{Candidate, FileSystem};
use super::files::{self, Record};
use super::layout::Layout;
use super::partial::Partials;
use super::piece_memory::PieceMemory;
use super::relayed::Relayed;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::provenance::Provenance;
use crate::times::{DEFAULT_TTL, TOUCH_INTERVAL};

/// The verified files and their index.
pub struct Large {
    pub(super) blobs: PathBuf,
    pub(super) fills: PathBuf,
    pub(super) budget: Arc<Budget>,
    index: Mutex<HashMap<Digest, BlobEntry>>,
    pub(super) partials: Mutex<Partials>,
    pub(super) promises: Mutex<Vec<Promise>>,
    pub(super) relayed: Mutex<Relayed>,
    /// What is to stay while anything else can go.
    pinned: ArcSwap<HashSet<Digest>>,
    evicted: IntCounter,
    pub(super) next_draft: AtomicU64,
    /// What was proven in another one has to be proven again.
    epoch: String,
    /// Whether nothing gets a name any more. Held while something does.
    pub(super) sealed: RwLock<bool>,
    pub(super) pieces: Arc<PieceMemory>,
}

/// An open blob, or one that is being written. Its bytes stay readable, and counted, until the
/// last reader lets go, wherever its name went.
pub struct Blob {
    pub file: File,
    pub len: u64,
    /// None: its record was lost.
    pub provenance: Option<Provenance>,
    pub(super) charge: Arc<Charge>,
    /// The disk could not read it.
    pub(super) unreadable: Arc<AtomicBool>,
    /// The memory that it is read into.
    pub pieces: Arc<PieceMemory>,
}

/// Whether a file can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verification {
    /// Its hash agreed, and nothing happened to the machine since.
    Verified,
    /// The machine went down since: hash it before its last byte leaves.
    Unproven,
}

struct BlobEntry {
    len: u64,
    /// None: its record was not read yet.
    proof: Option<Verification>,
    last_used: SystemTime,
    /// How often it was used, at different times, since this process found it.
    uses: u32,
    /// When `last_used` was last written to the file's times.
    touched: SystemTime,
    charge: Arc<Charge>,
    unreadable: Arc<AtomicBool>,
    open: Weak<Blob>,
}

/// Where a blob is, as far as that is known without asking the disk.
pub enum BlobLocation {
    Open(Arc<Blob>, Verification),
    OnDisk,
    Nowhere,
}

impl BlobEntry {
    /// What somebody has open.
    fn opened(&self) -> Option<(Arc<Blob>, Verification)> {
        if self.unreadable.load(Ordering::Relaxed) {
            return None;
        }
        Some((self.open.upgrade()?, self.proof?))
    }

    /// Whether the file's times are to be renewed.
    fn is_touch_due(&self, now: SystemTime) -> bool {
        now.duration_since(self.touched).is_ok_and(|age| age > TOUCH_INTERVAL)
    }

    /// The same, once for each time.
    fn take_touch(&mut self, now: SystemTime) -> bool {
        let is_due = self.is_touch_due(now);
        if is_due {
            self.touched = now;
        }
        is_due
    }
}

impl Blob {
    /// Says that the disk could not read it: it is not found again.
    pub fn failed(&self, error: &io::Error) {
        if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
            self.unreadable.store(true, Ordering::Relaxed);
        }
    }
}

/// What a file takes beyond its bytes: rounding to blocks, inode, record.
pub(super) const FILE_OVERHEAD: u64 = 8192;

// === impl Large ===

impl Large {
    /// Bytes taken, and those that may be.
    pub fn usage(&self) -> (u64, u64) {
        (self.budget.used(), self.budget.limit())
    }

    /// How many have a name.
    pub(super) fn count(&self) -> usize {
        self.index.lock().len()
    }

    pub(super) fn open(layout: &Layout, limit: u64, metrics: &Metrics) -> io::Result<Self> {
        let budget = Budget::new(limit, metrics.cache_bytes.with_label_values(&["large"]));
        metrics.cache_limit.with_label_values(&["large"]).set(i64::try_from(limit).unwrap_or(i64::MAX));
        let found = files::scan(&layout.blobs())?;
        let index = found.into_iter().map(|found| {
            let charge = Arc::new(budget.account(found.len + FILE_OVERHEAD));
            let (len, last_used) = (found.len, found.modified);
            let entry = BlobEntry {
                len,
                proof: None,
                last_used,
                uses: 1,
                touched: last_used,
                charge,
                unreadable: Arc::default(),
                open: Weak::new(),
            };
            (found.digest, entry)
        });
        let index = index.collect();
        let large = Self {
            blobs: layout.blobs(),
            fills: layout.fills(),
            budget,
            index: Mutex::new(index),
            partials: Mutex::default(),
            promises: Mutex::default(),
            relayed: Mutex::default(),
            pinned: ArcSwap::default(),
            evicted: metrics.evicted_bytes.clone(),
            next_draft: AtomicU64::new(0),
            epoch: layout.epoch().to_owned(),
            sealed: RwLock::default(),
            pieces: Arc::default(),
        };
        // The limit may have been lowered since.
        large.shrink_to(limit);
        Ok(large)
    }

    /// Marks a blob as used, and gives it if that needs no word of the disk.
    pub fn look(&self, digest: &Digest) -> BlobLocation {
        let now = SystemTime::now();
        let mut index = self.index.lock();
        let Some(entry) = index.get_mut(digest) else {
            drop(index);
            let relayed = self.relayed.lock().get(digest, Instant::now());
            return relayed.map_or(BlobLocation::Nowhere, |blob| BlobLocation::Open(blob, Verification::Verified));
        };
        if now.duration_since(entry.last_used).is_ok_and(|age| age > DEFAULT_TTL) {
            entry.uses = entry.uses.saturating_add(1);
        }
        entry.last_used = now;
        match entry.opened() {
            Some((blob, proof)) if !entry.is_touch_due(now) => BlobLocation::Open(blob, proof),
            _ => BlobLocation::OnDisk,
        }
    }

    /// Opens a blob and marks it as used. Blocks on the disk.
    pub fn get(&self, digest: &Digest) -> Option<(Arc<Blob>, Verification)> {
        match self.look(digest) {
            BlobLocation::Open(blob, proof) => Some((blob, proof)),
            BlobLocation::Nowhere => None,
            BlobLocation::OnDisk => {
                let (blob, proof) = self.peek(digest)?;
                let now = SystemTime::now();
                let is_touch_due = self.index.lock().get_mut(digest).is_some_and(|entry| entry.take_touch(now));
                if is_touch_due {
                    files::touch(&blob.file, now);
                }
                Some((blob, proof))
            }
        }
    }

    pub(super) fn is_owned(&self, digest: &Digest) -> bool {
        self.index.lock().contains_key(digest)
    }

    /// All blobs.
    pub fn digests(&self) -> Vec<Digest> {
        self.index.lock().keys().cloned().collect()
    }

    /// Opens a blob as the scrub does, which is no use. Blocks on the disk, and holds no lock while it does.
    pub fn peek(&self, digest: &Digest) -> Option<(Arc<Blob>, Verification)> {
        let (len, charge, unreadable) = {
            let mut index = self.index.lock();
            let entry = index.get_mut(digest)?;
            if let Some(opened) = entry.opened() {
                return Some(opened);
            }
            (entry.len, entry.charge.clone(), entry.unreadable.clone())
        };
        if unreadable.load(Ordering::Relaxed) {
            tracing::warn!(%digest, "the disk cannot read a cached blob, it is given up");
            self.give_up(digest, &charge);
            return None;
        }
        match files::open(&self.path(digest), len) {
            Ok((file, record)) => {
                let mut index = self.index.lock();
                // It may have been evicted meanwhile, or opened by somebody else.
                let entry = index.get_mut(digest).filter(|entry| Arc::ptr_eq(&entry.charge, &charge))?;
                if let Some(opened) = entry.opened() {
                    return Some(opened);
                }
                let known = record.as_ref().is_some_and(|record| record.epoch == self.epoch);
                let proof =
                    *entry.proof.get_or_insert(if known { Verification::Verified } else { Verification::Unproven });
                let blob = Arc::new(Blob {
                    file,
                    len,
                    provenance: record.map(|record| record.provenance),
                    charge,
                    unreadable,
                    pieces: self.pieces.clone(),
                });
                entry.open = Arc::downgrade(&blob);
                Some((blob, proof))
            }
            Err(error) => {
                tracing::warn!(%digest, %error, "a cached blob cannot be read");
                // Any other error, such as too many open files, says nothing about the blob.
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) {
                    self.give_up(digest, &charge);
                }
                None
            }
        }
    }

    /// Drops what cannot be read, unless another copy has taken its place.
    fn give_up(&self, digest: &Digest, charge: &Arc<Charge>) {
        let mut index = self.index.lock();
        if index.get(digest).is_some_and(|entry| Arc::ptr_eq(&entry.charge, charge)) {
            index.remove(digest);
            drop(index);
            self.unlink(digest);
        }
    }

    /// Makes a draft known before it has its name: from now on it is found. Call it only after its
    /// hash agreed.
    pub fn announce(&self, draft: &Draft, digest: &Digest) {
        let now = SystemTime::now();
        let entry = BlobEntry {
            len: draft.blob.len,
            proof: Some(Verification::Verified),
            last_used: now,
            uses: 1,
            touched: now,
            charge: draft.blob.charge.clone(),
            unreadable: draft.blob.unreadable.clone(),
            // The draft keeps it open until it has its name.
            open: Arc::downgrade(&draft.blob),
        };
        self.index.lock().insert(digest.clone(), entry);
    }

    pub(super) fn write_record(&self, digest: &Digest, blob: &Blob) -> io::Result<()> {
        let Some(provenance) = blob.provenance.clone() else { return Ok(()) };
        let record = Record { provenance, epoch: self.epoch.clone() };
        let new = self.fills.join(format!("{}.json", self.next_draft.fetch_add(1, Ordering::Relaxed)));
        fs::write(&new, serde_json::to_vec(&record)?)?;
        fs::rename(new, files::record_path(&self.path(digest)))
    }

    /// Remembers that an unproven file turned out to be right. Blocks on the disk.
    pub fn prove(&self, digest: &Digest, blob: &Blob) {
        if let Some(entry) = self.index.lock().get_mut(digest) {
            entry.proof = Some(Verification::Verified);
        }
        if let Err(error) = self.write_record(digest, blob) {
            tracing::warn!(%digest, %error, "a proof could not be recorded");
        }
    }

    /// Opens a blob's file past the page cache, to see what the disk holds; with it where the file
    /// system knows no other way.
    pub fn open_direct(&self, digest: &Digest) -> io::Result<File> {
        let (path, flags) = (self.path(digest), OFlags::RDONLY | OFlags::CLOEXEC);
        let open = |flags| rustix::fs::open(&path, flags, Mode::empty());
        let file = open(flags | OFlags::DIRECT).or_else(|_| open(flags))?;
        Ok(file.into())
    }

    /// Drops a blob that turned out to be wrong, unless another copy has taken its place.
    pub fn forget(&self, digest: &Digest, blob: &Blob) {
        self.give_up(digest, &blob.charge);
    }

    /// Whether evicting everything idle would make enough room, in the budget and on the file system.
    pub(super) fn could_hold(&self, bytes: u64) -> bool {
        let partials = self.partials.lock().bytes();
        let idle: u64 = self.idle().iter().map(|candidate| candidate.bytes).sum();
        let freeable = partials + self.relayed.lock().idle_bytes() + idle;
        let on_disk = FileSystem::of(&self.blobs).map_or(u64::MAX, |file_system| file_system.available);
        self.budget.free().min(on_disk).saturating_add(freeable) >= bytes
    }

    /// The blobs that nobody reads.
    pub(super) fn idle(&self) -> Vec<Candidate> {
        let (index, pinned) = (self.index.lock(), self.pinned.load());
        let idle = index.iter().filter(|(_, entry)| entry.open.strong_count() == 0);
        idle.map(|(digest, entry)| Candidate {
            digest: digest.clone(),
            bytes: entry.len + FILE_OVERHEAD,
            last_used: entry.last_used,
            uses: entry.uses,
            pinned: pinned.contains(digest),
        })
        .collect()
    }

    /// Evicts these only when nothing else is left. Others are not pinned any more.
    pub fn pin(&self, digests: HashSet<Digest>) {
        self.pinned.store(digests.into());
    }

    /// Unlinks a blob, unless somebody reads it by now.
    pub(super) fn evict(&self, digest: &Digest) -> bool {
        let mut index = self.index.lock();
        if index.get(digest).is_none_or(|entry| entry.open.strong_count() > 0) {
            return false;
        }
        let entry = index.remove(digest);
        drop(index);
        self.unlink(digest);
        if let Some(entry) = entry {
            self.evicted.inc_by(entry.len);
            tracing::debug!(%digest, bytes = entry.len, "evicted");
        }
        true
    }

    fn unlink(&self, digest: &Digest) {
        let path = self.path(digest);
        for path in [files::record_path(&path), path] {
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(path = %path.display(), %error, "already gone");
            }
        }
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.algorithm().as_str()).join(&digest.hex()[..2]).join(digest.hex())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::budget::NoSpace;
    use super::*;

    fn provenance() -> Provenance {
        Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "library/a".into() }
    }

    fn large(dir: &Path, limit: u64) -> Large {
        Large::open(&Layout::open(dir).unwrap(), limit, &Metrics::new()).unwrap()
    }

    fn put(large: &Large, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let draft = large.draft(bytes.len() as u64, provenance()).unwrap();
        large.reserve(&draft.blob, bytes.len() as u64).and_then(|()| large.write(&draft.blob, bytes, 0)).unwrap();
        large.announce(&draft, &digest);
        assert!(large.get(&digest).is_some(), "found before it has its name");
        large.publish(draft, &digest).unwrap();
        digest
    }

    #[test]
    fn blobs_survive_a_restart_with_their_provenance() {
        let dir = tempfile::tempdir().unwrap();
        let digest = put(&large(dir.path(), 1 << 20), b"hello");
        let (blob, proof) = large(dir.path(), 1 << 20).get(&digest).unwrap();
        assert_eq!((blob.len, proof), (5, Verification::Verified));
        assert_eq!(blob.provenance, Some(provenance()));
    }

    #[test]
    fn after_a_crash_of_the_machine_nothing_is_believed_unseen() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = {
            let large = large(dir.path(), 1 << 20);
            [b"hello", b"world"].map(|bytes| put(&large, bytes))
        };
        fs::write(dir.path().join("v1/state"), "another-boot 0").unwrap();
        {
            let large = large(dir.path(), 1 << 20);
            let (blob, proof) = large.get(&first).unwrap();
            assert_eq!(proof, Verification::Unproven);
            large.prove(&first, &blob);
            assert_eq!(large.get(&first).unwrap().1, Verification::Verified);
        }
        // What was not proven then is not believed later either.
        let large = large(dir.path(), 1 << 20);
        assert_eq!(large.get(&first).unwrap().1, Verification::Verified);
        assert_eq!(large.get(&second).unwrap().1, Verification::Unproven);
    }

    #[test]
    fn the_least_recently_used_goes_first_but_never_under_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 3 * (1000 + FILE_OVERHEAD));
        let [a, b, c] = [b'a', b'b', b'c'].map(|byte| put(&large, &[byte; 1000]));
        let reader = large.get(&a).unwrap();
        large.get(&b).unwrap();
        let d = put(&large, &[b'd'; 1000]);
        assert!(large.get(&c).is_none(), "least recently used");
        assert!(large.get(&a).is_some() && large.get(&b).is_some() && large.get(&d).is_some());
        let readers = [&b, &d].map(|digest| large.get(digest).unwrap());
        assert_eq!(large.draft(1000, provenance()).err(), Some(NoSpace), "everything is being read");
        drop((reader, readers));
        assert!(large.draft(1000, provenance()).is_ok());
        assert_eq!(large.draft(u64::MAX, provenance()).err(), Some(NoSpace));
    }

    #[test]
    fn a_dropped_draft_leaves_nothing_once_its_last_reader_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 2 * (1000 + FILE_OVERHEAD));
        let draft = large.draft(1000, provenance()).unwrap();
        large.reserve(&draft.blob, 1000).unwrap();
        let reader = draft.blob.clone();
        drop(draft);
        assert_eq!(fs::read_dir(dir.path().join("v1/fills")).unwrap().count(), 0);
        assert!(large.draft(2000, provenance()).is_err(), "still open, still counted");
        drop(reader);
        assert!(large.draft(2000, provenance()).is_ok());
    }

    #[test]
    fn blobs_that_begin_at_once_are_not_promised_the_same_space() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, room) = (1 << 20, 3 << 19);
        let large = large(dir.path(), room);
        for round in 0..100 {
            let begun = std::sync::Barrier::new(16);
            let drafts: Vec<_> = std::thread::scope(|scope| {
                let draft = || {
                    begun.wait();
                    large.draft(blob, provenance()).ok()
                };
                let threads: Vec<_> = (0..16).map(|_| scope.spawn(draft)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(drafts.len() as u64, room / blob, "round {round}");
        }
    }

    #[test]
    fn a_vanished_directory_is_a_miss_and_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 1 << 20);
        let digest = put(&large, b"hello");
        fs::remove_dir_all(dir.path().join("v1")).unwrap();
        assert!(large.get(&digest).is_none());
        let digest = put(&large, b"hello");
        assert!(large.get(&digest).is_some());
    }

    #[test]
    fn a_truncated_file_is_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let large = large(dir.path(), 1 << 20);
        let digest = put(&large, b"hello");
        File::options().write(true).open(large.path(&digest)).unwrap().set_len(2).unwrap();
        assert!(large.get(&digest).is_none());
    }
}
