//! The `Accept` value of requests to upstreams.

use std::borrow::Cow;
use std::sync::LazyLock;

/// Every manifest type in use. A narrower set makes some registries convert a manifest, which
/// changes its digest.
pub const MANIFEST_TYPES: [&str; 5] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.artifact.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Longest value sent upstream, in bytes. Larger: an upstream may refuse the header. Smaller: media types that the
/// client added are left out sooner.
const MAX_ACCEPT_BYTES: usize = 2048;

/// The full set. Most clients name no other type.
static FULL_SET: LazyLock<String> = LazyLock::new(|| MANIFEST_TYPES.join(", ") + ", */*");

/// Joins the full set with the other types of the client's `Accept` lines.
pub fn merge<'a>(client_lines: impl Iterator<Item = &'a str>) -> Cow<'static, str> {
    let is_standard = |offered: &str| offered.trim() == "*/*" || MANIFEST_TYPES.contains(&offered.trim());
    let mut others = client_lines.filter(|line| !line.split(',').all(is_standard)).peekable();
    if others.peek().is_none() {
        return FULL_SET.as_str().into();
    }
    let mut types: Vec<&str> = MANIFEST_TYPES.to_vec();
    let mut len: usize = types.iter().map(|t| t.len() + 2).sum();
    for line in others {
        for offered in line.split(',') {
            let media_type = offered.split(';').next().unwrap_or_default().trim();
            let known = types.iter().any(|t| t.eq_ignore_ascii_case(media_type));
            if media_type.is_empty() || media_type == "*/*" || known {
                continue;
            }
            len += media_type.len() + 2;
            if len > MAX_ACCEPT_BYTES {
                break;
            }
            types.push(media_type);
        }
    }
    types.push("*/*");
    types.join(", ").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_lines_are_merged_into_one_set() {
        let merged = merge(
            ["application/vnd.oci.image.index.v1+json;q=0.9, application/x-new", "application/x-new, */*"].into_iter(),
        );
        assert_eq!(merged.matches("application/x-new").count(), 1);
        assert_eq!(merged.matches("image.index.v1").count(), 1);
        assert!(merged.ends_with("*/*"));
        let usual = merge([MANIFEST_TYPES[0], "*/*", ""].into_iter().take(2));
        assert!(matches!(usual, Cow::Borrowed(_)) && MANIFEST_TYPES.iter().all(|known| usual.contains(known)));
        assert_eq!(merge(std::iter::empty()), usual);
    }

    #[test]
    fn hostile_accept_lines_are_bounded() {
        let long = "a/b,".repeat(5000) + &"x".repeat(9000);
        assert!(merge([long.as_str()].into_iter()).len() < MAX_ACCEPT_BYTES + 16);
    }
}
