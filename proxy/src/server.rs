//! Composition: opens the store, starts the listeners, reports readiness, and drains before it stops.

mod background;
mod components;
mod listeners;
mod ports;
mod reload;
mod stop;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use pingora::server::RunArgs;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

use self::components::Components;
pub use self::components::check;
use self::ports::Ports;
pub use self::ports::{Bound, reachable};
pub use self::reload::ConfigSource;
use self::stop::{Signals, Stop};
use crate::access_log::AccessLog;
use crate::config::Config;
use crate::store::Store;
use crate::telemetry::Log;
use crate::worker_watch::watched;

/// Why dray does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is valid but does not work on this host.
    #[error("{0}")]
    Config(String),
    #[error("{0}")]
    Failed(String),
}

/// Runs until a signal stops it. `source` is read again for a reload. `started` is called once every listener accepts.
pub fn run(
    mut config: Config,
    source: Arc<dyn ConfigSource>,
    access_log: AccessLog,
    log: Arc<Log>,
    started: impl FnOnce(Bound) + Send + 'static,
) -> Result<(), StartError> {
    raise_descriptor_limit();
    // An unusable certificate is reported before any port is bound.
    let identity = components::identity(&config.tls)?;
    let as_read = Arc::new(config.clone());
    let ports = Ports::reserve(&mut config)?;
    let runtime = runtime().map_err(|e| StartError::Failed(format!("cannot start the background threads: {e}")))?;
    // Installed before the store opens: from now on a signal stops the process in order.
    let watch = || Ok::<_, std::io::Error>((Signals::watch()?, stop::hangups(std::io::stderr().is_terminal())?));
    let (signals, hangups) = runtime.block_on(async { watch() }).map_err(|e| StartError::Failed(e.to_string()))?;
    let components = Arc::new(Components::new(config, ports.bound, identity, access_log, log, &runtime)?);
    let server = listeners::server(&components)?;
    runtime.spawn(background::announce(components.clone(), ports, started));
    background::spawn(&runtime, &components);
    runtime.spawn(watched(reload::run(components.clone(), as_read, source, hangups)));
    let stop = Stop {
        signals: Mutex::new(signals),
        readiness: components.readiness.clone(),
        loads: components.loads.clone(),
        reconciler: components.reconciler.clone(),
        store: components.store.clone(),
    };
    server.run(RunArgs { shutdown_signal: Box::new(stop) });
    if let Some(reconciler) = &components.reconciler {
        // SIGINT skips draining, and with it the first withdrawal; a repeated one changes nothing.
        reconciler.withdraw();
    }
    components.tracer.close();
    close(runtime, &components.store);
    Ok(())
}

/// The runtime of the background tasks. The listeners have threads of their own.
fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("dray").enable_all().build()
}

fn close(runtime: Runtime, store: &Store) {
    runtime.block_on(store.close());
    // A fill may still be waiting for its upstream: the process does not wait for it.
    runtime.shutdown_timeout(Duration::from_millis(100));
}

/// Blobs, clients and upstreams all take descriptors; the usual soft limit of 1,024 is soon reached.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "descriptor limit not raised");
    }
}
