//! The command line, as people and scripts use it.

use std::process::{Command, Stdio};

use dray_tests::dray::{Start, binary};
use dray_tests::eventually;
use dray_tests::http::get;
use dray_tests::process::{Process, free_port, output};
use rustix::process::Signal;

fn check(text: &str) -> (i32, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dray.toml");
    std::fs::write(&file, text).unwrap();
    let output = output(Command::new(binary()).arg("check-config").arg(&file));
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), printed)
}

#[test]
fn check_config_names_what_is_wrong() {
    assert_eq!(check("").0, 0);
    assert_eq!(check(include_str!("../../../config/dray.toml")).0, 0);
    let (code, printed) = check("[cache]\nsize = \"20GiB\"");
    assert_eq!(code, 2);
    for part in ["dray.toml", "line 2", "size"] {
        assert!(printed.contains(part), "{printed}");
    }
}

/// Errors of the start can be found before it.
#[test]
fn check_config_with_files_reads_what_they_name() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("dray.toml"), dir.path().join("key"));
    let check = |text: &str, flags: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let output = output(Command::new(binary()).arg("check-config").args(flags).arg(&file));
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let peers = |member: &str| {
        let key = key.display();
        format!("[peers]\nlisten = \"0.0.0.0:5052\"\nstatic = [\"{member}\"]\nkey_file = \"{key}\"\n")
    };
    for (text, want) in [
        ("[tls]\ncert = \"/nowhere.crt\"\nkey = \"/nowhere.key\"\n".to_owned(), "/nowhere.crt"),
        ("[access]\nusers_file = \"/nowhere\"\n".to_owned(), "/nowhere"),
        ("[containerd]\nhosts_dir = \"/nowhere\"\n".to_owned(), "containerd.hosts_dir"),
        ("[tls]\nca = \"/nowhere.pem\"\n".to_owned(), "tls.ca = \"/nowhere.pem\""),
        (
            "[[registry]]\nmatch = \"a.io\"\ncredentials = { username = \"u\", password_env = \"DRAY_UNSET\" }\n"
                .to_owned(),
            "dray.toml:3: registry.credentials: the environment variable DRAY_UNSET",
        ),
        (peers("127.0.0.1:5052"), "key"),
    ] {
        assert_eq!(check(&text, &[]).0, 0, "{text}");
        let (code, printed) = check(&text, &["--check-files"]);
        assert_eq!(code, 2, "{text}");
        assert!(printed.contains(want) && printed.contains("dray.toml"), "{printed}");
    }
    std::fs::write(&key, "sixteen characters or more").unwrap();
    assert_eq!(check(&peers("127.0.0.1:5052"), &["--check-files"]), (0, String::new()));
    let (code, printed) = check(&peers("192.0.2.1:5052"), &["--check-files"]);
    assert!(code == 2 && printed.contains("peers.static"), "{printed}");
}

/// A key may be set by a variable of the environment in which dray will run.
#[test]
fn check_config_reports_what_the_start_rejects() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("dray.toml"), dir.path().join("key"));
    let rule = "[[registry]]\nmatch = \"reg.corp\"\nauthorization = \"passthrough\"\n";
    std::fs::write(&file, format!("{rule}[peers]\nlisten = \"127.0.0.1:5052\"\nservice = \"dray.svc\"\n")).unwrap();
    std::fs::write(&key, "sixteen characters or more").unwrap();
    let error = "dray.toml:3: registry.authorization";
    let anywhere = output(Command::new(binary()).arg("check-config").arg(&file));
    let printed = String::from_utf8_lossy(&anywhere.stdout);
    assert!(anywhere.status.success() && printed.contains("note: ") && printed.contains(error), "{printed}");
    let mut check_files = Command::new(binary());
    check_files.args(["check-config", "--check-files"]).arg(&file);
    for refused in [output(&mut check_files), output(Command::new(binary()).arg("--config").arg(&file))] {
        let printed = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(2) && printed.contains(error), "{printed}");
    }
    assert!(output(check_files.env("DRAY_PEERS_KEY_FILE", &key)).status.success());
}

#[test]
fn every_example_config_is_valid() {
    let examples = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../config")).unwrap();
    let mut count = 0;
    for example in examples {
        let path = example.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let output = output(Command::new(binary()).arg("check-config").arg(&path));
        assert!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        count += 1;
    }
    assert!(count >= 3, "{count} files");
}

#[test]
fn invalid_configuration_opens_no_port() {
    for (config, code, want) in [
        ("[cache]\ndisk = \"20GB\"\n", 2, "GiB"),
        ("[[registry]]\nmatch = \"a.io\"\nca = \"/nowhere.pem\"\n", 2, "/nowhere.pem"),
        ("[tls]\ncert = \"/nowhere.crt\"\nkey = \"/nowhere.key\"\n", 2, "/nowhere.crt"),
    ] {
        let output = output(&mut Start::new(config).command());
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{printed}");
        assert!(printed.contains(want), "{printed}");
        assert!(output.stdout.is_empty());
    }
    let wrong_log = output(Start::new("").command().env("DRAY_LOG", "warning"));
    assert_eq!(wrong_log.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_log.stderr).contains("warn,access=info"));
    let alone = output(Command::new(binary()).args(["--zone", "a"]));
    let printed = String::from_utf8_lossy(&alone.stderr);
    assert!(
        alone.status.code() == Some(2) && printed.contains("--zone") && printed.contains("--peers-service"),
        "{printed}"
    );
    let wrong_port = output(Command::new(binary()).args(["--listen", "5050"]));
    assert_eq!(wrong_port.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_port.stderr).contains("expected IP:PORT"));
    let wrong_flag = output(Command::new(binary()).args(["--cache-disk", "20GB"]));
    assert_eq!(wrong_flag.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_flag.stderr).contains("GiB"));
}

/// Protection of the registry port does not protect the peer port.
#[tokio::test(flavor = "multi_thread")]
async fn unauthenticated_peers_are_logged_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "sixteen characters or more").unwrap();
    let peers = || {
        let address = format!("127.0.0.1:{}", free_port());
        format!("[peers]\nlisten = \"{address}\"\nstatic = [\"{address}\"]\n")
    };
    let clients = "[access]\nallowed_cidrs = [\"127.0.0.0/8\"]\n";
    for (nth, (config, expected)) in [
        (peers(), &["peers without key_file or mtls"][..]),
        (clients.to_owned() + &peers(), &["peers without key_file or mtls", "guard the registry port only"]),
        (clients.to_owned() + &peers() + &format!("key_file = \"{}\"\n", key.display()), &[]),
    ]
    .into_iter()
    .enumerate()
    {
        let log = dir.path().join(format!("log{nth}"));
        let mut dray = Start::new(config).env("DRAY_LOG", "warn").log_to(&log).run();
        dray.process().kill();
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("WARN")).count(), expected.len(), "{text}");
        assert!(expected.iter().all(|expected| text.contains(expected)), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_without_a_file_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut command = Command::new(binary());
    command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--cache-disk", "64MiB", "--log", "warn"]);
    command.arg("--cache-dir").arg(dir.path().join("cache")).stdout(Stdio::piped());
    let mut dray = Process::spawn(command.stderr(std::fs::File::create(&log).unwrap()));
    dray.line("listening ");
    dray.signal(Signal::HUP);
    let logged = || std::fs::read_to_string(&log).unwrap();
    eventually("the signal is logged", async || logged().contains("without a configuration file").then_some(())).await;
    dray.signal(Signal::TERM);
    assert!(dray.wait().success(), "it ran until the stop signal");
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_and_flags_override_the_file() {
    let start = Start::new("listen = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:2\"\n[cache]\ndir = \"/proc/x\"\n");
    let dray = start.run();
    assert_eq!(dray.get("/v2/").await.status, 200);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dray.toml");
    std::fs::write(&file, "listen = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:2\"\n[cache]\ndir = \"/proc/x\"\n").unwrap();
    let mut command = Command::new(binary());
    command
        .env("DRAY_CONFIG", file)
        .env("DRAY_LISTEN", "127.0.0.1:0")
        .env("DRAY_ADMIN", "127.0.0.1:0")
        .env("DRAY_CACHE_DIR", dir.path())
        .env("DRAY_CACHE_DISK", "100MiB")
        .env("DRAY_CACHE_MEMORY", "8MiB")
        .env("DRAY_LOG", "warn")
        .env("DRAY_LOG_FORMAT", "json")
        .stdout(std::process::Stdio::piped());
    let mut process = dray_tests::process::Process::spawn(&mut command);
    assert!(process.line("listening ").contains("peers=-"));
}

#[tokio::test(flavor = "multi_thread")]
async fn occupied_port_or_directory_is_named() {
    let first = Start::new("").run();
    let second = Start::new("");
    let dir = output(&mut second.clone().cache(first.start().cache_dir()).command());
    let printed = String::from_utf8_lossy(&dir.stderr);
    assert_eq!(dir.status.code(), Some(1));
    assert!(printed.contains("in use by another dray") && printed.contains("--cache-dir"), "{printed}");
    let mut command = Command::new(binary());
    command.args(["--admin", "127.0.0.1:0", "--listen", &first.registry.to_string(), "--cache-dir"]);
    let port = output(command.arg(second.cache_dir()));
    let printed = String::from_utf8_lossy(&port.stderr);
    assert_eq!(port.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains(&first.registry.to_string()) && printed.contains("choose another address or port"),
        "{printed}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics_are_served() {
    let dray = Start::new("").run();
    for (path, status) in [("/livez", 200), ("/readyz", 200), ("/metrics", 200), ("/", 200), ("/none", 404)] {
        assert_eq!(get(&format!("http://{}{path}", dray.admin), &[]).await.status, status, "{path}");
    }
    dray.get("/v2/").await;
    assert_eq!(dray.metric("dray_requests_total{route=\"ping\",source=\"none\",status=\"200\"}").await, 1);
    let pushed = dray_tests::http::send(reqwest::Method::POST, &format!("http://{}/metrics", dray.admin), &[]).await;
    assert_eq!(pushed.status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_is_logged_as_one_json_line() {
    let start = Start::new("").env("DRAY_LOG", "info").env("DRAY_LOG_FORMAT", "json");
    let log = start.dir().join("log");
    let mut dray = start.log_to(&log).run();
    let response = dray.get("/v2/library/app/manifests/x?ns=localhost").await;
    assert_eq!(response.status, 403);
    // The line is written after the response.
    let text = eventually("the request is logged", async || {
        std::fs::read_to_string(&log).ok().filter(|text| text.contains("\"access\"") && text.ends_with('\n'))
    })
    .await;
    dray.process().kill();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests: Vec<_> = lines.iter().filter(|line| line["target"] == "access").collect();
    assert_eq!(requests.len(), 1);
    let line = requests[0];
    assert_eq!(line["id"], response.header("x-request-id").unwrap());
    assert_eq!((&line["route"], &line["rule"], &line["status"]), (&"manifest".into(), &"*".into(), &403.into()));
    assert_eq!((&line["registry"], &line["source"]), (&"localhost".into(), &"none".into()));
    assert!(line["first_byte_ms"].is_number() && line["bytes"].is_number());
}

/// The output can be redirected into a file: it is that file, and a parser of its format reads it.
#[test]
fn runtime_config_is_printed_with_its_destination() {
    let document = |name: &str| {
        let output = output(Command::new(binary()).args(["runtime-config", name]));
        assert!(output.status.success(), "{name}");
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(printed.lines().all(|line| line.starts_with("# ")) && printed.len() > 20, "{printed}");
        String::from_utf8(output.stdout).unwrap()
    };
    let mirror = "http://127.0.0.1:5050";
    let json: serde_json::Value = serde_json::from_str(&document("docker")).unwrap();
    assert_eq!(json["registry-mirrors"][0], mirror);
    let toml = |name: &str| document(name).parse::<toml::Table>().unwrap();
    assert_eq!(toml("buildkit")["registry"]["ghcr.io"]["mirrors"][0].as_str(), Some("127.0.0.1:5050"));
    assert_eq!(toml("buildkit")["registry"]["127.0.0.1:5050"]["http"].as_bool(), Some(true));
    for name in ["podman", "crio"] {
        let first = &toml(name)["registry"][0]["mirror"][0];
        assert_eq!(first["location"].as_str(), Some("127.0.0.1:5050/docker.io"));
    }
    let mirrors = &toml("bottlerocket")["settings"]["container-registry"]["mirrors"];
    assert_eq!((mirrors[0]["registry"].as_str(), mirrors[0]["endpoint"][0].as_str()), (Some("*"), Some(mirror)));
    let yaml = |name: &str| serde_yaml_ng::from_str::<serde_yaml_ng::Value>(&document(name)).unwrap();
    for name in ["k3s", "rke2"] {
        assert_eq!(yaml(name)["mirrors"]["*"]["endpoint"][0], mirror);
    }
    assert_eq!(yaml("talos")["machine"]["registries"]["mirrors"]["*"]["endpoints"][0], mirror);
    let gke = yaml("gke");
    assert_eq!(gke["registryHosts"][0]["server"], "docker.io");
    assert_eq!(gke["registryHosts"][0]["hosts"][0]["host"], mirror);
    // containerd understands the cluster's patch, and the mount is at the patched path.
    let kind = yaml("kind");
    let patch: toml::Table = kind["containerdConfigPatches"][0].as_str().unwrap().parse().unwrap();
    let path = &patch["plugins"]["io.containerd.grpc.v1.cri"]["registry"]["config_path"];
    assert_eq!(kind["nodes"][0]["extraMounts"][0]["containerPath"].as_str(), path.as_str());
    for arguments in
        [&["runtime-config", "dockr"][..], &["runtime-config", "docker", "--registry", "ghcr.io"], &["runtime-config"]]
    {
        assert_eq!(output(Command::new(binary()).args(arguments)).status.code(), Some(2));
    }
}
