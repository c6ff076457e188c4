//! The terms of the OCI distribution specification: names, digests, ranges, routes, errors.

pub mod accept;
pub mod digest;
pub mod error;
pub mod image;
pub mod link;
pub mod manifest;
pub mod multipart;
pub mod name;
pub mod range;
pub mod route;
pub mod spans;

pub use digest::{Algorithm, Digest, DigestVerifier};
pub use error::ErrorCode;
pub use image::ImageName;
pub use multipart::Multipart;
pub use name::{Reference, Registry, Repository, Tag};
pub use range::{ContentRange, RangeRequest, RangeSet, Span};
pub use route::{Endpoint, RegistryFrom, Route};
pub use spans::Spans;

/// Largest manifest that dray accepts, in bytes: the limit of containerd and of the specification.
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1024 * 1024;

/// Media type of blob responses. The real type of a blob is in its manifest.
pub const BLOB_MEDIA_TYPE: &str = "application/octet-stream";

/// Media type of an OCI image index and of a referrers response.
pub const INDEX_MEDIA_TYPE: &str = "application/vnd.oci.image.index.v1+json";
