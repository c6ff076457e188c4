//! Applies a changed configuration file without a restart: on SIGHUP, and when its text has changed and settled.
//!
//! | file | result |
//! |---|---|
//! | valid | new requests use it; requests in progress end under the previous one |
//! | valid, changes keys that need a restart | the same, but these keys keep their values, and a warning lists them |
//! | invalid or unreadable | nothing changes; error log with line and key, `dray_config_reload_failed` is 1 |

mod file_watch;

use std::sync::Arc;

use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use self::file_watch::{FailureNews, FileWatch, Trigger, WatchAction};
use super::background::ConfiguredTasks;
use super::components::{Components, check_changed};
use crate::blocking::in_background;
use crate::config::{AccessConfig, ByteRate, CacheConfig, Config};
use crate::proxy::ClientPolicy;

/// The configuration file of the process, and the flags and variables that override it.
pub trait ConfigSource: Send + Sync + 'static {
    /// The current text of the file. None: there is no file, so there is nothing to reload.
    fn text(&self) -> Option<Result<String, String>>;
    /// The text that the process started with.
    fn text_at_start(&self) -> Option<String>;
    /// The configuration of a text. An error names file, line and key.
    fn parse(&self, text: &str) -> Result<Config, String>;
}

/// Whether two configurations differ in a key.
type Differs = fn(&Config, &Config) -> bool;

/// The keys that take effect at the start only.
const RESTART_KEYS: [(&str, Differs); 12] = [
    ("listen", |a, b| a.listen != b.listen),
    ("admin", |a, b| a.admin != b.admin),
    ("admin_token_file", |a, b| a.admin_token_file != b.admin_token_file),
    ("cache.dir", |a, b| a.cache.dir != b.cache.dir),
    ("cache.disk", |a, b| a.cache.disk != b.cache.disk),
    ("cache.memory", |a, b| a.cache.memory != b.cache.memory),
    ("access.token_key_file", |a, b| a.access.token_key_file != b.access.token_key_file),
    ("dns", |a, b| a.dns != b.dns),
    ("tls", |a, b| a.tls != b.tls),
    ("peers", |a, b| a.peers != b.peers),
    ("containerd", |a, b| a.containerd != b.containerd),
    ("tracing", |a, b| a.tracing != b.tracing),
];

/// Reloads for as long as it is polled. `started` is the configuration of the start as it was read: the running one has the
/// ports that port 0 stood for.
pub(super) async fn run(
    components: Arc<Components>,
    started: Arc<Config>,
    source: Arc<dyn ConfigSource>,
    mut hangups: Option<Signal>,
) {
    let mut tasks = ConfiguredTasks::spawn(&components.config.load(), &components.pull);
    let mut watch = FileWatch::new(source.text_at_start());
    loop {
        let trigger = tokio::select! {
            () = hangup(&mut hangups) => Trigger::Signal,
            () = sleep(watch.pause()) => Trigger::Timer,
        };
        let Some(text) = read(&source).await else {
            if trigger == Trigger::Signal {
                tracing::warn!("reload skipped: dray runs without a configuration file");
            }
            continue;
        };
        match watch.observe(&text, trigger) {
            WatchAction::Wait => continue,
            WatchAction::EndFailure => {
                components.metrics.config_reload_failed.set(0);
                continue;
            }
            WatchAction::Apply => {}
        }
        let result = match &text {
            Ok(text) if text.trim().is_empty() && trigger == Trigger::Timer => Err(EMPTY.to_owned()),
            Ok(text) => reload(&components, started.clone(), source.clone(), text, &mut tasks).await.map(|()| text),
            Err(error) => Err(error.clone()),
        };
        components.metrics.config_reload_failed.set(result.is_err().into());
        match result {
            Ok(applied) => watch.record_success(applied.clone()),
            Err(error) => {
                if watch.record_failure(text, &error, trigger) == FailureNews::New {
                    tracing::error!(error, "configuration reload failed, the previous configuration stays in use");
                }
            }
        }
    }
}

async fn hangup(hangups: &mut Option<Signal>) {
    match hangups {
        Some(hangups) => drop(hangups.recv().await),
        None => std::future::pending().await,
    }
}

/// Most often, such a file is being written, or its disk is full.
const EMPTY: &str = "the file is empty: SIGHUP applies it nevertheless";

async fn read(source: &Arc<dyn ConfigSource>) -> Option<Result<String, String>> {
    let source = source.clone();
    spawn_blocking(move || source.text()).await.ok().flatten()
}

/// Everything that can fail happens before anything is applied.
async fn reload(
    components: &Arc<Components>,
    started: Arc<Config>,
    source: Arc<dyn ConfigSource>,
    text: &str,
    tasks: &mut ConfiguredTasks,
) -> Result<(), String> {
    let (all, text) = (components.clone(), text.to_owned());
    // A reload of many rules takes a while, and must not slow the requests of clients.
    let checked = in_background(move || {
        let next = source.parse(&text)?;
        check_changed(&started, &next).map_err(|error| error.to_string())?;
        let (next, restart) = without_restart(&all.config.load(), &started, next);
        // The keys that keep their values may contradict the new ones.
        next.check_together().map_err(|conflict| conflict.to_string())?;
        let (rules, logins) = (all.pull.reloaded(&next)?, all.client_auth.load_logins(&next.access)?);
        let hash = next.hash();
        Ok::<_, String>((next, hash, restart, rules, logins))
    });
    let (next, hash, restart, rules, logins) = checked.await??;
    let rules = components.pull.store(rules);
    components.peer_upload.set_rate(next.limits.peer_upload.map(ByteRate::bytes_per_second));
    components.policy.store(Arc::new(ClientPolicy::new(&next, rules, logins)));
    components.log.set_filter(&next.log.filter);
    let running = components.config.swap(Arc::new(next.clone()));
    tasks.follow(&running, &next, &components.pull).await;
    components.metrics.config.reset();
    components.metrics.config.with_label_values(&[&hash]).set(1);
    tracing::info!(hash, "configuration reloaded");
    if !restart.is_empty() {
        tracing::warn!(keys = restart.join(", "), "changed keys need a restart");
    }
    Ok(())
}

/// A configuration in which the keys that need a restart have their running values, and which of these differ from the start.
fn without_restart(running: &Config, started: &Config, next: Config) -> (Config, Vec<&'static str>) {
    let differ = RESTART_KEYS.into_iter().filter(|(_, differs)| differs(started, &next)).map(|(key, _)| key).collect();
    let kept = running.clone();
    // Written out, so that a new key has to be decided on.
    let applied = Config {
        version: next.version,
        listen: kept.listen,
        admin: kept.admin,
        admin_token_file: kept.admin_token_file,
        cache: CacheConfig {
            dir: kept.cache.dir,
            disk: kept.cache.disk,
            memory: kept.cache.memory,
            min_free: next.cache.min_free,
            scrub_rate: next.cache.scrub_rate,
        },
        access: AccessConfig { token_key_file: kept.access.token_key_file, ..next.access },
        egress: next.egress,
        limits: next.limits,
        dns: kept.dns,
        tls: kept.tls,
        registry: next.registry,
        prefetch: next.prefetch,
        pin: next.pin,
        peers: kept.peers,
        containerd: kept.containerd,
        tracing: kept.tracing,
        log: next.log,
    };
    (applied, differ)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, "test").unwrap()
    }

    #[test]
    fn reload_keeps_and_lists_keys_that_need_a_restart() {
        let running = config("listen = \"127.0.0.1:1\"\n[cache]\ndisk = \"1GiB\"");
        let next = config(
            "listen = \"127.0.0.1:2\"\n[cache]\ndisk = \"2GiB\"\nmin_free = \"7%\"\n[dns]\nservers = [\"10.0.0.1:53\"]\n\
             [[registry]]\nmatch = \"a.io\"",
        );
        let (applied, restart) = without_restart(&running, &running, next.clone());
        assert_eq!(restart, ["listen", "cache.disk", "dns"]);
        assert_eq!(
            (applied.listen, applied.cache.disk, &applied.dns),
            (running.listen, running.cache.disk, &running.dns)
        );
        assert_eq!((applied.cache.min_free, applied.registry.len()), (next.cache.min_free, 1));
        assert_eq!(without_restart(&running, &running, applied.clone()), (applied, vec![]));
    }

    #[test]
    fn every_key_that_is_not_applied_is_listed() {
        let sample = include_str!("../../../config/dray.toml").replace("#: ", "");
        let (running, next) = (Config::default(), config(&sample));
        let (applied, restart) = without_restart(&running, &running, next.clone());
        // A key that is neither applied nor listed would still differ without a word.
        for (key, differs) in RESTART_KEYS {
            assert!(!differs(&running, &applied), "{key} is applied");
            assert_eq!(restart.contains(&key), differs(&running, &next), "{key}");
        }
        let listed = |key: &str| RESTART_KEYS.iter().any(|(known, _)| *known == key);
        for (key, kept) in [("tls", applied.tls == next.tls), ("peers", applied.peers == next.peers)] {
            assert!(!kept && listed(key) && restart.contains(&key), "{key}");
        }
    }
}
