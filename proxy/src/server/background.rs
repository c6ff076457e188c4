//! What runs beside the listeners for as long as the process lives.

use std::sync::Arc;

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::components::Components;
use super::ports::{Bound, Ports};
use crate::config::DiskShare;
use crate::prefetch;
use crate::store::{HOUSEKEEPING, Store};
use crate::times::{GRACE, RELOAD_INTERVAL};
use crate::worker_watch::watched;

/// Starts everything that waits for nothing.
pub(super) fn spawn(runtime: &Runtime, components: &Arc<Components>) {
    let (config, pull) = (&components.config, &components.pull);
    let following = pull.clone();
    runtime.spawn(watched(async move { following.follow_peers().await }));
    runtime.spawn(watched(keep_secrets(components.clone())));
    let (scrubbing, rate) = (pull.clone(), config.cache.scrub.0);
    runtime.spawn(watched(async move { scrubbing.scrub(rate).await }));
    for prefetch in config.prefetch.clone() {
        runtime.spawn(watched(prefetch::keep_warm(pull.clone(), prefetch)));
    }
    if !config.pin.is_empty() {
        runtime.spawn(watched(prefetch::keep_pinned(pull.clone(), config.pin.clone())));
    }
    runtime.spawn(watched(keep_house(components.store.clone(), config.cache.keep_free)));
}

/// Says that the process is ready, once every listener accepts and the peers are known.
pub(super) async fn announce(components: Arc<Components>, ports: Ports, started: impl FnOnce(Bound)) {
    if !tokio::task::spawn_blocking(move || ports.wait_until_open()).await.unwrap_or(false) {
        tracing::error!("the listeners did not open");
        return;
    }
    // A node that does not know its peers yet would fetch everything itself.
    if timeout(GRACE, components.pull.peers_known()).await.is_err() {
        tracing::warn!("the peers are not known yet: starting alone");
    }
    components.readiness.begin();
    started(components.bound);
    if let Some(keeping) = &components.keeping {
        keeping.clone().keep().await;
    }
}

/// Looks after the disk for as long as the process lives.
async fn keep_house(store: Arc<Store>, keep_free: DiskShare) {
    let mut thinning = None::<JoinHandle<()>>;
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (large, records) = (store.large.clone(), store.clone());
        let _ = tokio::task::spawn_blocking(move || large.keep_house(keep_free)).await;
        // It may read all records, and the disk fills meanwhile.
        if thinning.as_ref().is_none_or(JoinHandle::is_finished) {
            thinning = Some(tokio::task::spawn_blocking(move || records.records.thin_out()));
        }
        store.measure();
    }
}

/// Reads certificates and keys again, which others replace, for as long as the process lives.
async fn keep_secrets(components: Arc<Components>) {
    let mut known = [const { None }; 5];
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        let components = components.clone();
        let reloaded = tokio::task::spawn_blocking(move || {
            let own = components.identity.as_ref().and_then(|identity| identity.reload().err());
            let [upstreams, peers] = components.pull.reload().map(Result::err);
            [own, upstreams, peers, components.gate.reload().err(), components.visitors.reload().err()]
        });
        let Ok(trouble) = reloaded.await else { continue };
        for (new, old) in trouble.iter().zip(&known) {
            if let Some(error) = new.as_ref().filter(|_| new != old) {
                tracing::warn!(error, "a changed file cannot be used: what was read before still holds");
            }
        }
        known = trouble;
    }
}
