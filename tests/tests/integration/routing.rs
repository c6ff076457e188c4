//! Every URL form, every endpoint, and the errors of a registry.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Start, rule};
use dray_tests::eventually;
use dray_tests::http::{client, get, head, send};
use dray_tests::image::{INDEX, Image, digest, noise};
use dray_tests::registry::Registry;
use dray_tests::upstream::{Fault, Response, TestUpstream};
use reqwest::Method;

#[tokio::test(flavor = "multi_thread")]
async fn every_url_form_reaches_its_registry() {
    let (hub, corp) = (Image::new(1, &[1000]), Image::new(2, &[1000]));
    let hub_upstream = TestUpstream::start(&[("library/app", "1", &hub)], |_, r| r).await;
    let corp_upstream = TestUpstream::start(&[("team/app", "1", &corp), ("app", "1", &corp)], |_, r| r).await;
    let config = format!(
        "{}[[registry]]\nmatch = \"reg.corp:5000\"\nalias = [\"corp\"]\nupstreams = [\"{}\"]\n{}",
        rule("docker.io", &hub_upstream.url()),
        corp_upstream.url(),
        rule("quay.io", &corp_upstream.url()),
    );
    let dray = Start::new(config).run();
    for path in [
        "/v2/library/app/manifests/1?ns=docker.io",
        "/v2/library/app/manifests/1?ns=registry-1.docker.io",
        "/v2/library/app/manifests/1?ns=index.docker.io",
        "/v2/docker.io/library/app/manifests/1?ns=docker.io",
        "/v2/docker.io/library/app/manifests/1",
        "/v2/docker.io/app/manifests/1",
        "/v2/library/app/manifests/1",
        "/v2/app/manifests/1",
    ] {
        let response = dray.get(path).await;
        assert_eq!((response.status, &response.body), (200, hub.index()), "{path}");
        assert_eq!(response.header("oci-namespace"), Some("docker.io"));
    }
    for path in [
        "/v2/team/app/manifests/1?ns=reg.corp%3A5000",
        "/v2/team/app/manifests/1?ns=corp",
        "/v2/corp/team/app/manifests/1",
        "/v2/reg.corp:5000/team/app/manifests/1",
        "/v2/reg.corp%3A5000/team/app/manifests/1",
        "/v2/quay.io/app/manifests/1",
    ] {
        let response = dray.get(path).await;
        assert_eq!((response.status, &response.body), (200, corp.index()), "{path}");
    }
    let by_host = get(&dray.url("/v2/team/app/manifests/1"), &[("host", "quay.io")]).await;
    assert_eq!((by_host.status, by_host.header("oci-namespace")), (200, Some("quay.io")));
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_response_has_the_headers_clients_need() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, response| {
        match response.headers.iter().any(|(name, value)| name == "content-type" && value == INDEX) {
            // go-containerregistry would take parameters for a part of the type.
            true => response.with("content-type", format!("{INDEX}; charset=utf-8")).with("x-path", &request.path),
            false => response,
        }
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let accept = [("accept", "application/x-one"), ("accept", "application/x-two, */*"), ("accept-encoding", "gzip")];
    let response = get(&dray.url("/v2/library/app/manifests/1?ns=docker.io"), &accept).await;
    assert_eq!(response.header("content-type"), Some(INDEX));
    assert_eq!(response.header("docker-content-digest"), Some(image.digest.as_str()));
    assert_eq!(response.header("content-length"), Some(image.index().len().to_string().as_str()));
    assert_eq!(response.header("transfer-encoding"), None);
    assert_eq!(response.header("content-encoding"), None);
    assert_eq!(response.header("accept-ranges"), Some("bytes"));
    assert_eq!(response.header("docker-distribution-api-version"), Some("registry/2.0"));
    assert_eq!(response.source(), "upstream");
    assert!(response.header("x-request-id").is_some());
    for request in upstream.requests() {
        let accepted = request.header("accept").unwrap();
        for wanted in ["application/x-one", "application/x-two", INDEX, "manifest.list.v2+json", "manifest.v2+json"] {
            assert!(accepted.contains(wanted), "{accepted}");
        }
        assert_eq!(request.header("accept-encoding"), Some("identity"));
    }
    let again = head(&dray.url("/v2/library/app/manifests/1?ns=docker.io")).await;
    assert_eq!(again.header("content-length"), Some(image.index().len().to_string().as_str()));
    assert_eq!((again.status, again.source()), (200, "memory"));
    let by_digest = head(&dray.url(&format!("/v2/library/app/manifests/{}?ns=docker.io", image.digest))).await;
    assert_eq!((by_digest.status, by_digest.header("content-type")), (200, Some(INDEX)));
}

#[tokio::test(flavor = "multi_thread")]
async fn head_of_a_blob_returns_its_length() {
    let image = Image::new(1, &[1_000_000]);
    let (layer, bytes) = image.layer();
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let path = format!("/v2/library/app/blobs/{layer}?ns=docker.io");
    let length = bytes.len().to_string();
    let cold = head(&dray.url(&path)).await;
    assert_eq!((cold.status, cold.header("content-length"), cold.source()), (200, Some(length.as_str()), "upstream"));
    assert_eq!(upstream.count("GET", layer), 0);
    dray.get(&path).await;
    dray.wait_for_fills().await;
    let warm = head(&dray.url(&path)).await;
    assert_eq!((warm.status, warm.header("content-length"), warm.source()), (200, Some(length.as_str()), "disk"));
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_follow_the_oci_specification() {
    let image = Image::new(1, &[1000]);
    let registry = Registry::open().await;
    registry.push("library/app", "1", &image).await;
    let dray = Start::with_upstream("docker.io", &registry.url()).run();
    let unknown = digest(b"missing");
    for (path, status, code) in [
        ("/v2/".to_owned(), 200, ""),
        ("/v2/library/app/manifests/none".to_owned(), 404, "MANIFEST_UNKNOWN"),
        ("/v2/library/app/manifests/.INVALID_MANIFEST_NAME".to_owned(), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/library/app/manifests/{unknown}"), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/library/app/blobs/{unknown}"), 404, "BLOB_UNKNOWN"),
        ("/v2/library/app/blobs/sha256:baddigeststring".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/library/APP/tags/list".to_owned(), 404, "NAME_INVALID"),
        ("/v2/library/none/tags/list".to_owned(), 404, "NAME_UNKNOWN"),
        ("/v2/_catalog".to_owned(), 200, ""),
        ("/".to_owned(), 404, "UNSUPPORTED"),
    ] {
        let response = dray.get(&path).await;
        assert_eq!((response.status, response.code().as_str()), (status, code), "{path}");
    }
    let head = head(&dray.url(&format!("/v2/library/app/blobs/{unknown}"))).await;
    assert_eq!((head.status, head.body.len()), (404, 0));
    for method in [Method::PUT, Method::POST, Method::PATCH, Method::DELETE] {
        let response = send(method, &dray.url("/v2/library/app/manifests/1"), &[]).await;
        assert_eq!((response.status, response.code().as_str()), (405, "UNSUPPORTED"));
        assert_eq!(response.header("allow"), Some("GET, HEAD"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_are_passed_on() {
    let empty = format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[]}}"#);
    let upstream = TestUpstream::with_handler(move |request| {
        if request.path.contains("/referrers/") && !request.path.contains("old") {
            let filtered = request.path.contains("artifactType=a/b");
            let response = Response::new(200, empty.clone()).with("content-type", INDEX);
            return if filtered { response.with("oci-filters-applied", "artifactType") } else { response };
        }
        Response::new(404, "404 page not found")
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let subject = digest(b"subject");
    let response = dray.get(&format!("/v2/library/app/referrers/{subject}?ns=docker.io&artifactType=a/b")).await;
    assert_eq!((response.status, response.header("content-type")), (200, Some(INDEX)));
    assert_eq!(response.header("oci-filters-applied"), Some("artifactType"));
    assert!(upstream.requests().iter().all(|request| !request.path.contains("ns=")));
    // An old registry without the API: the client then looks for the tag schema.
    assert_eq!(dray.get(&format!("/v2/library/old/referrers/{subject}?ns=docker.io")).await.status, 404);
    assert_eq!(dray.get("/v2/library/app/referrers/sha256:bad").await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn blob_without_namespace_is_found_by_its_repository() {
    let image = Image::new(1, &[400_000, 1000]);
    let upstream = TestUpstream::start(&[("team/app", "1", &image)], |_, r| r).await;
    let hub = TestUpstream::with_handler(|_| Response::new(404, "")).await;
    let start = Start::new([rule("ghcr.io", &upstream.url()), rule("docker.io", &hub.url())].concat());
    let dray = start.run();
    let (layer, bytes) = image.layer();
    assert_eq!(dray.get(&format!("/v2/team/app/blobs/{layer}")).await.status, 404, "the registry is unknown");
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=ghcr.io").await.status, 200);
    let found = dray.get(&format!("/v2/team/app/blobs/{layer}")).await;
    assert_eq!((found.status, &found.body), (200, bytes));
    dray.wait_for_fills().await;
    // For another repository the upstream decides, whatever is cached. The registry of a repository is remembered
    // across a restart.
    assert_eq!(dray.get(&format!("/v2/other/name/blobs/{layer}")).await.status, 404);
    let small = &image.layers[1];
    let dray = dray.kill_and_restart();
    assert_eq!(dray.get(&format!("/v2/team/app/blobs/{small}")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn override_path_mistakes_are_explained() {
    let dray = Start::new("").run();
    let missing = dray.get("/v2/docker.io/v2/library/alpine/manifests/3?ns=docker.io").await;
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains("override_path = true"), "{}", missing.text());
    let surplus = dray.get("/library/alpine/manifests/3?ns=docker.io").await;
    assert_eq!(surplus.status, 404);
    assert!(surplus.text().contains("must end in /v2"), "{}", surplus.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn upstreams_are_tried_in_order_and_rewritten() {
    let image = Image::new(1, &[400_000]);
    let mirror = TestUpstream::with_handler(|_| Response::new(404, "")).await;
    let harbor = TestUpstream::start(&[("proxy/team/app", "1", &image)], |_, r| r).await;
    let config = format!(
        "[[registry]]\nmatch = \"ghcr.io\"\nupstreams = [\"{}\", \"{}/proxy/{{repo}}\"]\n\
         [[registry]]\nmatch = \"*.evil.example\"\ndeny = true\n",
        mirror.url(),
        harbor.url()
    );
    let dray = Start::new(config).run();
    let (layer, bytes) = image.layer();
    assert_eq!(dray.get("/v2/team/app/manifests/1?ns=ghcr.io").await.status, 200);
    assert_eq!(&dray.get(&format!("/v2/team/app/blobs/{layer}?ns=ghcr.io")).await.body, bytes);
    assert!(mirror.count("GET", "/v2/team/app/manifests/1") > 0, "the first upstream is requested first");
    for host in ["a.evil.example", "a.evil.example:443", "A.evil.example:0443"] {
        let denied = dray.get(&format!("/v2/team/app/manifests/1?ns={host}")).await;
        assert_eq!((denied.status, denied.code().as_str()), (403, "DENIED"), "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_login_are_denied() {
    let image = Image::new(1, &[1000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |_, r| r).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "node:hush\n").unwrap();
    let access = format!("[access]\nusers_file = \"{}\"\n", file.path().display());
    let dray = Start::new(rule("docker.io", &upstream.url()) + &access).run();
    let path = dray.url("/v2/library/app/manifests/1?ns=docker.io");
    let basic = |login: &str| format!("Basic {}", STANDARD.encode(login));
    for url in [&path, &dray.url("/v2/")] {
        for wrong in ["", "Bearer x", &basic("node:x"), &basic("node")] {
            let refused = get(url, &[("authorization", wrong)]).await;
            assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Basic realm=\"dray\"")));
        }
        assert_eq!(get(url, &[("authorization", &basic("node:hush"))]).await.status, 200);
    }
    assert_eq!(upstream.requests().iter().filter(|request| request.header("authorization").is_some()).count(), 0);
}

/// An image whose project has moved: the new location is requested first, then the old one for content that is only
/// there.
#[tokio::test(flavor = "multi_thread")]
async fn moved_images_are_found_by_their_old_names() {
    let (old, new) = (Registry::open().await, Registry::open().await);
    let [both, only_old, other] = [1, 2, 3].map(|seed| Image::new(seed, &[300_000]));
    old.push("kubeflow/operator", "1", &both).await;
    old.push("kubeflow/operator", "0", &only_old).await;
    new.push("kf/operator/controller", "1", &both).await;
    new.push("kf/other", "1", &other).await;
    let upstreams = |new_name: &str| format!("upstreams = [\"{}/{new_name}\", \"{}\"]", new.url(), old.url());
    let config = format!(
        "[[registry]]\nmatch = \"docker.io/kubeflow/operator\"\n{}\n\
         [[registry]]\nmatch = \"docker.io/kubeflow/*\"\n{}\n\
         [[registry]]\nmatch = \"docker.io\"\ndeny = true\n",
        upstreams("kf/operator/controller"),
        upstreams("kf/{rest}")
    );
    let dray = Start::new(config).run();
    let by_rule = async |rule: &str| dray.metric(&format!("dray_upstream_bytes_total{{rule=\"{rule}\"}}")).await;
    let get = async |path: &str| dray.get(&format!("/v2/{path}?ns=docker.io")).await;
    for (tag, image) in [("1", &both), ("0", &only_old)] {
        assert_eq!(get(&format!("kubeflow/operator/manifests/{tag}")).await.body, image.index());
        // A dray without this tag, so the digest decides.
        let digest = get(&format!("kubeflow/operator/manifests/{}", image.digest)).await;
        assert_eq!(digest.body, image.index());
        for layer in &image.layers {
            assert_eq!(get(&format!("kubeflow/operator/blobs/{layer}")).await.status, 200, "{tag} {layer}");
        }
    }
    assert!(by_rule("docker.io/kubeflow/operator").await > 600_000);
    assert_eq!(get("kubeflow/other/manifests/1").await.body, other.index());
    assert!(by_rule("docker.io/kubeflow/*").await > 0);
    assert_eq!(get("kubeflow/none/manifests/1").await.status, 404);
    assert_eq!(get("library/alpine/manifests/1").await.status, 403, "the next rule denies it");
}

/// An upstream that names another digest is skipped.
#[tokio::test(flavor = "multi_thread")]
async fn upstream_with_the_right_digest_is_used() {
    let [wrong, right] = [Image::new(1, &[300_000]), Image::new(2, &[300_000])];
    let (other, other_blob) = (wrong.index().clone(), wrong.layers[0].clone());
    let lying = TestUpstream::with_handler(move |request| {
        let claims = if request.is_blob() { other_blob.clone() } else { digest(&other) };
        Response::new(200, other.clone()).with("docker-content-digest", claims)
    })
    .await;
    let honest = TestUpstream::start(&[("library/app", "1", &right)], |_, response| response).await;
    let dray = Start::new(format!(
        "[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{}\", \"{}\"]",
        lying.url(),
        honest.url()
    ))
    .run();
    let manifest = dray.get(&format!("/v2/library/app/manifests/{}?ns=docker.io", right.digest)).await;
    assert_eq!((manifest.status, &manifest.body), (200, right.index()), "{}", manifest.text());
    let blob = dray.get(&format!("/v2/library/app/blobs/{}?ns=docker.io", right.layers[0])).await;
    assert_eq!(blob.status, 200, "{}", blob.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn client_networks_and_concurrency_are_limited() {
    let other_network = Start::new("[access]\nallowed_cidrs = [\"192.0.2.0/24\"]").run();
    let refused = other_network.get("/v2/").await;
    assert_eq!(refused.status, 403);
    assert!(refused.text().contains("access.allowed_cidrs"), "{}", refused.text());

    // A download that does not end until the gate opens uses the client's only request slot.
    let image = Image::new(1, &[2_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, response| {
        if request.is_blob() { response.fault(Fault::GateAfter(1_000_000)) } else { response }
    })
    .await;
    let one = format!(
        "[access]\nallowed_cidrs = [\"127.0.0.0/8\"]\nmax_concurrent_requests = 1\n{}",
        rule("docker.io", &upstream.url())
    );
    let dray = Start::new(one).run();
    let blob = dray.url(&format!("/v2/library/app/blobs/{}?ns=docker.io", image.layers[0]));
    let held = client().get(&blob).send().await.unwrap();
    assert_eq!(held.status(), 200);
    let more = dray.get("/v2/").await;
    assert_eq!((more.status, more.header("retry-after")), (503, None));
    assert!(more.text().contains("max_concurrent_requests"), "{}", more.text());
    upstream.open_gate();
    assert!(held.bytes().await.unwrap() == image.blobs[&image.layers[0]]);
    eventually("the slot is free", async || (dray.get("/v2/").await.status == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_client_on_the_plain_port_is_closed_at_once() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dray = Start::new("").run();
    let mut stream = tokio::net::TcpStream::connect(dray.registry).await.unwrap();
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    hello.extend(noise(1, 512));
    stream.write_all(&hello).await.unwrap();
    let mut response = Vec::new();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(5), stream.read_to_end(&mut response)).await;
    assert!(ended.is_ok(), "the connection stayed open");
    assert_ne!(response.first(), Some(&0x16), "the response is not TLS");
}
