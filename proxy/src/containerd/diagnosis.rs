//! Finds problems in containerd's configuration that keep it from using its mirrors, with a remedy for each.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::path::{Path, PathBuf};

use toml::Value;

use super::daemon::{self, Daemon, File, LoadError, Version};
use super::hosts_dir::{HostsDir, HostsError};
use super::hosts_toml;

/// One result for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A stable identifier for scripts and tests.
    pub code: &'static str,
    pub severity: Severity,
    pub what: String,
    /// Instructions, one per line.
    pub remedy: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Good,
    /// Mirrors are used, but perhaps not as intended.
    Note,
    /// containerd does not use a mirror, or does not start.
    Wrong,
}

/// The findings for a configuration, and the paths in it.
#[derive(Debug)]
pub struct Diagnosis {
    pub findings: Vec<Finding>,
    /// The hosts directory that containerd reads.
    pub hosts_dir: Option<PathBuf>,
    /// The socket in the configuration.
    pub socket: Option<PathBuf>,
}

/// The `config_path` of containerd 2.2 and later if none is configured.
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

    /// The diagnosis of a configuration that cannot be read.
    pub fn unreadable(error: &LoadError) -> Self {
        let what = format!("{error}; containerd does not start with this configuration");
        Self { findings: vec![wrong("unreadable", what, Vec::new())], hosts_dir: None, socket: None }
    }

    /// The diagnosis of a hosts directory, if the configuration is not known.
    pub fn without_config(dir: &Path) -> Self {
        let what = "not read: whether containerd uses the hosts directory is not known".to_owned();
        Self { findings: vec![note("config", what)], hosts_dir: Some(dir.to_owned()), socket: None }
    }

    /// The diagnosis of a configuration. A remedy sets the directory `wanted` in the file `main`.
    pub fn of(files: &[File], version: Version, main: &Path, wanted: &str) -> Self {
        let daemon = Daemon::read(files, version);
        let mut findings = Vec::new();
        let lines =
            |daemon: &Daemon| instructions(version, (!files.is_empty()).then_some(daemon.config_version), main, wanted);
        let newest = files.iter().filter_map(|file| Some((file, file.table.get("version")?.as_integer()?)));
        for (file, config_version) in
            newest.filter(|(_, config)| version.merges_sections() && *config > version.newest_config())
        {
            findings.push(wrong(
                "version",
                format!(
                    "{}: containerd {version} does not start with version = {config_version}: the newest version that it supports is {}",
                    file.path.display(),
                    version.newest_config()
                ),
                Vec::new(),
            ));
        }
        if let Some(name) = &daemon.misnamed_plugin {
            let what = format!("\"{name}\" is not a full plugin name: containerd does not start");
            findings.push(wrong(
                "plugin-name",
                what,
                vec!["Use the form io.containerd.KIND.v1.NAME, such as io.containerd.grpc.v1.cri.".into()],
            ));
        }
        if daemon.cri_disabled {
            let what = "the CRI plugin is disabled (disabled_plugins): Kubernetes cannot use this containerd".into();
            findings.push(wrong("cri-disabled", what, vec!["Remove it from disabled_plugins.".into()]));
        }
        for (file, section) in &daemon.misplaced {
            let what =
                format!("{}: config_path is in {section}, which containerd {version} does not read", file.display());
            // Harmless if the right section has a config_path as well.
            let finding = if daemon.config_path.is_some() {
                note("misplaced", what)
            } else {
                wrong("misplaced", what, lines(&daemon))
            };
            findings.push(finding);
        }
        for file in &daemon.replaced {
            let what = format!(
                "{}: containerd ignores its config_path: a file imported later has the same section, and containerd 1.x reads a section from one file only",
                file.display()
            );
            findings.push(wrong(
                "replaced",
                what,
                vec!["Move the whole section, config_path included, into the last of these files.".into()],
            ));
        }
        let hosts_dir = effective_dir(&daemon, version, &mut findings, &lines(&daemon));
        Self { findings, hosts_dir, socket: daemon.socket }
    }

    /// Adds a note that does not depend on the configuration.
    pub fn add_note(&mut self, code: &'static str, what: &str) {
        self.findings.push(note(code, what.to_owned()));
    }

    /// Adds a finding if the configuration names another directory than the requested one.
    pub fn require(&mut self, dir: &Path) {
        if let Some(named) = self.hosts_dir.as_ref().filter(|named| *named != dir) {
            let what = format!("containerd reads {}, not {}", named.display(), dir.display());
            self.findings.push(wrong("other-directory", what, Vec::new()));
        }
        self.hosts_dir = Some(dir.to_owned());
    }

    /// Adds the problems of a hosts directory. Returns its mirrors: those of `_default`, or those of single registries.
    pub fn inspect_hosts_dir(&mut self, dir: &Path) -> Result<Vec<String>, HostsError> {
        let hosts = HostsDir::new(dir);
        if !dir.is_dir() {
            let what = format!("{} does not exist, so no mirror is used", dir.display());
            self.findings.push(wrong(
                "no-directory",
                what,
                vec![format!("mkdir -p {}", dir.display()), install_command(dir)],
            ));
            return Ok(Vec::new());
        }
        let file = hosts.default_file();
        let text = super::tree::read(&file).map_err(|e| HostsError::Io(file.clone(), e))?;
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            let (registries, mirrors) = mirrored_registries(&hosts)?;
            if !mirrors.is_empty() {
                let what = format!("a mirror is used for {} only", registries.join(", "));
                self.findings.push(note("some-registries", what));
                return Ok(mirrors);
            }
            let what = format!("{} does not exist, so no mirror is used", file.display());
            self.findings.push(wrong("no-mirror", what, vec![install_command(dir)]));
            return Ok(Vec::new());
        };
        for problem in hosts_toml::problems(&text) {
            let severity = if problem.contains("ignores") { Severity::Wrong } else { Severity::Note };
            let what = format!("{}: {problem}", file.display());
            self.findings.push(Finding { code: "hosts-file", severity, what, remedy: Vec::new() });
        }
        let mirrors = hosts_toml::hosts(&text);
        for other in hosts.registry_dirs()? {
            self.inspect_registry_dir(&other, &mirrors)?;
        }
        Ok(mirrors)
    }

    fn inspect_registry_dir(&mut self, dir: &Path, mirrors: &[String]) -> Result<(), HostsError> {
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

/// The registries with dray's block in a directory of their own, and the mirrors in these blocks.
fn mirrored_registries(hosts: &HostsDir) -> Result<(Vec<String>, Vec<String>), HostsError> {
    let (mut registries, mut mirrors) = (Vec::new(), Vec::new());
    for dir in hosts.registry_dirs()? {
        let file = dir.join("hosts.toml");
        let text = super::tree::read(&file).map_err(|e| HostsError::Io(file.clone(), e))?.unwrap_or_default();
        if let Some(stripped) = hosts_toml::strip_block(&text) {
            registries.extend(hosts_toml::registry_of(&dir));
            mirrors.extend(
                hosts_toml::hosts(&stripped.block)
                    .into_iter()
                    .filter(|host| !mirrors.contains(host))
                    .collect::<Vec<_>>(),
            );
        }
    }
    Ok((registries, mirrors))
}

/// The problems of a node's configuration that its files show.
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
        diagnosis.require(hosts_dir);
    }
    diagnosis.findings.retain(|finding| finding.severity == Severity::Wrong);
    diagnosis.findings
}

/// The effective `config_path`, which may be a list of directories.
fn configured_path(daemon: &Daemon, version: Version, findings: &mut Vec<Finding>, lines: &[String]) -> Option<String> {
    let conflict = |what: &str| format!("{what}: containerd's CRI plugin does not start");
    match &daemon.config_path {
        Some(Value::String(path)) => {
            if daemon.has_mirrors {
                let what = conflict("registry.mirrors and registry.config_path cannot both be set");
                findings.push(wrong(
                    "mirrors",
                    what,
                    vec!["Remove registry.mirrors: configure mirrors in hosts.toml files.".into()],
                ));
            }
            if daemon.has_tls_configs && !version.merges_sections() {
                let what = conflict("registry.configs with tls and registry.config_path cannot both be set");
                findings.push(wrong(
                    "tls-configs",
                    what,
                    vec!["Remove the tls parts: configure certificates in hosts.toml files (ca, client).".into()],
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
            let what = "registry.mirrors, an old setting, is used: containerd does not read hosts.toml files".into();
            let mut remedy = vec!["Remove registry.mirrors and registry.configs, then:".to_owned()];
            remedy.extend_from_slice(lines);
            findings.push(wrong("mirrors", what, remedy));
            None
        }
        None if version.has_default_path() => Some(DEFAULT_PATH.to_owned()),
        None => {
            let is_explained = findings.iter().any(|finding| matches!(finding.code, "misplaced" | "replaced"));
            if !is_explained {
                let what = "config_path is not set: containerd does not read hosts.toml files".into();
                findings.push(wrong("no-config-path", what, lines.to_vec()));
            }
            None
        }
    }
}

/// The directory that containerd reads, and findings for a `config_path` that it does not support.
fn effective_dir(daemon: &Daemon, version: Version, findings: &mut Vec<Finding>, lines: &[String]) -> Option<PathBuf> {
    let path = configured_path(daemon, version, findings, lines)?;
    let mut roots = path.split(':');
    let first = roots.next().unwrap_or_default();
    if roots.next().is_some() {
        match daemon.local_pull_setting {
            _ if !version.uses_transfer_service() => {}
            Some(setting) => {
                let what = format!(
                    "config_path is a list, {path}: this works only while {setting} keeps pulls in the CRI plugin"
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
                    "{set}, {path}: containerd's transfer service reads it as a single directory, which does not exist, and does not use a mirror"
                );
                findings.push(wrong("list", what, lines.to_vec()));
                return None;
            }
        }
    }
    for hidden in hidden(&path) {
        let what = format!(
            "{}: containerd ignores this directory as soon as {first} has _default, which dray needs",
            hidden.display()
        );
        findings.push(wrong("hidden", what, vec![format!("mv {} {first}/", hidden.display())]));
    }
    if !first.starts_with('/') {
        let what =
            format!("config_path = \"{first}\" is not absolute: containerd resolves it in its working directory");
        findings.push(wrong("relative", what, lines.to_vec()));
        return None;
    }
    Some(PathBuf::from(first))
}

/// Directories of registries in the later roots of a list. containerd ignores them as soon as the first root has
/// `_default`.
pub fn hidden(path: &str) -> Vec<PathBuf> {
    let later = path.split(':').skip(1).filter(|root| root.starts_with('/'));
    later.flat_map(|root| HostsDir::new(root).registry_dirs().unwrap_or_default()).collect()
}

/// The instructions to set the directory. `present` is the version of the existing configuration.
fn instructions(version: Version, present: Option<i64>, main: &Path, wanted: &str) -> Vec<String> {
    let config_version = present.unwrap_or(version.newest_config().min(3));
    let section = match version.section(config_version) {
        "cri" => "[plugins.cri.registry]".to_owned(),
        section => format!("[plugins.'{section}'.registry]"),
    };
    let mut lines = vec![format!("Set this in {}, then restart containerd:", main.display())];
    if present.is_none() {
        lines.push(format!("  version = {config_version}"));
    }
    lines.push(format!("  {section}"));
    lines.push(format!("    config_path = \"{wanted}\""));
    lines
}

fn install_command(dir: &Path) -> String {
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
