//! Memory for bytes in transit: request heads, small objects from upstreams, responses that clients have yet to read.
//!
//! One budget bounds all of them, sized by the memory limit of the process. Half is for bytes from upstreams, of which
//! each registry has a share ([`Shares`]). Half is for bytes of clients, of which each client has a share. A task that
//! waits for memory holds none, so that waiting tasks cannot deadlock.

#![allow(clippy::disallowed_methods, reason = "runs at the start, and on threads for blocking work")]

use std::fs;
use std::net::IpAddr;

use crate::oci::Registry;
use crate::shares::{Share, Shares};

/// The budget, in bytes.
pub struct Memory {
    pub of_upstreams: Shares<Registry>,
    /// By address, or by network for IPv6. None: the client has no address.
    pub of_clients: Shares<Option<IpAddr>>,
    /// How many connections each listener accepts, for which there is memory beside the budget.
    pub connections: usize,
}

/// Bytes from an upstream, reserved until dropped.
pub type UpstreamBytes = Share<Registry>;

/// Bytes of a client, reserved until dropped.
pub type ClientBytes = Share<Option<IpAddr>>;

/// The budget is one part in this many of the process memory. Larger: large responses are refused sooner when many
/// clients read slowly. Smaller: caches, connections and the allocator have less room within a limit.
const BUDGET_DIVISOR: u64 = 4;

/// Bounds of the budget, in bytes. A smaller minimum cannot hold the largest manifests of several registries at once. A
/// larger maximum has no use.
const MIN_BUDGET: u64 = 64 << 20;
const MAX_BUDGET: u64 = 1 << 30;

/// One connection is accepted for each of these bytes of the budget. An idle connection takes 13 KiB (measured), beside
/// the budget. Smaller: connections can exceed the memory limit.
const CONNECTION_BYTES: usize = 16 * 1024;

/// Root and file of the memory limits of control groups, of version 2 and 1.
const CGROUP_LIMIT_FILES: [(&str, &str); 2] =
    [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")];

impl Memory {
    pub fn new(bytes: usize) -> Self {
        let connections = bytes / CONNECTION_BYTES;
        Self { of_upstreams: Shares::new(bytes / 2), of_clients: Shares::new(bytes / 2), connections }
    }

    /// A budget sized by the memory limit of this process. Blocks on the disk.
    pub fn of_process() -> Self {
        let cgroups = cgroups(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default());
        let files = CGROUP_LIMIT_FILES
            .iter()
            .flat_map(|(root, file)| cgroups.iter().map(move |group| format!("{root}{group}/{file}")));
        let limits = files.filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
        let all = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text));
        let budget = limits
            .chain(all)
            .min()
            .map_or(MIN_BUDGET, |limit: u64| (limit / BUDGET_DIVISOR).clamp(MIN_BUDGET, MAX_BUDGET));
        Self::new(usize::try_from(budget).unwrap_or(usize::MAX))
    }
}

/// The control groups of a process and all their parents: the lowest of their limits applies.
fn cgroups(of_process: &str) -> Vec<String> {
    let paths = of_process.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let with_parents = |path: &str| {
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        ends.map(|end| path[..end].trim_end_matches('/').to_owned()).collect::<Vec<_>>()
    };
    let mut cgroups: Vec<_> = paths.flat_map(with_parents).collect();
    cgroups.sort_unstable();
    cgroups.dedup();
    cgroups
}

/// Total memory of the machine, in bytes.
fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_machine_memory_are_read() {
        assert_eq!(total_memory("MemFree: 1 kB\nMemTotal:       24607312 kB\n"), Some(24_607_312 * 1024));
        assert_eq!(total_memory("MemTotal: many"), None);
        assert_eq!(cgroups("0::/a/b.service\n"), ["", "/a", "/a/b.service"]);
        assert_eq!(cgroups("5:memory:/x\n0::/\n"), ["", "/x"]);
        assert!(Memory::of_process().of_clients.left() as u64 >= MIN_BUDGET / 2);
    }
}
