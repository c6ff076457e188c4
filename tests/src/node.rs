//! A Kubernetes node as far as a pod sees it: containers run from the unpacked image with the arguments, mounts,
//! users and capabilities that the manifest says, in mount namespaces of their own and the host's network.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value as Json;
use tempfile::TempDir;

use crate::chart::{Value, of_kind, texts};

/// A node's file system: host paths lie below its root.
pub struct Node {
    dir: TempDir,
    image: PathBuf,
}

impl Node {
    /// With the image of `make test` on it.
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "namespaces need root: run the tests as root");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("image");
        unpack(&image);
        std::fs::create_dir(dir.path().join("node")).expect("a root");
        Self { dir, image }
    }

    /// Where a host path lies.
    pub fn path(&self, host: &str) -> PathBuf {
        self.dir.path().join("node").join(host.trim_start_matches('/'))
    }

    /// Where a path of the image lies.
    pub fn in_image(&self, path: &str) -> PathBuf {
        self.image.join(path.trim_start_matches('/'))
    }

    /// What runs one container of a pod.
    pub fn command(&self, documents: &[Value], pod: &Value, container: &Value) -> Command {
        let root = self.dir.path().join("run").join(fastrand::u64(..).to_string());
        let mut script = String::from("set -e\n");
        let mut say = |line: String| script = format!("{script}{line}\n");
        let (root_text, image) = (root.display(), self.image.display());
        say(format!("mkdir -p {root_text}; mount --bind {image} {root_text}"));
        // What is mounted where needs places to be mounted at, as the kubelet makes them.
        for mount in container["volumeMounts"].as_sequence().into_iter().flatten() {
            let (source, is_file) = self.source(documents, pod, mount);
            let at = format!("{root_text}{}", mount["mountPath"].as_str().expect("a path"));
            match is_file {
                true => say(format!("mkdir -p $(dirname {at}); touch {at}")),
                false => say(format!("mkdir -p {at}")),
            }
            say(format!("mount --bind {} {at}", source.display()));
            if mount["readOnly"] == true {
                say(format!("mount -o remount,bind,ro {at}"));
            }
        }
        for path in ["/proc", "/dev"] {
            say(format!("mkdir -p {root_text}{path}; mount --rbind {path} {root_text}{path}"));
        }
        say(format!("mkdir -p {root_text}/etc; touch {root_text}/etc/resolv.conf"));
        say(format!("mount --bind /etc/resolv.conf {root_text}/etc/resolv.conf"));
        say(format!("mount -o remount,bind,ro {root_text}"));
        let security = &container["securityContext"];
        let (uid, gid) =
            (security["runAsUser"].as_u64().expect("a user"), security["runAsGroup"].as_u64().expect("a group"));
        let group = pod["spec"]["securityContext"]["fsGroup"].as_u64().unwrap_or(gid);
        let added: Vec<_> =
            texts(&security["capabilities"]["add"]).iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        // Until it is inside.
        let bounds = format!("-all{},+sys_chroot,+setuid,+setgid,+setpcap", added.concat());
        let arguments: Vec<_> = texts(&container["args"]).iter().map(|argument| format!("'{argument}'")).collect();
        say(format!(
            "exec setpriv --no-new-privs --inh-caps=-all --bounding-set={bounds} \
             chroot --userspec={uid}:{gid} --groups={group} {root_text} /dray {}",
            arguments.join(" ")
        ));
        let mut command = Command::new("unshare");
        // Nothing but what an image and a kubelet give.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("XDG_CACHE_HOME", "/var/cache");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).stdout(Stdio::piped());
        command
    }

    /// What a mount shows, and whether that is a file.
    fn source(&self, documents: &[Value], pod: &Value, mount: &Value) -> (PathBuf, bool) {
        let volumes = pod["spec"]["volumes"].as_sequence().into_iter().flatten();
        let volume = volumes.into_iter().find(|volume| volume["name"] == mount["name"]).expect("a volume");
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            let path = self.path(path);
            std::fs::create_dir_all(&path).expect("DirectoryOrCreate");
            return (path, false);
        }
        let key = mount["subPath"].as_str().expect("a ConfigMap's key");
        let name = &volume["configMap"]["name"];
        let map = of_kind(documents, "ConfigMap")
            .into_iter()
            .find(|map| map["metadata"]["name"] == *name)
            .expect("a ConfigMap");
        let file = self.dir.path().join(key);
        std::fs::write(&file, map["data"][key].as_str().expect("a text")).expect("written");
        (file, true)
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// Content, owner, group and mode.
pub type Known = (String, u32, u32, u32);

/// Everything below a directory. What goes while it is looked at is left out.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Known> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        match look_at(&path) {
            Ok((known, below)) => {
                pending.extend(below);
                found.insert(path, known);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    found
}

/// One thing, and what is in it.
fn look_at(path: &Path) -> std::io::Result<(Known, Vec<PathBuf>)> {
    let known = std::fs::symlink_metadata(path)?;
    let (mut content, mut below) = (String::new(), Vec::new());
    if known.is_dir() {
        for entry in std::fs::read_dir(path)? {
            below.push(entry?.path());
        }
    } else {
        content = std::fs::read_to_string(path)?;
    }
    Ok(((content, known.uid(), known.gid(), known.mode()), below))
}

/// The image that `make test` has built: its configuration, and the compressed size of all of it in bytes.
pub fn image() -> (Json, u64) {
    let manifest = manifest();
    let config = read(manifest["config"]["digest"].as_str().expect("a digest"));
    let layers =
        manifest["layers"].as_array().expect("layers").iter().map(|layer| layer["size"].as_u64().expect("a size"));
    (serde_json::from_slice(&config).expect("JSON"), layers.sum::<u64>() + config.len() as u64)
}

/// The image of the program that is tested.
pub(crate) fn image_directory() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("target/tests/image/oci");
    assert!(root.exists(), "{} is missing: run `make test`", root.display());
    root
}

fn manifest() -> Json {
    let index: Json =
        serde_json::from_slice(&std::fs::read(image_directory().join("index.json")).expect("an index")).expect("JSON");
    serde_json::from_slice(&read(index["manifests"][0]["digest"].as_str().expect("a digest"))).expect("JSON")
}

fn read(digest: &str) -> Vec<u8> {
    std::fs::read(image_directory().join("blobs").join(digest.replace(':', "/"))).expect("a blob")
}

/// Lays the image's layers over each other. Nothing of it is ever taken away.
fn unpack(root: &Path) {
    for layer in manifest()["layers"].as_array().expect("layers") {
        let digest = layer["digest"].as_str().expect("a digest");
        let mut bytes = Vec::new();
        let blob = read(digest);
        flate2::read::GzDecoder::new(&blob[..]).read_to_end(&mut bytes).expect("a gzip layer");
        let mut archive = tar::Archive::new(&bytes[..]);
        archive.set_preserve_ownerships(true);
        archive.unpack(root).expect("an archive");
    }
}
