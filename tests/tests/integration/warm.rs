//! `dray warm`: images that are there before somebody asks.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dray_tests::dray::{Dray, Start, binary, rule};
use dray_tests::image::Image;
use dray_tests::origin::{Fault, Origin, Response};
use dray_tests::process::{free_port, output};
use dray_tests::registry::Registry;

fn warm(dray: &Dray, arguments: &[&str]) -> (Option<i32>, String) {
    let via = dray.url("");
    let said = output(Command::new(binary()).args(["warm", "--via", &via]).args(arguments));
    (said.status.code(), String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_of_the_platforms_that_are_wanted_is_there() {
    let mut hub = Registry::open().await;
    let image = Image::new(1, &[3_000_000, 1000]);
    hub.push("library/app", "1", &image).await;
    let dray = Start::with_upstream("docker.io", &hub.url()).run();
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && said.contains("1 of 1 images warm: 2 manifests, 3 blobs"), "{said}");
    let (code, said) = warm(&dray, &["docker.io/library/app:1", "--all-platforms"]);
    assert!(code == Some(0) && said.contains("3 manifests, 6 blobs") && said.contains("were there already"), "{said}");
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/s390x"]);
    assert!(code == Some(1) && said.contains("only for linux/arm64, linux/amd64"), "{said}");
    // A Deployment on the standard input.
    let yaml = format!("kind: Deployment\nspec:\n  containers:\n  - name: a\n    image: app@{}\n", image.digest);
    let mut command = Command::new(binary());
    command.args(["warm", "--via", &dray.url(""), "-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(yaml.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success() && String::from_utf8_lossy(&said.stdout).contains("1 of 1 images warm"));
    dray.fills_end().await;
    hub.stop();
    for (digest, bytes) in &image.blobs {
        assert_eq!(&dray.get(&format!("/v2/library/app/blobs/{digest}?ns=docker.io")).await.body, bytes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_whole_is_not_warm() {
    let (good, bad) = (Image::new(1, &[500_000]), Image::new(2, &[600_000]));
    let wrong = bad.layers[0].clone();
    let images = [("library/good", "1", &good), ("library/bad", "1", &bad)];
    let origin = Origin::start(&images, move |request, response| match request.path.contains(&wrong) {
        true => Response::new(404, ""),
        false => response,
    })
    .await;
    let dray = Start::new(rule("docker.io", &origin.url())).run();
    let (code, said) = warm(&dray, &["good:1", "bad:1", "none:1"]);
    assert_eq!(code, Some(1));
    for says in
        ["1 of 3 images warm", "failed: docker.io/library/bad:1: sha256:", "failed: docker.io/library/none:1: 404"]
    {
        assert!(said.contains(says), "{says}: {said}");
    }
    for (arguments, says) in
        [(&[][..], "no image"), (&["UPPER"], "is no image"), (&["-f", "/nonexistent"], "/nonexistent")]
    {
        let (code, said) = warm(&dray, arguments);
        assert!(code == Some(2) && said.contains(says), "{said}");
    }
    let nobody =
        output(Command::new(binary()).args(["warm", "a", "--via", &format!("http://127.0.0.1:{}", free_port())]));
    assert_eq!(nobody.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_is_gone_on_with() {
    let image = Image::new(1, &[4_000_000]);
    let broken = Arc::new(AtomicUsize::new(0));
    let breaks = broken.clone();
    let origin = Origin::start(&[("library/app", "1", &image)], move |request, response| {
        let is_first = request.is_blob() && breaks.fetch_add(1, Ordering::SeqCst) < 2;
        if is_first { response.fault(Fault::CutAfter(1_000_000)) } else { response }
    })
    .await;
    let dray = Start::new(rule("docker.io", &origin.url())).run();
    let (code, said) = warm(&dray, &["app:1", "--platform", "linux/amd64"]);
    assert!(code == Some(0) && broken.load(Ordering::SeqCst) > 2, "{said}");
}
