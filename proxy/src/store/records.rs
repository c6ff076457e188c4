//! Tags and repositories remembered across restarts: small files, each written atomically.
//!
//! They are hints with a date: a lost record costs a request to the upstream.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::thinning::{Dated, Party, surplus};
use crate::oci::{Digest, Registry, Repository, Tag};

/// The record files.
pub struct Records {
    tags: Directory,
    lists: Directory,
}

/// A directory of files, one for each key.
struct Directory {
    path: PathBuf,
    max_files: usize,
    written: AtomicU64,
    /// The value of `written` at the last thinning. None: not thinned yet.
    thinned_at: Mutex<Option<u64>>,
}

/// What a tag resolved to, and when that was last confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagRecord {
    pub registry: String,
    pub repository: String,
    pub tag: String,
    pub digest: String,
    /// Seconds since 1970.
    pub checked_at: u64,
}

/// A list of tags or referrers as last seen, for outages. Its body is a small object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListRecord {
    /// The request, and the rights that it was made with.
    pub key: String,
    /// Digest of the compressed body.
    pub digest: String,
    /// The query of the next page.
    pub next: Option<String>,
    pub filters_applied: Option<String>,
    /// Seconds since 1970.
    pub checked_at: u64,
}

/// The record of a list or tag that the upstream does not have.
#[derive(Serialize, Deserialize)]
struct AbsenceRecord {
    absent: String,
}

/// A record as it is written.
#[derive(Serialize)]
struct RecordFile<'a, T> {
    #[serde(flatten)]
    record: &'a T,
    party: &'a Party,
}

/// The party of a record file.
#[derive(Default, Deserialize)]
struct PartyRecord {
    #[serde(default)]
    party: Party,
}

/// The cached artifacts that refer to a manifest, as a referrers response describes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferrersRecord {
    /// `registry/repository@digest` of the manifest.
    pub subject: String,
    pub referrers: Vec<serde_json::Value>,
}

/// The registries that have served a repository, for blob requests that name no registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryRecord {
    repository: String,
    registry: String,
    /// All but the first.
    #[serde(default)]
    others: Vec<String>,
}

/// A directory with more files is thinned out. Lists have their own directory: clients choose their queries, and must
/// not displace what tags resolve to.
const MAX_RECORDS: usize = 100_000;
const MAX_LISTS: usize = 10_000;

/// A directory is thinned out after each tenth of its limit is written. Larger: all files are read more often. Smaller:
/// more files beyond the limit.
const THIN_OUT_SHARE: u64 = 10;

impl RepositoryRecord {
    pub fn new(repository: &Repository, registries: &[Registry]) -> Self {
        let mut names = registries.iter().map(ToString::to_string);
        let registry = names.next().unwrap_or_default();
        Self { repository: repository.to_string(), registry, others: names.collect() }
    }
}

impl Records {
    pub(super) fn new(tags: PathBuf, lists: PathBuf) -> Self {
        Self { tags: Directory::new(tags, MAX_RECORDS), lists: Directory::new(lists, MAX_LISTS) }
    }

    /// Blocks on the disk.
    pub fn tag(&self, registry: &Registry, repository: &Repository, tag: &Tag) -> Option<TagRecord> {
        let record: TagRecord = self.tags.read(&tag_key(registry.as_str(), repository.as_str(), tag.as_str()))?;
        let same = record.registry == registry.as_str()
            && record.repository == repository.as_str()
            && record.tag == tag.as_str();
        same.then_some(record)
    }

    /// Blocks on the disk.
    pub fn put_tag(&self, record: &TagRecord, client: Option<IpAddr>) {
        let party = Party { client, registry: record.registry.clone() };
        self.tags.write(&tag_key(&record.registry, &record.repository, &record.tag), record, &party);
    }

    /// Blocks on the disk.
    pub fn forget_tag(&self, registry: &Registry, repository: &Repository, tag: &Tag) {
        self.tags.remove(&tag_key(registry.as_str(), repository.as_str(), tag.as_str()));
    }

    /// The registries that have served a repository, in their order. Blocks on the disk.
    pub fn repository(&self, repository: &Repository) -> Vec<Registry> {
        let record: Option<RepositoryRecord> = self.tags.read(&repository_key(repository.as_str()));
        let record = record.filter(|record| record.repository == repository.as_str());
        let names = record.into_iter().flat_map(|record| std::iter::once(record.registry).chain(record.others));
        names.filter_map(|name| name.parse().ok()).collect()
    }

    /// Blocks on the disk.
    pub fn put_repository(&self, record: &RepositoryRecord) {
        let party = Party { client: None, registry: record.registry.clone() };
        self.tags.write(&repository_key(&record.repository), record, &party);
    }

    /// A list as last seen. Blocks on the disk.
    pub fn list(&self, key: &str) -> Option<ListRecord> {
        self.lists.read(&list_key(key)).filter(|record: &ListRecord| record.key == key)
    }

    /// Blocks on the disk.
    pub fn put_list(&self, record: &ListRecord, registry: &Registry, client: Option<IpAddr>) {
        self.lists.write(&list_key(&record.key), record, &Party { client, registry: registry.to_string() });
    }

    /// Whether a list, or its absence, is remembered. Blocks on the disk.
    pub fn is_known_list(&self, key: &str) -> bool {
        self.list(key).is_some() || self.is_absent_list(key)
    }

    /// Remembers that a tag is absent, until it is put. Blocks on the disk.
    pub fn put_absent(&self, registry: &Registry, repository: &Repository, tag: &Tag) {
        let key = absent_key(registry, repository, tag);
        self.lists.write(&key, &AbsenceRecord { absent: key.clone() }, &Party::of(registry));
    }

    /// Blocks on the disk.
    pub fn is_absent(&self, registry: &Registry, repository: &Repository, tag: &Tag) -> bool {
        let key = absent_key(registry, repository, tag);
        self.lists.read::<AbsenceRecord>(&key).is_some_and(|known| known.absent == key)
            && self.tag(registry, repository, tag).is_none()
    }

    /// Remembers that a list is absent, until it is put. Blocks on the disk.
    pub fn put_absent_list(&self, key: &str, registry: &Registry) {
        self.lists.write(&list_key(key), &AbsenceRecord { absent: key.to_owned() }, &Party::of(registry));
    }

    /// Blocks on the disk.
    pub fn is_absent_list(&self, key: &str) -> bool {
        self.lists.read::<AbsenceRecord>(&list_key(key)).is_some_and(|known| known.absent == key)
    }

    /// Blocks on the disk.
    pub fn forget_list(&self, key: &str) {
        self.lists.remove(&list_key(key));
    }

    /// The cached referrers of a manifest. Blocks on the disk.
    pub fn referrers(&self, subject: &str) -> Vec<serde_json::Value> {
        let record: Option<ReferrersRecord> = self.lists.read(&referrers_key(subject));
        record.filter(|record| record.subject == subject).map_or_else(Vec::new, |record| record.referrers)
    }

    /// Blocks on the disk.
    pub fn put_referrers(&self, record: &ReferrersRecord, registry: &Registry) {
        self.lists.write(&referrers_key(&record.subject), record, &Party::of(registry));
    }

    /// Removes all records of a registry, and returns how many. Blocks on the disk.
    pub fn purge(&self, registry: &Registry) -> usize {
        self.tags.purge(registry) + self.lists.purge(registry)
    }

    /// Removes records beyond the limits, at the start and after many writes. Blocks on the disk.
    pub fn thin_out(&self) {
        self.tags.thin_out();
        self.lists.thin_out();
    }
}

impl Directory {
    fn new(path: PathBuf, max_files: usize) -> Self {
        Self { path, max_files, written: AtomicU64::new(0), thinned_at: Mutex::new(None) }
    }

    fn thin_out(&self) {
        let mut thinned_at = self.thinned_at.lock();
        let written = self.written.load(Ordering::Relaxed);
        if thinned_at.is_some_and(|thinned_at| written - thinned_at < self.max_files as u64 / THIN_OUT_SHARE) {
            return;
        }
        *thinned_at = Some(written);
        let Ok(files) = fs::read_dir(&self.path) else { return };
        let paths: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
        if paths.len() <= self.max_files {
            return;
        }
        let dated = paths.into_iter().filter_map(|path| {
            let written = fs::metadata(&path).ok()?.modified().ok()?;
            let of_party: PartyRecord = serde_json::from_slice(&fs::read(&path).ok()?).unwrap_or_default();
            Some(Dated { party: of_party.party, written, id: path })
        });
        for path in surplus(dated.collect(), self.max_files) {
            let _ = fs::remove_file(path);
        }
    }

    fn purge(&self, registry: &Registry) -> usize {
        let Ok(files) = fs::read_dir(&self.path) else { return 0 };
        let is_of = |path: &PathBuf| {
            let record: Option<PartyRecord> = fs::read(path).ok().and_then(|json| serde_json::from_slice(&json).ok());
            record.is_some_and(|record| record.party.registry == registry.as_str())
        };
        let purged = files.filter_map(|file| Some(file.ok()?.path())).filter(is_of);
        purged.filter(|path| fs::remove_file(path).is_ok()).count()
    }

    fn read<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.file(key)).ok()?).ok()
    }

    fn remove(&self, key: &str) {
        let _ = fs::remove_file(self.file(key));
    }

    /// Without fsync: an empty file after a crash of the machine counts as missing.
    fn write<T: Serialize>(&self, key: &str, record: &T, party: &Party) {
        let path = self.file(key);
        let nth = self.written.fetch_add(1, Ordering::Relaxed);
        let temporary = self.path.join(format!(".{nth}"));
        let write = || -> io::Result<()> {
            write_creating(&temporary, &serde_json::to_vec(&RecordFile { record, party })?)?;
            fs::rename(&temporary, &path)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "record write failed");
            let _ = fs::remove_file(&temporary);
        }
    }

    fn file(&self, key: &str) -> PathBuf {
        self.path.join(Digest::of(key.as_bytes()).hex())
    }
}

fn write_creating(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::write(path, bytes) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            fs::write(path, bytes)
        }
        other => other,
    }
}

fn tag_key(registry: &str, repository: &str, tag: &str) -> String {
    format!("tag {registry}/{repository}:{tag}")
}

fn repository_key(repository: &str) -> String {
    format!("repository {repository}")
}

fn list_key(key: &str) -> String {
    format!("list {key}")
}

fn absent_key(registry: &Registry, repository: &Repository, tag: &Tag) -> String {
    format!("absent {registry}/{repository}:{tag}")
}

fn referrers_key(subject: &str) -> String {
    format!("referrers {subject}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_survive_and_the_oldest_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("records"), dir.path().join("lists"));
        let record = |key: &str| ListRecord {
            key: key.into(),
            digest: Digest::of(b"x").to_string(),
            next: Some("last=b".into()),
            filters_applied: None,
            checked_at: 7,
        };
        assert_eq!(records.list("a"), None);
        let registry: Registry = "a.io".parse().unwrap();
        records.put_list(&record("a"), &registry, None);
        assert_eq!(records.list("a"), Some(record("a")));
        records.put_absent_list("b", &registry);
        assert_eq!((records.is_absent_list("b"), records.is_absent_list("a"), records.list("b")), (true, false, None));
        let few = Directory::new(dir.path().join("few"), 8);
        few.write("b", &record("b"), &Party { client: None, registry: "b.io".into() });
        (0..100).for_each(|nth| few.write(&nth.to_string(), &record("a"), &Party::of(&registry)));
        let count = || fs::read_dir(dir.path().join("few")).unwrap().count();
        assert_eq!(count(), 101);
        few.thin_out();
        assert_eq!(count(), 8);
        assert!(few.read::<ListRecord>("b").is_some(), "another registry's record stays");
        let referrers = ReferrersRecord { subject: "a.io/b@sha256:00".into(), referrers: vec!["x".into()] };
        records.put_referrers(&referrers, &registry);
        assert_eq!(records.referrers("a.io/b@sha256:00"), referrers.referrers);
    }

    #[test]
    fn records_survive_and_torn_ones_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("records"), dir.path().join("lists"));
        let (registry, repository, tag) =
            ("ghcr.io".parse().unwrap(), "team/app".parse().unwrap(), "v1".parse().unwrap());
        assert_eq!(records.tag(&registry, &repository, &tag), None);
        let record = TagRecord {
            registry: "ghcr.io".into(),
            repository: "team/app".into(),
            tag: "v1".into(),
            digest: Digest::of(b"x").to_string(),
            checked_at: 7,
        };
        records.put_tag(&record, Some([10, 0, 0, 1].into()));
        assert_eq!(records.tag(&registry, &repository, &tag), Some(record));
        let homes = [registry.clone(), "quay.io".parse().unwrap()];
        records.put_repository(&RepositoryRecord::new(&repository, &homes));
        assert_eq!(records.repository(&repository), homes);
        // The format of earlier versions.
        let earlier = serde_json::json!({"repository": "team/app", "registry": "ghcr.io"});
        records.tags.write(&repository_key("team/app"), &earlier, &Party::default());
        assert_eq!(records.repository(&repository), std::slice::from_ref(&registry));
        for file in fs::read_dir(dir.path().join("records")).unwrap() {
            fs::write(file.unwrap().path(), b"{").unwrap();
        }
        assert_eq!(records.tag(&registry, &repository, &tag), None, "torn by a crash");
        records.forget_tag(&registry, &repository, &tag);
        fs::remove_dir_all(dir.path().join("records")).unwrap();
        assert_eq!(records.repository(&repository), []);
    }
}
