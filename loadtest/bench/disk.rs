//! The disk: its peak usage, and the time of a start with many blobs.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dray_tests::dray::{Start, binary};
use dray_tests::process::run;
use sha2::{Digest, Sha256};

use super::rig::{GIB, ROUNDS, Rig, Server, clean, curl, disk_usage, median, row, write_blob};

/// 20 GiB of blobs through 2 GiB of disk.
pub(crate) async fn churn(rig: &Rig) {
    const BLOB: u64 = 256 << 20;
    let blobs = rig.dir.path().join("www/v2/library/churn/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let dray = rig.start(Server::Fast).disk("2GiB").run();
    let (dir, most, over) =
        (dray.start().cache_dir().clone(), Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (watched, ended) = (most.clone(), over.clone());
    let watching = std::thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            watched.fetch_max(disk_usage(&dir), Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    for nth in 0..20 * GIB / BLOB {
        // Another length makes another blob.
        let digest = write_blob(&blobs, BLOB - (nth << 20));
        curl(&dray.url(&format!("/v2/library/churn/blobs/{digest}")));
        fs::remove_file(blobs.join(digest)).unwrap();
    }
    over.store(true, Ordering::Relaxed);
    watching.join().unwrap();
    #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
    let ratio = most.load(Ordering::Relaxed) as f64 / (2 * GIB) as f64;
    row("20 GiB through 2 GiB of disk", &format!("{ratio:.3} x at most"), "disk = \"2GiB\"", "<= 1.01 x");
    clean(dray);
}

/// The binary, and a start with many blobs on disk.
pub(crate) async fn start(rig: &Rig) {
    let cache = rig.dir.path().join("many");
    let blobs = cache.join("v1/blobs/sha256");
    for n in 0..10_000_u32 {
        let hex: String = Sha256::digest(n.to_le_bytes()).iter().map(|b| format!("{b:02x}")).collect();
        let dir = blobs.join(&hex[..2]);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(hex), [0; 64]).unwrap();
    }
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let dray = Start::new("").cache(&cache).run();
        times.push(started.elapsed().as_secs_f64());
        drop(dray);
    }
    row("start with 10,000 blobs on disk", &format!("{:.2} s", median(&times)), "", "< 1 s");
    let stripped = rig.dir.path().join("dray");
    run(Command::new("strip").arg("-o").arg(&stripped).arg(binary()));
    let megabytes = fs::metadata(&stripped).unwrap().len() / 1_000_000;
    row("stripped binary", &format!("{megabytes} MB"), "", "<= 25 MB");
}
