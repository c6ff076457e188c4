//! Keeps containerd's mirror configuration in place while dray is ready: for this process, or for a mirror on another
//! machine.
//!
//! | state | reconcile, or the mirror responds | no response to three probes | stop |
//! |---|---|---|---|
//! | unknown (start) | configured | paused | withdrawn |
//! | configured | configured: written again if it was changed | paused | withdrawn |
//! | paused | configured | paused | withdrawn |
//! | withdrawn | withdrawn | withdrawn | withdrawn |
//!
//! A transition to paused or withdrawn removes the mirror configuration. If the removal fails, unknown and configured
//! do not change to paused, so that the next failed probe tries again.

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

/// Writes and removes the mirror configuration of a hosts directory.
pub struct MirrorReconciler {
    hosts: HostsDir,
    mirrors: Mirrors,
    state: Mutex<MirrorState>,
    /// Called with whether containerd uses the mirrors.
    on_change: Box<dyn Fn(bool) + Send + Sync>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum MirrorState {
    /// The mirror configuration of an earlier process may exist.
    Unknown,
    Configured,
    /// Removed until the mirror responds.
    Paused,
    /// Removed until the end of this process.
    Withdrawn,
}

/// Consecutive failed probes until the mirror configuration is removed. More: pulls wait longer for a mirror that is
/// down. Fewer: a short interruption sends pulls to the upstream.
const MAX_FAILED_PROBES: u32 = 3;

impl MirrorReconciler {
    pub fn new(hosts_dir: PathBuf, mirrors: Mirrors, on_change: impl Fn(bool) + Send + Sync + 'static) -> Self {
        let (hosts, state) = (HostsDir::new(hosts_dir), Mutex::new(MirrorState::Unknown));
        Self { hosts, mirrors, state, on_change: Box::new(on_change) }
    }

    /// Writes the mirror configuration, and again after another program has removed it.
    pub async fn keep(self: &Arc<Self>) {
        loop {
            let reconciler = self.clone();
            // Blocking, because it may wait for the lock of another process.
            let _ = tokio::task::spawn_blocking(move || reconciler.reconcile()).await;
            tokio::time::sleep(RELOAD_INTERVAL).await;
        }
    }

    fn reconcile(&self) {
        // The guard is held while files are written, so that nothing is written after `withdraw`.
        let mut state = self.state.lock();
        if *state == MirrorState::Withdrawn {
            return;
        }
        let result = self.hosts.install(&self.mirrors, &MirroredRegistries::Default, Mode::Apply);
        let is_first = std::mem::replace(&mut *state, MirrorState::Configured) == MirrorState::Unknown;
        (self.on_change)(result.as_ref().is_ok_and(|changes| !changes.remarks.iter().any(Remark::is_failure)));
        self.log(&result);
        // Remarks are logged once, not in every pass.
        if let Ok(changes) = result
            && is_first
        {
            changes.remarks.iter().for_each(|remark| tracing::warn!(%remark, "mirror configuration needs attention"));
        }
    }

    /// Removes the mirror configuration until the mirror responds, also that of an earlier process.
    fn pause(&self) {
        let mut state = self.state.lock();
        if matches!(*state, MirrorState::Unknown | MirrorState::Configured) {
            let result = self.hosts.withdraw();
            if result.is_ok() {
                *state = MirrorState::Paused;
            }
            self.log(&result);
        }
    }

    /// Removes the mirror configuration before this process stops, also that of an earlier process that was killed.
    pub fn withdraw(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut *state, MirrorState::Withdrawn) != MirrorState::Withdrawn {
            (self.on_change)(false);
            self.log(&self.hosts.withdraw());
        }
    }

    fn log(&self, result: &Result<Changes, HostsError>) {
        match result {
            Ok(changes) => {
                changes.changes.iter().for_each(|change| tracing::info!(%change, "mirror configuration changed"));
            }
            Err(error) => {
                let ids = (geteuid().as_raw(), getegid().as_raw());
                let remedy = self.hosts.remedy(error, ids);
                tracing::error!(%error, remedy, "mirror configuration failed");
            }
        }
    }
}

/// Keeps the mirror configuration in place while a mirror on another machine responds. Returns after SIGTERM or SIGINT,
/// when the mirror configuration is removed.
pub async fn sync(hosts_dir: PathBuf, mirror: Mirror, ca: Option<PathBuf>) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (url, mirrors) = (mirror.to_string(), Mirrors { hosts: vec![mirror], ca: ca.clone() });
    let reconciler = MirrorReconciler::new(hosts_dir, mirrors, |_| {});
    let mut failed_probes = 0;
    loop {
        match proof::probe(&url, ca.as_deref()).await {
            MirrorResponse::Dray => {
                failed_probes = 0;
                reconciler.reconcile();
            }
            response => {
                failed_probes += 1;
                tracing::debug!(mirror = url, error = ?response, failed_probes, "mirror probe failed");
                if failed_probes >= MAX_FAILED_PROBES {
                    reconciler.pause();
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => {}
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    reconciler.withdraw();
    Ok(())
}
