//! Parsing of manifests.

use serde::Deserialize;

use super::{Digest, INDEX_MEDIA_TYPE};

const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// Longest annotations of a referrer, in bytes of JSON. Longer ones are left out, so that a list of referrers stays
/// small.
const MAX_ANNOTATION_BYTES: usize = 4096;

#[derive(Deserialize)]
struct ManifestShape {
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

/// The media type according to the bytes of the manifest. The header of an upstream may differ, and a cached manifest
/// must not depend on the upstream that sent it first.
///
/// Only OCI manifests may omit the type; their shape then decides (image specification, manifest.md and
/// image-index.md). None: neither, such as a manifest of Docker's first schema.
pub fn media_type(manifest: &[u8]) -> Option<String> {
    let shape: ManifestShape = serde_json::from_slice(manifest).ok()?;
    let inferred = || match (&shape.manifests, &shape.config) {
        (Some(_), _) => Some(INDEX_MEDIA_TYPE.to_owned()),
        (None, Some(_)) => Some(MANIFEST_MEDIA_TYPE.to_owned()),
        (None, None) => None,
    };
    shape.media_type.clone().filter(|text| is_media_type(text)).or_else(inferred)
}

/// Whether it has a `schemaVersion`, as manifests of Docker's first schema do as well.
pub fn has_version(manifest: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(rename = "schemaVersion")]
        _version: u64,
    }
    serde_json::from_slice::<Versioned>(manifest).is_ok()
}

/// Whether a media type belongs to a family of manifest types.
pub fn is_manifest_type(media_type: &str) -> bool {
    const FAMILIES: [&str; 3] =
        ["application/vnd.oci.image.", "application/vnd.oci.artifact.", "application/vnd.docker.distribution."];
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'+');
    FAMILIES.iter().any(|family| media_type.starts_with(family)) && media_type.bytes().all(is_plain)
}

/// Whether it is a JSON object.
pub fn is_object(manifest: &[u8]) -> bool {
    let is_braced = manifest.trim_ascii_start().starts_with(b"{");
    is_braced && serde_json::from_slice::<serde::de::IgnoredAny>(manifest).is_ok()
}

/// Whether it lists manifests rather than blobs.
pub fn is_index(manifest: &[u8]) -> bool {
    serde_json::from_slice::<ManifestShape>(manifest).is_ok_and(|shape| shape.manifests.is_some())
}

/// Whether it is a manifest of Docker's first schema.
pub fn is_first_schema(manifest: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct First {
        #[serde(rename = "schemaVersion")]
        version: u64,
        #[serde(rename = "fsLayers")]
        _layers: serde::de::IgnoredAny,
    }
    serde_json::from_slice::<First>(manifest).is_ok_and(|first| first.version == 1)
}

/// The digest of the manifest that an artifact, such as a signature, refers to.
pub fn subject(manifest: &[u8]) -> Option<Digest> {
    #[derive(Deserialize)]
    struct Referring {
        subject: Named,
    }
    #[derive(Deserialize)]
    struct Named {
        digest: String,
    }
    serde_json::from_slice::<Referring>(manifest).ok()?.subject.digest.parse().ok()
}

/// How a referrers response describes an artifact (distribution specification, "Listing Referrers").
pub fn referrer(manifest: &[u8], media_type: &str) -> Option<serde_json::Value> {
    #[derive(Deserialize)]
    struct Artifact {
        #[serde(rename = "artifactType")]
        artifact_type: Option<String>,
        config: Option<Config>,
        annotations: Option<serde_json::Value>,
    }
    #[derive(Deserialize)]
    struct Config {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
    }
    let artifact: Artifact = serde_json::from_slice(manifest).ok()?;
    let artifact_type =
        artifact.artifact_type.filter(|text| !text.is_empty()).or(artifact.config.and_then(|config| config.media_type));
    let mut descriptor = serde_json::json!({
        "mediaType": media_type, "digest": Digest::of(manifest).as_str(), "size": manifest.len(),
    });
    if let Some(artifact_type) = artifact_type {
        descriptor["artifactType"] = artifact_type.into();
    }
    let is_short = |annotations: &serde_json::Value| annotations.to_string().len() <= MAX_ANNOTATION_BYTES;
    if let Some(annotations) = artifact.annotations.filter(is_short) {
        descriptor["annotations"] = annotations;
    }
    Some(descriptor)
}

/// The digests that a manifest lists, with lengths in bytes: configuration and layers, or the manifests of an index.
pub fn named(manifest: &[u8]) -> Vec<(Digest, Option<u64>)> {
    #[derive(Deserialize)]
    struct Names {
        config: Option<Named>,
        #[serde(default)]
        layers: Vec<Named>,
        #[serde(default)]
        manifests: Vec<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        digest: String,
        size: Option<u64>,
    }
    let names: Option<Names> = serde_json::from_slice(manifest).ok();
    let named = names.into_iter().flat_map(|names| names.config.into_iter().chain(names.layers).chain(names.manifests));
    named.filter_map(|named| Some((named.digest.parse().ok()?, named.size))).collect()
}

/// Whether a text may be a media type: names of type and subtype have at most 127 characters (RFC 6838, section 4.2).
pub fn is_media_type(text: &str) -> bool {
    (1..256).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_lists_blobs_and_index_lists_manifests() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let (config, layer) = (digest("config"), digest("layer"));
        let json = serde_json::json!({
            "config": {"digest": config.as_str(), "size": 7},
            "layers": [{"digest": layer.as_str()}, {"digest": "sha256:short"}],
        });
        assert_eq!(named(json.to_string().as_bytes()), [(config.clone(), Some(7)), (layer, None)]);
        let index = serde_json::json!({"manifests": [{"digest": config.as_str(), "size": 9}]});
        assert_eq!(named(index.to_string().as_bytes()), [(config, Some(9))]);
        assert!(named(br#"{"manifests": []}"#).is_empty() && named(b"no json").is_empty());
    }

    #[test]
    fn other_documents_have_no_schema_version() {
        assert!(has_version(br#"{"schemaVersion": 1, "fsLayers": []}"#));
        assert!(
            !has_version(br#"{"message": "Back soon"}"#) && !has_version(b"<p>Back soon</p>") && !has_version(b"[]")
        );
    }

    #[test]
    fn artifact_is_described_as_a_referrer() {
        let subject_digest = Digest::of(b"image");
        let json = serde_json::json!({
            "config": {"mediaType": "application/vnd.oci.empty.v1+json"},
            "subject": {"digest": subject_digest.as_str()},
            "annotations": {"a": "b"},
        });
        let bytes = json.to_string().into_bytes();
        assert_eq!(subject(&bytes), Some(subject_digest));
        assert_eq!(subject(br#"{"config": {}}"#), None);
        let described = referrer(&bytes, "application/vnd.oci.image.manifest.v1+json").unwrap();
        assert_eq!(described["artifactType"], "application/vnd.oci.empty.v1+json");
        assert_eq!(described["annotations"]["a"], "b");
        assert_eq!(described["size"], bytes.len());
    }

    #[test]
    fn first_schema_has_version_and_layers() {
        assert!(is_first_schema(br#"{"schemaVersion": 1, "fsLayers": []}"#));
        assert!(!is_first_schema(br#"{"schemaVersion": 2, "fsLayers": []}"#) && !is_first_schema(b"{}"));
    }

    #[test]
    fn media_type_is_read_from_the_bytes() {
        let of = |json: &str| media_type(json.as_bytes());
        assert_eq!(of(r#"{"mediaType": "a/b", "manifests": []}"#).as_deref(), Some("a/b"));
        assert_eq!(of(r#"{"manifests": []}"#).as_deref(), Some(INDEX_MEDIA_TYPE));
        assert_eq!(of(r#"{"config": {}, "layers": []}"#).as_deref(), Some(MANIFEST_MEDIA_TYPE));
        assert_eq!(of(r#"{"mediaType": "a b", "config": {}}"#).as_deref(), Some(MANIFEST_MEDIA_TYPE));
        assert_eq!(of(r#"{"schemaVersion": 1, "fsLayers": []}"#), None);
        assert_eq!(of("no json"), None);
        let long = "x".repeat(250);
        assert_eq!(of(&format!(r#"{{"mediaType": "a/{long}"}}"#)).map(|text| text.len()), Some(252));
        assert_eq!(of(&format!(r#"{{"mediaType": "abcdef/{long}"}}"#)), None, "longer than names may be");
    }
}
