//! Records of drafts: which bytes an unfinished blob has on disk. The next process keeps such blobs as partials.
//!
//! A record is written after the bytes that it names, so a killed process loses at most [`RECORD_STEP`] bytes of each
//! download. A crash of the machine may lose bytes that were written: the records of an earlier epoch count for nothing.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::files;
use crate::oci::{Digest, Registry, Span, Spans};
use crate::provenance::Provenance;

/// Written bytes between two records of a draft. Larger: a killed process loses more of each download. Smaller: more
/// small files are written.
const RECORD_STEP: u64 = 32 * 1024 * 1024;

/// The record of a draft, in a file beside it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct DraftRecord {
    digest: String,
    #[serde(flatten)]
    provenance: Provenance,
    length: u64,
    /// Start and end of each run of bytes that is written.
    written: Vec<(u64, u64)>,
    /// The epoch in which the bytes were written.
    epoch: String,
}

/// Keeps the record of one draft up to date.
pub struct DraftRecorder {
    path: PathBuf,
    record: DraftRecord,
    unrecorded: u64,
}

/// A draft that an earlier process has left.
pub(super) struct FoundDraft {
    pub(super) path: PathBuf,
    pub(super) number: u64,
    pub(super) digest: Digest,
    pub(super) registry: Registry,
    pub(super) provenance: Provenance,
    pub(super) file: File,
    pub(super) len: u64,
    pub(super) written: Spans,
    /// Bytes of the file on the disk.
    pub(super) allocated: u64,
}

impl DraftRecorder {
    /// For the draft at `draft`.
    pub(super) fn new(draft: &Path, digest: &Digest, provenance: Provenance, length: u64, epoch: &str) -> Self {
        let (digest, epoch) = (digest.to_string(), epoch.to_owned());
        let record = DraftRecord { digest, provenance, length, written: Vec::new(), epoch };
        Self { path: record_path(draft), record, unrecorded: 0 }
    }

    /// Counts bytes that are written, and records everything that is once they are enough. Blocks on the disk.
    pub fn wrote(&mut self, bytes: u64, written: impl FnOnce() -> Spans) {
        self.unrecorded += bytes;
        if self.unrecorded >= RECORD_STEP {
            self.record(&written());
        }
    }

    /// Records these bytes as written. Blocks on the disk.
    pub fn record(&mut self, written: &Spans) {
        self.unrecorded = 0;
        self.record.written = written.iter().map(|span| (span.start, span.end)).collect();
        let new = self.path.with_extension("new");
        let json = serde_json::to_vec(&self.record).map_err(io::Error::from);
        if let Err(error) = json.and_then(|json| fs::write(&new, json)).and_then(|()| fs::rename(&new, &self.path)) {
            // The download goes on; after a restart it begins again.
            tracing::debug!(%error, "draft record write failed");
        }
    }
}

/// The file of a draft's record.
pub(super) fn record_path(draft: &Path) -> PathBuf {
    draft.with_extension("draft")
}

/// The drafts of this epoch in `dir`, those that were written last at the end. Removes all other files.
pub(super) fn restore(dir: &Path, epoch: &str) -> io::Result<Vec<FoundDraft>> {
    let names: Vec<OsString> =
        fs::read_dir(dir)?.filter_map(|entry| entry.ok().map(|entry| entry.file_name())).collect();
    let records = names.iter().map(PathBuf::from).filter(|name| name.extension().is_some_and(|it| it == "draft"));
    let mut found: Vec<(SystemTime, FoundDraft)> =
        records.filter_map(|name| read(&dir.join(name).with_extension(""), epoch)).collect();
    found.sort_by_key(|(modified, _)| *modified);
    let kept: HashSet<PathBuf> =
        found.iter().flat_map(|(_, draft)| [draft.path.clone(), record_path(&draft.path)]).collect();
    for path in names.iter().map(|name| dir.join(name)).filter(|path| !kept.contains(path)) {
        files::remove_foreign(&path);
        let _ = fs::remove_file(&path);
    }
    Ok(found.into_iter().map(|(_, draft)| draft).collect())
}

/// The draft at `path`, if its record is of this epoch and fits its file.
fn read(path: &Path, epoch: &str) -> Option<(SystemTime, FoundDraft)> {
    let record: DraftRecord = serde_json::from_slice(&fs::read(record_path(path)).ok()?).ok()?;
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path).ok()?;
    let meta = file.metadata().ok()?;
    let written: Spans = record.written.iter().map(|(start, end)| Span { start: *start, end: *end }).collect();
    let fits = record.epoch == epoch && meta.is_file() && meta.len() == record.length;
    if !fits || written.is_empty() || written.iter().any(|span| span.end > record.length) {
        return None;
    }
    let found = FoundDraft {
        path: path.to_owned(),
        number: path.file_name()?.to_str()?.parse().ok()?,
        digest: record.digest.parse().ok()?,
        registry: record.provenance.registry.parse().ok()?,
        provenance: record.provenance,
        file,
        len: record.length,
        written,
        allocated: meta.blocks() * 512,
    };
    Some((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provenance() -> Provenance {
        Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "library/a".into() }
    }

    /// Writes a draft of 100 bytes with a record of its first half.
    fn put(dir: &Path, name: &str, change: impl FnOnce(&mut DraftRecord)) {
        let draft = dir.join(name);
        File::create(&draft).unwrap().set_len(100).unwrap();
        let mut recorder = DraftRecorder::new(&draft, &Digest::of(name.as_bytes()), provenance(), 100, "now");
        change(&mut recorder.record);
        recorder.record(&Span { start: 0, end: 50 }.into());
    }

    #[test]
    fn only_drafts_of_this_epoch_that_fit_their_files_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "1", |_| {});
        put(dir.path(), "2", |record| record.epoch = "before a crash".into());
        put(dir.path(), "3", |record| record.length = 101);
        put(dir.path(), "4", |record| record.digest = "sha256:short".into());
        put(dir.path(), "named", |_| {});
        put(dir.path(), "5", |_| {});
        fs::remove_file(dir.path().join("5")).unwrap();
        put(dir.path(), "6", |_| {});
        fs::write(dir.path().join("6.draft"), "{").unwrap();
        fs::create_dir(dir.path().join("directory")).unwrap();
        for name in ["7", "8.draft", "9.new", "10.json"] {
            fs::write(dir.path().join(name), "{}").unwrap();
        }
        let found = restore(dir.path(), "now").unwrap();
        assert_eq!(found.iter().map(|it| it.path.clone()).collect::<Vec<_>>(), [dir.path().join("1")]);
        assert_eq!((found[0].len, found[0].written.clone()), (100, Span { start: 0, end: 50 }.into()));
        assert_eq!((&found[0].digest, &found[0].provenance), (&Digest::of(b"1"), &provenance()));
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["1", "1.draft"]);
    }

    #[test]
    fn record_follows_every_step_of_written_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let draft = dir.path().join("1");
        let mut recorder = DraftRecorder::new(&draft, &Digest::of(b"a"), provenance(), 3 * RECORD_STEP, "now");
        let recorded = || fs::read(record_path(&draft)).ok().map(|json| serde_json::from_slice::<DraftRecord>(&json));
        let until = |end| move || Span { start: 0, end }.into();
        recorder.wrote(RECORD_STEP - 1, until(RECORD_STEP - 1));
        assert!(recorded().is_none());
        recorder.wrote(1, until(RECORD_STEP));
        recorder.wrote(1, until(RECORD_STEP + 1));
        assert_eq!(recorded().unwrap().unwrap().written, [(0, RECORD_STEP)]);
    }
}
