//! The pull and discovery cases of the OCI distribution conformance suites, old and new, against a real registry behind
//! dray. The suites themselves are Go programs that cannot be installed as modules.

use dray_tests::dray::{Dray, Start};
use dray_tests::http::{ClientResponse, head, send};
use dray_tests::image::{INDEX, Image, digest, noise};
use dray_tests::registry::Registry;
use dray_tests::upstream::{Response, TestUpstream};
use reqwest::Method;
use sha2::{Digest, Sha512};

const REPO: &str = "/v2/docker.io/conformance/app";
const TAGS: [&str; 4] = ["test0", "test1", "test2", "test3"];

async fn rig() -> (Registry, Dray, Image) {
    let (registry, image) = (Registry::open().await, Image::new(1, &[300_000, 1000]));
    for tag in TAGS {
        registry.push("conformance/app", tag, &image).await;
    }
    let dray = Start::with_upstream("docker.io", &registry.url()).run();
    (registry, dray, image)
}

async fn head_of(dray: &Dray, path: &str) -> ClientResponse {
    head(&dray.url(path)).await
}

fn assert_oci_error(response: &ClientResponse, status: u16) {
    assert_eq!(response.status, status);
    let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    for error in json["errors"].as_array().unwrap() {
        assert!(error["code"].as_str().unwrap().bytes().all(|b| b.is_ascii_uppercase() || b == b'_'));
        // Optional, and an error of the upstream is passed on unchanged.
        assert!(error["message"].is_string() || error["message"].is_null());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_pull_cases_pass() {
    let (_registry, dray, image) = rig().await;
    assert_eq!(dray.get("/v2/").await.status, 200);
    let unknown = digest(b"nothing");

    for (digest, bytes) in &image.blobs {
        let path = format!("{REPO}/blobs/{digest}");
        let described = head_of(&dray, &path).await;
        assert_eq!((described.status, described.body.len()), (200, 0));
        assert_eq!(described.header("content-length"), Some(bytes.len().to_string().as_str()));
        assert_eq!(described.header("docker-content-digest"), Some(digest.as_str()));
        let response = dray.get(&path).await;
        assert_eq!((response.status, &response.body), (200, bytes));
    }
    assert_eq!(head_of(&dray, &format!("{REPO}/blobs/{unknown}")).await.status, 404);
    assert_oci_error(&dray.get(&format!("{REPO}/blobs/{unknown}")).await, 404);

    let references = image.manifests.keys().map(String::as_str).chain(TAGS);
    for reference in references {
        let path = format!("{REPO}/manifests/{reference}");
        let described = head_of(&dray, &path).await;
        let response = dray.get(&path).await;
        assert_eq!((described.status, described.body.len(), response.status), (200, 0, 200));
        for name in ["content-length", "content-type", "docker-content-digest"] {
            assert_eq!(described.header(name), response.header(name), "{reference}: {name}");
        }
        assert_eq!(response.header("docker-content-digest"), Some(digest(&response.body).as_str()));
    }
    for reference in [unknown.as_str(), "no-such-tag", ".INVALID_MANIFEST_NAME", "sha256:baddigeststring"] {
        let path = format!("{REPO}/manifests/{reference}");
        assert_eq!(head_of(&dray, &path).await.status, 404, "{reference}");
        assert_oci_error(&dray.get(&path).await, 404);
    }
}

/// Debian's registry does not page tags, so this upstream does.
async fn paging_registry() -> TestUpstream {
    TestUpstream::with_handler(|request| {
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        assert!(!query.contains("ns="), "ns is not sent upstream: {query}");
        if path != "/v2/conformance/app/tags/list" {
            return Response::new(404, r#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#);
        }
        let param = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(&format!("{name}=")));
        let after: Vec<&str> = TAGS.into_iter().filter(|tag| param("last").is_none_or(|last| *tag > last)).collect();
        let count = param("n").map_or(after.len(), |n| n.parse().unwrap()).min(after.len());
        let page = serde_json::json!({"name": "conformance/app", "tags": after[..count]});
        let response = Response::new(200, page.to_string()).with("content-type", "application/json");
        match after[..count].last().filter(|_| count < after.len()) {
            Some(last) => response.with("link", format!("<{path}?last={last}&n={count}>; rel=\"next\"")),
            None => response,
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance_tag_listing_cases_pass() {
    let upstream = paging_registry().await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let list = async |query: &str| -> Vec<String> {
        let response = dray.get(&format!("{REPO}/tags/list{query}")).await;
        assert_eq!(response.status, 200, "{query}");
        tags(&response)
    };
    assert_eq!(list("").await, TAGS);
    assert_eq!(list("?n=2").await, TAGS[..2]);
    assert_eq!(list("?n=2&last=test1").await, TAGS[2..]);
    assert!(list("?last=test3").await.is_empty());
    assert!(list("?n=0").await.is_empty());
    assert_oci_error(&dray.get("/v2/docker.io/conformance/none/tags/list").await, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn next_page_link_leads_to_dray_and_keeps_namespace() {
    let upstream = paging_registry().await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for first in [format!("{REPO}/tags/list?n=3"), "/v2/conformance/app/tags/list?n=3&ns=docker.io".to_owned()] {
        let page = dray.get(&first).await;
        assert_eq!(tags(&page), TAGS[..3]);
        let (target, rel) = page.header("link").unwrap().strip_prefix('<').unwrap().split_once('>').unwrap();
        assert_eq!(rel, "; rel=\"next\"");
        assert!(target.starts_with(first.split('?').next().unwrap()), "{target}");
        assert_eq!(target.contains("ns=docker.io"), first.contains("ns="), "{target}");
        let rest = dray.get(target).await;
        assert_eq!((tags(&rest), rest.header("link")), (vec!["test3".to_owned()], None));
    }
}

fn tags(response: &ClientResponse) -> Vec<String> {
    let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    json["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn referrers_of_unknown_digest_are_an_empty_index() {
    let empty = format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[]}}"#);
    let upstream =
        TestUpstream::with_handler(move |_| Response::new(200, empty.clone()).with("content-type", INDEX)).await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    let response = dray.get(&format!("{REPO}/referrers/{}", digest(b"nothing"))).await;
    assert_eq!((response.status, response.header("content-type")), (200, Some(INDEX)));
    let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!((&json["schemaVersion"], json["manifests"].as_array().unwrap().len()), (&2.into(), 0));
}

/// The new suite also requests content by sha512.
#[tokio::test(flavor = "multi_thread")]
async fn sha512_content_is_verified_and_cached() {
    let (small, large) = (noise(1, 1000), noise(2, 1_000_000));
    let manifest =
        br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#.to_vec();
    let name = |bytes: &[u8]| {
        let hex: String = Sha512::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha512:{hex}")
    };
    let wrong = name(b"something else");
    let held = [small.clone(), large.clone(), manifest.clone()].map(|bytes| (name(&bytes), bytes));
    let lie = wrong.clone();
    let upstream = TestUpstream::with_handler(move |request| {
        let wanted = request.path.rsplit('/').next().unwrap_or_default();
        if wanted == "by-sha512" {
            let (digest, bytes) = &held[2];
            return Response::new(200, bytes.clone()).with("docker-content-digest", digest);
        }
        match held.iter().find(|(digest, _)| digest == wanted) {
            Some((_, bytes)) => Response::new(200, bytes.clone()).with("content-type", INDEX),
            None if wanted == lie => Response::new(200, "not that"),
            None => Response::new(404, ""),
        }
    })
    .await;
    let dray = Start::with_upstream("docker.io", &upstream.url()).run();
    for _ in 0..2 {
        for bytes in [&small, &large] {
            let response = dray.get(&format!("{REPO}/blobs/{}", name(bytes))).await;
            assert!(response.status == 200 && response.body[..] == bytes[..]);
        }
        let response = dray.get(&format!("{REPO}/manifests/{}", name(&manifest))).await;
        assert_eq!((response.status, &response.body[..]), (200, &manifest[..]));
    }
    assert_eq!(upstream.requests().len(), 3, "downloaded once");
    // The digest of a tag is the one that the registry names, if it matches the bytes.
    for method in [Method::HEAD, Method::GET] {
        let response = send(method, &dray.url(&format!("{REPO}/manifests/by-sha512")), &[]).await;
        assert_eq!(response.header("docker-content-digest"), Some(name(&manifest).as_str()));
    }
    assert_eq!(dray.get(&format!("{REPO}/blobs/{wrong}")).await.status, 502);
}
