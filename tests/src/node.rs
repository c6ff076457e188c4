//! A Kubernetes node as a pod sees it. Containers run from the unpacked image, in their own mount namespaces and the
//! host's network. Arguments, mounts, users and capabilities come from the manifest.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value as Json;
use tempfile::TempDir;

use crate::chart::{Value, of_kind, texts};

/// A node's file system: host paths are below its root.
pub struct Node {
    dir: TempDir,
    image: PathBuf,
}

impl Node {
    /// With the image that `make test` built.
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "namespaces need root: run the tests as root");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = dir.path().join("image");
        unpack(&image);
        std::fs::create_dir(dir.path().join("node")).expect("a root");
        Self { dir, image }
    }

    /// Maps a host path to this machine.
    pub fn path(&self, host: &str) -> PathBuf {
        self.dir.path().join("node").join(host.trim_start_matches('/'))
    }

    /// Maps a path of the image to this machine.
    pub fn in_image(&self, path: &str) -> PathBuf {
        self.image.join(path.trim_start_matches('/'))
    }

    /// The command that runs one container of a pod.
    pub fn command(&self, documents: &[Value], pod: &Value, container: &Value) -> Command {
        let root = self.dir.path().join("run").join(fastrand::u64(..).to_string());
        let mut script = String::from("set -e\n");
        let mut append = |line: String| script = format!("{script}{line}\n");
        let (root_text, image) = (root.display(), self.image.display());
        append(format!("mkdir -p {root_text}; mount --bind {image} {root_text}"));
        // Mount points that do not exist are created, as the kubelet does.
        for mount in container["volumeMounts"].as_sequence().into_iter().flatten() {
            let source = self.source(documents, pod, mount);
            let at = format!("{root_text}{}", mount["mountPath"].as_str().expect("a path"));
            append(format!("mkdir -p {at}"));
            append(format!("mount --bind {} {at}", source.display()));
            if mount["readOnly"] == true {
                append(format!("mount -o remount,bind,ro {at}"));
            }
        }
        for path in ["/proc", "/dev"] {
            append(format!("mkdir -p {root_text}{path}; mount --rbind {path} {root_text}{path}"));
        }
        append(format!("mkdir -p {root_text}/etc; touch {root_text}/etc/resolv.conf"));
        append(format!("mount --bind /etc/resolv.conf {root_text}/etc/resolv.conf"));
        append(format!("mount -o remount,bind,ro {root_text}"));
        let security = &container["securityContext"];
        let (uid, gid) =
            (security["runAsUser"].as_u64().expect("a user"), security["runAsGroup"].as_u64().expect("a group"));
        let group = pod["spec"]["securityContext"]["fsGroup"].as_u64().unwrap_or(gid);
        let added: Vec<_> =
            texts(&security["capabilities"]["add"]).iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        // chroot needs these capabilities until the container's root and user are set.
        let bounds = format!("-all{},+sys_chroot,+setuid,+setgid,+setpcap", added.concat());
        let arguments: Vec<_> = texts(&container["args"]).iter().map(|argument| format!("'{argument}'")).collect();
        append(format!(
            "exec setpriv --no-new-privs --inh-caps=-all --bounding-set={bounds} \
             chroot --userspec={uid}:{gid} --groups={group} {root_text} /dray {}",
            arguments.join(" ")
        ));
        let mut command = Command::new("unshare");
        // Only variables that an image and a kubelet set.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("XDG_CACHE_HOME", "/var/cache");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script]).stdout(Stdio::piped());
        command
    }

    /// The source of a mount: a directory.
    fn source(&self, documents: &[Value], pod: &Value, mount: &Value) -> PathBuf {
        let volumes = pod["spec"]["volumes"].as_sequence().into_iter().flatten();
        let volume = volumes.into_iter().find(|volume| volume["name"] == mount["name"]).expect("a volume");
        if let Some(path) = volume["hostPath"]["path"].as_str() {
            let path = self.path(path);
            std::fs::create_dir_all(&path).expect("DirectoryOrCreate");
            return path;
        }
        if let Some(name) = volume["secret"]["secretName"].as_str() {
            let secrets = of_kind(documents, "Secret");
            let secret = secrets.into_iter().find(|secret| secret["metadata"]["name"] == name).expect("a Secret");
            return self.write_keys(name, &secret["stringData"]);
        }
        let name = &volume["configMap"]["name"];
        let map = of_kind(documents, "ConfigMap")
            .into_iter()
            .find(|map| map["metadata"]["name"] == *name)
            .expect("a ConfigMap");
        self.write_keys("config-map", &map["data"])
    }

    /// A directory with a file for each key.
    fn write_keys(&self, name: &str, keys: &Value) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        for (key, text) in keys.as_mapping().expect("keys") {
            let file = dir.join(key.as_str().expect("a file's name"));
            std::fs::write(file, text.as_str().expect("a text")).expect("written");
        }
        dir
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// Content, owner, group and mode.
pub type FileState = (String, u32, u32, u32);

/// Everything below a directory. Files that disappear during the walk are skipped.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, FileState> {
    let mut found = BTreeMap::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        match inspect(&path) {
            Ok((state, below)) => {
                pending.extend(below);
                found.insert(path, state);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    found
}

/// The state of one path, and the entries of a directory.
fn inspect(path: &Path) -> std::io::Result<(FileState, Vec<PathBuf>)> {
    let state = std::fs::symlink_metadata(path)?;
    let (mut content, mut below) = (String::new(), Vec::new());
    if state.is_dir() {
        for entry in std::fs::read_dir(path)? {
            below.push(entry?.path());
        }
    } else {
        content = std::fs::read_to_string(path)?;
    }
    Ok(((content, state.uid(), state.gid(), state.mode()), below))
}

/// The configuration of the image that `make test` built, and the compressed size of the image in bytes.
pub fn image() -> (Json, u64) {
    let manifest = manifest();
    let config = read(manifest["config"]["digest"].as_str().expect("a digest"));
    let layers =
        manifest["layers"].as_array().expect("layers").iter().map(|layer| layer["size"].as_u64().expect("a size"));
    (serde_json::from_slice(&config).expect("JSON"), layers.sum::<u64>() + config.len() as u64)
}

/// The OCI layout of the tested image.
pub fn image_directory() -> PathBuf {
    let root = crate::project().join("target/tests/image/oci");
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

/// Unpacks the image's layers in order. The image contains no whiteouts.
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
