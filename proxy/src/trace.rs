//! The trace that a request belongs to (W3C Trace Context), and what takes how long in it.
//!
//! A request brings its trace, or begins one where somebody wants to see it. The task that answers carries it, and
//! hands it to the tasks that it starts ([`carried`]); questions to peers and registries say it ([`TraceSpan::write`]). Where
//! nobody wants to see what happens here, it goes on as it came.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::worker_watch::watched;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The longest `tracestate` that is passed on.
const MAX_STATE: usize = 512;

/// Bits of a trace's flags: somebody records it; its id is random.
const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;

/// A step of a trace, as one side tells it to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceStep {
    pub trace: u128,
    pub span: u64,
    flags: u8,
    /// What other systems add for themselves.
    pub state: Option<HeaderValue>,
}

/// Decides what is recorded, and passes it on.
#[derive(Default)]
pub struct Tracer {
    report: Option<Box<dyn Report>>,
    /// Of the requests that come without a trace, from 0 to 1.
    share: f64,
}

/// Takes what has ended.
pub trait Report: Send + Sync {
    fn report(&self, span: FinishedSpan);
    /// Passes on what is left.
    fn close(&self) {}
}

/// Something that took time, while it does. By default in no trace.
#[derive(Default)]
pub struct TraceSpan {
    current: Option<Current>,
    recording: Option<Recording>,
}

/// What will be told of it. Nobody looks at a clock for the others.
struct Recording {
    ended: Box<FinishedSpan>,
    started: Instant,
}

/// Something that took time.
pub struct FinishedSpan {
    pub name: Cow<'static, str>,
    pub kind: TraceSpanKind,
    pub step: TraceStep,
    /// The span that this is a part of; None: it is the first.
    pub parent: Option<u64>,
    pub began: SystemTime,
    pub took: Duration,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// Which side of a question something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceSpanKind {
    Server,
    Client,
    Internal,
}

/// What is told about a span.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Word(&'static str),
    Number(u64),
}

/// The trace of a task, and whom to report to.
#[derive(Clone)]
struct Current {
    step: TraceStep,
    tracer: Arc<Tracer>,
}

tokio::task_local! {
    static CURRENT: Current;
}

/// Something begins, in the trace of this task.
pub fn begin(name: &'static str, kind: TraceSpanKind) -> TraceSpan {
    TraceSpan::new(CURRENT.try_with(Current::clone).ok(), name, kind)
}

/// A task that is about to be started goes on in the trace of this one.
pub fn carried<F: Future>(task: F) -> impl Future<Output = F::Output> {
    within(CURRENT.try_with(Current::clone).ok(), watched(task))
}

async fn within<F: Future>(current: Option<Current>, task: F) -> F::Output {
    match current {
        Some(current) => CURRENT.scope(current, task).await,
        None => task.await,
    }
}

// === impl Step ===

impl TraceStep {
    /// What a request says. None: nothing that could be right.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(TRACEPARENT).iter();
        let (only, None) = (all.next()?, all.next()) else { return None };
        let mut parts = only.to_str().ok()?.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let (version, flags) = (hex(version, 2)?, hex(flags, 2)?);
        // Later versions may say more.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (hex(trace, 32)?, u64::try_from(hex(span, 16)?).ok()?);
        let flags = u8::try_from(flags).ok()? & (SAMPLED | RANDOM);
        (trace != 0 && span != 0).then(|| Self { trace, span, flags, state: state(headers) })
    }

    /// A trace that begins here.
    fn first(flags: u8) -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..), flags: RANDOM | flags, state: None }
    }

    fn write(&self, headers: &mut HeaderMap) {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags);
        headers.extend(HeaderValue::try_from(text).ok().map(|value| (TRACEPARENT, value)));
        headers.extend(self.state.clone().map(|state| (TRACESTATE, state)));
    }

    /// Whether somebody records the trace.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    pub fn flags(&self) -> u8 {
        self.flags
    }
}

/// Several headers are one list.
fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let all: Vec<_> = headers.get_all(TRACESTATE).iter().map(HeaderValue::as_bytes).collect();
    let joined = all.join(&b","[..]);
    HeaderValue::from_bytes(&joined).ok().filter(|state| !state.is_empty() && state.len() <= MAX_STATE)
}

/// A number of exactly so many digits, in lower case.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_right = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_right.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

// === impl Tracer ===

impl Tracer {
    /// Reports what belongs to a trace that is recorded, and of the others a share.
    pub fn new(report: impl Report + 'static, share: f64) -> Self {
        Self { report: Some(Box::new(report)), share }
    }

    /// A client's request: where it brings no trace, it may begin one.
    pub fn answer(self: &Arc<Self>, headers: &HeaderMap) -> TraceSpan {
        match TraceStep::read(headers) {
            Some(step) => self.go_on(step),
            None if self.report.is_none() => TraceSpan::default(),
            None => {
                let flags = if fastrand::f64() < self.share { SAMPLED } else { 0 };
                let current = Current { step: TraceStep::first(flags), tracer: self.clone() };
                let mut span = TraceSpan::new(Some(current), "request", TraceSpanKind::Server);
                span.recording.iter_mut().for_each(|recording| recording.ended.parent = None);
                span
            }
        }
    }

    /// A peer's request: what belongs to no trace there does not begin one here.
    pub fn join(self: &Arc<Self>, headers: &HeaderMap) -> TraceSpan {
        TraceStep::read(headers).map_or_else(TraceSpan::default, |step| self.go_on(step))
    }

    /// Nothing is reported any more.
    pub fn close(&self) {
        self.report.iter().for_each(|report| report.close());
    }

    fn go_on(self: &Arc<Self>, step: TraceStep) -> TraceSpan {
        TraceSpan::new(Some(Current { step, tracer: self.clone() }), "request", TraceSpanKind::Server)
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("reports", &self.report.is_some()).field("share", &self.share).finish()
    }
}

// === impl Span ===

impl TraceSpan {
    /// A part of what is current. It has an id of its own only where somebody is told of it.
    fn new(mut current: Option<Current>, name: &'static str, kind: TraceSpanKind) -> Self {
        let recorded = current.as_mut().filter(|current| current.tracer.report.is_some() && current.step.is_sampled());
        let recording = recorded.map(|current| {
            let parent = Some(std::mem::replace(&mut current.step.span, fastrand::u64(1..)));
            let (step, began) = (current.step.clone(), SystemTime::now());
            let (took, attributes) = (Duration::ZERO, Vec::new());
            let name = Cow::Borrowed(name);
            let ended = FinishedSpan { name, kind, step, parent, began, took, attributes, failure: None };
            Recording { ended: Box::new(ended), started: Instant::now() }
        });
        Self { current, recording }
    }

    /// Does something that is a part of this.
    pub fn within<F: Future>(&self, task: F) -> impl Future<Output = F::Output> + use<F> {
        within(self.current.clone(), task)
    }

    /// The trace's id, if there is one.
    pub fn trace(&self) -> Option<u128> {
        self.current.as_ref().map(|current| current.step.trace)
    }

    /// Calls it something else, if anybody is told.
    pub fn rename(&mut self, name: impl FnOnce() -> String) {
        if let Some(recording) = &mut self.recording {
            recording.ended.name = Cow::Owned(name());
        }
    }

    /// Says in a question's headers that it is this.
    pub fn write(&self, headers: &mut HeaderMap) {
        self.current.iter().for_each(|current| current.step.write(headers));
    }

    /// Tells more of it, if anybody is told.
    pub fn tell(&mut self, told: impl FnOnce() -> Vec<(&'static str, Value)>) {
        if let Some(recording) = &mut self.recording {
            recording.ended.attributes.extend(told());
        }
    }

    pub fn fail(&mut self, why: impl FnOnce() -> String) {
        if let Some(recording) = &mut self.recording {
            recording.ended.failure = Some(why());
        }
    }
}

impl From<&'static str> for Value {
    fn from(word: &'static str) -> Self {
        Self::Word(word)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

/// Whatever ends it, it is told.
impl Drop for TraceSpan {
    fn drop(&mut self) {
        let report = self.current.as_ref().and_then(|current| current.tracer.report.as_ref());
        if let (Some(Recording { mut ended, started }), Some(report)) = (self.recording.take(), report) {
            ended.took = started.elapsed();
            report.report(*ended);
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use parking_lot::Mutex;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let parsed = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
        HeaderMap::from_iter(lines.iter().map(parsed))
    }

    fn read(parent: &str) -> Option<TraceStep> {
        TraceStep::read(&headers(&[("traceparent", parent)]))
    }

    /// What was reported, in the order in which it ended.
    #[derive(Clone, Default)]
    struct RecordingReport(Arc<Mutex<Vec<FinishedSpan>>>);

    impl Report for RecordingReport {
        fn report(&self, span: FinishedSpan) {
            self.0.lock().push(span);
        }
    }

    fn written(span: &TraceSpan) -> HeaderMap {
        let mut headers = HeaderMap::new();
        span.write(&mut headers);
        headers
    }

    #[test]
    fn only_what_is_right_is_believed() {
        let step = read(PARENT).unwrap();
        assert_eq!((step.trace, step.span), (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7));
        assert!(step.is_sampled() && !read(&PARENT.replace("-01", "-00")).unwrap().is_sampled());
        assert!(read(&PARENT.replacen("00-", "cc-", 1)).is_some(), "a later version");
        assert!(read(&(PARENT.replacen("00-", "cc-", 1) + "-more")).is_some());
        for wrong in [
            "",
            "00",
            &(PARENT.to_owned() + "-more"),
            &PARENT.replacen("00-", "ff-", 1),
            &PARENT.to_uppercase(),
            &PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            &PARENT.replace("00f067aa0ba902b7", "0000000000000000"),
            &PARENT.replace("00f067aa0ba902b7", "0f067aa0ba902b7"),
            &PARENT.replace("-01", "-1"),
            &PARENT.replace("4bf", "+bf"),
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert_eq!(TraceStep::read(&headers(&[("traceparent", PARENT), ("traceparent", PARENT)])), None, "two of them");
    }

    #[test]
    fn what_nobody_records_is_passed_on_as_it_came() {
        let sent = headers(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]);
        let span = Arc::new(Tracer::default()).answer(&sent);
        assert_eq!(written(&span), headers(&[("traceparent", PARENT), ("tracestate", "a=1,b=2")]));
        assert!(written(&Arc::new(Tracer::default()).answer(&HeaderMap::new())).is_empty());
        let long = headers(&[("traceparent", PARENT), ("tracestate", &"x".repeat(MAX_STATE + 1))]);
        assert_eq!(written(&Arc::new(Tracer::default()).join(&long)), headers(&[("traceparent", PARENT)]));
    }

    #[tokio::test]
    async fn a_task_and_those_that_it_starts_are_one_trace() {
        let seen = RecordingReport::default();
        let tracer = Arc::new(Tracer::new(seen.clone(), 0.0));
        let span = tracer.answer(&headers(&[("traceparent", PARENT)]));
        let asked =
            span.within(async { tokio::spawn(carried(async { written(&begin("ask", TraceSpanKind::Client)) })).await });
        let asked = TraceStep::read(&asked.await.unwrap()).unwrap();
        drop(span);
        assert!(written(&begin("elsewhere", TraceSpanKind::Client)).is_empty());
        let seen = seen.0.lock();
        let [ask, request] = &seen[..] else { panic!("{} spans", seen.len()) };
        assert_eq!((ask.parent, request.parent), (Some(request.step.span), Some(0x00f0_67aa_0ba9_02b7)));
        assert_eq!((asked.trace, asked.span), (ask.step.trace, ask.step.span));
    }

    #[test]
    fn a_share_of_the_others_is_recorded_and_no_peer_begins() {
        for (share, recorded) in [(0.0, 0), (1.0, 20)] {
            let seen = RecordingReport::default();
            let tracer = Arc::new(Tracer::new(seen.clone(), share));
            (0..20).for_each(|_| assert!(tracer.answer(&HeaderMap::new()).trace().is_some()));
            assert!(tracer.join(&HeaderMap::new()).trace().is_none());
            let seen = seen.0.lock();
            assert_eq!(seen.len(), recorded);
            assert!(seen.iter().all(|span| span.parent.is_none()));
        }
    }
}
