//! The error body of the distribution specification.

/// The codes of the specification that a pull-only registry returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    BlobUnknown,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    DigestInvalid,
    Unauthorized,
    Denied,
    Unsupported,
    /// Not in the specification's table. Registries use it for their own failures.
    Unavailable,
    RangeInvalid,
}

impl ErrorCode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BlobUnknown => "BLOB_UNKNOWN",
            Self::ManifestUnknown => "MANIFEST_UNKNOWN",
            Self::NameInvalid => "NAME_INVALID",
            Self::NameUnknown => "NAME_UNKNOWN",
            Self::DigestInvalid => "DIGEST_INVALID",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Denied => "DENIED",
            Self::Unsupported => "UNSUPPORTED",
            Self::Unavailable => "UNAVAILABLE",
            Self::RangeInvalid => "RANGE_INVALID",
        }
    }
}

/// `{"errors":[{"code","message","detail"}]}`.
pub fn body(code: ErrorCode, message: &str) -> Vec<u8> {
    let detail = serde_json::Value::Null;
    serde_json::json!({"errors": [{"code": code.as_str(), "message": message, "detail": detail}]})
        .to_string()
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_body_is_json_with_any_message() {
        let body = body(ErrorCode::Denied, "a \"quoted\"\nmessage");
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(value["errors"][0]["code"], "DENIED");
        assert_eq!(value["errors"][0]["message"], "a \"quoted\"\nmessage");
    }
}
