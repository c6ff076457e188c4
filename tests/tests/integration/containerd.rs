//! containerd is pointed at dray and back: by hand, by a serving dray, and by processes that are killed half-way.

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

/// Every file of a directory and what is in it; directories end with a slash.
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

/// What containerd sees: the hosts.toml of each directory that it may look into.
fn seen(dir: &Path) -> BTreeMap<PathBuf, Option<String>> {
    let dirs = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let dirs = dirs.filter(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
    dirs.map(|path| (path.clone(), std::fs::read_to_string(path.join("hosts.toml")).ok())).collect()
}

fn fill(dir: &Path) {
    for (name, text) in [("docker.io", FOREIGN), ("quay.io", "")] {
        std::fs::create_dir(dir.join(name)).unwrap();
        std::fs::write(dir.join(name).join("hosts.toml"), text).unwrap();
    }
}

fn install(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let words = ["containerd", "install", "--extend", "--mirror", "http://127.0.0.1:5050", "--hosts-dir", dir];
    words.map(str::to_owned).to_vec()
}

fn uninstall(dir: &Path) -> Vec<String> {
    ["containerd", "uninstall", "--hosts-dir", dir.to_str().unwrap()].map(str::to_owned).to_vec()
}

/// Everything that changes a file system.
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

/// Whether the process was killed at the `nth` call of that name.
fn killed_at(arguments: &[String], call: &str, nth: u32) -> bool {
    let mut command = Command::new("strace");
    command.args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:signal=KILL:when={nth}")]).arg(binary()).args(arguments);
    let ended = output(&mut command).status;
    assert!(ended.success() || ended.signal() == Some(9) || ended.code() == Some(137), "{call} {nth}: {ended}");
    !ended.success()
}

/// Kills a command at each of its calls; after each the files are the old ones or the new ones, one by one, and
/// the same command finishes.
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
fn install_is_whole_wherever_it_is_killed() {
    crash_at_every_write(fill, install);
}

#[test]
fn uninstall_is_whole_wherever_it_is_killed() {
    let prepare = |dir: &Path| {
        fill(dir);
        run(Command::new(binary()).args(install(dir)));
    };
    crash_at_every_write(prepare, uninstall);
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
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
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, said)
}

async fn check_proves_it(version: Version) {
    let mut dray = Start::new("").run();
    let containerd = Containerd::start(version).await;
    let (output, said) = check(&containerd);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("wrong no-mirror"), "{said}");
    containerd.use_mirror(&dray);
    let (output, said) = check(&containerd);
    assert!(output.status.success() && said.contains("ok    pull"), "{said}\n{}", containerd.log());
    assert_eq!(dray.metric("dray_origin_requests_total").await, 0);
    dray.process().kill();
    let (output, said) = check(&containerd);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("does not answer"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_pulls_through_the_cri_plugin_of_containerd_1() {
    check_proves_it(Version::V1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn check_pulls_through_the_cri_plugin_of_containerd_2() {
    check_proves_it(Version::V2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_serving_dray_points_containerd_here_and_takes_it_back() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path());
    std::fs::create_dir(dir.path().join("_default")).unwrap();
    std::fs::write(dir.path().join("_default/hosts.toml"), FOREIGN).unwrap();
    let before = tree(dir.path());
    let start = Start::new(format!("[containerd]\nhosts_dir = \"{}\"\n", dir.path().display()));
    let mut dray = start.run();
    let file = dir.path().join("_default/hosts.toml");
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let points_here = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("containerd is pointed here", points_here).await;
    // Somebody, such as k3s, writes the file anew.
    std::fs::write(&file, FOREIGN).unwrap();
    eventually("it is pointed here again", points_here).await;
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    assert_eq!(tree(dir.path()), before);
    // One that was killed could not take it back: the next one goes on, and does.
    let mut dray = dray.start().clone().run();
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let points_here = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("containerd is pointed here", points_here).await;
    dray.process().kill();
    assert!(std::fs::read_to_string(&file).unwrap().contains(&url));
    let mut dray = dray.start().clone().run();
    let url = format!("[host.\"http://{}\"]", dray.registry);
    let points_here = async || std::fs::read_to_string(&file).ok().filter(|text| text.contains(&url)).map(drop);
    eventually("containerd is pointed at the new one", points_here).await;
    dray.process().signal(Signal::TERM);
    dray.process().wait();
    assert_eq!(tree(dir.path()), before);
}

#[test]
fn a_hosts_dir_that_is_not_there_is_an_error() {
    let output = output(&mut Start::new("[containerd]\nhosts_dir = \"/nowhere\"\n").command());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("containerd.hosts_dir") && said.contains("config_path"), "{said}");
}

#[test]
fn config_toml_is_patched_and_restored() {
    let dir = tempfile::tempdir().unwrap();
    let (config, hosts) = (dir.path().join("config.toml"), dir.path().join("certs.d"));
    let text = "# mine\nversion = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"p:1\" # keep\n";
    std::fs::write(&config, text).unwrap();
    let containerd = |words: &[&str]| {
        let mut command = Command::new(binary());
        command.args(["containerd"]).args(words).args(["--containerd-version", "1.7", "--config"]).arg(&config);
        output(&mut command)
    };
    let hosts_dir = hosts.to_str().unwrap();
    let mirror = ["--mirror", "http://127.0.0.1:5050"];
    // Without a config_path there is nothing to write to, and it says what to do.
    let refused = containerd(&["install", mirror[0], mirror[1]]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("config_path = \"/etc/containerd/certs.d\""), "{said}");
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

/// What would make pulls fail, or do nothing, is refused or said; what is said twice counts once.
#[test]
fn odd_words_are_refused_or_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join("certs.d");
    std::fs::create_dir(&hosts).unwrap();
    let containerd = |words: &[&str]| {
        let mut command = Command::new(binary());
        let got = output(command.args(["containerd"]).args(words).arg("--hosts-dir").arg(&hosts));
        let said = String::from_utf8_lossy(&got.stdout).into_owned() + &String::from_utf8_lossy(&got.stderr);
        (got.status.code(), said)
    };
    let url = "http://127.0.0.1:5050";
    let install = |more: &[&str]| containerd(&[&["install", "--mirror", url], more].concat());
    let text = dir.path().join("no.pem");
    std::fs::write(&text, "no certificate").unwrap();
    for (more, code, wants) in [
        (&["--ca", "/nowhere.pem"][..], 2, "--ca /nowhere.pem"),
        (&["--ca", text.to_str().unwrap()], 2, "no certificate in PEM"),
        (&["--registry", "localhost:5000"], 1, "on this machine"),
        (&["--registry", "reg:5000:6"], 1, "no registry host"),
    ] {
        let (status, said) = install(more);
        assert!(status == Some(code) && said.contains(wants), "{more:?}: {status:?} {said}");
    }
    assert_eq!(std::fs::read_dir(&hosts).unwrap().count(), 0);
    std::os::unix::fs::symlink("/nowhere", hosts.join("_default")).unwrap();
    let (status, said) = install(&[]);
    assert!(status == Some(1) && said.contains("leads nowhere"), "{said}");
    std::fs::remove_file(hosts.join("_default")).unwrap();
    let (status, said) = install(&["--registry", "index.docker.io", "--registry", "Docker.IO", "--mirror", url]);
    assert_eq!(status, Some(0), "{said}");
    let files = tree(&hosts);
    let file = &files[Path::new("docker.io/hosts.toml")];
    assert_eq!((files.len(), file.matches("[host.").count()), (3, 1), "{files:?}");
    // Nobody answers there, but that it is used is understood.
    let config = dir.path().join("config.toml");
    let path =
        format!("version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '{}'\n", hosts.display());
    std::fs::write(&config, path).unwrap();
    let (_, said) =
        containerd(&["check", "--no-pull", "--containerd-version", "1.7", "--config", config.to_str().unwrap()]);
    assert!(said.contains("for docker.io only") && !said.contains("no mirror is used"), "{said}");
}

/// `_default` in the first directory of a list hides what the others have.
#[test]
fn directories_that_would_be_hidden_are_named() {
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
        let refused = output(command.args(more).arg("--config").arg(&config));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(1) && said.contains("docker/registry.corp"), "{more:?}: {said}");
    }
    assert_eq!(std::fs::read_to_string(&config).unwrap(), text);
    assert_eq!(std::fs::read_dir(&first).unwrap().count(), 0);
}

/// A node that was restarted has the lines of before, and nobody may be there yet.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_there_of_before_goes_while_the_mirror_is_silent() {
    let dir = tempfile::tempdir().unwrap();
    let mirror = format!("http://127.0.0.1:{}", dray_tests::process::free_port());
    run(Command::new(binary()).args(["containerd", "install", "--mirror", &mirror, "--hosts-dir"]).arg(dir.path()));
    let file = dir.path().join("_default/hosts.toml");
    assert!(file.exists());
    let mut keep = Command::new(binary());
    keep.args(["containerd", "keep", "--mirror", &mirror, "--hosts-dir"]).arg(dir.path());
    let mut keep = dray_tests::process::Process::spawn(&mut keep);
    eventually("it is taken back", async || (!file.exists()).then_some(())).await;
    keep.signal(Signal::TERM);
    keep.wait();
    assert!(!file.exists());
}
