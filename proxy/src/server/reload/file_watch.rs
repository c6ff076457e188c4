//! Decides when a configuration file is applied.
//!
//! | state | what is read | next |
//! |---|---|---|
//! | settled | the applied text | settled |
//! | settled, failed | another text, or an error | changed |
//! | changed | the same again | apply it |
//! | changed | another text | changed |
//! | changed, failed | the applied text | settled: a failure is over |
//! | failed with the applied text, after SIGHUP | the same | apply it |
//! | any | anything, on SIGHUP | apply it |
//!
//! A text that failed is tried again each time: a file that it names may appear later.

use std::time::Duration;

use crate::times::RELOAD_INTERVAL;

/// What was read of the file, and what came of it.
pub(super) struct FileWatch {
    applied: Option<String>,
    /// Read once, and not applied.
    changed: Option<FileText>,
    failure: Option<FailedText>,
}

/// The text of the file, or why it cannot be read.
pub(super) type FileText = Result<String, String>;

struct FailedText {
    text: FileText,
    error: String,
}

/// Why the file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trigger {
    Timer,
    Signal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchAction {
    Wait,
    Apply,
    /// A text that failed was replaced by the applied one.
    EndFailure,
}

/// Whether a failure is news for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureNews {
    New,
    Repeated,
}

/// How long after a changed text was read it must still be the same. Shorter: a file that a program writes in place is
/// applied half-written. A signal needs no second read.
const SETTLE_TIME: Duration = Duration::from_secs(1);

impl FileWatch {
    pub(super) fn new(applied: Option<String>) -> Self {
        Self { applied, changed: None, failure: None }
    }

    /// The time until the file is read again.
    pub(super) fn pause(&self) -> Duration {
        if self.changed.is_some() { SETTLE_TIME } else { RELOAD_INTERVAL }
    }

    /// The file was read.
    pub(super) fn observe(&mut self, text: &FileText, trigger: Trigger) -> WatchAction {
        let is_applied = text.as_ref().ok() == self.applied.as_ref();
        let changed = self.changed.take();
        match trigger {
            Trigger::Signal => WatchAction::Apply,
            Trigger::Timer if is_applied => match self.failure.take_if(|failure| failure.text != *text) {
                Some(_) => WatchAction::EndFailure,
                None if self.failure.is_some() => WatchAction::Apply,
                None => WatchAction::Wait,
            },
            Trigger::Timer if changed.as_ref() == Some(text) => WatchAction::Apply,
            Trigger::Timer => {
                self.changed = Some(text.clone());
                WatchAction::Wait
            }
        }
    }

    pub(super) fn record_success(&mut self, text: String) {
        (self.applied, self.failure) = (Some(text), None);
    }

    pub(super) fn record_failure(&mut self, text: FileText, error: &str, trigger: Trigger) -> FailureNews {
        let is_known = self.failure.as_ref().is_some_and(|failure| failure.error == error);
        self.failure = Some(FailedText { text, error: error.to_owned() });
        if is_known && trigger == Trigger::Timer { FailureNews::Repeated } else { FailureNews::New }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> FileText {
        Ok(text.to_owned())
    }

    #[test]
    fn changed_text_is_applied_once_it_has_settled() {
        let mut watch = FileWatch::new(Some("a".to_owned()));
        let cases = [
            (text("a"), Trigger::Timer, WatchAction::Wait, RELOAD_INTERVAL),
            (text("b"), Trigger::Timer, WatchAction::Wait, SETTLE_TIME),
            (text("bc"), Trigger::Timer, WatchAction::Wait, SETTLE_TIME),
            (text("bc"), Trigger::Timer, WatchAction::Apply, RELOAD_INTERVAL),
            (text("d"), Trigger::Timer, WatchAction::Wait, SETTLE_TIME),
            (text("a"), Trigger::Timer, WatchAction::Wait, RELOAD_INTERVAL),
            (text("d"), Trigger::Signal, WatchAction::Apply, RELOAD_INTERVAL),
            (Err("gone".to_owned()), Trigger::Timer, WatchAction::Wait, SETTLE_TIME),
            (Err("gone".to_owned()), Trigger::Timer, WatchAction::Apply, RELOAD_INTERVAL),
        ];
        for (read, trigger, action, pause) in cases {
            assert_eq!((watch.observe(&read, trigger), watch.pause()), (action, pause), "{read:?} {trigger:?}");
        }
    }

    #[test]
    fn failure_is_news_once_and_ends_with_the_applied_text() {
        let mut watch = FileWatch::new(Some("a".to_owned()));
        let mut fail = |error: &str, trigger| watch.record_failure(text("b"), error, trigger);
        let news = [
            fail("wrong", Trigger::Timer),
            fail("wrong", Trigger::Timer),
            fail("wrong", Trigger::Signal),
            fail("other", Trigger::Timer),
        ];
        assert_eq!(news, [FailureNews::New, FailureNews::Repeated, FailureNews::New, FailureNews::New]);
        assert_eq!(watch.observe(&text("a"), Trigger::Timer), WatchAction::EndFailure);
        assert_eq!(watch.observe(&text("a"), Trigger::Timer), WatchAction::Wait);
        watch.record_failure(text("b"), "wrong", Trigger::Timer);
        watch.record_success("b".to_owned());
        assert_eq!(watch.observe(&text("b"), Trigger::Timer), WatchAction::Wait);
    }

    #[test]
    fn failure_of_the_applied_text_is_tried_again() {
        // SIGHUP, while a file that the running text names is missing.
        let mut watch = FileWatch::new(Some("a".to_owned()));
        watch.record_failure(text("a"), "no such file", Trigger::Signal);
        assert_eq!(watch.observe(&text("a"), Trigger::Timer), WatchAction::Apply);
        watch.record_success("a".to_owned());
        assert_eq!(watch.observe(&text("a"), Trigger::Timer), WatchAction::Wait);
    }
}
