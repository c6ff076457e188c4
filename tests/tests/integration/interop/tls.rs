//! TLS with the rules of OpenSSL and Go.

use dray_tests::dray::{Start, rule};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::tls::{Authority, self_signed, self_signed_until};
use dray_tests::upstream::{Content, TestUpstream};

use super::{FORMS, Form, REGISTRY, pull};

fn https(upstream: &TestUpstream) -> String {
    format!("https://{}", upstream.address)
}

#[tokio::test(flavor = "multi_thread")]
async fn ca_file_with_server_certificate_pins_it() {
    let (dir, image) = (tempfile::tempdir().unwrap(), Image::new(1, &[300_000]));
    let content = Content::new(&[("a/app", "1", &image)]);
    let (file, acceptor) = self_signed(dir.path(), &["127.0.0.1"]);
    let upstream = TestUpstream::with_handler_tls(acceptor, move |request| content.respond(request)).await;
    let of_rule = rule(REGISTRY, &https(&upstream)) + &format!("ca = \"{}\"\n", file.display());
    let of_all = rule(REGISTRY, &https(&upstream)) + &format!("[tls]\nca = \"{}\"\n", file.display());
    for (config, form) in [of_rule, of_all].into_iter().zip(FORMS) {
        pull(&Start::new(config).run(), form, &image).await;
    }
    // Without `ca` the error names the setting.
    let refused = Start::new(rule(REGISTRY, &https(&upstream))).run().get(&Form::Path.path("manifests/1")).await;
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("`ca` of its [[registry]] rule"), "{}", refused.text());
    // The certificate is not valid for another name.
    let other = tempfile::tempdir().unwrap();
    let (file, acceptor) = self_signed(other.path(), &["other.example"]);
    let upstream = TestUpstream::with_handler_tls(acceptor, |_| dray_tests::upstream::Response::new(200, "")).await;
    let config = rule(REGISTRY, &https(&upstream)) + &format!("ca = \"{}\"\n", file.display());
    assert_eq!(Start::new(config).run().get(&Form::Path.path("manifests/1")).await.status, 503);
    // An expired certificate is not valid.
    let expired = tempfile::tempdir().unwrap();
    let (file, acceptor) = self_signed_until(expired.path(), &["127.0.0.1"], 2020);
    let upstream = TestUpstream::with_handler_tls(acceptor, |_| dray_tests::upstream::Response::new(200, "")).await;
    let config = rule(REGISTRY, &https(&upstream)) + &format!("ca = \"{}\"\n", file.display());
    let refused = Start::new(config).run().get(&Form::Path.path("manifests/1")).await;
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("has expired"), "{}", refused.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_of_rule_is_presented_to_upstream() {
    let (dir, image) = (tempfile::tempdir().unwrap(), Image::new(1, &[300_000]));
    let authority = Authority::new(dir.path());
    let content = Content::new(&[("a/app", "1", &image)]);
    let acceptor = authority.acceptor_with_client_auth(&["127.0.0.1"]);
    let upstream = TestUpstream::with_handler_tls(acceptor, move |request| content.respond(request)).await;
    let files = authority.files(&["dray.example"]);
    let ca = format!("ca = \"{}\"\n", authority.ca_file.display());
    let without = Start::new(rule(REGISTRY, &https(&upstream)) + &ca).run();
    assert_eq!(without.get(&Form::Namespace.path("manifests/1")).await.status, 503);
    let shown = format!("client_cert = {{ cert = \"{}\", key = \"{}\" }}\n", files.cert.display(), files.key.display());
    for form in FORMS {
        let dray = Start::new(rule(REGISTRY, &https(&upstream)) + &ca + &shown).run();
        pull(&dray, form, &image).await;
    }
    // The certificate is read again when it changes. The first one is unknown to the upstream.
    let unknown = tempfile::tempdir().unwrap();
    let wrong = Authority::new(unknown.path()).files(&["dray.example"]);
    let (cert, key) = (dir.path().join("shown.crt"), dir.path().join("shown.key"));
    let show = |cert_of: &std::path::Path, key_of: &std::path::Path| {
        std::fs::copy(cert_of, &cert).unwrap();
        std::fs::copy(key_of, &key).unwrap();
    };
    show(&wrong.cert, &wrong.key);
    let shown = format!("client_cert = {{ cert = \"{}\", key = \"{}\" }}\n", cert.display(), key.display());
    let dray = Start::new(rule(REGISTRY, &https(&upstream)) + &ca + &shown).run();
    assert_eq!(dray.get(&Form::Namespace.path("manifests/1")).await.status, 503);
    show(&files.cert, &files.key);
    eventually("the new certificate is presented", async || {
        (dray.get(&Form::Namespace.path("manifests/1")).await.status == 200).then_some(())
    })
    .await;
}
