//! Downloads one range by one connection, and gives up a peer that is far slower than the others.

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

/// One connection and its range.
pub(super) struct Lane<'a> {
    pub(super) sources: &'a dyn FillSources,
    pub(super) span: Span,
    pub(super) total: u64,
    pub(super) failures: u32,
    pub(super) writer: BlobWriter,
    pub(super) meter: &'a Meter,
    pub(super) _permit: Option<Share<Registry>>,
}

/// The result of a range: its first missing byte, and why the rest is missing.
pub(super) struct RangeResult {
    pub(super) span: Span,
    pub(super) begun: Instant,
    pub(super) position: u64,
    pub(super) lost: Option<RangeLoss>,
}

pub(super) enum RangeLoss {
    /// The connection failed.
    Broke(String),
    /// The source sent only the beginning of the range: an owner may lend only that.
    Beginning,
    /// This node was promoted to owner meanwhile, and waits for no other owner.
    Superseded,
    /// The source states another length for the blob than an earlier source.
    OtherLength,
    /// The other peers are far faster.
    LeftBehind,
    /// The source sent an error.
    Refused(SourceError),
    /// The source does not support ranges.
    NoRanges,
    /// The writer is closed, because the disk failed.
    Unwritable,
}

impl Lane<'_> {
    pub(super) async fn run(self, opened: Option<(WatchedBody, ServedFrom)>) -> RangeResult {
        let (begun, mut position) = (Instant::now(), self.span.start);
        let current = self.sources.role();
        let role = current.get();
        let lost = match self.fetch(opened, &mut position).await.err() {
            Some(RangeLoss::Broke(_) | RangeLoss::Refused(_)) if current.get() > role => Some(RangeLoss::Superseded),
            lost => lost,
        };
        RangeResult { span: self.span, begun, position, lost }
    }

    async fn fetch(&self, opened: Option<(WatchedBody, ServedFrom)>, position: &mut u64) -> Result<(), RangeLoss> {
        let (mut body, from) = match opened {
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
        let end = body.end().min(self.span.end);
        while *position < end {
            let requested_at = Instant::now();
            let mut bytes = match from {
                ServedFrom::Peer => self.gather_or_give_up(&mut body, *position, waited).await?,
                _ => body.gather().await.map_err(RangeLoss::Broke)?,
            };
            let took = requested_at.elapsed();
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
            // Only peers are given up: the upstream gets no second request for the same range.
            if from == ServedFrom::Peer && *position < end {
                waited += took;
                self.meter.pace.lock().brought(len, took);
                let is_behind = self.meter.pace.lock().leaves(*position - self.span.start, waited);
                if is_behind || self.is_last_and_slow(*position, waited, Duration::ZERO) {
                    self.give_up(*position)?;
                }
            }
        }
        if end < self.span.end { Err(RangeLoss::Beginning) } else { Ok(()) }
    }

    /// The next bytes from a peer. Fails if no other range is left to request and the peer is far too slow.
    async fn gather_or_give_up(
        &self,
        body: &mut WatchedBody,
        position: u64,
        waited: Duration,
    ) -> Result<Bytes, RangeLoss> {
        let requested_at = Instant::now();
        let mut gathering = pin!(body.gather());
        loop {
            tokio::select! {
                biased;
                bytes = &mut gathering => return bytes.map_err(RangeLoss::Broke),
                () = sleep(TICK) => if self.is_last_and_slow(position, waited, requested_at.elapsed()) {
                    self.give_up(position)?;
                },
            }
        }
    }

    /// Whether nothing else is left to request, and the others were far faster.
    fn is_last_and_slow(&self, position: u64, waited: Duration, since: Duration) -> bool {
        let brought = position - self.span.start;
        self.meter.has_idle_capacity.load(Ordering::Relaxed)
            && self.meter.pace.lock().leaves_soon(brought, waited, since)
    }

    /// Gives up a slow peer, if another one has the same bytes.
    fn give_up(&self, position: u64) -> Result<(), RangeLoss> {
        if self.sources.alternatives(position) > 1 {
            self.meter.pace.lock().left();
            return Err(RangeLoss::LeftBehind);
        }
        Ok(())
    }

    /// Whether `span` is the requested range, or its beginning: an owner may send only that.
    fn is_beginning(&self, span: Span) -> bool {
        span.start == self.span.start && !span.is_empty() && span.end <= self.span.end
    }
}

impl RangeLoss {
    /// The cause, for the log.
    pub(super) fn cause(&self) -> &str {
        match self {
            Self::Broke(cause) => cause,
            Self::Beginning => "partial range",
            Self::Superseded => "promoted to owner",
            Self::OtherLength => "length mismatch",
            Self::LeftBehind => "far slower than other peers",
            Self::Refused(error) => error.as_str(),
            Self::NoRanges => "ranges unsupported",
            Self::Unwritable => "cache not writable",
        }
    }
}
