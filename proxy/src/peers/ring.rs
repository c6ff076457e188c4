//! The owner of a digest: rendezvous hashing, a pure function of the members and the digest.

use std::net::SocketAddr;

use xxhash_rust::xxh64::xxh64;

use crate::oci::Digest;

/// The members, each with the hash of its address. Releases must agree on the owners, or each downloads from the
/// upstream: a golden test fixes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring(Vec<(u64, SocketAddr)>);

impl Ring {
    /// The owner of a digest, then its successors: `count` members.
    pub fn owners(&self, digest: &Digest, count: usize) -> Vec<SocketAddr> {
        self.owners_of(digest, count, |_| true)
    }

    /// The same among the members for which `counts` holds.
    pub fn owners_of(&self, digest: &Digest, count: usize, counts: impl Fn(&SocketAddr) -> bool) -> Vec<SocketAddr> {
        let key = xxh64(digest.as_str().as_bytes(), 0);
        let mut first: Vec<(u64, SocketAddr)> = Vec::with_capacity(count + 1);
        for (hash, member) in &self.0 {
            let scored = (splitmix(hash ^ key), *member);
            let is_among = first.len() < count || first.last().is_some_and(|last| scored > *last);
            if is_among && counts(member) {
                let position = first.partition_point(|better| *better > scored);
                first.insert(position, scored);
                first.truncate(count);
            }
        }
        first.into_iter().map(|(_, member)| member).collect()
    }
}

impl Ring {
    /// Members with their names. A member with a name keeps its digests when its address changes.
    pub fn of_named<'a>(members: impl IntoIterator<Item = (SocketAddr, Option<&'a str>)>) -> Self {
        let mut members: Vec<_> = members.into_iter().collect();
        members.sort_unstable();
        members.dedup_by_key(|(member, _)| *member);
        let hash = |(member, name): &(SocketAddr, Option<&str>)| match name {
            Some(name) => xxh64(name.as_bytes(), 0),
            None => xxh64(member.to_string().as_bytes(), 0),
        };
        Self(members.iter().map(|member| (hash(member), member.0)).collect())
    }
}

impl FromIterator<SocketAddr> for Ring {
    fn from_iter<I: IntoIterator<Item = SocketAddr>>(members: I) -> Self {
        Self::of_named(members.into_iter().map(|member| (member, None)))
    }
}

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
pub(super) fn splitmix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_member_keeps_its_digests_at_another_address() {
        let names: Vec<String> = (0..3).map(|nth| format!("dray-{nth}.dray-peers.dray.svc.cluster.local")).collect();
        let at = |nth: usize, ip: u8| (SocketAddr::from(([10, 0, 0, ip], 5052)), Some(names[nth].as_str()));
        let (before, after) =
            (Ring::of_named([at(0, 1), at(1, 2), at(2, 3)]), Ring::of_named([at(0, 9), at(1, 2), at(2, 3)]));
        let owners = |ring: &Ring| -> Vec<u8> {
            let owner = |nth: u8| ring.owners(&Digest::of(&[nth]), 1)[0].ip().to_string();
            (0..100).map(|nth| owner(nth).rsplit('.').next().unwrap().parse().unwrap()).collect()
        };
        let (before, after) = (owners(&before), owners(&after));
        assert!(before.iter().zip(&after).all(|(old, new)| old == new || (*old, *new) == (1, 9)));
        assert!(after.iter().filter(|ip| **ip == 9).count() > 10);
        // Releases must agree on the owners.
        assert_eq!(before[..8], [2, 2, 3, 1, 3, 2, 3, 3]);
    }

    fn ring(count: u8) -> Ring {
        members(count).into_iter().collect()
    }

    fn members(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|n| SocketAddr::from(([10, 0, 0, n], 5052))).collect()
    }

    #[test]
    fn placement_never_moves() {
        let last = |text: &[u8]| match ring(5).owners(&Digest::of(text), 1)[0] {
            SocketAddr::V4(v4) => v4.ip().octets()[3],
            SocketAddr::V6(_) => unreachable!("the members are IPv4"),
        };
        let owners: Vec<u8> = (0..12u8).map(|n| last(&[n])).collect();
        assert_eq!(owners, GOLDEN);
    }

    const GOLDEN: [u8; 12] = [3, 1, 2, 1, 1, 4, 1, 5, 2, 4, 2, 2];

    #[test]
    fn load_is_even_and_leaving_moves_only_own_digests() {
        let all = members(16);
        let (whole, fewer) = (ring(16), ring(15));
        let mut owned = [0usize; 16];
        for n in 0..20_000u32 {
            let digest = Digest::of(&n.to_le_bytes());
            let before = whole.owners(&digest, 2);
            let owner = all.iter().position(|m| *m == before[0]).unwrap();
            owned[owner] += 1;
            let after = fewer.owners(&digest, 1)[0];
            assert_eq!(after, if before[0] == all[15] { before[1] } else { before[0] });
        }
        let most = owned.iter().max().unwrap();
        assert!(*most < 20_000 / 16 * 11 / 10, "{owned:?}");
    }

    #[test]
    fn order_of_members_does_not_matter() {
        let backwards: Ring = members(7).into_iter().rev().collect();
        let digest = Digest::of(b"x");
        assert_eq!(backwards.owners(&digest, 7), ring(7).owners(&digest, 7));
        assert_eq!(backwards.owners(&digest, 3), ring(7).owners(&digest, 7)[..3]);
        assert_eq!(backwards.owners(&digest, 9).len(), 7);
    }
}
