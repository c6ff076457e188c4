//! Distributed tracing (W3C Trace Context): the trace of a request, and how long its parts take.
//!
//! A request continues the trace of its headers, or begins one if a collector is configured. The task of a request
//! carries the trace, and passes it to the tasks that it starts ([`carried`]). Requests to peers and upstreams carry it
//! as well ([`TraceSpan::write`]). Without a collector, the headers of a trace are passed on unchanged.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::worker_watch::watched;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Longest `tracestate` that is passed on, in bytes, which is the minimum of the specification. A longer one is
/// dropped.
const MAX_STATE: usize = 512;

/// Bits of the flags of a trace: it is recorded; its id is random.
const SAMPLED: u8 = 1;
const RANDOM: u8 = 2;

/// The position in a trace, as one service sends it to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceStep {
    pub trace: u128,
    pub span: u64,
    flags: u8,
    /// The `tracestate`: data of other tracing systems.
    pub state: Option<HeaderValue>,
}

/// Selects the traces that are recorded, and reports their spans.
#[derive(Default)]
pub struct Tracer {
    report: Option<Box<dyn Report>>,
    /// Share of the requests without a trace that are recorded, from 0 to 1.
    share: f64,
}

/// Receives finished spans.
pub trait Report: Send + Sync {
    fn report(&self, span: FinishedSpan);
    /// Sends the spans that are left.
    fn close(&self) {}
}

/// A running span. The default belongs to no trace.
#[derive(Default)]
pub struct TraceSpan {
    current: Option<Current>,
    recording: Option<Recording>,
}

/// The data of a span that is recorded. Other spans do not read the clock.
struct Recording {
    span: Box<FinishedSpan>,
    started: Instant,
}

/// A finished span.
pub struct FinishedSpan {
    pub name: Cow<'static, str>,
    pub kind: TraceSpanKind,
    pub step: TraceStep,
    /// The parent span. None: this one is the first of its trace.
    pub parent: Option<u64>,
    pub began: SystemTime,
    pub took: Duration,
    pub attributes: Vec<(&'static str, Value)>,
    /// The error, if it failed.
    pub failure: Option<String>,
}

/// The side of a request that a span is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceSpanKind {
    Server,
    Client,
    Internal,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Static(&'static str),
    Number(u64),
}

/// The trace of a task, and where its spans are reported.
#[derive(Clone)]
struct Current {
    step: TraceStep,
    tracer: Arc<Tracer>,
}

tokio::task_local! {
    static CURRENT: Current;
}

/// Begins a span in the trace of this task.
pub fn begin(name: &'static str, kind: TraceSpanKind) -> TraceSpan {
    TraceSpan::new(CURRENT.try_with(Current::clone).ok(), name, kind)
}

/// A task that continues the trace of this task.
pub fn carried<F: Future>(task: F) -> impl Future<Output = F::Output> {
    within(CURRENT.try_with(Current::clone).ok(), watched(task))
}

async fn within<F: Future>(current: Option<Current>, task: F) -> F::Output {
    match current {
        Some(current) => CURRENT.scope(current, task).await,
        None => task.await,
    }
}

// === impl TraceStep ===

impl TraceStep {
    /// Parses the headers of a request. None: they are missing or invalid.
    fn read(headers: &HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(TRACEPARENT).iter();
        let (only, None) = (all.next()?, all.next()) else { return None };
        let mut parts = only.to_str().ok()?.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let (version, flags) = (hex(version, 2)?, hex(flags, 2)?);
        // Later versions may have more fields.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (hex(trace, 32)?, u64::try_from(hex(span, 16)?).ok()?);
        let flags = u8::try_from(flags).ok()? & (SAMPLED | RANDOM);
        (trace != 0 && span != 0).then(|| Self { trace, span, flags, state: state(headers) })
    }

    /// A new trace.
    fn new_root(flags: u8) -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..), flags: RANDOM | flags, state: None }
    }

    fn write(&self, headers: &mut HeaderMap) {
        let text = format!("00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags);
        headers.extend(HeaderValue::try_from(text).ok().map(|value| (TRACEPARENT, value)));
        headers.extend(self.state.clone().map(|state| (TRACESTATE, state)));
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    pub fn flags(&self) -> u8 {
        self.flags
    }
}

/// Several headers form one list.
fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let all: Vec<_> = headers.get_all(TRACESTATE).iter().map(HeaderValue::as_bytes).collect();
    let joined = all.join(&b","[..]);
    HeaderValue::from_bytes(&joined).ok().filter(|state| !state.is_empty() && state.len() <= MAX_STATE)
}

/// A lower-case hexadecimal number of exactly `digits` digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_valid = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_valid.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

// === impl Tracer ===

impl Tracer {
    /// Reports the recorded traces of other services, and a share of the requests without a trace.
    pub fn new(report: impl Report + 'static, share: f64) -> Self {
        Self { report: Some(Box::new(report)), share }
    }

    /// The span of a client request. Without a trace in its headers, it may begin one.
    pub fn answer(self: &Arc<Self>, headers: &HeaderMap) -> TraceSpan {
        match TraceStep::read(headers) {
            Some(step) => self.continue_trace(step),
            None if self.report.is_none() => TraceSpan::default(),
            None => {
                let flags = if fastrand::f64() < self.share { SAMPLED } else { 0 };
                let current = Current { step: TraceStep::new_root(flags), tracer: self.clone() };
                let mut span = TraceSpan::new(Some(current), "request", TraceSpanKind::Server);
                span.recording.iter_mut().for_each(|recording| recording.span.parent = None);
                span
            }
        }
    }

    /// The span of a peer request. Without a trace in its headers, it does not begin one.
    pub fn join(self: &Arc<Self>, headers: &HeaderMap) -> TraceSpan {
        TraceStep::read(headers).map_or_else(TraceSpan::default, |step| self.continue_trace(step))
    }

    /// Sends the spans that are left, at the end of the process.
    pub fn close(&self) {
        self.report.iter().for_each(|report| report.close());
    }

    fn continue_trace(self: &Arc<Self>, step: TraceStep) -> TraceSpan {
        TraceSpan::new(Some(Current { step, tracer: self.clone() }), "request", TraceSpanKind::Server)
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer").field("reports", &self.report.is_some()).field("share", &self.share).finish()
    }
}

// === impl TraceSpan ===

impl TraceSpan {
    /// A child of the current span. It has its own id only if it is recorded.
    fn new(mut current: Option<Current>, name: &'static str, kind: TraceSpanKind) -> Self {
        let recorded = current.as_mut().filter(|current| current.tracer.report.is_some() && current.step.is_sampled());
        let recording = recorded.map(|current| {
            let parent = Some(std::mem::replace(&mut current.step.span, fastrand::u64(1..)));
            let (step, began) = (current.step.clone(), SystemTime::now());
            let (took, attributes) = (Duration::ZERO, Vec::new());
            let name = Cow::Borrowed(name);
            let finished = FinishedSpan { name, kind, step, parent, began, took, attributes, failure: None };
            Recording { span: Box::new(finished), started: Instant::now() }
        });
        Self { current, recording }
    }

    /// Runs a task as a part of this span.
    pub fn within<F: Future>(&self, task: F) -> impl Future<Output = F::Output> + use<F> {
        within(self.current.clone(), task)
    }

    /// The id of the trace, if there is one.
    pub fn trace(&self) -> Option<u128> {
        self.current.as_ref().map(|current| current.step.trace)
    }

    /// Renames the span, if it is recorded.
    pub fn rename(&mut self, name: impl FnOnce() -> String) {
        if let Some(recording) = &mut self.recording {
            recording.span.name = Cow::Owned(name());
        }
    }

    /// Adds the trace to the headers of a request.
    pub fn write(&self, headers: &mut HeaderMap) {
        self.current.iter().for_each(|current| current.step.write(headers));
    }

    /// Adds attributes, if the span is recorded.
    pub fn tell(&mut self, attributes: impl FnOnce() -> Vec<(&'static str, Value)>) {
        if let Some(recording) = &mut self.recording {
            recording.span.attributes.extend(attributes());
        }
    }

    pub fn fail(&mut self, error: impl FnOnce() -> String) {
        if let Some(recording) = &mut self.recording {
            recording.span.failure = Some(error());
        }
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Static(text)
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

/// Reports the span, however it ends.
impl Drop for TraceSpan {
    fn drop(&mut self) {
        let report = self.current.as_ref().and_then(|current| current.tracer.report.as_ref());
        if let (Some(Recording { mut span, started }), Some(report)) = (self.recording.take(), report) {
            span.took = started.elapsed();
            report.report(*span);
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

    /// The reported spans, in the order in which they ended.
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
    fn invalid_traceparent_is_ignored() {
        let step = read(PARENT).unwrap();
        assert_eq!((step.trace, step.span), (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7));
        assert!(step.is_sampled() && !read(&PARENT.replace("-01", "-00")).unwrap().is_sampled());
        assert!(read(&PARENT.replacen("00-", "cc-", 1)).is_some(), "a later version");
        assert!(read(&(PARENT.replacen("00-", "cc-", 1) + "-more")).is_some());
        for invalid in [
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
            assert_eq!(read(invalid), None, "{invalid}");
        }
        assert_eq!(TraceStep::read(&headers(&[("traceparent", PARENT), ("traceparent", PARENT)])), None, "two of them");
    }

    #[test]
    fn unrecorded_trace_is_passed_on_unchanged() {
        let sent = headers(&[("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]);
        let span = Arc::new(Tracer::default()).answer(&sent);
        assert_eq!(written(&span), headers(&[("traceparent", PARENT), ("tracestate", "a=1,b=2")]));
        assert!(written(&Arc::new(Tracer::default()).answer(&HeaderMap::new())).is_empty());
        let long = headers(&[("traceparent", PARENT), ("tracestate", &"x".repeat(MAX_STATE + 1))]);
        assert_eq!(written(&Arc::new(Tracer::default()).join(&long)), headers(&[("traceparent", PARENT)]));
    }

    #[tokio::test]
    async fn task_and_its_subtasks_share_one_trace() {
        let seen = RecordingReport::default();
        let tracer = Arc::new(Tracer::new(seen.clone(), 0.0));
        let span = tracer.answer(&headers(&[("traceparent", PARENT)]));
        let sent_by_subtask = span
            .within(async { tokio::spawn(carried(async { written(&begin("subtask", TraceSpanKind::Client)) })).await });
        let sent_by_subtask = TraceStep::read(&sent_by_subtask.await.unwrap()).unwrap();
        drop(span);
        assert!(written(&begin("outside", TraceSpanKind::Client)).is_empty());
        let seen = seen.0.lock();
        let [child, request] = &seen[..] else { panic!("{} spans", seen.len()) };
        assert_eq!((child.parent, request.parent), (Some(request.step.span), Some(0x00f0_67aa_0ba9_02b7)));
        assert_eq!((sent_by_subtask.trace, sent_by_subtask.span), (child.step.trace, child.step.span));
    }

    #[test]
    fn share_of_client_requests_begins_a_trace() {
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
