//! Images: an index of two platforms, each with a config and layers of real tar and gzip.

use std::collections::BTreeMap;
use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Everything that a registry needs to serve one image.
#[derive(Clone)]
pub struct Image {
    /// Digest of the index.
    pub digest: String,
    /// Media type and bytes, by digest; the index comes last when pushed.
    pub manifests: BTreeMap<String, (String, Bytes)>,
    pub blobs: BTreeMap<String, Bytes>,
    /// Layer digests of the platform that tests run on.
    pub layers: Vec<String>,
}

impl Image {
    /// Layers of about these sizes in bytes; `seed` makes the content different.
    pub fn new(seed: u64, layer_sizes: &[usize]) -> Self {
        let mut image =
            Self { digest: String::new(), manifests: BTreeMap::new(), blobs: BTreeMap::new(), layers: Vec::new() };
        let mut entries = Vec::new();
        for (nth, architecture) in ["arm64", "amd64"].iter().enumerate() {
            let mut layers = Vec::new();
            let mut diff_ids = Vec::new();
            image.layers.clear();
            for (layer, size) in layer_sizes.iter().enumerate() {
                let tar = tar(seed * 1000 + (nth * 100 + layer) as u64, *size);
                diff_ids.push(digest(&tar));
                let bytes = gzip(&tar);
                layers.push(json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": digest(&bytes), "size": bytes.len(),
                }));
                let layer = image.add_blob(bytes);
                image.layers.push(layer);
            }
            let config = json!({
                "architecture": architecture, "os": "linux", "created": "2026-01-01T00:00:00Z",
                "config": {"Cmd": ["/hello"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
            });
            let config = config.to_string().into_bytes();
            let manifest = json!({
                "schemaVersion": 2, "mediaType": MANIFEST,
                "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                           "digest": digest(&config), "size": config.len()},
                "layers": layers,
            });
            image.add_blob(config);
            let (manifest_digest, size) = image.add_manifest(MANIFEST, &manifest);
            entries.push(json!({
                "mediaType": MANIFEST, "digest": manifest_digest, "size": size,
                "platform": {"architecture": architecture, "os": "linux"},
            }));
        }
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        image.digest = image.add_manifest(INDEX, &index).0;
        image
    }

    /// The first layer of the platform that tests run on.
    pub fn layer(&self) -> (&str, &Bytes) {
        let digest = &self.layers[0];
        (digest, &self.blobs[digest])
    }

    pub fn index(&self) -> &Bytes {
        &self.manifests[&self.digest].1
    }

    fn add_blob(&mut self, bytes: Vec<u8>) -> String {
        let digest = digest(&bytes);
        self.blobs.insert(digest.clone(), bytes.into());
        digest
    }

    fn add_manifest(&mut self, media_type: &str, json: &Value) -> (String, usize) {
        let bytes = json.to_string().into_bytes();
        let (digest, size) = (digest(&bytes), bytes.len());
        self.manifests.insert(digest.clone(), (media_type.to_owned(), bytes.into()));
        (digest, size)
    }
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

fn tar(seed: u64, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let content = noise(seed, size);
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    builder.append_data(&mut header, format!("file-{seed}"), &content[..]).expect("tar in memory");
    builder.into_inner().expect("tar in memory")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("gzip in memory");
    encoder.finish().expect("gzip in memory")
}
