//! Eviction: which blobs go, when, and how much space is left to other programs on the same disk.
//!
//! | trigger | evicts until |
//! |---|---|
//! | start, if the limit was lowered | the limit is met |
//! | housekeeping, use above [`HIGH_PERCENT`] of the limit | use is at [`LOW_PERCENT`] of it |
//! | a draft needs space, and evicting idle blobs can free enough | the draft fits |
//! | the file system is full | one blob is gone |
//!
//! Order of eviction; blobs with readers stay:
//! 1. partials, oldest first;
//! 2. relayed blobs, least recently used first;
//! 3. other blobs, least recently used first;
//! 4. hot small blobs, as far as [`PROTECTED_SHARE`] covers them;
//! 5. pinned blobs.

use std::cmp::Reverse;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::large::Large;
use crate::config::DiskShare;
use crate::oci::Digest;
use crate::times::DAY;

/// Above the high mark, housekeeping evicts down to the low one, in percent of the limit. Higher: more downloads must
/// evict before they write. Lower: blobs go while there is space.
const HIGH_PERCENT: u64 = 95;
const LOW_PERCENT: u64 = 90;

/// A small blob with this many uses, apart by [`DEFAULT_TTL`](crate::times::DEFAULT_TTL) or more, is hot for a day.
/// Larger: fewer blobs are protected. Smaller: every small blob is.
const HOT_USES: u32 = 2;

/// A hot blob takes at most 1/100 of the limit, all protected blobs together 1/4. Larger: less is protected. Smaller:
/// large blobs go sooner.
const HOT_BLOB_SHARE: u64 = 100;
const PROTECTED_SHARE: u64 = 4;

/// Interval of the housekeeping. Longer: a disk that other programs fill is noticed later. Shorter: the index is
/// scanned more often.
pub const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(5);

/// A blob without readers.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) last_used: SystemTime,
    pub(super) uses: u32,
    /// Evicted only when no other blob is left.
    pub(super) pinned: bool,
}

/// Sorts candidates by the order in which they are evicted. Hot small blobs go late because they take little space and
/// many clients pull them.
pub(super) fn eviction_order(mut candidates: Vec<Candidate>, limit: u64, now: SystemTime) -> Vec<Candidate> {
    candidates.sort_by_key(|candidate| Reverse(candidate.last_used));
    let mut allowance = limit / PROTECTED_SHARE;
    let mut protected = |candidate: &Candidate| {
        let recent = now.duration_since(candidate.last_used).is_ok_and(|age| age < DAY);
        let hot = candidate.uses >= HOT_USES && candidate.bytes <= limit / HOT_BLOB_SHARE && recent;
        let fits = hot && candidate.bytes <= allowance;
        if fits {
            allowance -= candidate.bytes;
        }
        fits
    };
    let (mut pinned, candidates): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| candidate.pinned);
    let (mut kept, mut gone): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| protected(candidate));
    gone.reverse();
    kept.reverse();
    pinned.reverse();
    gone.append(&mut kept);
    gone.append(&mut pinned);
    gone
}

impl Large {
    /// Frees at least `bytes` of the budget if possible, partials first. Blocks on the disk.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        if self.budget.free() >= bytes {
            return true;
        }
        // If evicting everything would not free enough, nothing is evicted.
        if self.could_hold(bytes) {
            self.shrink_to(self.budget.limit().saturating_sub(bytes));
        }
        self.budget.free() >= bytes
    }

    /// Evicts one partial or blob without readers, regardless of the budget. False: none is left.
    pub(super) fn evict_one(&self) -> bool {
        if self.drop_transient() {
            return true;
        }
        let victims = eviction_order(self.idle(), self.budget.limit(), SystemTime::now());
        victims.iter().any(|victim| self.evict(&victim.digest))
    }

    /// Drops old partials and relayed blobs, leaves space to other programs, and evicts down to the low mark. Blocks on
    /// the disk.
    pub fn run_housekeeping(&self, min_free: DiskShare) {
        let old = (self.partials.lock().take_expired(Instant::now()), self.relayed.lock().take_expired(Instant::now()));
        // Closing a file frees its blocks, which may take a while: not under a lock.
        drop(old);
        if let Some(file_system) = FileSystem::of(&self.blobs) {
            let reserve = min_free.of(file_system.total);
            let ours = self.budget.used().saturating_add(file_system.available);
            self.budget.yield_to(ours.saturating_sub(reserve));
        }
        let limit = self.budget.limit();
        if self.budget.used() > limit / 100 * HIGH_PERCENT {
            self.shrink_to(limit / 100 * LOW_PERCENT);
        }
    }

    /// Drops a partial, or else a relayed blob without readers. False: there is none.
    fn drop_transient(&self) -> bool {
        let partial = self.partials.lock().take_oldest();
        let relayed = if partial.is_none() { self.relayed.lock().take_idle() } else { None };
        partial.is_some() || relayed.is_some()
    }

    /// Evicts until at most `bytes` are in use, or every remaining blob has readers.
    pub(super) fn shrink_to(&self, bytes: u64) {
        while self.budget.used() > bytes && self.drop_transient() {}
        if self.budget.used() <= bytes {
            return;
        }
        for victim in eviction_order(self.idle(), self.budget.limit(), SystemTime::now()) {
            if self.budget.used() <= bytes {
                break;
            }
            self.evict(&victim.digest);
        }
    }
}

/// Size of a file system, and what unprivileged processes may still take of it, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileSystem {
    pub(super) total: u64,
    pub(super) available: u64,
}

impl FileSystem {
    pub(super) fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(Self { total: stat.f_blocks * stat.f_frsize, available: stat.f_bavail * stat.f_frsize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, bytes: u64, hours_ago: u64, uses: u32) -> Candidate {
        let last_used = SystemTime::UNIX_EPOCH + Duration::from_secs((1000 - hours_ago) * 3600);
        Candidate { digest: Digest::of(name.as_bytes()), bytes, last_used, uses, pinned: false }
    }

    #[test]
    fn eviction_order_is_lru_with_hot_small_blobs_last() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 * 3600);
        let all = [
            ("large, new", 500, 1, 9),
            ("small, hot", 10, 5, 3),
            ("small, once", 10, 4, 1),
            ("small, hot, older", 10, 6, 2),
            ("small, hot long ago", 10, 48, 5),
            ("large, old", 500, 9, 9),
        ];
        let order_of = |limit| -> Vec<&str> {
            let candidates = all.map(|(name, bytes, age, uses)| candidate(name, bytes, age, uses)).to_vec();
            let name =
                |digest: &Digest| all.iter().find(|(name, ..)| Digest::of(name.as_bytes()) == *digest).unwrap().0;
            eviction_order(candidates, limit, now).iter().map(|candidate| name(&candidate.digest)).collect()
        };
        let plain =
            ["small, hot long ago", "large, old", "small, once", "large, new", "small, hot, older", "small, hot"];
        assert_eq!(order_of(1000), plain);
        assert_eq!(order_of(100).last(), Some(&"large, new"), "nothing is small on a small disk");
    }

    #[test]
    fn pinned_blobs_are_evicted_last() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 * 3600);
        let pinned = Candidate { pinned: true, ..candidate("pinned", 500, 900, 1) };
        let order = eviction_order(vec![pinned, candidate("hot", 5, 1, 9), candidate("new", 500, 0, 1)], 1000, now);
        let names = ["new", "hot", "pinned"].map(|name| Digest::of(name.as_bytes()));
        assert_eq!(order.iter().map(|candidate| candidate.digest.clone()).collect::<Vec<_>>(), names);
    }

    #[test]
    fn protected_blobs_are_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 * 3600);
        let mut candidates: Vec<_> = (0..50).map(|nth| candidate(&nth.to_string(), 10, nth % 20, 5)).collect();
        let large = candidate("large", 100, 0, 1);
        candidates.push(large.clone());
        let order = eviction_order(candidates, 1000, now);
        let before_large = order.iter().position(|candidate| candidate.digest == large.digest).unwrap();
        assert_eq!(before_large, 25, "a quarter of 1,000 bytes is for the hot, 25 of 50");
    }
}
