//! Memory for bytes on their way: request heads, small objects from upstreams, responses that clients have yet to read.
//!
//! One budget for all of them, sized by what the process may use, so that the bounds together fit: half for bytes of
//! upstreams, of which each registry has a share ([`Shares`]), and half for those of clients, of which each client has one.
//! Nobody waits while holding some.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs;
use std::net::IpAddr;

use crate::oci::Registry;
use crate::shares::{Share, Shares};

/// The budget, in bytes.
pub struct Memory {
    pub of_upstreams: Shares<Registry>,
    /// By address, or by network for IPv6. None: it has no address.
    pub of_clients: Shares<Option<IpAddr>>,
    /// For how many connections of each listener there is memory beside that.
    pub connections: usize,
}

/// Bytes of an upstream that are held, until they are dropped.
pub type UpstreamBytes = Share<Registry>;

/// Bytes of a client that are held, until they are dropped.
pub type ClientBytes = Share<Option<IpAddr>>;

/// Part of the memory of the process. Larger: caches, connections and the allocator have less room within a limit. Smaller:
/// large responses are refused sooner when many clients read slowly.
const PART: u64 = 4;

/// Enough for the largest manifests of several registries at once, and more than can be of use.
const LEAST: u64 = 64 << 20;
const MOST: u64 = 1 << 30;

/// Bytes of the budget for each connection: an idle one takes 13 KiB (measured), of memory beside the budget.
const CONNECTION_BYTES: usize = 16 * 1024;

/// Where the kernel tells the limits of control groups, of version 2 and 1.
const LIMITS: [(&str, &str); 2] =
    [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let connections = bytes / CONNECTION_BYTES;
        Self { of_upstreams: Shares::new(bytes / 2), of_clients: Shares::new(bytes / 2), connections }
    }

    /// Sized by what this process may use. Blocks on the disk.
    pub fn of_process() -> Self {
        let groups = groups(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
        let files =
            LIMITS.iter().flat_map(|(root, file)| groups.iter().map(move |group| format!("{root}{group}/{file}")));
        let limits = files.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
        let all = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
        let budget = limits.chain(all).min().map_or(LEAST, |limit: u64| (limit / PART).clamp(LEAST, MOST));
        Self::new(usize::try_from(budget).unwrap_or(usize::MAX))
    }
}

/// The control groups that a process is in, with all above them: the least of their limits holds.
fn groups(of_process: &str) -> Vec<String> {
    let paths = of_process.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let with_parents = |path: &str| {
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        ends.map(|end| path[..end].trim_end_matches('/').to_owned()).collect::<Vec<_>>()
    };
    let mut groups: Vec<_> = paths.flat_map(with_parents).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// All memory of the machine, in bytes.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_the_machine_is_read() {
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       24607312 kB\n"), Some(24_607_312 * 1024));
        assert_eq!(total("MemTotal: lots"), None);
        assert_eq!(groups("0::/a/b.service\n"), ["", "/a", "/a/b.service"]);
        assert_eq!(groups("5:memory:/x\n0::/\n"), ["", "/x"]);
        assert!(Memory::of_process().of_clients.left() as u64 >= LEAST / 2);
    }
}
