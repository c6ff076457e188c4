//! A token endpoint as the distribution project specifies it, for docker-registry's `auth: token`.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::process::run;
use crate::upstream::{Request, Response, TestUpstream};

/// A running token endpoint. It issues pull tokens for the given login. None: it issues them to every client.
pub struct TokenServer {
    pub upstream: TestUpstream,
    settings: String,
}

impl TokenServer {
    pub async fn start(dir: &Path, password: Option<(&'static str, &'static str)>) -> Self {
        let (key, cert) = (dir.join("token.key"), dir.join("token.crt"));
        run(std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tokens", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&cert));
        let pem = std::fs::read_to_string(&cert).expect("the certificate was written");
        let der: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let signer = key.clone();
        let upstream = TestUpstream::with_handler(move |request| respond(request, &signer, &der, password)).await;
        let settings = format!(
            "auth: {{token: {{realm: \"{}/token\", service: test, issuer: tests, rootcertbundle: {}}}}}\n",
            upstream.url(),
            cert.display()
        );
        Self { upstream, settings }
    }

    /// The `auth:` section of a docker-registry that trusts this endpoint.
    pub fn settings(&self) -> &str {
        &self.settings
    }
}

fn respond(request: &Request, key: &Path, cert: &str, password: Option<(&str, &str)>) -> Response {
    if let Some((username, password)) = password {
        let expected = format!("Basic {}", STANDARD.encode(format!("{username}:{password}")));
        if request.header("authorization") != Some(&expected) {
            return Response::new(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#);
        }
    }
    let query = request.path.split_once('?').map_or("", |(_, query)| query);
    let scope = query.split('&').find_map(|pair| pair.strip_prefix("scope=")).unwrap_or_default();
    let scope = scope.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",");
    let repository = scope.split(':').nth(1).unwrap_or_default();
    let token = sign(key, cert, repository);
    Response::new(200, json!({"token": token, "expires_in": 300}).to_string()).with("content-type", "application/json")
}

/// A JSON web token, signed by openssl.
fn sign(key: &Path, cert: &str, repository: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = part(json!({"typ": "JWT", "alg": "RS256", "x5c": [cert]}));
    let claims = part(json!({
        "iss": "tests", "aud": "test", "sub": "", "iat": now, "nbf": now - 10, "exp": now + 300, "jti": "1",
        "access": [{"type": "repository", "name": repository, "actions": ["pull"]}],
    }));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    std::fs::write(&input, format!("{head}.{claims}")).expect("written");
    run(std::process::Command::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(key)
        .arg("-out")
        .arg(&output)
        .arg(&input));
    format!("{head}.{claims}.{}", URL_SAFE_NO_PAD.encode(std::fs::read(output).expect("signed")))
}
