//! Every form of containerd's configuration is diagnosed correctly: the output of `dray containerd check` is compared
//! with the behaviour of real containerds.

use std::path::{Path, PathBuf};
use std::process::Command;

use dray_tests::dray::binary;
use dray_tests::process::output;
use dray_tests::tool;

/// Versions of Debian's containerd and the newest one.
const VERSIONS: [&str; 2] = ["1.6", "2.4"];

/// A configuration and its effect, for both containerds or for each: the directory of the hosts.toml files, or the code
/// of the problem.
struct ConfigCase {
    name: &'static str,
    config: &'static str,
    /// Files in a directory `conf.d` beside it.
    drop_ins: &'static [&'static str],
    expected: [Expected; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Reads(&'static str),
    /// containerd starts, but uses no mirror.
    Wrong(&'static str),
    /// containerd does not start.
    Fatal(&'static str),
}

use Expected::{Fatal, Reads, Wrong};

const BOTH: fn(Expected) -> [Expected; 2] = |expected| [expected; 2];

/// `config_path` in the section that containerd 1.x reads, and 2.x moves.
macro_rules! cri {
    ($more:literal) => {
        concat!("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\n", $more)
    };
}

/// The same in the section of 2.x.
macro_rules! images {
    ($more:literal) => {
        concat!("version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\n", $more)
    };
}

fn cases() -> Vec<ConfigCase> {
    let case = |name, config, expected| ConfigCase { name, config, drop_ins: &[], expected };
    let with = |name, config, drop_ins, expected| ConfigCase { name, config, drop_ins, expected };
    vec![
        // Valid.
        case("version 2", cri!("config_path = \"/certs\""), BOTH(Reads("/certs"))),
        case(
            "version 2, single quotes",
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/certs'",
            BOTH(Reads("/certs")),
        ),
        case(
            "version 2, nested tables",
            "version = 2\n[plugins]\n[plugins.\"io.containerd.grpc.v1.cri\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        case(
            "version 2, inline table",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nregistry = { config_path = \"/certs\" }",
            BOTH(Reads("/certs")),
        ),
        case(
            "version 2, dotted keys",
            "version = 2\nplugins.\"io.containerd.grpc.v1.cri\".registry.config_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        case("version 1, short name", "[plugins.cri.registry]\nconfig_path = \"/certs\"", BOTH(Reads("/certs"))),
        case("version = 1", "version = 1\n[plugins.cri.registry]\nconfig_path = \"/certs\"", BOTH(Reads("/certs"))),
        case("trailing slash", cri!("config_path = \"/certs/\""), BOTH(Reads("/certs/"))),
        case(
            "an empty table of mirrors",
            cri!("config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors]"),
            BOTH(Reads("/certs")),
        ),
        case(
            "credentials beside it",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"a.io\".auth]\nusername = \"u\"\npassword = \"p\""
            ),
            BOTH(Reads("/certs")),
        ),
        case(
            "headers beside it",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.headers]\nX-Meta-Source-Client = [\"azure/aks\"]"
            ),
            BOTH(Reads("/certs")),
        ),
        case(
            "windows line ends",
            "version = 2\r\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\r\nconfig_path = \"/certs\"\r\n",
            BOTH(Reads("/certs")),
        ),
        case(
            "other plugins",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"p:1\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"\n[debug]\nlevel = \"info\"",
            BOTH(Reads("/certs")),
        ),
        // Valid for one version only.
        case("version 3", images!("config_path = \"/certs\""), [Wrong("misplaced"), Reads("/certs")]),
        case(
            "version 4",
            "version = 4\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        case(
            "version 9",
            "version = 9\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Fatal("version")],
        ),
        case(
            "version 2 with 2.x's section",
            "version = 2\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        case(
            "the full name without a version",
            "[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        case(
            "the short name in version 2",
            "version = 2\n[plugins.cri.registry]\nconfig_path = \"/certs\"",
            [Fatal("plugin-name"), Wrong("misplaced")],
        ),
        // No path.
        case("an empty file", "", [Wrong("no-config-path"), Wrong("list")]),
        case("only a version", "version = 2", [Wrong("no-config-path"), Wrong("list")]),
        case("an empty path", cri!("config_path = \"\""), [Wrong("no-config-path"), Wrong("list")]),
        case("an empty registry table", cri!(""), [Wrong("no-config-path"), Wrong("list")]),
        case("a commented path", cri!("# config_path = \"/certs\""), [Wrong("no-config-path"), Wrong("list")]),
        // As in kind: this setting keeps pulls in the CRI plugin, which supports lists.
        case(
            "nothing, unpacked layers discarded",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true",
            [Wrong("no-config-path"), Reads("/etc/containerd/certs.d:/etc/docker/certs.d")],
        ),
        // In the wrong section.
        case(
            "no registry table",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nconfig_path = \"/certs\"",
            BOTH(Wrong("misplaced")),
        ),
        case("at the top", "version = 2\nconfig_path = \"/certs\"", BOTH(Wrong("misplaced"))),
        case("a registry at the top", "version = 2\n[registry]\nconfig_path = \"/certs\"", BOTH(Wrong("misplaced"))),
        case(
            "an unknown plugin",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.crl\".registry]\nconfig_path = \"/certs\"",
            [Wrong("no-config-path"), Wrong("list")],
        ),
        case("the key misspelt", cri!("config_dir = \"/certs\""), [Wrong("no-config-path"), Wrong("list")]),
        // Lists.
        case(
            "a list",
            cri!("config_path = \"/etc/containerd/certs.d:/etc/docker/certs.d\""),
            [Reads("/etc/containerd/certs.d:/etc/docker/certs.d"), Wrong("list")],
        ),
        case(
            "a list, unpacked layers discarded",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a:/b\"",
            BOTH(Reads("/a:/b")),
        ),
        case(
            "a list, pulled by the CRI plugin",
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a:/b\"",
            [Wrong("misplaced"), Reads("/a:/b")],
        ),
        case(
            "a list, more downloads at once",
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nmax_concurrent_downloads = 10\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a:/b\"",
            [Wrong("misplaced"), Reads("/a:/b")],
        ),
        // Old mirrors.
        case(
            "old mirrors",
            cri!(
                "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://mirror.gcr.io\"]"
            ),
            BOTH(Wrong("mirrors")),
        ),
        case(
            "old mirrors and a path",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://mirror.gcr.io\"]"
            ),
            BOTH(Wrong("mirrors")),
        ),
        case(
            "old mirrors in version 1",
            "[plugins.cri.registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]",
            BOTH(Wrong("mirrors")),
        ),
        // Invalid paths.
        case("a relative path", cri!("config_path = \"certs.d\""), BOTH(Wrong("relative"))),
        case("a home directory", cri!("config_path = \"~/certs.d\""), BOTH(Wrong("relative"))),
        case("an array", cri!("config_path = [\"/certs\"]"), BOTH(Wrong("path-type"))),
        // Plugins disabled.
        case("CRI disabled, as Docker's package has it", "disabled_plugins = [\"cri\"]", BOTH(Wrong("cri-disabled"))),
        case(
            "CRI disabled",
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Wrong("cri-disabled")),
        ),
        case("CRI disabled by its short name", "version = 2\ndisabled_plugins = [\"cri\"]", BOTH(Fatal("plugin-name"))),
        case(
            "another plugin disabled",
            "version = 2\ndisabled_plugins = [\"io.containerd.snapshotter.v1.zfs\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        // Not TOML.
        case("unfinished", cri!("config_path = \"/certs"), BOTH(Fatal("unreadable"))),
        case(
            "a table twice",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/other\""
            ),
            BOTH(Fatal("unreadable")),
        ),
        case("a key twice", cri!("config_path = \"/certs\"\nconfig_path = \"/other\""), BOTH(Fatal("unreadable"))),
        case("YAML", "version: 2\nplugins:\n", BOTH(Fatal("unreadable"))),
        // Imports.
        with(
            "a drop-in of its own",
            "version = 2\nimports = [\"DIR/conf.d/*.toml\"]",
            &[cri!("config_path = \"/certs\"")],
            BOTH(Reads("/certs")),
        ),
        with(
            "a pattern beside the file",
            "version = 2\nimports = [\"conf.d/*.toml\"]",
            &[cri!("config_path = \"/certs\"")],
            [Wrong("no-config-path"), Reads("/certs")],
        ),
        with(
            "a drop-in by name",
            "version = 2\nimports = [\"DIR/conf.d/0.toml\"]",
            &[cri!("config_path = \"/certs\"")],
            BOTH(Reads("/certs")),
        ),
        with(
            "a drop-in without that section",
            concat!("imports = [\"DIR/conf.d/*.toml\"]\n", cri!("config_path = \"/certs\"")),
            &["version = 2\n[debug]\nlevel = \"info\""],
            BOTH(Reads("/certs")),
        ),
        with(
            "a drop-in with the rest of the section",
            concat!("imports = [\"DIR/conf.d/*.toml\"]\n", cri!("config_path = \"/certs\"")),
            &["version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"p:1\""],
            [Wrong("replaced"), Reads("/certs")],
        ),
        with(
            "the last drop-in wins",
            concat!("imports = [\"DIR/conf.d/*.toml\"]\n", cri!("config_path = \"/certs\"")),
            &[cri!("config_path = \"/a\""), cri!("config_path = \"/b\"")],
            BOTH(Reads("/b")),
        ),
        with(
            "an empty path in a drop-in",
            concat!("imports = [\"DIR/conf.d/*.toml\"]\n", cri!("config_path = \"/certs\"")),
            &[cri!("config_path = \"\"")],
            [Wrong("replaced"), Wrong("list")],
        ),
        with(
            "a drop-in of 2.x",
            "version = 2\nimports = [\"DIR/conf.d/*.toml\"]",
            &[images!("config_path = \"/certs\"")],
            [Wrong("misplaced"), Reads("/certs")],
        ),
        with(
            "a drop-in of 1.x in 2.x",
            "version = 3\nimports = [\"DIR/conf.d/*.toml\"]",
            &[cri!("config_path = \"/certs\"")],
            BOTH(Reads("/certs")),
        ),
        with(
            "a drop-in that is not TOML",
            "version = 2\nimports = [\"DIR/conf.d/*.toml\"]",
            &["["],
            BOTH(Fatal("unreadable")),
        ),
        case(
            "an import that is not there",
            "version = 2\nimports = [\"DIR/conf.d/none.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            [Fatal("unreadable"), Reads("/certs")],
        ),
        case(
            "no import that matches",
            "version = 2\nimports = [\"DIR/conf.d/none*.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        with(
            "an import of itself",
            "version = 2\nimports = [\"DIR/conf.d/*.toml\"]",
            &[concat!("imports = [\"../config.toml\"]\n", cri!("config_path = \"/certs\""))],
            BOTH(Reads("/certs")),
        ),
        with(
            "mirrors in a drop-in",
            concat!("imports = [\"DIR/conf.d/*.toml\"]\n", cri!("config_path = \"/certs\"")),
            &[cri!(
                "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]"
            )],
            BOTH(Wrong("mirrors")),
        ),
    ]
}

impl ConfigCase {
    fn write(&self, dir: &Path) -> PathBuf {
        std::fs::create_dir_all(dir.join("conf.d")).unwrap();
        for (nth, drop_in) in self.drop_ins.iter().enumerate() {
            std::fs::write(dir.join(format!("conf.d/{nth}.toml")), drop_in).unwrap();
        }
        let config = dir.join("config.toml");
        std::fs::write(&config, self.config.replace("DIR", dir.to_str().unwrap())).unwrap();
        config
    }
}

/// dray's diagnosis: the codes of the problems, and the whole output.
fn diagnose(config: &Path, version: &str) -> (Vec<String>, String) {
    let mut command = Command::new(binary());
    command.args(["containerd", "check", "--skip-pull", "--containerd-version", version, "--config"]).arg(config);
    let output = output(&mut command);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let wrong = printed.lines().filter_map(|line| Some(line.strip_prefix("wrong ")?.split(':').next()?.to_owned()));
    // The directories of these cases do not exist.
    (wrong.filter(|code| code != "no-directory" && code != "no-mirror").collect(), printed)
}

/// containerd's result: its effective configuration, or the error of its start.
fn dump(program: &Path, config: &Path) -> Result<toml::Table, String> {
    let output = output(Command::new(program).arg("--config").arg(config).args(["config", "dump"]));
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).parse().unwrap())
}

fn registry(dump: &toml::Table, section: &str) -> Option<toml::Table> {
    dump.get("plugins")?.get(section)?.get("registry")?.as_table().cloned()
}

#[test]
fn config_is_diagnosed_as_containerd_reads_it() {
    let cases = cases();
    assert!(cases.len() >= 40, "{}", cases.len());
    let programs = [PathBuf::from("containerd"), tool("containerd")];
    let sections = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];
    let mut failed = Vec::new();
    for case in &cases {
        let dir = tempfile::tempdir().unwrap();
        let config = case.write(dir.path());
        for nth in 0..VERSIONS.len() {
            let expected = case.expected[nth];
            let (wrong, printed) = diagnose(&config, VERSIONS[nth]);
            let is_right = match expected {
                Reads(_) => wrong.is_empty(),
                Wrong(code) | Fatal(code) => wrong.iter().any(|wrong| wrong == code),
            };
            if !is_right {
                failed.push(format!(
                    "{} in {}: expected {expected:?}, dray reports {wrong:?}\n{printed}",
                    case.name, VERSIONS[nth]
                ));
            }
            // The table itself is compared with the real containerd.
            let real = dump(&programs[nth], &config);
            let path = real.as_ref().ok().and_then(|dump| registry(dump, sections[nth]));
            let path = path.and_then(|registry| registry.get("config_path")?.as_str().map(str::to_owned));
            let agrees = match (expected, &real) {
                (Fatal(_), real) => real.is_err(),
                // An unset path means this list, which the daemon sets at its start.
                (Reads(wanted), Ok(_)) => {
                    path.as_deref()
                        .filter(|path| !path.is_empty())
                        .unwrap_or("/etc/containerd/certs.d:/etc/docker/certs.d")
                        == wanted
                }
                (Wrong("mirrors" | "path-type" | "cri-disabled" | "list" | "relative"), _) => true,
                (Wrong(_), Ok(_)) => path.as_deref().is_none_or(str::is_empty),
                (_, Err(_)) => false,
            };
            if !agrees {
                failed.push(format!(
                    "{} in {}: expected {expected:?}, containerd reads {path:?}, {:?}",
                    case.name,
                    VERSIONS[nth],
                    real.err()
                ));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), cases.len(), failed.join("\n"));
}
