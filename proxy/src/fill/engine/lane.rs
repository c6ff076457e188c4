//! One connection's range: what it brings, and when it is better left.

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::meter::{Busy, Meter};
use crate::fill::feed::Sources;
use crate::fill::flow::Flow;
use crate::fill::write::Writer;
use crate::oci::{Registry, Span};
use crate::shares::Share;
use crate::source::{ServedFrom, SourceError};
use crate::times::TICK;

/// One connection's range.
pub(super) struct Lane<'a> {
    pub(super) sources: &'a dyn Sources,
    pub(super) span: Span,
    pub(super) total: u64,
    pub(super) failures: u32,
    pub(super) writer: Writer,
    pub(super) meter: &'a Meter,
    pub(super) _leave: Option<Share<Registry>>,
}

/// What became of a range: its first missing byte, and why the rest did not come.
pub(super) struct Fetched {
    pub(super) span: Span,
    pub(super) begun: Instant,
    pub(super) position: u64,
    pub(super) lost: Option<Lost>,
}

pub(super) enum Lost {
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
    pub(super) async fn run(self, opened: Option<(Flow, ServedFrom)>) -> Fetched {
        let (begun, mut position) = (Instant::now(), self.span.start);
        let current = self.sources.role();
        let role = current.get();
        let lost = match self.bring(opened, &mut position).await.err() {
            Some(Lost::Broke(_) | Lost::Refused(_)) if current.get() > role => Some(Lost::Superseded),
            lost => lost,
        };
        Fetched { span: self.span, begun, position, lost }
    }

    async fn bring(&self, opened: Option<(Flow, ServedFrom)>, position: &mut u64) -> Result<(), Lost> {
        let (mut flow, from) = match opened {
            Some(opened) => opened,
            None => match self.sources.open(self.span.start, Some(self.span.end), self.failures).await {
                Ok((incoming, _)) if incoming.total != self.total => return Err(Lost::OtherLength),
                Ok((incoming, _)) if !self.is_beginning(incoming.span) => return Err(Lost::NoRanges),
                Ok((incoming, from)) => (Flow::new(incoming), from),
                Err(SourceError::Malformed(_)) => return Err(Lost::NoRanges),
                Err(error) => return Err(Lost::Refused(error)),
            },
        };
        let mut busy = None;
        let mut waited = Duration::ZERO;
        let end = flow.end().min(self.span.end);
        while *position < end {
            let asked = Instant::now();
            let mut bytes = match from {
                ServedFrom::Peer => self.gather_soon(&mut flow, *position, waited).await?,
                _ => flow.gather().await.map_err(Lost::Broke)?,
            };
            let took = asked.elapsed();
            let with_origin = from == ServedFrom::Origin;
            busy.get_or_insert_with(|| {
                let with_origin = with_origin.then(|| Busy::new(&self.meter.busy_with_origin));
                (Busy::new(&self.meter.busy), with_origin)
            });
            bytes.truncate(usize::try_from(end - *position).unwrap_or(usize::MAX));
            let len = bytes.len() as u64;
            self.writer.write(*position, bytes).await.map_err(|_| Lost::Unwritable)?;
            self.meter.bytes.fetch_add(len, Ordering::Relaxed);
            if with_origin {
                self.meter.of_origin.fetch_add(len, Ordering::Relaxed);
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
        if end < self.span.end { Err(Lost::Beginning) } else { Ok(()) }
    }

    /// What comes next from a peer, unless all the others are done and it does not come soon.
    async fn gather_soon(&self, flow: &mut Flow, position: u64, waited: Duration) -> Result<Bytes, Lost> {
        let asked = Instant::now();
        let mut gathering = pin!(flow.gather());
        loop {
            tokio::select! {
                biased;
                bytes = &mut gathering => return bytes.map_err(Lost::Broke),
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
    fn leave(&self, position: u64) -> Result<(), Lost> {
        if self.sources.alternatives(position) > 1 {
            self.meter.pace.lock().left();
            return Err(Lost::LeftBehind);
        }
        Ok(())
    }

    /// Whether this is the range that was asked for, or its beginning where an owner leaves only that to this
    /// node.
    fn is_beginning(&self, span: Span) -> bool {
        span.start == self.span.start && !span.is_empty() && span.end <= self.span.end
    }
}

impl Lost {
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
