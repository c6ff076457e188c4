//! A body that arrives in order, whatever happens to the connections that carry it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::time::{Instant, timeout};

use crate::source::{Incoming, ServedFrom, SourceError};

/// Where a blob's bytes can be had.
#[async_trait]
pub trait Sources: Send + Sync {
    /// Opens the blob at `from`, up to `end` or to its end. The answer may begin earlier where a
    /// source does not honour ranges. `failures` counts the sources that broke before: a reason to
    /// ask another one.
    async fn open(&self, from: u64, end: Option<u64>, failures: u32) -> Result<(Incoming, ServedFrom), SourceError>;
}

/// The bytes of one span of a blob, in order.
pub struct Feed {
    sources: Arc<dyn Sources>,
    incoming: Option<Incoming>,
    total: u64,
    position: u64,
    end: u64,
    served_from: ServedFrom,
    failures: u32,
    barren: u32,
    /// Bytes that this connection has brought.
    brought: u64,
    pace: Pace,
}

/// How fast a connection is, counting only the time spent waiting for it.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

/// A source that sends nothing for this long is changed.
const STALL: Duration = Duration::from_secs(10);

/// So is one that brings less than this in this time.
const SLOWEST: u64 = 64 * 1024;
const PACE_WINDOW: Duration = Duration::from_secs(30);

/// So many connections in a row that bring next to nothing, and the feed ends.
const MAX_BARREN: u32 = 4;

/// Whatever they bring, more connections than this are an origin that cannot be used.
const MAX_FAILURES: u32 = 100;

impl Feed {
    /// Opens a span; without `end` to the end of the blob.
    pub async fn open(sources: Arc<dyn Sources>, from: u64, end: Option<u64>) -> Result<Self, SourceError> {
        let (incoming, served_from) = sources.open(from, end, 0).await?;
        let total = incoming.total;
        let end = end.map_or(total, |end| end.min(total));
        Ok(Self {
            sources,
            incoming: Some(incoming),
            total,
            position: from,
            end,
            served_from,
            failures: 0,
            barren: 0,
            brought: 0,
            pace: Pace::default(),
        })
    }

    /// Length of the whole blob.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether the source begins before the span: it does not honour ranges.
    pub fn skips(&self) -> bool {
        self.incoming.as_ref().is_some_and(|incoming| incoming.start < self.position)
    }

    pub fn served_from(&self) -> ServedFrom {
        self.served_from
    }

    /// The next piece; None at the end of the span.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        while self.position < self.end {
            let piece = match &mut self.incoming {
                Some(incoming) => {
                    let asked = Instant::now();
                    let next = timeout(STALL, incoming.next()).await;
                    let waited = asked.elapsed();
                    match next {
                        Ok(Some(Ok(piece))) if self.pace.keeps_up(waited, piece.len()) => self.place(piece),
                        Ok(Some(Ok(_))) => self.lose("too slow"),
                        Ok(Some(Err(broken))) => self.lose(&broken.0),
                        Ok(None) => self.lose("ended early"),
                        Err(_) => self.lose("stalled"),
                    }
                }
                None => {
                    self.reopen().await?;
                    continue;
                }
            };
            if let Some(piece) = piece {
                self.brought += piece.len() as u64;
                self.position += piece.len() as u64;
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    /// Cuts from a piece what is new: a source without ranges begins again at the start.
    fn place(&mut self, mut piece: Bytes) -> Option<Bytes> {
        let incoming = self.incoming.as_mut()?;
        let starts_at = incoming.start;
        incoming.start += piece.len() as u64;
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

    fn lose(&mut self, why: &str) -> Option<Bytes> {
        tracing::info!(why, position = self.position, total = self.total, "a source broke, going on with another");
        self.incoming = None;
        self.failures += 1;
        // Whoever brings a byte a connection brings nothing.
        self.barren = if self.brought < SLOWEST { self.barren + 1 } else { 1 };
        (self.brought, self.pace) = (0, Pace::default());
        None
    }

    async fn reopen(&mut self) -> Result<(), SourceError> {
        if self.barren >= MAX_BARREN || self.failures >= MAX_FAILURES {
            return Err(SourceError::Unreachable("every source broke".into()));
        }
        if self.barren > 1 {
            let most = 200 << self.barren;
            tokio::time::sleep(Duration::from_millis(fastrand::u64(most / 2..=most))).await;
        }
        let end = (self.end < self.total).then_some(self.end);
        match self.sources.open(self.position, end, self.failures).await {
            Ok((incoming, _)) if incoming.total != self.total || incoming.start > self.position => {
                self.lose("another length than before");
            }
            Ok((incoming, _)) => self.incoming = Some(incoming),
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

impl Pace {
    /// Counts a piece. False: the window is over and brought too little.
    fn keeps_up(&mut self, waited: Duration, len: usize) -> bool {
        self.waited += waited;
        self.bytes += len as u64;
        if self.waited < PACE_WINDOW {
            return true;
        }
        std::mem::take(self).bytes >= SLOWEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Broken;
    use futures_util::{StreamExt, stream};
    use std::sync::Mutex;

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
    impl Sources for Script {
        async fn open(&self, from: u64, _: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
            let act = {
                let mut acts = self.acts.lock().unwrap();
                if acts.is_empty() { Act::Refuse } else { acts.remove(0) }
            };
            let total = self.body.len() as u64;
            let (start, count) = match act {
                Act::Send(count) => (from, count),
                Act::FromStart(count) => (0, count),
                Act::Refuse => return Err(SourceError::Failed(503)),
                Act::OtherLength => return Ok((Incoming::new(from, total + 1, stream::empty()), ServedFrom::Origin)),
                Act::Stall => return Ok((Incoming::new(from, total, stream::pending()), ServedFrom::Origin)),
            };
            let rest = &self.body[usize::try_from(start).unwrap()..];
            let sent = rest[..count.min(rest.len())].to_vec();
            let pieces: Vec<_> = sent.chunks(7).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
            let end = Err(Broken("reset".into()));
            Ok((Incoming::new(start, total, stream::iter(pieces).chain(stream::iter([end]))), ServedFrom::Origin))
        }
    }

    async fn read(acts: &[Act], from: u64, end: Option<u64>) -> Result<Vec<u8>, SourceError> {
        let body: Vec<u8> = (0..=255).collect();
        let script = Arc::new(Script { body, acts: Mutex::new(acts.to_vec()) });
        let mut feed = Feed::open(script, from, end).await?;
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
    async fn a_byte_a_connection_is_nothing() {
        let error = read(&[Act::Send(1); 300], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
    }

    #[test]
    fn a_trickle_is_too_slow() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::default();
        assert!((0..29).all(|_| pace.keeps_up(second, 1)));
        assert!(!pace.keeps_up(second, 1));
        assert!((0..100).all(|_| pace.keeps_up(second, 4096)));
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_when_nothing_comes() {
        let error = read(&[Act::Send(10), Act::Stall, Act::Send(0), Act::Refuse], 0, None).await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
        assert_eq!(read(&[Act::Refuse], 0, None).await.unwrap_err(), SourceError::Failed(503));
    }
}
