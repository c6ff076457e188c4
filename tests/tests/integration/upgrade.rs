//! A running cluster is upgraded to this commit and rolled back, node by node, without a failed pull.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use dray_tests::dray::{Dray, Start, binary, previous_program, rule};
use dray_tests::http::client;
use dray_tests::image::Image;
use dray_tests::process::free_port;
use dray_tests::upstream::TestUpstream;
use rustix::process::Signal;

const NODES: usize = 3;

/// Current addresses of the nodes: each start uses another port.
type Addresses = Arc<Mutex<Vec<SocketAddr>>>;

/// The pulled paths and their bytes.
struct Work {
    paths: Vec<(String, Vec<u8>)>,
}

impl Work {
    fn new(images: &[Image]) -> Self {
        let mut paths = Vec::new();
        for (nth, image) in images.iter().enumerate() {
            let blobs = image.blobs.iter().map(|(digest, bytes)| (format!("blobs/{digest}"), bytes));
            let manifests = image.manifests.iter().map(|(digest, (_, bytes))| (format!("manifests/{digest}"), bytes));
            let tag = [("manifests/1".to_owned(), image.index())];
            for (path, bytes) in blobs.chain(manifests).chain(tag) {
                paths.push((format!("/v2/library/app{nth}/{path}?ns=docker.io"), bytes.to_vec()));
            }
        }
        Self { paths }
    }

    /// Pulls everything from one node, which has it afterwards.
    async fn pull_all(&self, node: &Dray) -> Result<(), String> {
        for (path, wanted) in &self.paths {
            let response = node.get(path).await;
            if response.status != 200 || response.body != *wanted {
                return Err(format!("{path}: {}, {} bytes", response.status, response.body.len()));
            }
        }
        Ok(())
    }

    /// Sends a request to one node after the other, as a runtime tries its hosts. Err: no node responded, or the body
    /// was wrong.
    async fn pull(&self, addresses: &Addresses) -> Result<(), String> {
        let (path, wanted) = &self.paths[fastrand::usize(..self.paths.len())];
        let first = fastrand::usize(..NODES);
        let mut errors = Vec::new();
        for nth in 0..NODES {
            let address = addresses.lock().unwrap()[(first + nth) % NODES];
            let sent = client().get(format!("http://{address}{path}")).send().await;
            let response = match sent {
                Ok(response) => response,
                // The node stopped before it responded: the next one is tried.
                Err(error) => {
                    errors.push(format!("{address}: {error:?}"));
                    continue;
                }
            };
            let status = response.status();
            let body = response.bytes().await.map_err(|e| format!("{path} was cut: {e:?}"))?;
            return match status == 200 && body == *wanted {
                true => Ok(()),
                false => Err(format!("{path}: {status}, {} bytes", body.len())),
            };
        }
        Err(format!("{path}: no node responds: {errors:?}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cluster_is_upgraded_and_rolled_back_under_load() {
    let Some(previous) = previous_program() else {
        println!("skipped: there is no earlier commit");
        return;
    };
    let images: Vec<_> = (1..=3).map(|seed| Image::new(seed, &[2_000_000, 700_000, 1_000])).collect();
    let names: Vec<_> = (0..images.len()).map(|nth| format!("library/app{nth}")).collect();
    let served: Vec<_> = names.iter().zip(&images).map(|(name, image)| (name.as_str(), "1", image)).collect();
    let upstream = TestUpstream::start(&served, |_, response| response).await;
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), "a secret of more than sixteen characters\n").unwrap();
    let ports: Vec<u16> = (0..NODES).map(|_| free_port()).collect();
    let members = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect::<Vec<_>>().join(", ");
    let config = |port: &u16| {
        let rule = rule("docker.io", &upstream.url());
        let key = key.path().display();
        format!("{rule}[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\nkey_file = \"{key}\"\n")
    };
    let mut nodes: Vec<Dray> =
        ports.iter().map(|port| Start::new(config(port)).with_program(&previous).run()).collect();
    let addresses: Addresses = Arc::new(Mutex::new(nodes.iter().map(|node| node.registry).collect()));
    let (work, done, pulled) =
        (Arc::new(Work::new(&images)), Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    // Every node is warm before the first one stops: a draining node downloads for its own clients only, so a blob
    // would be downloaded again.
    for node in &nodes {
        work.pull_all(node).await.unwrap();
    }
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (work, done, pulled, addresses) = (work.clone(), done.clone(), pulled.clone(), addresses.clone());
            tokio::spawn(async move {
                while !done.load(Ordering::SeqCst) {
                    work.pull(&addresses).await?;
                    pulled.fetch_add(1, Ordering::SeqCst);
                }
                Ok::<_, String>(())
            })
        })
        .collect();
    for program in [binary(), previous] {
        for nth in 0..NODES {
            let before = pulled.load(Ordering::SeqCst);
            let node = replace_program(nodes.remove(nth), &program);
            work.pull_all(&node).await.unwrap();
            addresses.lock().unwrap()[nth] = node.registry;
            nodes.insert(nth, node);
            // The mixed cluster serves for a while.
            dray_tests::eventually("pulls continue", async || {
                let is_over = clients.iter().any(tokio::task::JoinHandle::is_finished);
                (is_over || pulled.load(Ordering::SeqCst) > before + 100).then_some(())
            })
            .await;
        }
    }
    done.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap().unwrap();
    }
    // No node lost its cache: every blob was downloaded once.
    for image in &images {
        for digest in image.blobs.keys() {
            assert_eq!(upstream.count("GET", digest), 1, "{digest}");
        }
    }
}

/// Stops a node and starts another program with its configuration and cache.
fn replace_program(mut node: Dray, program: &Path) -> Dray {
    node.process().signal(Signal::TERM);
    node.process().wait();
    node.start().clone().with_program(program).run()
}
