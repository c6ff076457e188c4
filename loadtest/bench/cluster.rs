//! Many nodes, shaped links: how near a cluster comes to what its network cards allow.

use std::fs;

use dray_tests::cluster::{Cluster, Shape, unavailable};

use super::rig::{row, write_blob};

/// The image of most parts, in bytes.
const IMAGE: u64 = 512 << 20;

/// Mbit/s as bytes a second.
const MBIT: f64 = 125_000.0;

struct Rig {
    cluster: Cluster,
    path: String,
    size: u64,
}

/// What is measured, by its name on the command line.
pub(crate) const PARTS: [&str; 5] = ["cold-cluster", "held-by-owner", "held-by-another", "zones", "slow-node"];

/// Measures one of the parts.
pub(crate) fn part(name: &str) {
    if let Some(why) = unavailable() {
        println!("{name}: skipped, {why}");
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
        _ => slow(),
    }
}

enum Holder {
    Owner,
    Another,
}

fn rig(shape: Shape, size: u64) -> Rig {
    let dir = tempfile::Builder::new().prefix("dray-cluster").tempdir_in("/var/tmp").expect("a directory");
    let blobs = dir.path().join("www/v2/library/app/blobs");
    fs::create_dir_all(&blobs).expect("a directory");
    let digest = write_blob(&blobs, size);
    let cluster = Cluster::start(shape, dir);
    Rig { cluster, path: format!("/v2/library/app/blobs/{digest}?ns=docker.io"), size }
}

impl Rig {
    fn origin_share(&self) -> f64 {
        share(self.cluster.origin_bytes(), self.size)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
fn share(bytes: u64, of: u64) -> f64 {
    bytes as f64 / of as f64
}

fn last(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(0.0, f64::max)
}

/// Nobody has it, all want it.
fn cold() {
    let rig = rig(Shape::default(), IMAGE);
    let ideal = share(IMAGE, 1) / (200.0 * MBIT);
    let seconds = rig.cluster.race(&rig.cluster.everybody(), &rig.path);
    let time = format!("{:.2} x size / origin", last(&seconds) / ideal);
    row("512 MiB cold on 8 nodes of 400 Mbit/s, origin 200", &format!("{:.1} s", last(&seconds)), &time, "<= 1.2 x");
    row("its origin bytes", &format!("{:.3} x", rig.origin_share()), "", "<= 1.02 x");
    let most = rig.cluster.everybody().into_iter().map(|node| rig.cluster.sent(node)).max().unwrap_or(0);
    row("its busiest node sent", &format!("{:.2} x the image", share(most, IMAGE)), "", "");
}

/// One has it, the others want it, and the origin is gone.
fn held_by_one(holder: &Holder) {
    let shape = Shape { zones: vec![9], origin: 1000, ..Shape::default() };
    let mut rig = rig(shape, IMAGE);
    rig.cluster.race(&[0], &rig.path);
    rig.cluster.wait_until_idle();
    // The owner has asked the origin; node 0 has followed it, or is the owner.
    let from_origin = |node: &usize| rig.cluster.metric(*node, "dray_origin_bytes_total{rule=\"docker.io\"}") > 0;
    let owner = rig.cluster.everybody().into_iter().find(from_origin).unwrap_or(0);
    let (name, keeper) = match holder {
        Holder::Owner => ("the owner", owner),
        Holder::Another => ("another than the owner", if owner == 0 { 1 } else { 0 }),
    };
    if owner == 0 && matches!(holder, Holder::Another) {
        rig.cluster.race(&[1], &rig.path);
        rig.cluster.wait_until_idle();
    }
    for node in rig.cluster.everybody().into_iter().filter(|node| *node != keeper) {
        rig.cluster.kill(node);
        rig.cluster.clear(node);
        rig.cluster.launch(node);
    }
    rig.cluster.wait_until_formed();
    rig.cluster.stop_origin();
    let before: Vec<u64> = rig.cluster.everybody().into_iter().map(|node| rig.cluster.sent(node)).collect();
    let others: Vec<usize> = rig.cluster.everybody().into_iter().filter(|node| *node != keeper).collect();
    let seconds = rig.cluster.race(&others, &rig.path);
    let most = rig.cluster.everybody().into_iter().map(|node| rig.cluster.sent(node) - before[node]).max().unwrap_or(0);
    let ideal = share(IMAGE, 1) / (400.0 * MBIT);
    let time = format!("{:.2} x size / card", last(&seconds) / ideal);
    row(&format!("held by {name}, 8 others, no origin"), &format!("{:.1} s", last(&seconds)), &time, "<= 2.5 x");
    row("its busiest node sent", &format!("{:.2} x the image", share(most, IMAGE)), "", "<= 3 x");
}

/// Two zones with a narrow link between.
fn zones(policy: &'static str, bar: &str) {
    let peers = if policy == "prefer" { "zones = \"prefer\"" } else { "zones = \"isolate\"" };
    let size = 128 << 20;
    let shape = Shape { zones: vec![4, 4], between_zones: 100, origin: 400, peers, ..Shape::default() };
    let rig = rig(shape, size);
    let seconds = rig.cluster.race(&rig.cluster.everybody(), &rig.path);
    let peers_only = |from: &str, to: &str| {
        let name = format!("dray_peer_bytes_total{{from_zone=\"{from}\",to_zone=\"{to}\"}}");
        rig.cluster.everybody().into_iter().map(|node| rig.cluster.metric(node, &name)).sum::<u64>()
    };
    let crossed = peers_only("z0", "z1") + peers_only("z1", "z0");
    let crossed = format!("{:.3} x the blob", share(crossed, size));
    row(&format!("two zones of 4, zones = {policy}: crossed"), &crossed, &format!("{:.1} s", last(&seconds)), bar);
}

/// One node, not the owner, is ten times slower than the rest.
fn slow() {
    const SLOW: usize = 0;
    let healthy: Vec<usize> = (1..8).collect();
    let race = |shape: Shape| {
        let rig = rig(shape, IMAGE);
        let seconds = rig.cluster.race(&healthy, &rig.path);
        let fetched = rig.cluster.metric(SLOW, "dray_origin_bytes_total{rule=\"docker.io\"}");
        assert_eq!(fetched, 0, "the slow one is no owner");
        last(&seconds)
    };
    let without = race(Shape::default());
    let with = {
        let rig = rig(Shape { slow: Some((SLOW, 40)), ..Shape::default() }, IMAGE);
        std::thread::scope(|scope| {
            // It pulls as well, for as long as that takes.
            scope.spawn(|| rig.cluster.pull(SLOW, &rig.path));
            last(&rig.cluster.race(&healthy, &rig.path))
        })
    };
    let others = format!("{with:.1} s");
    row(
        "8 nodes, one ten times slower: the others",
        &others,
        &format!("{:.2} x without it", with / without),
        "<= 1.3 x",
    );
}
