//! One connection's range: what it brings, and when it is better left.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::meter::{Busy, Meter};
use crate::fill::span_stream::FillSources;
use crate::fill::watched_body::WatchedBody;
use crate::fill::write::BlobWriter;
use crate::oci::{Registry, Span};
use crate::shares::Share;
use crate::source::{ServedFrom, SourceError};
use crate::times::TICK;

/// One connection's range.
pub(super) struct Lane<'a> {
    pub(super) sources: &'a dyn FillSources,
    pub(super) span: Span,
    pub(super) total: u64,
    pub(super) failures: u32,
    pub(super) writer: BlobWriter,
    pub(super) meter: &'a Meter,
    pub(super) _leave: Option<Share<Registry>>,
}

/// What became of a range: its first missing byte, and why the rest did not come.
pub(super) struct RangeResult {
    pub(super) span: Span,
    pub(super) begun: Instant,
    pub(super) position: u64,
    pub(super) lost: Option<RangeLoss>,
}

pub(super) enum RangeLoss {
    /// The connection broke.
    Broke(String),
    /// Only its beginning was to be fetched.
    Beginning,
    /// This node has become the owner meanwhile, and waits for no other one.
    Superseded,
    /// It says that the blob has another length than another source said.
    OtherLength,
    /// The others are far faster.
    LeftBehind,
    /// The source gives nothing.
    Refused(SourceError),
    /// It does not understand ranges.
    NoRanges,
    /// The disk takes no more.
    Unwritable,
}

impl Lane<'_> {
    pub(super) async fn run(self, opened: Option<(WatchedBody, ServedFrom)>) -> RangeResult {
        let (begun, mut position) = (Instant::now(), self.span.start);
        let current = self.sources.role();
        let role = current.get();
        let lost = match self.bring(opened, &mut position).await.err() {
            Some(RangeLoss::Broke(_) | RangeLoss::Refused(_)) if current.get() > role => Some(RangeLoss::Superseded),
            lost => lost,
        };
        RangeResult { span: self.span, begun, position, lost }
    }

    async fn bring(&self, opened: Option<(WatchedBody, ServedFrom)>, position: &mut u64) -> Result<(), RangeLoss> {
        let (mut flow, from) = match opened {
            Some(opened) => opened,
            None => match self.sources.open(self.span.start, Some(self.span.end), self.failures).await {
                Ok((incoming, _)) if incoming.total != self.total => return Err(RangeLoss::OtherLength),
                Ok((incoming, _)) if !self.is_beginning(incoming.span) => return Err(RangeLoss::NoRanges),
                Ok((incoming, from)) => (WatchedBody::new(incoming), from),
                Err(SourceError::Malformed(_)) => return Err(RangeLoss::NoRanges),
                Err(error) => return Err(RangeLoss::Refused(error)),
            },
        };
        let mut busy = None;
        let mut waited = Duration::ZERO;
        let end = flow.end().min(self.span.end);
        while *position < end {
            let asked = Instant::now();
            let mut bytes = match from {
                ServedFrom::Peer => self.gather_soon(&mut flow, *position, waited).await?,
                _ => flow.gather().await.map_err(RangeLoss::Broke)?,
            };
            let took = asked.elapsed();
            let with_upstream = from == ServedFrom::Upstream;
            busy.get_or_insert_with(|| {
                let with_upstream = with_upstream.then(|| Busy::new(&self.meter.busy_with_upstream));
                (Busy::new(&self.meter.busy), with_upstream)
            });
            bytes.truncate(usize::try_from(end - *position).unwrap_or(usize::MAX));
            let len = bytes.len() as u64;
            self.writer.write(*position, bytes).await.map_err(|_| RangeLoss::Unwritable)?;
            self.meter.bytes.fetch_add(len, Ordering::Relaxed);
            if with_upstream {
                self.meter.of_upstream.fetch_add(len, Ordering::Relaxed);
            }
            *position += len;
            // An origin is not asked twice for the same.
            if from == ServedFrom::Peer && *position < end {
                waited += took;
                self.meter.pace.lock().brought(len, took);
                let is_behind = self.meter.pace.lock().leaves(*position - self.span.start, waited);
                if is_behind || self.is_waited_for(*position, waited, Duration::ZERO) {
                    self.leave(*position)?;
                }
            }
        }
        if end < self.span.end { Err(RangeLoss::Beginning) } else { Ok(()) }
    }

    /// What comes next from a peer, unless all the others are done and it does not come soon.
    async fn gather_soon(&self, flow: &mut WatchedBody, position: u64, waited: Duration) -> Result<Bytes, RangeLoss> {
        let asked = Instant::now();
        let mut gathering = pin!(flow.gather());
        loop {
            tokio::select! {
                biased;
                bytes = &mut gathering => return bytes.map_err(RangeLoss::Broke),
                () = sleep(TICK) => if self.is_waited_for(position, waited, asked.elapsed()) {
                    self.leave(position)?;
                },
            }
        }
    }

    /// Whether nothing else is to be fetched, and the others were far faster.
    fn is_waited_for(&self, position: u64, waited: Duration, since: Duration) -> bool {
        let brought = position - self.span.start;
        self.meter.idles.load(Ordering::Relaxed) && self.meter.pace.lock().leaves_soon(brought, waited, since)
    }

    /// Leaves a peer that is behind, where others have the same.
    fn leave(&self, position: u64) -> Result<(), RangeLoss> {
        if self.sources.alternatives(position) > 1 {
            self.meter.pace.lock().left();
            return Err(RangeLoss::LeftBehind);
        }
        Ok(())
    }

    /// Whether this is the range that was asked for, or its beginning where an owner leaves only that to this
    /// node.
    fn is_beginning(&self, span: Span) -> bool {
        span.start == self.span.start && !span.is_empty() && span.end <= self.span.end
    }
}

impl RangeLoss {
    /// For the log.
    pub(super) fn why(&self) -> &str {
        match self {
            Self::Broke(why) => why,
            Self::Beginning => "only a part",
            Self::Superseded => "this node is the owner now",
            Self::OtherLength => "another length",
            Self::LeftBehind => "left behind by the others",
            Self::Refused(error) => error.as_str(),
            Self::NoRanges => "no ranges",
            Self::Unwritable => "unwritable",
        }
    }
}
