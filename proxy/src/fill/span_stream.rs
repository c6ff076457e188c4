//! A body that arrives in order, resumed from other connections when one fails.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::watched_body::{Breaks, WatchedBody};
use crate::bandwidth::{CurrentPriority, Priority};
use crate::oci::Span;
use crate::role::{CurrentRole, Role};
use crate::source::{Incoming, ServedFrom, SourceError};
use crate::store::Blob;

/// The sources of a blob: peers, upstreams, or both.
#[async_trait]
pub trait FillSources: Send + Sync {
    /// Opens the blob at `from`, up to `end` or to its end. The body may begin earlier if a source ignores ranges.
    /// `failures` counts the sources that failed before, as a reason to use another one.
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError>;

    /// The role in which requests are sent. When it rises, bodies that were opened as a follower end.
    fn role(&self) -> CurrentRole {
        CurrentRole::new(Role::Global)
    }

    /// What waits for the bytes. It rises when a more urgent request joins.
    fn priority(&self) -> CurrentPriority {
        CurrentPriority::new(Priority::Client)
    }

    /// How many connections to use in the present role.
    fn connections(&self) -> ConnectionMode;

    /// The index of the range to request next, if the order is free.
    fn choose(&self, ranges: &[Span]) -> Option<usize> {
        (!ranges.is_empty()).then_some(0)
    }

    /// How many sources have the byte at `at` and can be used now.
    fn alternatives(&self, _at: u64) -> usize {
        0
    }

    /// Whether a peer has announced that it has all of this range.
    fn is_at_a_peer(&self, _span: Span) -> bool {
        false
    }

    /// The bytes of these sources were verified.
    fn matched(&self, _truth: VerifiedContent) {}

    /// The bytes of these sources do not match the digest: at least one of them sent corrupt data.
    fn mismatched(&self) {}
}

/// A blob that has been verified.
pub enum VerifiedContent {
    Bytes(Bytes),
    File(Arc<Blob>),
}

/// How many connections download a blob, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionMode {
    /// One connection, in order.
    One,
    /// As many connections as raise the throughput.
    Adaptive,
    /// A fixed number of connections, in the order that [`FillSources::choose`] prefers.
    Chosen(usize),
}

impl VerifiedContent {
    /// The length of the blob.
    pub fn total(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(blob) => blob.len,
        }
    }

    /// Reads a part of it. Blocks on the disk.
    #[expect(clippy::disallowed_methods, reason = "blocks")]
    pub fn read(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        match self {
            Self::Bytes(bytes) => {
                let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..at + buffer.len()));
                buffer.copy_from_slice(rest.ok_or(std::io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::File(blob) => blob.file.read_exact_at(buffer, at),
        }
    }
}

/// The bytes of one span of a blob, in order.
pub struct SpanStream {
    sources: Arc<dyn FillSources>,
    /// The role in which the requests were sent.
    role: Role,
    body: Option<WatchedBody>,
    /// The source is known to support ranges.
    is_ranged: bool,
    total: u64,
    position: u64,
    end: u64,
    served_from: ServedFrom,
    breaks: Breaks,
    /// New bytes that the present connection has sent.
    received: u64,
}

impl SpanStream {
    /// Opens a span; without `end` to the end of the blob.
    pub async fn open(sources: Arc<dyn FillSources>, from: u64, end: Option<u64>) -> Result<Self, SourceError> {
        let (incoming, served_from) = open(&*sources, from, end).await?;
        let end = end.map_or(incoming.total, |end| end.min(incoming.total));
        Ok(Self::of(sources, incoming, served_from, from, end))
    }

    /// Opens a whole blob at `from` by requesting only its first range, if ranges are supported. The rest can then be
    /// requested from other sources, or by several connections.
    pub(super) async fn open_range(sources: Arc<dyn FillSources>, from: u64, len: u64) -> Result<Self, SourceError> {
        match open(&*sources, from, Some(from.saturating_add(len))).await {
            Ok((incoming, served_from)) => {
                let (start, total) = (incoming.span.start, incoming.total);
                Ok(Self::of(sources, incoming, served_from, start, total))
            }
            // The source rejects the range, or the blob ends before it: requests the whole blob, in order.
            Err(error) if error.is_about_ranges() => Self::open(sources, 0, None).await,
            Err(error) => Err(error),
        }
    }

    fn of(sources: Arc<dyn FillSources>, incoming: Incoming, served_from: ServedFrom, position: u64, end: u64) -> Self {
        let (total, is_ranged) = (incoming.total, incoming.span != Span::whole(incoming.total));
        let body = Some(WatchedBody::new(incoming));
        let (role, breaks) = (sources.role().get(), Breaks::default());
        Self { sources, role, body, is_ranged, total, position, end, served_from, breaks, received: 0 }
    }

    /// Length of the whole blob.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that are still missing.
    pub(super) fn left(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }

    /// Offset of the next byte.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether the source sends bytes before the span, because it ignores ranges.
    pub fn skips(&self) -> bool {
        self.body.as_ref().is_some_and(|body| body.position() < self.position)
    }

    pub fn served_from(&self) -> ServedFrom {
        self.served_from
    }

    /// Closes the connection to the source, if the stream can be resumed at its position. The client has stopped
    /// reading.
    pub(super) fn release(&mut self) {
        self.body.take_if(|body| self.is_ranged && body.position() == self.position);
    }

    /// Takes the open connection, if it sends only a part of the blob.
    pub(super) fn take_part(&mut self) -> Option<WatchedBody> {
        self.body.take_if(|body| body.position() > 0 || body.end() < self.total)
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        while self.position < self.end {
            let Some(body) = &mut self.body else {
                self.reopen().await?;
                continue;
            };
            if body.position() == body.end() {
                // The requested part is complete.
                self.body = None;
                continue;
            }
            let starts_at = body.position();
            match body.next().await {
                Ok(piece) => {
                    if let Some(piece) = self.cut(piece, starts_at) {
                        self.position += piece.len() as u64;
                        self.received += piece.len() as u64;
                        return Ok(Some(piece));
                    }
                }
                Err(error) => self.record_failure(&error),
            }
        }
        Ok(None)
    }

    /// Cuts the new bytes from a piece: a source without ranges begins again at the first byte.
    fn cut(&self, mut piece: Bytes, starts_at: u64) -> Option<Bytes> {
        let known = self.position - starts_at;
        if known >= piece.len() as u64 {
            return None;
        }
        let skip = usize::try_from(known).unwrap_or(usize::MAX);
        let _ = piece.split_to(skip);
        let wanted = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
        piece.truncate(wanted);
        Some(piece)
    }

    fn record_failure(&mut self, error: &str) {
        tracing::info!(error, position = self.position, total = self.total, "download source failed");
        self.body = None;
        self.breaks.broke(std::mem::take(&mut self.received));
        let role = self.sources.role().get();
        if role > self.role {
            // Failures of owners are no evidence about the upstream.
            (self.role, self.breaks) = (role, Breaks::default());
        }
    }

    async fn reopen(&mut self) -> Result<(), SourceError> {
        if self.breaks.too_many() {
            return Err(SourceError::Unreachable("all sources failed".into()));
        }
        tokio::time::sleep(self.breaks.pause()).await;
        let end = (self.end < self.total).then_some(self.end);
        match self.sources.open(self.position, end, self.breaks.failures).await {
            Ok((incoming, _)) if incoming.total != self.total || incoming.span.start > self.position => {
                self.record_failure("length mismatch");
            }
            Ok((incoming, _)) => self.body = Some(WatchedBody::new(incoming)),
            Err(error) => {
                self.record_failure(error.as_str());
                if !error.is_outage() {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Opens a span, and retries if it fails while the role has risen.
async fn open(sources: &dyn FillSources, from: u64, end: Option<u64>) -> Result<(Incoming, ServedFrom), SourceError> {
    loop {
        let role = sources.role().get();
        match sources.open(from, end, 0).await {
            Err(_) if sources.role().get() > role => {}
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Broken;
    use futures_util::{StreamExt, stream};
    use parking_lot::Mutex;

    /// What one connection of the test does.
    #[derive(Clone, Copy)]
    enum Act {
        /// Honours the range, sends that number of bytes, then fails.
        Send(usize),
        /// Ignores the range and begins at 0.
        FromStart(usize),
        Stall,
        Refuse,
        OtherLength,
    }

    struct Script {
        body: Vec<u8>,
        acts: Mutex<Vec<Act>>,
    }

    #[async_trait]
    impl FillSources for Script {
        async fn open(&self, from: u64, _: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
            let act = {
                let mut acts = self.acts.lock();
                if acts.is_empty() { Act::Refuse } else { acts.remove(0) }
            };
            let total = self.body.len() as u64;
            let (start, count) = match act {
                Act::Send(count) => (from, count),
                Act::FromStart(count) => (0, count),
                Act::Refuse => return Err(SourceError::failed(503)),
                Act::OtherLength => {
                    let span = Span { start: from, end: total + 1 };
                    return Ok((Incoming::new(span, total + 1, stream::empty()), ServedFrom::Upstream));
                }
                Act::Stall => {
                    let span = Span { start: from, end: total };
                    return Ok((Incoming::new(span, total, stream::pending()), ServedFrom::Upstream));
                }
            };
            let rest = &self.body[usize::try_from(start).unwrap()..];
            let sent = rest[..count.min(rest.len())].to_vec();
            let pieces: Vec<_> = sent.chunks(7).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
            let end = Err(Broken("reset".into()));
            let span = Span { start, end: total };
            Ok((Incoming::new(span, total, stream::iter(pieces).chain(stream::iter([end]))), ServedFrom::Upstream))
        }

        fn connections(&self) -> ConnectionMode {
            ConnectionMode::One
        }
    }

    async fn read(acts: &[Act], from: u64, end: Option<u64>) -> Result<Vec<u8>, SourceError> {
        let body: Vec<u8> = (0..=255).collect();
        let script = Arc::new(Script { body, acts: Mutex::new(acts.to_vec()) });
        let mut feed = SpanStream::open(script, from, end).await?;
        let mut read = Vec::new();
        while let Some(piece) = feed.next().await? {
            read.extend_from_slice(&piece);
        }
        Ok(read)
    }

    #[tokio::test(start_paused = true)]
    async fn stream_resumes_after_each_kind_of_failure() {
        let whole: Vec<u8> = (0..=255).collect();
        for acts in [
            &[Act::Send(256)][..],
            &[Act::Send(10), Act::Send(10), Act::Send(300)],
            &[Act::Send(100), Act::FromStart(50), Act::FromStart(300)],
            &[Act::Send(100), Act::Stall, Act::Refuse, Act::Send(300)],
            &[Act::Send(100), Act::OtherLength, Act::Send(300)],
        ] {
            assert_eq!(read(acts, 0, None).await.unwrap(), whole);
        }
        assert_eq!(read(&[Act::Send(5), Act::FromStart(300)], 10, Some(40)).await.unwrap(), whole[10..40]);
    }

    #[tokio::test(start_paused = true)]
    async fn released_stream_resumes_at_its_position() {
        let body: Vec<u8> = (0..=255).collect();
        let acts = Mutex::new(vec![Act::Send(100), Act::Send(300)]);
        let script = Arc::new(Script { body: body.clone(), acts });
        let mut feed = SpanStream::open(script.clone(), 50, None).await.unwrap();
        let mut read = feed.next().await.unwrap().unwrap().to_vec();
        assert!(feed.body.is_some());
        feed.release();
        assert!(feed.body.is_none(), "the connection is closed");
        while let Some(piece) = feed.next().await.unwrap() {
            read.extend_from_slice(&piece);
        }
        assert_eq!(read, body[50..]);
        assert!(script.acts.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn one_byte_per_connection_fails() {
        let error = read(&[Act::Send(1); 300], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn stream_without_bytes_fails() {
        let error = read(&[Act::Send(10), Act::Stall, Act::Send(0), Act::Refuse], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
        assert_eq!(read(&[Act::Refuse], 0, None).await.unwrap_err(), SourceError::failed(503));
    }
}
