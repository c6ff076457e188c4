//! Downloads a blob by several connections at once. Each requests a range, and ranges end in any order.
//!
//! [`ConnectionScaler`] adds connections while they raise the throughput. [`RangePlan`] prefers ranges that readers
//! wait for. If a source fails, only its range is requested again. If a source does not support ranges, one connection
//! downloads the rest in order.

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
use super::{Fill, MAX_FINISHABLE_BYTES};
use crate::config::OnClientAbort;
use crate::oci::{Registry, Span};
use crate::shares::{Share, Shares};
use crate::source::{ServedFrom, SourceError};
use crate::store::MIN_DOWNLOAD_RATE;
use crate::times::{COMPLETION_GRACE, FIRST_RETRY_DELAY, NO_PROGRESS_TIMEOUT, TICK};

/// How a download ended.
#[derive(Debug)]
pub(super) enum DownloadEnd {
    /// Every byte arrived.
    Complete,
    /// All readers left.
    Abandoned,
    /// The sources state different lengths, so at least one of them is wrong.
    Disputed,
    Broken(SourceError),
}

/// The download of one blob.
pub(super) struct Engine<'a> {
    pub(super) fill: &'a Fill,
    pub(super) sources: Arc<dyn FillSources>,
    /// Connections beyond the first of each blob, shared by all downloads.
    pub(super) connections: &'a Shares<Registry>,
    pub(super) total: u64,
    pub(super) writer: BlobWriter,
}

/// Connections that the upstream refused while others were open.
#[derive(Default)]
struct RefusedConnections {
    count: u32,
    wait_until: Option<Instant>,
}

/// State of a download by ranges.
struct DownloadProgress {
    /// The number of bytes that arrived, and when the last of them did.
    moved: (u64, Instant),
    /// Bytes from the upstream that the plan has counted.
    counted: u64,
    breaks: Breaks,
    /// When connections last failed together.
    broke_at: Option<Instant>,
    /// No connection is opened before this time.
    resume_at: Instant,
    /// Whether the source supports ranges.
    ranges_supported: bool,
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
            ranges_supported: true,
            refusals: RefusedConnections::default(),
        }
    }
}

/// Connections of one blob. Larger: one blob takes more of the connections that all blobs share. Smaller: slower where
/// the upstream limits each connection.
const MAX_CONNECTIONS_PER_BLOB: usize = 8;

impl Engine<'_> {
    /// Downloads what is missing. `first` is the connection that is already open.
    pub(super) async fn run(mut self, mut first: SpanStream) -> DownloadEnd {
        if self.sources.connections() == ConnectionMode::One {
            return self.in_order(first).await;
        }
        match first.take_part() {
            Some(body) => {
                let opened = (body, first.served_from());
                drop(first);
                match self.by_ranges(opened).await {
                    Some(ended) => ended,
                    None => self.restart_in_order().await,
                }
            }
            None => self.in_order(first).await,
        }
    }

    /// None: the source does not support ranges after all.
    async fn by_ranges(&mut self, first: (WatchedBody, ServedFrom)) -> Option<DownloadEnd> {
        let meter = Meter::default();
        let (sources, total) = (self.sources.clone(), self.total);
        let mut state = DownloadProgress::new();
        let mut lanes = FuturesUnordered::new();
        let lane = |span, failures, writer, permit| Lane {
            sources: &*sources,
            span,
            total,
            failures,
            writer,
            meter: &meter,
            _permit: permit,
        };
        let span = Span { start: first.0.position(), end: first.0.end() };
        self.fill.plan.lock().take(span);
        let mut width = self.connection_count();
        lanes.push(lane(span, 0, self.writer.clone(), None).run(Some(first)));
        let mut progress = self.fill.progress.subscribe();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if width.is_fixed() && self.sources.connections() == ConnectionMode::Adaptive {
                // This node was promoted to owner: failures of owners are no evidence about the upstream.
                (width, state.breaks) = (self.connection_count(), Breaks::default());
                state.resume_at = Instant::now();
            }
            let now = Instant::now();
            let may_open = state.ranges_supported && now >= state.resume_at;
            self.fill.plan.lock().collect(self.fill.clock(), |span| sources.is_at_a_peer(span));
            while may_open
                && let Some((span, permit)) =
                    self.next_range(lanes.len(), &mut width, &state.refusals, progress.borrow_and_update().hashed())
            {
                lanes.push(lane(span, state.breaks.consecutive_empty, self.writer.clone(), permit).run(None));
            }
            meter
                .has_idle_capacity
                .store(may_open && width.is_fixed() && lanes.len() < width.lanes(), Ordering::Relaxed);
            let complete = self.fill.plan.lock().is_complete();
            if lanes.is_empty() && complete {
                return Some(DownloadEnd::Complete);
            }
            if lanes.is_empty() && !state.ranges_supported {
                self.fill.plan.lock().stop_lending();
                return None;
            }
            let resume_at = state.resume_at;
            tokio::select! {
                Some(fetched) = lanes.next() => {
                    if let Some(ended) = self.on_range_end(fetched, lanes.len(), &mut width, &mut state) {
                        return Some(ended);
                    }
                }
                _ = tick.tick() => {
                    if let Some(ended) = self.on_tick(&meter, &mut width, &mut state) {
                        return Some(ended);
                    }
                }
                () = self.fill.readers.waiting.notified() => {}
                () = sleep_until(resume_at), if now < resume_at => {}
                // Progress of the hash can move the window of the plan.
                changed = progress.changed(), if lanes.len() < width.lanes() => {
                    if changed.is_err() {
                        return Some(DownloadEnd::Broken(unwritable()));
                    }
                }
            }
        }
    }

    /// The number of connections in the present role. An owner lends ranges from now on.
    fn connection_count(&self) -> ConnectionCount {
        match self.sources.connections() {
            ConnectionMode::One => ConnectionCount::Fixed(1),
            ConnectionMode::Chosen(lanes) => ConnectionCount::Fixed(lanes),
            ConnectionMode::Adaptive => {
                self.fill.plan.lock().enable_lending();
                ConnectionCount::Adaptive(ConnectionScaler::new(MAX_CONNECTIONS_PER_BLOB))
            }
        }
    }

    /// Handles the end of a connection while `others` are open. Some: the download ends.
    fn on_range_end(
        &self,
        fetched: RangeResult,
        others: usize,
        width: &mut ConnectionCount,
        state: &mut DownloadProgress,
    ) -> Option<DownloadEnd> {
        let RangeResult { span, begun, position, lost } = fetched;
        let Some(lost) = lost else {
            state.breaks.recovered();
            state.resume_at = Instant::now();
            return None;
        };
        self.fill.plan.lock().give_back(Span { start: position, end: span.end });
        // Other connections do not count if they are stalled for the same reason.
        let alone = others == 0 || (width.is_fixed() && state.moved.1.elapsed() > NO_PROGRESS_TIMEOUT);
        match lost {
            // One of several peers failed: the range goes to another one.
            RangeLoss::Broke(_) | RangeLoss::Refused(_) if !alone && width.is_fixed() => {
                log_break(lost.cause(), position, self.total);
                state.resume_at = Instant::now() + TICK;
                return None;
            }
            RangeLoss::Beginning | RangeLoss::Superseded => {
                state.breaks.recovered();
                return None;
            }
            RangeLoss::LeftBehind => {
                log_break(lost.cause(), position, self.total);
                return None;
            }
            RangeLoss::NoRanges => {
                state.ranges_supported = false;
                return None;
            }
            RangeLoss::OtherLength => return Some(DownloadEnd::Disputed),
            RangeLoss::Unwritable => return Some(DownloadEnd::Broken(unwritable())),
            // The other connections progress: the download continues with one fewer.
            RangeLoss::Refused(error) if !alone => {
                state.refusals.record(&error, Instant::now());
                width.limit(others);
                return None;
            }
            RangeLoss::Refused(error) if !error.is_outage() => return Some(DownloadEnd::Broken(error)),
            RangeLoss::Refused(_) | RangeLoss::Broke(_) => log_break(lost.cause(), position, self.total),
        }
        // Connections that failed together count as one failure.
        if state.broke_at.is_none_or(|at| begun >= at) {
            state.breaks.broke(position - span.start);
            state.broke_at = Some(Instant::now());
        }
        if alone && state.breaks.too_many() {
            return Some(DownloadEnd::Broken(SourceError::Unreachable("all sources failed".into())));
        }
        state.resume_at = Instant::now() + state.breaks.pause();
        None
    }

    /// Periodic check: measures throughput, adapts the number of connections, and detects that the blob is no longer
    /// wanted. Some: the download ends.
    fn on_tick(&self, meter: &Meter, width: &mut ConnectionCount, state: &mut DownloadProgress) -> Option<DownloadEnd> {
        // If the plan waits for the hash, no write would detect the failure.
        if self.writer.is_closed() || self.fill.progress.borrow().is_unreadable() {
            return Some(DownloadEnd::Broken(unwritable()));
        }
        let bytes = meter.bytes.load(Ordering::Relaxed);
        if bytes != state.moved.0 {
            state.moved = (bytes, Instant::now());
        }
        let of_upstream = meter.of_upstream.load(Ordering::Relaxed);
        let lanes = u32::try_from(meter.busy_with_upstream.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        self.fill.plan.lock().brought(of_upstream - state.counted, TICK * lanes);
        state.counted = of_upstream;
        width.observe(Instant::now(), bytes, meter.busy.load(Ordering::Relaxed));
        self.is_abandoned().then_some(DownloadEnd::Abandoned)
    }

    /// The next range, and the permit for a further connection beside the `running` ones. None: no connection may be
    /// opened now.
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
        let wanted = self.fill.readers.wanted();
        // A reader that waits for a byte outside all running ranges gets a connection before any range ends.
        let mut plan = self.fill.plan.lock();
        let urgent = running < MAX_CONNECTIONS_PER_BLOB && plan.waited_for(&wanted).is_some();
        if running >= width.lanes() && !urgent {
            return None;
        }
        // Connections to peers need no permit: only upstreams are spared.
        if let ConnectionCount::Fixed(_) = width {
            return Some((plan.chosen(hashed, &wanted, |ranges| self.sources.choose(ranges))?, None));
        }
        let permit = if running == 0 { None } else { self.connections.take(&self.fill.key.registry, 1) };
        if running > 0 && permit.is_none() {
            width.limit(running);
            return None;
        }
        Some((plan.next(hashed, &wanted, width.lanes())?, permit))
    }

    /// Requests everything that is missing by one connection, or the whole blob if the source does not support that
    /// either. Bytes that are written already are skipped.
    async fn restart_in_order(self) -> DownloadEnd {
        tracing::info!(digest = %self.fill.key.digest, "ranges unsupported, download continues in order");
        let from = self.gap(0).map_or(0, |gap| gap.start);
        let opened = match SpanStream::open(self.sources.clone(), from, None).await {
            Err(error) if error.is_about_ranges() => SpanStream::open(self.sources.clone(), 0, None).await,
            other => other,
        };
        match opened {
            Ok(feed) if feed.total() == self.total => self.in_order(feed).await,
            Ok(_) => DownloadEnd::Broken(SourceError::Malformed("the sources state different lengths".into())),
            Err(error) => DownloadEnd::Broken(error),
        }
    }

    async fn in_order(self, mut feed: SpanStream) -> DownloadEnd {
        self.fill.plan.lock().stop_lending();
        loop {
            let mut position = feed.position();
            let piece = tokio::select! {
                piece = feed.next() => piece,
                () = self.abandoned() => return DownloadEnd::Abandoned,
            };
            let mut bytes = match piece {
                Ok(Some(bytes)) => bytes,
                Ok(None) if self.gap(0).is_none() => return DownloadEnd::Complete,
                Ok(None) => return DownloadEnd::Broken(SourceError::Unreachable("all sources failed".into())),
                Err(error) => return DownloadEnd::Broken(error),
            };
            // Bytes of an earlier attempt are not written again.
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

    /// The first range at or after `from` that is neither written nor requested.
    fn gap(&self, from: u64) -> Option<Span> {
        self.fill.plan.lock().gap(from)
    }

    async fn abandoned(&self) {
        while !self.is_abandoned() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Whether all readers left for longer than the grace period while much is missing. After that, no reader is
    /// admitted.
    fn is_abandoned(&self) -> bool {
        let written = self.fill.progress.borrow().written().len();
        let comes_soon = written >= MIN_DOWNLOAD_RATE * self.fill.started.elapsed().as_secs();
        (self.total - written > MAX_FINISHABLE_BYTES || !comes_soon)
            && self.fill.repo_ref.rule.on_client_abort == OnClientAbort::Stop
            && !self.fill.plan.lock().has_lent()
            && self.fill.readers.close_after(COMPLETION_GRACE)
    }
}

impl RefusedConnections {
    fn record(&mut self, error: &SourceError, now: Instant) {
        if self.count == 0 {
            tracing::info!(error = error.as_str(), "additional connection refused");
        }
        self.wait_until = Some(now + (FIRST_RETRY_DELAY * 2u32.pow(self.count.min(5))));
        self.count += 1;
    }

    fn is_too_soon(&self, now: Instant) -> bool {
        self.wait_until.is_some_and(|until| now < until)
    }
}

/// Takes up to `count` bytes from the front.
fn split(bytes: &mut Bytes, count: u64) -> Bytes {
    bytes.split_to(usize::try_from(count).unwrap_or(usize::MAX).min(bytes.len()))
}

fn log_break(error: &str, position: u64, total: u64) {
    tracing::info!(error, position, total, "download source failed");
}

fn unwritable() -> SourceError {
    SourceError::Unreachable("the cache of this node cannot be written: check its disk".into())
}

#[cfg(test)]
mod tests;
