//! Every shape of containerd's configuration is diagnosed right: what `dray containerd check` says of it is held
//! against what real containerds make of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use dray_tests::dray::binary;
use dray_tests::process::output;
use dray_tests::tool;

/// Debian's containerd, and the newest.
const VERSIONS: [&str; 2] = ["1.6", "2.4"];

/// A configuration and what follows from it: where hosts.toml files are read from, or the word for what is wrong;
/// the same for both containerds, or for each.
struct Shape {
    name: &'static str,
    config: &'static str,
    /// Files beside it, in a directory `conf.d`.
    drop_ins: &'static [&'static str],
    expected: [Expected; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Reads(&'static str),
    /// It starts, but no mirror is used.
    Wrong(&'static str),
    /// It does not start with that at all.
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

fn shapes() -> Vec<Shape> {
    let shape = |name, config, expected| Shape { name, config, drop_ins: &[], expected };
    let with = |name, config, drop_ins, expected| Shape { name, config, drop_ins, expected };
    vec![
        // What works.
        shape("version 2", cri!("config_path = \"/certs\""), BOTH(Reads("/certs"))),
        shape(
            "version 2, single quotes",
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/certs'",
            BOTH(Reads("/certs")),
        ),
        shape(
            "version 2, nested tables",
            "version = 2\n[plugins]\n[plugins.\"io.containerd.grpc.v1.cri\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        shape(
            "version 2, inline table",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nregistry = { config_path = \"/certs\" }",
            BOTH(Reads("/certs")),
        ),
        shape(
            "version 2, dotted keys",
            "version = 2\nplugins.\"io.containerd.grpc.v1.cri\".registry.config_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        shape("version 1, short name", "[plugins.cri.registry]\nconfig_path = \"/certs\"", BOTH(Reads("/certs"))),
        shape("version = 1", "version = 1\n[plugins.cri.registry]\nconfig_path = \"/certs\"", BOTH(Reads("/certs"))),
        shape("trailing slash", cri!("config_path = \"/certs/\""), BOTH(Reads("/certs/"))),
        shape(
            "an empty table of mirrors",
            cri!("config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors]"),
            BOTH(Reads("/certs")),
        ),
        shape(
            "credentials beside it",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.configs.\"a.io\".auth]\nusername = \"u\"\npassword = \"p\""
            ),
            BOTH(Reads("/certs")),
        ),
        shape(
            "headers beside it",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.headers]\nX-Meta-Source-Client = [\"azure/aks\"]"
            ),
            BOTH(Reads("/certs")),
        ),
        shape(
            "windows line ends",
            "version = 2\r\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\r\nconfig_path = \"/certs\"\r\n",
            BOTH(Reads("/certs")),
        ),
        shape(
            "other plugins",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"p:1\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"\n[debug]\nlevel = \"info\"",
            BOTH(Reads("/certs")),
        ),
        // What only one of them knows.
        shape("version 3", images!("config_path = \"/certs\""), [Wrong("misplaced"), Reads("/certs")]),
        shape(
            "version 4",
            "version = 4\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        shape(
            "version 9",
            "version = 9\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Fatal("version")],
        ),
        shape(
            "version 2 with 2.x's section",
            "version = 2\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        shape(
            "the full name without a version",
            "[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            [Wrong("misplaced"), Reads("/certs")],
        ),
        shape(
            "the short name in version 2",
            "version = 2\n[plugins.cri.registry]\nconfig_path = \"/certs\"",
            [Fatal("plugin-name"), Wrong("misplaced")],
        ),
        // Nothing there.
        shape("an empty file", "", [Wrong("no-config-path"), Wrong("list")]),
        shape("only a version", "version = 2", [Wrong("no-config-path"), Wrong("list")]),
        shape("an empty path", cri!("config_path = \"\""), [Wrong("no-config-path"), Wrong("list")]),
        shape("an empty registry table", cri!(""), [Wrong("no-config-path"), Wrong("list")]),
        shape("a commented path", cri!("# config_path = \"/certs\""), [Wrong("no-config-path"), Wrong("list")]),
        // As kind has it: what keeps pulls in the CRI plugin, where lists work.
        shape(
            "nothing, unpacked layers discarded",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true",
            [Wrong("no-config-path"), Reads("/etc/containerd/certs.d:/etc/docker/certs.d")],
        ),
        // In the wrong place.
        shape(
            "no registry table",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\"]\nconfig_path = \"/certs\"",
            BOTH(Wrong("misplaced")),
        ),
        shape("at the top", "version = 2\nconfig_path = \"/certs\"", BOTH(Wrong("misplaced"))),
        shape("a registry at the top", "version = 2\n[registry]\nconfig_path = \"/certs\"", BOTH(Wrong("misplaced"))),
        shape(
            "a plugin that is not",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.crl\".registry]\nconfig_path = \"/certs\"",
            [Wrong("no-config-path"), Wrong("list")],
        ),
        shape("the key misspelt", cri!("config_dir = \"/certs\""), [Wrong("no-config-path"), Wrong("list")]),
        // Lists.
        shape(
            "a list",
            cri!("config_path = \"/etc/containerd/certs.d:/etc/docker/certs.d\""),
            [Reads("/etc/containerd/certs.d:/etc/docker/certs.d"), Wrong("list")],
        ),
        shape(
            "a list, unpacked layers discarded",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndiscard_unpacked_layers = true\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/a:/b\"",
            BOTH(Reads("/a:/b")),
        ),
        shape(
            "a list, pulled by the CRI plugin",
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nuse_local_image_pull = true\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a:/b\"",
            [Wrong("misplaced"), Reads("/a:/b")],
        ),
        shape(
            "a list, more downloads at once",
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nmax_concurrent_downloads = 10\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = \"/a:/b\"",
            [Wrong("misplaced"), Reads("/a:/b")],
        ),
        // Old mirrors.
        shape(
            "old mirrors",
            cri!(
                "[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://mirror.gcr.io\"]"
            ),
            BOTH(Wrong("mirrors")),
        ),
        shape(
            "old mirrors and a path",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"docker.io\"]\nendpoint = [\"https://mirror.gcr.io\"]"
            ),
            BOTH(Wrong("mirrors")),
        ),
        shape(
            "old mirrors in version 1",
            "[plugins.cri.registry.mirrors.\"docker.io\"]\nendpoint = [\"https://x\"]",
            BOTH(Wrong("mirrors")),
        ),
        // Paths that are none.
        shape("a relative path", cri!("config_path = \"certs.d\""), BOTH(Wrong("relative"))),
        shape("a home directory", cri!("config_path = \"~/certs.d\""), BOTH(Wrong("relative"))),
        shape("an array", cri!("config_path = [\"/certs\"]"), BOTH(Wrong("path-type"))),
        // Plugins disabled.
        shape("CRI disabled, as Docker's package has it", "disabled_plugins = [\"cri\"]", BOTH(Wrong("cri-disabled"))),
        shape(
            "CRI disabled",
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Wrong("cri-disabled")),
        ),
        shape(
            "CRI disabled by its short name",
            "version = 2\ndisabled_plugins = [\"cri\"]",
            BOTH(Fatal("plugin-name")),
        ),
        shape(
            "another plugin disabled",
            "version = 2\ndisabled_plugins = [\"io.containerd.snapshotter.v1.zfs\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            BOTH(Reads("/certs")),
        ),
        // Not TOML.
        shape("unfinished", cri!("config_path = \"/certs"), BOTH(Fatal("unreadable"))),
        shape(
            "a table twice",
            cri!(
                "config_path = \"/certs\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/other\""
            ),
            BOTH(Fatal("unreadable")),
        ),
        shape("a key twice", cri!("config_path = \"/certs\"\nconfig_path = \"/other\""), BOTH(Fatal("unreadable"))),
        shape("YAML", "version: 2\nplugins:\n", BOTH(Fatal("unreadable"))),
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
            "a drop-in that is no TOML",
            "version = 2\nimports = [\"DIR/conf.d/*.toml\"]",
            &["["],
            BOTH(Fatal("unreadable")),
        ),
        shape(
            "an import that is not there",
            "version = 2\nimports = [\"DIR/conf.d/none.toml\"]\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/certs\"",
            [Fatal("unreadable"), Reads("/certs")],
        ),
        shape(
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

impl Shape {
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

/// What dray says of it: the words for what is wrong, and all that was said.
fn diagnosed(config: &Path, version: &str) -> (Vec<String>, String) {
    let mut command = Command::new(binary());
    command.args(["containerd", "check", "--no-pull", "--containerd-version", version, "--config"]).arg(config);
    let output = output(&mut command);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let wrong = said.lines().filter_map(|line| Some(line.strip_prefix("wrong ")?.split(':').next()?.to_owned()));
    // No directory of these tests is there.
    (wrong.filter(|code| code != "no-directory" && code != "no-mirror").collect(), said)
}

/// What containerd makes of it: the whole of its configuration, or why it does not start.
fn dumped(program: &Path, config: &Path) -> Result<toml::Table, String> {
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
fn every_shape_is_diagnosed_as_containerd_reads_it() {
    let shapes = shapes();
    assert!(shapes.len() >= 40, "{}", shapes.len());
    let programs = [PathBuf::from("containerd"), tool("containerd")];
    let sections = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];
    let mut failed = Vec::new();
    for shape in &shapes {
        let dir = tempfile::tempdir().unwrap();
        let config = shape.write(dir.path());
        for nth in 0..VERSIONS.len() {
            let expected = shape.expected[nth];
            let (wrong, said) = diagnosed(&config, VERSIONS[nth]);
            let is_right = match expected {
                Reads(_) => wrong.is_empty(),
                Wrong(code) | Fatal(code) => wrong.iter().any(|wrong| wrong == code),
            };
            if !is_right {
                failed.push(format!(
                    "{} in {}: expected {expected:?}, dray says {wrong:?}\n{said}",
                    shape.name, VERSIONS[nth]
                ));
            }
            // The table itself is held against the real thing.
            let real = dumped(&programs[nth], &config);
            let path = real.as_ref().ok().and_then(|dump| registry(dump, sections[nth]));
            let path = path.and_then(|registry| registry.get("config_path")?.as_str().map(str::to_owned));
            let agrees = match (expected, &real) {
                (Fatal(_), real) => real.is_err(),
                // Nothing set means this list, which the daemon fills in itself when it starts.
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
                    shape.name,
                    VERSIONS[nth],
                    real.err()
                ));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), shapes.len(), failed.join("\n"));
}
