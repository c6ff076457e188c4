//! Signals, and how the process stops:
//!
//! | state | listeners | next state |
//! |---|---|---|
//! | running | open | SIGTERM: draining; SIGINT: stopped |
//! | draining | open, but not ready, and containerd's mirror configuration is withdrawn | stopped, see below |
//! | stopped | closed | |
//!
//! Draining ends with the last request, but not before [`MIN_DRAIN`]; after [`DRAIN_TIMEOUT`]; or with SIGINT. Unfinished
//! downloads stay on the disk for the next process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Mutex;

use crate::containerd::reconciler::MirrorReconciler;
use crate::proxy::Load;
use crate::readiness::Readiness;
use crate::store::Store;

/// How long requests in progress may take after the stop signal. Larger: beyond the termination grace period of
/// Kubernetes (30 s) the process is killed. Smaller: slow downloads are cut off.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);

/// Minimum time that the listeners stay open after the stop signal. Smaller: clients that still use this node get
/// connection errors.
const MIN_DRAIN: Duration = Duration::from_secs(1);

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// SIGHUP, from before the store opens: its default action would end the process. None: with a terminal, where it means
/// that the terminal has closed.
pub(super) fn hangups(is_terminal: bool) -> std::io::Result<Option<Signal>> {
    (!is_terminal).then(|| signal(SignalKind::hangup())).transpose()
}

impl Signals {
    pub(super) fn watch() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }
}

/// SIGTERM: become not ready, drain, then stop. SIGINT: stop.
pub(super) struct Stop {
    pub(super) signals: Mutex<Signals>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) loads: [Arc<Load>; 2],
    pub(super) reconciler: Option<Arc<MirrorReconciler>>,
    pub(super) store: Arc<Store>,
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        let signal = self.stopped().await;
        let store = self.store.clone();
        // Before the listeners' threads end: they would drop the downloads, which would remove their files.
        let _ = tokio::task::spawn_blocking(move || store.seal()).await;
        signal
    }
}

impl Stop {
    /// Waits for a signal, and drains.
    async fn stopped(&self) -> ShutdownSignal {
        // The lock is never contended: only this task receives signals.
        let Signals { terminate, interrupt } = &mut *self.signals.lock().await;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
        }
        self.readiness.end();
        // Before draining: containerd must send new requests to the upstream while the listeners are still open.
        if let Some(reconciler) = self.reconciler.clone() {
            let _ = tokio::task::spawn_blocking(move || reconciler.withdraw()).await;
        }
        let requests = || self.loads.iter().map(|load| load.current()).sum::<usize>();
        tracing::info!(requests = requests(), "draining");
        let drained = async {
            tokio::time::sleep(MIN_DRAIN).await;
            while requests() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(DRAIN_TIMEOUT, drained) => {}
            _ = interrupt.recv() => {}
        }
        ShutdownSignal::GracefulTerminate
    }
}
