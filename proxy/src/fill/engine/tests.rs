//! Any order of faults and readers ends with the right bytes or a clean error.

use std::sync::atomic::AtomicU32;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::super::progress::Phase;
use super::super::range_plan::RangePlan;
use super::super::write::WritePiece;
use super::super::{ConnectionMode, FillKey};
use super::*;
use crate::bandwidth::{CurrentPriority, Priority};
use crate::config::Config;
use crate::oci::{Digest, Spans};
use crate::registries::Registries;
use crate::role::{CurrentRole, Role};
use crate::source::{Broken, Incoming, ServedFrom};

const MIB: usize = 1024 * 1024;

/// An upstream whose every response is random.
struct RandomUpstream {
    body: Bytes,
    random: Mutex<fastrand::Rng>,
    /// Faults in a hundred responses.
    faults: u8,
    /// Delay before each piece of a connection.
    delay: Duration,
    opened: AtomicU32,
    whole: AtomicU32,
}

impl RandomUpstream {
    fn new(body: &Bytes, seed: u64, faults: u8) -> Arc<Self> {
        let random = Mutex::new(fastrand::Rng::with_seed(seed));
        let delay = Duration::from_millis(25);
        Arc::new(Self {
            body: body.clone(),
            random,
            faults,
            delay,
            opened: AtomicU32::new(0),
            whole: AtomicU32::new(0),
        })
    }

    /// Sends a span in pieces of 1 MiB: the first `pieces` of them, and then `end`.
    fn send(&self, span: Span, total: u64, pieces: usize, end: Option<Result<Bytes, Broken>>) -> Incoming {
        let part = self.body.slice(usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap());
        let cut: Vec<_> = (0..part.len()).step_by(MIB).map(|at| part.slice(at..part.len().min(at + MIB))).collect();
        let stalls = end.is_none() && pieces < cut.len();
        let delay = self.delay;
        let sent = stream::iter(cut.into_iter().take(pieces)).then(move |piece| async move {
            tokio::time::sleep(delay).await;
            Ok(piece)
        });
        let rest = stream::iter(end);
        let never = stream::once(async move {
            if stalls {
                std::future::pending::<()>().await;
            }
            Err(Broken("over".into()))
        });
        Incoming::new(span, total, sent.chain(rest).chain(never))
    }
}

#[async_trait]
impl FillSources for RandomUpstream {
    async fn open(&self, from: u64, end: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let total = self.body.len() as u64;
        let span = Span { start: from, end: end.unwrap_or(total).min(total) };
        let (lot, pieces, delay) = {
            let mut random = self.random.lock();
            let fault = random.u8(0..100) < self.faults;
            (if fault { random.u8(1..8) } else { 0 }, random.usize(0..16), random.u64(0..200))
        };
        tokio::time::sleep(Duration::from_millis(delay)).await;
        if from >= total {
            return Err(SourceError::failed(416));
        }
        let incoming = match lot {
            1 => return Err(SourceError::failed(503)),
            2 => return Err(SourceError::TimedOut),
            3 => return Err(SourceError::Malformed("206 for another range".into())),
            4 => self.send(span, total, pieces, Some(Err(Broken("reset".into())))),
            5 => self.send(span, total, pieces, None),
            6 => self.send(span, total + 1, usize::MAX, None),
            7 => {
                self.whole.fetch_add(1, Ordering::Relaxed);
                self.send(Span::whole(total), total, usize::MAX, None)
            }
            _ => self.send(span, total, usize::MAX, None),
        };
        Ok((incoming, ServedFrom::Upstream))
    }

    fn connections(&self) -> ConnectionMode {
        ConnectionMode::Adaptive
    }
}

fn body(mib: usize) -> Bytes {
    let mut random = fastrand::Rng::with_seed(1);
    // Not a whole number of pieces.
    (0..(mib * MIB + 12_345) / 8).flat_map(|_| random.u64(..).to_le_bytes()).collect()
}

fn fill(digest: &Digest) -> Arc<Fill> {
    let registries = Registries::new(&Config::default());
    let (registry, repository) = ("docker.io".parse().unwrap(), "library/a".parse().unwrap());
    let rule = registries.rule(&registry, &"library/a".parse().unwrap());
    let repo_ref = crate::registries::RepositoryRef::new(rule, registry, repository);
    let (role, priority) = (CurrentRole::new(Role::Global), CurrentPriority::new(Priority::Client));
    Arc::new(Fill::new(FillKey::new(&repo_ref, digest), repo_ref, role, priority))
}

/// Runs the engine with a disk that checks the bytes and hashes with a delay.
async fn run(
    sources: Arc<dyn FillSources>,
    body: &Bytes,
    fill: &Arc<Fill>,
    from: u64,
    written: Spans,
) -> (DownloadEnd, Spans) {
    let (writer, mut received) = BlobWriter::new(Arc::new(Semaphore::new(1024 * 1024)));
    fill.progress.send_modify(|progress| {
        progress.set_written(written.clone());
        progress.enter(Phase::Growing);
    });
    let (truth, watched, mut there) = (body.clone(), fill.clone(), written.clone());
    let disk = tokio::spawn(async move {
        while let Some(WritePiece { position, bytes, .. }) = received.recv().await {
            let at = usize::try_from(position).unwrap();
            assert!(truth[at..at + bytes.len()] == bytes[..], "wrong bytes at {position}");
            let span = Span { start: position, end: position + bytes.len() as u64 };
            assert_eq!(there.gap(span.start, span.end), Some(span), "written twice");
            there.insert(span);
            watched.progress.send_modify(|progress| {
                progress.add_written(span);
                progress.hashed_to(there.run_end(0));
            });
        }
        there
    });
    let total = body.len() as u64;
    let connections = Shares::new(64);
    let first = RangePlan::new(total, written.clone()).next(0, &[from], 1).unwrap();
    let opened = SpanStream::open_range(sources.clone(), first.start, first.len()).await;
    let feed = match opened {
        Ok(feed) if feed.total() == total => feed,
        Ok(_) => return (DownloadEnd::Broken(SourceError::Malformed("another length".into())), written),
        Err(error) => return (DownloadEnd::Broken(error), written),
    };
    *fill.plan.lock() = RangePlan::new(total, written);
    let engine = Engine { fill, sources, connections: &connections, total, writer };
    let ended = engine.run(feed).await;
    (ended, disk.await.unwrap())
}

#[tokio::test(start_paused = true)]
async fn any_order_of_faults_ends_complete_or_with_an_error() {
    let body = body(70);
    let digest = Digest::of(b"unused");
    let (mut complete, mut broken) = (0, 0);
    for seed in 0..150 {
        let fill = fill(&digest);
        let faults = [0, 5, 20, 60][usize::try_from(seed % 4).unwrap()];
        let sources = RandomUpstream::new(&body, seed, faults);
        // Readers that wait for various bytes.
        let _readers: Vec<_> = (0..seed % 5)
            .map(|nth| {
                let slot = fill.readers.register();
                slot.wait_for((seed * 7 + nth * 13) % 70 * MIB as u64);
                slot
            })
            .collect();
        let (ended, there) = run(sources.clone(), &body, &fill, 0, Spans::default()).await;
        match ended {
            DownloadEnd::Complete => {
                assert_eq!(there, Spans::from(Span::whole(body.len() as u64)), "seed {seed}");
                complete += 1;
            }
            DownloadEnd::Broken(error) => {
                assert!(faults > 0 && error.is_outage(), "seed {seed}: {error}");
                broken += 1;
            }
            DownloadEnd::Disputed => {
                assert!(faults > 0, "seed {seed}");
                broken += 1;
            }
            DownloadEnd::Abandoned => panic!("seed {seed}: a reader is left"),
        }
    }
    assert!(complete > 100 && broken > 0, "{complete} complete, {broken} broken");
}

#[tokio::test(start_paused = true)]
async fn download_resumes_and_requests_only_the_rest() {
    let body = body(70);
    let fill = fill(&Digest::of(b"unused"));
    let mut written = Spans::from(Span { start: 0, end: 20 * MIB as u64 });
    written.insert(Span { start: 30 * MIB as u64, end: 31 * MIB as u64 });
    let sources = RandomUpstream::new(&body, 1, 0);
    let (ended, there) = run(sources.clone(), &body, &fill, 20 * MIB as u64, written).await;
    assert!(matches!(ended, DownloadEnd::Complete), "{ended:?}");
    assert_eq!(there.len(), body.len() as u64);
    assert_eq!(sources.whole.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn download_without_readers_is_abandoned() {
    let body = body(70);
    let fill = fill(&Digest::of(b"unused"));
    drop(fill.readers.register());
    let mut slow = RandomUpstream::new(&body, 1, 0);
    Arc::get_mut(&mut slow).unwrap().delay = Duration::from_secs(2);
    let (ended, there) = run(slow, &body, &fill, 0, Spans::default()).await;
    assert!(matches!(ended, DownloadEnd::Abandoned), "{ended:?}");
    assert!(!there.is_empty() && there.len() < 40 * MIB as u64);
}

#[tokio::test(start_paused = true)]
async fn per_connection_limit_opens_several_connections() {
    let body = body(200);
    let fill = fill(&Digest::of(b"unused"));
    let begun = Instant::now();
    // 40 MiB a second for each connection: 5 s for one.
    let (ended, _) = run(RandomUpstream::new(&body, 1, 0), &body, &fill, 0, Spans::default()).await;
    assert!(matches!(ended, DownloadEnd::Complete), "{ended:?}");
    assert!(begun.elapsed() < Duration::from_millis(2500), "{:?}", begun.elapsed());
}

/// Accepts one connection, and counts the others.
struct SingleConnectionUpstream {
    inner: Arc<RandomUpstream>,
    open: AtomicU32,
    refused: AtomicU32,
}

#[async_trait]
impl FillSources for SingleConnectionUpstream {
    async fn open(&self, from: u64, end: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        if self.open.fetch_add(1, Ordering::Relaxed) > 0 {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(SourceError::Limited { again: None });
        }
        self.inner.open(from, end, 0).await
    }

    fn connections(&self) -> ConnectionMode {
        ConnectionMode::Adaptive
    }
}

#[tokio::test(start_paused = true)]
async fn refused_connections_are_not_retried_at_once() {
    let body = body(70);
    let fill = fill(&Digest::of(b"unused"));
    let reader = fill.readers.register();
    reader.wait_for(60 * MIB as u64);
    let mut slow = RandomUpstream::new(&body, 1, 0);
    Arc::get_mut(&mut slow).unwrap().delay = Duration::from_secs(1);
    let limited =
        Arc::new(SingleConnectionUpstream { inner: slow, open: AtomicU32::new(0), refused: AtomicU32::new(0) });
    let (ended, _) = run(limited.clone(), &body, &fill, 0, Spans::default()).await;
    // The first range takes 16 s; after that every request is rejected.
    assert!(matches!(ended, DownloadEnd::Broken(_)), "{ended:?}");
    assert!(limited.refused.load(Ordering::Relaxed) < 12, "{}", limited.refused.load(Ordering::Relaxed));
}

/// Every fifth connection sends a MiB in two seconds, the others at once.
struct UnevenPeers {
    fast: Arc<RandomUpstream>,
    slow: Arc<RandomUpstream>,
    requests: AtomicU32,
}

#[async_trait]
impl FillSources for UnevenPeers {
    async fn open(&self, from: u64, end: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        let nth = self.requests.fetch_add(1, Ordering::Relaxed);
        let source = if nth % 5 == 4 { &self.slow } else { &self.fast };
        let (incoming, _) = source.open(from, end, 0).await?;
        Ok((incoming, ServedFrom::Peer))
    }

    fn connections(&self) -> ConnectionMode {
        ConnectionMode::Chosen(4)
    }

    fn alternatives(&self, _: u64) -> usize {
        5
    }
}

#[tokio::test(start_paused = true)]
async fn far_slower_peer_is_given_up() {
    let body = body(200);
    let fill = fill(&Digest::of(b"unused"));
    let mut slow = RandomUpstream::new(&body, 1, 0);
    Arc::get_mut(&mut slow).unwrap().delay = Duration::from_secs(2);
    let uneven = Arc::new(UnevenPeers { fast: RandomUpstream::new(&body, 2, 0), slow, requests: AtomicU32::new(0) });
    let begun = Instant::now();
    let (ended, _) = run(uneven, &body, &fill, 0, Spans::default()).await;
    assert!(matches!(ended, DownloadEnd::Complete), "{ended:?}");
    // A range of 16 MiB takes 32 s from a slow one.
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
}

/// Also if it sends nothing at all, which is a break only after ten seconds.
#[tokio::test(start_paused = true)]
async fn slow_peer_of_the_last_range_is_given_up_at_once() {
    let body = body(70);
    let fill = fill(&Digest::of(b"unused"));
    let mut silent = RandomUpstream::new(&body, 1, 0);
    Arc::get_mut(&mut silent).unwrap().delay = Duration::from_secs(100);
    let uneven =
        Arc::new(UnevenPeers { fast: RandomUpstream::new(&body, 2, 0), slow: silent, requests: AtomicU32::new(0) });
    let begun = Instant::now();
    let (ended, _) = run(uneven, &body, &fill, 0, Spans::default()).await;
    assert!(matches!(ended, DownloadEnd::Complete), "{ended:?}");
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

/// As a follower it gets the first MiB of each range from an owner that then stalls. As the owner it gets everything
/// from the upstream.
struct StallingOwner {
    upstream: Arc<RandomUpstream>,
    role: CurrentRole,
}

#[async_trait]
impl FillSources for StallingOwner {
    async fn open(&self, from: u64, end: Option<u64>, _: u32) -> Result<(Incoming, ServedFrom), SourceError> {
        if self.role.get() == Role::Global {
            return self.upstream.open(from, end, 0).await;
        }
        let total = self.upstream.body.len() as u64;
        let stalls = self.upstream.send(Span { start: from, end: end.unwrap_or(total).min(total) }, total, 1, None);
        Ok((stalls.until(self.role.clone().reaches(Role::Global)), ServedFrom::Peer))
    }

    fn role(&self) -> CurrentRole {
        self.role.clone()
    }

    fn connections(&self) -> ConnectionMode {
        if self.role.get() == Role::Global { ConnectionMode::Adaptive } else { ConnectionMode::Chosen(4) }
    }
}

/// Nothing that the owner has sent is requested again: the disk of these tests refuses to write a byte twice.
#[tokio::test(start_paused = true)]
async fn promoted_fill_continues_at_the_upstream_at_once() {
    let body = body(70);
    let fill = fill(&Digest::of(b"unused"));
    let role = CurrentRole::new(Role::Client);
    let following = Arc::new(StallingOwner { upstream: RandomUpstream::new(&body, 1, 0), role: role.clone() });
    let begun = Instant::now();
    let promoted = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        role.promote(Role::Global);
    };
    let ((ended, there), ()) = tokio::join!(run(following, &body, &fill, 0, Spans::default()), promoted);
    assert!(matches!(ended, DownloadEnd::Complete), "{ended:?}");
    assert_eq!(there.len(), body.len() as u64);
    // The stalled ranges break after ten seconds.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
