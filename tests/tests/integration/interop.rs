//! What container clients tolerate of a registry, they tolerate through dray: the same bytes, status class and error
//! code as by a direct request. One scripted upstream for each behaviour, requested by `ns` and by path.

mod bodies;
mod clients;
mod credentials;
mod errors;
mod lists;
mod outage;
mod parent_caches;
mod slow;
mod tls;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::http::{ClientResponse, get};
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Request, Response, TestUpstream};

/// How a client names the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Namespace,
    Path,
}

const FORMS: [Form; 2] = [Form::Namespace, Form::Path];

const REGISTRY: &str = "reg.example";

impl Form {
    /// A path below the repository `a/app`.
    fn path(self, below: &str) -> String {
        let separator = if below.contains('?') { '&' } else { '?' };
        match self {
            Self::Namespace => format!("/v2/a/app/{below}{separator}ns={REGISTRY}"),
            Self::Path => format!("/v2/{REGISTRY}/a/app/{below}"),
        }
    }
}

/// The same path, requested from the upstream itself.
async fn directly(upstream: &TestUpstream, below: &str) -> ClientResponse {
    get(&format!("{}/v2/a/app/{below}", upstream.url()), &[]).await
}

/// A dray that resolves tags on each request.
fn dray_of(upstream: &TestUpstream) -> Dray {
    Start::new(rule(REGISTRY, &upstream.url()) + "tag_ttl = \"0s\"\nnegative_ttl = \"0s\"\n").run()
}

/// An upstream with one image as `a/app:1`; `spoil` changes its responses.
async fn upstream_of(
    image: &Image,
    spoil: impl Fn(&Request, Response) -> Response + Send + Sync + 'static,
) -> TestUpstream {
    let content = Content::new(&[("a/app", "1", image)]);
    TestUpstream::with_handler(move |request| spoil(request, content.respond(request))).await
}

/// Pulls the image as a client does: tag, manifests, blobs.
async fn pull(dray: &Dray, form: Form, image: &Image) {
    let tag = dray.get(&form.path("manifests/1")).await;
    assert_eq!((tag.status, &tag.body), (200, image.index()), "{form:?}: {}", tag.text());
    assert_eq!(tag.header("docker-content-digest"), Some(image.digest.as_str()));
    for (digest, (media_type, bytes)) in &image.manifests {
        let manifest = dray.get(&form.path(&format!("manifests/{digest}"))).await;
        assert_eq!((manifest.status, &manifest.body), (200, bytes), "{form:?}: {}", manifest.text());
        assert_eq!(manifest.header("content-type"), Some(media_type.as_str()));
    }
    for (digest, bytes) in &image.blobs {
        let blob = dray.get(&form.path(&format!("blobs/{digest}"))).await;
        assert_eq!(
            (blob.status, blob.complete),
            (200, true),
            "{form:?} {digest}: {}",
            if blob.status == 200 { String::new() } else { blob.text() }
        );
        assert!(blob.body == *bytes, "{form:?}: other bytes");
        assert_eq!(blob.header("content-length"), Some(bytes.len().to_string().as_str()));
    }
}
