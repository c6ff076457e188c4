//! The probe image, with which `dray containerd check` tests whether a runtime pulls through dray.
//!
//! Only dray serves it: names below `.invalid` never resolve (RFC 6761), so a pull that succeeds went through dray.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use serde_json::json;

use crate::oci::{BLOB_MEDIA_TYPE, Digest, Endpoint, ErrorCode, RangeRequest, Registry};
use crate::provenance::Provenance;
use crate::pull::{BlobResponse, ManifestResponse, PullError};
use crate::respond::PreparedResponse;
use crate::source::ServedFrom;
use crate::store::SmallObject;

/// The name of a registry that has only this image, under every tag.
pub const REGISTRY: &str = "dray.invalid";

/// The repository of the probe image.
pub const REPOSITORY: &str = "dray/sentinel";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// An empty tar archive: two empty blocks of 512 bytes.
static EMPTY_TAR: [u8; 1024] = [0; 1024];

struct Image {
    manifest: Bytes,
    blobs: [Bytes; 2],
}

static IMAGE: LazyLock<Image> = LazyLock::new(|| {
    let layer = Bytes::from_static(&EMPTY_TAR);
    // Runtimes refuse an image for another architecture.
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
    });
    let config = Bytes::from(config.to_string());
    let descriptor =
        |media_type: &str, blob: &Bytes| json!({ "mediaType": media_type, "digest": digest(blob), "size": blob.len() });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config),
        "layers": [descriptor(LAYER, &layer)],
    });
    Image { manifest: manifest.to_string().into(), blobs: [config, layer] }
});

/// Whether a request is for the registry of the probe image.
pub fn is_registry(registry: &Registry) -> bool {
    registry.as_str() == REGISTRY
}

/// The response to a request for the probe image.
pub fn answer(endpoint: &Endpoint, range: Option<RangeRequest>) -> PreparedResponse {
    let image = &*IMAGE;
    let found = match endpoint {
        Endpoint::Manifest(crate::oci::Reference::Tag(_)) => Some((&image.manifest, MANIFEST)),
        Endpoint::Manifest(crate::oci::Reference::Digest(digest)) => {
            digest.matches(&image.manifest).then_some((&image.manifest, MANIFEST))
        }
        Endpoint::Blob(digest) => {
            image.blobs.iter().find(|blob| digest.matches(blob)).map(|blob| (blob, BLOB_MEDIA_TYPE))
        }
        Endpoint::Tags | Endpoint::Referrers(_) | Endpoint::Catalog => None,
    };
    let Some((bytes, media_type)) = found else {
        let message = format!("{REGISTRY} has only the probe image of `dray containerd check`");
        return PreparedResponse::refusal(&PullError::NotFound { code: ErrorCode::ManifestUnknown, message });
    };
    let digest = Digest::of(bytes);
    if media_type == BLOB_MEDIA_TYPE {
        return match BlobResponse::of_bytes(bytes, range, ServedFrom::Memory) {
            Ok(response) => PreparedResponse::blob(response, &digest),
            Err(error) => PreparedResponse::refusal(&error),
        };
    }
    let provenance = Provenance { rule: REGISTRY.into(), registry: REGISTRY.into(), repository: REPOSITORY.into() };
    let object = SmallObject::new(media_type, Arc::new(provenance), bytes);
    PreparedResponse::manifest(&ManifestResponse { digest, object, from: ServedFrom::Memory, age: None }, range)
}

fn digest(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}
