//! A cache fill: one blob coming in, many readers.
//!
//! A fill runs independently of its readers, and there is one per [`FillKey`]. It writes in any order and hashes in
//! order. Readers follow it, except for the last 64 KiB, which it withholds until the digest matches. A request for the
//! same key joins the running fill.
//!
//! | phase | event | next phase |
//! |---|---|---|
//! | opening | a source sends a large blob, or a cached file is to be verified | growing |
//! | opening | a small object is verified, the file is cached already, or the blob bypasses the cache | verified |
//! | opening | no source has the blob, or too many fills run | failed |
//! | growing | the whole digest matches | verified |
//! | growing | mismatch, no source or reader left, no space, disk failure or panic | failed |

mod connection_scaler;
mod engine;
mod fills;
mod loans;
mod pace;
mod passthrough;
mod progress;
mod range_plan;
mod reader;
mod readers;
mod run;
mod scrub;
mod span_stream;
mod watched_body;
mod write;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

pub use self::connection_scaler::ConnectionScaler;
pub use self::fills::{ContentSource, FillKey, Fills};
pub use self::pace::Pace;
pub use self::passthrough::{PART_BYTES, PassthroughStream};
use self::progress::{Phase, Progress};
pub use self::range_plan::{Lent, RangePlan};
pub use self::reader::Reader;
use self::readers::Readers;
pub use self::span_stream::{ConnectionMode, FillSources, SpanStream, VerifiedContent};
use crate::bandwidth::CurrentPriority;
use crate::oci::{Span, Spans};
use crate::principal::Principal;
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Draft, SmallObject};
use crate::trace;

/// Bytes at the end of a blob that readers get only once the digest matches. Larger: more of each blob waits for the
/// hash. Zero: a client can receive a corrupt blob whole.
pub const HELD_BYTES: u64 = 64 * 1024;

/// A fill without readers runs to its end if at most this many bytes are missing. Larger: more traffic for blobs that
/// no client may want. Smaller: more downloads stop shortly before their end.
const MAX_FINISHABLE_BYTES: u64 = 32 * 1024 * 1024;

/// One blob coming in.
pub struct Fill {
    pub key: FillKey,
    /// The repository and principal of the request that started it.
    pub repo_ref: RepositoryRef,
    /// The principal of the latest request that joined with credentials.
    latest_principal: Mutex<Principal>,
    opened: OnceLock<Result<OpenedFill, SourceError>>,
    progress: watch::Sender<Progress>,
    readers: Arc<Readers>,
    plan: Mutex<RangePlan>,
    /// The role in which it sends requests to its sources.
    role: CurrentRole,
    /// The most urgent request that has joined.
    priority: CurrentPriority,
    /// Ranges that this node downloads as the owner's deputy; their bytes need not be written yet.
    deputy_ranges: Mutex<Spans>,
    started: Instant,
}

/// A fill as the status API shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FillView {
    pub digest: String,
    /// `registry/repository` of the first request.
    pub image: String,
    /// The role in which this node downloads it: `client`, `zone` or `global`.
    pub role: String,
    /// Null: no source has responded yet.
    pub total_bytes: Option<u64>,
    pub written_bytes: u64,
    pub seconds: f64,
}

/// Reports written bytes to readers, from any thread.
struct ProgressPublisher {
    progress: watch::Sender<Progress>,
    readers: Arc<Readers>,
}

/// What a fill became once a source responded.
#[derive(Clone)]
pub enum OpenedFill {
    /// A small object, whole and verified.
    Small { object: SmallObject, from: ServedFrom },
    /// A file that grows to its length.
    Growing { blob: Arc<Blob>, from: ServedFrom },
    /// It cannot be cached. The first reader takes over the stream that was opened.
    Uncached { total: u64, from: ServedFrom, feed: Arc<Mutex<Option<SpanStream>>> },
}

/// How a running fill is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// Nothing before the digest matches.
    Verified,
    /// All bytes as they arrive, except for the last [`HELD_BYTES`], which follow once the digest matches.
    VerifiedTail,
    /// All bytes as they arrive: the reader verifies the digest itself.
    Unverified,
    /// The same, but the read fails after a second without bytes. The reader is a peer that has other sources, and this
    /// fill may be waiting for that peer.
    UnverifiedUntilStall,
}

/// How a fill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FillOutcome {
    Verified,
    Failed,
}

impl Fill {
    fn view(&self) -> FillView {
        FillView {
            digest: self.key.digest.to_string(),
            image: self.repo_ref.to_string(),
            role: self.role().as_str().to_owned(),
            total_bytes: self.known_length(),
            written_bytes: self.written().iter().map(|span| span.len()).sum(),
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    fn new(key: FillKey, repo_ref: RepositoryRef, role: CurrentRole, priority: CurrentPriority) -> Self {
        let progress = watch::Sender::new(Progress::new());
        Self {
            key,
            latest_principal: Mutex::new(repo_ref.principal.clone()),
            repo_ref,
            opened: OnceLock::new(),
            progress,
            readers: Arc::default(),
            plan: Mutex::default(),
            role,
            priority,
            deputy_ranges: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// The current role in which it sends requests to its sources.
    pub fn role(&self) -> Role {
        self.role.get()
    }

    /// Waits until a source has responded, or all have failed.
    pub async fn opened(&self) -> Result<OpenedFill, SourceError> {
        let mut progress = self.progress.subscribe();
        // An error means that the fill ended before it opened; the fallback below reports that.
        let _ = progress.wait_for(|progress| progress.phase() != Phase::Opening).await;
        self.opened.get().cloned().unwrap_or_else(|| Err(SourceError::Unreachable("the download ended".into())))
    }

    /// Whether it failed for the repository or principal of another request: the request for `repo_ref` may succeed.
    pub async fn failed_for_another(&self, repo_ref: &RepositoryRef) -> bool {
        (self.repo_ref != *repo_ref || self.repo_ref.principal != repo_ref.principal) && self.opened().await.is_err()
    }

    /// The fill's repository, with the credentials of the latest request that joined. If those of the first one expire,
    /// these may still be valid.
    pub fn newest_repo_ref(&self) -> RepositoryRef {
        let principal = self.latest_principal.lock().clone();
        RepositoryRef { principal, ..self.repo_ref.clone() }
    }

    /// Falls back to the first request's credentials, because the upstream rejects these.
    pub fn forget_principal(&self, principal: &Principal) {
        let mut latest = self.latest_principal.lock();
        if *latest == *principal {
            *latest = self.repo_ref.principal.clone();
        }
    }

    /// Whether a cached copy is what this fill would download, for the same principals.
    fn is_same_content(&self, known: &Provenance) -> bool {
        let is_same_repository = self.key.repository.as_ref().is_none_or(|own| own.as_str() == known.repository);
        known.registry == self.key.registry.as_str() && known.rule == self.repo_ref.rule.name() && is_same_repository
    }

    /// Waits until the fill is over.
    pub async fn ended(&self) -> FillOutcome {
        let mut progress = self.progress.subscribe();
        match progress.wait_for(Progress::is_over).await {
            Ok(progress) if progress.phase() == Phase::Verified => FillOutcome::Verified,
            _ => FillOutcome::Failed,
        }
    }

    /// The bytes that were written.
    pub fn written(&self) -> Spans {
        self.progress.borrow().written().clone()
    }

    /// The blob's length, if a source has stated it.
    pub fn known_length(&self) -> Option<u64> {
        Some(self.opened.get()?.as_ref().ok()?.length().0)
    }

    /// Waits until the byte at `position` is written, without requesting it. False: the fill ended before.
    pub async fn reaches(&self, position: u64) -> bool {
        let mut phase = self.progress.subscribe();
        loop {
            let mut written = std::pin::pin!(self.readers.written.notified());
            written.as_mut().enable();
            {
                let progress = phase.borrow_and_update();
                if progress.written().run_end(position) > position {
                    return true;
                }
                if progress.is_over() {
                    return false;
                }
            }
            tokio::select! {
                () = written => {}
                _ = phase.changed() => {}
            }
        }
    }

    /// Lends a range to a peer that requested it, if that peer may as well download it from the upstream.
    pub fn lend(&self, span: Span, to: SocketAddr) -> Lent {
        self.readers.extend_grace();
        let mut plan = self.plan.lock();
        if plan.is_lent_to(span.start, to) {
            // A repeated request means that the deputy could not download the range.
            plan.recall(span.start, to, self.clock());
            return Lent::No;
        }
        plan.lend(span, to, self.clock())
    }

    /// A peer needs the byte at `at` from this node: the loan of its range is revoked.
    pub fn recall(&self, at: u64, by: SocketAddr) {
        self.plan.lock().recall(at, by, self.clock());
    }

    /// Whether a peer that requests the byte at `at` should be redirected to another holder.
    pub fn is_deferred_to_peers(&self, at: u64) -> bool {
        self.plan.lock().is_deferred_to_peers(at)
    }

    /// This node downloads a range as the owner's deputy.
    pub fn depute(&self, span: Span) {
        self.deputy_ranges.lock().insert(span);
    }

    /// The download as a deputy failed.
    pub fn fail_as_deputy(&self, span: Span) {
        self.deputy_ranges.lock().remove(span);
    }

    /// Whether this node downloads, or has downloaded, the byte at `at` as the owner's deputy.
    pub fn is_deputed(&self, at: u64) -> bool {
        self.deputy_ranges.lock().run_end(at) > at
    }

    /// Whether the byte at `at` is written or requested. Before any source has responded, true: the first request is
    /// under way.
    pub fn is_requested(&self, at: u64) -> bool {
        self.opened.get().is_none() || self.plan.lock().is_taken(at)
    }

    /// Time since the start, which is the clock of the plan.
    fn clock(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether the byte at `start` is written, or follows the bytes written from the beginning by at most `distance`.
    pub fn is_near(&self, start: u64, distance: u64) -> bool {
        let progress = self.progress.borrow();
        progress.written().run_end(start) > start || progress.written().run_end(0).saturating_add(distance) >= start
    }

    /// Reads a span of a growing file.
    pub fn reader(&self, blob: Arc<Blob>, span: Span, mode: ReadMode) -> Reader {
        Reader::of_fill(blob, self.progress.subscribe(), self.readers.register(), span, mode)
    }

    /// A source has responded, and the draft holds the bytes in `written` already.
    fn begin(&self, draft: &Draft, from: ServedFrom, written: &Spans) {
        self.readers.begin();
        self.progress.send_modify(|progress| progress.set_written(written.clone()));
        *self.plan.lock() = RangePlan::new(draft.blob.len, written.clone());
        self.open(Ok(OpenedFill::Growing { blob: draft.blob.clone(), from }));
    }

    fn open(&self, opened: Result<OpenedFill, SourceError>) {
        let phase = match &opened {
            Ok(OpenedFill::Growing { .. }) => Phase::Growing,
            Ok(_) => Phase::Verified,
            Err(_) => Phase::Failed,
        };
        if self.opened.set(opened).is_ok() {
            self.progress.send_modify(|progress| progress.enter(phase));
        }
    }

    /// Reports from other threads what was written.
    fn publisher(&self) -> ProgressPublisher {
        ProgressPublisher { progress: self.progress.clone(), readers: self.readers.clone() }
    }

    fn end(&self, phase: Phase) {
        self.progress.send_modify(|progress| progress.enter(phase));
    }

    /// Adds the fill's result to its trace span.
    fn record_in(&self, span: &mut trace::TraceSpan) {
        span.tell(|| {
            let bytes = self.written().iter().map(|span| span.len()).sum::<u64>();
            vec![
                ("dray.digest", self.key.digest.to_string().into()),
                ("dray.registry", self.repo_ref.registry.to_string().into()),
                ("dray.repository", self.repo_ref.repository.to_string().into()),
                ("dray.role", self.role().as_str().into()),
                ("dray.bytes", bytes.into()),
            ]
        });
        if let Some(Err(error)) = self.opened.get() {
            span.fail(|| error.to_string());
        } else if self.progress.borrow().phase() == Phase::Failed {
            span.fail(|| "the download failed".to_owned());
        }
    }

    fn withdraw(&self) {
        self.progress.send_modify(Progress::withdraw);
    }
}

impl ProgressPublisher {
    /// Wakes only the readers that wait for these bytes: a popular blob has hundreds of readers.
    fn wrote(&self, span: Span) {
        self.progress.send_if_modified(|progress| {
            progress.add_written(span);
            false
        });
        self.readers.notify_written(span);
    }

    fn written(&self) -> Spans {
        self.progress.borrow().written().clone()
    }
}

impl OpenedFill {
    /// The blob's length, and the source of its bytes.
    pub fn length(&self) -> (u64, ServedFrom) {
        match self {
            Self::Small { object, from } => (object.bytes.len() as u64, *from),
            Self::Growing { blob, from } => (blob.len, *from),
            Self::Uncached { total, from, .. } => (*total, *from),
        }
    }
}
