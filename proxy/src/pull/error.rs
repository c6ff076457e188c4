//! The errors that a client or peer gets instead of content.

use std::borrow::Cow;
use std::fmt;

use crate::oci::ErrorCode;
use crate::source::{SourceError, UpstreamError};

/// An error whose text may be shown to clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullError {
    /// The upstream's own error. `code` stands for a body that has none.
    Upstream { error: UpstreamError, code: ErrorCode },
    /// dray's own "not found": the client may request it elsewhere.
    NotFound { code: ErrorCode, message: String },
    /// The client has to change its request.
    BadRequest(&'static str),
    /// A rule denies it.
    Denied(String),
    /// No source responded: the client may try elsewhere or later.
    Unavailable(String),
    /// This node cannot reach the upstream; other nodes may.
    UpstreamUnreachable(String),
    /// The egress policy of this node blocks the upstream's address.
    Blocked(String),
    /// This node is overloaded, which says nothing of the upstream.
    Busy,
    /// The upstream's rate limit for this principal is used up; another principal may have pulls left.
    Limited(String),
    /// The upstream's response is invalid.
    InvalidUpstreamResponse(String),
    /// Only this node's cache was requested, and it does not hold the object.
    NotCached,
    /// No byte of the body lies in the requested range.
    Unsatisfiable { total: u64 },
}

impl PullError {
    /// `missing` is the code of a "not found" whose body has none.
    pub(super) fn of(error: &SourceError, missing: ErrorCode) -> Self {
        let message = error.to_string();
        match error {
            SourceError::NotFound(error) => Self::Upstream { error: error.clone(), code: missing },
            SourceError::Denied(error) => Self::Upstream { error: error.clone(), code: ErrorCode::Denied },
            SourceError::Failed(error) if error.status >= 500 => {
                Self::Upstream { error: error.clone(), code: ErrorCode::Unavailable }
            }
            SourceError::Failed(error) if error.status >= 400 => {
                Self::Upstream { error: error.clone(), code: ErrorCode::Unsupported }
            }
            SourceError::NotCached => Self::NotCached,
            SourceError::Blocked(_) => Self::Blocked(message),
            SourceError::Limited { .. } => Self::Limited(message),
            SourceError::Busy => Self::Busy,
            SourceError::Unreachable(_) | SourceError::Interrupted(_) => Self::UpstreamUnreachable(message),
            // A timeout is not `UpstreamUnreachable`: the upstream accepted the connection, so it is slow for other nodes as well.
            SourceError::TimedOut => Self::Unavailable(message),
            // The text names a program or file, which belongs only in the log.
            SourceError::NoCredentials(_) => {
                Self::UpstreamUnreachable("no credentials for the upstream are available, see dray's log".into())
            }
            SourceError::Failed(_) | SourceError::Malformed(_) => Self::InvalidUpstreamResponse(message),
        }
    }

    /// The message of the response to a client.
    pub fn message(&self) -> Cow<'_, str> {
        match self {
            Self::Upstream { error, .. } => error.to_string().into(),
            Self::NotFound { message, .. }
            | Self::Denied(message)
            | Self::Unavailable(message)
            | Self::UpstreamUnreachable(message)
            | Self::Blocked(message)
            | Self::Limited(message)
            | Self::InvalidUpstreamResponse(message) => message.into(),
            Self::BadRequest(message) => (*message).into(),
            Self::Busy => "this node is overloaded: too many concurrent requests".into(),
            Self::NotCached => "not cached on this node (only-if-cached)".into(),
            Self::Unsatisfiable { total } => {
                format!("the range is not satisfiable: the content has {total} bytes").into()
            }
        }
    }

    /// Whether it is about the rights of the client, by a rule or by the upstream.
    pub fn is_denied(&self) -> bool {
        match self {
            Self::Denied(_) => true,
            Self::Upstream { error, .. } => matches!(error.status, 401 | 403),
            _ => false,
        }
    }
}

impl fmt::Display for PullError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}

/// The status that a client gets for an upstream's status.
///
/// - 401 becomes 403: dray handles challenges itself, and a 401 without a challenge is invalid.
/// - 408 and 429 become 503: containerd repeats them at once, five times.
/// - Any other 4xx stays as it is; all other statuses become 503.
pub fn status_for_client(status: u16) -> u16 {
    match status {
        401 => 403,
        408 | 429 => 503,
        400..=499 => status,
        _ => 503,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstream_status_is_mapped_for_clients() {
        for status in [400, 403, 404, 405, 406, 410, 413, 416, 451] {
            assert_eq!(status_for_client(status), status);
        }
        for (status, want) in [(401, 403), (408, 503), (429, 503), (500, 503), (502, 503), (503, 503), (504, 503)] {
            assert_eq!(status_for_client(status), want, "{status}");
        }
    }

    #[test]
    fn upstream_error_is_passed_through() {
        let of = |error: &SourceError| PullError::of(error, ErrorCode::ManifestUnknown);
        let passed = |error: &SourceError| matches!(of(error), PullError::Upstream { .. });
        let failed = SourceError::failed;
        assert!([SourceError::not_found(), SourceError::denied(), failed(413), failed(500)].iter().all(passed));
        assert!(!passed(&SourceError::TimedOut) && !passed(&failed(304)) && !passed(&SourceError::NotCached));
        assert!(of(&SourceError::denied()).is_denied() && !of(&failed(406)).is_denied());
    }
}
