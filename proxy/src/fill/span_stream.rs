//! A body that arrives in order, whatever happens to the connections that carry it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::watched_body::{Breaks, WatchedBody};
use crate::oci::Span;
use crate::role::{CurrentRole, Role};
use crate::source::{Incoming, ServedFrom, SourceError};
use crate::store::Blob;

/// Where a blob's bytes can be had.
#[async_trait]
pub trait FillSources: Send + Sync {
    /// Opens the blob at `from`, up to `end` or to its end. The answer may begin earlier where a
    /// source does not honour ranges. `failures` counts the sources that broke before: a reason to
    /// ask another one.
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError>;

    /// The role in which they are asked. When it rises, what was opened as a follower breaks.
    fn role(&self) -> CurrentRole {
        CurrentRole::new(Role::Global)
    }

    /// By how many connections the bytes come best, in the present role.
    fn connections(&self) -> ConnectionMode;

    /// Which of these ranges to fetch next, where the order is free.
    fn choose(&self, ranges: &[Span]) -> Option<usize> {
        (!ranges.is_empty()).then_some(0)
    }

    /// How many of them have the byte at `at` and could be asked for it now.
    fn alternatives(&self, _at: u64) -> usize {
        0
    }

    /// Whether somebody said to have all of this.
    fn is_elsewhere(&self, _span: Span) -> bool {
        false
    }

    /// What came from them is the blob.
    fn matched(&self, _truth: VerifiedContent) {}

    /// What came from them is not: one of them lied.
    fn mismatched(&self) {}
}

/// A blob that has been verified.
pub enum VerifiedContent {
    Bytes(Bytes),
    File(Arc<Blob>),
}

/// How a blob is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionMode {
    /// In order, by one.
    One,
    /// By as many as make it faster.
    Climbing,
    /// By so many, in the order that [`FillSources::choose`] likes best.
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
    /// The role in which they were asked.
    role: Role,
    flow: Option<WatchedBody>,
    /// The source has shown that it understands ranges.
    is_ranged: bool,
    total: u64,
    position: u64,
    end: u64,
    served_from: ServedFrom,
    breaks: Breaks,
    /// New bytes that this connection has brought.
    brought: u64,
}

impl SpanStream {
    /// Opens a span; without `end` to the end of the blob.
    pub async fn open(sources: Arc<dyn FillSources>, from: u64, end: Option<u64>) -> Result<Self, SourceError> {
        let (incoming, served_from) = open(&*sources, from, end).await?;
        let end = end.map_or(incoming.total, |end| end.min(incoming.total));
        Ok(Self::of(sources, incoming, served_from, from, end))
    }

    /// Opens a whole blob at `from` by asking for the first range only, where that is understood:
    /// what is left can then be asked for elsewhere, or by several connections.
    pub(super) async fn open_range(sources: Arc<dyn FillSources>, from: u64, len: u64) -> Result<Self, SourceError> {
        match open(&*sources, from, Some(from.saturating_add(len))).await {
            Ok((incoming, served_from)) => {
                let (start, total) = (incoming.span.start, incoming.total);
                Ok(Self::of(sources, incoming, served_from, start, total))
            }
            // It stumbles over the range, or the blob ends before it: all of it then, in order.
            Err(error) if error.is_about_ranges() => Self::open(sources, 0, None).await,
            Err(error) => Err(error),
        }
    }

    fn of(sources: Arc<dyn FillSources>, incoming: Incoming, served_from: ServedFrom, position: u64, end: u64) -> Self {
        let (total, is_ranged) = (incoming.total, incoming.span != Span::whole(incoming.total));
        let flow = Some(WatchedBody::new(incoming));
        let (role, breaks) = (sources.role().get(), Breaks::default());
        Self { sources, role, flow, is_ranged, total, position, end, served_from, breaks, brought: 0 }
    }

    /// Length of the whole blob.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that are still to come.
    pub(super) fn left(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }

    /// Offset of the next byte that comes.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether the source begins before the span: it does not honour ranges.
    pub fn skips(&self) -> bool {
        self.flow.as_ref().is_some_and(|flow| flow.position() < self.position)
    }

    pub fn served_from(&self) -> ServedFrom {
        self.served_from
    }

    /// Closes the connection to the source if another one can go on from here. The client has stopped reading.
    pub(super) fn release(&mut self) {
        self.flow.take_if(|flow| self.is_ranged && flow.position() == self.position);
    }

    /// The connection that is open, if it brings only a part of the blob.
    pub(super) fn take_part(&mut self) -> Option<WatchedBody> {
        self.flow.take_if(|flow| flow.position() > 0 || flow.end() < self.total)
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        while self.position < self.end {
            let Some(flow) = &mut self.flow else {
                self.reopen().await?;
                continue;
            };
            if flow.position() == flow.end() {
                // It brought the part that was asked for.
                self.flow = None;
                continue;
            }
            let starts_at = flow.position();
            match flow.next().await {
                Ok(piece) => {
                    if let Some(piece) = self.cut(piece, starts_at) {
                        self.position += piece.len() as u64;
                        self.brought += piece.len() as u64;
                        return Ok(Some(piece));
                    }
                }
                Err(why) => self.lose(&why),
            }
        }
        Ok(None)
    }

    /// Cuts from a piece what is new: a source without ranges begins again at the start.
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

    fn lose(&mut self, why: &str) {
        tracing::info!(why, position = self.position, total = self.total, "a source broke, going on with another");
        self.flow = None;
        self.breaks.broke(std::mem::take(&mut self.brought));
        let role = self.sources.role().get();
        if role > self.role {
            // How owners broke says nothing of the upstream.
            (self.role, self.breaks) = (role, Breaks::default());
        }
    }

    async fn reopen(&mut self) -> Result<(), SourceError> {
        if self.breaks.too_many() {
            return Err(SourceError::Unreachable("every source broke".into()));
        }
        tokio::time::sleep(self.breaks.pause()).await;
        let end = (self.end < self.total).then_some(self.end);
        match self.sources.open(self.position, end, self.breaks.failures).await {
            Ok((incoming, _)) if incoming.total != self.total || incoming.span.start > self.position => {
                self.lose("another length than before");
            }
            Ok((incoming, _)) => self.flow = Some(WatchedBody::new(incoming)),
            Err(error) => {
                self.lose(error.as_str());
                if !error.is_outage() {
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Opens a span, and again if the role has risen meanwhile.
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

    /// What one connection does.
    #[derive(Clone, Copy)]
    enum Act {
        /// Honours the range, sends so many bytes, then breaks.
        Send(usize),
        /// Begins at 0 whatever was asked.
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
    async fn goes_on_after_every_kind_of_break() {
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
    async fn released_source_is_asked_again_where_it_ended() {
        let body: Vec<u8> = (0..=255).collect();
        let acts = Mutex::new(vec![Act::Send(100), Act::Send(300)]);
        let script = Arc::new(Script { body: body.clone(), acts });
        let mut feed = SpanStream::open(script.clone(), 50, None).await.unwrap();
        let mut read = feed.next().await.unwrap().unwrap().to_vec();
        assert!(feed.flow.is_some());
        feed.release();
        assert!(feed.flow.is_none(), "the connection is closed");
        while let Some(piece) = feed.next().await.unwrap() {
            read.extend_from_slice(&piece);
        }
        assert_eq!(read, body[50..]);
        assert!(script.acts.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_a_connection_is_nothing() {
        let error = read(&[Act::Send(1); 300], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_when_nothing_comes() {
        let error = read(&[Act::Send(10), Act::Stall, Act::Send(0), Act::Refuse], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
        assert_eq!(read(&[Act::Refuse], 0, None).await.unwrap_err(), SourceError::failed(503));
    }
}
