//! Without any rule: registries are found by name, over TLS, and only where the guard lets them be.

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dns::Dns;
use dray_tests::dray::Start;
use dray_tests::image::Image;
use dray_tests::registry::Registry;
use dray_tests::tls::Authority;
use dray_tests::upstream::{Content, TestUpstream};
use std::process::Command;

/// A configuration without rules: test name server, test CA, loopback allowed or not.
fn config(dns: &Dns, authority: &Authority, allow: &str) -> String {
    format!(
        "[dns]\nservers = [\"{}\"]\n[tls]\nca = \"{}\"\n[guard]\nallow = [{allow}]\n",
        dns.address,
        authority.ca_file.display()
    )
}

async fn tls_registry(authority: &Authority, name: &str) -> Registry {
    let files = authority.files(&[name]);
    Registry::with(&format!(
        "http: {{addr: ADDR, tls: {{certificate: {}, key: {}}}}}\n",
        files.cert.display(),
        files.key.display()
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_pulls_from_registries_that_no_rule_names() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let names = ["one.example", "two.example"];
    let dns = Dns::start(&names.map(|name| (name, "127.0.0.1"))).await;
    let mut registries = [tls_registry(&authority, names[0]).await, tls_registry(&authority, names[1]).await];
    let images = [0, 1].map(|nth| format!("{}:{}/team/app:1", names[nth], registries[nth].port));
    for (nth, registry) in registries.iter().enumerate() {
        registry.push("team/app", "1", &Image::new(nth as u64, &[500_000, 1000])).await;
    }
    let dray = Start::new(config(&dns, &authority, "\"127.0.0.0/8\"")).run();
    let containerd = Containerd::start(Version::V1).await;
    containerd.use_mirror(&dray);
    for image in &images {
        containerd.pull(image).unwrap_or_else(|e| panic!("{image}: {e}"));
    }
    registries.iter_mut().for_each(Registry::stop);
    let fresh = Containerd::start(Version::V1).await;
    fresh.use_mirror(&dray);
    for image in &images {
        fresh.pull(image).unwrap_or_else(|e| panic!("{image} with its registry off: {e}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn private_addresses_are_out_of_reach_however_they_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let inside = TestUpstream::answering_tls(authority.acceptor(&["inside.example", "127.0.0.1"]), move |request| {
        content.answer(request)
    })
    .await;
    let port = inside.address.port();
    let dns = Dns::start(&[("inside.example", "127.0.0.1"), ("mapped.example", "::ffff:127.0.0.1")]).await;
    let dray = Start::new(config(&dns, &authority, "")).run();
    for host in [
        format!("inside.example:{port}"),
        format!("mapped.example:{port}"),
        format!("127.0.0.1:{port}"),
        format!("[::1]:{port}"),
        format!("[::ffff:7f00:1]:{port}"),
        format!("localhost:{port}"),
        format!("2130706433:{port}"),
        format!("0x7f000001:{port}"),
        format!("127.1:{port}"),
        "169.254.169.254".to_owned(),
    ] {
        let answer = dray.get(&format!("/v2/team/app/manifests/1?ns={}", host.replace(':', "%3A"))).await;
        assert!(matches!(answer.status, 400 | 403), "{host}: {} {}", answer.status, answer.text());
    }
    assert_eq!(inside.requests().len(), 0);
    // The same with the network allowed.
    let dray = Start::new(config(&dns, &authority, "\"127.0.0.0/8\"")).run();
    assert_eq!(dray.get(&format!("/v2/team/app/manifests/1?ns=inside.example%3A{port}")).await.status, 200);
    assert_eq!(dray.get(&format!("/v2/team/app/manifests/1?ns=127.0.0.1%3A{port}")).await.status, 200);
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=nowhere.example").await.status, 503, "no such name");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_certificate_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let dns = Dns::start(&[("one.example", "127.0.0.1")]).await;
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let other =
        TestUpstream::answering_tls(authority.acceptor(&["other.example"]), move |request| content.answer(request))
            .await;
    let dray = Start::new(config(&dns, &authority, "\"127.0.0.0/8\"")).run();
    let path = format!("/v2/team/app/manifests/1?ns=one.example%3A{}", other.address.port());
    assert_eq!(dray.get(&path).await.status, 503);
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_has_a_ca_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let image = Image::new(1, &[500_000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let upstream =
        TestUpstream::answering_tls(authority.acceptor(&["127.0.0.1"]), move |request| content.answer(request)).await;
    let rule = format!("[[registry]]\nmatch = \"reg.corp\"\nupstreams = [\"https://{}\"]\n", upstream.address);
    let with_ca = format!("{rule}ca = \"{}\"\n", authority.ca_file.display());
    let path = "/v2/team/app/manifests/1?ns=reg.corp";
    assert_eq!(Start::new(rule).run().get(path).await.status, 503);
    assert_eq!(Start::new(with_ca).run().get(path).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_of_the_environment_is_used() {
    let image = Image::new(1, &[500_000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    // A forward proxy sees whole URLs.
    let proxy = TestUpstream::answering(move |request| {
        let path = request.path.strip_prefix("http://reg.corp").unwrap_or("/").to_owned();
        content.answer(&dray_tests::upstream::Request { path, ..request.clone() })
    })
    .await;
    let rule = "[[registry]]\nmatch = \"reg.corp\"\nupstreams = [\"http://reg.corp\"]\n[[registry]]\nmatch = \"direct.corp\"\nupstreams = [\"http://127.0.0.1:1\"]";
    let dray = Start::new(rule).env("HTTP_PROXY", &proxy.url()).env("NO_PROXY", "127.0.0.1").run();
    let (layer, bytes) = image.layer();
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=reg.corp").await.status, 200);
    assert!(dray.get(&format!("/v2/team/app/blobs/{layer}?ns=reg.corp")).await.body == bytes);
    let through = proxy.requests().len();
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=direct.corp").await.status, 503);
    assert_eq!(proxy.requests().len(), through, "NO_PROXY holds");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_port_speaks_tls_and_knows_its_clients() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let server = authority.files(&["dray.example"]);
    let client = authority.files(&["client.example"]);
    let tls = format!("[tls]\ncert = \"{}\"\nkey = \"{}\"\n", server.cert.display(), server.key.display());
    let curl = |dray: &dray_tests::dray::Dray, more: &[&str]| {
        let resolve = format!("dray.example:{}:127.0.0.1", dray.registry.port());
        let url = format!("https://dray.example:{}/v2/", dray.registry.port());
        let mut command = Command::new("curl");
        command.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", &resolve, "--cacert"]);
        let output = command.arg(&authority.ca_file).args(more).arg(url).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let dray = Start::new(tls.clone()).run();
    assert_eq!(curl(&dray, &[]), "200");
    assert_eq!(curl(&dray, &["--http1.1"]), "200");
    let strict = Start::new(format!("{tls}client_ca = \"{}\"\n", authority.ca_file.display())).run();
    assert_eq!(curl(&strict, &[]), "000");
    let cert = ["--cert", client.cert.to_str().unwrap(), "--key", client.key.to_str().unwrap()];
    assert_eq!(curl(&strict, &cert), "200");
}
