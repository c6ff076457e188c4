//! Records of drafts: which bytes an unfinished blob has on disk. The next process keeps such blobs as partials.
//!
//! A record is written after the bytes that it names, so a killed process loses at most [`RECORD_STEP`] bytes of each
//! download. A crash of the machine may lose bytes that were written: the records of an earlier epoch count for nothing.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::RwLock;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::files;
use crate::oci::{Digest, Registry, Span, Spans};
use crate::provenance::Provenance;

/// Written bytes between two records of a draft. Larger: a killed process loses more of each download. Smaller: more
/// small files are written.
const RECORD_STEP: u64 = 32 * 1024 * 1024;

/// Largest record that is read, in bytes.
const MAX_RECORD_BYTES: u64 = 1024 * 1024;

/// The record of a draft, in a file beside it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DraftRecord {
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
    is_closed: Arc<RwLock<bool>>,
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

impl DraftRecord {
    /// Of a draft without bytes.
    pub(super) fn new(digest: &Digest, provenance: Provenance, length: u64, epoch: &str) -> Self {
        let (digest, epoch) = (digest.to_string(), epoch.to_owned());
        Self { digest, provenance, length, written: Vec::new(), epoch }
    }

    /// The written bytes, if they fit a file of this length.
    fn written_of(&self, file_length: u64) -> Option<Spans> {
        let is_valid = |(start, end): &(u64, u64)| start < end && *end <= self.length;
        let fits = file_length == self.length && !self.written.is_empty() && self.written.iter().all(is_valid);
        fits.then(|| self.written.iter().map(|(start, end)| Span { start: *start, end: *end }).collect())
    }
}

impl DraftRecorder {
    /// For the draft at `draft`. Once the cache `is_closed`, nothing is recorded: the final flush may have passed.
    pub(super) fn new(draft: &Path, record: DraftRecord, is_closed: Arc<RwLock<bool>>) -> Self {
        Self { path: record_path(draft), record, unrecorded: 0, is_closed }
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
        let is_closed = self.is_closed.read();
        if *is_closed {
            return;
        }
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
    let name = path.file_name()?.to_str()?;
    let number = name.parse().ok().filter(|number: &u64| *number < u64::MAX && number.to_string() == name)?;
    let mut json = Vec::new();
    open(&record_path(path))?.0.take(MAX_RECORD_BYTES).read_to_end(&mut json).ok()?;
    let record: DraftRecord = serde_json::from_slice(&json).ok()?;
    let (file, meta) = open(path)?;
    let written = record.written_of(meta.len()).filter(|_| record.epoch == epoch)?;
    let found = FoundDraft {
        path: path.to_owned(),
        number,
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

/// A regular file. Whatever else is there could block, or have no end.
fn open(path: &Path) -> Option<(File, fs::Metadata)> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path).ok()?;
    let meta = file.metadata().ok().filter(fs::Metadata::is_file)?;
    Some((file, meta))
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
        let record = DraftRecord::new(&Digest::of(name.as_bytes()), provenance(), 100, "now");
        let mut recorder = DraftRecorder::new(&draft, record, Arc::default());
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
        put(dir.path(), "007", |_| {});
        put(dir.path(), "18446744073709551615", |_| {});
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let pipe = dir.path().join("11.draft");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("12.draft")).unwrap();
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
        let record = DraftRecord::new(&Digest::of(b"a"), provenance(), 3 * RECORD_STEP, "now");
        let is_closed: Arc<RwLock<bool>> = Arc::default();
        let mut recorder = DraftRecorder::new(&draft, record, is_closed.clone());
        let recorded = || fs::read(record_path(&draft)).ok().map(|json| serde_json::from_slice::<DraftRecord>(&json));
        let until = |end| move || Span { start: 0, end }.into();
        recorder.wrote(RECORD_STEP - 1, until(RECORD_STEP - 1));
        assert!(recorded().is_none());
        recorder.wrote(1, until(RECORD_STEP));
        recorder.wrote(1, until(RECORD_STEP + 1));
        assert_eq!(recorded().unwrap().unwrap().written, [(0, RECORD_STEP)]);
        *is_closed.write() = true;
        recorder.record(&until(2 * RECORD_STEP)());
        assert_eq!(recorded().unwrap().unwrap().written, [(0, RECORD_STEP)], "the cache is closed");
    }

    #[test]
    fn spans_of_a_record_must_fit_its_file() {
        let cases: [(&[(u64, u64)], bool); 6] = [
            (&[(0, 100)], true),
            (&[(0, 10), (20, 30)], true),
            (&[], false),
            (&[(50, 50)], false),
            (&[(100, 50)], false),
            (&[(0, 10), (90, 101)], false),
        ];
        for (written, fits) in cases {
            let mut record = DraftRecord::new(&Digest::of(b"a"), provenance(), 100, "now");
            record.written = written.to_vec();
            assert_eq!(record.written_of(100).is_some(), fits, "{written:?}");
            assert_eq!(record.written_of(99), None);
        }
    }
}
