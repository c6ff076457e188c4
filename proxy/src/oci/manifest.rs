//! What a manifest says of itself.

use serde::Deserialize;

use super::INDEX_MEDIA_TYPE;

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

/// Whether a text may be a media type: names of type and subtype have at most 127 characters (RFC 6838, section 4.2).
pub fn is_media_type(text: &str) -> bool {
    (1..256).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

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
