//! The text of a hosts.toml: dray's block in it, and the errors that containerd finds in the rest.
//!
//! dray's block is enclosed by two comments. The first has a checksum of the block: `strip_block` removes an unchanged
//! block from a file that was edited elsewhere, and does not remove an edited block.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::{Table, Value};
use url::Url;
use xxhash_rust::xxh64::xxh64;

use crate::config::Mirror;

/// The mirrors that containerd tries first, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrors {
    pub hosts: Vec<Mirror>,
    /// The file of the certificate authority of their certificates.
    pub ca: Option<PathBuf>,
}

/// Certificates that containerd finds by their file names if there is no hosts.toml.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Certificates {
    pub authorities: Vec<String>,
    /// Certificate, and key if it is in a separate file.
    pub clients: Vec<(String, Option<String>)>,
}

/// A file after dray's block was removed.
#[derive(Debug, PartialEq, Eq)]
pub struct StrippedFile {
    pub rest: String,
    pub block: String,
    pub state: EditState,
}

/// Whether dray's block was edited after it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EditState {
    AsWritten,
    Edited,
}

/// Why dray's block cannot be inserted into a file.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum UnsupportedFile {
    #[error("it is not valid TOML, so containerd ignores it: {0}")]
    NotToml(String),
    #[error("it already has the mirror {0}")]
    AlreadyThere(String),
    #[error("its hosts are not written as [host.\"URL\"] tables, so a mirror cannot be inserted before them")]
    NoTables,
}

const BEGIN: &str = "# dray> begin ";
const END: &str = "# dray> end\n";

/// Timeout for a connection to the mirror. Longer: pulls are slower while dray is down. Shorter: containerd skips a
/// loaded dray and pulls from the registry.
const DIAL_TIMEOUT: &str = "1s";

impl Mirrors {
    /// One mirror with plain HTTP, or with a certificate of a public authority.
    pub fn one(mirror: Mirror) -> Self {
        Self { hosts: vec![mirror], ca: None }
    }

    /// dray's block, valid for containerd 1.6 and later: it always has a `[host]` table. It never has `skip_verify`,
    /// with which containerd tries TLS first on http. It never has the capability `referrers`, with which containerd
    /// before 2.2 ignores the whole file. containerd before 2.0.7 ignores `dial_timeout`.
    ///
    /// For a `registry`, the block lists its certificates, because next to a hosts.toml containerd does not find
    /// certificates by their file names.
    pub fn block(&self, registry: Option<&str>, certificates: &Certificates) -> String {
        let mut lines = String::new();
        if let Some(registry) = registry.filter(|_| !certificates.is_empty()) {
            let server = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
            let _ = writeln!(lines, "server = {}", quoted(&format!("https://{server}")));
            certificates.write(&mut lines);
        }
        for host in &self.hosts {
            let _ = writeln!(lines, "[host.{}]", quoted(host.as_str()));
            let _ = writeln!(lines, "  capabilities = [\"pull\", \"resolve\"]");
            let _ = writeln!(lines, "  dial_timeout = {}", quoted(DIAL_TIMEOUT));
            if let Some(ca) = self.ca.as_ref().filter(|_| !host.is_plain()) {
                let _ = writeln!(lines, "  ca = {}", quoted(&ca.to_string_lossy()));
            }
        }
        let sum = xxh64(lines.as_bytes(), 0);
        format!("{BEGIN}{sum:016x}: `dray containerd uninstall` removes these lines\n{lines}{END}")
    }
}

impl Certificates {
    pub fn is_empty(&self) -> bool {
        self.authorities.is_empty() && self.clients.is_empty()
    }

    fn write(&self, lines: &mut String) {
        let list = |names: &mut dyn Iterator<Item = String>| names.collect::<Vec<_>>().join(", ");
        if !self.authorities.is_empty() {
            let _ = writeln!(lines, "ca = [{}]", list(&mut self.authorities.iter().map(|name| quoted(name))));
        }
        if !self.clients.is_empty() {
            let pair = |(certificate, key): &(String, Option<String>)| {
                let key = key.as_ref().unwrap_or(certificate);
                format!("[{}, {}]", quoted(certificate), quoted(key))
            };
            let _ = writeln!(lines, "client = [{}]", list(&mut self.clients.iter().map(pair)));
        }
    }
}

/// Inserts dray's block before the first host.
pub fn insert_block(text: &str, block: &str, mirrors: &Mirrors) -> Result<String, UnsupportedFile> {
    let before = parse(text)?;
    let hosts = before.get("host").and_then(Value::as_table);
    if let Some(present) =
        mirrors.hosts.iter().find(|mirror| hosts.is_some_and(|hosts| hosts.contains_key(mirror.as_str())))
    {
        return Err(UnsupportedFile::AlreadyThere(present.to_string()));
    }
    let at = first_table(text);
    let (head, tail) = text.split_at(at);
    let newline = if head.is_empty() || head.ends_with('\n') { "" } else { "\n" };
    let extended = format!("{head}{newline}{block}{tail}");
    // containerd takes the order of hosts from the order of their tables. The rest must keep its meaning, so it is
    // compared.
    let mut after = parse(&extended).map_err(|_| UnsupportedFile::NoTables)?;
    let mut inserted = parse(block)?;
    let is_empty = after.get_mut("host").and_then(Value::as_table_mut).map(|hosts| {
        mirrors.hosts.iter().for_each(|mirror| drop(hosts.remove(mirror.as_str())));
        hosts.is_empty()
    });
    if is_empty == Some(true) && before.get("host").is_none() {
        after.remove("host");
    }
    inserted.remove("host");
    inserted.keys().filter(|key| !before.contains_key(*key)).for_each(|key| drop(after.remove(key)));
    if after == before { Ok(extended) } else { Err(UnsupportedFile::NoTables) }
}

/// Removes dray's block. None: the file does not have it.
pub fn strip_block(text: &str) -> Option<StrippedFile> {
    let start = if text.starts_with(BEGIN) { 0 } else { text.find(&format!("\n{BEGIN}"))? + 1 };
    let block = &text[start..];
    let Some(end) = block.find(END).map(|end| end + END.len()) else {
        let (rest, block) = (text[..start].to_owned(), block.to_owned());
        return Some(StrippedFile { rest, block, state: EditState::Edited });
    };
    let block = &block[..end];
    let (head, lines) = block.split_once('\n')?;
    let lines = lines.strip_suffix(END)?;
    let sum = head.strip_prefix(BEGIN).and_then(|head| head.get(..16));
    let state = match sum.and_then(|sum| u64::from_str_radix(sum, 16).ok()) {
        Some(sum) if sum == xxh64(lines.as_bytes(), 0) => EditState::AsWritten,
        _ => EditState::Edited,
    };
    let rest = format!("{}{}", &text[..start], &text[start + end..]);
    Some(StrippedFile { rest, block: block.to_owned(), state })
}

/// The URLs of the `[host]` tables, in the order in which containerd tries them.
pub fn hosts(text: &str) -> Vec<String> {
    let Ok(table) = text.parse::<Table>() else { return Vec::new() };
    let Some(hosts) = table.get("host").and_then(Value::as_table) else { return Vec::new() };
    let mut found: Vec<_> = hosts.keys().filter_map(|url| Some((table_position(text, url)?, url.clone()))).collect();
    found.sort();
    found.into_iter().map(|(_, url)| url).collect()
}

/// The first certificate authority of a host in a file.
pub fn authority(text: &str, url: &str) -> Option<PathBuf> {
    let table: Table = text.parse().ok()?;
    let ca = table.get("host")?.get(url)?.get("ca")?;
    ca.as_str().or_else(|| ca.get(0)?.as_str()).map(PathBuf::from)
}

/// The errors that containerd finds in a file.
pub fn problems(text: &str) -> Vec<String> {
    let table = match text.parse::<Table>() {
        Ok(table) => table,
        Err(error) => return vec![format!("it is not valid TOML, so containerd ignores it: {}", error.message())],
    };
    let mut problems = Vec::new();
    let hosts = table.get("host");
    match hosts.map(Value::as_table) {
        None => problems.push(
            "it has no [host.\"URL\"] table: containerd 1.6 ignores the file, later versions use the registry directly"
                .into(),
        ),
        Some(None) => {
            problems.push("\"host\" is not a table: expected tables such as [host.\"http://127.0.0.1:5050\"]".into());
        }
        Some(Some(hosts)) => {
            for (url, host) in hosts {
                let Some(host) = host.as_table() else {
                    problems.push(format!("host \"{url}\" is not a table, so containerd ignores the file"));
                    continue;
                };
                if table_position(text, url).is_none() {
                    problems.push(format!(
                        "host \"{url}\" is not written as a separate table, [host.\"{url}\"]: containerd ignores it"
                    ));
                }
                check_host(url, host, &mut problems);
            }
        }
    }
    check_host("server", &table, &mut problems);
    if let Some(server) = table.get("server").and_then(Value::as_str) {
        let host = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        if matches!(host, "docker.io" | "index.docker.io" | "hub.docker.com") {
            problems.push(format!(
                "server \"{server}\" is not a registry: Docker Hub's registry is https://registry-1.docker.io"
            ));
        }
    }
    problems
}

fn check_host(url: &str, host: &Table, problems: &mut Vec<String>) {
    match host.get("capabilities").map(Value::as_array) {
        Some(Some(names)) => {
            for name in names {
                match name.as_str().map(str::to_lowercase).as_deref() {
                    Some("pull" | "resolve" | "push") => {}
                    Some("referrers") => problems.push(format!(
                        "\"{url}\" has the capability \"referrers\": containerd before 2.2 ignores the whole file"
                    )),
                    _ => problems
                        .push(format!("\"{url}\" has the unknown capability {name}: containerd ignores the file")),
                }
            }
        }
        Some(None) => problems.push(format!("capabilities of \"{url}\" is not a list: containerd ignores the file")),
        None => {}
    }
    if let Some(timeout) = host.get("dial_timeout")
        && !timeout.as_str().is_some_and(is_duration)
    {
        problems.push(format!(
            "dial_timeout = {timeout} of \"{url}\" is not a duration such as \"1s\": containerd ignores the file"
        ));
    }
    let plain = Url::parse(url).ok().filter(|url| url.scheme() == "http" && url.port_or_known_default() != Some(80));
    let tls: Vec<_> = ["skip_verify", "ca", "client"].into_iter().filter(|key| host.contains_key(*key)).collect();
    if plain.is_some() && !tls.is_empty() {
        problems.push(format!("\"{url}\" uses http, but has {}: containerd tries https first", tls.join(", ")));
    }
    let path = Url::parse(url).map(|url| url.path().to_owned()).unwrap_or_default();
    let overrides = host.get("override_path").and_then(Value::as_bool) == Some(true);
    if !matches!(path.as_str(), "" | "/") && !overrides && !path.trim_end_matches('/').ends_with("/v2") {
        problems.push(format!("\"{url}\" has a path without override_path: containerd appends /v2 to it"));
    }
}

/// Whether Go parses the text as a duration, such as "1m30s", "1.5s" or "200ms".
fn is_duration(text: &str) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        if number.len() == rest.len() {
            return false;
        }
        let units = ["ns", "us", "µs", "ms", "s", "m", "h"];
        let Some(after) = units.iter().find_map(|unit| number.strip_prefix(unit)) else { return false };
        rest = after;
    }
    !text.is_empty()
}

/// The offset of the table of a host.
fn table_position(text: &str, url: &str) -> Option<usize> {
    let is_of_host = |header: &str| {
        let table = header.parse::<Table>().ok()?;
        table.get("host")?.get(url).map(drop)
    };
    headers(text).find(|(_, header)| is_of_host(header).is_some()).map(|(at, _)| at)
}

/// The offset of the first table. The keys before it are settings of the upstream registry.
fn first_table(text: &str) -> usize {
    headers(text).next().map_or(text.len(), |(at, _)| at)
}

/// The header lines of tables, with their offsets.
fn headers(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    let lines = text.split_inclusive('\n').map(move |line| {
        let start = at;
        at += line.len();
        (start, line)
    });
    // A bracket within a string or an array is not a header: the text before it is not valid TOML.
    lines
        .filter(|(start, line)| line.trim_start().starts_with('[') && text[..*start].parse::<Table>().is_ok())
        .map(|(start, line)| (start, line.trim_start()))
}

fn parse(text: &str) -> Result<Table, UnsupportedFile> {
    text.parse().map_err(|error: toml::de::Error| UnsupportedFile::NotToml(error.message().to_owned()))
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The registry of a directory. None: `_default`, for all registries without a directory of their own.
pub fn registry_of(dir: &Path) -> Option<String> {
    let name = dir.file_name()?.to_str()?;
    if name == "_default" {
        return None;
    }
    // containerd also accepts host_port_ for host:port, because some file systems do not allow a colon in names.
    let port = name.strip_suffix('_').and_then(|name| name.rsplit_once('_'));
    Some(match port {
        Some((host, port)) if port.parse::<u16>().is_ok() => format!("{host}:{port}"),
        _ => name.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors() -> Mirrors {
        Mirrors::one("http://127.0.0.1:5050".parse().unwrap())
    }

    fn block() -> String {
        mirrors().block(None, &Certificates::default())
    }

    #[test]
    fn block_is_inserted_before_hosts_and_stripped_again() {
        for text in [
            "",
            "# only a comment\n",
            "server = \"https://x\"\n",
            "server = \"https://x\"\n\n[host.\"https://a\"]\n  capabilities = [\"pull\"]\n",
            "server = \"https://x\"\nnote = \"\"\"\n[host.\"fake\"]\n\"\"\"\n[host.\"https://a\"]\n[host.\"https://a\".header]\n  x = \"y\"\n",
            "ca = [\n  \"a\",\n]\n\n  [host.'https://a']\r\n",
            "[header]\n  x = [\"1\"]\n[host.\"https://b\"]",
        ] {
            let extended = insert_block(text, &block(), &mirrors()).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(hosts(&extended)[0], "http://127.0.0.1:5050", "{extended}");
            let stripped = strip_block(&extended).unwrap();
            assert_eq!((stripped.rest.as_str(), stripped.state), (text, EditState::AsWritten));
            assert_eq!(stripped.block, block());
        }
        // A missing newline at the end is added, and not removed.
        let extended = insert_block("server = \"https://x\"", &block(), &mirrors()).unwrap();
        assert_eq!(strip_block(&extended).unwrap().rest, "server = \"https://x\"\n");
        assert_eq!(strip_block("[host.\"http://127.0.0.1:5050\"]\n"), None);
    }

    #[test]
    fn unsupported_file_is_refused_with_the_reason() {
        let error = |text: &str| insert_block(text, &block(), &mirrors()).unwrap_err();
        assert!(matches!(error("server = "), UnsupportedFile::NotToml(_)));
        assert_eq!(error("host = { \"https://a\" = {} }"), UnsupportedFile::NoTables);
        assert_eq!(
            error("[host.\"http://127.0.0.1:5050\"]"),
            UnsupportedFile::AlreadyThere("http://127.0.0.1:5050".into())
        );
    }

    #[test]
    fn edited_block_is_detected() {
        let edited = block().replace("1s", "9s");
        assert_eq!(strip_block(&edited).unwrap().state, EditState::Edited);
        assert_eq!(strip_block(&block().replace(END, "")).unwrap().state, EditState::Edited);
        let added = format!("# mine\n{}[host.\"https://b\"]\n", block());
        let stripped = strip_block(&added).unwrap();
        assert_eq!((stripped.state, stripped.rest.as_str()), (EditState::AsWritten, "# mine\n[host.\"https://b\"]\n"));
    }

    #[test]
    fn block_lists_certificates_of_registry() {
        let certificates = Certificates {
            authorities: vec!["ca.crt".into()],
            clients: vec![("a.cert".into(), Some("a.key".into())), ("b.cert".into(), None)],
        };
        let block = mirrors().block(Some("reg.corp:5000"), &certificates);
        let table: Table = block.parse().unwrap();
        assert_eq!(table["server"].as_str(), Some("https://reg.corp:5000"));
        assert_eq!(table["ca"].as_array().unwrap().len(), 1);
        assert_eq!(table["client"][0][1].as_str(), Some("a.key"));
        assert_eq!(insert_block("", &block, &mirrors()).unwrap(), block);
        let authority = Mirrors { hosts: vec!["https://dray:5050".parse().unwrap()], ca: Some("/etc/ca.crt".into()) };
        assert!(authority.block(None, &Certificates::default()).contains("ca = \"/etc/ca.crt\""));
    }

    #[test]
    fn problems_of_hosts_file_are_reported() {
        assert_eq!(problems(&block()), Vec::<String>::new());
        for (text, want) in [
            ("server = ", "not valid TOML"),
            ("server = \"https://x\"", "no [host"),
            ("[host.\"http://a:5000\"]\nskip_verify = true", "tries https"),
            ("[host.\"https://a\"]\ncapabilities = [\"pull\", \"referrers\"]", "before 2.2"),
            ("[host.\"https://a\"]\ncapabilities = [\"fetch\"]", "fetch"),
            ("[host.\"https://a\"]\ncapabilities = \"pull\"", "not a list"),
            ("[host.\"https://a\"]\ndial_timeout = \"1\"", "dial_timeout"),
            ("[host.\"https://a/v2/docker.io\"]", "override_path"),
            ("host = { \"https://a\" = {} }", "separate table"),
            ("server = \"https://docker.io\"\n[host.\"https://a\"]", "registry-1"),
            ("host = 1", "tables such as"),
        ] {
            let problems = problems(text);
            assert!(problems.iter().any(|problem| problem.contains(want)), "{text}: {problems:?}");
        }
        assert!(problems("[host.\"https://a/v2/docker.io\"]\noverride_path = true").is_empty());
        assert!(problems("[host.\"http://a\"]\nskip_verify = true").is_empty(), "port 80 is plain");
    }

    #[test]
    fn directory_name_gives_the_registry() {
        for (name, registry) in
            [("docker.io", "docker.io"), ("reg.corp:5000", "reg.corp:5000"), ("reg.corp_5000_", "reg.corp:5000")]
        {
            assert_eq!(registry_of(Path::new(name)).as_deref(), Some(registry));
        }
        assert_eq!(registry_of(Path::new("_default")), None);
    }
}
