use super::*;

fn problem(text: &str) -> String {
    Config::parse(text, "dray.toml").unwrap_err().to_string()
}

/// The sample with its examples switched on.
fn uncommented(sample: &str) -> String {
    sample.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n").collect()
}

#[test]
fn sample_shows_every_default() {
    let sample = include_str!("../../../config/dray.toml");
    assert_eq!(Config::parse(sample, "config/dray.toml").unwrap(), Config::default());
    // Optional keys stand there as comments: uncommented, the file must still be understood.
    let uncommented = uncommented(sample);
    let full = Config::parse(&uncommented, "config/dray.toml").unwrap();
    assert_eq!(full.registry.len(), 1);
    assert!(full.peers.listen.is_some() && full.tls.client_ca.is_some());
}

#[test]
fn unknown_key_in_any_table_is_an_error() {
    let sample = include_str!("../../../config/dray.toml");
    let uncommented = uncommented(sample);
    let tables = uncommented.lines().filter(|l| l.starts_with('[')).count();
    assert!(tables >= 7, "the sample shows every table");
    for nth in 0..=tables {
        let mut seen = 0;
        let mut text = if nth == 0 { "bogus = 1\n".to_owned() } else { String::new() };
        for line in uncommented.lines() {
            text += &format!("{line}\n");
            if line.starts_with('[') {
                seen += 1;
                if seen == nth {
                    text += "bogus = 1\n";
                }
            }
        }
        let line = text.lines().position(|l| l == "bogus = 1").unwrap() + 1;
        let message = problem(&text);
        assert!(message.contains("bogus") && message.contains(&format!("line {line}")), "{message}");
    }
}

#[test]
fn error_names_file_line_and_key() {
    for (text, wants) in [
        ("[cache]\ndisk = \"20GB\"", &["dray.toml", "line 2", "disk", "GiB"][..]),
        ("[cache]\nmemory = 5", &["line 2", "memory"]),
        ("[[registry]]\nmatch = \"a.io\"\ntag_ttl = \"5\"", &["line 3", "tag_ttl"]),
        ("[[registry]]\nmatch = \"a.io\"\nupstreams = [\"ftp://x\"]", &["line 3", "http"]),
        (
            "[[registry]]\nmatch = \"a.io\"\nupstreams = [\"https://x/y\"]",
            &["dray.toml:3", "registry.upstreams", "{repo}"],
        ),
        ("[[registry]]\nmatch = \"a.io/b\"\nupstreams = [\"https://x/{rest}\"]", &["dray.toml:3", "{rest}", "a.io/b"]),
        ("[[registry]]\nmatch = \"a.io/b\"\nalias = [\"c\"]", &["dray.toml:3", "registry.alias"]),
        ("[[registry]]\nmatch = \"a.io\"\n[[registry]]\nmatch = \"a.io/b/*\"", &["dray.toml:4", "never reached"]),
        ("[[registry]]\nmatch = \"a.io\"\nimmutable_tags = [\"(\"]", &["line 3", "immutable_tags"]),
        ("[[registry]]\nmatch = \"a.io\"\ntags = [{ match = \"(\", ttl = \"1s\" }]", &["line 3", "match"]),
        ("[[registry]]\nmatch = \"a.io\"\ntags = [{ match = \"x\" }]", &["line 3", "ttl"]),
        ("[[registry]]\nmatch = \"a b\"", &["line 2", "match"]),
        ("[[registry]]\nupstreams = []", &["match"]),
        (
            "[[registry]]\nmatch = \"docker.io\"\n[[registry]]\nmatch = \"registry-1.docker.io\"",
            &["dray.toml:4", "\"docker.io\" of line 1 matches first", "match = \"registry-1.docker.io\""],
        ),
        (
            "[[registry]]\nmatch = \"a.io\"\n[[registry]]\nmatch = \"a.io\"",
            &["dray.toml:4", "registry.match", "a.io", "of line 1"],
        ),
        ("[[registry]]\nmatch = \"*\"\n[[registry]]\nmatch = \"b.io\"", &["dray.toml:4", "never reached"]),
        (
            "[[registry]]\nmatch = \"*.io\"\ncredentials = { username = \"u\", password_env = \"P\" }",
            &["dray.toml:3", "credentials"],
        ),
        ("[[registry]]\nmatch = \"a.io\"\ncredentials = { username = \"u\" }", &["line 3", "password"]),
        (
            "[[registry]]\nmatch = \"*.io\"\nclient_cert = { cert = \"c\", key = \"k\" }",
            &["dray.toml:3", "registry.client_cert", "set upstreams"],
        ),
        ("[[registry]]\nmatch = \"a.io\"\nclient_cert = { cert = \"c\" }", &["line 3", "key"]),
        ("[[registry]]\nmatch = \"a.io\"\nauthorization = \"public\"", &["line 3", "shared", "passthrough"]),
        (
            "[[registry]]\nmatch = \"a.io\"\nauthorization = \"passthrough\"\ncredentials = { helper = \"x\" }",
            &["dray.toml:4", "registry.credentials", "its own"],
        ),
        (
            "[[registry]]\nmatch = \"a.io\"\nauthorization = \"passthrough\"\nupstreams = [\"https://a\", \"https://b\"]",
            &["dray.toml:4", "registry.upstreams"],
        ),
        (
            "[access]\nusers_file = \"l\"\n[[registry]]\nmatch = \"a.io\"\nauthorization = \"passthrough\"",
            &["dray.toml:5", "registry.authorization", "users_file"],
        ),
        ("[[registry]]\nmatch = \"a.io\"\nalias = [\"x.y\"]", &["dray.toml:3", "registry.alias"]),
        ("# [cache]\n[cache]\ndisk = \"1MiB\"", &["dray.toml:3", "cache.disk", "64MiB", "disk = \"1MiB\""]),
        ("[tls]\ncert = \"c\"", &["dray.toml:1", "tls"]),
        ("admin = \"0.0.0.0:5050\"", &["dray.toml:1", "listen and admin", "its own"]),
        ("[peers]\nlisten = \"0.0.0.0:5051\"\nservice = \"a.b\"", &["admin and peers.listen"]),
        ("listen = \"x\"", &["line 1", "listen"]),
        ("admin = \"localhost:5051\"", &["line 1", "\"localhost:5051\" is not a valid address", "IP:PORT"]),
        ("[dns]\nservers = [\"10.96.0.10\"]", &["line 2", "\"10.96.0.10\"", "IP:PORT"]),
        ("[peers]\nlisten = \"5052\"", &["line 2", "IP:PORT"]),
        ("[peers]\nstatic = { a = [\"node1:5052\"] }", &["line 2", "\"node1:5052\"", "IP:PORT", "peers.service"]),
        ("[peers]\nservice = [\"dray.svc:5052\"]", &["line 2", "\"dray.svc:5052\"", "without a port", "peers.listen"]),
        ("[egress]\nallow_cidrs = [\"10.0.0.1\"]", &["line 2", "write a network, \"10.0.0.1/32\""]),
        ("[access]\nallowed_cidrs = [\"fd00::1\"]", &["line 2", "write a network, \"fd00::1/128\""]),
        ("[access]\nallowed_cidrs = [\"corp\"]", &["line 2", "\"corp\" is not a valid network", "10.0.0.0/8"]),
        ("[[registry]]\nmatch = \"a.io\"\ntag_ttl = 60", &["line 3", "60 has no unit", "\"60s\""]),
        ("[cache]\ndisk = 20000000000", &["line 2", "20000000000 has no unit", "\"20GiB\""]),
        ("[cache]\ndisk = true", &["line 2", "boolean", "\"20GiB\""]),
        ("[registry]\nmatch = \"a.io\"", &["line 1", "[[registry]]"]),
        ("[[registry]]\nmatch = \"a.io\"\nupstreams = \"http://x\"", &["line 3", "write a list: [\"http://x\"]"]),
        ("[[registry]]\nmatch = \"a.io\"\nimmutable_tags = \"v1\"", &["line 3", "write a list: [\"v1\"]"]),
        ("[[pin]]\nimages = \"alpine\"", &["line 2", "write a list: [\"alpine\"]"]),
        ("version = 2", &["line 1", "version", "newer dray"]),
        ("[containerd]\nmirror = \"http://a\"", &["dray.toml:2", "containerd.mirror", "hosts_dir"]),
        ("[containerd]\nhosts_dir = \"/a\"\nmirror = \"a:1\"", &["line 3", "http://host:port"]),
        ("[tracing]\nsample = 0.5", &["dray.toml:2", "tracing.sample", "tracing.otlp"]),
        ("[tracing]\nsample = 2.0", &["line 2", "from 0.0 to 1.0"]),
        ("[tracing]\notlp = \"http://c:4317\"", &["line 2", "gRPC", "4318"]),
        ("[tracing]\notlp = \"localhost:4318\"", &["line 2", "http://HOST:4318"]),
        (
            "[peers]\nkey_file = \"k\"",
            &["dray.toml:2", "peers.key_file", "--peers-key-file", "peers.listen", "--peers-service"],
        ),
        ("[peers]\nzones = \"ignore\"", &["dray.toml:2", "peers.zones", "peers.listen"]),
        ("[peers]\nlisten = \"0.0.0.0:1\"\nservice = \"a.b\"\nzone = \"a\"", &["dray.toml:4", "peers.zone"]),
        (
            "[peers]\nlisten = \"0.0.0.0:1\"\nkey_file = \"k\"\nmtls = { cert = \"c\", key = \"k\", ca = \"a\" }",
            &["dray.toml:3", "peers.key_file", "mtls"],
        ),
        ("[peers]\nmtls = { cert = \"c\" }", &["line 2", "key"]),
        ("listen = \"127.0.0.1:1\"\nlisten = \"127.0.0.1:2\"", &["line 2", "listen"]),
    ] {
        let message = problem(text);
        for want in wants {
            assert!(message.contains(want), "{text}\n-> {message}\nlacks {want}");
        }
    }
}

#[test]
fn start_error_is_located() {
    let peers = "[[registry]]\nmatch = \"reg.corp\"\nauthorization = \"passthrough\"\n[peers]\nlisten = \"0.0.0.0:1\"\nservice = \"a.b\"\n";
    let text = SourceText::new(peers, "dray.toml");
    let mut config = text.parse().unwrap();
    let message = text.locate(config.check_together().unwrap_err()).to_string();
    for want in ["dray.toml:3: registry.authorization", "reg.corp", "peers.key_file", "--peers-key-file", "peers.mtls"]
    {
        assert!(message.contains(want), "{message}");
    }
    config.peers.key_file = Some("key".into());
    assert_eq!(config.check_together(), Ok(()));
}

#[test]
fn hash_is_equal_on_nodes_of_a_cluster() {
    let hash = |text: &str| Config::parse(text, "x").unwrap().hash();
    let one =
        hash("listen = \"10.0.0.1:5050\"\n[peers]\nlisten = \"10.0.0.1:1\"\nservice = { a = \"x\" }\nzone = \"a\"");
    let other =
        hash("listen = \"10.0.0.2:5050\"\n[peers]\nlisten = \"10.0.0.2:1\"\nservice = { a = \"x\" }\nzone = \"b\"");
    assert_eq!(one, other);
    let rule = "[[registry]]\nmatch = \"a.io\"";
    assert_eq!(hash(rule), hash(&format!("# A comment.\n{rule}\ndeny = false")));
    assert_ne!(hash(rule), hash(&format!("{rule}\ndeny = true")));
    assert_ne!(one, hash("[peers]\nlisten = \"10.0.0.1:1\"\nservice = { a = \"y\" }\nzone = \"a\""));
}

#[test]
fn private_registry_needs_two_keys() {
    let text = "[[registry]]\nmatch = \"reg.corp\"\nupstreams = [\"http://10.0.0.1:5000\"]";
    let config = Config::parse(text, "x").unwrap();
    assert_eq!(config.registry.len(), 1);
}
