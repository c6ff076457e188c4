//! Without any rule: registries are found by name, over TLS, and only within the egress policy.

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dns::Dns;
use dray_tests::dray::Start;
use dray_tests::image::Image;
use dray_tests::registry::Registry;
use dray_tests::tls::Authority;
use dray_tests::upstream::{Content, TestUpstream};
use std::process::Command;

/// A configuration without rules: the test's name server and CA, with loopback allowed or not.
fn config(dns: &Dns, authority: &Authority, allow: &str) -> String {
    format!(
        "[dns]\nservers = [\"{}\"]\n[tls]\nca = \"{}\"\n[egress]\nallow_cidrs = [{allow}]\n",
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
async fn containerd_pulls_from_unlisted_registries() {
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
async fn private_address_of_unlisted_registry_is_blocked() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let inside = TestUpstream::with_handler_tls(authority.acceptor(&["inside.example", "127.0.0.1"]), move |request| {
        content.respond(request)
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
        let response = dray.get(&format!("/v2/team/app/manifests/1?ns={}", host.replace(':', "%3A"))).await;
        assert!(matches!(response.status, 400 | 403), "{host}: {} {}", response.status, response.text());
    }
    assert_eq!(inside.requests().len(), 0);
    // The same with the network allowed.
    let dray = Start::new(config(&dns, &authority, "\"127.0.0.0/8\"")).run();
    assert_eq!(dray.get(&format!("/v2/team/app/manifests/1?ns=inside.example%3A{port}")).await.status, 200);
    assert_eq!(dray.get(&format!("/v2/team/app/manifests/1?ns=127.0.0.1%3A{port}")).await.status, 200);
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=nowhere.example").await.status, 503, "no such name");
}

#[tokio::test(flavor = "multi_thread")]
async fn untrusted_certificate_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let dns = Dns::start(&[("one.example", "127.0.0.1")]).await;
    let image = Image::new(1, &[1000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let other =
        TestUpstream::with_handler_tls(authority.acceptor(&["other.example"]), move |request| content.respond(request))
            .await;
    let dray = Start::new(config(&dns, &authority, "\"127.0.0.0/8\"")).run();
    let path = format!("/v2/team/app/manifests/1?ns=one.example%3A{}", other.address.port());
    assert_eq!(dray.get(&path).await.status, 503);
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rule_ca_is_used_for_its_upstream() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path());
    let image = Image::new(1, &[500_000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    let upstream =
        TestUpstream::with_handler_tls(authority.acceptor(&["127.0.0.1"]), move |request| content.respond(request))
            .await;
    let rule = format!("[[registry]]\nmatch = \"reg.corp\"\nupstreams = [\"https://{}\"]\n", upstream.address);
    let with_ca = format!("{rule}ca = \"{}\"\n", authority.ca_file.display());
    let path = "/v2/team/app/manifests/1?ns=reg.corp";
    assert_eq!(Start::new(rule).run().get(path).await.status, 503);
    assert_eq!(Start::new(with_ca).run().get(path).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn proxy_of_the_environment_is_used() {
    let image = Image::new(1, &[500_000]);
    let content = Content::new(&[("team/app", "1", &image)]);
    // A forward proxy receives whole URLs.
    let proxy = TestUpstream::with_handler(move |request| {
        let path = request.path.strip_prefix("http://reg.corp").unwrap_or("/").to_owned();
        content.respond(&dray_tests::upstream::Request { path, ..request.clone() })
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
async fn registry_port_with_tls_verifies_client_certificates() {
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
