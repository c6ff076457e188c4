//! The text of a hosts.toml: dray's lines in it, and what containerd makes of the rest.
//!
//! dray's lines stand between two comments, the first of which has a checksum: so they can be taken out of a
//! file that a person has edited since, and are left where a person has edited them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use toml::{Table, Value};
use url::Url;
use xxhash_rust::xxh64::xxh64;

use crate::config::Mirror;

/// The mirrors that come before everything else, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrors {
    pub hosts: Vec<Mirror>,
    /// The authority that signed their certificates.
    pub ca: Option<PathBuf>,
}

/// Files by which containerd knows a registry where there is no hosts.toml.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Certificates {
    pub authorities: Vec<String>,
    /// Certificate and, if it is a file of its own, key.
    pub clients: Vec<(String, Option<String>)>,
}

/// A file with dray's lines taken out.
#[derive(Debug, PartialEq, Eq)]
pub struct StrippedFile {
    pub rest: String,
    pub block: String,
    pub state: EditState,
}

/// Whether a person has edited dray's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EditState {
    AsWritten,
    Edited,
}

/// Why dray's lines cannot be put into a file.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum UnsupportedFile {
    #[error("it is not valid TOML, so containerd ignores it: {0}")]
    NotToml(String),
    #[error("it sends containerd to {0} already")]
    AlreadyThere(String),
    #[error("its hosts are not written as [host.\"URL\"] tables, so no other can be put before them")]
    NoTables,
}

const BEGIN: &str = "# dray> begin ";
const END: &str = "# dray> end\n";

/// Longer waits for a mirror that does not answer are of no use: the registry is asked then.
const DIAL_TIMEOUT: &str = "1s";

impl Mirrors {
    /// One, by plain HTTP or with a certificate that everybody trusts.
    pub fn one(mirror: Mirror) -> Self {
        Self { hosts: vec![mirror], ca: None }
    }

    /// dray's lines. What every containerd since 1.6 understands: a `[host]` table always, `skip_verify` never
    /// (on http it makes containerd try TLS first), `referrers` never (before 2.2 it voids the file).
    /// `dial_timeout` is ignored before 2.0.7.
    ///
    /// With `registry` the certificates that containerd found by their names are named, since it no longer
    /// looks for them beside a hosts.toml.
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
        format!("{BEGIN}{sum:016x}: `dray containerd uninstall` takes these lines out again\n{lines}{END}")
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

/// A file with dray's lines before the first of its hosts.
pub fn with(text: &str, block: &str, mirrors: &Mirrors) -> Result<String, UnsupportedFile> {
    let before = parse(text)?;
    let hosts = before.get("host").and_then(Value::as_table);
    if let Some(there) =
        mirrors.hosts.iter().find(|mirror| hosts.is_some_and(|hosts| hosts.contains_key(mirror.as_str())))
    {
        return Err(UnsupportedFile::AlreadyThere(there.to_string()));
    }
    let at = first_table(text);
    let (head, tail) = text.split_at(at);
    let newline = if head.is_empty() || head.ends_with('\n') { "" } else { "\n" };
    let extended = format!("{head}{newline}{block}{tail}");
    // containerd takes the order of hosts from their tables, and what stood there must still mean the same.
    let mut after = parse(&extended).map_err(|_| UnsupportedFile::NoTables)?;
    let mut ours = parse(block)?;
    let taken = after.get_mut("host").and_then(Value::as_table_mut).map(|hosts| {
        mirrors.hosts.iter().for_each(|mirror| drop(hosts.remove(mirror.as_str())));
        hosts.is_empty()
    });
    if taken == Some(true) && before.get("host").is_none() {
        after.remove("host");
    }
    ours.remove("host");
    ours.keys().filter(|key| !before.contains_key(*key)).for_each(|key| drop(after.remove(key)));
    if after == before { Ok(extended) } else { Err(UnsupportedFile::NoTables) }
}

/// A file without dray's lines. None: it has none.
pub fn without(text: &str) -> Option<StrippedFile> {
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

/// The URLs that a file names, in the order of their tables, and the registry that comes last if it names one.
pub fn hosts(text: &str) -> Vec<String> {
    let Ok(table) = text.parse::<Table>() else { return Vec::new() };
    let Some(hosts) = table.get("host").and_then(Value::as_table) else { return Vec::new() };
    let mut found: Vec<_> = hosts.keys().filter_map(|url| Some((table_of(text, url)?, url.clone()))).collect();
    found.sort();
    found.into_iter().map(|(_, url)| url).collect()
}

/// The first authority that a file names for a host.
pub fn authority(text: &str, url: &str) -> Option<PathBuf> {
    let table: Table = text.parse().ok()?;
    let ca = table.get("host")?.get(url)?.get("ca")?;
    ca.as_str().or_else(|| ca.get(0)?.as_str()).map(PathBuf::from)
}

/// What is wrong with a file, as containerd reads it.
pub fn problems(text: &str) -> Vec<String> {
    let table = match text.parse::<Table>() {
        Ok(table) => table,
        Err(error) => return vec![format!("it is not valid TOML, so containerd ignores it: {}", error.message())],
    };
    let mut problems = Vec::new();
    let hosts = table.get("host");
    match hosts.map(Value::as_table) {
        None => problems.push(
            "it has no [host.\"URL\"] table: containerd 1.6 ignores it, later ones go to the registry itself".into(),
        ),
        Some(None) => problems.push("\"host\" has to be tables such as [host.\"http://127.0.0.1:5050\"]".into()),
        Some(Some(hosts)) => {
            for (url, host) in hosts {
                let Some(host) = host.as_table() else {
                    problems.push(format!("host \"{url}\" is not a table, so containerd ignores the file"));
                    continue;
                };
                if table_of(text, url).is_none() {
                    problems.push(format!(
                        "host \"{url}\" is not written as a table of its own, [host.\"{url}\"]: containerd ignores it"
                    ));
                }
                of_host(url, host, &mut problems);
            }
        }
    }
    of_host("server", &table, &mut problems);
    if let Some(server) = table.get("server").and_then(Value::as_str) {
        let host = server.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        if matches!(host, "docker.io" | "index.docker.io" | "hub.docker.com") {
            problems.push(format!("server \"{server}\" is no registry: Docker Hub's is https://registry-1.docker.io"));
        }
    }
    problems
}

fn of_host(url: &str, host: &Table, problems: &mut Vec<String>) {
    match host.get("capabilities").map(Value::as_array) {
        Some(Some(names)) => {
            for name in names {
                match name.as_str().map(str::to_lowercase).as_deref() {
                    Some("pull" | "resolve" | "push") => {}
                    Some("referrers") => problems.push(format!(
                        "\"{url}\" has the capability \"referrers\": containerd before 2.2 ignores the whole file"
                    )),
                    _ => problems.push(format!("\"{url}\" has the capability {name}: containerd ignores the file")),
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
            "dial_timeout = {timeout} of \"{url}\" is no duration such as \"1s\": containerd ignores the file"
        ));
    }
    let plain = Url::parse(url).ok().filter(|url| url.scheme() == "http" && url.port_or_known_default() != Some(80));
    let tls: Vec<_> = ["skip_verify", "ca", "client"].into_iter().filter(|key| host.contains_key(*key)).collect();
    if plain.is_some() && !tls.is_empty() {
        problems.push(format!("\"{url}\" is http, but has {}: containerd tries https there first", tls.join(", ")));
    }
    let path = Url::parse(url).map(|url| url.path().to_owned()).unwrap_or_default();
    let overrides = host.get("override_path").and_then(Value::as_bool) == Some(true);
    if !matches!(path.as_str(), "" | "/") && !overrides && !path.trim_end_matches('/').ends_with("/v2") {
        problems.push(format!("\"{url}\" has a path without override_path: containerd puts /v2 after it"));
    }
}

/// As Go writes them: "1m30s", "1.5s", "200ms".
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

/// Where the table of a host begins.
fn table_of(text: &str, url: &str) -> Option<usize> {
    let is_its = |header: &str| {
        let table = header.parse::<Table>().ok()?;
        table.get("host")?.get(url).map(drop)
    };
    headers(text).find(|(_, header)| is_its(header).is_some()).map(|(at, _)| at)
}

/// Where the first table begins: everything before it belongs to the registry itself.
fn first_table(text: &str) -> usize {
    headers(text).next().map_or(text.len(), |(at, _)| at)
}

/// The lines that begin a table.
fn headers(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    let lines = text.split_inclusive('\n').map(move |line| {
        let start = at;
        at += line.len();
        (start, line)
    });
    // A bracket inside a string or a list begins no table: what comes before it would be unfinished.
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

/// The registry that a directory is for. None: it is for all that have none of their own.
pub fn registry_of(dir: &Path) -> Option<String> {
    let name = dir.file_name()?.to_str()?;
    if name == "_default" {
        return None;
    }
    // containerd writes host:port as host_port_ where file names cannot have a colon.
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
    fn comes_before_the_hosts_that_are_there_and_goes_without_a_trace() {
        for text in [
            "",
            "# only a comment\n",
            "server = \"https://x\"\n",
            "server = \"https://x\"\n\n[host.\"https://a\"]\n  capabilities = [\"pull\"]\n",
            "server = \"https://x\"\nnote = \"\"\"\n[host.\"fake\"]\n\"\"\"\n[host.\"https://a\"]\n[host.\"https://a\".header]\n  x = \"y\"\n",
            "ca = [\n  \"a\",\n]\n\n  [host.'https://a']\r\n",
            "[header]\n  x = [\"1\"]\n[host.\"https://b\"]",
        ] {
            let extended = with(text, &block(), &mirrors()).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(hosts(&extended)[0], "http://127.0.0.1:5050", "{extended}");
            let back = without(&extended).unwrap();
            assert_eq!((back.rest.as_str(), back.state), (text, EditState::AsWritten));
            assert_eq!(back.block, block());
        }
        // Lines have to end somewhere.
        let extended = with("server = \"https://x\"", &block(), &mirrors()).unwrap();
        assert_eq!(without(&extended).unwrap().rest, "server = \"https://x\"\n");
        assert_eq!(without("[host.\"http://127.0.0.1:5050\"]\n"), None);
    }

    #[test]
    fn what_cannot_be_extended_says_why() {
        let unfit = |text: &str| with(text, &block(), &mirrors()).unwrap_err();
        assert!(matches!(unfit("server = "), UnsupportedFile::NotToml(_)));
        assert_eq!(unfit("host = { \"https://a\" = {} }"), UnsupportedFile::NoTables);
        assert_eq!(
            unfit("[host.\"http://127.0.0.1:5050\"]"),
            UnsupportedFile::AlreadyThere("http://127.0.0.1:5050".into())
        );
    }

    #[test]
    fn what_a_person_edited_is_noticed() {
        let edited = block().replace("1s", "9s");
        assert_eq!(without(&edited).unwrap().state, EditState::Edited);
        assert_eq!(without(&block().replace(END, "")).unwrap().state, EditState::Edited);
        let added = format!("# mine\n{}[host.\"https://b\"]\n", block());
        let without = without(&added).unwrap();
        assert_eq!((without.state, without.rest.as_str()), (EditState::AsWritten, "# mine\n[host.\"https://b\"]\n"));
    }

    #[test]
    fn certificates_beside_it_stay_in_use() {
        let certificates = Certificates {
            authorities: vec!["ca.crt".into()],
            clients: vec![("a.cert".into(), Some("a.key".into())), ("b.cert".into(), None)],
        };
        let block = mirrors().block(Some("reg.corp:5000"), &certificates);
        let table: Table = block.parse().unwrap();
        assert_eq!(table["server"].as_str(), Some("https://reg.corp:5000"));
        assert_eq!(table["ca"].as_array().unwrap().len(), 1);
        assert_eq!(table["client"][0][1].as_str(), Some("a.key"));
        assert_eq!(with("", &block, &mirrors()).unwrap(), block);
        let authority = Mirrors { hosts: vec!["https://dray:5050".parse().unwrap()], ca: Some("/etc/ca.crt".into()) };
        assert!(authority.block(None, &Certificates::default()).contains("ca = \"/etc/ca.crt\""));
    }

    #[test]
    fn what_containerd_stumbles_over_is_named() {
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
            ("host = { \"https://a\" = {} }", "table of its own"),
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
    fn directories_name_their_registry() {
        for (name, registry) in
            [("docker.io", "docker.io"), ("reg.corp:5000", "reg.corp:5000"), ("reg.corp_5000_", "reg.corp:5000")]
        {
            assert_eq!(registry_of(Path::new(name)).as_deref(), Some(registry));
        }
        assert_eq!(registry_of(Path::new("_default")), None);
    }
}
