//! The command line, as scripts and people use it.

use std::process::Command;

use dray_tests::dray::{Start, binary};
use dray_tests::eventually;
use dray_tests::http::get;
use dray_tests::process::{free_port, output};
use rustix::process::Signal;

fn check(text: &str) -> (i32, String) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dray.toml");
    std::fs::write(&file, text).unwrap();
    let output = output(Command::new(binary()).arg("check-config").arg(&file));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), said)
}

#[test]
fn check_config_says_what_is_wrong() {
    assert_eq!(check("").0, 0);
    assert_eq!(check(include_str!("../../../config/dray.toml")).0, 0);
    let (code, said) = check("[cache]\nsize = \"20GiB\"");
    assert_eq!(code, 2);
    for part in ["dray.toml", "line 2", "size"] {
        assert!(said.contains(part), "{said}");
    }
}

/// What is refused at the start can be found out before.
#[test]
fn check_config_here_looks_at_what_the_file_names() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("dray.toml"), dir.path().join("key"));
    let check = |text: &str, here: &[&str]| {
        std::fs::write(&file, text).unwrap();
        let output = output(Command::new(binary()).arg("check-config").args(here).arg(&file));
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let peers = |member: &str| {
        let key = key.display();
        format!("[peers]\nlisten = \"0.0.0.0:5052\"\nstatic = [\"{member}\"]\nkey_file = \"{key}\"\n")
    };
    for (text, want) in [
        ("[tls]\ncert = \"/nowhere.crt\"\nkey = \"/nowhere.key\"\n".to_owned(), "/nowhere.crt"),
        ("[access]\nlogins_file = \"/nowhere\"\n".to_owned(), "/nowhere"),
        ("[containerd]\nhosts_dir = \"/nowhere\"\n".to_owned(), "containerd.hosts_dir"),
        ("[tls]\nca = \"/nowhere.pem\"\n".to_owned(), "tls.ca = \"/nowhere.pem\""),
        (
            "[[registry]]\nmatch = \"a.io\"\ncredentials = { username = \"u\", password_env = \"DRAY_UNSET\" }\n"
                .to_owned(),
            "dray.toml:3: registry.credentials: the variable DRAY_UNSET",
        ),
        (peers("127.0.0.1:5052"), "key"),
    ] {
        assert_eq!(check(&text, &[]).0, 0, "{text}");
        let (code, said) = check(&text, &["--here"]);
        assert_eq!(code, 2, "{text}");
        assert!(said.contains(want) && said.contains("dray.toml"), "{said}");
    }
    std::fs::write(&key, "sixteen characters or more").unwrap();
    assert_eq!(check(&peers("127.0.0.1:5052"), &["--here"]), (0, String::new()));
    let (code, said) = check(&peers("192.0.2.1:5052"), &["--here"]);
    assert!(code == 2 && said.contains("peers.static"), "{said}");
}

/// A key may come by a variable, which is known where dray is to run.
#[test]
fn check_config_tells_what_the_start_would_refuse() {
    let dir = tempfile::tempdir().unwrap();
    let (file, key) = (dir.path().join("dray.toml"), dir.path().join("key"));
    let rule = "[[registry]]\nmatch = \"reg.corp\"\naccess = \"client\"\n";
    std::fs::write(&file, format!("{rule}[peers]\nlisten = \"127.0.0.1:5052\"\nservice = \"dray.svc\"\n")).unwrap();
    std::fs::write(&key, "sixteen characters or more").unwrap();
    let why = "dray.toml:3: registry.access";
    let anywhere = output(Command::new(binary()).arg("check-config").arg(&file));
    let said = String::from_utf8_lossy(&anywhere.stdout);
    assert!(anywhere.status.success() && said.contains("note: ") && said.contains(why), "{said}");
    let mut here = Command::new(binary());
    here.args(["check-config", "--here"]).arg(&file);
    for refused in [output(&mut here), output(Command::new(binary()).arg("--config").arg(&file))] {
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(2) && said.contains(why), "{said}");
    }
    assert!(output(here.env("DRAY_PEERS_KEY_FILE", &key)).status.success());
}

#[test]
fn every_example_is_valid() {
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
fn a_wrong_configuration_opens_no_port() {
    for (config, code, want) in [
        ("[cache]\ndisk = \"20GB\"\n", 2, "GiB"),
        ("[[registry]]\nmatch = \"a.io\"\nca = \"/nowhere.pem\"\n", 2, "/nowhere.pem"),
        ("[tls]\ncert = \"/nowhere.crt\"\nkey = \"/nowhere.key\"\n", 2, "/nowhere.crt"),
    ] {
        let output = output(&mut Start::new(config).command());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(want), "{said}");
        assert!(output.stdout.is_empty());
    }
    let wrong_log = output(Start::new("").command().env("DRAY_LOG", "warning"));
    assert_eq!(wrong_log.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_log.stderr).contains("warn,access=info"));
    let alone = output(Command::new(binary()).args(["--zone", "a"]));
    let said = String::from_utf8_lossy(&alone.stderr);
    assert!(alone.status.code() == Some(2) && said.contains("--zone") && said.contains("--peers-service"), "{said}");
    let wrong_port = output(Command::new(binary()).args(["--listen", "5050"]));
    assert_eq!(wrong_port.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_port.stderr).contains("write IP:PORT"));
    let wrong_flag = output(Command::new(binary()).args(["--cache-disk", "20GB"]));
    assert_eq!(wrong_flag.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong_flag.stderr).contains("GiB"));
}

/// Who guards the registry port may think that it guards the other one as well.
#[tokio::test(flavor = "multi_thread")]
async fn peers_that_prove_nothing_are_told_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("key");
    std::fs::write(&key, "sixteen characters or more").unwrap();
    let peers = || {
        let address = format!("127.0.0.1:{}", free_port());
        format!("[peers]\nlisten = \"{address}\"\nstatic = [\"{address}\"]\n")
    };
    let clients = "[access]\nclients = [\"127.0.0.0/8\"]\n";
    for (nth, (config, says)) in [
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
        assert_eq!(text.lines().filter(|line| line.contains("WARN")).count(), says.len(), "{text}");
        assert!(says.iter().all(|says| text.contains(says)), "{text}");
    }
}

/// A dray that is told to read its configuration again is not one that is told to go.
#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut dray = Start::new("").env("DRAY_LOG", "warn").log_to(&log).run();
    dray.process().signal(Signal::HUP);
    eventually("it says so", async || {
        std::fs::read_to_string(&log).unwrap().contains("SIGHUP is ignored").then_some(())
    })
    .await;
    assert_eq!(dray.get("/v2/").await.status, 200);
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
async fn a_taken_port_or_directory_is_named() {
    let first = Start::new("").run();
    let second = Start::new("");
    let dir = output(&mut second.clone().cache(first.start().cache_dir()).command());
    let said = String::from_utf8_lossy(&dir.stderr);
    assert_eq!(dir.status.code(), Some(1));
    assert!(said.contains("in use by another dray") && said.contains("--cache-dir"), "{said}");
    let mut command = Command::new(binary());
    command.args(["--admin", "127.0.0.1:0", "--listen", &first.registry.to_string(), "--cache-dir"]);
    let port = output(command.arg(second.cache_dir()));
    let said = String::from_utf8_lossy(&port.stderr);
    assert_eq!(port.status.code(), Some(1), "{said}");
    assert!(said.contains(&first.registry.to_string()) && said.contains("choose another address or port"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_and_metrics() {
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
async fn one_line_a_request_in_json() {
    let start = Start::new("").env("DRAY_LOG", "info").env("DRAY_LOG_FORMAT", "json");
    let log = start.dir().join("log");
    let mut dray = start.log_to(&log).run();
    let answer = dray.get("/v2/library/app/manifests/x?ns=localhost").await;
    assert_eq!(answer.status, 403);
    // Written once the answer is out.
    let text = eventually("the request is logged", async || {
        std::fs::read_to_string(&log).ok().filter(|text| text.contains("\"access\"") && text.ends_with('\n'))
    })
    .await;
    dray.process().kill();
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let requests: Vec<_> = lines.iter().filter(|line| line["target"] == "access").collect();
    assert_eq!(requests.len(), 1);
    let line = requests[0];
    assert_eq!(line["id"], answer.header("x-request-id").unwrap());
    assert_eq!((&line["route"], &line["rule"], &line["status"]), (&"manifest".into(), &"*".into(), &403.into()));
    assert_eq!((&line["registry"], &line["source"]), (&"localhost".into(), &"none".into()));
    assert!(line["first_byte_ms"].is_number() && line["bytes"].is_number());
}

/// What is printed can be redirected into a file: it is that file, and a parser of its kind reads it.
#[test]
fn runtime_prints_the_file_and_says_where_it_goes() {
    let document = |name: &str| {
        let output = output(Command::new(binary()).args(["runtime", name]));
        assert!(output.status.success(), "{name}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.lines().all(|line| line.starts_with("# ")) && said.len() > 20, "{said}");
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
    // The cluster's patch is what containerd understands, and the mount is where it looks.
    let kind = yaml("kind");
    let patch: toml::Table = kind["containerdConfigPatches"][0].as_str().unwrap().parse().unwrap();
    let path = &patch["plugins"]["io.containerd.grpc.v1.cri"]["registry"]["config_path"];
    assert_eq!(kind["nodes"][0]["extraMounts"][0]["containerPath"].as_str(), path.as_str());
    for arguments in [&["runtime", "dockr"][..], &["runtime", "docker", "--registry", "ghcr.io"], &["runtime"]] {
        assert_eq!(output(Command::new(binary()).args(arguments)).status.code(), Some(2));
    }
}
