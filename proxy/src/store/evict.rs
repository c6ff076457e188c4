//! Making room: which blobs go, when, and how far others on the same disk are yielded to.

use std::cmp::Reverse;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::large::Large;
use crate::config::DiskShare;
use crate::oci::Digest;
use crate::times::DAY;

/// Above the high mark the housekeeper evicts down to the low one, so that a fill seldom has to
/// wait for room. In percent of what may be used.
const HIGH: u64 = 95;
const LOW: u64 = 90;

/// Used so often, at different times, a small blob is hot.
const HOT: u32 = 2;

/// A hot blob has at most a hundredth of the disk, all that are protected together a quarter.
const SMALL_PART: u64 = 100;
const PROTECTED_PART: u64 = 4;

/// How often the housekeeper looks.
pub const HOUSEKEEPING: Duration = Duration::from_secs(5);

/// What eviction knows of a blob that nobody reads.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
    pub(super) last_used: SystemTime,
    pub(super) uses: u32,
    /// Somebody wants it to stay.
    pub(super) pinned: bool,
}

/// Puts candidates in the order in which they go: least recently used first, but large ones before
/// hot small ones, which cost little to keep and are asked for by everybody, and pinned ones when nothing else is left.
pub(super) fn order(mut candidates: Vec<Candidate>, limit: u64, now: SystemTime) -> Vec<Candidate> {
    candidates.sort_by_key(|candidate| Reverse(candidate.last_used));
    let mut allowance = limit / PROTECTED_PART;
    let mut protected = |candidate: &Candidate| {
        let recent = now.duration_since(candidate.last_used).is_ok_and(|age| age < DAY);
        let hot = candidate.uses >= HOT && candidate.bytes <= limit / SMALL_PART && recent;
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
    /// Frees at least so many bytes of the budget, partials first, if that can be done. Blocks on
    /// the disk.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        if self.budget.free() >= bytes {
            return true;
        }
        // Nothing is given up in vain.
        if self.could_hold(bytes) {
            self.shrink_to(self.budget.limit().saturating_sub(bytes));
        }
        self.budget.free() >= bytes
    }

    /// Gives up one thing that nobody reads, whatever the budget says. False: there is none.
    pub(super) fn evict_one(&self) -> bool {
        if self.drop_passing() {
            return true;
        }
        let victims = order(self.idle(), self.budget.limit(), SystemTime::now());
        victims.iter().any(|victim| self.evict(&victim.digest))
    }

    /// Looks after the disk: yields what others need, evicts down to the low mark, drops old
    /// partials. Blocks on the disk.
    pub fn keep_house(&self, keep_free: DiskShare) {
        let old = (self.partials.lock().take_old(Instant::now()), self.relayed.lock().take_old(Instant::now()));
        // Closing them frees their space, which may take a while: not under a lock.
        drop(old);
        if let Some(file_system) = FileSystem::of(&self.blobs) {
            let reserve = keep_free.of(file_system.total);
            let ours = self.budget.used().saturating_add(file_system.available);
            self.budget.yield_to(ours.saturating_sub(reserve));
        }
        let limit = self.budget.limit();
        if self.budget.used() > limit / 100 * HIGH {
            self.shrink_to(limit / 100 * LOW);
        }
    }

    /// Gives up something that was only kept for a while. False: there is none.
    fn drop_passing(&self) -> bool {
        let partial = self.partials.lock().take_one();
        let relayed = if partial.is_none() { self.relayed.lock().take_one() } else { None };
        partial.is_some() || relayed.is_some()
    }

    /// Gives up what nobody reads until no more than so many bytes are taken, or nothing is left.
    pub(super) fn shrink_to(&self, bytes: u64) {
        while self.budget.used() > bytes && self.drop_passing() {}
        if self.budget.used() <= bytes {
            return;
        }
        for victim in order(self.idle(), self.budget.limit(), SystemTime::now()) {
            if self.budget.used() <= bytes {
                break;
            }
            self.evict(&victim.digest);
        }
    }
}

/// A file system's size and what of it others may still take, in bytes.
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
    fn least_recently_used_first_hot_small_ones_last() {
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
            order(candidates, limit, now).iter().map(|candidate| name(&candidate.digest)).collect()
        };
        let plain =
            ["small, hot long ago", "large, old", "small, once", "large, new", "small, hot, older", "small, hot"];
        assert_eq!(order_of(1000), plain);
        assert_eq!(order_of(100).last(), Some(&"large, new"), "nothing is small on a small disk");
    }

    #[test]
    fn what_is_pinned_goes_last() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 * 3600);
        let pinned = Candidate { pinned: true, ..candidate("pinned", 500, 900, 1) };
        let order = order(vec![pinned, candidate("hot", 5, 1, 9), candidate("new", 500, 0, 1)], 1000, now);
        let names = ["new", "hot", "pinned"].map(|name| Digest::of(name.as_bytes()));
        assert_eq!(order.iter().map(|candidate| candidate.digest.clone()).collect::<Vec<_>>(), names);
    }

    #[test]
    fn what_is_protected_is_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 * 3600);
        let mut candidates: Vec<_> = (0..50).map(|nth| candidate(&nth.to_string(), 10, nth % 20, 5)).collect();
        let large = candidate("large", 100, 0, 1);
        candidates.push(large.clone());
        let order = order(candidates, 1000, now);
        let before_large = order.iter().position(|candidate| candidate.digest == large.digest).unwrap();
        assert_eq!(before_large, 25, "a quarter of 1,000 bytes is for the hot, 25 of 50");
    }
}
