//! Many nodes on links of limited speed: how close a cluster comes to the limits of its network interfaces.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dray_tests::cluster::{Cluster, Topology, unavailable};
use dray_tests::image::{digest, noise};

use super::rig::{cpu_seconds, row, write_blob};

/// Size of the blob in most parts, in bytes.
const IMAGE: u64 = 512 << 20;

/// One Mbit/s in bytes a second.
const MBIT: f64 = 125_000.0;

struct Rig {
    cluster: Cluster,
    path: String,
    size: u64,
}

/// Many blobs of the upstream, and the cluster that pulls them.
struct Blobs {
    cluster: Cluster,
    digests: Vec<String>,
    bytes: u64,
}

/// The names of the parts on the command line.
pub(crate) const PARTS: [&str; 8] =
    ["cold-cluster", "held-by-owner", "held-by-another", "zones", "slow-node", "rolling", "churn", "thousand"];

/// Measures one of the parts.
pub(crate) fn part(name: &str) {
    if let Some(reason) = unavailable() {
        println!("{name}: skipped, {reason}");
        return;
    }
    match name {
        "cold-cluster" => cold(),
        "held-by-owner" => held_by_one(&Holder::Owner),
        "held-by-another" => held_by_one(&Holder::Another),
        "zones" => {
            zones("prefer", "<= 1.05 x");
            zones("isolate", "0");
        }
        "slow-node" => slow(),
        "rolling" => rolling(),
        "churn" => churn(),
        _ => thousand(),
    }
}

enum Holder {
    Owner,
    Another,
}

fn rig(topology: Topology, size: u64) -> Rig {
    let dir = tempfile::Builder::new().prefix("dray-cluster").tempdir_in("/var/tmp").expect("a directory");
    let blobs = dir.path().join("www/v2/library/app/blobs");
    fs::create_dir_all(&blobs).expect("a directory");
    let digest = write_blob(&blobs, size);
    let cluster = Cluster::start(topology, dir);
    Rig { cluster, path: path_of(&digest), size }
}

fn blobs(topology: Topology, count: u64, size: u64, later: &[usize]) -> Blobs {
    let dir = tempfile::Builder::new().prefix("dray-cluster").tempdir_in("/var/tmp").expect("a directory");
    let blobs_dir = dir.path().join("www/v2/library/app/blobs");
    fs::create_dir_all(&blobs_dir).expect("a directory");
    let put = |seed: u64| {
        let bytes = noise(seed, usize::try_from(size).expect("a small blob"));
        let digest = digest(&bytes);
        fs::write(blobs_dir.join(&digest), bytes).expect("a file");
        digest
    };
    let digests = (0..count).map(put).collect();
    Blobs { cluster: Cluster::start_without(topology, dir, later), digests, bytes: count * size }
}

fn path_of(digest: &str) -> String {
    format!("/v2/library/app/blobs/{digest}?ns=docker.io")
}

impl Rig {
    fn upstream_share(&self) -> f64 {
        share(self.cluster.upstream_bytes(), self.size)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
fn share(bytes: u64, of: u64) -> f64 {
    bytes as f64 / of as f64
}

fn last(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(0.0, f64::max)
}

/// No node has the blob, and all nodes pull it.
fn cold() {
    let rig = rig(Topology::default(), IMAGE);
    let ideal = share(IMAGE, 1) / (200.0 * MBIT);
    let seconds = rig.cluster.time_pulls(&rig.cluster.all_nodes(), &rig.path);
    let time = format!("{:.2} x size / upstream", last(&seconds) / ideal);
    row("512 MiB cold on 8 nodes of 400 Mbit/s, upstream 200", &format!("{:.1} s", last(&seconds)), &time, "<= 1.2 x");
    row("its upstream bytes", &format!("{:.3} x", rig.upstream_share()), "", "<= 1.02 x");
    let most = rig.cluster.all_nodes().into_iter().map(|node| rig.cluster.sent(node)).max().unwrap_or(0);
    row("its busiest node sent", &format!("{:.2} x the image", share(most, IMAGE)), "", "");
}

/// One node of a thousand without clients: it only tracks the members.
fn thousand() {
    const WATCHED: Duration = Duration::from_secs(60);
    let topology = Topology { zones: vec![1], unreachable_members: 999, ..Topology::default() };
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let cluster = Cluster::start(topology, dir);
    let now = || (cpu_seconds(cluster.pid(0)), cluster.sent(0) + cluster.received(0));
    let before = now();
    std::thread::sleep(WATCHED);
    let after = now();
    let cpu = 100.0 * (after.0 - before.0) / WATCHED.as_secs_f64();
    let kilobytes = share(after.1 - before.1, 1000) / WATCHED.as_secs_f64();
    row("an idle node of 1,000", &format!("{cpu:.2} % of a core"), "addresses that live for a second", "< 1 %");
    row("its network card", &format!("{kilobytes:.1} KB/s"), "", "<= 10 KB/s");
    let passes = 200_000u32;
    let started = Instant::now();
    let hotpaths = dray_tests::build_dir().join("examples/hotpaths");
    dray_tests::process::run(std::process::Command::new(hotpaths).args(["ring", &passes.to_string()]));
    let micros = 1e6 * started.elapsed().as_secs_f64() / f64::from(passes);
    row("the owner of a digest among 1,000", &format!("{micros:.1} us"), "", "< 10 us");
}

/// One node has the blob, the others pull it, and the upstream is down.
fn held_by_one(holder: &Holder) {
    let topology = Topology { zones: vec![9], upstream: 1000, ..Topology::default() };
    let mut rig = rig(topology, IMAGE);
    rig.cluster.time_pulls(&[0], &rig.path);
    rig.cluster.wait_until_idle();
    // The owner has downloaded from the upstream. Node 0 has followed it, or is the owner.
    let from_upstream = |node: &usize| rig.cluster.metric(*node, "dray_upstream_bytes_total{rule=\"docker.io\"}") > 0;
    let owner = rig.cluster.all_nodes().into_iter().find(from_upstream).unwrap_or(0);
    let (name, keeper) = match holder {
        Holder::Owner => ("the owner", owner),
        Holder::Another => ("another than the owner", if owner == 0 { 1 } else { 0 }),
    };
    if owner == 0 && matches!(holder, Holder::Another) {
        rig.cluster.time_pulls(&[1], &rig.path);
        rig.cluster.wait_until_idle();
    }
    for node in rig.cluster.all_nodes().into_iter().filter(|node| *node != keeper) {
        rig.cluster.kill(node);
        rig.cluster.clear(node);
        rig.cluster.launch(node);
    }
    rig.cluster.wait_until_formed();
    rig.cluster.stop_upstream();
    let before: Vec<u64> = rig.cluster.all_nodes().into_iter().map(|node| rig.cluster.sent(node)).collect();
    let others: Vec<usize> = rig.cluster.all_nodes().into_iter().filter(|node| *node != keeper).collect();
    let seconds = rig.cluster.time_pulls(&others, &rig.path);
    let most = rig.cluster.all_nodes().into_iter().map(|node| rig.cluster.sent(node) - before[node]).max().unwrap_or(0);
    let ideal = share(IMAGE, 1) / (400.0 * MBIT);
    let time = format!("{:.2} x size / card", last(&seconds) / ideal);
    row(&format!("held by {name}, 8 others, no upstream"), &format!("{:.1} s", last(&seconds)), &time, "<= 2.5 x");
    row("its busiest node sent", &format!("{:.2} x the image", share(most, IMAGE)), "", "<= 3 x");
}

/// Two zones with a narrow link between them.
fn zones(policy: &'static str, bar: &str) {
    let peers = if policy == "prefer" { "zones = \"prefer\"" } else { "zones = \"isolate\"" };
    let size = 128 << 20;
    let topology = Topology { zones: vec![4, 4], between_zones: 100, upstream: 400, peers, ..Topology::default() };
    let rig = rig(topology, size);
    let seconds = rig.cluster.time_pulls(&rig.cluster.all_nodes(), &rig.path);
    let peers_only = |from: &str, to: &str| {
        let name = format!("dray_peer_bytes_total{{from_zone=\"{from}\",to_zone=\"{to}\"}}");
        rig.cluster.all_nodes().into_iter().map(|node| rig.cluster.metric(node, &name)).sum::<u64>()
    };
    let crossed = peers_only("z0", "z1") + peers_only("z1", "z0");
    let crossed = format!("{:.3} x the blob", share(crossed, size));
    row(&format!("two zones of 4, zones = {policy}: crossed"), &crossed, &format!("{:.1} s", last(&seconds)), bar);
}

/// One node is ten times slower than the rest: first a node that does not own the blob, then the owner.
fn slow() {
    let (without, owner) = {
        let rig = rig(Topology::default(), IMAGE);
        let healthy: Vec<usize> = (1..8).collect();
        let seconds = last(&rig.cluster.time_pulls(&healthy, &rig.path));
        rig.cluster.wait_until_idle();
        (seconds, rig.cluster.owner(&rig.path))
    };
    for (what, slow) in [("no owner", if owner == 0 { 1 } else { 0 }), ("the owner", owner)] {
        let rig = rig(Topology { slow: Some((slow, 40)), ..Topology::default() }, IMAGE);
        let healthy: Vec<usize> = rig.cluster.all_nodes().into_iter().filter(|node| *node != slow).collect();
        let with = std::thread::scope(|scope| {
            // The slow node pulls as well, as long as that takes.
            scope.spawn(|| rig.cluster.pull(slow, &rig.path));
            last(&rig.cluster.time_pulls(&healthy, &rig.path))
        });
        let compared = format!("{:.2} x without it", with / without);
        let name = format!("8 nodes, one ten times slower ({what}): the others");
        row(&name, &format!("{with:.1} s"), &compared, "<= 1.3 x");
        row("its upstream bytes", &format!("{:.3} x", rig.upstream_share()), "", "");
    }
}

/// Every node is stopped and started in turn while the other nodes pull what they hold. Then one more node joins.
fn rolling() {
    let topology = Topology { zones: vec![9], upstream: 400, ..Topology::default() };
    let Blobs { mut cluster, digests, bytes } = blobs(topology, 24, 8 << 20, &[8]);
    let pull_all = |cluster: &Cluster, nodes: &[usize]| {
        digests.iter().for_each(|digest| drop(cluster.time_pulls(nodes, &path_of(digest))));
    };
    let first: Vec<usize> = (0..8).collect();
    pull_all(&cluster, &first);
    cluster.wait_until_idle();
    for node in &first {
        let others: Vec<usize> = first.iter().copied().filter(|other| other != node).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                cluster.stop(*node);
                cluster.launch(*node);
            });
            pull_all(&cluster, &others);
        });
        cluster.clear(*node);
        pull_all(&cluster, &[*node]);
    }
    cluster.join(8);
    cluster.wait_until_formed();
    pull_all(&cluster, &[8]);
    let fetched = format!("{:.3} x", share(cluster.upstream_bytes(), bytes));
    row("8 nodes restarted in turn and a ninth joins: upstream bytes", &fetched, "", "<= 1.02 x");
}

/// Results of the clients of a cluster whose nodes are killed.
#[derive(Default)]
struct Seen {
    pulls: AtomicU32,
    again: AtomicU32,
    failed: AtomicU32,
    wrong: AtomicU32,
}

/// A minute of pulls on eight nodes. Every five seconds one node is killed; one node is cut off for a while.
fn churn() {
    const MINUTE: Duration = Duration::from_secs(60);
    let topology = Topology { upstream: 400, ..Topology::default() };
    let Blobs { cluster, digests, .. } = blobs(topology, 400, 4 << 20, &[]);
    let seen = Seen::default();
    let requested: Mutex<BTreeSet<usize>> = Mutex::default();
    // Odd while the node is down or cut off. A changed number means that it was down meanwhile.
    let epochs: Vec<AtomicU32> = (0..8).map(|_| AtomicU32::new(0)).collect();
    let started = Instant::now();
    let pull = |node: usize, nth: usize| {
        requested.lock().expect("no client panicked").insert(nth);
        let before = epochs[node].load(Ordering::SeqCst);
        let pulled = cluster.pull(node, &path_of(&digests[nth]));
        let disturbed = before % 2 == 1 || epochs[node].load(Ordering::SeqCst) != before;
        let right = pulled.digest.as_deref() == Some(&*digests[nth]);
        if pulled.status == 200 && pulled.digest.is_some() && !right {
            seen.wrong.fetch_add(1, Ordering::Relaxed);
        }
        (right, disturbed)
    };
    let client = &|node: usize| {
        let mut step = 0;
        while started.elapsed() < MINUTE {
            // All clients pull about the same blobs at about the same time, as in a rollout.
            let elapsed = usize::try_from(started.elapsed().as_millis()).unwrap_or(0);
            let nth = (elapsed / 200 + (step * 7) % 20) % digests.len();
            step += 1;
            seen.pulls.fetch_add(1, Ordering::Relaxed);
            match pull(node, nth) {
                (true, _) => {}
                (false, true) => {
                    seen.again.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_secs(1));
                }
                (false, false) => {
                    seen.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for node in 0..8 {
            scope.spawn(move || client(node));
        }
        let mut nth = 0;
        while started.elapsed() < MINUTE - Duration::from_secs(5) {
            std::thread::sleep(Duration::from_secs(5));
            let victim = nth % 7;
            nth += 1;
            let disturb = |node: usize| {
                epochs[node].fetch_add(1, Ordering::SeqCst);
            };
            match nth {
                4 => {
                    disturb(7);
                    cluster.disconnect(7);
                }
                8 => {
                    cluster.reconnect(7);
                    disturb(7);
                }
                _ => {}
            }
            disturb(victim);
            cluster.kill(victim);
            cluster.launch(victim);
            disturb(victim);
        }
    });
    let count = |counter: &AtomicU32| counter.load(Ordering::Relaxed);
    let distinct = requested.lock().expect("no client panicked").len() as u64 * (4 << 20);
    let pulls = format!("{} pulls, {} on a dead node", count(&seen.pulls), count(&seen.again));
    row("a node killed every 5 s, one cut off for 20 s: failed", &count(&seen.failed).to_string(), &pulls, "0");
    row("its wrong bodies", &count(&seen.wrong).to_string(), "", "0");
    let fetched = format!("{:.3} x", share(cluster.upstream_bytes(), distinct));
    row("its upstream bytes", &fetched, &format!("{} MiB requested", distinct >> 20), "<= 1.3 x");
}
