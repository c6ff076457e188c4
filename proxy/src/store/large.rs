//! Large blobs: one verified file each, evicted least recently used first.
//!
//! Order of publication:
//! 1. The hash matches.
//! 2. The blob is announced, and its readers get the tail.
//! 3. The record, then the blob get their names.
//!
//! The kernel flushes both in its own time, so that other writers are not slowed down. A crash of the machine begins a
//! new epoch, in which each blob is hashed before use. Bytes are written once per inode: a file under its final name is
//! only unlinked, never written.

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
    /// Evicted only when no other blob is left.
    pinned: ArcSwap<HashSet<Digest>>,
    evicted: IntCounter,
    pub(super) next_draft: AtomicU64,
    /// Blobs verified in another epoch must be hashed again.
    pub(super) epoch: String,
    /// Whether the cache is closed: nothing is published, and drafts stay for the next process. Read-locked during each
    /// publication.
    pub(super) sealed: Arc<RwLock<bool>>,
    pub(super) pieces: Arc<PieceMemory>,
}

/// An open blob, or one that is being written. Its bytes stay readable, and counted, until the last reader drops it,
/// even if it is unlinked.
pub struct Blob {
    pub file: File,
    pub len: u64,
    /// None: its record was lost.
    pub provenance: Option<Provenance>,
    pub(super) charge: Arc<Charge>,
    /// The disk reported an I/O error for this blob.
    pub(super) unreadable: Arc<AtomicBool>,
    /// Memory for the pieces that clients read.
    pub pieces: Arc<PieceMemory>,
}

/// Whether a file may be served without hashing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verification {
    /// Its hash matched in this epoch.
    Verified,
    /// The machine crashed since, or the record is lost: hash it before its last byte is sent.
    Unverified,
}

struct BlobEntry {
    len: u64,
    /// None: its record was not read yet.
    proof: Option<Verification>,
    last_used: SystemTime,
    /// Uses at least [`DEFAULT_TTL`] apart since this process found the blob.
    uses: u32,
    /// When `last_used` was last written to the file's times.
    touched: SystemTime,
    charge: Arc<Charge>,
    unreadable: Arc<AtomicBool>,
    open: Weak<Blob>,
}

/// Where a blob is, as far as the index tells without disk access.
pub enum BlobLocation {
    Open(Arc<Blob>, Verification),
    /// The disk is needed: to open the file, to read its record, or to store its time of use.
    OnDisk,
    Nowhere,
}

impl BlobEntry {
    /// The blob, if it is open, its record was read, and the disk can read it.
    fn opened(&self) -> Option<(Arc<Blob>, Verification)> {
        if self.unreadable.load(Ordering::Relaxed) {
            return None;
        }
        Some((self.open.upgrade()?, self.proof?))
    }

    /// Whether `last_used` is to be stored in the times of the file.
    fn is_touch_due(&self, now: SystemTime) -> bool {
        now.duration_since(self.touched).is_ok_and(|age| age > TOUCH_INTERVAL)
    }

    /// The same, but true only once per [`TOUCH_INTERVAL`].
    fn take_touch(&mut self, now: SystemTime) -> bool {
        let is_due = self.is_touch_due(now);
        if is_due {
            self.touched = now;
        }
        is_due
    }
}

impl Blob {
    /// After an I/O error of the disk, the blob is not found again.
    pub fn failed(&self, error: &io::Error) {
        if error.raw_os_error() == Some(Errno::IO.raw_os_error()) {
            self.unreadable.store(true, Ordering::Relaxed);
        }
    }
}

/// Charged for a file beside its bytes: rounding to blocks, inode, record. Smaller: many small files exceed the budget.
pub(super) const FILE_OVERHEAD: u64 = 8192;

// === impl Large ===

impl Large {
    /// Bytes in use, and the limit.
    pub fn usage(&self) -> (u64, u64) {
        (self.budget.used(), self.budget.limit())
    }

    /// Number of indexed blobs, without relayed ones.
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
            sealed: Arc::default(),
            pieces: Arc::default(),
        };
        large.restore_drafts()?;
        // The limit may be lower than in the last run.
        large.shrink_to(limit);
        Ok(large)
    }

    /// Marks an indexed or relayed blob as used. Returns it if that needs no disk access: see `BlobLocation::OnDisk`.
    pub fn lookup(&self, digest: &Digest) -> BlobLocation {
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
        match self.lookup(digest) {
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

    /// Digests of all indexed blobs.
    pub fn digests(&self) -> Vec<Digest> {
        self.index.lock().keys().cloned().collect()
    }

    /// Opens a blob for the scrub, without marking it as used. Blocks on the disk, and holds no lock meanwhile.
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
            tracing::warn!(%digest, "cached blob removed after a disk error");
            self.remove_entry(digest, &charge);
            return None;
        }
        match files::open(&self.path(digest), len) {
            Ok((file, record)) => {
                let mut index = self.index.lock();
                // Another task may have evicted or opened it meanwhile.
                let entry = index.get_mut(digest).filter(|entry| Arc::ptr_eq(&entry.charge, &charge))?;
                if let Some(opened) = entry.opened() {
                    return Some(opened);
                }
                let known = record.as_ref().is_some_and(|record| record.epoch == self.epoch);
                let proof =
                    *entry.proof.get_or_insert(if known { Verification::Verified } else { Verification::Unverified });
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
                tracing::warn!(%digest, %error, "cached blob open failed");
                // Other errors, such as too many open files, do not mean that this blob is bad.
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotFound) {
                    self.remove_entry(digest, &charge);
                }
                None
            }
        }
    }

    /// Each blob with its size and its last use.
    pub(super) fn entries(&self) -> Vec<(Digest, u64, SystemTime)> {
        self.index.lock().iter().map(|(digest, entry)| (digest.clone(), entry.len, entry.last_used)).collect()
    }

    pub(super) fn is_pinned(&self, digest: &Digest) -> bool {
        self.pinned.load().contains(digest)
    }

    /// Removes what has no name and came from such a provenance: relayed copies and partials. Returns their sizes.
    pub(super) fn purge_unnamed(&self, is_purged: impl Fn(&Provenance) -> bool) -> Vec<u64> {
        let is_of = |blob: &Blob| blob.provenance.as_ref().is_some_and(&is_purged);
        let relayed = self.relayed.lock().take_all(is_of);
        let partials = self.partials.lock().take_where(is_of);
        let sizes =
            relayed.iter().map(|blob| blob.len).chain(partials.iter().map(|partial| partial.draft.blob.len)).collect();
        // Closing the files may take a while: not under the locks.
        partials.into_iter().for_each(|partial| partial.draft.discard());
        sizes
    }

    /// Removes a blob with everything that a later download could continue from. Its readers end with the file that they
    /// hold open. Returns its size; None: it is not cached. Blocks on the disk.
    pub fn purge(&self, digest: &Digest) -> Option<u64> {
        let removed = self.index.lock().remove(digest).map(|entry| entry.len);
        if removed.is_some() {
            self.unlink(digest);
        }
        let relayed = self.relayed.lock().take(digest);
        let partials = self.partials.lock().take_all(digest);
        let relayed_bytes = relayed.as_ref().map(|blob| blob.len);
        // Closing the files may take a while: not under the locks.
        drop(relayed);
        partials.into_iter().for_each(|partial| partial.draft.discard());
        removed.or(relayed_bytes)
    }

    /// Removes a blob that cannot be read, unless another copy has replaced it.
    fn remove_entry(&self, digest: &Digest, charge: &Arc<Charge>) {
        let mut index = self.index.lock();
        if index.get(digest).is_some_and(|entry| Arc::ptr_eq(&entry.charge, charge)) {
            index.remove(digest);
            drop(index);
            self.unlink(digest);
        }
    }

    /// Makes a draft visible before it has its final path. Call only after its hash matched.
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
            // The draft keeps the blob open until its publication.
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

    /// Records that the bytes of an unproven file match its digest. Blocks on the disk.
    pub fn prove(&self, digest: &Digest, blob: &Blob) {
        if let Some(entry) = self.index.lock().get_mut(digest) {
            entry.proof = Some(Verification::Verified);
        }
        if let Err(error) = self.write_record(digest, blob) {
            tracing::warn!(%digest, %error, "verification record write failed");
        }
    }

    /// Opens a blob's file past the page cache, to read what the disk holds. Falls back to the page cache if the file
    /// system has no direct I/O.
    pub fn open_direct(&self, digest: &Digest) -> io::Result<File> {
        let (path, flags) = (self.path(digest), OFlags::RDONLY | OFlags::CLOEXEC);
        let open = |flags| rustix::fs::open(&path, flags, Mode::empty());
        let file = open(flags | OFlags::DIRECT).or_else(|_| open(flags))?;
        Ok(file.into())
    }

    /// Removes a blob that is corrupt or could not be published, unless another copy has replaced it.
    pub fn forget(&self, digest: &Digest, blob: &Blob) {
        self.remove_entry(digest, &blob.charge);
    }

    /// Whether evicting everything idle would make enough room, in the budget and on the file system.
    pub(super) fn could_hold(&self, bytes: u64) -> bool {
        let partials = self.partials.lock().bytes();
        let idle: u64 = self.idle().iter().map(|candidate| candidate.bytes).sum();
        let freeable = partials + self.relayed.lock().idle_bytes() + idle;
        let on_disk = FileSystem::of(&self.blobs).map_or(u64::MAX, |file_system| file_system.available);
        self.budget.free().min(on_disk).saturating_add(freeable) >= bytes
    }

    /// The indexed blobs without readers.
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

    /// Replaces the set of blobs that are evicted only when no other blob is left.
    pub fn pin(&self, digests: HashSet<Digest>) {
        self.pinned.store(digests.into());
    }

    /// Unlinks a blob, unless it has readers by now.
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
            tracing::debug!(%digest, bytes = entry.len, "blob evicted");
        }
        true
    }

    /// Whether the index has this copy of a blob.
    pub(super) fn is_announced(&self, digest: &Digest, blob: &Blob) -> bool {
        self.index.lock().get(digest).is_some_and(|entry| Arc::ptr_eq(&entry.charge, &blob.charge))
    }

    pub(super) fn unlink(&self, digest: &Digest) {
        let path = self.path(digest);
        for path in [files::record_path(&path), path] {
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(path = %path.display(), %error, "blob file removal failed");
            }
        }
    }

    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.algorithm().as_str()).join(&digest.hex()[..2]).join(digest.hex())
    }
}

#[cfg(test)]
mod tests;
