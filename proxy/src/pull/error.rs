//! Why a client gets no content.

use crate::oci::ErrorCode;
use crate::source::{SourceError, UpstreamError};

/// A refusal, in words that a client may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullError {
    /// The upstream's own error. `code` stands for a body that has none.
    Upstream { error: UpstreamError, code: ErrorCode },
    /// dray's own decision that there is no such thing: the client may request it elsewhere.
    NotFound { code: ErrorCode, message: String },
    /// A rule denies it.
    Denied(String),
    /// Nothing reachable: the client may ask elsewhere or later.
    Unavailable(String),
    /// The same, seen from this node: there may be a way from others.
    NoWay(String),
    /// This node may not go where the origin is.
    Guarded(String),
    /// This node has too much to do, which says nothing of the origin.
    Busy,
    /// The origin wants to hear of this caller later, perhaps not of another one.
    Limited(String),
    /// The origin's answer cannot be passed on.
    BadOrigin(String),
    /// Only what is here was asked for, and it is not.
    NotKept,
    /// No byte of the body lies in the range asked for.
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
            SourceError::NotKept => Self::NotKept,
            SourceError::Guarded(_) => Self::Guarded(message),
            SourceError::Limited { .. } => Self::Limited(message),
            SourceError::Busy => Self::Busy,
            SourceError::Unreachable(_) | SourceError::Interrupted(_) => Self::NoWay(message),
            // It takes its time for everybody: whoever cannot be reached at all does not even take a connection.
            SourceError::TimedOut => Self::Unavailable(message),
            // Which program or file it is concerns nobody but the log.
            SourceError::NoCredentials(_) => Self::NoWay("no credentials can be had for the origin".into()),
            SourceError::Failed(_) | SourceError::Malformed(_) => Self::BadOrigin(message),
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

/// The status by which a client hears of an upstream's status.
///
/// 4xx stays as it is, with three exceptions. dray answers challenges itself, so that a 401 without one means 403.
/// containerd repeats 408 and 429 at once, five times; they become 503 like everything that may pass.
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
    fn status_of_an_upstream_reaches_the_client() {
        for status in [400, 403, 404, 405, 406, 410, 413, 416, 451] {
            assert_eq!(status_for_client(status), status);
        }
        for (status, want) in [(401, 403), (408, 503), (429, 503), (500, 503), (502, 503), (503, 503), (504, 503)] {
            assert_eq!(status_for_client(status), want, "{status}");
        }
    }

    #[test]
    fn only_an_upstreams_response_is_passed_on() {
        let of = |error: &SourceError| PullError::of(error, ErrorCode::ManifestUnknown);
        let passed = |error: &SourceError| matches!(of(error), PullError::Upstream { .. });
        let failed = SourceError::failed;
        assert!([SourceError::not_found(), SourceError::denied(), failed(413), failed(500)].iter().all(passed));
        assert!(!passed(&SourceError::TimedOut) && !passed(&failed(304)) && !passed(&SourceError::NotKept));
        assert!(of(&SourceError::denied()).is_denied() && !of(&failed(406)).is_denied());
    }
}
