//! Bodies on their way in, whoever sends them, and why a source sends none.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// A blob's body as an origin or a peer sends it.
pub struct Incoming {
    /// Length of the whole blob, in bytes.
    pub total: u64,
    /// Offset of the first byte that comes.
    pub start: u64,
    body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// Where the bytes of an answer came from: the same words in the response, the log and the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedFrom {
    Memory,
    Disk,
    Peer,
    Origin,
    /// An expired tag, because the origin could not be asked.
    Stale,
}

/// A body ended early, or with an error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the body broke: {0}")]
pub struct Broken(pub String);

/// Why a source gives nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    #[error("the origin does not have it")]
    NotFound,
    #[error("the origin denies access")]
    Denied,
    #[error("the origin limits its requests")]
    Limited { retry_after: Option<Duration> },
    #[error("unreachable: {0}")]
    Unreachable(String),
    #[error("no answer in time")]
    TimedOut,
    #[error("the origin answered {0}")]
    Failed(u16),
    #[error("not followed: {0}")]
    Guarded(String),
    #[error("the origin's answer is wrong: {0}")]
    Malformed(String),
}

impl Incoming {
    pub fn new(
        start: u64,
        total: u64,
        body: impl futures_util::Stream<Item = Result<Bytes, Broken>> + Send + 'static,
    ) -> Self {
        Self { total, start, body: body.boxed() }
    }

    /// The next piece; None at the end of the body.
    pub async fn next(&mut self) -> Option<Result<Bytes, Broken>> {
        self.body.next().await
    }
}

impl ServedFrom {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Peer => "peer",
            Self::Origin => "origin",
            Self::Stale => "stale",
        }
    }
}

impl SourceError {
    /// The outcome's name in logs and metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Denied => "denied",
            Self::Limited { .. } => "limited",
            Self::Unreachable(_) => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Failed(_) => "failed",
            Self::Guarded(_) => "guarded",
            Self::Malformed(_) => "malformed",
        }
    }

    /// Whether the same question may well be answered in a moment.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Failed(500 | 502 | 503 | 504))
    }

    /// Whether this is about the origin's health, so that an older answer is better than none.
    /// "Not found" and "denied" are answers.
    pub fn is_outage(&self) -> bool {
        !matches!(self, Self::NotFound | Self::Denied)
    }

    /// Of two upstreams' errors the one that says more: an outage of one means that the other's
    /// "not found" is not the whole truth.
    pub fn severer(self, other: Self) -> Self {
        let rank = |error: &Self| match error {
            Self::NotFound => 0,
            Self::Denied => 1,
            Self::Guarded(_) => 2,
            Self::Malformed(_) => 3,
            Self::Failed(_) => 4,
            Self::TimedOut => 5,
            Self::Unreachable(_) => 6,
            Self::Limited { .. } => 7,
        };
        if rank(&other) > rank(&self) { other } else { self }
    }
}
