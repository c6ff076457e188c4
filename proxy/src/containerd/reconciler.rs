//! Keeps containerd pointed here for as long as this process is ready.

use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::process::{getegid, geteuid};
use tokio::signal::unix::{SignalKind, signal};

use super::hosts_dir::{Changes, HostsDir, HostsError, MirroredRegistries, Mode, Remark};
use super::hosts_toml::Mirrors;
use super::proof::{self, MirrorResponse};
use crate::config::Mirror;
use crate::times::{RELOAD_INTERVAL, RETRY_INTERVAL};

/// A hosts directory, and what it is to say.
pub struct MirrorReconciler {
    hosts: HostsDir,
    mirrors: Mirrors,
    /// Whether it says so now: not before this process is ready, and not again after it was taken back.
    state: Mutex<MirrorState>,
    /// Hears whether it does.
    told: Box<dyn Fn(bool) + Send + Sync>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MirrorState {
    /// What an earlier process has written may stand there, and may be true.
    Unknown,
    Pointed,
    /// Taken back for now.
    Paused,
    Withdrawn,
}

const MISSED: u32 = 3;

impl MirrorReconciler {
    pub fn new(hosts_dir: PathBuf, mirrors: Mirrors, told: impl Fn(bool) + Send + Sync + 'static) -> Self {
        let (hosts, state) = (HostsDir::new(hosts_dir), Mutex::new(MirrorState::Unknown));
        Self { hosts, mirrors, state, told: Box::new(told) }
    }

    /// Points containerd here, and again when somebody has undone it.
    pub async fn keep(self: &Arc<Self>) {
        loop {
            let keeping = self.clone();
            // It waits for others who write there.
            let _ = tokio::task::spawn_blocking(move || keeping.point()).await;
            tokio::time::sleep(RELOAD_INTERVAL).await;
        }
    }

    fn point(&self) {
        // Held while files are written, so that nothing is written after it was taken back.
        let mut state = self.state.lock();
        if *state == MirrorState::Withdrawn {
            return;
        }
        let done = self.hosts.install(&self.mirrors, &MirroredRegistries::Default, Mode::Apply);
        let is_first = std::mem::replace(&mut *state, MirrorState::Pointed) == MirrorState::Unknown;
        (self.told)(done.as_ref().is_ok_and(|done| !done.remarks.iter().any(Remark::is_failure)));
        self.log(&done);
        // What a person ought to know, once.
        if let Ok(done) = done
            && is_first
        {
            done.remarks.iter().for_each(|remark| tracing::warn!("{remark}"));
        }
    }

    /// Takes it back for now: nobody answers. Also what was written before the node, or this process, began anew.
    fn pause(&self) {
        let mut state = self.state.lock();
        if matches!(*state, MirrorState::Unknown | MirrorState::Pointed) {
            let done = self.hosts.withdraw();
            if done.is_ok() {
                *state = MirrorState::Paused;
            }
            self.log(&done);
        }
    }

    /// Takes it back: nobody is sent here any more. Also what an earlier process has written that was killed.
    pub fn withdraw(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut *state, MirrorState::Withdrawn) != MirrorState::Withdrawn {
            (self.told)(false);
            self.log(&self.hosts.withdraw());
        }
    }

    fn log(&self, done: &Result<Changes, HostsError>) {
        match done {
            Ok(outcome) => outcome.changes.iter().for_each(|change| tracing::info!("{change}")),
            Err(error) => {
                let ids = (geteuid().as_raw(), getegid().as_raw());
                let remedy = self.hosts.remedy(error, ids);
                tracing::error!(%error, remedy, "containerd's hosts directory");
            }
        }
    }
}

/// Keeps containerd pointed at a mirror elsewhere for as long as that answers. Ends when the process is to end,
/// and has taken it back then.
pub async fn follow(hosts_dir: PathBuf, mirror: Mirror, ca: Option<PathBuf>) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (url, mirrors) = (mirror.to_string(), Mirrors { hosts: vec![mirror], ca: ca.clone() });
    let keeping = MirrorReconciler::new(hosts_dir, mirrors, |_| {});
    let mut missed = 0;
    loop {
        match proof::ask(&url, ca.as_deref()).await {
            MirrorResponse::Dray => {
                missed = 0;
                keeping.point();
            }
            answer => {
                missed += 1;
                tracing::debug!(mirror = url, ?answer, missed, "the mirror does not answer");
                if missed >= MISSED {
                    keeping.pause();
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    keeping.withdraw();
    Ok(())
}
