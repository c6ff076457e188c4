//! Brings a blob by several connections at once: each fetches a range, in whatever order they end.
//!
//! There are more connections only while they make it faster ([`ConnectionScaler`]), ranges that readers wait
//! for come first ([`RangePlan`]), and a source that breaks loses only its range. Where ranges are not
//! understood, one connection brings the rest in order.

mod lane;
mod meter;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use self::lane::{Lane, RangeLoss, RangeResult};
use self::meter::Meter;
use super::connection_scaler::{ConnectionCount, ConnectionScaler};
use super::span_stream::{ConnectionMode, FillSources, SpanStream};
use super::watched_body::{Breaks, WatchedBody};
use super::write::BlobWriter;
use super::{Fill, LITTLE_LEFT};
use crate::config::OnClientAbort;
use crate::oci::{Registry, Span};
use crate::shares::{Share, Shares};
use crate::source::{ServedFrom, SourceError};
use crate::store::LEAST_RATE;
use crate::times::{FIRST_PAUSE, GRACE, STILL, TICK};

/// How the bytes ended.
#[derive(Debug)]
pub(super) enum DownloadEnd {
    /// All were brought.
    Complete,
    /// Nobody wants them any more.
    Abandoned,
    /// The sources do not agree about its length: one of them lies.
    Disputed,
    Broken(SourceError),
}

/// One blob on its way in.
pub(super) struct Engine<'a> {
    pub(super) fill: &'a Fill,
    pub(super) sources: Arc<dyn FillSources>,
    /// Connections beyond the first of each blob.
    pub(super) connections: &'a Shares<Registry>,
    pub(super) total: u64,
    pub(super) writer: BlobWriter,
}

/// Connections beside others that were refused.
#[derive(Default)]
struct RefusedConnections {
    count: u32,
    wait_until: Option<Instant>,
}

/// How a download by ranges goes.
struct DownloadProgress {
    /// All bytes that have come, and when the last of them did.
    moved: (u64, Instant),
    /// Bytes of the upstream by which the plan has judged it.
    counted: u64,
    breaks: Breaks,
    /// When the connections last broke that failed together.
    broke_at: Option<Instant>,
    /// No connection is opened before that.
    resume_at: Instant,
    /// Whether the source understands ranges.
    understood: bool,
    refusals: RefusedConnections,
}

impl DownloadProgress {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            moved: (0, now),
            counted: 0,
            breaks: Breaks::default(),
            broke_at: None,
            resume_at: now,
            understood: true,
            refusals: RefusedConnections::default(),
        }
    }
}

/// Connections of one blob.
const MAX_OF_BLOB: usize = 8;

impl Engine<'_> {
    /// Fetches what is missing. `first` is the connection that is open already.
    pub(super) async fn run(mut self, mut first: SpanStream) -> DownloadEnd {
        if self.sources.connections() == ConnectionMode::One {
            return self.in_order(first).await;
        }
        match first.take_part() {
            Some(flow) => {
                let opened = (flow, first.served_from());
                drop(first);
                match self.by_ranges(opened).await {
                    Some(ended) => ended,
                    None => self.again_in_order().await,
                }
            }
            None => self.in_order(first).await,
        }
    }

    /// None: the source does not understand ranges after all.
    async fn by_ranges(&mut self, first: (WatchedBody, ServedFrom)) -> Option<DownloadEnd> {
        let meter = Meter::default();
        let (sources, total) = (self.sources.clone(), self.total);
        let mut course = DownloadProgress::new();
        let mut lanes = FuturesUnordered::new();
        let lane = |span, failures, writer, leave| Lane {
            sources: &*sources,
            span,
            total,
            failures,
            writer,
            meter: &meter,
            _leave: leave,
        };
        let span = Span { start: first.0.position(), end: first.0.end() };
        self.fill.plan.lock().take(span);
        let mut width = self.width();
        lanes.push(lane(span, 0, self.writer.clone(), None).run(Some(first)));
        let mut progress = self.fill.progress.subscribe();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if width.is_fixed() && self.sources.connections() == ConnectionMode::Climbing {
                // This node has become the owner: how owners broke says nothing of the upstream.
                (width, course.breaks) = (self.width(), Breaks::default());
                course.resume_at = Instant::now();
            }
            let now = Instant::now();
            let may_open = course.understood && now >= course.resume_at;
            self.fill.plan.lock().collect(self.fill.clock(), |span| sources.is_elsewhere(span));
            while may_open
                && let Some((span, leave)) =
                    self.next_range(lanes.len(), &mut width, &course.refusals, progress.borrow_and_update().hashed())
            {
                lanes.push(lane(span, course.breaks.barren, self.writer.clone(), leave).run(None));
            }
            meter.idles.store(may_open && width.is_fixed() && lanes.len() < width.lanes(), Ordering::Relaxed);
            let complete = self.fill.plan.lock().is_complete();
            if lanes.is_empty() && complete {
                return Some(DownloadEnd::Complete);
            }
            if lanes.is_empty() && !course.understood {
                self.fill.plan.lock().lend_no_more();
                return None;
            }
            let resume_at = course.resume_at;
            tokio::select! {
                Some(fetched) = lanes.next() => {
                    if let Some(ended) = self.came(fetched, lanes.len(), &mut width, &mut course) {
                        return Some(ended);
                    }
                }
                _ = tick.tick() => {
                    if let Some(ended) = self.look_over(&meter, &mut width, &mut course) {
                        return Some(ended);
                    }
                }
                () = self.fill.audience.waiting.notified() => {}
                () = sleep_until(resume_at), if now < resume_at => {}
                // The plan may go on when more is hashed.
                changed = progress.changed(), if lanes.len() < width.lanes() => {
                    if changed.is_err() {
                        return Some(DownloadEnd::Broken(unwritable()));
                    }
                }
            }
        }
    }

    /// How many connections there are. An owner lends ranges from now on.
    fn width(&self) -> ConnectionCount {
        match self.sources.connections() {
            ConnectionMode::One => ConnectionCount::Fixed(1),
            ConnectionMode::Chosen(lanes) => ConnectionCount::Fixed(lanes),
            ConnectionMode::Climbing => {
                self.fill.plan.lock().may_lend();
                ConnectionCount::Climbing(ConnectionScaler::new(MAX_OF_BLOB))
            }
        }
    }

    /// A connection has ended, beside so many others: what that means for the rest.
    fn came(
        &self,
        fetched: RangeResult,
        others: usize,
        width: &mut ConnectionCount,
        course: &mut DownloadProgress,
    ) -> Option<DownloadEnd> {
        let RangeResult { span, begun, position, lost } = fetched;
        let Some(lost) = lost else {
            course.breaks.recovered();
            course.resume_at = Instant::now();
            return None;
        };
        self.fill.plan.lock().give_back(Span { start: position, end: span.end });
        // Others may wait as well, each for the same in vain.
        let alone = others == 0 || (width.is_fixed() && course.moved.1.elapsed() > STILL);
        match lost {
            // One of several peers: the next time another one is asked.
            RangeLoss::Broke(_) | RangeLoss::Refused(_) if !alone && width.is_fixed() => {
                log_break(lost.why(), position, self.total);
                course.resume_at = Instant::now() + TICK;
                return None;
            }
            RangeLoss::Beginning | RangeLoss::Superseded => {
                course.breaks.recovered();
                return None;
            }
            RangeLoss::LeftBehind => {
                log_break(lost.why(), position, self.total);
                return None;
            }
            RangeLoss::NoRanges => {
                course.understood = false;
                return None;
            }
            RangeLoss::OtherLength => return Some(DownloadEnd::Disputed),
            RangeLoss::Unwritable => return Some(DownloadEnd::Broken(unwritable())),
            // The others get on: one fewer will do.
            RangeLoss::Refused(error) if !alone => {
                course.refusals.another(&error, Instant::now());
                width.limit(others);
                return None;
            }
            RangeLoss::Refused(error) if !error.is_outage() => return Some(DownloadEnd::Broken(error)),
            RangeLoss::Refused(_) | RangeLoss::Broke(_) => log_break(lost.why(), position, self.total),
        }
        // Several that waited for the same in vain have failed once.
        if course.broke_at.is_none_or(|at| begun >= at) {
            course.breaks.broke(position - span.start);
            course.broke_at = Some(Instant::now());
        }
        if alone && course.breaks.too_many() {
            return Some(DownloadEnd::Broken(SourceError::Unreachable("every source broke".into())));
        }
        course.resume_at = Instant::now() + course.breaks.pause();
        None
    }

    /// What has come since the last time: whether more connections are worth it, and whether the blob is still wanted.
    fn look_over(
        &self,
        meter: &Meter,
        width: &mut ConnectionCount,
        course: &mut DownloadProgress,
    ) -> Option<DownloadEnd> {
        // Where the plan waits for the hash, no piece finds this out.
        if self.writer.is_closed() || self.fill.progress.borrow().is_unreadable() {
            return Some(DownloadEnd::Broken(unwritable()));
        }
        let bytes = meter.bytes.load(Ordering::Relaxed);
        if bytes != course.moved.0 {
            course.moved = (bytes, Instant::now());
        }
        let of_upstream = meter.of_upstream.load(Ordering::Relaxed);
        let lanes = u32::try_from(meter.busy_with_upstream.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        self.fill.plan.lock().brought(of_upstream - course.counted, TICK * lanes);
        course.counted = of_upstream;
        width.observe(Instant::now(), bytes, meter.busy.load(Ordering::Relaxed));
        self.is_abandoned().then_some(DownloadEnd::Abandoned)
    }

    /// The next range, and the leave to fetch it beside so many others. None: not now.
    fn next_range(
        &mut self,
        running: usize,
        width: &mut ConnectionCount,
        refusals: &RefusedConnections,
        hashed: u64,
    ) -> Option<(Span, Option<Share<Registry>>)> {
        if running > 0 && refusals.is_too_soon(Instant::now()) {
            return None;
        }
        let wanted = self.fill.audience.wanted();
        // Who waits for a byte that nobody brings need not wait for a whole range to end.
        let mut plan = self.fill.plan.lock();
        let urgent = running < MAX_OF_BLOB && plan.waited_for(&wanted).is_some();
        if running >= width.lanes() && !urgent {
            return None;
        }
        // Peers are not spared as origins are.
        if let ConnectionCount::Fixed(_) = width {
            return Some((plan.chosen(hashed, &wanted, |ranges| self.sources.choose(ranges))?, None));
        }
        let leave = if running == 0 { None } else { self.connections.take(&self.fill.key.registry, 1) };
        if running > 0 && leave.is_none() {
            width.limit(running);
            return None;
        }
        Some((plan.next(hashed, &wanted, width.lanes())?, leave))
    }

    /// Asks for everything that is missing, and skips what is there; from the start where not even
    /// that is understood.
    async fn again_in_order(self) -> DownloadEnd {
        tracing::info!(digest = %self.fill.key.digest, "ranges are not understood, going on with one connection");
        let from = self.gap(0).map_or(0, |gap| gap.start);
        let opened = match SpanStream::open(self.sources.clone(), from, None).await {
            Err(error) if error.is_about_ranges() => SpanStream::open(self.sources.clone(), 0, None).await,
            other => other,
        };
        match opened {
            Ok(feed) if feed.total() == self.total => self.in_order(feed).await,
            Ok(_) => DownloadEnd::Broken(SourceError::Malformed("another length than before".into())),
            Err(error) => DownloadEnd::Broken(error),
        }
    }

    async fn in_order(self, mut feed: SpanStream) -> DownloadEnd {
        self.fill.plan.lock().lend_no_more();
        loop {
            let mut position = feed.position();
            let piece = tokio::select! {
                piece = feed.next() => piece,
                () = self.abandoned() => return DownloadEnd::Abandoned,
            };
            let mut bytes = match piece {
                Ok(Some(bytes)) => bytes,
                Ok(None) if self.gap(0).is_none() => return DownloadEnd::Complete,
                Ok(None) => return DownloadEnd::Broken(SourceError::Unreachable("every source broke".into())),
                Err(error) => return DownloadEnd::Broken(error),
            };
            // What an earlier attempt has written is not written again.
            while let Some(gap) = self.gap(position) {
                let _ = split(&mut bytes, gap.start - position);
                let bytes = split(&mut bytes, gap.end - gap.start);
                if bytes.is_empty() {
                    break;
                }
                let span = Span { start: gap.start, end: gap.start + bytes.len() as u64 };
                self.fill.plan.lock().take(span);
                if self.writer.write(span.start, bytes).await.is_err() {
                    return DownloadEnd::Broken(unwritable());
                }
                position = span.end;
            }
        }
    }

    /// The first range at or after `from` that nobody brings.
    fn gap(&self, from: u64) -> Option<Span> {
        self.fill.plan.lock().gap(from)
    }

    async fn abandoned(&self) {
        while !self.is_abandoned() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Whether everybody has left long ago, and much is still to come. Then nobody is let in any more.
    fn is_abandoned(&self) -> bool {
        let written = self.fill.progress.borrow().written().len();
        let comes_soon = written >= LEAST_RATE * self.fill.started.elapsed().as_secs();
        (self.total - written > LITTLE_LEFT || !comes_soon)
            && self.fill.place.rule.abandoned == OnClientAbort::Keep
            && !self.fill.plan.lock().has_lent()
            && self.fill.audience.close_after(GRACE)
    }
}

impl RefusedConnections {
    fn another(&mut self, error: &SourceError, now: Instant) {
        if self.count == 0 {
            tracing::info!(error = error.as_str(), "a further connection is refused");
        }
        self.wait_until = Some(now + (FIRST_PAUSE * 2u32.pow(self.count.min(5))));
        self.count += 1;
    }

    fn is_too_soon(&self, now: Instant) -> bool {
        self.wait_until.is_some_and(|until| now < until)
    }
}

/// Takes up to so many bytes from the front.
fn split(bytes: &mut Bytes, count: u64) -> Bytes {
    bytes.split_to(usize::try_from(count).unwrap_or(usize::MAX).min(bytes.len()))
}

fn log_break(why: &str, position: u64, total: u64) {
    tracing::info!(why, position, total, "a source broke, going on with another");
}

fn unwritable() -> SourceError {
    SourceError::Unreachable("the disk refuses to write".into())
}

#[cfg(test)]
mod tests;
