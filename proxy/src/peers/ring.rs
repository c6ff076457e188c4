//! Who owns a digest: rendezvous hashing, a pure function of the members and the digest.

use std::net::SocketAddr;

use xxhash_rust::xxh64::xxh64;

use crate::oci::Digest;

/// All members in the order in which they own a digest; the first is the owner, the others its
/// successors. Placement never moves between releases: golden tests hold it.
pub fn order(members: &[SocketAddr], digest: &Digest) -> Vec<SocketAddr> {
    let key = xxh64(digest.as_str().as_bytes(), 0);
    let mut scored: Vec<(u64, SocketAddr)> = members.iter().map(|member| (score(member, key), *member)).collect();
    scored.sort_unstable_by(|a, b| b.cmp(a));
    scored.into_iter().map(|(_, member)| member).collect()
}

fn score(member: &SocketAddr, key: u64) -> u64 {
    splitmix(xxh64(member.to_string().as_bytes(), 0) ^ key)
}

/// The finalizer of SplitMix64: every bit of the input reaches every bit of the output.
fn splitmix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|n| SocketAddr::from(([10, 0, 0, n], 5052))).collect()
    }

    #[test]
    fn placement_never_moves() {
        let last = |text: &[u8]| match order(&members(5), &Digest::of(text))[0] {
            SocketAddr::V4(v4) => v4.ip().octets()[3],
            SocketAddr::V6(_) => unreachable!("the members are IPv4"),
        };
        let owners: Vec<u8> = (0..12u8).map(|n| last(&[n])).collect();
        assert_eq!(owners, GOLDEN);
    }

    const GOLDEN: [u8; 12] = [3, 1, 2, 1, 1, 4, 1, 5, 2, 4, 2, 2];

    #[test]
    fn load_is_even_and_a_leave_moves_only_its_own() {
        let all = members(16);
        let fewer = &all[..15];
        let mut owned = [0usize; 16];
        for n in 0..20_000u32 {
            let digest = Digest::of(&n.to_le_bytes());
            let before = order(&all, &digest);
            let owner = all.iter().position(|m| *m == before[0]).unwrap();
            owned[owner] += 1;
            let after = order(fewer, &digest)[0];
            assert_eq!(after, if before[0] == all[15] { before[1] } else { before[0] });
        }
        let most = owned.iter().max().unwrap();
        assert!(*most < 20_000 / 16 * 11 / 10, "{owned:?}");
    }

    #[test]
    fn the_order_of_the_list_does_not_matter() {
        let mut backwards = members(7);
        backwards.reverse();
        let digest = Digest::of(b"x");
        assert_eq!(order(&backwards, &digest), order(&members(7), &digest));
    }
}
