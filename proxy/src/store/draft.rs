//! Blobs on their way in: space, a file, and in the end a name, or a place among the partials.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use rustix::fs::{FallocateFlags, copy_file_range};
use rustix::io::Errno;

use super::budget::NoSpace;
use super::large::{Blob, FILE_OVERHEAD, Large};
use super::partial::Partial;
use crate::oci::{Digest, Registry, Span, Spans};
use crate::provenance::Provenance;

/// A blob being written, with its space reserved. Unlinked when dropped without being published.
pub struct Draft {
    path: PathBuf,
    pub blob: Arc<Blob>,
}

/// Partials together take at most this part of the disk.
const PARTIALS_PART: u64 = 8;

impl Large {
    /// Reserves space for a blob of `len` bytes, evicting others if need be. Blocks on the disk.
    pub fn draft(&self, len: u64, provenance: Provenance) -> Result<Draft, NoSpace> {
        let bytes = len.checked_add(FILE_OVERHEAD).filter(|b| *b <= self.budget.limit()).ok_or(NoSpace)?;
        let charge = loop {
            match self.budget.reserve(bytes) {
                Ok(charge) => break Arc::new(charge),
                Err(NoSpace) if self.make_room(bytes) => {}
                Err(NoSpace) => return Err(NoSpace),
            }
        };
        let path = self.fills.join(self.next_draft.fetch_add(1, Ordering::Relaxed).to_string());
        match self.create(&path, len) {
            Ok(file) => {
                let blob = Blob { file, len, provenance: Some(provenance), charge, unreadable: Arc::default() };
                Ok(Draft { path, blob: Arc::new(blob) })
            }
            Err(error) => {
                tracing::warn!(%error, "no file for a blob, it will not be kept");
                let _ = fs::remove_file(&path);
                Err(NoSpace)
            }
        }
    }

    /// Gives an announced draft its name. Blocks on the disk.
    #[allow(clippy::needless_pass_by_value, reason = "a draft is published once")]
    pub fn publish(&self, draft: Draft, digest: &Digest) -> io::Result<()> {
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        if *sealed {
            return Err(io::Error::other("the cache is closed"));
        }
        let path = self.path(digest);
        let named = fs::create_dir_all(path.parent().unwrap_or(&self.blobs))
            .and_then(|()| self.write_record(digest, &draft.blob))
            .and_then(|()| fs::rename(&draft.path, &path));
        if named.is_err() {
            self.forget(digest, &draft.blob);
        }
        named
    }

    /// Nothing gets a name after this, so that everything that has one can be written to the disk.
    pub(super) fn seal(&self) {
        *self.sealed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Keeps what there is of a blob for whoever asks next, within bounds.
    pub fn keep_partial(&self, digest: &Digest, registry: &Registry, draft: Draft, written: Spans) {
        let limit = self.budget.limit() / PARTIALS_PART;
        self.partials().keep(digest, registry, Partial { draft, written }, limit, Instant::now());
    }

    /// What an earlier attempt to fetch this blob from this registry has left.
    pub fn take_partial(
        &self,
        digest: &Digest,
        registry: &Registry,
        fits: impl Fn(&Provenance) -> bool,
    ) -> Option<Partial> {
        self.partials().take(digest, registry, fits)
    }

    /// A new file with its space allocated, so that a full disk shows now and not half-way.
    fn create(&self, path: &Path, len: u64) -> io::Result<File> {
        let open = || OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.fills)?;
                open()?
            }
            other => other?,
        };
        loop {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
                Ok(()) => return Ok(file),
                Err(Errno::OPNOTSUPP) => return Ok(file),
                // Others fill the disk: our budget says there is room, the disk says there is not.
                Err(Errno::NOSPC) if self.evict_one() => {}
                Err(error) => return Err(error.into()),
            }
        }
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
