//! Signals, and how the process stops.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::server::{ShutdownSignal, ShutdownSignalWatch};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Mutex;

use crate::containerd::reconciler::MirrorReconciler;
use crate::proxy::Load;
use crate::readiness::Readiness;

/// Requests under way get this long after the stop signal.
const DRAIN: Duration = Duration::from_secs(25);

/// After the stop signal the listeners stay open this long, until nobody is sent here any more.
const LINGER: Duration = Duration::from_secs(1);

pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn watch() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }
}

/// Who sends one wants the configuration to be read again. Where there is a terminal it means that this is gone.
pub(super) async fn ignore_hangups() {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        tracing::warn!("SIGHUP is ignored: the configuration is read at the start only, restart after a change");
    }
}

/// SIGTERM: stop being ready, let requests end, then stop. SIGINT: stop.
pub(super) struct Stop {
    pub(super) signals: Mutex<Signals>,
    pub(super) readiness: Arc<Readiness>,
    pub(super) loads: [Arc<Load>; 2],
    pub(super) keeping: Option<Arc<MirrorReconciler>>,
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        // Nobody else waits for them.
        let Signals { terminate, interrupt } = &mut *self.signals.lock().await;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
        }
        self.readiness.end();
        // Before anything else: whoever asks from now on had better ask elsewhere.
        if let Some(keeping) = self.keeping.clone() {
            let _ = tokio::task::spawn_blocking(move || keeping.withdraw()).await;
        }
        let requests = || self.loads.iter().map(|load| load.current()).sum::<usize>();
        tracing::info!(requests = requests(), "draining");
        let drained = async {
            tokio::time::sleep(LINGER).await;
            while requests() > 0 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(DRAIN, drained) => {}
            _ = interrupt.recv() => {}
        }
        ShutdownSignal::GracefulTerminate
    }
}
