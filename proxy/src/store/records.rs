//! Tags and repositories remembered across restarts: tiny files, each written atomically.
//!
//! They are hints with a date: losing one costs a request to the origin.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::oci::{Digest, Registry, Repository, Tag};

/// The record files.
pub struct Records {
    dir: PathBuf,
    written: AtomicU64,
}

/// What a tag meant, and when that was last known to be true.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagRecord {
    pub registry: String,
    pub repository: String,
    pub tag: String,
    pub digest: String,
    /// Seconds since 1970.
    pub checked_at: u64,
}

/// The registries that have served a repository: the answer to a blob request that names none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryRecord {
    repository: String,
    registry: String,
    /// Those who come after the first.
    #[serde(default)]
    others: Vec<String>,
}

/// More files than this are thinned out, oldest first.
const MAX_RECORDS: usize = 100_000;

/// Looked after once in so many writes.
const THIN_OUT_EVERY: u64 = 10_000;

impl RepositoryRecord {
    pub fn new(repository: &Repository, registries: &[Registry]) -> Self {
        let mut names = registries.iter().map(ToString::to_string);
        let registry = names.next().unwrap_or_default();
        Self { repository: repository.to_string(), registry, others: names.collect() }
    }
}

impl Records {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, written: AtomicU64::new(0) }
    }

    pub fn tag(&self, registry: &Registry, repository: &Repository, tag: &Tag) -> Option<TagRecord> {
        let record: TagRecord = self.read(&tag_key(registry.as_str(), repository.as_str(), tag.as_str()))?;
        let same = record.registry == registry.as_str()
            && record.repository == repository.as_str()
            && record.tag == tag.as_str();
        same.then_some(record)
    }

    pub fn put_tag(&self, record: &TagRecord) {
        self.write(&tag_key(&record.registry, &record.repository, &record.tag), record);
    }

    pub fn forget_tag(&self, registry: &Registry, repository: &Repository, tag: &Tag) {
        let _ = fs::remove_file(self.path(&tag_key(registry.as_str(), repository.as_str(), tag.as_str())));
    }

    /// The registries that have served a repository, in their order.
    pub fn repository(&self, repository: &Repository) -> Vec<Registry> {
        let record: Option<RepositoryRecord> = self.read(&repository_key(repository.as_str()));
        let record = record.filter(|record| record.repository == repository.as_str());
        let names = record.into_iter().flat_map(|record| std::iter::once(record.registry).chain(record.others));
        names.filter_map(|name| name.parse().ok()).collect()
    }

    pub fn put_repository(&self, record: &RepositoryRecord) {
        self.write(&repository_key(&record.repository), record);
    }

    /// Removes the oldest records beyond the limit. Blocks on the disk.
    pub fn thin_out(&self) {
        let Ok(files) = fs::read_dir(&self.dir) else { return };
        let mut dated: Vec<_> = files
            .filter_map(|file| {
                let file = file.ok()?;
                Some((file.metadata().ok()?.modified().ok()?, file.path()))
            })
            .collect();
        if dated.len() > MAX_RECORDS {
            dated.sort();
            for (_, path) in &dated[..dated.len() - MAX_RECORDS] {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn read<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(self.path(key)).ok()?).ok()
    }

    /// Without fsync: after a crash of the machine an empty or missing record is no record.
    fn write<T: Serialize>(&self, key: &str, record: &T) {
        let path = self.path(key);
        let nth = self.written.fetch_add(1, Ordering::Relaxed);
        if nth % THIN_OUT_EVERY == THIN_OUT_EVERY - 1 {
            self.thin_out();
        }
        let temporary = self.dir.join(format!(".{nth}"));
        let write = || -> io::Result<()> {
            write_creating(&temporary, &serde_json::to_vec(record)?)?;
            fs::rename(&temporary, &path)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, "a record could not be written");
            let _ = fs::remove_file(&temporary);
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(Digest::of(key.as_bytes()).hex())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_can_be_lost() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("records"));
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
        records.put_tag(&record);
        assert_eq!(records.tag(&registry, &repository, &tag), Some(record));
        let homes = [registry.clone(), "quay.io".parse().unwrap()];
        records.put_repository(&RepositoryRecord::new(&repository, &homes));
        assert_eq!(records.repository(&repository), homes);
        // As earlier releases wrote it.
        let earlier = serde_json::json!({"repository": "team/app", "registry": "ghcr.io"});
        records.write(&repository_key("team/app"), &earlier);
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
