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
    hosts_toml::hosts(&fs::read_to_string(root.join(dir).join(HOSTS_FILE)).unwrap())
}

#[test]
fn permission_error_has_prepare_command_as_remedy() {
    let hosts = HostsDir::new("/etc/containerd/certs.d");
    let error = |kind: io::ErrorKind| HostsError::Io("/etc/containerd/certs.d/_default".into(), kind.into());
    let remedy = hosts.remedy(&error(io::ErrorKind::PermissionDenied), (998, 997)).unwrap();
    assert!(remedy.ends_with("dray containerd prepare --to 998:997 --hosts-dir /etc/containerd/certs.d"), "{remedy}");
    assert_eq!(hosts.remedy(&error(io::ErrorKind::NotADirectory), (998, 997)), None);
    assert_eq!(hosts.remedy(&error(io::ErrorKind::PermissionDenied), (0, 0)), None);
}

#[test]
fn install_is_idempotent_and_uninstall_removes_everything() {
    let dir = tempfile::tempdir().unwrap();
    let before = tree(dir.path());
    let hosts = HostsDir::new(dir.path());
    let planned = hosts.install(&ours(), &MirroredRegistries::Default, Mode::DryRun).unwrap();
    assert!(planned.changes[0].diff().contains("+[host.\"http://127.0.0.1:5050\"]"), "{}", planned.changes[0].diff());
    assert_eq!(tree(dir.path()), before);
    let done = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(done.changes, planned.changes);
    assert_eq!(hosts_of(dir.path(), DEFAULT_DIR), ["http://127.0.0.1:5050"]);
    assert!(hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap().changes.is_empty());
    hosts.install(&mirrors("http://127.0.0.1:6060"), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(hosts_of(dir.path(), DEFAULT_DIR), ["http://127.0.0.1:6060"]);
    hosts.uninstall(Mode::Apply).unwrap();
    assert_eq!(tree(dir.path()), before);
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
}

#[test]
fn foreign_files_are_kept_and_restored_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "_default/hosts.toml", FOREIGN);
    put(dir.path(), "docker.io/hosts.toml", "");
    put(dir.path(), "reg.corp_5000_/ca.crt", "PEM");
    fs::create_dir(dir.path().join("quay.io")).unwrap();
    put(dir.path(), "localhost:32000/hosts.toml", FOREIGN);
    put(dir.path(), "broken.io/hosts.toml", "server = ");
    put(dir.path(), ".hidden/hosts.toml", "server = ");
    FileOwner { mode: 0o640, ..FileOwner::of(dir.path()).unwrap() }
        .apply_to(&dir.path().join("_default/hosts.toml"))
        .unwrap();
    let before = tree(dir.path());
    let hosts = HostsDir::new(dir.path());
    let done = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let shadows = done.remarks.iter().filter(|remark| matches!(remark, Remark::Shadows(_))).count();
    assert_eq!(shadows, 4, "{:?}", done.remarks);
    let done = hosts.install(&ours(), &MirroredRegistries::Every, Mode::Apply).unwrap();
    assert_eq!(done.remarks.len(), 2, "{:?}", done.remarks);
    assert_eq!(done.remarks.iter().filter(|remark| remark.is_failure()).count(), 1);
    assert_eq!(hosts_of(dir.path(), DEFAULT_DIR), ["http://127.0.0.1:5050", "https://a"]);
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
fn edits_after_install_survive_uninstall() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    put(dir.path(), "_default/hosts.toml", FOREIGN);
    hosts
        .install(&ours(), &MirroredRegistries::Named(vec!["docker.io".into(), "reg.corp:5000".into()]), Mode::Apply)
        .unwrap();
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let append = |name: &str, more: &str| {
        let path = dir.path().join(name).join(HOSTS_FILE);
        fs::write(&path, fs::read_to_string(&path).unwrap() + more).unwrap();
    };
    append("_default", "# a note\n");
    append("docker.io", "[host.\"https://b\"]\n");
    let path = dir.path().join("reg.corp:5000").join(HOSTS_FILE);
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
fn prepare_changes_owner_and_uninstall_restores_it() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root gives files away.
    }
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    let default = dir.path().join(DEFAULT_DIR);
    for foreign in [false, true] {
        if foreign {
            put(dir.path(), "_default/hosts.toml", FOREIGN);
            FileOwner { uid: 7, gid: 8, mode: 0o750 }.apply_to(&default).unwrap();
        }
        // Only root can read the hosts directory.
        let root = FileOwner { mode: 0o700, ..FileOwner::of(dir.path()).unwrap() };
        root.apply_to(dir.path()).unwrap();
        let before = tree(dir.path());
        hosts.prepare((65532, 65532), Mode::Apply).unwrap();
        assert_eq!(FileOwner::of(dir.path()).unwrap(), FileOwner { gid: 65532, mode: 0o750, ..root });
        assert!(hosts.prepare((65532, 65532), Mode::Apply).unwrap().changes.is_empty());
        assert_eq!(FileOwner::of(&default).unwrap().uid, 65532);
        // The group of dray can read the hosts directory, but not write into it.
        hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
        assert_eq!(hosts_of(dir.path(), DEFAULT_DIR)[0], "http://127.0.0.1:5050");
        hosts.withdraw().unwrap();
        assert_eq!(FileOwner::of(&default).unwrap().uid, 65532, "until uninstall");
        hosts.prepare((1000, 1000), Mode::Apply).unwrap();
        hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
        hosts.uninstall(Mode::Apply).unwrap();
        assert_eq!(tree(dir.path()), before);
        assert_eq!(FileOwner::of(dir.path()).unwrap(), root);
    }
}

#[test]
fn prepare_does_not_replace_group_with_access() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root gives files away.
    }
    let dir = tempfile::tempdir().unwrap();
    let of_group = FileOwner { uid: 0, gid: 8, mode: 0o750 };
    of_group.apply_to(dir.path()).unwrap();
    let error = HostsDir::new(dir.path()).prepare((65532, 65532), Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("chmod o+rx"), "{error}");
    assert_eq!(FileOwner::of(dir.path()).unwrap(), of_group);
    FileOwner { mode: 0o755, ..of_group }.apply_to(dir.path()).unwrap();
    assert_eq!(HostsDir::new(dir.path()).prepare((65532, 65532), Mode::Apply).unwrap().changes.len(), 1);
}

/// Any process that can read the directory can hold its lock.
#[test]
fn withdraw_works_while_lock_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    let held = std::fs::File::open(dir.path()).unwrap();
    held.lock().unwrap();
    let error = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("holds the lock"), "{error}");
    hosts.withdraw().unwrap();
    assert!(!dir.path().join(DEFAULT_DIR).exists());
}

#[test]
fn concurrent_installs_wait_for_the_lock() {
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
fn invalid_directory_or_registry_error_has_a_hint() {
    let error =
        HostsDir::new("/nowhere").install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("config_path"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    for name in ["", "../x", "a/b", "reg.corp:port", "-x"] {
        let wanted = MirroredRegistries::Named(vec![name.into()]);
        let error = HostsDir::new(dir.path()).install(&ours(), &wanted, Mode::Apply).unwrap_err().to_string();
        assert!(error.contains("not a valid registry host"), "{error}");
    }
    assert!(HostsDir::new("/nowhere").uninstall(Mode::Apply).unwrap().changes.is_empty());
}

#[test]
fn pipes_and_binary_files_are_not_read_or_removed() {
    use std::os::unix::fs::FileTypeExt;
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    let default = dir.path().join(DEFAULT_DIR);
    fs::create_dir(&default).unwrap();
    let pipe = |name: &str| {
        let path = default.join(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        path
    };
    let (file, marker) = (pipe(HOSTS_FILE), pipe(MARKER_FILE));
    let error = hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("not a regular file") && error.contains(HOSTS_FILE), "{error}");
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
    assert!([&file, &marker].into_iter().all(|path| fs::metadata(path).unwrap().file_type().is_fifo()));
    fs::remove_file(&file).unwrap();
    fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).is_err());
    assert!(hosts.uninstall(Mode::Apply).unwrap().changes.is_empty());
}

/// A symbolic link has mode 0777; the file that replaces it must not.
#[test]
fn link_is_replaced_by_file_with_mode_of_its_target() {
    let dir = tempfile::tempdir().unwrap();
    let hosts = HostsDir::new(dir.path());
    put(dir.path(), "elsewhere/mine.toml", FOREIGN);
    fs::create_dir(dir.path().join(DEFAULT_DIR)).unwrap();
    let file = dir.path().join(DEFAULT_DIR).join(HOSTS_FILE);
    std::os::unix::fs::symlink(dir.path().join("elsewhere/mine.toml"), &file).unwrap();
    hosts.install(&ours(), &MirroredRegistries::Default, Mode::Apply).unwrap();
    assert_eq!(FileOwner::of(&file).unwrap().mode, 0o644);
    assert!(!file.is_symlink());
    hosts.uninstall(Mode::Apply).unwrap();
    assert!(file.is_symlink() && fs::read_to_string(&file).unwrap() == FOREIGN);
    fs::remove_dir_all(dir.path().join(DEFAULT_DIR)).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join(DEFAULT_DIR)).unwrap();
    let error = hosts.prepare((65532, 65532), Mode::Apply).unwrap_err().to_string();
    assert!(error.contains("symbolic link"), "{error}");
}
