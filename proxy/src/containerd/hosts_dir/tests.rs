use std::collections::BTreeMap;

use super::*;

const FOREIGN: &str = "# mine\r\nserver = \"https://x\"\n\n[host.\"https://a\"]\n";

fn mirrors(url: &str) -> Mirrors {
    Mirrors::one(url.parse().unwrap())
}

fn ours() -> Mirrors {
    mirrors("http://127.0.0.1:5050")
}

/// Everything in a directory: path to content, owner and mode.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (String, FileOwner)> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let owner = FileOwner::of(&path).unwrap();
        let content = if path.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            "/".to_owned()
        } else {
            fs::read_to_string(&path).unwrap()
        };
        found.insert(path, (content, owner));
    }
    found
}

fn put(root: &Path, path: &str, content: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn hosts_of(root: &Path, dir: &str) -> Vec<String> {
    hosts_toml::hosts(&fs::read_to_string(root.join(dir).join(HOSTS)).unwrap())
}

#[test]
fn who_may_not_write_is_told_what_helps() {
    let hosts = HostsDir::new("/etc/containerd/certs.d");
    let failed = |kind: io::ErrorKind| HostsError::Io("/etc/containerd/certs.d/_default".into(), kind.into());
    let remedy = hosts.remedy(&failed(io::ErrorKind::PermissionDenied), (998, 997)).unwrap();
    assert!(remedy.ends_with("dray hand-over --to 998:997 --hosts-dir /etc/containerd/certs.d"), "{remedy}");
    assert_eq!(hosts.remedy(&failed(io::ErrorKind::NotADirectory), (998, 997)), None);
    assert_eq!(hosts.remedy(&failed(io::ErrorKind::PermissionDenied), (0, 0)), None);
}

#[test]
fn installs_once_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let before = tree(dir.path());
    let hosts = HostsDir::new(dir.path());
    let planned = hosts.install(&ours(), &MirroredRegistries::Default, Mode::DryRun).unwrap();
    assert!(planned.changes[0].diff().contains("+[host.\"http://127.0.0.1:5050\"]"), "{}", planned.changes[0].diff());
    assert_eq!(tree(dir.path()), before);
    let done = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(done.changes, planned.changes);
    assert_eq!(hosts_of(dir.path(), DEFAULT), ["http://127.0.0.1:5050"]);
    assert!(hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap().changes.is_empty());
    hosts.install(&mirrors("http://127.0.0.1:6060"), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(hosts_of(dir.path(), DEFAULT), ["http://127.0.0.1:6060"]);
    hosts.uninstall(Mode::Apply).unwrap();
    assert_eq!(tree(dir.path()), before);
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
}

#[test]
fn what_was_there_stays_and_comes_back_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "_default/hosts.toml", FOREIGN);
    put(dir.path(), "docker.io/hosts.toml", "");
    put(dir.path(), "reg.corp_5000_/ca.crt", "PEM");
    fs::create_dir(dir.path().join("quay.io")).unwrap();
    put(dir.path(), "localhost:32000/hosts.toml", FOREIGN);
    put(dir.path(), "broken.io/hosts.toml", "server = ");
    put(dir.path(), ".hidden/hosts.toml", "server = ");
    FileOwner { mode: 0o640, ..FileOwner::of(dir.path()).unwrap() }
        .give(&dir.path().join("_default/hosts.toml"))
        .unwrap();
    let before = tree(dir.path());
    let hosts = HostsDir::new(dir.path());
    let done = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let shadows = done.remarks.iter().filter(|remark| matches!(remark, Remark::Shadows(_))).count();
    assert_eq!(shadows, 4, "{:?}", done.remarks);
    let done = hosts.install(&ours(), &MirroredRegistries::Every, Mode::Apply).unwrap();
    assert_eq!(done.remarks.len(), 2, "{:?}", done.remarks);
    assert_eq!(done.remarks.iter().filter(|remark| remark.is_failure()).count(), 1);
    assert_eq!(hosts_of(dir.path(), DEFAULT), ["http://127.0.0.1:5050", "https://a"]);
    for name in ["docker.io", "quay.io", "reg.corp_5000_"] {
        assert_eq!(hosts_of(dir.path(), name), ["http://127.0.0.1:5050"], "{name}");
    }
    let corp = fs::read_to_string(dir.path().join("reg.corp_5000_/hosts.toml")).unwrap();
    assert!(corp.contains("server = \"https://reg.corp:5000\"\nca = [\"ca.crt\"]\n"), "{corp}");
    let default = FileOwner::of(&dir.path().join("_default/hosts.toml")).unwrap();
    assert_eq!(default.mode, 0o640);
    hosts.uninstall(Mode::Apply).unwrap();
    assert_eq!(tree(dir.path()), before);
}

#[test]
fn what_a_person_changed_since_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    put(dir.path(), "_default/hosts.toml", FOREIGN);
    hosts
        .install(&ours(), &MirroredRegistries::Named(vec!["docker.io".into(), "reg.corp:5000".into()]), Mode::Apply)
        .unwrap();
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let append = |name: &str, more: &str| {
        let path = dir.path().join(name).join(HOSTS);
        fs::write(&path, fs::read_to_string(&path).unwrap() + more).unwrap();
    };
    append("_default", "# a note\n");
    append("docker.io", "[host.\"https://b\"]\n");
    let path = dir.path().join("reg.corp:5000").join(HOSTS);
    fs::write(&path, fs::read_to_string(&path).unwrap().replace("1s", "2s")).unwrap();
    let done = hosts.uninstall(Mode::Apply).unwrap();
    let left: Vec<_> = tree(dir.path()).into_iter().filter(|(_, (content, _))| content != "/").collect();
    let names: Vec<_> = left.iter().map(|(path, _)| path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["_default/hosts.toml", "docker.io/hosts.toml", "reg.corp:5000/hosts.toml"]);
    assert_eq!(left[0].1.0, format!("{FOREIGN}# a note\n"));
    assert_eq!(left[1].1.0, "[host.\"https://b\"]\n");
    assert!(done.remarks.iter().any(Remark::is_failure), "{:?}", done.remarks);
}

#[test]
fn a_directory_is_handed_over_and_given_back() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root gives files away.
    }
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    let default = dir.path().join(DEFAULT);
    for foreign in [false, true] {
        if foreign {
            put(dir.path(), "_default/hosts.toml", FOREIGN);
            FileOwner { uid: 7, gid: 8, mode: 0o750 }.give(&default).unwrap();
        }
        // Nobody else gets there.
        let root = FileOwner { mode: 0o700, ..FileOwner::of(dir.path()).unwrap() };
        root.give(dir.path()).unwrap();
        let before = tree(dir.path());
        hosts.hand_over((65532, 65532), Mode::Apply).unwrap();
        assert_eq!(FileOwner::of(dir.path()).unwrap(), FileOwner { gid: 65532, mode: 0o750, ..root });
        assert!(hosts.hand_over((65532, 65532), Mode::Apply).unwrap().changes.is_empty());
        assert_eq!(FileOwner::of(&default).unwrap().uid, 65532);
        // A reader stays a reader where the group has no right to write.
        hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
        assert_eq!(hosts_of(dir.path(), DEFAULT)[0], "http://127.0.0.1:5050");
        hosts.withdraw().unwrap();
        assert_eq!(FileOwner::of(&default).unwrap().uid, 65532, "until it is given back");
        hosts.hand_over((1000, 1000), Mode::Apply).unwrap();
        hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
        hosts.uninstall(Mode::Apply).unwrap();
        assert_eq!(tree(dir.path()), before);
        assert_eq!(FileOwner::of(dir.path()).unwrap(), root);
    }
}

#[test]
fn a_directory_of_some_group_is_not_opened_to_another() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root gives files away.
    }
    let dir = tempfile::tempdir().unwrap();
    let of_group = FileOwner { uid: 0, gid: 8, mode: 0o750 };
    of_group.give(dir.path()).unwrap();
    let refused = HostsDir::new(dir.path()).hand_over((65532, 65532), Mode::Apply).unwrap_err().to_string();
    assert!(refused.contains("chmod o+rx"), "{refused}");
    assert_eq!(FileOwner::of(dir.path()).unwrap(), of_group);
    FileOwner { mode: 0o755, ..of_group }.give(dir.path()).unwrap();
    assert_eq!(HostsDir::new(dir.path()).hand_over((65532, 65532), Mode::Apply).unwrap().changes.len(), 1);
}

/// Whoever can read the directory can hold its lock.
#[test]
fn a_lock_that_is_held_keeps_nobody_from_taking_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let held = std::fs::File::open(dir.path()).unwrap();
    held.lock().unwrap();
    let refused = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(refused.contains("holds a lock"), "{refused}");
    hosts.withdraw().unwrap();
    assert!(!dir.path().join(DEFAULT).exists());
}

#[test]
fn two_at_once_wait_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "docker.io/hosts.toml", FOREIGN);
    let before = tree(dir.path());
    std::thread::scope(|scope| {
        for n in 0..8 {
            let root = dir.path();
            scope.spawn(move || {
                for _ in 0..10 {
                    HostsDir::new(root)
                        .install(
                            &mirrors(&format!("http://127.0.0.1:{}", 5000 + n)),
                            &MirroredRegistries::Every,
                            Mode::Apply,
                        )
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(hosts_of(dir.path(), "docker.io").len(), 2);
    HostsDir::new(dir.path()).uninstall(Mode::Apply).unwrap();
    assert_eq!(tree(dir.path()), before);
}

#[test]
fn mistakes_are_explained() {
    let error =
        HostsDir::new("/nowhere").install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("config_path"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    for name in ["", "../x", "a/b", "reg.corp:port", "-x"] {
        let wanted = MirroredRegistries::Named(vec![name.into()]);
        let error = HostsDir::new(dir.path()).install(&ours(), &wanted, Mode::Apply).unwrap_err().to_string();
        assert!(error.contains("registry host such as"), "{error}");
    }
    assert!(HostsDir::new("/nowhere").uninstall(Mode::Apply).unwrap().changes.is_empty());
}

#[test]
fn what_is_no_text_of_ours_is_not_waited_for_and_not_taken_back() {
    use std::os::unix::fs::FileTypeExt;
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    let default = dir.path().join(DEFAULT);
    fs::create_dir(&default).unwrap();
    let pipe = |name: &str| {
        let path = default.join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        path
    };
    let (file, marker) = (pipe(HOSTS), pipe(MARKER));
    let refused = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(refused.contains("no file") && refused.contains(HOSTS), "{refused}");
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
    assert!([&file, &marker].into_iter().all(|path| fs::metadata(path).unwrap().file_type().is_fifo()));
    fs::remove_file(&file).unwrap();
    fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).is_err());
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
}

/// Everybody may write into a link; nobody but its owner into what takes its place.
#[test]
fn a_link_opens_nothing_to_everybody() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    put(dir.path(), "elsewhere/mine.toml", FOREIGN);
    fs::create_dir(dir.path().join(DEFAULT)).unwrap();
    let file = dir.path().join(DEFAULT).join(HOSTS);
    std::os::unix::fs::symlink(dir.path().join("elsewhere/mine.toml"), &file).unwrap();
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(FileOwner::of(&file).unwrap().mode, 0o644);
    assert!(!file.is_symlink());
    hosts.uninstall(Mode::Apply).unwrap();
    assert!(file.is_symlink() && fs::read_to_string(&file).unwrap() == FOREIGN);
    fs::remove_dir_all(dir.path().join(DEFAULT)).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join(DEFAULT)).unwrap();
    let refused = hosts.hand_over((65532, 65532), Mode::Apply).unwrap_err().to_string();
    assert!(refused.contains("symbolic link"), "{refused}");
}
