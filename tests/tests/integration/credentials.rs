//! Sources of credentials: helpers, the kubelet's plugins, the cloud's metadata, files; and credentials that change
//! while dray runs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use dray_tests::dray::{Dray, Start};
use dray_tests::image::Image;
use dray_tests::process::{Process, free_port};
use dray_tests::upstream::{Content, Response, TestUpstream};
use serde_json::json;

const MANIFEST: &str = "/v2/team/app/manifests/1?ns=reg.example";

/// A registry with one valid login at a time that requires Basic or issues tokens.
struct Locked {
    upstream: TestUpstream,
    login: Arc<Mutex<String>>,
    image: Image,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum AuthScheme {
    Basic,
    /// An expired password is denied with 403, as by ECR.
    BasicExpiring,
    Tokens,
}

impl Locked {
    async fn new(scheme: AuthScheme, login: &str) -> Self {
        let image = Image::new(1, &[1000]);
        let content = Content::new(&[("team/app", "1", &image), ("team/app", "2", &image)]);
        let login = Arc::new(Mutex::new(login.to_owned()));
        let known = login.clone();
        let upstream = TestUpstream::with_handler(move |request| {
            let basic = format!("Basic {}", STANDARD.encode(known.lock().unwrap().as_bytes()));
            // A token is valid as long as the password that it was issued for.
            let bearer = format!("Bearer {}", STANDARD.encode(&basic));
            let authorization = request.header("authorization").unwrap_or_default();
            let host = request.header("host").unwrap_or_default();
            match scheme {
                _ if request.path.starts_with("/token") && authorization == basic => {
                    Response::new(200, json!({"token": STANDARD.encode(&basic), "expires_in": 3600}).to_string())
                }
                AuthScheme::Basic | AuthScheme::BasicExpiring if authorization == basic => content.respond(request),
                AuthScheme::BasicExpiring if !authorization.is_empty() => Response::new(403, ""),
                AuthScheme::Tokens if authorization == bearer => content.respond(request),
                AuthScheme::Basic | AuthScheme::BasicExpiring => {
                    Response::new(401, "").with("www-authenticate", "Basic realm=\"r\"")
                }
                AuthScheme::Tokens => {
                    let realm = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
                    Response::new(401, "").with("www-authenticate", realm)
                }
            }
        })
        .await;
        Self { upstream, login, image }
    }

    fn set_login(&self, login: &str) {
        *self.login.lock().unwrap() = login.to_owned();
    }

    fn rule(&self, credentials: &str) -> String {
        format!(
            "[[registry]]\nmatch = \"reg.example\"\nupstreams = [\"{}\"]\nnegative_ttl = \"0s\"\ntag_ttl = \"0s\"\n\
             credentials = {{ {credentials} }}\n",
            self.upstream.url()
        )
    }

    /// Pulls a tag with a TTL of 0, which is always resolved upstream.
    async fn assert_pulls(&self, dray: &Dray) {
        let response = dray.get(MANIFEST).await;
        assert_eq!((response.status, &response.body), (200, self.image.index()), "{}", response.text());
        assert_ne!(response.source(), "stale");
    }
}

fn write_script(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{text}")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn path_with(dir: &Path) -> String {
    format!("{}:{}", dir.display(), std::env::var("PATH").unwrap())
}

fn lines(file: &Path) -> usize {
    std::fs::read_to_string(file).unwrap_or_default().lines().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_helper_runs_once_until_its_secret_changes() {
    for scheme in [AuthScheme::Basic, AuthScheme::BasicExpiring, AuthScheme::Tokens] {
        let registry = Locked::new(scheme, "robot:old").await;
        let dir = tempfile::tempdir().unwrap();
        let (secret, requests) = (dir.path().join("secret"), dir.path().join("requests"));
        std::fs::write(&secret, "old").unwrap();
        write_script(
            &dir.path().join("docker-credential-test"),
            &format!(
                "cat >>{requests}; echo >>{requests}\n[ \"$1\" = get ] || exit 1\n\
                 printf '{{\"ServerURL\":\"x\",\"Username\":\"robot\",\"Secret\":\"%s\"}}' \"$(cat {secret})\"\n",
                requests = requests.display(),
                secret = secret.display()
            ),
        );
        let by_name = registry.rule("helper = \"test\"");
        let config = dir.path().join("config.json");
        let host = registry.upstream.address.to_string();
        std::fs::write(&config, json!({"credHelpers": {&host: "test"}, "auths": {&host: {}}}).to_string()).unwrap();
        let by_file = registry.rule(&format!("file = \"{}\"", config.display()));
        for rule in [by_name, by_file] {
            registry.set_login("robot:old");
            std::fs::write(&secret, "old").unwrap();
            let _ = std::fs::remove_file(&requests);
            let dray = Start::new(rule).env("PATH", &path_with(dir.path())).run();
            for _ in 0..3 {
                registry.assert_pulls(&dray).await;
            }
            assert_eq!(
                std::fs::read_to_string(&requests).unwrap(),
                format!("{host}\n"),
                "one request, for the upstream"
            );
            // The password changes at the registry and in the helper's store.
            registry.set_login("robot:new");
            std::fs::write(&secret, "new").unwrap();
            registry.assert_pulls(&dray).await;
            assert_eq!(lines(&requests), 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_credential_helper_is_anonymous_failing_one_is_503() {
    let registry = Locked::new(AuthScheme::Basic, "robot:x").await;
    let dir = tempfile::tempdir().unwrap();
    let helper = dir.path().join("docker-credential-test");
    let log = dir.path().join("log");
    for (text, expected) in [
        ("echo credentials not found in native keychain; exit 1\n", None),
        ("echo my-secret-is-hush; exit 1\n", Some("docker-credential-test: exit status: 1")),
        ("echo hush\n", Some("not JSON with Username and Secret")),
        ("exec sleep 60\n", Some("no response within 10 s")),
    ] {
        write_script(&helper, text);
        let start = Start::new(registry.rule("helper = \"test\"")).env("PATH", &path_with(dir.path())).log_to(&log);
        let dray = start.run();
        let response = dray.get(MANIFEST).await;
        assert_eq!(response.status, if expected.is_some() { 503 } else { 403 }, "{text}: {}", response.text());
        assert_eq!(
            dray.metric("dray_upstream_down{rule=\"reg.example\"}").await,
            0,
            "{text}: the upstream is not at fault"
        );
        if let Some(expected) = expected {
            dray_tests::eventually(expected, async || {
                let log = std::fs::read_to_string(&log).unwrap();
                assert!(!log.contains("hush") && !response.text().contains("hush"), "{log}");
                log.contains(expected).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_credential_plugins_are_used_unchanged() {
    let registry = Locked::new(AuthScheme::Tokens, "AWS:old").await;
    let dir = tempfile::tempdir().unwrap();
    let (secret, requests) = (dir.path().join("secret"), dir.path().join("requests"));
    std::fs::write(&secret, "old").unwrap();
    let host = registry.upstream.address.to_string();
    write_script(
        &dir.path().join("ecr-credential-provider"),
        &format!(
            "cat >>{requests}; echo \" $1 $REGION\" >>{requests}\n\
             printf '{{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\
             \"cacheKeyType\":\"Registry\",\"cacheDuration\":\"12h0m0s\",\"auth\":{{\"other.example\":{{\"username\":\"a\",\
             \"password\":\"b\"}},\"{host}\":{{\"username\":\"AWS\",\"password\":\"%s\"}}}}}}' \"$(cat {secret})\"\n",
            requests = requests.display(),
            secret = secret.display()
        ),
    );
    write_script(
        &dir.path().join("without-credentials"),
        "cat >/dev/null\nprintf '{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\
         \"cacheKeyType\":\"Registry\",\"cacheDuration\":\"1h\",\"auth\":{}}'\n",
    );
    let config = dir.path().join("providers.yaml");
    std::fs::write(
        &config,
        format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
             - name: without-credentials\n  matchImages: [\"{host}\"]\n  defaultCacheDuration: 1h\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n\
             - name: other-registry\n  matchImages: [\"*.azurecr.io\"]\n  defaultCacheDuration: 1h\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n\
             - name: ecr-credential-provider\n  matchImages: [\"*.dkr.ecr.*.amazonaws.com\", \"{host}\"]\n  \
             defaultCacheDuration: 1h\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [get-credentials]\n  \
             env: [{{ name: REGION, value: eu }}]\n"
        ),
    )
    .unwrap();
    let provider = format!("provider = \"{}\", bin_dir = \"{}\"", config.display(), dir.path().display());
    let dray = Start::new(registry.rule(&provider)).run();
    for _ in 0..3 {
        registry.assert_pulls(&dray).await;
    }
    let text = std::fs::read_to_string(&requests).unwrap();
    let (request, rest) = text.trim_end().rsplit_once("} ").unwrap();
    assert_eq!(rest, "get-credentials eu", "once: {text}");
    let request: serde_json::Value = serde_json::from_str(&format!("{request}}}")).unwrap();
    assert_eq!(
        request,
        json!({
            "kind": "CredentialProviderRequest",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "image": format!("{host}/team/app"),
        })
    );
    registry.set_login("AWS:new");
    std::fs::write(&secret, "new").unwrap();
    registry.assert_pulls(&dray).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gcp_metadata_server_grants_tokens() {
    let registry = Locked::new(AuthScheme::Tokens, "oauth2accesstoken:ya29").await;
    let metadata = TestUpstream::with_handler(|request| match request.header("metadata-flavor") {
        Some("Google") if request.path == "/computeMetadata/v1/instance/service-accounts/default/token" => {
            Response::new(200, r#"{"access_token": "ya29", "expires_in": 3599, "token_type": "Bearer"}"#)
        }
        _ => Response::new(403, ""),
    })
    .await;
    let start = Start::new(registry.rule("cloud = \"gcp\""));
    let dray = start.env("GCE_METADATA_HOST", &metadata.address.to_string()).run();
    for _ in 0..3 {
        registry.assert_pulls(&dray).await;
    }
    assert_eq!(metadata.requests().len(), 1, "one request: the token is cached for half of its lifetime");
}

/// Responses of AWS come from moto's server: a token of the cluster proves an identity, which gets a token for ECR.
#[tokio::test(flavor = "multi_thread")]
async fn aws_ecr_grants_tokens_to_pods() {
    let registry = Locked::new(AuthScheme::Basic, "AWS:123456789012-auth-token").await;
    let port = free_port();
    let mut moto = Command::new("python3");
    moto.env("PYTHONPATH", dray_tests::tool("python")).stdout(Stdio::null()).stderr(Stdio::null());
    let _moto = Process::spawn(moto.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]));
    let amazon = format!("http://127.0.0.1:{port}");
    dray_tests::eventually("moto listens", async || std::net::TcpStream::connect(("127.0.0.1", port)).ok()).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "of-the-cluster").unwrap();
    // The agent of EKS Pod Identity, which runs on each node.
    let agent = TestUpstream::with_handler(|request| match request.header("authorization") {
        Some("of-the-cluster") => Response::new(
            200,
            json!({"AccessKeyId": "A", "SecretAccessKey": "S", "Token": "T", "Expiration": "2099-01-01T00:00:00Z"})
                .to_string(),
        ),
        _ => Response::new(403, ""),
    })
    .await;
    let metadata = TestUpstream::with_handler(|request| match (&*request.method, &*request.path) {
        ("PUT", "/latest/api/token") => {
            Response::new(200, "session").with("x-aws-ec2-metadata-token-ttl-seconds", "21600")
        }
        _ if request.header("x-aws-ec2-metadata-token") != Some("session") => Response::new(401, ""),
        (_, path) if path.ends_with("/node-role") => Response::new(
            200,
            json!({"Code": "Success", "LastUpdated": "2026-01-01T00:00:00Z", "Type": "AWS-HMAC", "AccessKeyId": "A",
                   "SecretAccessKey": "S", "Token": "T", "Expiration": "2099-01-01T00:00:00Z", "AccountId": "1"})
            .to_string(),
        ),
        (_, path) if path.contains("/security-credentials") => Response::new(200, "node-role"),
        _ => Response::new(404, ""),
    })
    .await;
    let file = file.to_str().unwrap();
    let (agent_url, metadata_url) = (format!("{}/v1/credentials", agent.url()), metadata.url());
    let web_identity = [("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/dray"), ("AWS_WEB_IDENTITY_TOKEN_FILE", file)];
    let pod_identity =
        [("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*agent_url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", file)];
    let instance = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", &*metadata_url), ("HOME", "/nonexistent")];
    for variables in [web_identity, pod_identity, instance] {
        let start = Start::new(registry.rule("cloud = \"aws\"")).env("AWS_ENDPOINT_URL", &amazon);
        // Empty, as in manifests with unset values.
        let start = start.env("AWS_ACCESS_KEY_ID", "").env("AWS_SECRET_ACCESS_KEY", "").env("AWS_PROFILE", "");
        let start =
            variables.iter().fold(start.env("AWS_REGION", "eu-west-1"), |start, (key, value)| start.env(key, value));
        registry.assert_pulls(&start.run()).await;
    }
    assert!(!agent.requests().is_empty() && !metadata.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn ecr_token_is_cached_for_half_its_life() {
    let registry = Locked::new(AuthScheme::Basic, "AWS:hush").await;
    let ends = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() + 12 * 3600;
    let ecr = TestUpstream::with_handler(move |request| {
        let target = request.header("x-amz-target").unwrap_or_default();
        assert!(target.ends_with(".GetAuthorizationToken"), "{target}");
        let signed = request.header("authorization").unwrap_or_default();
        assert!(signed.contains("Credential=A/") && signed.contains("/us-east-2/ecr/"), "{signed}");
        let data = json!([{"authorizationToken": STANDARD.encode("AWS:hush"), "expiresAt": ends}]);
        Response::new(200, json!({"authorizationData": data}).to_string())
    })
    .await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let start = Start::new(registry.rule("cloud = \"aws\"")).env("AWS_ENDPOINT_URL_ECR", &ecr.url());
    let start = start.env("AWS_REGION", "us-east-2").env("AWS_ACCESS_KEY_ID", "A").env("AWS_SECRET_ACCESS_KEY", "S");
    let dray = start.env("DRAY_LOG", "debug").log_to(log.path()).run();
    for _ in 0..3 {
        registry.assert_pulls(&dray).await;
    }
    assert_eq!(ecr.requests().len(), 1);
    assert!(!std::fs::read_to_string(log.path()).unwrap().contains("hush"));
}

/// Microsoft's endpoints as documented: a token of the cluster or of the machine is exchanged at the registry.
#[tokio::test(flavor = "multi_thread")]
async fn azure_registry_exchanges_pod_and_machine_tokens() {
    for kind in ["workload", "machine"] {
        let locked = Locked::new(AuthScheme::Basic, "00000000-0000-0000-0000-000000000000:refresh").await;
        let behind = locked.upstream.url();
        let entra = TestUpstream::with_handler(move |request| {
            let is_workload = request.method == "POST" && request.path == "/tenant/oauth2/v2.0/token";
            let is_machine = request.path.starts_with("/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fcontainerregistry.azure.net")
                && request.header("metadata") == Some("true");
            let is_right = if kind == "workload" { is_workload } else { is_machine };
            if is_right { Response::new(200, json!({"access_token": "entra", "expires_in": 3600}).to_string()) } else { Response::new(400, "") }
        })
        .await;
        let front = dray_tests::http::client();
        let registry = TestUpstream::with_handler(move |request| {
            if request.path == "/oauth2/exchange" {
                return Response::new(200, json!({"refresh_token": "refresh"}).to_string());
            }
            // Other requests go to the registry behind.
            let forwarded = front.request(request.method.parse().unwrap(), format!("{behind}{}", request.path));
            let forwarded = request
                .header("authorization")
                .into_iter()
                .fold(forwarded, |forwarded, value| forwarded.header("authorization", value));
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(async {
                    let upstream_response = forwarded.send().await.unwrap();
                    let (status, headers) = (upstream_response.status().as_u16(), upstream_response.headers().clone());
                    let mut response = Response::new(status, upstream_response.bytes().await.unwrap());
                    for name in ["content-type", "docker-content-digest", "www-authenticate"] {
                        if let Some(value) = headers.get(name) {
                            response = response.with(name, value.to_str().unwrap());
                        }
                    }
                    response
                })
            })
        })
        .await;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "of-the-cluster\n").unwrap();
        let rule = locked.rule("cloud = \"azure\"").replace(&locked.upstream.url(), &registry.url());
        let start = Start::new(rule);
        let start = match kind {
            "workload" => start
                .env("AZURE_FEDERATED_TOKEN_FILE", file.to_str().unwrap())
                .env("AZURE_TENANT_ID", "tenant")
                .env("AZURE_CLIENT_ID", "client")
                .env("AZURE_AUTHORITY_HOST", &format!("{}/", entra.url())),
            _ => start.env("AZURE_POD_IDENTITY_AUTHORITY_HOST", &entra.url()),
        };
        let dray = start.run();
        for _ in 0..3 {
            locked.assert_pulls(&dray).await;
        }
        assert_eq!(registry.count("POST", "/oauth2/exchange"), 1, "{kind}");
    }
}

/// As a mounted Secret changes: a new file is renamed to the same name.
#[tokio::test(flavor = "multi_thread")]
async fn docker_config_replaced_at_runtime_is_read_again() {
    let registry = Locked::new(AuthScheme::Tokens, "robot:old").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(".dockerconfigjson");
    let host = registry.upstream.address.to_string();
    let write = |password: &str| {
        // The key with a path takes precedence over the key of the host.
        let entry = |login: &str| json!({"auth": STANDARD.encode(login)});
        let auths =
            json!({&host: entry("other:x"), format!("https://{host}/team"): entry(&format!("robot:{password}"))});
        let next = dir.path().join("next");
        std::fs::write(&next, json!({"auths": auths}).to_string()).unwrap();
        std::fs::rename(next, &file).unwrap();
    };
    write("old");
    let dray = Start::new(registry.rule(&format!("file = \"{}\"", file.display()))).run();
    registry.assert_pulls(&dray).await;
    registry.set_login("robot:new");
    write("new");
    registry.assert_pulls(&dray).await;
}
