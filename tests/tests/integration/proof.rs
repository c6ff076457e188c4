//! Peers that prove who they are: what they share beyond what a digest proves, and with whom not.

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

/// Nodes that know each other, each with these rules and these lines of `[peers]`.
fn cluster(each: &[(&str, &str)]) -> Vec<Dray> {
    members(each).into_iter().map(Start::run).collect()
}

fn members(each: &[(&str, &str)]) -> Vec<Start> {
    let ports: Vec<u16> = each.iter().map(|_| free_port()).collect();
    let members: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    let start = |(port, (rules, proof)): (&u16, &(&str, &str))| {
        let members = members.join(", ");
        let peers = format!("[peers]\nlisten = \"127.0.0.1:{port}\"\nstatic = [{members}]\n{proof}\n");
        Start::new(format!("{rules}\n{peers}"))
    };
    ports.iter().zip(each).map(start).collect()
}

/// What the origin has under a tag can be changed, and the origin can go.
struct Moving {
    upstream: TestUpstream,
    now: Arc<AtomicUsize>,
    images: [Image; 2],
}

const GONE: usize = 2;

impl Moving {
    async fn new() -> Self {
        let images = [Image::new(1, &[2_000_000]), Image::new(2, &[1000])];
        let contents = images.each_ref().map(|image| Content::new(&[("library/app", "1", image)]));
        let now = Arc::new(AtomicUsize::new(0));
        let at = now.clone();
        let upstream =
            TestUpstream::answering(move |request: &Request| match contents.get(at.load(Ordering::SeqCst)) {
                Some(content) => content.answer(request),
                None => Response::new(503, ""),
            })
            .await;
        Self { upstream, now, images }
    }

    fn is(&self, mood: usize) {
        self.now.store(mood, Ordering::SeqCst);
    }

    fn rule(&self, more: &str) -> String {
        format!("{}{more}\n", rule("docker.io", &self.upstream.url()))
    }

    /// How often it was asked what the tag means.
    fn asked(&self) -> usize {
        self.asked_for("/manifests/1")
    }

    fn asked_for(&self, tag: &str) -> usize {
        self.upstream.count("HEAD", tag)
    }
}

async fn tag_on(nodes: &[Dray]) -> Vec<(u16, String, String)> {
    let answers = join_all(nodes.iter().map(|node| node.get(TAG))).await;
    let told = |answer: &dray_tests::http::Answer| {
        let digest = answer.header("docker-content-digest").unwrap_or_default().to_owned();
        (answer.status, digest, answer.source().to_owned())
    };
    answers.iter().map(told).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_cluster_agrees_on_a_tag_for_one_question() {
    let moving = Moving::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"5s\"");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    let meant = tag_on(&nodes).await;
    assert!(meant.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)), "{meant:?}");
    assert_eq!(moving.asked(), 1, "one node asked for all");
    moving.is(1);
    let before = tag_on(&nodes).await;
    assert!(before.iter().all(|(_, digest, _)| *digest == moving.images[0].digest), "a lease holds everywhere");
    tokio::time::sleep(std::time::Duration::from_millis(5200)).await;
    eventually("it ends everywhere", async || {
        let after = tag_on(&nodes).await;
        after.iter().all(|(_, digest, _)| *digest == moving.images[1].digest).then_some(())
    })
    .await;
    assert_eq!(moving.asked(), 2);
}

/// All series of a counter, of all nodes.
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
async fn a_new_tag_takes_two_peer_requests_at_most() {
    let (_dir, key) = key("a secret of all the drays\n");
    // By the addresses, which differ each time, one node may own both the tag and its digest.
    for _ in 0..3 {
        let moving = Moving::new().await;
        let rules = moving.rule("");
        let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
        assert_eq!(nodes[0].get(TAG).await.status, 200);
        let requests = sum(&nodes, "dray_peer_requests_total").await;
        assert!(requests <= 2.0, "{requests} requests between peers");
        assert_eq!(moving.upstream.count("GET", "/manifests/"), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_without_its_cache_gets_a_renewed_manifest_from_its_follower() {
    let (_dir, key) = key("a secret of all the drays\n");
    // By the addresses, which differ each time, either node owns the tag, and either its digest.
    for _ in 0..4 {
        let moving = Moving::new().await;
        let rules = moving.rule("tag_ttl = \"1s\"");
        let mut nodes = cluster(&[(&rules, &key), (&rules, &key)]);
        assert_eq!(nodes[0].get(TAG).await.status, 200);
        let lost = nodes.pop().unwrap();
        std::fs::remove_dir_all(lost.start().cache_dir().join("v1")).unwrap();
        nodes.push(lost.restart());
        eventually("the tag is renewed", async || {
            assert_eq!(nodes[0].get(TAG).await.status, 200);
            (moving.asked() >= 2).then_some(())
        })
        .await;
        assert_eq!(nodes[1].get(TAG).await.status, 200);
        assert_eq!(moving.upstream.count("GET", "/manifests/"), 1, "the upstream sends the manifest once");
    }
}

/// The files of a directory, and when each was written.
fn written(dir: &Path) -> Vec<(std::path::PathBuf, std::time::SystemTime)> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = entries
        .flat_map(|path| match path.is_dir() {
            true => written(&path),
            false => vec![(path.clone(), path.metadata().unwrap().modified().unwrap())],
        })
        .collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_tag_that_has_not_moved_is_neither_sent_nor_written_again() {
    let moving = Moving::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"1s\"");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    tag_on(&nodes).await;
    let records =
        || nodes.iter().flat_map(|node| written(&node.start().cache_dir().join("v1/records"))).collect::<Vec<_>>();
    let mut before = records();
    eventually("what is learned is written", async || {
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
            tag_on(&nodes).await;
            (moving.asked() >= renewals).then_some(())
        })
        .await;
    }
    let meant = tag_on(&nodes).await;
    assert!(meant.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)), "{meant:?}");
    assert_eq!(sum(&nodes, "dray_peer_bytes_total").await, sent, "no manifest was sent");
    assert_eq!(records(), before, "nothing was written");
    moving.is(1);
    eventually("a tag that moves is written", async || {
        let meant = tag_on(&nodes).await;
        let has_moved = meant.iter().all(|(_, digest, _)| *digest == moving.images[1].digest);
        (has_moved && records() != before).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_any_node_knows_outlives_its_upstream_and_its_owner() {
    let moving = Moving::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("tag_ttl = \"1s\"\nnegative_ttl = \"0s\"");
    let mut nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key), (&rules, &key)]);
    assert_eq!(nodes[0].get(TAG).await.status, 200);
    moving.is(GONE);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let meant = tag_on(&nodes).await;
    let expected = (200, moving.images[0].digest.clone(), "stale".to_owned());
    assert!(meant.iter().all(|meant| *meant == expected), "{meant:?}");
    // Whoever owns it: any one of them may go.
    for gone in 0..2 {
        nodes[gone].process().kill();
        let rest = tag_on(&nodes[gone + 1..]).await;
        assert!(rest.iter().all(|meant| *meant == expected), "{rest:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_with_credentials_is_shared_with_those_who_have_proven_themselves() {
    let moving = Moving::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let rules = moving.rule("credentials = { username = \"u\", password_env = \"HOME\" }");
    let nodes = cluster(&[(&rules, &key), (&rules, &key), (&rules, &key)]);
    let (layer, bytes) = moving.images[0].layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let answers = join_all(nodes.iter().map(|node| node.get(&path))).await;
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body == *bytes));
    assert_eq!(moving.upstream.sent(), bytes.len() as u64, "once for all");
    assert_eq!(answers.iter().filter(|answer| answer.source() == "peer").count(), 2);
    // A stranger gets nothing at all, whatever it claims.
    for path in [path.as_str(), TAG] {
        for headers in
            [&[][..], &[("dray-auth", "1 00")], &[("dray-request", "role=global"), ("cache-control", "only-if-cached")]]
        {
            let answer = get(&format!("http://{}{path}", nodes[0].peers.unwrap()), headers).await;
            assert_eq!(answer.status, 401, "{path} {headers:?}");
            assert!(answer.text().contains("key_file"), "{}", answer.text());
        }
    }
    assert!(nodes[0].metric("dray_peers_unproven_total{what=\"question\"}").await >= 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_other_keys_help_themselves_until_the_key_is_the_same() {
    let moving = Moving::new().await;
    let (_ours, our_key) = key("a secret of all the drays\n");
    let (theirs, their_key) = key("a secret of somebody else\n");
    let rules = moving.rule("");
    let nodes = cluster(&[(&rules, &our_key), (&rules, &their_key), (&rules, "")]);
    let (layer, bytes) = moving.images[0].layer();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    for answer in join_all(nodes.iter().map(|node| node.get(&path))).await {
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == *bytes);
    }
    for (status, digest, _) in tag_on(&nodes).await {
        assert_eq!((status, &digest), (200, &moving.images[0].digest));
    }
    // The file is read again, first a key that nobody can use.
    let file = theirs.path().join("peers.key");
    std::fs::write(&file, "short").unwrap();
    std::fs::write(&file, "a secret of all the drays\n").unwrap();
    until_they_believe_each_other(&moving, &nodes[..2]).await;
}

/// What one has asked about a tag, the others need not ask.
async fn until_they_believe_each_other(moving: &Moving, nodes: &[Dray]) {
    let mut nth = 0;
    eventually("they believe each other", async || {
        nth += 1;
        let path = format!("/v2/library/app/manifests/absent-{nth}-?ns=docker.io");
        for node in nodes {
            assert_eq!(node.get(&path).await.status, 404);
        }
        (moving.asked_for(&format!("absent-{nth}-")) == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_with_other_rules_give_only_what_they_have_and_everybody_may() {
    let moving = Moving::new().await;
    let (_dir, key) = key("a secret of all the drays\n");
    let private = moving.rule("credentials = { username = \"u\", password_env = \"HOME\" }");
    let public = moving.rule("");
    // Enough nodes that whatever is asked for, the owner is most likely one with other rules.
    let nodes = cluster(&[(&public, &key), (&private, &key), (&private, &key), (&private, &key)]);
    // Some of them belong to each.
    for (blob, bytes) in &moving.images[0].blobs {
        let before = moving.upstream.sent();
        let path = format!("/v2/library/app/blobs/{blob}?ns=docker.io");
        assert_eq!(nodes[1].get(&path).await.status, 200);
        assert_eq!(moving.upstream.sent() - before, bytes.len() as u64);
        let answer = nodes[0].get(&path).await;
        assert_eq!((answer.status, answer.source()), (200, "origin"), "it was fetched with credentials there");
        assert_eq!(moving.upstream.sent() - before, 2 * bytes.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_elsewhere_that_names_a_private_digest_opens_nothing() {
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("ours/app", "1", &image)]);
    let digest = image.digest.clone();
    // Whoever runs the public registry knows the digest, and nothing else.
    let upstream = TestUpstream::answering(move |request: &Request| match request.path.contains("/theirs/") {
        true if request.method == "HEAD" => Response::new(200, "").with("docker-content-digest", &digest),
        true => Response::new(404, ""),
        false => content.answer(request),
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
        let answer = node.get("/v2/theirs/app/manifests/1?ns=public.example").await;
        assert_eq!(answer.status, 404, "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_with_other_rules_leave_tags_to_each_other_and_refuse_none() {
    let moving = Moving::new().await;
    let dir = tempfile::tempdir().unwrap();
    let certificates = mtls(&authority(dir.path()), "dray.example");
    let (_key_dir, key) = key("a secret of all the drays\n");
    for proof in [certificates, key] {
        let rules = ["10s", "20s", "30s"].map(|ttl| moving.rule(&format!("tag_ttl = \"{ttl}\"")));
        let nodes = cluster(&rules.each_ref().map(|rules| (rules.as_str(), proof.as_str())));
        let meant = tag_on(&nodes).await;
        assert!(
            meant.iter().all(|(status, digest, _)| (*status, digest) == (200, &moving.images[0].digest)),
            "{meant:?}"
        );
    }
}

/// One node's certificate for this name.
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
async fn peers_know_each_other_by_certificates_for_one_name() {
    let moving = Moving::new().await;
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
        let answer = node.get(&path).await;
        assert_eq!((answer.status, answer.complete), (200, true));
        assert!(answer.body == *bytes);
    }
    assert_eq!(moving.upstream.sent(), 3 * bytes.len() as u64, "two share; the others are nobody's peers");
    let unproven = nodes.iter().map(|node| node.metric("dray_peers_unproven_total{what=\"answer\"}"));
    assert!(join_all(unproven).await.into_iter().sum::<u64>() >= 2, "whoever asked the owner knows why it got nothing");
    let meant = tag_on(&nodes[..2]).await;
    assert!(meant.iter().all(|(_, digest, _)| *digest == moving.images[0].digest));
    // Nobody else gets as far as a question.
    for shown in [vec![], vec!["--cert".to_owned(), theirs.files(&["x.example"]).cert.display().to_string()]] {
        let url = format!("https://{}{path}", nodes[0].peers.unwrap());
        let mut curl = Command::new("curl");
        curl.args(["-sk", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}"]).args(&shown);
        if let Some(cert) = shown.last() {
            curl.args(["--key", &cert.replace(".crt", ".key")]);
        }
        let tried = output(curl.arg(url));
        assert_eq!(String::from_utf8_lossy(&tried.stdout), "000", "no answer without a certificate");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_while_it_runs() {
    let moving = Moving::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (authority(&dir.path().join("old")), authority(&dir.path().join("new")));
    let settings: Vec<String> = (0..2)
        .map(|node| {
            let place = dir.path().join(format!("node{node}"));
            std::fs::create_dir(&place).unwrap();
            replace(&old, &place);
            let file = |name: &str| place.join(name).display().to_string();
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
    // One that nobody could know a peer by changes nothing.
    let nameless = old.files(&["192.0.2.1"]);
    std::fs::copy(&nameless.key, dir.path().join("node1/tls.key")).unwrap();
    std::fs::copy(&nameless.cert, dir.path().join("node1/tls.crt")).unwrap();
    eventually("it says so", async || {
        std::fs::read_to_string(log(1)).unwrap().contains("is for no DNS name").then_some(())
    })
    .await;
    until_they_believe_each_other(&moving, &nodes).await;
    replace(&new, &dir.path().join("node0"));
    replace(&new, &dir.path().join("node1"));
    let presented = || {
        let args = ["s_client", "-connect", &nodes[0].peers.unwrap().to_string(), "-showcerts"].map(str::to_owned);
        let shown = output(Command::new("openssl").args(args).stdin(std::process::Stdio::null()));
        String::from_utf8_lossy(&shown.stdout).into_owned()
    };
    let certificate = std::fs::read_to_string(dir.path().join("node0/tls.crt")).unwrap();
    let body: String = certificate.lines().nth(1).unwrap().to_owned();
    eventually("the new certificate is shown", async || presented().contains(&body).then_some(())).await;
    until_they_believe_each_other(&moving, &nodes).await;
}

fn replace(authority: &Authority, place: &Path) {
    let files = authority.files(&["dray.example"]);
    std::fs::copy(&files.cert, place.join("tls.crt")).unwrap();
    std::fs::copy(&files.key, place.join("tls.key")).unwrap();
    std::fs::copy(&authority.ca_file, place.join("ca.crt")).unwrap();
}

/// The whole cluster asks what a tag means once in its time, however many ask wherever.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_clients_of_eight_nodes_ask_for_a_tag_once() {
    let images: Vec<Image> = (0..20).map(|seed| Image::new(seed, &[1000])).collect();
    let tags: Vec<String> = (0..20).map(|nth| format!("t{nth}")).collect();
    let served: Vec<_> = tags.iter().zip(&images).map(|(tag, image)| ("library/app", tag.as_str(), image)).collect();
    let upstream = TestUpstream::start(&served, |_, response| response).await;
    let (_dir, key) = key("0123456789abcdef");
    let rules = format!("{}tag_ttl = \"1h\"\n", rule("docker.io", &upstream.url()));
    let nodes = cluster(&[(rules.as_str(), key.as_str()); 8]);
    let client = dray_tests::http::client();
    let ask = async |nth: usize| {
        let tag = &tags[nth % 20];
        let url = nodes[nth % 8].url(&format!("/v2/library/app/manifests/{tag}?ns=docker.io"));
        let answer = client.get(url).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.bytes().await.unwrap() == images[nth % 20].index());
    };
    // A thousand, of which each meets a node and a tag that others ask for as well.
    let asked = stream::iter((0..1000).map(|nth| ask(nth + nth / 40)));
    asked.buffer_unordered(200).collect::<Vec<()>>().await;
    assert!(upstream.count("HEAD", "/manifests/t") <= 20, "{} HEADs", upstream.count("HEAD", "/manifests/t"));
    for image in &images {
        assert!(upstream.count("GET", &image.digest) + upstream.count("GET", "/manifests/t") <= 20);
        assert!(upstream.count("GET", &image.digest) <= 1);
    }
}

/// Two nodes by the same rule, one of which the origin refuses, and a blob that the other one owns.
async fn with_an_owner(rules: &str, proof: &str, digest: &str) -> Vec<Dray> {
    loop {
        let starts = members(&[(rules, proof), (rules, proof)]);
        let passwords = ["right", "wrong"];
        let nodes: Vec<Dray> =
            starts.into_iter().zip(passwords).map(|(start, password)| start.env("P", password).run()).collect();
        let asked = format!("http://{}/api/v1/explain?image=docker.io/library/app@{digest}", nodes[0].admin);
        let explained: serde_json::Value = serde_json::from_slice(&get(&asked, &[]).await.body).unwrap();
        // Which depends on the ports.
        if explained["owner"]["is_this_node"] == true {
            return nodes;
        }
    }
}

/// A range that was left to it comes from the owner after all, and nothing twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_deputy_that_the_upstream_refuses_costs_a_moment() {
    let image = Image::new(1, &[80 << 20]);
    let content = Content::new(&[("library/app", "1", &image)]);
    let right = format!("Basic {}", STANDARD.encode("u:right"));
    let upstream = TestUpstream::answering(move |request: &Request| {
        if request.header("authorization") != Some(&right) {
            return Response::new(401, "").with("www-authenticate", "Basic realm=\"origin\"");
        }
        // Slow enough that ranges are still to be had when somebody asks for them.
        content.answer(request).fault(Fault::SlowUntilGate(8 << 20))
    })
    .await;
    let rules =
        format!("{}credentials = {{ username = \"u\", password_env = \"P\" }}", rule("docker.io", &upstream.url()));
    let (_dir, proof) = key("0123456789abcdef");
    let layer = &image.layers[0];
    let nodes = with_an_owner(&rules, &proof, layer).await;
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let answers = join_all(nodes.iter().map(|node| node.get(&path))).await;
    for answer in &answers {
        assert_eq!((answer.status, answer.complete, &answer.body), (200, true, &image.blobs[layer]));
    }
    let refused = "dray_origin_requests_total{kind=\"blob\",outcome=\"denied\",rule=\"docker.io\"}";
    assert!(nodes[1].metric(refused).await > 0, "it was a deputy");
    assert_eq!(nodes[1].metric("dray_origin_bytes_total{rule=\"docker.io\"}").await, 0);
    let came = nodes[0].metric("dray_origin_bytes_total{rule=\"docker.io\"}").await;
    assert_eq!(came, image.blobs[layer].len() as u64, "once");
}
