//! One growing blob: bytes come in once, many read along.
//!
//! A fill belongs to no client, and there is one for each digest and registry. It writes,
//! hashes in order, and lets readers follow up to the last 64 KiB, which it holds until the digest
//! agrees. Whoever asks for the same digest meanwhile joins it.

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
use crate::oci::{Span, Spans};
use crate::principal::Principal;
use crate::provenance::Provenance;
use crate::registries::RepositoryRef;
use crate::role::{CurrentRole, Role};
use crate::source::{ServedFrom, SourceError};
use crate::store::{Blob, Draft, SmallObject};
use crate::trace;

/// Bytes at the end of a blob that no reader gets before the digest agrees.
pub const HELD_BYTES: u64 = 64 * 1024;

const LITTLE_LEFT: u64 = 32 * 1024 * 1024;

/// One blob on its way in.
pub struct Fill {
    pub key: FillKey,
    /// Whose request started it.
    pub place: RepositoryRef,
    /// Whoever joined it last.
    newest: Mutex<Principal>,
    opened: OnceLock<Result<OpenedFill, SourceError>>,
    progress: watch::Sender<Progress>,
    audience: Arc<Readers>,
    plan: Mutex<RangePlan>,
    /// The role in which its sources are asked.
    role: CurrentRole,
    /// What this node fetches in its owner's stead: it comes, though nothing may be there yet.
    deputed: Mutex<Spans>,
    started: Instant,
}

/// A fill as it is shown to people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FillView {
    pub digest: String,
    /// `registry/repository` of whoever asked first.
    pub image: String,
    /// As what this node fetches it: `client`, `zone` or `global`.
    pub role: String,
    /// Null: not known yet.
    pub total_bytes: Option<u64>,
    pub written_bytes: u64,
    pub seconds: f64,
}

/// Says what was written.
struct ProgressPublisher {
    progress: watch::Sender<Progress>,
    audience: Arc<Readers>,
}

/// What a fill turned out to be once its source answered.
#[derive(Clone)]
pub enum OpenedFill {
    /// A small object, whole and verified.
    Small { object: SmallObject, from: ServedFrom },
    /// A file that grows to its length.
    Growing { blob: Arc<Blob>, from: ServedFrom },
    /// It cannot be kept. The first reader may have the feed that was opened.
    Uncached { total: u64, from: ServedFrom, feed: Arc<Mutex<Option<SpanStream>>> },
}

/// How a running fill is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// Nothing before the digest agrees.
    Verified,
    /// The last bytes once the digest agrees.
    Proven,
    /// All bytes as they come: whoever reads checks the whole itself.
    Unproven,
    /// The same, for as long as some come: whoever reads can find them elsewhere, and may be one that
    /// this fill waits for.
    OfWhatComes,
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
            image: self.place.to_string(),
            role: self.role().as_str().to_owned(),
            total_bytes: self.length_now(),
            written_bytes: self.written().iter().map(|span| span.len()).sum(),
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    fn new(key: FillKey, place: RepositoryRef, role: CurrentRole) -> Self {
        let progress = watch::Sender::new(Progress::new());
        Self {
            key,
            newest: Mutex::new(place.caller.clone()),
            place,
            opened: OnceLock::new(),
            progress,
            audience: Arc::default(),
            plan: Mutex::default(),
            role,
            deputed: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// The role in which its sources are asked at the moment.
    pub fn role(&self) -> Role {
        self.role.get()
    }

    /// Waits until a source has answered, or none does.
    pub async fn opened(&self) -> Result<OpenedFill, SourceError> {
        let mut progress = self.progress.subscribe();
        // An error means that the fill ended without a word, which the fallback below says.
        let _ = progress.wait_for(|progress| progress.phase() != Phase::Opening).await;
        self.opened.get().cloned().unwrap_or_else(|| Err(SourceError::Unreachable("the fill ended".into())))
    }

    /// Whether another repository's request began it and was refused: one for this place may be granted.
    pub async fn refused_another(&self, place: &RepositoryRef) -> bool {
        (self.place != *place || self.place.caller != place.caller) && self.opened().await.is_err()
    }

    /// The place of the fill, as whoever joined it last may ask for it.
    pub fn newest_place(&self) -> RepositoryRef {
        let caller = self.newest.lock().clone();
        RepositoryRef { caller, ..self.place.clone() }
    }

    /// What that one shows is of no use.
    pub fn forget_newest(&self, caller: &Principal) {
        let mut newest = self.newest.lock();
        if *newest == *caller {
            *newest = self.place.caller.clone();
        }
    }

    /// Whether what came from there is what this fill would fetch, for the same people.
    fn is_of_same(&self, known: &Provenance) -> bool {
        let is_same_repository = self.key.repository.as_ref().is_none_or(|own| own.as_str() == known.repository);
        known.registry == self.key.registry.as_str() && known.rule == self.place.rule.name() && is_same_repository
    }

    /// Waits until the fill is over.
    pub async fn ended(&self) -> FillOutcome {
        let mut progress = self.progress.subscribe();
        match progress.wait_for(Progress::is_over).await {
            Ok(progress) if progress.phase() == Phase::Verified => FillOutcome::Verified,
            _ => FillOutcome::Failed,
        }
    }

    /// The bytes that are there.
    pub fn written(&self) -> Spans {
        self.progress.borrow().written().clone()
    }

    /// The blob's length, if a source has told it.
    pub fn length_now(&self) -> Option<u64> {
        Some(self.opened.get()?.as_ref().ok()?.length().0)
    }

    /// Waits until the byte at `position` is there, without making anybody fetch it. False: the fill
    /// is over before.
    pub async fn reaches(&self, position: u64) -> bool {
        let mut phase = self.progress.subscribe();
        loop {
            let mut came = std::pin::pin!(self.audience.came.notified());
            came.as_mut().enable();
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
                () = came => {}
                _ = phase.changed() => {}
            }
        }
    }

    /// Leaves a range to a peer that asked for it, if it may as well fetch that itself.
    pub fn lend(&self, span: Span, to: SocketAddr) -> Lent {
        self.audience.noticed();
        let mut plan = self.plan.lock();
        if plan.is_lent_to(span.start, to) {
            // It comes back: it could not.
            plan.recall(span.start, to, self.clock());
            return Lent::No;
        }
        plan.lend(span, to, self.clock())
    }

    /// Whoever asks insists on having the byte at `at` from here.
    pub fn recall(&self, at: u64, by: SocketAddr) {
        self.plan.lock().recall(at, by, self.clock());
    }

    /// Whether whoever asks for the byte at `at` had better ask somebody else who has it.
    pub fn is_better_elsewhere(&self, at: u64) -> bool {
        self.plan.lock().is_better_elsewhere(at)
    }

    /// This node fetches a range in the owner's stead.
    pub fn depute(&self, span: Span) {
        self.deputed.lock().insert(span);
    }

    /// It could not.
    pub fn fail_as_deputy(&self, span: Span) {
        self.deputed.lock().remove(span);
    }

    /// Whether it fetches, or has fetched, the byte at `at` in the owner's stead.
    pub fn is_deputed(&self, at: u64) -> bool {
        self.deputed.lock().run_end(at) > at
    }

    /// Whether the byte at `at` is here or was asked for; before any source has answered that is the beginning.
    pub fn is_asked_for(&self, at: u64) -> bool {
        self.opened.get().is_none() || self.plan.lock().is_taken(at)
    }

    /// The clock of its plan.
    fn clock(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether what begins at `start` is there, or comes soon.
    pub fn is_near(&self, start: u64, distance: u64) -> bool {
        let progress = self.progress.borrow();
        progress.written().run_end(start) > start || progress.written().run_end(0).saturating_add(distance) >= start
    }

    /// Reads a span of a growing file.
    pub fn reader(&self, blob: Arc<Blob>, span: Span, reading: ReadMode) -> Reader {
        Reader::of_fill(blob, self.progress.subscribe(), self.audience.sit(), span, reading)
    }

    /// A source has answered, and there is a file for its bytes, some of which it may hold already.
    fn begin(&self, draft: &Draft, from: ServedFrom, written: &Spans) {
        self.audience.begin();
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

    /// Tells from other threads what was written.
    fn teller(&self) -> ProgressPublisher {
        ProgressPublisher { progress: self.progress.clone(), audience: self.audience.clone() }
    }

    fn end(&self, phase: Phase) {
        self.progress.send_modify(|progress| progress.enter(phase));
    }

    /// Tells whoever follows the trace what became of it.
    fn tell(&self, span: &mut trace::TraceSpan) {
        span.tell(|| {
            let came = self.written().iter().map(|span| span.len()).sum::<u64>();
            vec![
                ("dray.digest", self.key.digest.to_string().into()),
                ("dray.image", self.place.to_string().into()),
                ("dray.role", self.role().as_str().into()),
                ("dray.bytes", came.into()),
            ]
        });
        if let Some(Err(error)) = self.opened.get() {
            span.fail(|| error.to_string());
        } else if self.progress.borrow().phase() == Phase::Failed {
            span.fail(|| "it broke off".to_owned());
        }
    }

    fn disown(&self) {
        self.progress.send_modify(Progress::disown);
    }
}

impl ProgressPublisher {
    /// Who waits for these bytes is woken; a hundred others need not know.
    fn wrote(&self, span: Span) {
        self.progress.send_if_modified(|progress| {
            progress.wrote(span);
            false
        });
        self.audience.came(span);
    }
}

impl OpenedFill {
    /// The blob's length, and where its bytes come from.
    pub fn length(&self) -> (u64, ServedFrom) {
        match self {
            Self::Small { object, from } => (object.bytes.len() as u64, *from),
            Self::Growing { blob, from } => (blob.len, *from),
            Self::Uncached { total, from, .. } => (*total, *from),
        }
    }
}
