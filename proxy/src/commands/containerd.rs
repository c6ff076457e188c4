//! `dray containerd install | check | uninstall | hand-over`.

#![allow(clippy::disallowed_methods, reason = "a command has its thread for itself")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use dray::config::Mirror;
use dray::containerd::daemon::{self, Daemon, File, LoadError, Version};
use dray::containerd::diagnosis::{self, Diagnosis, Severity, good};
use dray::containerd::distributions::{self, Distribution};
use dray::containerd::hosts_dir::{Changes, HostsDir, MirroredRegistries, Mode};
use dray::containerd::hosts_toml::{self, Mirrors};
use dray::containerd::patch::{ConfigFile, Patched};
use dray::containerd::proof::{self, MirrorResponse};
use dray::containerd::reconciler;
use dray::store::ownership;

use super::{Failure, once, say};

#[derive(Subcommand)]
pub(crate) enum ContainerdCommand {
    /// Send containerd to dray first: write hosts.toml files into its hosts directory
    ///
    /// What is there stays, after dray; a file that is changed is kept beside it. containerd reads the files
    /// anew for every pull: nothing needs a restart.
    Install(Install),
    /// Say in plain words whether containerd uses its mirror, and if not, why
    ///
    /// Exit code 0 if it does, 1 if not. Ends with a proof: an image that only dray has is pulled through
    /// containerd's own configuration where crictl is installed, and asked of the mirror in any case.
    Check(Check),
    /// Take back what install wrote, and put back what was there before
    Uninstall(Uninstall),
    /// Keep containerd pointed at a mirror elsewhere for as long as that answers
    ///
    /// For a dray that is shared by a cluster. Takes it back when the mirror is gone, and when it is stopped.
    Keep(Keep),
}

#[derive(Args)]
struct DryRunFlag {
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl DryRunFlag {
    fn mode(&self) -> Mode {
        if self.dry_run { Mode::DryRun } else { Mode::Apply }
    }
}

#[derive(Args)]
pub(crate) struct Install {
    #[command(flatten)]
    at: ContainerdLocation,
    /// Where containerd reaches dray, such as http://127.0.0.1:5050; several are tried in order
    #[arg(long, value_name = "URL", required = true)]
    mirror: Vec<Mirror>,
    /// The authority that signed the mirror's certificate, a PEM file on the node
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Only for these registries, such as docker.io; without it for all that have no directory of their own
    #[arg(long, value_name = "HOST", conflicts_with = "extend")]
    registry: Vec<String>,
    /// Also where a registry has a directory of its own, which hides _default
    #[arg(long)]
    extend: bool,
    /// Also set config_path in containerd's configuration, which then needs a restart
    #[arg(long)]
    patch_config: bool,
    #[command(flatten)]
    dry_run: DryRunFlag,
}

#[derive(Args)]
pub(crate) struct Check {
    #[command(flatten)]
    at: ContainerdLocation,
    /// containerd's socket; without it the one that its configuration names
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Do not pull through containerd
    #[arg(long)]
    no_pull: bool,
}

#[derive(Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    at: ContainerdLocation,
    #[command(flatten)]
    dry_run: DryRunFlag,
    /// Also empty dray's cache directory
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Stay so long afterwards, such as 30s
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    linger: Option<Duration>,
}

#[derive(Args)]
pub(crate) struct Keep {
    /// containerd's hosts directory, such as /etc/containerd/certs.d
    #[arg(long, value_name = "DIR")]
    hosts_dir: PathBuf,
    /// Where containerd reaches dray
    #[arg(long, value_name = "URL")]
    mirror: Mirror,
    /// The authority that signed the mirror's certificate, a PEM file on the node
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// Which containerd.
#[derive(Args)]
struct ContainerdLocation {
    /// containerd's hosts directory, its config_path; without it the one that its configuration names
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
    /// containerd's configuration; - reads what `containerd config dump` prints. Without it that of the
    /// distribution: containerd's own, k3s, RKE2, k0s, MicroK8s, Talos
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Which containerd reads it, such as 1.7 or 2.1; without it `containerd --version` is asked
    #[arg(long, value_name = "VERSION")]
    containerd_version: Option<Version>,
}

/// A containerd's configuration as far as it is known.
struct InstalledContainerd {
    config: PathBuf,
    place: Option<Distribution>,
    files: Vec<File>,
    version: Version,
    /// Whether the version is only what the configuration lets one think.
    is_guess: bool,
}

/// A mirror that a hosts.toml names, and the authority for its certificate.
type NamedMirror = (String, Option<PathBuf>);

/// What `containerd --version` is asked of, beside what is in the path.
const CONTAINERD: [&str; 4] = [
    "containerd",
    "/var/lib/rancher/k3s/data/current/bin/containerd",
    "/var/lib/rancher/rke2/bin/containerd",
    "/var/lib/k0s/bin/containerd",
];

impl ContainerdCommand {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Install(install) => install.run(),
            Self::Check(check) => check.run(),
            Self::Uninstall(uninstall) => uninstall.run(),
            Self::Keep(keep) => keep.run(),
        }
    }
}

impl Install {
    fn run(self) -> Result<(), Failure> {
        let mode = self.dry_run.mode();
        let dir = match (&self.at.hosts_dir, self.patch_config) {
            (Some(dir), false) => dir.clone(),
            (_, true) => self.patch()?,
            (None, false) => {
                let found = self.at.find()?;
                let diagnosis = found.diagnose(None);
                let wrong = diagnosis.findings.iter().find(|finding| finding.severity == Severity::Wrong);
                if let Some(finding) = wrong {
                    let mut message = format!("{}\n", finding.what);
                    finding.remedy.iter().for_each(|line| message += &format!("  {line}\n"));
                    return Err(Failure::Failed(message + "or name the directory with --hosts-dir"));
                }
                diagnosis.hosts_dir.ok_or_else(|| Failure::Failed("name the directory with --hosts-dir".into()))?
            }
        };
        let registries = match (self.extend, self.registry.is_empty()) {
            (true, _) => MirroredRegistries::Every,
            (false, false) => MirroredRegistries::Named(self.registry),
            (false, true) => MirroredRegistries::Default,
        };
        let ca = self.ca.as_deref().map(authority).transpose()?;
        let mirrors = Mirrors { hosts: once(self.mirror), ca };
        if self.patch_config && mode == Mode::DryRun && !dir.exists() {
            say(&format!("{}: a new directory, with _default/hosts.toml", dir.display()));
            return Ok(());
        }
        report(&HostsDir::new(dir).install(&mirrors, &registries, mode).map_err(failed)?, mode)
    }

    /// Sets the directory in containerd's configuration, and makes it.
    fn patch(&self) -> Result<PathBuf, Failure> {
        let found = self.at.find()?;
        let named = Daemon::read(&found.files, found.version).config_path;
        let left_out = named.as_ref().and_then(|path| path.as_str()).map(diagnosis::hidden).unwrap_or_default();
        if let Some(dir) = left_out.first() {
            return Err(Failure::Failed(format!(
                "{}: containerd would not look there any more, since config_path has to be one directory: move it into the first",
                dir.display()
            )));
        }
        let dir = self.at.hosts_dir.clone().unwrap_or_else(|| found.wanted());
        // containerd is started elsewhere.
        let dir = std::path::absolute(&dir).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
        let (file, section, version) = found.to_patch();
        let (config, existed) = (ConfigFile::new(&file), file.exists());
        let wanted = dir.to_string_lossy();
        let mode = self.dry_run.mode();
        let patched = match mode {
            Mode::Apply => {
                std::fs::create_dir_all(&dir).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
                config.set(section, version, &wanted)
            }
            Mode::DryRun => config.plan(section, version, &wanted),
        };
        match (patched.map_err(failed)?, mode) {
            (Patched::Changed { .. }, Mode::Apply) if !existed => {
                say(&format!("{}: a new file, with config_path = \"{wanted}\". Restart containerd", file.display()));
            }
            (Patched::Changed { .. }, Mode::Apply) => say(&format!(
                "{}: config_path = \"{wanted}\"; the file as it was is {}. Restart containerd",
                file.display(),
                config.kept().display()
            )),
            (Patched::Changed { .. }, Mode::DryRun) => {
                say(&format!("{}: config_path = \"{wanted}\"", file.display()));
            }
            (Patched::Nothing | Patched::Edited, _) => say(&format!("{}: has config_path already", file.display())),
        }
        self.is_in_force(&dir)?;
        Ok(dir)
    }

    /// An import comes after the file that was patched, and may say otherwise.
    fn is_in_force(&self, dir: &Path) -> Result<(), Failure> {
        if self.dry_run.mode() == Mode::DryRun {
            return Ok(());
        }
        let found = self.at.find()?;
        let daemon = Daemon::read(&found.files, found.version);
        let said = daemon.config_path.as_ref().and_then(|path| path.as_str()).unwrap_or_default();
        if Path::new(said) == dir {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "{} says config_path = \"{}\" now, but a file that it imports says \"{said}\", which counts: change it there",
            found.main().display(),
            dir.display()
        )))
    }
}

impl Uninstall {
    fn run(self) -> Result<(), Failure> {
        let found = match self.at.hosts_dir {
            // With a directory at hand nobody needs containerd's configuration, unless it was patched for that.
            Some(_) => self.at.load().ok().and_then(Result::ok),
            None => Some(self.at.find()?),
        };
        let named = || found.as_ref().and_then(|found| found.diagnose(None).hosts_dir);
        let Some(dir) = self.at.hosts_dir.clone().or_else(named) else {
            return Err(Failure::Failed("containerd's configuration names no hosts directory: use --hosts-dir".into()));
        };
        // The mirror first: whatever comes of the rest, nobody is sent there any more.
        let mode = self.dry_run.mode();
        let done = HostsDir::new(&dir).uninstall(mode).map_err(failed);
        let reported = done.and_then(|done| report(&done, mode));
        let restored = found.map_or(Ok(()), |found| self.restore_config(&found, &dir));
        let emptied = self.cache_dir.as_deref().map_or(Ok(()), |dir| self.empty(dir));
        if let Some(linger) = self.linger {
            std::thread::sleep(linger);
        }
        reported.and(restored).and(emptied)
    }

    fn empty(&self, dir: &Path) -> Result<(), Failure> {
        if self.dry_run.mode() == Mode::DryRun {
            say(&format!("{}: what dray keeps there would be removed", dir.display()));
            return Ok(());
        }
        if ownership::empty(dir).map_err(|error| Failure::Failed(format!("{}: {error}", dir.display())))? {
            say(&format!("{}: what dray kept there is removed", dir.display()));
        }
        Ok(())
    }

    /// Takes back what `install --patch-config` did.
    fn restore_config(&self, found: &InstalledContainerd, dir: &Path) -> Result<(), Failure> {
        let (file, section, version) = found.to_patch();
        let config = ConfigFile::new(&file);
        if !config.kept().exists() {
            return Ok(());
        }
        let dir = std::path::absolute(dir).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
        let mode = self.dry_run.mode();
        match config.restore(section, version, &dir.to_string_lossy(), mode).map_err(failed)? {
            Patched::Changed { .. } if mode == Mode::DryRun => {
                say(&format!("{}: would be as it was before", file.display()));
            }
            Patched::Changed { .. } => say(&format!("{}: as it was before. Restart containerd", file.display())),
            Patched::Edited => say(&format!(
                "{}: edited since, and left alone; as it was before it is {}",
                file.display(),
                config.kept().display()
            )),
            Patched::Nothing => {}
        }
        Ok(())
    }
}

impl Check {
    fn run(self) -> Result<(), Failure> {
        let (diagnosis, place, mirrors) = self.diagnose()?;
        let mut is_wrong = diagnosis.is_wrong();
        for finding in &diagnosis.findings {
            say(&format!("{:<5} {}: {}", finding.severity.as_str(), finding.code, finding.what));
            finding.remedy.iter().for_each(|line| say(&format!("        {line}")));
        }
        let asked = super::block_on(async {
            let mut answers = Vec::new();
            for (mirror, authority) in &mirrors {
                answers.push(proof::ask(mirror, authority.as_deref()).await);
            }
            answers
        })?;
        let mut answers = false;
        for ((mirror, _), answer) in mirrors.iter().zip(asked) {
            answers |= matches!(answer, MirrorResponse::Dray);
            say(&match answer {
                MirrorResponse::Dray => format!("ok    mirror: {mirror} is a dray"),
                MirrorResponse::Other(status) => format!("note  mirror: {mirror} answers {status}, and is no dray"),
                MirrorResponse::Nobody(why) => format!("wrong mirror: {mirror} does not answer: {why}"),
            });
        }
        is_wrong |= !mirrors.is_empty() && !answers;
        if !is_wrong && !self.no_pull {
            let socket = self.socket.or(diagnosis.socket).unwrap_or_else(|| place.socket.into());
            match proof::pull(&socket) {
                proof::RuntimePull::Came => {
                    say(&format!("ok    pull: an image that only dray has came through {}", socket.display()));
                }
                proof::RuntimePull::Failed(why) => {
                    is_wrong = true;
                    say(&format!("wrong pull: {} does not get an image that only dray has: {why}", socket.display()));
                    say("        Was containerd restarted since its configuration was changed?");
                }
                proof::RuntimePull::NotTried(why) => say(&format!("note  pull: not tried: {why}")),
            }
        }
        if is_wrong { Err(Failure::Failed("containerd does not use a dray".into())) } else { Ok(()) }
    }

    /// What is wrong, where that containerd is, and the mirrors it names with their authorities.
    fn diagnose(&self) -> Result<(Diagnosis, Distribution, Vec<NamedMirror>), Failure> {
        let found = match self.at.load()? {
            Ok(found) => found,
            Err(error) => return Ok((Diagnosis::unreadable(&error), distributions::USUAL, Vec::new())),
        };
        let mut diagnosis = found.diagnose(self.at.hosts_dir.as_deref());
        let upstream = if found.is_guess {
            "as its configuration lets one think: --containerd-version says otherwise"
        } else {
            "as it says"
        };
        let what = format!("{} of containerd {}, {upstream}", found.config.display(), found.version);
        diagnosis.findings.insert(0, good("config", what));
        let place = found.place.unwrap_or(distributions::USUAL);
        let mut mirrors = Vec::new();
        if let Some(dir) = diagnosis.hosts_dir.clone() {
            let urls = diagnosis.look_into(&dir).map_err(failed)?;
            let file = HostsDir::new(&dir).default_file();
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            mirrors = urls.into_iter().map(|url| (url.clone(), hosts_toml::authority(&text, &url))).collect();
            if !mirrors.is_empty() && !text.is_empty() {
                let names = mirrors.iter().map(|(url, _)| url.as_str()).collect::<Vec<_>>().join(", ");
                diagnosis.findings.push(good("hosts", format!("{} names {names}", file.display())));
            }
        }
        Ok((diagnosis, place, mirrors))
    }
}

impl Keep {
    /// Until a signal.
    fn run(self) -> Result<(), Failure> {
        super::log_to_stderr()?;
        super::block_on(reconciler::follow(self.hosts_dir, self.mirror, self.ca))?
            .map_err(|e| Failure::Failed(e.to_string()))
    }
}

impl ContainerdLocation {
    fn find(&self) -> Result<InstalledContainerd, Failure> {
        self.load()?.map_err(|error| Failure::Failed(format!("{error}; containerd does not start with it")))
    }

    /// The inner error: containerd itself could not read it.
    fn load(&self) -> Result<Result<InstalledContainerd, LoadError>, Failure> {
        let place = self.config.as_deref().map_or_else(|| Some(distributions::here()), distributions::of);
        let config = self.config.clone().or(place.map(|place| place.config.into())).unwrap_or_default();
        let is_piped = config == Path::new("-");
        if self.config.is_some() && !is_piped && !config.exists() {
            return Err(Failure::Failed(format!("{}: no such file", config.display())));
        }
        let piped = if is_piped { Some(std::io::read_to_string(std::io::stdin())) } else { None };
        let piped = piped.transpose().map_err(|e| Failure::Failed(format!("standard input: {e}")))?;
        let main = match piped {
            Some(text) => daemon::parse(Path::new("standard input"), &text),
            None => daemon::parse(&config, &std::fs::read_to_string(&config).unwrap_or_default()),
        };
        let main = match main {
            Ok(main) => main,
            Err(error) => return Ok(Err(error)),
        };
        let asked = self.containerd_version.or_else(|| if is_piped { None } else { asked_version() });
        let version = asked.unwrap_or_else(|| Version::guessed(&main));
        let files = if is_piped { Ok(vec![main]) } else { daemon::load(&config, version) };
        Ok(files.map(|files| InstalledContainerd { config, place, files, version, is_guess: asked.is_none() }))
    }
}

impl InstalledContainerd {
    fn diagnose(&self, hosts_dir: Option<&Path>) -> Diagnosis {
        let wanted = self.wanted();
        let mut diagnosis = Diagnosis::of(&self.files, self.version, &self.main(), &wanted.to_string_lossy());
        if let Some(note) = self.place.and_then(|place| place.note) {
            diagnosis.remark("distribution", note);
        }
        if let Some(dir) = hosts_dir {
            diagnosis.expect(dir);
        }
        diagnosis
    }

    /// The directory that the configuration names, or had better name.
    fn wanted(&self) -> PathBuf {
        let named = Daemon::read(&self.files, self.version).config_path;
        let first =
            named.as_ref().and_then(|path| path.as_str()?.split(':').next()).filter(|path| path.starts_with('/'));
        first.map_or_else(|| self.place.unwrap_or(distributions::USUAL).hosts_dir.into(), PathBuf::from)
    }

    /// The file that a person edits.
    fn main(&self) -> PathBuf {
        if self.config == Path::new("-") { distributions::USUAL.config.into() } else { self.config.clone() }
    }

    /// The file, the section and the version for a `config_path`.
    fn to_patch(&self) -> (PathBuf, &'static str, i64) {
        let version = self
            .files
            .first()
            .map_or(self.version.newest_config().min(3), |_| Daemon::read(&self.files, self.version).config_version);
        (self.main(), self.version.section(version), version)
    }
}

/// Where containerd cannot read an authority every pull fails, also one that would not come by the mirror.
fn authority(file: &Path) -> Result<PathBuf, Failure> {
    let wrong = |what: &str| Failure::Usage(format!("--ca {}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
    if !text.contains("-----BEGIN CERTIFICATE-----") {
        return Err(wrong("holds no certificate in PEM"));
    }
    std::path::absolute(file).map_err(|error| wrong(&error.to_string()))
}

/// What the installed containerd says of itself.
fn asked_version() -> Option<Version> {
    CONTAINERD.iter().find_map(|program| {
        let output = std::process::Command::new(program).arg("--version").output().ok()?;
        String::from_utf8_lossy(&output.stdout).parse().ok()
    })
}

fn report(outcome: &Changes, mode: Mode) -> Result<(), Failure> {
    for change in &outcome.changes {
        say(&change.to_string());
        if mode == Mode::DryRun {
            say(change.diff().trim_end());
        }
    }
    if outcome.changes.is_empty() {
        say("nothing to do");
    }
    outcome.remarks.iter().for_each(|remark| say(&remark.to_string()));
    if outcome.remarks.iter().any(|remark| remark.is_failure()) {
        return Err(Failure::Failed("not all was done: see above".into()));
    }
    Ok(())
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}
