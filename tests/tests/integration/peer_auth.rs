//! Authenticated peers: what they share beyond content that a digest verifies, and with which peers.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::http::get;
use dray_tests::image::Image;
use dray_tests::process::{free_port, output};
use dray_tests::tls::Authority;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream;

const TAG: &str = "/v2/library/app/manifests/1?ns=docker.io";

/// A directory with a key file.
fn key(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peers.key");
    std::fs::write(&path, text).unwrap();
    let setting = format!("key_file = \"{}\"", path.display());
    (dir, setting)
}

/// Nodes that list each other, each with these rules and these lines of `[peers]`.
fn cluster(each: &[(&str, &str)]) -> Vec<Dray> {
    members(each).into_iter().map(Start::run).collect()
}

fn members(each: &[(&str, &str)]) -> Vec<Start> {
    let ports: Vec<u16> = each.iter().map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let start = |(port, (rules, auth)): (&u16, &(&str, &str))| {
        let members = members.join(", ");
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n{auth}\n");
        Start::new(format!("{rules}\n{peers}"))
    };
    ports.iter().zip(each).map(start).collect()
}

/// An upstream whose tag can move, and which can fail.
struct MovingTag {
    upstream: TestUpstream,
    now: Arc<AtomicUsize>,
    images: [Image; 2],
}

const GONE: usize = 2;

impl MovingTag {
    async fn new() -> Self {
        let images = [Image::new(1, &[2_000_000]), Image::new(2, &[1000])];
        let contents = images.each_ref().map(|image| Content::new(&[("library/app", "1", image)]));
        let now = Arc::new(AtomicUsize::new(0));
        let at = now.clone();
        let upstream =
            TestUpstream::with_handler(move |request: &Request| match contents.get(at.load(Ordering::SeqCst)) {
                Some(content) => content.respond(request),
                None => Response::new(503, ""),
            })
            .await;
        Self { upstream, now, images }
    }

    fn set(&self, state: usize) {
        self.now.store(state, Ordering::SeqCst);
    }

    fn rule(&self, more: &str) -> String {
        format!("{}{more}\n", rule("docker.io", &self.upstream.url()))
    }

    /// Number of upstream requests that resolve the tag.
    fn tag_lookups(&self) -> usize {
        self.lookups_of("/manifests/1")
    }

    fn lookups_of(&self, tag: &str) -> usize {
        self.upstream.count("HEAD", tag)
    }
}

async fn resolve_on(nodes: &[Dray]) -> Vec<(u16, String, String)> {
    let responses = join_all(nodes.iter().map(|node| node.get(TAG))).await;
    let summary = |response: &dray_tests::http::ClientResponse| {
        let digest = response.header("docker-content-digest").unwrap_or_default().to_owned();
        (response.status, digest, response.source().to_owned())
    };
    responses.iter().map(summary).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tag_in_cluster_resolves_with_one_upstream_request() {
    let moving = MovingTag::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"5s\"");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    let resolved = resolve_on(&nodes).await;
    assert!(
        resolved.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)),
        "{resolved:?}"
    );
    assert_eq!(moving.tag_lookups(), 1, "one node resolves it for all");
    moving.set(1);
    let before = resolve_on(&nodes).await;
    assert!(before.iter().all(|(_, digest, _)| *digest == moving.images[0].digest), "the tag is fresh on every node");
    tokio::time::sleep(std::time::Duration::from_millis(5200)).await;
    eventually("the tag expires on every node", async || {
        let after = resolve_on(&nodes).await;
        after.iter().all(|(_, digest, _)| *digest == moving.images[1].digest).then_some(())
    })
    .await;
    assert_eq!(moving.tag_lookups(), 2);
}

/// The sum of all series of a counter, over all nodes.
async fn sum(nodes: &[Dray], metric: &str) -> f64 {
    let mut sum = 0.0;
    for node in nodes {
        let text = get(&format!("http://{}/metrics", node.admin), &[]).await.text();
        let series = text.lines().filter(|line| line.starts_with(metric));
        sum += series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>();
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn new_tag_takes_at_most_two_peer_requests() {
    let (_dir, key) = key("a secret of all the drays\n");
    // The ports differ in each round, so one node may own both the tag and its digest.
    for _ in 0..3 {
        let moving = MovingTag::new().await;
        let rules = moving.rule("");
        let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
        assert_eq!(nodes[0].get(TAG).await.status, 200);
        let requests = sum(&nodes, "dray_peer_requests_total").await;
        assert!(requests <= 2.0, "{requests} requests between peers");
        assert_eq!(moving.upstream.count("GET", "/manifests/"), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn owner_without_cache_gets_renewed_manifest_from_peer() {
    let (_dir, key) = key("a secret of all the drays\n");
    // The ports differ in each round, so either node may own the tag, and either its digest.
    for _ in 0..4 {
        let moving = MovingTag::new().await;
        let rules = moving.rule("tag_ttl = \"1s\"");
        let mut nodes = cluster(&[(&rules, &key), (&rules, &key)]);
        assert_eq!(nodes[0].get(TAG).await.status, 200);
        let lost = nodes.pop().unwrap();
        std::fs::remove_dir_all(lost.start().cache_dir().join("v1")).unwrap();
        nodes.push(lost.restart());
        eventually("the tag is renewed", async || {
            assert_eq!(nodes[0].get(TAG).await.status, 200);
            (moving.tag_lookups() >= 2).then_some(())
        })
        .await;
        assert_eq!(nodes[1].get(TAG).await.status, 200);
        assert_eq!(moving.upstream.count("GET", "/manifests/"), 1, "the upstream sends the manifest once");
    }
}

/// The files below a directory, with their modification times.
fn files_with_mtime(dir: &Path) -> Vec<(std::path::PathBuf, std::time::SystemTime)> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .flat_map(|path| match path.is_dir() {
            true => files_with_mtime(&path),
            false => vec![(path.clone(), path.metadata().unwrap().modified().unwrap())],
        })
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_tag_unmoved_is_not_sent_or_written_again() {
    let moving = MovingTag::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"1s\"");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    resolve_on(&nodes).await;
    let records = || {
        nodes.iter().flat_map(|node| files_with_mtime(&node.start().cache_dir().join("v1/records"))).collect::<Vec<_>>()
    };
    let mut before = records();
    eventually("the records are written", async || {
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let now = records();
        let is_settled = now == before && now.len() >= 3;
        before = now;
        is_settled.then_some(())
    })
    .await;
    let sent = sum(&nodes, "dray_peer_bytes_total").await;
    for renewals in 2..5 {
        eventually("the tag is renewed", async || {
            resolve_on(&nodes).await;
            (moving.tag_lookups() >= renewals).then_some(())
        })
        .await;
    }
    let resolved = resolve_on(&nodes).await;
    assert!(
        resolved.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)),
        "{resolved:?}"
    );
    assert_eq!(sum(&nodes, "dray_peer_bytes_total").await, sent, "no manifest was sent");
    assert_eq!(records(), before, "nothing was written");
    moving.set(1);
    eventually("a tag that moves is written", async || {
        let resolved = resolve_on(&nodes).await;
        let has_moved = resolved.iter().all(|(_, digest, _)| *digest == moving.images[1].digest);
        (has_moved && records() != before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn known_tag_survives_loss_of_upstream_and_owner() {
    let moving = MovingTag::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"1s\"\nnegative_ttl = \"0s\"");
    let mut nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key), (&rules, &key)]);
    assert_eq!(nodes[0].get(TAG).await.status, 200);
    moving.set(GONE);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let resolved = resolve_on(&nodes).await;
    let expected = (200, moving.images[0].digest.clone(), "stale".to_owned());
    assert!(resolved.iter().all(|resolved| *resolved == expected), "{resolved:?}");
    // Each node may be the owner: the tag survives the loss of any of them.
    for gone in 0..2 {
        nodes[gone].process().kill();
        let rest = resolve_on(&nodes[gone + 1..]).await;
        assert!(rest.iter().all(|resolved| *resolved == expected), "{rest:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_blob_is_shared_with_authenticated_peers_only() {
    let moving = MovingTag::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("credentials = { username = \"u\", password_env = \"HOME\" }");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    let (layer, bytes) = moving.images[0].layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let responses = join_all(nodes.iter().map(|node| node.get(&path))).await;
    assert!(responses.iter().all(|response| response.status == 200 && response.body == *bytes));
    assert_eq!(moving.upstream.sent(), bytes.len() as u64, "downloaded once for all nodes");
    assert_eq!(responses.iter().filter(|response| response.source() == "peer").count(), 2);
    // An unauthenticated client gets nothing, whatever its headers claim.
    for path in [path.as_str(), TAG] {
        for headers in
            [&[][..], &[("dray-auth", "1 00")], &[("dray-request", "role=global"), ("cache-control", "only-if-cached")]]
        {
            let response = get(&format!("http://{}{path}", nodes[0].peers.unwrap()), headers).await;
            assert_eq!(response.status, 401, "{path} {headers:?}");
            assert!(response.text().contains("key_file"), "{}", response.text());
        }
    }
    assert!(nodes[0].metric("dray_peer_auth_failures_total{direction=\"request\"}").await >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_other_keys_share_after_the_key_is_replaced() {
    let moving = MovingTag::new().await;
    let (_ours, our_key) = key("a secret of all the drays\n");
    let (theirs, their_key) = key("a secret of another cluster\n");
    let rules = moving.rule("");
    let nodes = cluster(&[(&rules, &our_key), (&rules, &their_key), (&rules, "")]);
    let (layer, bytes) = moving.images[0].layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    for response in join_all(nodes.iter().map(|node| node.get(&path))).await {
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == *bytes);
    }
    for (status, digest, _) in resolve_on(&nodes).await {
        assert_eq!((status, &digest), (200, &moving.images[0].digest));
    }
    // The file is read again: first with an invalid key, then with the right one.
    let file = theirs.path().join("peers.key");
    std::fs::write(&file, "short").unwrap();
    std::fs::write(&file, "a secret of all the drays\n").unwrap();
    wait_for_trust(&moving, &nodes[..2]).await;
}

/// Waits until the nodes authenticate each other. Then one node's lookup of a tag serves the others, and upstream gets
/// one request.
async fn wait_for_trust(moving: &MovingTag, nodes: &[Dray]) {
    let mut nth = 0;
    eventually("the nodes authenticate each other", async || {
        nth += 1;
        let path = format!("/v2/library/app/manifests/absent-{nth}-?ns=docker.io");
        for node in nodes {
            assert_eq!(node.get(&path).await.status, 404);
        }
        (moving.lookups_of(&format!("absent-{nth}-")) == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn private_blob_is_not_shared_with_peer_of_other_rules() {
    let moving = MovingTag::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let private = moving.rule("credentials = { username = \"u\", password_env = \"HOME\" }");
    let public = moving.rule("");
    // With this many nodes, the owner most likely has other rules.
    let nodes = cluster(&[(&public, &key), (&private, &key), (&private, &key), (&private, &key)]);
    // Both kinds of node own some of the blobs.
    for (blob, bytes) in &moving.images[0].blobs {
        let before = moving.upstream.sent();
        let path = format!("/v2/library/app/blobs/{blob}?ns=docker.io");
        assert_eq!(nodes[1].get(&path).await.status, 200);
        assert_eq!(moving.upstream.sent() - before, bytes.len() as u64);
        let response = nodes[0].get(&path).await;
        assert_eq!((response.status, response.source()), (200, "upstream"), "private content is not shared");
        assert_eq!(moving.upstream.sent() - before, 2 * bytes.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tag_naming_a_private_digest_does_not_authorize() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("ours/app", "1", &image)]);
    let digest = image.digest.clone();
    // The operator of the public registry knows the digest, but not the content.
    let upstream = TestUpstream::with_handler(move |request: &Request| match request.path.contains("/theirs/") {
        true if request.method == "HEAD" => Response::new(200, "").with("docker-content-digest", &digest),
        true => Response::new(404, ""),
        false => content.respond(request),
    })
    .await;
    let private = format!(
        "{}credentials = {{ username = \"u\", password_env = \"HOME\" }}\n",
        rule("private.example", &upstream.url())
    );
    let rules = format!("{private}{}", rule("public.example", &upstream.url()));
    let (_dir, key) = key("a secret of all the drays\n");
    let nodes = cluster(&[(&rules, &key), (&rules, &key)]);
    for node in &nodes {
        assert_eq!(node.get("/v2/ours/app/manifests/1?ns=private.example").await.status, 200);
    }
    for node in &nodes {
        let response = node.get("/v2/theirs/app/manifests/1?ns=public.example").await;
        assert_eq!(response.status, 404, "{}", response.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_with_other_rules_each_resolve_tags() {
    let moving = MovingTag::new().await;
    let dir = tempfile::tempdir().unwrap();
    let certificates = mtls(&authority(dir.path()), "dray.example");
    let (_key_dir, key) = key("a secret of all the drays\n");
    for auth in [certificates, key] {
        let rules = ["10s", "20s", "30s"].map(|ttl| moving.rule(&format!("tag_ttl = \"{ttl}\"")));
        let nodes = cluster(&rules.each_ref().map(|rules| (rules.as_str(), auth.as_str())));
        let resolved = resolve_on(&nodes).await;
        assert!(
            resolved.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)),
            "{resolved:?}"
        );
    }
}

/// The `mtls` setting with a new certificate for this name.
fn mtls(authority: &Authority, name: &str) -> String {
    let files = authority.files(&[name]);
    format!(
        "mtls = {{ cert = \"{}\", key = \"{}\", ca = \"{}\" }}",
        files.cert.display(),
        files.key.display(),
        authority.ca_file.display()
    )
}

fn authority(dir: &Path) -> Authority {
    std::fs::create_dir_all(dir).unwrap();
    Authority::new(dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_with_certificates_for_one_name_share() {
    let moving = MovingTag::new().await;
    let dir = tempfile::tempdir().unwrap();
    let ours = authority(&dir.path().join("ours"));
    let theirs = authority(&dir.path().join("theirs"));
    let good = mtls(&ours, "dray.example");
    let (other_name, other_authority) = (mtls(&ours, "web.example"), mtls(&theirs, "dray.example"));
    let rules = moving.rule("credentials = { username = \"u\", password_env = \"HOME\" }");
    let nodes = cluster(&[(&rules, &good), (&rules, &good), (&rules, &other_name), (&rules, &other_authority)]);
    let (layer, bytes) = moving.images[0].layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    for node in &nodes {
        let response = node.get(&path).await;
        assert_eq!((response.status, response.complete), (200, true));
        assert!(response.body == *bytes);
    }
    assert_eq!(moving.upstream.sent(), 3 * bytes.len() as u64, "two nodes share; the others are not peers");
    let failures = nodes.iter().map(|node| node.metric("dray_peer_auth_failures_total{direction=\"response\"}"));
    assert!(
        join_all(failures).await.into_iter().sum::<u64>() >= 2,
        "each node that requests the owner counts a failure"
    );
    let resolved = resolve_on(&nodes[..2]).await;
    assert!(resolved.iter().all(|(_, digest, _)| *digest == moving.images[0].digest));
    // A client without a valid certificate cannot send a request.
    for shown in [vec![], vec!["--cert".to_owned(), theirs.files(&["x.example"]).cert.display().to_string()]] {
        let url = format!("https://{}{path}", nodes[0].peers.unwrap());
        let mut curl = Command::new("curl");
        curl.args(["-sk", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}"]).args(&shown);
        if let Some(cert) = shown.last() {
            curl.args(["--key", &cert.replace(".crt", ".key")]);
        }
        let tried = output(curl.arg(url));
        assert_eq!(String::from_utf8_lossy(&tried.stdout), "000", "no response without a valid certificate");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peer_certificates_replaced_at_runtime_are_used() {
    let moving = MovingTag::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (authority(&dir.path().join("old")), authority(&dir.path().join("new")));
    let settings: Vec<String> = (0..2)
        .map(|node| {
            let dir = dir.path().join(format!("node{node}"));
            std::fs::create_dir(&dir).unwrap();
            replace(&old, &dir);
            let file = |name: &str| dir.join(name).display().to_string();
            format!(
                "mtls = {{ cert = \"{}\", key = \"{}\", ca = \"{}\" }}",
                file("tls.crt"),
                file("tls.key"),
                file("ca.crt")
            )
        })
        .collect();
    let rules = moving.rule("");
    let log = |node: usize| dir.path().join(format!("log{node}"));
    let starts = members(&[(&rules, &settings[0]), (&rules, &settings[1])]).into_iter();
    let nodes: Vec<Dray> =
        starts.enumerate().map(|(node, start)| start.env("DRAY_LOG", "warn").log_to(&log(node)).run()).collect();
    // A certificate without a DNS name cannot authenticate a peer, so it is not used.
    let nameless = old.files(&["192.0.2.1"]);
    std::fs::copy(&nameless.key, dir.path().join("node1/tls.key")).unwrap();
    std::fs::copy(&nameless.cert, dir.path().join("node1/tls.crt")).unwrap();
    eventually("the log names the certificate", async || {
        std::fs::read_to_string(log(1)).unwrap().contains("has no DNS name").then_some(())
    })
    .await;
    wait_for_trust(&moving, &nodes).await;
    replace(&new, &dir.path().join("node0"));
    replace(&new, &dir.path().join("node1"));
    let presented = || {
        let args = ["s_client", "-connect", &nodes[0].peers.unwrap().to_string(), "-showcerts"].map(str::to_owned);
        let shown = output(Command::new("openssl").args(args).stdin(std::process::Stdio::null()));
        String::from_utf8_lossy(&shown.stdout).into_owned()
    };
    let certificate = std::fs::read_to_string(dir.path().join("node0/tls.crt")).unwrap();
    let body: String = certificate.lines().nth(1).unwrap().to_owned();
    eventually("the new certificate is presented", async || presented().contains(&body).then_some(())).await;
    wait_for_trust(&moving, &nodes).await;
}

fn replace(authority: &Authority, dir: &Path) {
    let files = authority.files(&["dray.example"]);
    std::fs::copy(&files.cert, dir.join("tls.crt")).unwrap();
    std::fs::copy(&files.key, dir.join("tls.key")).unwrap();
    std::fs::copy(&authority.ca_file, dir.join("ca.crt")).unwrap();
}

/// The cluster resolves a tag once per TTL, however many clients request it on any node.
#[tokio::test(flavor = "multi_thread")]
async fn tag_of_1000_clients_on_8_nodes_is_requested_once() {
    let images: Vec<Image> = (0..20).map(|seed| Image::new(seed, &[1000])).collect();
    let tags: Vec<String> = (0..20).map(|nth| format!("t{nth}")).collect();
    let served: Vec<_> = tags.iter().zip(&images).map(|(tag, image)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&served, |_, response| response).await;
    let (_dir, key) = key("0123456789abcdef");
    let rules = format!("{}tag_ttl = \"1h\"\n", rule("docker.io", &upstream.url()));
    let nodes = cluster(&[(rules.as_str(), key.as_str()); 8]);
    let client = dray_tests::http::client();
    let request_tag = async |nth: usize| {
        let tag = &tags[nth % 20];
        let url = nodes[nth % 8].url(&format!("/v2/library/app/manifests/{tag}?ns=docker.io"));
        let response = client.get(url).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.bytes().await.unwrap() == images[nth % 20].index());
    };
    // A thousand requests; each node and each tag gets several at the same time.
    let requests = stream::iter((0..1000).map(|nth| request_tag(nth + nth / 40)));
    requests.buffer_unordered(200).collect::<Vec<()>>().await;
    assert!(upstream.count("HEAD", "/manifests/t") <= 20, "{} HEADs", upstream.count("HEAD", "/manifests/t"));
    for image in &images {
        assert!(upstream.count("GET", &image.digest) + upstream.count("GET", "/manifests/t") <= 20);
        assert!(upstream.count("GET", &image.digest) <= 1);
    }
}

/// Two nodes with the same rule. The upstream denies the second one; the first one owns the blob.
async fn two_nodes_with_owner(rules: &str, auth: &str, digest: &str) -> Vec<Dray> {
    loop {
        let starts = members(&[(rules, auth), (rules, auth)]);
        let passwords = ["right", "wrong"];
        let nodes: Vec<Dray> =
            starts.into_iter().zip(passwords).map(|(start, password)| start.env("P", password).run()).collect();
        let url = format!("http://{}/api/v1/explain?image=docker.io/library/app@{digest}", nodes[0].admin);
        let explained: serde_json::Value = serde_json::from_slice(&get(&url, &[]).await.body).unwrap();
        // The owner depends on the ports.
        if explained["owner"]["is_this_node"] == true {
            return nodes;
        }
    }
}

/// If the upstream denies a range that the owner lent, the owner downloads it, and no byte twice.
#[tokio::test(flavor = "multi_thread")]
async fn lent_range_denied_by_upstream_comes_from_the_owner() {
    let image = Image::new(1, &[80 << 20]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let right = format!("Basic {}", STANDARD.encode("u:right"));
    let upstream = TestUpstream::with_handler(move |request: &Request| {
        if request.header("authorization") != Some(&right) {
            return Response::new(401, "").with("www-authenticate", "Basic realm=\"upstream\"");
        }
        // Slow enough that free ranges remain when the second node requests the blob.
        content.respond(request).fault(Fault::SlowUntilGate(8 << 20))
    })
    .await;
    let rules =
        format!("{}credentials = {{ username = \"u\", password_env = \"P\" }}", rule("docker.io", &upstream.url()));
    let (_dir, auth) = key("0123456789abcdef");
    let layer = &image.layers[0];
    let nodes = two_nodes_with_owner(&rules, &auth, layer).await;
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let responses = join_all(nodes.iter().map(|node| node.get(&path))).await;
    for response in &responses {
        assert_eq!((response.status, response.complete, &response.body), (200, true, &image.blobs[layer]));
    }
    let denied = "dray_upstream_requests_total{kind=\"blob\",outcome=\"denied\",rule=\"docker.io\"}";
    assert!(nodes[1].metric(denied).await > 0, "the owner lent it a range");
    assert_eq!(nodes[1].metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await, 0);
    let downloaded = nodes[0].metric("dray_upstream_bytes_total{rule=\"docker.io\"}").await;
    assert_eq!(downloaded, image.blobs[layer].len() as u64, "no byte twice");
}
