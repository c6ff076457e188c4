//! A registry with several tenants, and clients that respond to challenges as runtimes do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::Dray;
use dray_tests::http::{ClientResponse, client, get};
use dray_tests::image::Image;
use dray_tests::upstream::{Content, Fault, Request, Response, TestUpstream};
use serde_json::{Value, json};

pub(super) const ALICE: &str = "alice:for-a";
pub(super) const BOB: &str = "bob:for-b";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AuthScheme {
    Basic,
    Tokens,
}

/// A registry with a public repository and repositories of alice and bob, which share a layer.
pub(super) struct Tenants {
    pub(super) upstream: TestUpstream,
    pub(super) alices: Image,
    pub(super) bobs: Image,
    pub(super) open: Image,
    pub(super) mode: Arc<AtomicUsize>,
}

pub(super) const HEALTHY: usize = 0;
pub(super) const SILENT: usize = 1;
/// A web page for every request, as a proxy before the registry may send it.
pub(super) const WEB_PAGE: usize = 2;
/// The rate limit of anonymous clients is used up.
pub(super) const LIMITS_ANONYMOUS: usize = 3;
/// The limit of manifests for anonymous clients is used up; HEAD requests do not count (as at Docker Hub).
pub(super) const LIMITS_ANONYMOUS_PULLS: usize = 4;

pub(super) fn is_allowed(user: &str, path: &str) -> bool {
    match path.strip_prefix("/v2/").and_then(|path| path.split('/').next()) {
        Some("open") => true,
        Some("a") => user == ALICE,
        Some("b") => user == BOB,
        _ => false,
    }
}

impl Tenants {
    pub(super) async fn new(scheme: AuthScheme) -> Self {
        let [alices, bobs, open] =
            [(1, 700_000), (2, 800_000), (3, 900_000)].map(|(seed, size)| Image::new(seed, &[size, 1000]));
        let content = Content::new(&[
            ("a/app", "1", &alices),
            ("b/app", "1", &bobs),
            ("b/both", "1", &alices),
            ("open/app", "1", &open),
        ]);
        let mode = Arc::new(AtomicUsize::new(HEALTHY));
        let now = mode.clone();
        let upstream = TestUpstream::with_handler(move |request: &Request| {
            if now.load(Ordering::SeqCst) == SILENT {
                return Response::new(200, "").fault(Fault::Silent);
            }
            if now.load(Ordering::SeqCst) == WEB_PAGE {
                return Response::new(200, "maintenance").with("content-type", "text/plain");
            }
            let authorization = request.header("authorization").unwrap_or_default();
            let decoded =
                authorization.split_once(' ').and_then(|(_, text)| STANDARD.decode(text).ok()).unwrap_or_default();
            let user = String::from_utf8(decoded).unwrap_or_default();
            let is_known = [ALICE, BOB].contains(&&*user);
            let path = request.path.split('?').next().unwrap();
            if path == "/token" {
                return match authorization {
                    "" => Response::new(200, json!({"token": STANDARD.encode("anonymous")}).to_string()),
                    _ if is_known => Response::new(200, json!({"token": STANDARD.encode(&user)}).to_string()),
                    _ => Response::new(401, "{}"),
                };
            }
            let limits = match now.load(Ordering::SeqCst) {
                LIMITS_ANONYMOUS => true,
                LIMITS_ANONYMOUS_PULLS => request.method != "HEAD",
                _ => false,
            };
            if limits && !is_known && path.contains("/manifests/") {
                return Response::new(429, "").with("retry-after", 3600);
            }
            let has_right_scheme = match scheme {
                AuthScheme::Basic => user.is_empty() || authorization.starts_with("Basic "),
                AuthScheme::Tokens => authorization.starts_with("Bearer "),
            };
            if has_right_scheme && (is_allowed(&user, path) || (path == "/v2/" && is_known)) {
                return if path.contains("/tags/") {
                    Response::new(200, "{\"tags\":[]}")
                } else {
                    content.respond(request)
                };
            }
            let host = request.header("host").unwrap_or_default();
            let challenge = match scheme {
                AuthScheme::Basic => "Basic realm=\"r\"".to_owned(),
                AuthScheme::Tokens => format!("Bearer realm=\"http://{host}/token\",service=\"s\""),
            };
            Response::new(401, "").with("www-authenticate", challenge)
        })
        .await;
        Self { upstream, alices, bobs, open, mode }
    }

    pub(super) fn rule(&self) -> String {
        format!(
            "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nauthorization = \"passthrough\"\n",
            self.upstream.url()
        )
    }

    pub(super) fn set_mode(&self, mode: usize) {
        self.mode.store(mode, Ordering::SeqCst);
    }
}

/// The parameters of a Bearer challenge.
pub(super) fn challenge(response: &ClientResponse) -> Vec<(String, String)> {
    assert_eq!(response.status, 401, "{}", response.text());
    let lines: Vec<_> =
        response.headers.get_all("www-authenticate").iter().map(|line| line.to_str().unwrap()).collect();
    assert_eq!(lines[1], "Basic realm=\"dray\"");
    let parameters = lines[0].strip_prefix("Bearer ").unwrap().split(',');
    let pair = |parameter: &str| {
        let (key, value) = parameter.split_once('=').unwrap();
        (key.to_owned(), value.trim_matches('"').to_owned())
    };
    parameters.map(pair).collect()
}

/// Responds to a challenge as containerd does. Err: the status of the token request.
pub(super) async fn token(challenged: &ClientResponse, login: Option<&str>) -> Result<String, u16> {
    let mut parameters = challenge(challenged);
    let (_, realm) = parameters.remove(0);
    let request = match login {
        Some(login) => {
            let (username, password) = login.split_once(':').unwrap();
            parameters.extend(
                [("grant_type", "password"), ("username", username), ("password", password)]
                    .map(|(a, b)| (a.to_owned(), b.to_owned())),
            );
            let form = reqwest::Url::parse_with_params(&realm, parameters).unwrap().query().unwrap().to_owned();
            client().post(realm).header("content-type", "application/x-www-form-urlencoded").body(form)
        }
        None => client().get(reqwest::Url::parse_with_params(&realm, parameters).unwrap()),
    };
    let response = request.send().await.unwrap();
    match response.status().as_u16() {
        200 => {
            let body: Value = serde_json::from_slice(&response.bytes().await.unwrap()).unwrap();
            assert!(body["expires_in"].as_u64().unwrap() > 0 && body["token"] == body["access_token"]);
            Ok(body["token"].as_str().unwrap().to_owned())
        }
        status => Err(status),
    }
}

pub(super) async fn get_as(dray: &Dray, path: &str, authorization: &str) -> ClientResponse {
    get(&dray.url(path), &[("authorization", authorization)]).await
}

/// Sends a request, responds to the challenge with a login, and repeats the request.
pub(super) async fn pull_as(dray: &Dray, path: &str, login: &str) -> ClientResponse {
    let challenged = dray.get(path).await;
    match token(&challenged, Some(login)).await {
        Ok(token) => get_as(dray, path, &format!("Bearer {token}")).await,
        Err(status) => ClientResponse { status, ..challenged },
    }
}

pub(super) const TAG: &str = "/v2/a/app/manifests/1?ns=reg.example";

/// Every path that leads to alice's content, with each form of naming the registry.
pub(super) fn all_paths(image: &Image, repository: &str) -> Vec<String> {
    let (layer, _) = image.layer();
    let forms = [
        |rest: &str, repository: &str| format!("/v2/{repository}/{rest}?ns=reg.example"),
        |rest: &str, repository: &str| format!("/v2/reg.example/{repository}/{rest}"),
        |rest: &str, repository: &str| format!("/v2/reg.example/{repository}/{rest}?ns=reg.example"),
        |rest: &str, repository: &str| format!("/v2/{repository}/{rest}?ns=REG.example:443"),
    ];
    let kinds = [
        "manifests/1".to_owned(),
        format!("manifests/{}", image.digest),
        format!("blobs/{layer}"),
        "tags/list".to_owned(),
        format!("referrers/{}", image.digest),
    ];
    forms.iter().flat_map(|form| kinds.iter().map(move |kind| form(kind, repository))).collect()
}
