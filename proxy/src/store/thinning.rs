//! Which records are removed when there are too many: the oldest of the clients and registries that have most.
//!
//! Clients choose registries, tags and queries. A client that invents many must not displace what others need in an
//! outage.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::oci::Registry;

/// The client and the registry that a record counts for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Party {
    /// The client that caused the record. None: a peer caused it, clients share it, or an earlier version wrote it.
    pub(super) client: Option<IpAddr>,
    #[serde(default)]
    pub(super) registry: String,
}

impl Party {
    /// The party of a record without a known client.
    pub(super) fn of(registry: &Registry) -> Self {
        Self { client: None, registry: registry.to_string() }
    }
}

/// A record file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dated<Id> {
    pub(super) party: Party,
    pub(super) written: SystemTime,
    pub(super) id: Id,
}

/// The records beyond `limit`. All clients have equal shares, and within them all registries. Records without a known
/// client, such as where repositories were served from, have at least half of all.
pub(super) fn surplus<Id>(records: Vec<Dated<Id>>, limit: usize) -> Vec<Id> {
    let (of_clients, others): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| record.party.client.is_some());
    let for_others = (limit / 2).max(limit.saturating_sub(of_clients.len())).min(others.len());
    let by_registry = |records, limit| thinned(records, limit, |record| record.party.registry.clone(), oldest);
    let mut surplus = by_registry(others, for_others);
    surplus.extend(thinned(of_clients, limit - for_others, |record| record.party.client, by_registry));
    surplus
}

/// The records beyond `limit`: of each group that is larger than its share, those that `within` picks.
fn thinned<Id, Key: Eq + Hash>(
    records: Vec<Dated<Id>>,
    limit: usize,
    key: impl Fn(&Dated<Id>) -> Key,
    within: impl Fn(Vec<Dated<Id>>, usize) -> Vec<Id>,
) -> Vec<Id> {
    if records.len() <= limit {
        return Vec::new();
    }
    let groups = grouped(records, key);
    match fair_level(groups.iter().map(Vec::len), limit) {
        // There are more groups than room.
        0 => oldest(groups.into_iter().flatten().collect(), limit),
        level => groups.into_iter().flat_map(|group| within(group, level)).collect(),
    }
}

fn oldest<Id>(mut records: Vec<Dated<Id>>, limit: usize) -> Vec<Id> {
    records.sort_by_key(|record| std::cmp::Reverse(record.written));
    records.into_iter().skip(limit).map(|record| record.id).collect()
}

fn grouped<Id, Key: Eq + Hash>(records: Vec<Dated<Id>>, key: impl Fn(&Dated<Id>) -> Key) -> Vec<Vec<Dated<Id>>> {
    let mut groups: HashMap<Key, Vec<Dated<Id>>> = HashMap::new();
    for record in records {
        groups.entry(key(&record)).or_default().push(record);
    }
    groups.into_values().collect()
}

/// The largest share per group with which all groups together have at most `limit`.
fn fair_level(counts: impl Iterator<Item = usize>, limit: usize) -> usize {
    let mut counts: Vec<usize> = counts.collect();
    counts.sort_unstable();
    let (mut left, mut parties) = (limit, counts.len());
    for count in counts {
        if count > left / parties {
            return left / parties;
        }
        left -= count;
        parties -= 1;
    }
    usize::MAX
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn small_groups_leave_their_share_to_others() {
        for (counts, limit, level) in [
            (&[5, 5][..], 10, usize::MAX),
            (&[2, 20][..], 10, 8),
            (&[20, 20, 20][..], 10, 3),
            (&[1, 2, 30, 40][..], 23, 10),
            (&[9][..], 4, 4),
        ] {
            assert_eq!(fair_level(counts.iter().copied(), limit), level, "{counts:?} {limit}");
        }
    }

    #[test]
    fn oldest_of_the_largest_party_are_removed() {
        let mut records = Vec::new();
        let mut add = |client: u8, registry: &str, count: u64, since: u64| {
            for nth in 0..count {
                let party = Party { client: Some([10, 0, 0, client].into()), registry: registry.to_owned() };
                let written = SystemTime::UNIX_EPOCH + Duration::from_secs(since + nth);
                records.push(Dated { party, written, id: format!("{client} {registry} {nth}") });
            }
        };
        // An honest client's records are older than all others.
        add(1, "docker.io", 30, 0);
        add(2, "one.evil", 500, 1_000);
        (0..100).for_each(|nth| add(2, &format!("{nth}.evil"), 1, 1_000));
        add(2, "docker.io", 1, 0);
        let removed = surplus(records.clone(), 200);
        let left: Vec<&String> = records.iter().map(|record| &record.id).filter(|id| !removed.contains(id)).collect();
        let count = |start: &str| left.iter().filter(|id| id.starts_with(start)).count();
        assert_eq!((count("1 docker.io"), count("2 docker.io"), count("2 one.evil")), (30, 1, 69));
        assert_eq!(left.len(), 200);
        assert!(left.iter().any(|id| *id == "2 one.evil 499") && !left.iter().any(|id| *id == "2 one.evil 0"));
        assert_eq!(surplus(records.clone(), records.len()), Vec::<String>::new());
    }

    fn record(client: Option<u32>, registry: &str, nth: u32) -> Dated<u32> {
        let client = client.map(|client| IpAddr::from(client.to_be_bytes()));
        let written = SystemTime::UNIX_EPOCH + Duration::from_secs(nth.into());
        Dated { party: Party { client, registry: registry.to_owned() }, written, id: nth }
    }

    #[test]
    fn more_parties_than_room_leave_the_newest() {
        let mut removed = surplus((0..100).map(|nth| record(Some(nth), &format!("{nth}.io"), nth)).collect(), 10);
        removed.sort_unstable();
        assert_eq!(removed, (0..90).collect::<Vec<_>>());
        let mut removed = surplus((0..100).map(|nth| record(Some(1), &format!("{nth}.io"), nth)).collect(), 10);
        removed.sort_unstable();
        assert_eq!(removed, (0..90).collect::<Vec<_>>(), "of a wildcard domain");
    }

    #[test]
    fn records_without_a_client_have_half() {
        let homes = (0..80).map(|nth| record(None, "a.io", nth));
        let tags = (1_000..1_200).map(|nth| record(Some(nth), "a.io", nth));
        let removed = surplus(homes.chain(tags).collect(), 100);
        assert_eq!(removed.iter().filter(|nth| **nth < 80).count(), 30);
        assert_eq!(removed.len(), 180);
    }
}
