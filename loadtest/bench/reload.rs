//! A reload of a thousand rules while clients pull.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dray_tests::dray::Start;
use dray_tests::image::digest;
use dray_tests::nginx::{Nginx, put_blob};
use rustix::process::{Pid, Signal, kill_process};

use super::rig::{clean, median, row};
use super::small::Target;

const RULES: usize = 1_000;
const RATE: f64 = 5_000.0;
const ROUNDS: usize = 5;

/// The time between two reloads during the measured time.
const RELOAD_EVERY: Duration = Duration::from_millis(700);

/// Every rule differs between two versions, so that each reload replaces all of them.
fn config(upstream: &str, version: usize) -> String {
    let rule = |name: &str| {
        format!("[[registry]]\nmatch = \"{name}\"\nupstreams = [\"{upstream}\"]\ntag_ttl = \"{}s\"\n", 100 + version)
    };
    (0..RULES).map(|nth| rule(&format!("r{nth}.example"))).chain([rule("docker.io")]).collect()
}

pub(crate) async fn under_load() {
    let dir = tempfile::Builder::new().prefix("dray-bench").tempdir_in("/var/tmp").unwrap();
    let blob = vec![7; 4096];
    put_blob(dir.path(), "library/app", &digest(&blob), &blob);
    let nginx = Nginx::pinned(dir.path(), &[""]).await;
    let start = Start::new(config(&nginx.url(0), 0)).cache(dir.path().join("cache")).env("DRAY_LOG", "info");
    let (file, log) = (start.dir().join("dray.toml"), dir.path().join("dray.log"));
    let dray = start.log_to(&log).run();
    let request = format!("GET /v2/library/app/blobs/{}?ns=docker.io HTTP/1.1\r\nHost: x\r\n\r\n", digest(&blob));
    let target = Target { port: dray.registry.port(), request };
    target.p99(RATE);
    let pid = Pid::from_raw(i32::try_from(dray.id()).unwrap()).unwrap();
    let (mut quiet, mut reloading, mut version) = (vec![], vec![], 0);
    for _ in 0..ROUNDS {
        quiet.push(target.p99(RATE) * 1e3);
        let done = AtomicBool::new(false);
        let slowest = std::thread::scope(|scope| {
            let reloads = scope.spawn(|| reload_until(&done, &file, &nginx.url(0), pid, &mut version));
            let slowest = target.p99(RATE);
            done.store(true, Ordering::SeqCst);
            reloads.join().unwrap();
            slowest
        });
        reloading.push(slowest * 1e3);
    }
    let log = std::fs::read_to_string(&log).unwrap();
    let applied = log.matches("configuration reloaded").count();
    assert!(applied >= ROUNDS && !log.contains("configuration reload failed"), "{applied} of {version} reloads");
    row(
        &format!("p99 at {RATE:.0} requests/s while {RULES} rules are reloaded, {applied} times"),
        &format!("{:.2} ms", median(&reloading)),
        &format!("{:.2} x without reloads ({:.2} ms)", median(&reloading) / median(&quiet), median(&quiet)),
        "<= 2 x",
    );
    clean(dray);
}

fn reload_until(done: &AtomicBool, file: &Path, upstream: &str, pid: Pid, version: &mut usize) {
    while !done.load(Ordering::SeqCst) {
        *version += 1;
        std::fs::write(file, config(upstream, *version)).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
        std::thread::sleep(RELOAD_EVERY);
    }
}
