//! Members that are known by SRV records, as the pods of a StatefulSet: they keep their names and caches when an update
//! gives them other addresses.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dray_tests::dns::Dns;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::TestUpstream;
use dray_tests::{eventually, http};
use rustix::process::Signal;

const SERVICE: &str = "_peers._tcp.dray.test";

fn pod(nth: usize) -> String {
    format!("dray-{nth}.dray.test")
}

/// Starts a pod at an address, with the cache of its volume.
fn start(nth: usize, address: &str, port: u16, rig: &Rig) -> Dray {
    rig.dns.set(&pod(nth), &[address]);
    let config = format!(
        "{}\n[dns]\nservers = [\"{}\"]\n[peers]\nlisten = \"{address}:{port}\"\nservice = \"{SERVICE}\"\nkey_file = \"{}\"\n",
        rule("docker.io", &rig.upstream.url()),
        rig.dns.address,
        rig.dir.path().join("key").display()
    );
    Start::new(config).cache(rig.dir.path().join(format!("volume-{nth}"))).run()
}

struct Rig {
    dir: tempfile::TempDir,
    dns: Dns,
    upstream: TestUpstream,
}

/// The addresses that a node knows its peers by.
async fn peers(dray: &Dray) -> Vec<String> {
    let status = get(&format!("http://{}/api/v1/status", dray.admin), &[]).await;
    let status: serde_json::Value = serde_json::from_str(&status.text()).unwrap();
    let peers = status["peers"].as_array().unwrap().iter();
    peers.map(|peer| peer["address"].as_str().unwrap().to_owned()).collect()
}

async fn knows(dray: &Dray, address: &str) {
    eventually(&format!("{address} is known"), async || {
        peers(dray).await.iter().any(|peer| peer.starts_with(address)).then_some(())
    })
    .await;
}

/// Pulls blobs from any ready node until it is stopped, as clients behind a Service do.
async fn load(ready: Arc<Mutex<Vec<String>>>, paths: Vec<String>, stop: Arc<AtomicBool>, failed: Arc<AtomicUsize>) {
    let mut nth = 0;
    while !stop.load(Ordering::SeqCst) {
        nth += 1;
        let node = {
            let ready = ready.lock().unwrap();
            ready[nth % ready.len()].clone()
        };
        let response = http::client().get(format!("{node}{}", paths[nth % paths.len()])).send().await;
        let body = async { response?.error_for_status()?.bytes().await };
        if let Err(error) = body.await {
            failed.fetch_add(1, Ordering::SeqCst);
            eprintln!("pull failed: {error}");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn disk_bytes(dir: &Path) -> u64 {
    let blobs = walk(&dir.join("v1/blobs"));
    blobs.into_iter().sum()
}

fn walk(dir: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path() {
            path if path.is_dir() => walk(&path),
            path => vec![std::fs::metadata(path).map_or(0, |meta| meta.len())],
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_update_keeps_caches_and_fails_no_pull() {
    let image = Image::new(1, &[1_500_000, 900_000, 800_000, 700_000, 600_000, 500_000, 400_000, 300_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, response| response).await;
    let rig = Rig { dir: tempfile::tempdir().unwrap(), dns: Dns::start(&[]).await, upstream };
    std::fs::write(rig.dir.path().join("key"), "a secret that all of them share").unwrap();
    let port = free_port();
    let targets: Vec<String> = (0..3).map(pod).collect();
    rig.dns.set_service(SERVICE, &targets.iter().map(|target| (target.as_str(), port)).collect::<Vec<_>>());
    let mut nodes: Vec<Dray> = (0..3).map(|nth| start(nth, &format!("127.0.1.{}", nth + 1), port, &rig)).collect();
    for node in &nodes {
        for nth in 0..3 {
            knows(node, &format!("127.0.1.{}:", nth + 1)).await;
        }
    }
    let paths: Vec<String> =
        image.blobs.keys().map(|digest| format!("/v2/library/app/blobs/{digest}?ns=docker.io")).collect();
    for node in &nodes {
        for path in &paths {
            assert_eq!(node.get(path).await.status, 200);
        }
        node.wait_for_fills().await;
    }
    let cached: u64 = (0..3).map(|nth| disk_bytes(&rig.dir.path().join(format!("volume-{nth}")))).sum();
    let whole: u64 = image.blobs.values().map(|bytes| bytes.len() as u64).filter(|len| *len > 256 << 10).sum();
    assert!(cached >= whole, "{cached} of {whole} bytes are on the volumes");
    let before = rig.upstream.sent();
    let ready = Arc::new(Mutex::new(nodes.iter().map(|node| node.url("")).collect::<Vec<_>>()));
    let (stop, failed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> =
        (0..4).map(|_| tokio::spawn(load(ready.clone(), paths.clone(), stop.clone(), failed.clone()))).collect();
    for nth in 0..3 {
        // As Kubernetes does: no new requests, then SIGTERM, then the pod with its volume at another address.
        let url = nodes[nth].url("");
        ready.lock().unwrap().retain(|node| *node != url);
        tokio::time::sleep(Duration::from_millis(200)).await;
        nodes[nth].process().signal(Signal::TERM);
        nodes[nth].process().wait();
        nodes[nth] = start(nth, &format!("127.0.2.{}", nth + 1), port, &rig);
        for node in &nodes {
            knows(node, &format!("127.0.2.{}:", nth + 1)).await;
        }
        ready.lock().unwrap().push(nodes[nth].url(""));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.store(true, Ordering::SeqCst);
    futures_util::future::join_all(clients).await;
    let again = rig.upstream.sent() - before;
    assert_eq!(failed.load(Ordering::SeqCst), 0, "failed pulls");
    assert!(again * 50 <= whole, "{again} of {whole} cached bytes came from the upstream again");
}
