//! Background tasks that run as long as the process.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::Runtime;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::components::Components;
use super::ports::{Bound, Ports};
use crate::config::Config;
use crate::prefetch;
use crate::pull::Pull;
use crate::store::HOUSEKEEPING_INTERVAL;
use crate::times::{COMPLETION_GRACE, RELOAD_INTERVAL};
use crate::worker_watch::watched;

/// Starts the tasks that do not wait for the listeners.
pub(super) fn spawn(runtime: &Runtime, components: &Arc<Components>) {
    let following = components.pull.clone();
    runtime.spawn(watched(async move { following.follow_peers().await }));
    runtime.spawn(watched(reload_secrets(components.clone())));
    runtime.spawn(watched(run_housekeeping(components.clone())));
}

/// The tasks of a configuration. A reload replaces those whose settings have changed.
pub(super) struct ConfiguredTasks {
    scrub: JoinSet<()>,
    prefetch: JoinSet<()>,
    pins: JoinSet<()>,
}

impl ConfiguredTasks {
    pub(super) fn spawn(config: &Config, pull: &Arc<Pull>) -> Self {
        Self { scrub: scrub(config, pull), prefetch: prefetches(config, pull), pins: pins(config, pull) }
    }

    /// The previous tasks end before the new ones start, so that they do not undo what these do.
    pub(super) async fn follow(&mut self, running: &Config, next: &Config, pull: &Arc<Pull>) {
        if next.cache.scrub_rate != running.cache.scrub_rate {
            self.scrub.shutdown().await;
            self.scrub = scrub(next, pull);
        }
        if next.prefetch != running.prefetch {
            self.prefetch.shutdown().await;
            self.prefetch = prefetches(next, pull);
        }
        if next.pin != running.pin {
            self.pins.shutdown().await;
            self.pins = pins(next, pull);
        }
    }
}

fn scrub(config: &Config, pull: &Arc<Pull>) -> JoinSet<()> {
    let (pull, rate) = (pull.clone(), config.cache.scrub_rate.0);
    one(async move { pull.blobs.scrub(rate).await })
}

fn prefetches(config: &Config, pull: &Arc<Pull>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for prefetch in config.prefetch.clone() {
        tasks.spawn(watched(prefetch::keep_warm(pull.clone(), prefetch)));
    }
    tasks
}

fn pins(config: &Config, pull: &Arc<Pull>) -> JoinSet<()> {
    one(prefetch::keep_pinned(pull.clone(), config.pin.clone()))
}

fn one(task: impl Future<Output = ()> + Send + 'static) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(watched(task));
    tasks
}

/// Marks the process ready, once every listener accepts and the peers are known, or after a timeout without them.
pub(super) async fn announce(components: Arc<Components>, ports: Ports, started: impl FnOnce(Bound)) {
    if !tokio::task::spawn_blocking(move || ports.wait_until_open()).await.unwrap_or(false) {
        tracing::error!("listeners did not open");
        return;
    }
    // Without its peers this node would download everything from the upstreams.
    if timeout(COMPLETION_GRACE, components.pull.wait_for_peers()).await.is_err() {
        tracing::warn!("peers not known yet: starting without them");
    }
    components.readiness.begin();
    started(components.bound);
    if let Some(reconciler) = &components.reconciler {
        reconciler.clone().keep().await;
    }
}

/// Runs the store's housekeeping: eviction, free space, old records.
async fn run_housekeeping(components: Arc<Components>) {
    let store = &components.store;
    let mut thinning = None::<JoinHandle<()>>;
    let mut tick = tokio::time::interval(HOUSEKEEPING_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (large, records) = (store.large.clone(), store.clone());
        let min_free = components.config.load().cache.min_free;
        let _ = tokio::task::spawn_blocking(move || large.run_housekeeping(min_free)).await;
        // Not awaited: it may read all records, while eviction must keep the disk from filling.
        if thinning.as_ref().is_none_or(JoinHandle::is_finished) {
            thinning = Some(tokio::task::spawn_blocking(move || records.records.thin_out()));
        }
        store.measure();
    }
}

/// Reads certificates, keys and tokens again when their files are replaced.
async fn reload_secrets(components: Arc<Components>) {
    let mut reported = [const { None }; 5];
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        let components = components.clone();
        let reloaded = tokio::task::spawn_blocking(move || {
            let own = components.identity.as_ref().and_then(|identity| identity.reload().err());
            let [upstreams, peers] = components.pull.reload().map(Result::err);
            [
                own,
                upstreams,
                peers,
                components.client_auth.reload(&components.policy.load()).err(),
                components.status_auth.reload().err(),
            ]
        });
        let Ok(errors) = reloaded.await else { continue };
        for (new, old) in errors.iter().zip(&reported) {
            if let Some(error) = new.as_ref().filter(|_| new != old) {
                tracing::warn!(error, "changed file unusable: previous contents stay in use");
            }
        }
        reported = errors;
    }
}
