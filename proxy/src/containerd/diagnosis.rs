//! What is wrong with a containerd's way to its mirrors, in plain words, and what to do.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::{Path, PathBuf};

use toml::Value;

use super::daemon::{self, Daemon, File, LoadError, Version};
use super::hosts_dir::{HostsDir, HostsError};
use super::hosts_toml;

/// One thing that a person ought to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A word for scripts and tests.
    pub code: &'static str,
    pub severity: Severity,
    pub what: String,
    /// What to do, line by line.
    pub remedy: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// As it should be.
    Good,
    /// It works, but maybe not as one thinks.
    Note,
    /// No mirror is used.
    Wrong,
}

/// A configuration and what follows from it.
#[derive(Debug)]
pub struct Diagnosis {
    pub findings: Vec<Finding>,
    /// Where containerd looks for hosts.toml.
    pub hosts_dir: Option<PathBuf>,
    /// Where it listens, if the configuration says so.
    pub socket: Option<PathBuf>,
}

/// The list that containerd 2.2 and later have where nothing is configured.
const DEFAULT_PATH: &str = "/etc/containerd/certs.d:/etc/docker/certs.d";

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Note => "note",
            Self::Wrong => "wrong",
        }
    }
}

impl Diagnosis {
    pub fn is_wrong(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Wrong)
    }

    /// Of a configuration that could not be read.
    pub fn unreadable(error: &LoadError) -> Self {
        let what = format!("{error}; containerd does not start with it");
        Self { findings: vec![wrong("unreadable", what, Vec::new())], hosts_dir: None, socket: None }
    }

    /// Of a configuration: `main` is the file that lines are to be added to, `wanted` the directory to name there.
    pub fn of(files: &[File], version: Version, main: &Path, wanted: &str) -> Self {
        let daemon = Daemon::read(files, version);
        let mut findings = Vec::new();
        let lines =
            |daemon: &Daemon| lines_to_add(version, (!files.is_empty()).then_some(daemon.config_version), main, wanted);
        let newest = files.iter().filter_map(|file| Some((file, file.table.get("version")?.as_integer()?)));
        for (file, config_version) in newest.filter(|(_, config)| version.merges() && *config > version.newest_config())
        {
            findings.push(wrong(
                "version",
                format!(
                    "{}: version = {config_version} is newer than containerd {version} knows ({}): it does not start",
                    file.path.display(),
                    version.newest_config()
                ),
                Vec::new(),
            ));
        }
        if let Some(name) = &daemon.misnamed_plugin {
            let what = format!("\"{name}\" is no full plugin name: containerd does not start");
            findings.push(wrong(
                "plugin-name",
                what,
                vec!["Write it as io.containerd.KIND.v1.NAME, such as io.containerd.grpc.v1.cri.".into()],
            ));
        }
        if daemon.cri_disabled {
            let what = "the CRI plugin is disabled (disabled_plugins): Kubernetes cannot use this containerd".into();
            findings.push(wrong("cri-disabled", what, vec!["Take it out of disabled_plugins.".into()]));
        }
        for (file, section) in &daemon.misplaced {
            let what = format!(
                "{}: config_path stands under {section}, where containerd {version} does not look",
                file.display()
            );
            // Harmless where it is said in the right place as well.
            let finding = if daemon.config_path.is_some() {
                note("misplaced", what)
            } else {
                wrong("misplaced", what, lines(&daemon))
            };
            findings.push(finding);
        }
        for file in &daemon.replaced {
            let what = format!(
                "{}: its config_path is lost: a file imported later has the same section, and containerd 1.x takes all of a section from one file",
                file.display()
            );
            findings.push(wrong(
                "replaced",
                what,
                vec!["Put the whole section, config_path included, into the last of them.".into()],
            ));
        }
        let hosts_dir = path_of(&daemon, version, &mut findings, &lines(&daemon));
        Self { findings, hosts_dir, socket: daemon.socket }
    }

    /// Something that holds whatever the configuration says.
    pub fn remark(&mut self, code: &'static str, what: &str) {
        self.findings.push(note(code, what.to_owned()));
    }

    /// Another directory is meant than the configuration may name.
    pub fn expect(&mut self, dir: &Path) {
        if let Some(named) = self.hosts_dir.as_ref().filter(|named| *named != dir) {
            let what = format!("containerd looks into {}, not into {}", named.display(), dir.display());
            self.findings.push(wrong("other-directory", what, Vec::new()));
        }
        self.hosts_dir = Some(dir.to_owned());
    }

    /// What of a hosts directory is in the way, and which mirrors it names for all registries.
    pub fn look_into(&mut self, dir: &Path) -> Result<Vec<String>, HostsError> {
        let hosts = HostsDir::new(dir);
        if !dir.is_dir() {
            let what = format!("{} does not exist: no mirror is used", dir.display());
            self.findings.push(wrong("no-directory", what, vec![format!("mkdir -p {}", dir.display()), install(dir)]));
            return Ok(Vec::new());
        }
        let file = hosts.default_file();
        let text = super::tree::read(&file).map_err(|e| HostsError::Io(file.clone(), e))?;
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            let (registries, mirrors) = named_by_dray(&hosts)?;
            if !mirrors.is_empty() {
                let what = format!("a mirror is used for {} only", registries.join(", "));
                self.findings.push(note("some-registries", what));
                return Ok(mirrors);
            }
            let what = format!("{} is not there: no mirror is used", file.display());
            self.findings.push(wrong("no-mirror", what, vec![install(dir)]));
            return Ok(Vec::new());
        };
        for problem in hosts_toml::problems(&text) {
            let severity = if problem.contains("ignores") { Severity::Wrong } else { Severity::Note };
            let what = format!("{}: {problem}", file.display());
            self.findings.push(Finding { code: "hosts-file", severity, what, remedy: Vec::new() });
        }
        let mirrors = hosts_toml::hosts(&text);
        for other in hosts.others()? {
            self.look_into_other(&other, &mirrors)?;
        }
        Ok(mirrors)
    }

    fn look_into_other(&mut self, dir: &Path, mirrors: &[String]) -> Result<(), HostsError> {
        let file = dir.join("hosts.toml");
        let text = super::tree::read(&file).map_err(|e| HostsError::Io(file.clone(), e))?.unwrap_or_default();
        let registry = hosts_toml::registry_of(dir).unwrap_or_default();
        let problems = if text.is_empty() { Vec::new() } else { hosts_toml::problems(&text) };
        for problem in problems {
            self.findings.push(note("hosts-file", format!("{}: {problem}", file.display())));
        }
        if !hosts_toml::hosts(&text).iter().any(|host| mirrors.contains(host)) {
            let what = format!("{} hides _default: {registry} is not pulled through the mirror", dir.display());
            let mut finding = note("shadowed", what);
            finding.remedy = vec![format!(
                "dray containerd install --extend --hosts-dir {} --mirror {}",
                dir.parent().unwrap_or(dir).display(),
                mirrors.first().map_or("URL", String::as_str)
            )];
            self.findings.push(finding);
        }
        Ok(())
    }
}

/// The registries that dray's lines stand for one by one, and the mirrors there.
fn named_by_dray(hosts: &HostsDir) -> Result<(Vec<String>, Vec<String>), HostsError> {
    let (mut registries, mut mirrors) = (Vec::new(), Vec::new());
    for dir in hosts.others()? {
        let file = dir.join("hosts.toml");
        let text = super::tree::read(&file).map_err(|e| HostsError::Io(file.clone(), e))?.unwrap_or_default();
        if let Some(own) = hosts_toml::without(&text) {
            registries.extend(hosts_toml::registry_of(&dir));
            mirrors.extend(
                hosts_toml::hosts(&own.block).into_iter().filter(|host| !mirrors.contains(host)).collect::<Vec<_>>(),
            );
        }
    }
    Ok((registries, mirrors))
}

/// What is wrong with a node's configuration, as far as the files tell.
pub fn of_node(config: &Path, hosts_dir: &Path) -> Vec<Finding> {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let loaded = daemon::parse(config, &text).and_then(|main| {
        let version = Version::guessed(&main);
        Ok((daemon::load(config, version)?, version))
    });
    let mut diagnosis = match loaded {
        Ok((files, version)) => Diagnosis::of(&files, version, config, &hosts_dir.to_string_lossy()),
        Err(error) => Diagnosis::unreadable(&error),
    };
    if !diagnosis.is_wrong() {
        diagnosis.expect(hosts_dir);
    }
    diagnosis.findings.retain(|finding| finding.severity == Severity::Wrong);
    diagnosis.findings
}

/// What containerd takes for its hosts directories.
fn configured_path(daemon: &Daemon, version: Version, findings: &mut Vec<Finding>, lines: &[String]) -> Option<String> {
    let conflict = |what: &str| format!("{what}: containerd's CRI plugin does not start");
    match &daemon.config_path {
        Some(Value::String(path)) => {
            if daemon.has_mirrors {
                let what = conflict("registry.mirrors and registry.config_path cannot both be set");
                findings.push(wrong(
                    "mirrors",
                    what,
                    vec!["Take out registry.mirrors: mirrors belong into hosts.toml files.".into()],
                ));
            }
            if daemon.has_tls_configs && !version.merges() {
                let what = conflict("registry.configs with tls and registry.config_path cannot both be set");
                findings.push(wrong(
                    "tls-configs",
                    what,
                    vec!["Take out the tls parts: they belong into hosts.toml files (ca, client).".into()],
                ));
            }
            Some(path.clone())
        }
        Some(other) => {
            let what = conflict(&format!("config_path = {other} is not a string"));
            findings.push(wrong("path-type", what, lines.to_vec()));
            None
        }
        None if daemon.has_mirrors => {
            let what = "registry.mirrors is used, as containerd had it before: hosts.toml files are not read".into();
            let mut remedy = vec!["Take out registry.mirrors and registry.configs, then:".to_owned()];
            remedy.extend_from_slice(lines);
            findings.push(wrong("mirrors", what, remedy));
            None
        }
        None if version.has_default_path() => Some(DEFAULT_PATH.to_owned()),
        None => {
            let explained = findings.iter().any(|finding| matches!(finding.code, "misplaced" | "replaced"));
            if !explained {
                let what = "no config_path is set: hosts.toml files are not read".into();
                findings.push(wrong("no-config-path", what, lines.to_vec()));
            }
            None
        }
    }
}

/// Where containerd looks, and what it stumbles over there.
fn path_of(daemon: &Daemon, version: Version, findings: &mut Vec<Finding>, lines: &[String]) -> Option<PathBuf> {
    let path = configured_path(daemon, version, findings, lines)?;
    let mut roots = path.split(':');
    let first = roots.next().unwrap_or_default();
    if roots.next().is_some() {
        match daemon.pulls_itself {
            _ if !version.transfers() => {}
            Some(setting) => {
                let what = format!(
                    "config_path is a list, {path}: it works only as long as {setting} keeps pulls in the CRI plugin"
                );
                findings.push(Finding { code: "list", severity: Severity::Note, what, remedy: lines.to_vec() });
            }
            None => {
                let set = if daemon.config_path.is_some() {
                    "config_path is a list"
                } else {
                    "config_path is not set, and is a list by default"
                };
                let what = format!(
                    "{set}, {path}: containerd's transfer service takes it for one directory, which does not exist, and uses no mirror"
                );
                findings.push(wrong("list", what, lines.to_vec()));
                return None;
            }
        }
    }
    for hidden in hidden(&path) {
        let what = format!(
            "{}: with _default in {first}, which dray needs, containerd does not look there any more",
            hidden.display()
        );
        findings.push(wrong("hidden", what, vec![format!("mv {} {first}/", hidden.display())]));
    }
    if !first.starts_with('/') {
        let what = format!("config_path = \"{first}\" is not absolute: it is looked for where containerd was started");
        findings.push(wrong("relative", what, lines.to_vec()));
        return None;
    }
    Some(PathBuf::from(first))
}

/// Registries' directories in a list's later roots, where containerd does not look once the first has `_default`.
pub fn hidden(path: &str) -> Vec<PathBuf> {
    let later = path.split(':').skip(1).filter(|root| root.starts_with('/'));
    later.flat_map(|root| HostsDir::new(root).others().unwrap_or_default()).collect()
}

/// What sets the directory, for that version. `present` is the version of the configuration that is there.
fn lines_to_add(version: Version, present: Option<i64>, main: &Path, wanted: &str) -> Vec<String> {
    let config_version = present.unwrap_or(version.newest_config().min(3));
    let section = match version.section(config_version) {
        "cri" => "[plugins.cri.registry]".to_owned(),
        section => format!("[plugins.'{section}'.registry]"),
    };
    let mut lines = vec![format!("Set in {}, once, then restart containerd:", main.display())];
    if present.is_none() {
        lines.push(format!("  version = {config_version}"));
    }
    lines.push(format!("  {section}"));
    lines.push(format!("    config_path = \"{wanted}\""));
    lines
}

fn install(dir: &Path) -> String {
    format!("dray containerd install --hosts-dir {} --mirror http://127.0.0.1:5050", dir.display())
}

fn wrong(code: &'static str, what: String, remedy: Vec<String>) -> Finding {
    Finding { code, severity: Severity::Wrong, what, remedy }
}

fn note(code: &'static str, what: String) -> Finding {
    Finding { code, severity: Severity::Note, what, remedy: Vec::new() }
}

pub fn good(code: &'static str, what: String) -> Finding {
    Finding { code, severity: Severity::Good, what, remedy: Vec::new() }
}
