//! `dray containerd install | check | uninstall | sync | prepare`.

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

use super::prepare::Prepare;
use super::{Failure, deduplicated, print};

#[derive(Subcommand)]
pub(crate) enum ContainerdCommand {
    /// Make dray the first mirror of containerd: write hosts.toml files into its hosts directory
    ///
    /// Existing mirrors stay in use after dray. The original of a changed file is saved next to it. containerd reads
    /// these files for every pull, so it does not need a restart.
    Install(Install),
    /// Check whether containerd uses its mirror, and print why if it does not
    ///
    /// Exit code 0 if it does, 1 if not. The check requests an image that only dray has: from the mirror, and, if
    /// crictl is installed, through containerd with its own configuration.
    Check(Check),
    /// Remove what install wrote, and restore the original files
    Uninstall(Uninstall),
    /// Keep containerd's mirror configuration in place while a dray on another machine responds
    ///
    /// For a dray that is shared by a cluster. Removes the mirror configuration if the mirror stops responding, and
    /// when this command is stopped.
    Sync(SyncMirror),
    /// Give directories to the user that dray runs as, so that dray needs no further privileges
    Prepare(Prepare),
}

#[derive(Args)]
struct DryRunFlag {
    /// Print what would change without changing anything
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
    location: ContainerdLocation,
    /// The URL on which containerd reaches dray, such as http://127.0.0.1:5050; if repeated, containerd tries them in
    /// order
    #[arg(long, value_name = "URL", required = true)]
    mirror: Vec<Mirror>,
    /// The certificate authority of the mirror's certificate: a PEM file on the node
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Mirror only this registry, such as docker.io; can be repeated. Without it: all registries without a directory of
    /// their own
    #[arg(long, value_name = "HOST", conflicts_with = "extend")]
    registry: Vec<String>,
    /// Also mirror registries that have a directory of their own, which makes containerd ignore _default for them
    #[arg(long)]
    extend: bool,
    /// Also set config_path in containerd's configuration; containerd then needs a restart
    #[arg(long)]
    patch_config: bool,
    #[command(flatten)]
    dry_run: DryRunFlag,
}

#[derive(Args)]
pub(crate) struct Check {
    #[command(flatten)]
    location: ContainerdLocation,
    /// containerd's socket. Without it: the socket in containerd's configuration
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Do not read containerd's configuration: check the hosts directory and the mirrors in it alone
    #[arg(long, requires = "hosts_dir", conflicts_with = "config")]
    skip_config: bool,
    /// Do not pull an image through containerd
    #[arg(long)]
    skip_pull: bool,
}

#[derive(Args)]
pub(crate) struct Uninstall {
    #[command(flatten)]
    location: ContainerdLocation,
    #[command(flatten)]
    dry_run: DryRunFlag,
    /// Also delete everything in dray's cache directory
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Sleep for this time before exiting, such as 30s. For Kubernetes, which restarts a container that exits
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    sleep_after: Option<Duration>,
}

#[derive(Args)]
pub(crate) struct SyncMirror {
    /// containerd's hosts directory, such as /etc/containerd/certs.d
    #[arg(long, value_name = "DIR")]
    hosts_dir: PathBuf,
    /// The URL on which containerd reaches dray
    #[arg(long, value_name = "URL")]
    mirror: Mirror,
    /// The certificate authority of the mirror's certificate: a PEM file on the node
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// The containerd installation to work on.
#[derive(Args)]
struct ContainerdLocation {
    /// containerd's hosts directory (its config_path). Without it: the directory in containerd's configuration
    #[arg(long, value_name = "DIR")]
    hosts_dir: Option<PathBuf>,
    /// containerd's configuration file; - reads the output of `containerd config dump` from standard input. Without it:
    /// the file of the detected distribution (k3s, RKE2, k0s, MicroK8s, Talos, or containerd's own)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// containerd's version, such as 1.7 or 2.1. Without it: the output of `containerd --version`
    #[arg(long, value_name = "VERSION")]
    containerd_version: Option<Version>,
}

/// The configuration of one containerd installation.
struct InstalledContainerd {
    config: PathBuf,
    distribution: Option<Distribution>,
    files: Vec<File>,
    version: Version,
    /// The version is guessed from the configuration, because `containerd --version` cannot be run.
    is_guess: bool,
}

/// The URL of a mirror in a hosts.toml, and the file of its certificate authority.
type NamedMirror = (String, Option<PathBuf>);

/// The programs to run with `--version`: from PATH, then those that distributions install outside of it.
const CONTAINERD_PROGRAMS: [&str; 4] = [
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
            Self::Sync(sync) => sync.run(),
            Self::Prepare(prepare) => prepare.run(),
        }
    }
}

impl Install {
    fn run(self) -> Result<(), Failure> {
        let mode = self.dry_run.mode();
        let dir = match (&self.location.hosts_dir, self.patch_config) {
            (Some(dir), false) => dir.clone(),
            (_, true) => self.patch()?,
            (None, false) => {
                let found = self.location.find()?;
                let diagnosis = found.diagnose(None);
                let problem = diagnosis.findings.iter().find(|finding| finding.severity == Severity::Wrong);
                if let Some(finding) = problem {
                    let mut message = format!("{}\n", finding.what);
                    finding.remedy.iter().for_each(|line| message += &format!("  {line}\n"));
                    return Err(Failure::Failed(message + "or pass the hosts directory with --hosts-dir"));
                }
                diagnosis.hosts_dir.ok_or_else(|| {
                    Failure::Failed(
                        "containerd's configuration does not name a hosts directory: pass it with --hosts-dir".into(),
                    )
                })?
            }
        };
        let registries = match (self.extend, self.registry.is_empty()) {
            (true, _) => MirroredRegistries::Every,
            (false, false) => MirroredRegistries::Named(self.registry),
            (false, true) => MirroredRegistries::Default,
        };
        let ca = self.ca.as_deref().map(authority).transpose()?;
        let mirrors = Mirrors { hosts: deduplicated(self.mirror), ca };
        if self.patch_config && mode == Mode::DryRun && !dir.exists() {
            print(&format!("{}: directory created, with _default/hosts.toml", dir.display()));
            return Ok(());
        }
        report(&HostsDir::new(dir).install(&mirrors, &registries, mode).map_err(failed)?, mode)
    }

    /// Sets `config_path` in containerd's configuration, and creates the directory.
    fn patch(&self) -> Result<PathBuf, Failure> {
        let found = self.location.find()?;
        let named = Daemon::read(&found.files, found.version).config_path;
        let hidden = named.as_ref().and_then(|path| path.as_str()).map(diagnosis::hidden).unwrap_or_default();
        if let Some(dir) = hidden.first() {
            return Err(Failure::Failed(format!(
                "{}: containerd would ignore this directory, because config_path must be a single directory: move it into the first directory of config_path",
                dir.display()
            )));
        }
        let dir = self.location.hosts_dir.clone().unwrap_or_else(|| found.hosts_dir());
        // Absolute, because containerd runs in another working directory.
        let dir = std::path::absolute(&dir).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
        let (file, section, version) = found.patch_target();
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
                print(&format!("{}: file created with config_path = \"{wanted}\". Restart containerd", file.display()));
            }
            (Patched::Changed { .. }, Mode::Apply) => print(&format!(
                "{}: config_path set to \"{wanted}\"; the original file is {}. Restart containerd",
                file.display(),
                config.backup_path().display()
            )),
            (Patched::Changed { .. }, Mode::DryRun) => {
                print(&format!("{}: config_path set to \"{wanted}\"", file.display()));
            }
            (Patched::Nothing | Patched::Edited, _) => {
                print(&format!("{}: config_path is set already", file.display()));
            }
        }
        self.check_effective_path(&dir)?;
        Ok(dir)
    }

    /// Fails if an imported file overrides `config_path`: containerd reads imports after the patched file.
    fn check_effective_path(&self, dir: &Path) -> Result<(), Failure> {
        if self.dry_run.mode() == Mode::DryRun {
            return Ok(());
        }
        let found = self.location.find()?;
        let daemon = Daemon::read(&found.files, found.version);
        let effective = daemon.config_path.as_ref().and_then(|path| path.as_str()).unwrap_or_default();
        if Path::new(effective) == dir {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "{} now has config_path = \"{}\", but a file that it imports overrides it with \"{effective}\": change it there",
            found.main().display(),
            dir.display()
        )))
    }
}

impl Uninstall {
    fn run(self) -> Result<(), Failure> {
        let found = match self.location.hosts_dir {
            // With --hosts-dir the configuration is only needed if install has patched it, so it may be unreadable.
            Some(_) => self.location.load().ok().and_then(Result::ok),
            None => Some(self.location.find()?),
        };
        let named = || found.as_ref().and_then(|found| found.diagnose(None).hosts_dir);
        let Some(dir) = self.location.hosts_dir.clone().or_else(named) else {
            return Err(Failure::Failed(
                "containerd's configuration does not name a hosts directory: pass it with --hosts-dir".into(),
            ));
        };
        // The mirror first: also if a later step fails, containerd no longer uses dray.
        let mode = self.dry_run.mode();
        let done = HostsDir::new(&dir).uninstall(mode).map_err(failed);
        let reported = done.and_then(|done| report(&done, mode));
        let restored = found.map_or(Ok(()), |found| self.restore_config(&found, &dir));
        let emptied = self.cache_dir.as_deref().map_or(Ok(()), |dir| self.empty_cache(dir));
        if let Some(duration) = self.sleep_after {
            std::thread::sleep(duration);
        }
        reported.and(restored).and(emptied)
    }

    fn empty_cache(&self, dir: &Path) -> Result<(), Failure> {
        if self.dry_run.mode() == Mode::DryRun {
            print(&format!("{}: the cache would be deleted", dir.display()));
            return Ok(());
        }
        if ownership::empty(dir).map_err(|error| Failure::Failed(format!("{}: {error}", dir.display())))? {
            print(&format!("{}: cache deleted", dir.display()));
        }
        Ok(())
    }

    /// Reverts `install --patch-config`.
    fn restore_config(&self, found: &InstalledContainerd, dir: &Path) -> Result<(), Failure> {
        let (file, section, version) = found.patch_target();
        let config = ConfigFile::new(&file);
        if !config.backup_path().exists() {
            return Ok(());
        }
        let dir = std::path::absolute(dir).map_err(|e| Failure::Failed(format!("{}: {e}", dir.display())))?;
        let mode = self.dry_run.mode();
        match config.restore(section, version, &dir.to_string_lossy(), mode).map_err(failed)? {
            Patched::Changed { .. } if mode == Mode::DryRun => {
                print(&format!("{}: would be restored", file.display()));
            }
            Patched::Changed { .. } => print(&format!("{}: restored. Restart containerd", file.display())),
            Patched::Edited => print(&format!(
                "{}: not restored, because it was edited after install; the original file is {}",
                file.display(),
                config.backup_path().display()
            )),
            Patched::Nothing => {}
        }
        Ok(())
    }
}

impl Check {
    fn run(self) -> Result<(), Failure> {
        let (diagnosis, distribution, mirrors) = self.diagnose()?;
        let mut is_wrong = diagnosis.is_wrong();
        for finding in &diagnosis.findings {
            print(&format!("{:<5} {}: {}", finding.severity.as_str(), finding.code, finding.what));
            finding.remedy.iter().for_each(|line| print(&format!("        {line}")));
        }
        let responses = super::block_on(async {
            let mut responses = Vec::new();
            for (mirror, authority) in &mirrors {
                responses.push(proof::probe(mirror, authority.as_deref()).await);
            }
            responses
        })?;
        let mut has_dray = false;
        for ((mirror, _), response) in mirrors.iter().zip(responses) {
            has_dray |= matches!(response, MirrorResponse::Dray);
            print(&match response {
                MirrorResponse::Dray => format!("ok    mirror: {mirror} is a dray"),
                MirrorResponse::Other(status) => {
                    format!("note  mirror: {mirror} is not a dray: it responds with status {status}")
                }
                MirrorResponse::Unreachable(error) => format!("wrong mirror: {mirror} does not respond: {error}"),
            });
        }
        is_wrong |= !mirrors.is_empty() && !has_dray;
        if !is_wrong && !self.skip_pull {
            let socket = self.socket.or(diagnosis.socket).unwrap_or_else(|| distribution.socket.into());
            match proof::pull(&socket) {
                proof::RuntimePull::Succeeded => {
                    print(&format!("ok    pull: {} pulled an image that only dray has", socket.display()));
                }
                proof::RuntimePull::Failed(error) => {
                    is_wrong = true;
                    print(&format!(
                        "wrong pull: {} cannot pull an image that only dray has: {error}",
                        socket.display()
                    ));
                    print("        Restart containerd if its configuration was changed after its last start.");
                }
                proof::RuntimePull::NotTried(why) => print(&format!("note  pull: not tried: {why}")),
            }
        }
        if is_wrong { Err(Failure::Failed("containerd does not use dray as a mirror".into())) } else { Ok(()) }
    }

    /// The findings, the distribution, and the mirrors in its hosts directory.
    fn diagnose(&self) -> Result<(Diagnosis, Distribution, Vec<NamedMirror>), Failure> {
        let (mut diagnosis, distribution) = self.diagnose_config()?;
        let mut mirrors = Vec::new();
        if let Some(dir) = diagnosis.hosts_dir.clone() {
            let urls = diagnosis.inspect_hosts_dir(&dir).map_err(failed)?;
            let file = HostsDir::new(&dir).default_file();
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            mirrors = urls.into_iter().map(|url| (url.clone(), hosts_toml::authority(&text, &url))).collect();
            if !mirrors.is_empty() && !text.is_empty() {
                let names = mirrors.iter().map(|(url, _)| url.as_str()).collect::<Vec<_>>().join(", ");
                diagnosis.findings.push(good("hosts", format!("{} names {names}", file.display())));
            }
        }
        Ok((diagnosis, distribution, mirrors))
    }

    fn diagnose_config(&self) -> Result<(Diagnosis, Distribution), Failure> {
        let hosts_dir = self.location.hosts_dir.as_deref();
        if let (true, Some(dir)) = (self.skip_config, hosts_dir) {
            return Ok((Diagnosis::without_config(dir), distributions::DEFAULT));
        }
        let found = match self.location.load()? {
            Ok(found) => found,
            Err(error) => return Ok((Diagnosis::unreadable(&error), distributions::DEFAULT)),
        };
        let mut diagnosis = found.diagnose(hosts_dir);
        let version_from = if found.is_guess {
            "a guess from its configuration; set it with --containerd-version"
        } else {
            "as it reports"
        };
        let what = format!("{} of containerd {} ({version_from})", found.config.display(), found.version);
        diagnosis.findings.insert(0, good("config", what));
        Ok((diagnosis, found.distribution.unwrap_or(distributions::DEFAULT)))
    }
}

impl SyncMirror {
    /// Runs until a signal.
    fn run(self) -> Result<(), Failure> {
        super::log_to_stderr()?;
        super::block_on(reconciler::sync(self.hosts_dir, self.mirror, self.ca))?
            .map_err(|e| Failure::Failed(e.to_string()))
    }
}

impl ContainerdLocation {
    fn find(&self) -> Result<InstalledContainerd, Failure> {
        self.load()?
            .map_err(|error| Failure::Failed(format!("{error}; containerd does not start with this configuration")))
    }

    /// The inner error is one that containerd has as well: it cannot read the configuration.
    fn load(&self) -> Result<Result<InstalledContainerd, LoadError>, Failure> {
        let distribution = self.config.as_deref().map_or_else(|| Some(distributions::detect()), distributions::of);
        let config = self.config.clone().or(distribution.map(|found| found.config.into())).unwrap_or_default();
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
        let known = self.containerd_version.or_else(|| if is_piped { None } else { installed_version() });
        let version = known.unwrap_or_else(|| Version::guessed(&main));
        let files = if is_piped { Ok(vec![main]) } else { daemon::load(&config, version) };
        Ok(files.map(|files| InstalledContainerd { config, distribution, files, version, is_guess: known.is_none() }))
    }
}

impl InstalledContainerd {
    fn diagnose(&self, hosts_dir: Option<&Path>) -> Diagnosis {
        let wanted = self.hosts_dir();
        let mut diagnosis = Diagnosis::of(&self.files, self.version, &self.main(), &wanted.to_string_lossy());
        if let Some(note) = self.distribution.and_then(|distribution| distribution.note) {
            diagnosis.add_note("distribution", note);
        }
        if let Some(dir) = hosts_dir {
            diagnosis.require(dir);
        }
        diagnosis
    }

    /// The first directory of the configured `config_path`; if there is none, that of the distribution.
    fn hosts_dir(&self) -> PathBuf {
        let named = Daemon::read(&self.files, self.version).config_path;
        let first =
            named.as_ref().and_then(|path| path.as_str()?.split(':').next()).filter(|path| path.starts_with('/'));
        first.map_or_else(|| self.distribution.unwrap_or(distributions::DEFAULT).hosts_dir.into(), PathBuf::from)
    }

    /// The file to edit; with standard input, the default one.
    fn main(&self) -> PathBuf {
        if self.config == Path::new("-") { distributions::DEFAULT.config.into() } else { self.config.clone() }
    }

    /// The file, section and configuration version in which to set `config_path`.
    fn patch_target(&self) -> (PathBuf, &'static str, i64) {
        let version = self
            .files
            .first()
            .map_or(self.version.newest_config().min(3), |_| Daemon::read(&self.files, self.version).config_version);
        (self.main(), self.version.section(version), version)
    }
}

/// Checks the file of a certificate authority: if containerd cannot read it, every pull fails, also those that do not
/// use the mirror.
fn authority(file: &Path) -> Result<PathBuf, Failure> {
    let failure = |what: &str| Failure::Usage(format!("--ca {}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| failure(&error.to_string()))?;
    if !text.contains("-----BEGIN CERTIFICATE-----") {
        return Err(failure("the file does not contain a certificate in PEM"));
    }
    std::path::absolute(file).map_err(|error| failure(&error.to_string()))
}

/// The version of the first containerd program that runs.
fn installed_version() -> Option<Version> {
    CONTAINERD_PROGRAMS.iter().find_map(|program| {
        let output = std::process::Command::new(program).arg("--version").output().ok()?;
        String::from_utf8_lossy(&output.stdout).parse().ok()
    })
}

fn report(outcome: &Changes, mode: Mode) -> Result<(), Failure> {
    for change in &outcome.changes {
        print(&change.to_string());
        if mode == Mode::DryRun {
            print(change.diff().trim_end());
        }
    }
    if outcome.changes.is_empty() {
        print("nothing to do");
    }
    outcome.remarks.iter().for_each(|remark| print(&remark.to_string()));
    if outcome.remarks.iter().any(|remark| remark.is_failure()) {
        return Err(Failure::Failed("some changes failed: the lines above name them".into()));
    }
    Ok(())
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::Failed(error.to_string())
}
