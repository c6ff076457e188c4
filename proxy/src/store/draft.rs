//! Drafts: blobs that are being written. A draft gets space, a file, and at the end a name or a place among the
//! partials.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use rustix::fs::copy_file_range;

use super::budget::{Charge, NoSpace};
use super::draft_record::{self, DraftRecord, DraftRecorder};
use super::files;
use super::large::{Blob, FILE_OVERHEAD, Large};
use super::partial::Partial;
use crate::oci::{Digest, Registry, Span, Spans};
use crate::provenance::Provenance;

/// A blob that is being written. Its space is reserved as its bytes arrive. An unpublished draft is unlinked on drop,
/// unless the cache is closed: then the next process finds it.
pub struct Draft {
    path: PathBuf,
    is_closed: Arc<RwLock<bool>>,
    pub blob: Arc<Blob>,
}

/// Space is reserved in steps of this many bytes. Larger: an upstream that announces more than it sends holds more
/// space. Smaller: more reservations for each blob.
const RESERVE_STEP: u64 = 8 * 1024 * 1024;

/// Space that a draft still needs. A new draft must fit beside all promises.
pub(super) struct Promise {
    bytes: u64,
    charge: Weak<Charge>,
    since: Instant,
}

/// Lowest average rate of a download, in bytes per second. A slower one loses its promised space, and counts as
/// abandoned once it has no clients, even if little is missing: a trickling upstream would hold the space for hours. Larger:
/// downloads over slow links lose their space. Smaller: trickling upstreams keep it.
pub const MIN_DOWNLOAD_RATE: u64 = 64 * 1024;
/// The rate counts from this age of a draft on. Shorter: drafts that have only begun lose their promised space.
const RATE_GRACE: Duration = Duration::from_secs(2);

/// Partials take at most one part in this many of the disk, except that the newest and the largest one always fit.
/// Larger: fewer downloads can resume. Smaller: more space is held for blobs that may never be finished.
const PARTIALS_SHARE: u64 = 8;

impl Large {
    /// Creates a draft of `len` bytes, if it would fit after eviction of every idle blob. Blocks on the disk.
    pub fn draft(&self, len: u64, provenance: Provenance) -> Result<Draft, NoSpace> {
        let bytes = len.checked_add(FILE_OVERHEAD).filter(|b| *b <= self.budget.limit()).ok_or(NoSpace)?;
        let charge = Arc::new(self.budget.account(0));
        self.promise(bytes, &charge)?;
        self.grow(&charge, FILE_OVERHEAD)?;
        let path = self.fills.join(self.next_draft.fetch_add(1, Ordering::Relaxed).to_string());
        match self.create_file(&path, len) {
            Ok(file) => {
                let (provenance, pieces) = (Some(provenance), self.pieces.clone());
                let blob = Blob { file, len, provenance, charge, unreadable: Arc::default(), pieces };
                Ok(self.draft_at(path, blob))
            }
            Err(error) => {
                tracing::warn!(%error, "draft file creation failed");
                let _ = fs::remove_file(&path);
                Err(NoSpace)
            }
        }
    }

    /// Promises space to a draft, if it fits beside all other promises. One lock for check and promise: concurrent
    /// drafts must not get the same space.
    fn promise(&self, bytes: u64, charge: &Arc<Charge>) -> Result<(), NoSpace> {
        let (now, mut promised) = (Instant::now(), 0);
        let mut promises = self.promises.lock();
        promises.retain(|promise| {
            let left = promise.remaining(now);
            promised += left.unwrap_or(0);
            left.is_some()
        });
        if !self.could_hold(bytes.saturating_add(promised)) {
            return Err(NoSpace);
        }
        promises.push(Promise { bytes, charge: Arc::downgrade(charge), since: now });
        Ok(())
    }

    /// Reserves space for `bytes` bytes of a draft in total, evicting idle blobs where needed. Not concurrently for one
    /// draft: both calls would reserve the same bytes. Blocks on the disk.
    pub fn reserve(&self, blob: &Blob, bytes: u64) -> io::Result<()> {
        let reserved = blob.charge.bytes().saturating_sub(FILE_OVERHEAD);
        let more = bytes.max(reserved + RESERVE_STEP).min(blob.len).saturating_sub(reserved);
        if bytes <= reserved || more == 0 {
            return Ok(());
        }
        self.grow(&blob.charge, more).map_err(|NoSpace| io::ErrorKind::StorageFull.into())
    }

    /// Charges more bytes, evicting blobs until there is room for them.
    fn grow(&self, charge: &Charge, more: u64) -> Result<(), NoSpace> {
        while charge.grow(more).is_err() {
            if !self.make_room(more) {
                return Err(NoSpace);
            }
        }
        Ok(())
    }

    /// Writes bytes of a draft. Blocks on the disk.
    pub fn write(&self, blob: &Blob, bytes: &[u8], position: u64) -> io::Result<()> {
        loop {
            match blob.file.write_all_at(bytes, position) {
                // Other programs filled the disk: the budget has room, the file system has none.
                Err(error) if error.kind() == io::ErrorKind::StorageFull && self.evict_one() => {}
                written => return written,
            }
        }
    }

    /// Moves an announced draft to its final path. Blocks on the disk.
    #[allow(clippy::needless_pass_by_value, reason = "a draft is published once")]
    pub fn publish(&self, draft: Draft, digest: &Digest) -> io::Result<()> {
        let sealed = self.sealed.read();
        if *sealed {
            return Err(io::Error::other("the cache is closed"));
        }
        let path = self.path(digest);
        let named = fs::create_dir_all(path.parent().unwrap_or(&self.blobs))
            .and_then(|()| self.write_record(digest, &draft.blob))
            .and_then(|()| {
                fs::rename(&draft.path, &path).or_else(|_| {
                    files::remove_foreign(&path);
                    fs::rename(&draft.path, &path)
                })
            });
        if named.is_err() {
            self.forget(digest, &draft.blob);
        } else if !self.is_announced(digest, &draft.blob) {
            // It was purged or evicted before it had its name.
            self.unlink(digest);
        }
        named
    }

    pub(super) fn seal(&self) {
        *self.sealed.write() = true;
    }

    /// Keeps an unfinished blob, within bounds, so that the next download resumes it. Blocks on the disk.
    pub fn keep_partial(&self, digest: &Digest, registry: &Registry, draft: Draft, written: Spans) {
        if let Some(mut recorder) = self.recorder(&draft, digest) {
            recorder.record(&written);
        }
        let limit = self.budget.limit() / PARTIALS_SHARE;
        let dropped = self.partials.lock().insert(digest, registry, Partial { draft, written }, limit, Instant::now());
        // Closing a file frees its blocks, which may take a while: not under the lock.
        drop(dropped);
    }

    /// Takes the partial that an earlier download of this blob from this registry left.
    pub fn take_partial(
        &self,
        digest: &Digest,
        registry: &Registry,
        fits: impl Fn(&Provenance) -> bool,
    ) -> Option<Partial> {
        self.partials.lock().take(digest, registry, fits)
    }

    fn draft_at(&self, path: PathBuf, blob: Blob) -> Draft {
        Draft { path, is_closed: self.sealed.clone(), blob: Arc::new(blob) }
    }

    /// What records the bytes of a draft for the next process.
    pub fn recorder(&self, draft: &Draft, digest: &Digest) -> Option<DraftRecorder> {
        let provenance = draft.blob.provenance.clone()?;
        let record = DraftRecord::new(digest, provenance, draft.blob.len, &self.epoch);
        Some(DraftRecorder::new(&draft.path, record, self.sealed.clone()))
    }

    /// Keeps the drafts of an earlier process as partials. Blocks on the disk.
    pub(super) fn restore_drafts(&self) -> io::Result<()> {
        for found in draft_record::restore(&self.fills, &self.epoch)? {
            self.next_draft.fetch_max(found.number.saturating_add(1), Ordering::Relaxed);
            let charge = Arc::new(self.budget.account(found.allocated.max(found.written.len()) + FILE_OVERHEAD));
            let bytes = found.len.saturating_add(FILE_OVERHEAD);
            let fits = bytes <= self.budget.limit();
            self.promises.lock().push(Promise { bytes, charge: Arc::downgrade(&charge), since: Instant::now() });
            let blob = Blob {
                file: found.file,
                len: found.len,
                provenance: Some(found.provenance),
                charge,
                unreadable: Arc::default(),
                pieces: self.pieces.clone(),
            };
            let draft = self.draft_at(found.path, blob);
            if !fits {
                // The limit is lower than in the last run.
                continue;
            }
            tracing::info!(digest = %found.digest, bytes = found.written.len(), total = found.len, "partial download kept");
            self.keep_partial(&found.digest, &found.registry, draft, found.written);
        }
        Ok(())
    }

    /// Creates a sparse file of this length.
    fn create_file(&self, path: &Path, len: u64) -> io::Result<File> {
        let open = || OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.fills)?;
                open()?
            }
            other => other?,
        };
        file.set_len(len)?;
        Ok(file)
    }
}

impl Promise {
    /// Bytes that stay promised: none if the download is too slow. `None`: the draft has all its space, or was dropped.
    fn remaining(&self, now: Instant) -> Option<u64> {
        let (taken, age) = (self.charge.upgrade()?.bytes(), now.duration_since(self.since));
        if taken >= self.bytes {
            return None;
        }
        let is_fast_enough =
            age < RATE_GRACE || taken.saturating_sub(FILE_OVERHEAD) >= MIN_DOWNLOAD_RATE * age.as_secs();
        Some(if is_fast_enough { self.bytes.saturating_sub(taken) } else { 0 })
    }
}

impl Draft {
    /// Removes the draft, also if the cache is closed: its bytes are wrong, or must not be kept.
    pub fn discard(self) {
        self.unlink();
    }

    fn unlink(&self) {
        // After publication the first path does not exist. Without it the record counts for nothing.
        for path in [&self.path, &draft_record::record_path(&self.path)] {
            let _ = fs::remove_file(path);
        }
    }

    /// Copies a span of another file of the same blob. Blocks on the disk.
    pub fn copy(&self, from: &Blob, span: Span) -> io::Result<()> {
        let (mut read, mut written) = (span.start, span.start);
        while written < span.end {
            let left = usize::try_from(span.end - written).unwrap_or(usize::MAX);
            let count = copy_file_range(&from.file, Some(&mut read), &self.blob.file, Some(&mut written), left)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !*self.is_closed.read() {
            self.unlink();
        }
    }
}
