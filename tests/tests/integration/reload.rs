//! A changed configuration file applies without a restart.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use dray_tests::dray::{Dray, Start, rule};
use dray_tests::eventually;
use dray_tests::image::Image;
use dray_tests::upstream::{Fault, Request, Response, TestUpstream};
use rustix::process::Signal;

struct Rig {
    upstream: TestUpstream,
    image: Image,
    dray: Dray,
    log: PathBuf,
}

const LATE: &str = "/v2/library/late/manifests/1?ns=docker.io";

/// An image that is cached, and the log of dray in a file: with a terminal, SIGHUP has another meaning.
async fn rig() -> Rig {
    let image = Image::new(1, &[400_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image), ("library/late", "1", &image)], |_, r| r).await;
    let start = Start::with_upstream("docker.io", &upstream.url());
    let log = start.dir().join("log");
    let dray = start.log_to(&log).env("DRAY_LOG", "info").run();
    let rig = Rig { upstream, image, dray, log };
    for path in ["/v2/library/app/manifests/1?ns=docker.io".to_owned(), rig.blob()] {
        assert_eq!(rig.dray.get(&path).await.status, 200);
    }
    rig.dray.wait_for_fills().await;
    rig
}

impl Rig {
    fn blob(&self) -> String {
        format!("/v2/library/app/blobs/{}?ns=docker.io", self.image.layer().0)
    }

    fn file(&self) -> PathBuf {
        self.dray.start().dir().join("dray.toml")
    }

    fn rule(&self) -> String {
        rule("docker.io", &self.upstream.url())
    }

    fn write(&mut self, text: &str) {
        std::fs::write(self.file(), text).unwrap();
        self.dray.process().signal(Signal::HUP);
    }

    async fn logged(&self, event: &str) -> String {
        let line = async || {
            let log = std::fs::read_to_string(&self.log).unwrap();
            log.lines().find(|line| line.contains(event)).map(str::to_owned)
        };
        eventually(event, line).await
    }

    async fn blob_status(&self, status: u16) {
        eventually(&format!("the blob gets {status}"), async || {
            (self.dray.get(&self.blob()).await.status == status).then_some(())
        })
        .await;
    }
}

/// The hash of the running configuration, by the status.
async fn hash(dray: &Dray) -> String {
    let status = dray_tests::http::get(&format!("http://{}/api/v1/status", dray.admin), &[]).await.text();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    status["config_hash"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn reloaded_rule_that_denies_denies_cached_content() {
    let mut rig = rig().await;
    let before = hash(&rig.dray).await;
    assert_eq!(rig.dray.metric(&format!("dray_config_info{{hash=\"{before}\"}}")).await, 1);
    let denied = format!("{}deny = true\n", rule("docker.io", &rig.upstream.url()).replace("upstreams", "#"));
    rig.write(&denied);
    rig.blob_status(403).await;
    let after = hash(&rig.dray).await;
    assert_eq!(rig.dray.metric(&format!("dray_config_info{{hash=\"{after}\"}}")).await, 1);
    assert_eq!(
        rig.dray.metric(&format!("dray_config_info{{hash=\"{before}\"}}")).await,
        0,
        "the previous hash is gone"
    );
    let requests = rig.upstream.requests().len();
    rig.write(&rig.rule());
    rig.blob_status(200).await;
    assert_eq!(rig.upstream.requests().len(), requests, "the blob is still cached");
}

#[tokio::test(flavor = "multi_thread")]
async fn reloaded_log_filter_decides_what_is_logged() {
    let start = Start::new("[log]\nfilter = \"warn,dray=info\"\n");
    let (log, file) = (start.dir().join("log"), start.dir().join("dray.toml"));
    let mut dray = start.log_to(&log).run();
    let logged = || std::fs::read_to_string(&log).unwrap();
    assert_eq!(dray.get("/v2/?before").await.status, 200);
    for (filter, path) in [("warn,dray=info,access=info", "/v2/?during"), ("warn,dray=info", "/v2/?after")] {
        let reloads = logged().matches("configuration reloaded").count();
        std::fs::write(&file, format!("[log]\nfilter = \"{filter}\"\n")).unwrap();
        dray.process().signal(Signal::HUP);
        eventually("the file is applied", async || {
            (logged().matches("configuration reloaded").count() > reloads).then_some(())
        })
        .await;
        eventually("a request is answered", async || (dray.get(path).await.status == 200).then_some(())).await;
    }
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    let access: Vec<_> = logged().lines().filter(|line| line.contains("/v2/")).map(str::to_owned).collect();
    assert!(access.len() == 1 && access[0].contains("/v2/"), "{access:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reloaded_access_and_upstream_apply_to_new_requests() {
    let mut rig = rig().await;
    rig.write(&format!("{}[access]\nallowed_cidrs = [\"10.0.0.0/8\"]\n", rig.rule()));
    rig.blob_status(403).await;
    let other = TestUpstream::start(&[("library/late", "1", &rig.image)], |_, r| r).await;
    rig.write(&format!("{}[access]\nmax_concurrent_requests = 9\n", rule("docker.io", &other.url())));
    rig.blob_status(200).await;
    assert_eq!(rig.dray.get(LATE).await.status, 200);
    assert!(other.count("GET", "/late/manifests/") > 0 && rig.upstream.count("GET", "/late/manifests/") == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn request_in_progress_ends_under_the_previous_rule() {
    let image = Image::new(1, &[3_000_000]);
    let upstream = TestUpstream::start(&[("library/app", "1", &image)], |request, response| {
        if request.is_blob() { response.fault(Fault::GateAfter(500_000)) } else { response }
    })
    .await;
    let start = Start::with_upstream("docker.io", &upstream.url());
    let log = start.dir().join("log");
    let mut dray = start.log_to(&log).env("DRAY_LOG", "info").run();
    let url = dray.url(&format!("/v2/library/app/blobs/{}?ns=docker.io", image.layer().0));
    let pull = tokio::spawn(async move { dray_tests::http::get(&url, &[]).await });
    dray.wait_for_fill_start().await;
    std::fs::write(dray.start().dir().join("dray.toml"), "[[registry]]\nmatch = \"docker.io\"\ndeny = true\n").unwrap();
    dray.process().signal(Signal::HUP);
    eventually("new requests are denied", async || {
        (dray.get("/v2/library/app/manifests/1?ns=docker.io").await.status == 403).then_some(())
    })
    .await;
    upstream.open_gate();
    let pulled = pull.await.unwrap();
    assert!(pulled.complete && pulled.body == image.layer().1, "{}", pulled.status);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_file_changes_nothing_and_is_reported() {
    let mut rig = rig().await;
    rig.write(&format!("{}stale_for = \"1d\"\n", rig.rule()));
    let line = rig.logged("configuration reload failed").await;
    assert!(line.contains("dray.toml") && line.contains("line 4") && line.contains("stale_if_error"), "{line}");
    assert_eq!(rig.dray.metric("dray_config_reload_failed").await, 1);
    rig.blob_status(200).await;
    rig.write("[[registry]]\nmatch = \"docker.io\"\nca = \"/missing.pem\"\n");
    rig.logged("/missing.pem").await;
    rig.blob_status(200).await;
    assert_eq!(rig.dray.get(LATE).await.status, 200, "the previous upstream is used");
    rig.write(&format!("{}tag_ttl = \"2m\"\n", rig.rule()));
    rig.logged("configuration reloaded").await;
    assert_eq!(rig.dray.metric("dray_config_reload_failed").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_was_taken_back_ends_the_failure() {
    let mut rig = rig().await;
    std::fs::write(rig.file(), "").unwrap();
    let line = rig.logged("the file is empty").await;
    assert!(line.contains("configuration reload failed"), "{line}");
    assert_eq!(rig.dray.metric("dray_config_reload_failed").await, 1);
    rig.blob_status(200).await;
    std::fs::write(rig.file(), rig.rule()).unwrap();
    eventually("the failure ends", async || (rig.dray.metric("dray_config_reload_failed").await == 0).then_some(()))
        .await;
    // A signal asks for it.
    rig.write("");
    rig.logged("configuration reloaded").await;
}

/// A download that goes on after a reload uses the credentials of its own rule, and the new rule gets nothing from them.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_the_previous_rule_do_not_serve_the_next_one() {
    let image = Image::new(1, &[3_000_000]);
    let private = |request: &Request, response: Response| {
        let is_allowed = request.header("authorization").is_some_and(|value| value.starts_with("Basic "));
        match (is_allowed, request.is_blob() && request.range_start().is_none_or(|start| start == 0)) {
            (false, _) => Response::new(401, "").with("www-authenticate", "Basic realm=\"private\""),
            (true, true) => response.fault(Fault::GateAfter(500_000)),
            (true, false) => response,
        }
    };
    let upstream = TestUpstream::start(&[("library/app", "1", &image), ("library/late", "1", &image)], private).await;
    let rule = rule("docker.io", &upstream.url());
    let with_credentials = format!("{rule}credentials = {{ username = \"robot\", password_env = \"PASSWORD\" }}\n");
    let start = Start::new(with_credentials).env("PASSWORD", "hush").env("DRAY_LOG", "info");
    let log = start.dir().join("log");
    let mut dray = start.log_to(&log).run();
    let url = dray.url(&format!("/v2/library/app/blobs/{}?ns=docker.io", image.layer().0));
    let pull = tokio::spawn(async move { dray_tests::http::get(&url, &[]).await });
    dray.wait_for_fill_start().await;
    std::fs::write(dray.start().dir().join("dray.toml"), rule).unwrap();
    dray.process().signal(Signal::HUP);
    let denied = async || {
        let status = dray.get(LATE).await.status;
        (status == 401 || status == 403).then_some(())
    };
    eventually("the new rule has no credentials", denied).await;
    upstream.open_gate();
    let pulled = pull.await.unwrap();
    assert!(pulled.complete && pulled.body == image.layer().1, "{}", pulled.status);
    for path in [LATE, "/v2/library/app/tags/list?ns=docker.io"] {
        let status = dray.get(path).await.status;
        assert!(status == 401 || status == 403, "{path}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_rule_does_not_inherit_an_outage() {
    let mut rig = rig().await;
    rig.write(&rule("docker.io", "http://127.0.0.1:1"));
    eventually("the new upstream is down", async || (rig.dray.get(LATE).await.status == 503).then_some(())).await;
    let working = rig.rule();
    rig.write(&working);
    eventually("the working upstream is used", async || (rig.dray.get(LATE).await.status == 200).then_some(())).await;
    let down = "dray_upstream_down{rule=\"docker.io\"}";
    eventually("the removed upstream is not probed", async || (rig.dray.metric(down).await == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_need_a_restart_are_listed_and_keep_their_values() {
    let mut rig = rig().await;
    rig.write(&format!(
        "{}deny = true\n[dns]\nservers = [\"127.0.0.1:1\"]\n",
        rule("quay.io", &rig.upstream.url()).replace("upstreams", "#")
    ));
    let line = rig.logged("changed keys need a restart").await;
    assert!(line.contains("dns") && !line.contains("listen"), "{line}");
    rig.blob_status(200).await;
    assert_eq!(rig.dray.get("/v2/a/manifests/1?ns=quay.io").await.status, 403, "the other keys apply");
}

/// A ConfigMap's volume: the file is a link through a directory link that the kubelet replaces.
#[tokio::test(flavor = "multi_thread")]
async fn replaced_directory_link_is_found_without_a_signal() {
    let rig = rig().await;
    let dir = rig.dray.start().dir().to_owned();
    for (name, text) in [("one", rig.rule()), ("two", "[[registry]]\nmatch = \"docker.io\"\ndeny = true\n".to_owned())]
    {
        std::fs::create_dir(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join("dray.toml"), text).unwrap();
    }
    symlink("one", dir.join("..data")).unwrap();
    std::fs::remove_file(rig.file()).unwrap();
    symlink("..data/dray.toml", rig.file()).unwrap();
    symlink("two", dir.join("..data_tmp")).unwrap();
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    rig.blob_status(403).await;
}
