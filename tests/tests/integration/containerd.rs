//! Mirror configuration of containerd: written and removed by hand, by a serving dray, and by processes that are killed
//! half-way.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::{Start, binary};
use dray_tests::eventually;
use dray_tests::process::{output, run};
use dray_tests::tool;
use rustix::process::Signal;

const FOREIGN: &str = "server = \"https://x\"\n\n[host.\"https://a\"]\n";

/// Every file of a directory and its content. Directories end with a slash.
fn tree(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        for entry in std::fs::read_dir(&path).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if path.is_dir() {
                pending.push(path);
                found.insert(name.join(""), String::new());
            } else {
                found.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// The files that containerd reads: the hosts.toml of each directory that is not hidden.
fn seen(dir: &Path) -> BTreeMap<PathBuf, Option<String>> {
    let dirs = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let dirs = dirs.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
    dirs.map(|path| (path.clone(), std::fs::read_to_string(path.join("hosts.toml")).ok())).collect()
}

fn write_foreign_hosts(dir: &Path) {
    for (name, text) in [("docker.io", FOREIGN), ("quay.io", "")] {
        std::fs::create_dir(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join("hosts.toml"), text).unwrap();
    }
}

fn install(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let arguments = ["containerd", "install", "--extend", "--mirror", "http://127.0.0.1:5050", "--hosts-dir", dir];
    arguments.map(str::to_owned).to_vec()
}

fn uninstall(dir: &Path) -> Vec<String> {
    ["containerd", "uninstall", "--hosts-dir", dir.to_str().unwrap()].map(str::to_owned).to_vec()
}

/// System calls that change a file system.
const WRITES: [&str; 14] = [
    "openat",
    "write",
    "fsync",
    "fchmod",
    "chmod",
    "chown",
    "lchown",
    "fchownat",
    "rename",
    "renameat2",
    "mkdir",
    "unlink",
    "unlinkat",
    "rmdir",
];

/// Kills the process at the `nth` call of this name. False: the process ended before.
fn killed_at(arguments: &[String], call: &str, nth: u32) -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=KILL:when={nth}")]).arg(binary()).args(arguments);
    let ended = output(&mut command).status;
    assert!(ended.success() || ended.signal() == Some(9) || ended.code() == Some(137), "{call} {nth}: {ended}");
    !ended.success()
}

/// Kills a command at each of its calls. After each kill every file is either the old or the new one, and the same
/// command completes.
fn crash_at_every_write(prepare: impl Fn(&Path), command: impl Fn(&Path) -> Vec<String>) {
    let after = tempfile::tempdir().unwrap();
    prepare(after.path());
    run(Command::new(binary()).args(command(after.path())));
    let (new, wanted) = (seen(after.path()), tree(after.path()));
    let relative = |seen: BTreeMap<PathBuf, Option<String>>, root: &Path| -> BTreeMap<PathBuf, Option<String>> {
        seen.into_iter().map(|(path, text)| (path.strip_prefix(root).unwrap().to_owned(), text)).collect()
    };
    let new = relative(new, after.path());
    let mut kills = 0;
    for call in WRITES {
        for nth in 1.. {
            let dir = tempfile::tempdir().unwrap();
            prepare(dir.path());
            let old = relative(seen(dir.path()), dir.path());
            if !killed_at(&command(dir.path()), call, nth) {
                break;
            }
            kills += 1;
            let now = relative(seen(dir.path()), dir.path());
            let names = old.keys().chain(new.keys()).chain(now.keys());
            for name in names {
                let (now, old, new) = (now.get(name), old.get(name), new.get(name));
                assert!(now == old || now == new, "{call} {nth}: {}: {now:?}", name.display());
            }
            run(Command::new(binary()).args(command(dir.path())));
            assert_eq!(tree(dir.path()), wanted, "{call} {nth}");
        }
    }
    assert!(kills > 20, "{kills} kills");
}

#[test]
fn install_killed_at_any_call_leaves_whole_files() {
    crash_at_every_write(write_foreign_hosts, install);
}

#[test]
fn uninstall_killed_at_any_call_leaves_whole_files() {
    let prepare = |dir: &Path| {
        write_foreign_hosts(dir);
        run(Command::new(binary()).args(install(dir)));
    };
    crash_at_every_write(prepare, uninstall);
    let dir = tempfile::tempdir().unwrap();
    write_foreign_hosts(dir.path());
    let before = tree(dir.path());
    run(Command::new(binary()).args(install(dir.path())));
    run(Command::new(binary()).args(uninstall(dir.path())));
    assert_eq!(tree(dir.path()), before);
}

fn check(containerd: &Containerd) -> (Output, String) {
    let mut path = std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect::<Vec<_>>();
    path.insert(0, tool("crictl").parent().unwrap().to_owned());
    let mut command = Command::new(binary());
    command.env("PATH", std::env::join_paths(path).unwrap());
    let output = output(command.args(["containerd", "check", "--config"]).arg(containerd.config()));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, printed)
}

async fn check_detects_mirror(version: Version) {
    let mut dray = Start::new("").run();
    let containerd = Containerd::start(version).await;
    let (output, printed) = check(&containerd);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("wrong no-mirror"), "{printed}");
    containerd.use_mirror(&dray);
    let (output, printed) = check(&containerd);
    assert!(output.status.success() && printed.contains("ok    pull"), "{printed}\n{}", containerd.log());
    assert_eq!(dray.metric("dray_upstream_requests_total").await, 0);
    dray.process().kill();
    let (output, printed) = check(&containerd);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert!(printed.contains("does not respond"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_of_containerd_1_pulls_through_the_cri_plugin() {
    check_detects_mirror(Version::V1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_of_containerd_2_pulls_through_the_cri_plugin() {
    check_detects_mirror(Version::V2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn serving_dray_configures_mirror_and_reverts_it() {
    let dir = tempfile::tempdir().unwrap();
    write_foreign_hosts(dir.path());
    std::fs::create_dir(dir.path().join("_default")).unwrap();
    std::fs::write(dir.path().join("_default/hosts.toml"), FOREIGN).unwrap();
    let before = tree(dir.path());
    let start = Start::new(format!("[containerd]\nhosts_dir = \"{}\"\n", dir.path().display()));
    let mut dray = start.run();
    let file = dir.path().join("_default/hosts.toml");
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let is_configured = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("the mirror is configured", is_configured).await;
    // Another program, such as k3s, rewrites the file.
    std::fs::write(&file, FOREIGN).unwrap();
    eventually("the mirror is configured again", is_configured).await;
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    assert_eq!(tree(dir.path()), before);
    // A killed process cannot revert the file: the next process takes over and reverts it at its end.
    let mut dray = dray.start().clone().run();
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let is_configured = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("the mirror is configured", is_configured).await;
    dray.process().kill();
    assert!(std::fs::read_to_string(&file).unwrap().contains(&url));
    let mut dray = dray.start().clone().run();
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let is_configured = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("the mirror of the new process is configured", is_configured).await;
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    assert_eq!(tree(dir.path()), before);
}

#[test]
fn missing_hosts_dir_fails_the_start() {
    let output = output(&mut Start::new("[containerd]\nhosts_dir = \"/nowhere\"\n").command());
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{printed}");
    assert!(printed.contains("containerd.hosts_dir") && printed.contains("config_path"), "{printed}");
}

#[test]
fn config_toml_patched_by_install_is_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (config, hosts) = (dir.path().join("config.toml"), dir.path().join("certs.d"));
    let text = "# mine\nversion = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"p:1\" # keep\n";
    std::fs::write(&config, text).unwrap();
    let containerd = |arguments: &[&str]| {
        let mut command = Command::new(binary());
        command.args(["containerd"]).args(arguments).args(["--containerd-version", "1.7", "--config"]).arg(&config);
        output(&mut command)
    };
    let hosts_dir = hosts.to_str().unwrap();
    let mirror = ["--mirror", "http://127.0.0.1:5050"];
    // Without a config_path containerd reads no hosts directory, and the error names the fix.
    let failed = containerd(&["install", mirror[0], mirror[1]]);
    let printed = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(
        failed.status.code() == Some(1) && printed.contains("config_path = \"/etc/containerd/certs.d\""),
        "{printed}"
    );
    let done = containerd(&["install", "--patch-config", "--hosts-dir", hosts_dir, mirror[0], mirror[1]]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let patched = std::fs::read_to_string(&config).unwrap();
    assert!(patched.starts_with(text) && patched.contains(&format!("config_path = \"{hosts_dir}\"")), "{patched}");
    assert!(hosts.join("_default/hosts.toml").exists());
    let undone = containerd(&["uninstall"]);
    assert!(undone.status.success(), "{}", String::from_utf8_lossy(&undone.stderr));
    assert_eq!(std::fs::read_to_string(&config).unwrap(), text);
    assert_eq!(std::fs::read_dir(&hosts).unwrap().count(), 0);
}

/// Arguments that would make pulls fail, or have no effect, are errors. Duplicate arguments count once.
#[test]
fn invalid_arguments_fail_and_duplicates_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("certs.d");
    std::fs::create_dir(&hosts).unwrap();
    let containerd = |arguments: &[&str]| {
        let mut command = Command::new(binary());
        let got = output(command.args(["containerd"]).args(arguments).arg("--hosts-dir").arg(&hosts));
        let printed = String::from_utf8_lossy(&got.stdout).into_owned() + &String::from_utf8_lossy(&got.stderr);
        (got.status.code(), printed)
    };
    let url = "http://127.0.0.1:5050";
    let install = |more: &[&str]| containerd(&[&["install", "--mirror", url], more].concat());
    let text = dir.path().join("no.pem");
    std::fs::write(&text, "no certificate").unwrap();
    for (more, code, expected) in [
        (&["--ca", "/nowhere.pem"][..], 2, "--ca /nowhere.pem"),
        (&["--ca", text.to_str().unwrap()], 2, "does not contain a certificate in PEM"),
        (&["--registry", "localhost:5000"], 1, "on this machine"),
        (&["--registry", "reg:5000:6"], 1, "not a valid registry host"),
    ] {
        let (status, printed) = install(more);
        assert!(status == Some(code) && printed.contains(expected), "{more:?}: {status:?} {printed}");
    }
    assert_eq!(std::fs::read_dir(&hosts).unwrap().count(), 0);
    std::os::unix::fs::symlink("/nowhere", hosts.join("_default")).unwrap();
    let (status, printed) = install(&[]);
    assert!(status == Some(1) && printed.contains("does not exist: remove the link"), "{printed}");
    std::fs::remove_file(hosts.join("_default")).unwrap();
    let (status, printed) = install(&["--registry", "index.docker.io", "--registry", "Docker.IO", "--mirror", url]);
    assert_eq!(status, Some(0), "{printed}");
    let files = tree(&hosts);
    let file = &files[Path::new("docker.io/hosts.toml")];
    assert_eq!((files.len(), file.matches("[host.").count()), (3, 1), "{files:?}");
    // No mirror responds on that port, but the check still detects the configuration.
    let config = dir.path().join("config.toml");
    let path =
        format!("version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{}'\n", hosts.display());
    std::fs::write(&config, path).unwrap();
    let (_, printed) =
        containerd(&["check", "--skip-pull", "--containerd-version", "1.7", "--config", config.to_str().unwrap()]);
    assert!(printed.contains("for docker.io only") && !printed.contains("no mirror is used"), "{printed}");
}

/// containerd uses the first directory of a list that has a match: `_default` there hides the other directories.
#[test]
fn install_hiding_other_hosts_directories_names_them() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["certs.d", "docker"].map(|name| dir.path().join(name));
    std::fs::create_dir(&first).unwrap();
    std::fs::create_dir_all(second.join("registry.corp")).unwrap();
    let config = dir.path().join("config.toml");
    let text = format!(
        "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{}:{}'\n",
        first.display(),
        second.display()
    );
    std::fs::write(&config, &text).unwrap();
    for more in [&[][..], &["--patch-config"]] {
        let mut command = Command::new(binary());
        command.args(["containerd", "install", "--mirror", "http://127.0.0.1:5050", "--containerd-version", "1.7"]);
        let failed = output(command.args(more).arg("--config").arg(&config));
        let printed = String::from_utf8_lossy(&failed.stderr);
        assert!(failed.status.code() == Some(1) && printed.contains("docker/registry.corp"), "{more:?}: {printed}");
    }
    assert_eq!(std::fs::read_to_string(&config).unwrap(), text);
    assert_eq!(std::fs::read_dir(&first).unwrap().count(), 0);
}

/// After a restart the node still has the old mirror configuration, while dray may not run yet.
#[tokio::test(flavor = "multi_thread")]
async fn leftover_configuration_of_a_dead_mirror_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = format!("http://127.0.0.1:{}", dray_tests::process::free_port());
    run(Command::new(binary()).args(["containerd", "install", "--mirror", &mirror, "--hosts-dir"]).arg(dir.path()));
    let file = dir.path().join("_default/hosts.toml");
    assert!(file.exists());
    let mut keep = Command::new(binary());
    keep.args(["containerd", "sync", "--mirror", &mirror, "--hosts-dir"]).arg(dir.path());
    let mut keep = dray_tests::process::Process::spawn(&mut keep);
    eventually("the mirror is removed", async || (!file.exists()).then_some(())).await;
    keep.signal(Signal::TERM);
    keep.wait();
    assert!(!file.exists());
}

/// As the chart's `helm test` does without `containerd.configFile`.
#[tokio::test(flavor = "multi_thread")]
async fn check_without_a_configuration_requests_the_mirror_alone() {
    let dir = tempfile::tempdir().unwrap();
    let check = |more: &[&str]| {
        let mut command = Command::new(binary());
        let done = output(command.args(["containerd", "check", "--skip-config", "--skip-pull"]).args(more));
        (done.status.code(), [done.stdout, done.stderr].map(|text| String::from_utf8(text).unwrap()).concat())
    };
    let hosts_dir = ["--hosts-dir", dir.path().to_str().unwrap()];
    let dray = Start::new(String::new()).run();
    let dead = format!("http://127.0.0.1:{}", dray_tests::process::free_port());
    for (mirror, code, expected) in [
        (None, 1, "wrong no-mirror: "),
        (Some(dead.as_str()), 1, "does not respond"),
        (Some(dray.url("").as_str()), 0, "is a dray"),
    ] {
        if let Some(mirror) = mirror {
            run(Command::new(binary()).args(["containerd", "install", "--mirror", mirror]).args(hosts_dir));
        }
        let (status, printed) = check(&hosts_dir);
        assert!(status == Some(code) && printed.contains(expected), "{mirror:?}: {status:?} {printed}");
        assert!(printed.starts_with("note  config: not read"), "{printed}");
    }
    // Which hosts directory? And a configuration that is not read is not needed.
    let (status, printed) = check(&[]);
    assert!(status == Some(2) && printed.contains("--hosts-dir"), "{printed}");
    let (status, printed) = check(&[hosts_dir[0], hosts_dir[1], "--config", "/nowhere"]);
    assert!(status == Some(2) && printed.contains("cannot be used with"), "{printed}");
}
