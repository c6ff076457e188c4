//! Blobs on their way in: space, a file, and in the end a name, or a place among the partials.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::fs::copy_file_range;

use super::budget::{Charge, NoSpace};
use super::files;
use super::large::{Blob, FILE_OVERHEAD, Large};
use super::partial::Partial;
use crate::oci::{Digest, Registry, Span, Spans};
use crate::provenance::Provenance;

/// A blob being written. Its space is reserved as its bytes come. Unlinked when dropped without being published.
pub struct Draft {
    path: PathBuf,
    pub blob: Arc<Blob>,
}

/// Space is reserved in steps of so many bytes: fewer steps for a blob, and little for what an upstream announces and does
/// not send.
const STEP: u64 = 8 * 1024 * 1024;

/// What a blob on its way is still to take: there has to be space for it beside what others announce.
pub(super) struct Promise {
    bytes: u64,
    charge: Weak<Charge>,
    since: Instant,
}

/// A blob that has brought fewer bytes a second, once it had time to begin, keeps no space from others, and goes on only
/// while a client reads it: an upstream that trickles would hold its place for hours.
pub const LEAST_RATE: u64 = 64 * 1024;
const BEGINS: Duration = Duration::from_secs(2);

/// Partials together take at most this part of the disk.
const PARTIALS_PART: u64 = 8;

impl Large {
    /// Begins a blob of `len` bytes, for which there is space, or would be if what nobody reads were evicted. Blocks on the
    /// disk.
    pub fn draft(&self, len: u64, provenance: Provenance) -> Result<Draft, NoSpace> {
        let bytes = len.checked_add(FILE_OVERHEAD).filter(|b| *b <= self.budget.limit()).ok_or(NoSpace)?;
        let charge = Arc::new(self.budget.account(0));
        self.promise(bytes, &charge)?;
        self.grow(&charge, FILE_OVERHEAD)?;
        let path = self.fills.join(self.next_draft.fetch_add(1, Ordering::Relaxed).to_string());
        match self.create(&path, len) {
            Ok(file) => {
                let (provenance, pieces) = (Some(provenance), self.pieces.clone());
                let blob = Blob { file, len, provenance, charge, unreadable: Arc::default(), pieces };
                Ok(Draft { path, blob: Arc::new(blob) })
            }
            Err(error) => {
                tracing::warn!(%error, "no file for a blob, it will not be kept");
                let _ = fs::remove_file(&path);
                Err(NoSpace)
            }
        }
    }

    /// Promises space to a blob, if there is enough beside what other blobs on their way are still to take. Both under one
    /// lock: blobs that begin at the same time must not be promised the same space.
    fn promise(&self, bytes: u64, charge: &Arc<Charge>) -> Result<(), NoSpace> {
        let (now, mut promised) = (Instant::now(), 0);
        let mut promises = self.promises.lock();
        promises.retain(|promise| {
            let left = promise.left(now);
            promised += left.unwrap_or(0);
            left.is_some()
        });
        if !self.could_hold(bytes.saturating_add(promised)) {
            return Err(NoSpace);
        }
        promises.push(Promise { bytes, charge: Arc::downgrade(charge), since: now });
        Ok(())
    }

    /// Reserves space for so many bytes of a draft in all, evicting what nobody reads if need be. One at a time for each
    /// draft. Blocks on the disk.
    pub fn reserve(&self, blob: &Blob, bytes: u64) -> io::Result<()> {
        let reserved = blob.charge.bytes().saturating_sub(FILE_OVERHEAD);
        let more = bytes.max(reserved + STEP).min(blob.len).saturating_sub(reserved);
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
                // Others fill the disk: our budget says there is room, the disk says there is not.
                Err(error) if error.kind() == io::ErrorKind::StorageFull && self.evict_one() => {}
                written => return written,
            }
        }
    }

    /// Gives an announced draft its name. Blocks on the disk.
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
                    files::clear_away(&path);
                    fs::rename(&draft.path, &path)
                })
            });
        if named.is_err() {
            self.forget(digest, &draft.blob);
        }
        named
    }

    /// Nothing gets a name after this, so that everything that has one can be written to the disk.
    pub(super) fn seal(&self) {
        *self.sealed.write() = true;
    }

    /// Keeps what there is of a blob for whoever asks next, within bounds. Blocks on the disk.
    pub fn keep_partial(&self, digest: &Digest, registry: &Registry, draft: Draft, written: Spans) {
        let limit = self.budget.limit() / PARTIALS_PART;
        let dropped = self.partials.lock().keep(digest, registry, Partial { draft, written }, limit, Instant::now());
        // Closing them frees their space, which may take a while: not under the lock.
        drop(dropped);
    }

    /// What an earlier attempt to fetch this blob from this registry has left.
    pub fn take_partial(
        &self,
        digest: &Digest,
        registry: &Registry,
        fits: impl Fn(&Provenance) -> bool,
    ) -> Option<Partial> {
        self.partials.lock().take(digest, registry, fits)
    }

    /// A new file of this length without blocks.
    fn create(&self, path: &Path, len: u64) -> io::Result<File> {
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
    /// What is still to come at a rate that counts. None: it is over.
    fn left(&self, now: Instant) -> Option<u64> {
        let (taken, age) = (self.charge.upgrade()?.bytes(), now.duration_since(self.since));
        if taken >= self.bytes {
            return None;
        }
        let comes = age < BEGINS || taken.saturating_sub(FILE_OVERHEAD) >= LEAST_RATE * age.as_secs();
        Some(if comes { self.bytes.saturating_sub(taken) } else { 0 })
    }
}

impl Draft {
    /// Copies a span of another file for the same blob. Blocks on the disk.
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
        // After a rename this name is gone.
        let _ = fs::remove_file(&self.path);
    }
}
