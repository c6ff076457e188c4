//! When registries were purged. Small objects cannot be listed, so a purged one is recognized when it is looked up.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::small::SmallObject;
use crate::oci::Registry;

/// Seconds since 1970 of the last purge, by registry.
pub(super) struct RegistryPurges {
    file: PathBuf,
    at: ArcSwap<HashMap<String, u64>>,
    /// Held while the file is written.
    writing: Mutex<()>,
}

impl RegistryPurges {
    /// A missing or damaged file counts as empty.
    pub(super) fn load(dir: &Path) -> Self {
        let file = dir.join("purges.json");
        let at = fs::read(&file).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
        Self { file, at: ArcSwap::from_pointee(at), writing: Mutex::default() }
    }

    /// Everything that was cached from the registry until `now` counts as removed. Blocks on the disk.
    pub(super) fn record(&self, registry: &Registry, now: SystemTime) -> io::Result<()> {
        let _writing = self.writing.lock();
        let mut at = HashMap::clone(&self.at.load());
        at.insert(registry.to_string(), seconds_since_epoch(now));
        let json = serde_json::to_vec(&at)?;
        // Applies to this process even if the disk is full.
        self.at.store(at.into());
        let new = self.file.with_extension("new");
        fs::write(&new, json)?;
        fs::rename(new, &self.file)
    }

    /// Whether an object was cached before the last purge of its registry, or in the same second.
    pub(super) fn covers(&self, object: &SmallObject) -> bool {
        let at = self.at.load();
        !at.is_empty() && at.get(&object.provenance.registry).is_some_and(|purged_at| object.cached_at <= *purged_at)
    }
}

pub(super) fn seconds_since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::provenance::Provenance;

    #[test]
    fn purge_covers_older_objects_of_the_registry_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let object = |registry: &str, cached_at| {
            let provenance = Provenance { rule: "*".into(), registry: registry.into(), repository: "a".into() };
            SmallObject { cached_at, ..SmallObject::new("a/b", Arc::new(provenance), b"x") }
        };
        let purges = RegistryPurges::load(dir.path());
        assert!(!purges.covers(&object("a.io", 0)));
        purges.record(&"a.io".parse().unwrap(), UNIX_EPOCH + Duration::from_secs(100)).unwrap();
        for purges in [purges, RegistryPurges::load(dir.path())] {
            let covers = [("a.io", 100), ("a.io", 101), ("b.io", 100)]
                .map(|(registry, at)| purges.covers(&object(registry, at)));
            assert_eq!(covers, [true, false, false]);
        }
    }
}
