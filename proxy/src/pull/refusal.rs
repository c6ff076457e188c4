//! Why a client gets no content.

use crate::oci::ErrorCode;
use crate::source::SourceError;

/// A refusal, in words that a client may read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody has it: the client may ask elsewhere.
    NotFound { code: ErrorCode, message: String },
    /// A rule or the origin denies it.
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

impl Refusal {
    pub(super) fn of(error: &SourceError, missing: ErrorCode) -> Self {
        let message = error.to_string();
        match error {
            SourceError::NotFound => Self::NotFound { code: missing, message },
            SourceError::NotKept => Self::NotKept,
            SourceError::Denied => Self::Denied(message),
            SourceError::Guarded(_) => Self::Guarded(message),
            SourceError::Limited { .. } => Self::Limited(message),
            SourceError::Busy => Self::Busy,
            SourceError::Unreachable(_) => Self::NoWay(message),
            // It takes its time for everybody: whoever cannot be reached at all does not even take a connection.
            SourceError::TimedOut | SourceError::Failed(500..) => Self::Unavailable(message),
            // Which program or file it is concerns nobody but the log.
            SourceError::NoCredentials(_) => Self::NoWay("no credentials can be had for the origin".into()),
            SourceError::Failed(_) | SourceError::Malformed(_) => Self::BadOrigin(message),
        }
    }
}
