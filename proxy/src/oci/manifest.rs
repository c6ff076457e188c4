//! What a manifest says of itself.

use serde::Deserialize;

use super::{Digest, INDEX_MEDIA_TYPE};

const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

#[derive(Deserialize)]
struct Shape {
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

/// The media type that the bytes themselves tell. What an origin says in its header may differ, and
/// a kept manifest must not depend on who sent it first.
///
/// Only OCI manifests may leave the type out; those are known by their shape (image specification,
/// manifest.md and image-index.md). None: neither, such as a manifest of Docker's first schema.
pub fn media_type(manifest: &[u8]) -> Option<String> {
    let shape: Shape = serde_json::from_slice(manifest).ok()?;
    let inferred = || match (&shape.manifests, &shape.config) {
        (Some(_), _) => Some(INDEX_MEDIA_TYPE.to_owned()),
        (None, Some(_)) => Some(MANIFEST_MEDIA_TYPE.to_owned()),
        (None, None) => None,
    };
    shape.media_type.clone().filter(|text| is_media_type(text)).or_else(inferred)
}

/// Whether it says of which version it is, as manifests of Docker's first schema do as well.
pub fn has_version(manifest: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(rename = "schemaVersion")]
        _version: u64,
    }
    serde_json::from_slice::<Versioned>(manifest).is_ok()
}

/// The blobs that a manifest names: its configuration and layers.
pub fn blobs(manifest: &[u8]) -> Vec<Digest> {
    #[derive(Deserialize)]
    struct Names {
        config: Option<Named>,
        #[serde(default)]
        layers: Vec<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        digest: String,
    }
    let names: Option<Names> = serde_json::from_slice(manifest).ok();
    let named = names.into_iter().flat_map(|names| names.config.into_iter().chain(names.layers));
    named.filter_map(|named| named.digest.parse().ok()).collect()
}

/// Whether a text may be a media type: names of type and subtype have at most 127 characters (RFC 6838, section 4.2).
pub fn is_media_type(text: &str) -> bool {
    (1..256).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_names_its_blobs() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let (config, layer) = (digest("config"), digest("layer"));
        let json = serde_json::json!({
            "config": {"digest": config.as_str()},
            "layers": [{"digest": layer.as_str()}, {"digest": "sha256:short"}],
        });
        assert_eq!(blobs(json.to_string().as_bytes()), [config, layer]);
        assert!(blobs(br#"{"manifests": []}"#).is_empty() && blobs(b"no json").is_empty());
    }

    #[test]
    fn what_is_no_manifest_says_of_no_version() {
        assert!(has_version(br#"{"schemaVersion": 1, "fsLayers": []}"#));
        assert!(
            !has_version(br#"{"message": "Back soon"}"#) && !has_version(b"<p>Back soon</p>") && !has_version(b"[]")
        );
    }

    #[test]
    fn the_bytes_tell_their_type() {
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
