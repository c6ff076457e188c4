//! A cluster of real processes on links of limited speed, and pulls while parts of it fail.

use std::fs;

use dray_tests::cluster::{Cluster, Topology, unavailable};
use dray_tests::image::{digest, noise};

const MIB: usize = 1024 * 1024;

/// The upstream's blobs and their digests.
struct Blobs {
    dir: tempfile::TempDir,
    digests: Vec<String>,
    bytes: u64,
}

fn blobs(sizes: &[usize]) -> Blobs {
    let dir = tempfile::Builder::new().prefix("dray-cluster").tempdir_in("/var/tmp").unwrap();
    let blobs_dir = dir.path().join("www/v2/library/app/blobs");
    fs::create_dir_all(&blobs_dir).unwrap();
    let put = |(seed, size): (usize, &usize)| {
        let bytes = noise(seed as u64, *size);
        let digest = digest(&bytes);
        fs::write(blobs_dir.join(&digest), bytes).unwrap();
        digest
    };
    let digests = sizes.iter().enumerate().map(put).collect();
    Blobs { dir, digests, bytes: sizes.iter().sum::<usize>() as u64 }
}

fn path(digest: &str) -> String {
    format!("/v2/library/app/blobs/{digest}?ns=docker.io")
}

fn fast() -> Topology {
    Topology { node: 2000, upstream: 2000, between_zones: 2000, ..Topology::default() }
}

/// Pulls a blob on these nodes at the same time, and verifies each body.
fn pull_everywhere(cluster: &Cluster, nodes: &[usize], digest: &str) {
    let pulled: Vec<_> = std::thread::scope(|scope| {
        let pulls: Vec<_> = nodes.iter().map(|node| scope.spawn(|| cluster.pull(*node, &path(digest)))).collect();
        pulls.into_iter().map(|pull| pull.join().unwrap()).collect()
    });
    for (node, pulled) in nodes.iter().zip(&pulled) {
        assert_eq!((pulled.status, pulled.digest.as_deref()), (200, Some(digest)), "node {node}: {pulled:?}");
    }
}

#[test]
fn service_with_a_thousand_addresses_is_resolved() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let Blobs { dir, .. } = blobs(&[]);
    // `start` returns once every node lists all members.
    let cluster = Cluster::start(Topology { zones: vec![2], unreachable_members: 1000, ..fast() }, dir);
    assert_eq!(cluster.all_nodes().iter().map(|node| cluster.metric(*node, "dray_peers")).min(), Some(1002));
}

#[test]
fn eight_nodes_download_each_blob_once() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let Blobs { dir, digests, bytes } = blobs(&[40 * MIB + 77, 3 * MIB, 100_000]);
    let cluster = Cluster::start(fast(), dir);
    let all_nodes = cluster.all_nodes();
    for digest in &digests {
        pull_everywhere(&cluster, &all_nodes, digest);
    }
    assert_eq!(cluster.upstream_bytes(), bytes, "each byte is downloaded once");
    cluster.wait_until_idle();
    let most = all_nodes.iter().map(|node| cluster.sent(*node)).max().unwrap();
    assert!(most < bytes * 5, "no node serves all others: {most} of {bytes}");
}

#[test]
fn owner_lends_ranges_to_requesting_peers() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    for (what, slow) in [("all are equal", None), ("one is ten times slower", Some((0, 40)))] {
        let Blobs { dir, digests, bytes } = blobs(&[80 * MIB]);
        let cluster = Cluster::start(Topology { zones: vec![4], slow, upstream: 100, ..Topology::default() }, dir);
        let all_nodes = cluster.all_nodes();
        pull_everywhere(&cluster, &all_nodes, &digests[0]);
        let fetched = |node: &usize| cluster.metric(*node, "dray_upstream_bytes_total{rule=\"docker.io\"}");
        let downloaders = all_nodes.iter().filter(|node| fetched(node) > 0).count();
        assert!(downloaders > 1, "{what}: {downloaders} nodes download from the upstream");
        assert_eq!(cluster.upstream_bytes(), bytes, "{what}: each byte is downloaded once");
    }
}

/// An upstream that is faster than the link between the zones.
#[test]
fn rule_may_prefer_upstream_to_cross_zone_peers() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    for (rule, percent) in
        [("cross_zone_peers = \"never\"", 0..=0), ("cross_zone_peers = \"unless-slower\"", 0..=25), ("", 100..=100)]
    {
        let share = crossed_share(rule);
        assert!(percent.contains(&share), "{rule}: {share} % crossed");
    }
}

/// The percentage of blobs that cross zones, once each node has downloaded from both sources and knows the faster one.
fn crossed_share(rule: &'static str) -> u64 {
    let Blobs { dir, digests, .. } = blobs(&[2 * MIB; 60]);
    let topology = Topology { zones: vec![2, 2], between_zones: 60, upstream_per_zone: true, rule, ..fast() };
    let cluster = Cluster::start(topology, dir);
    let names = ["{from_zone=\"z0\",to_zone=\"z1\"}", "{from_zone=\"z1\",to_zone=\"z0\"}"];
    let of_node = |node: usize| names.map(|zones| cluster.metric(node, &format!("dray_peer_bytes_total{zones}")));
    let crossed = || cluster.all_nodes().into_iter().flat_map(of_node).sum::<u64>();
    let (first, then) = digests.split_at(40);
    first.iter().for_each(|digest| pull_everywhere(&cluster, &[0, 1, 2, 3], digest));
    let before = crossed();
    then.iter().for_each(|digest| pull_everywhere(&cluster, &[0, 1, 2, 3], digest));
    (crossed() - before) * 100 / (then.len() * 2 * MIB) as u64
}

#[test]
fn blob_crosses_into_a_zone_once_or_never() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    for (peers, crossings, fetches) in
        [("zones = \"prefer\"", Some(1), 1), ("zones = \"isolate\"", Some(0), 2), ("zones = \"ignore\"", None, 1)]
    {
        let Blobs { dir, digests, bytes } = blobs(&[96 * MIB, 3 * MIB]);
        let topology = Topology { zones: vec![3, 3], peers, ..fast() };
        let cluster = Cluster::start(topology, dir);
        let all_nodes = cluster.all_nodes();
        for digest in &digests {
            pull_everywhere(&cluster, &all_nodes, digest);
        }
        let crossed = |what: &str, more: &str| {
            let of = |(from, to)| format!("{what}{{from_zone=\"{from}\"{more},to_zone=\"{to}\"}}");
            let names = [("z0", "z1"), ("z1", "z0")].map(of);
            let nodes = all_nodes.iter().flat_map(|node| names.iter().map(move |name| (node, name)));
            nodes.map(|(node, name)| cluster.metric(*node, name)).sum::<u64>()
        };
        if let Some(crossings) = crossings {
            assert_eq!(crossed("dray_peer_bytes_total", ""), crossings * bytes, "{peers}");
            let given = crossed("dray_peer_requests_total", ",outcome=\"hit\"");
            assert_eq!(given > 0, crossings > 0, "{peers}");
            assert_eq!(crossed("dray_peer_first_byte_seconds_count", ""), given, "{peers}");
        }
        assert_eq!(cluster.upstream_bytes(), fetches * bytes, "{peers}");
    }
}

#[test]
fn blob_on_any_node_is_found_while_upstream_is_down() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let Blobs { dir, digests, .. } = blobs(&[20 * MIB, 5 * MIB, 4 * MIB]);
    let mut cluster = Cluster::start(Topology { zones: vec![5], ..fast() }, dir);
    for (nth, digest) in digests.iter().enumerate() {
        pull_everywhere(&cluster, &[nth], digest);
    }
    cluster.wait_until_idle();
    cluster.stop_upstream();
    let all_nodes = cluster.all_nodes();
    for digest in &digests {
        pull_everywhere(&cluster, &all_nodes, digest);
    }
}

#[test]
fn restarts_and_a_new_node_cause_no_new_downloads() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let Blobs { dir, digests, bytes } = blobs(&[2 * MIB; 12]);
    let mut cluster = Cluster::start_without(Topology { zones: vec![5], ..fast() }, dir, &[4]);
    let first: Vec<usize> = (0..4).collect();
    for digest in &digests {
        pull_everywhere(&cluster, &first, digest);
    }
    cluster.wait_until_idle();
    assert_eq!(cluster.upstream_bytes(), bytes);
    for node in first {
        cluster.stop(node);
        let others: Vec<usize> = (0..4).filter(|other| *other != node).collect();
        digests.iter().for_each(|digest| pull_everywhere(&cluster, &others, digest));
        cluster.launch(node);
        digests.iter().for_each(|digest| pull_everywhere(&cluster, &[node], digest));
    }
    cluster.join(4);
    cluster.wait_until_formed();
    digests.iter().for_each(|digest| pull_everywhere(&cluster, &[4], digest));
    assert_eq!(cluster.upstream_bytes(), bytes, "nothing is downloaded again");
}

#[test]
fn killed_and_cut_off_nodes_fail_no_other_pull() {
    if let Some(reason) = unavailable() {
        return eprintln!("skipped: {reason}");
    }
    let Blobs { dir, digests, bytes } = blobs(&[6 * MIB, 96 * MIB, 6 * MIB, 6 * MIB, 96 * MIB, 6 * MIB]);
    let cluster = Cluster::start(Topology { zones: vec![6], node: 400, upstream: 400, ..Topology::default() }, dir);
    for (nth, digest) in digests.iter().enumerate() {
        let victim = nth % 6;
        let living: Vec<usize> = (0..6).filter(|node| *node != victim).collect();
        std::thread::scope(|scope| {
            let pulls = scope.spawn(|| pull_everywhere(&cluster, &living, digest));
            std::thread::sleep(std::time::Duration::from_millis(40 * nth as u64));
            if nth % 2 == 0 {
                cluster.freeze(victim);
            } else {
                cluster.disconnect(victim);
            }
            pulls.join().unwrap();
        });
        cluster.reconnect(victim);
        cluster.kill(victim);
        cluster.launch(victim);
        pull_everywhere(&cluster, &[victim], digest);
    }
    let share = cluster.upstream_bytes() * 10 / bytes;
    assert!(share <= 13, "{share} tenths of all blobs");
}
