//! What the listeners and the background tasks of one process share.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::runtime::Runtime;

use super::StartError;
use super::ports::{Bound, reachable};
use crate::access_log::AccessLog;
use crate::activity::Activity;
use crate::admin::StatusAuth;
use crate::config::{Config, Mirror, TlsConfig};
use crate::containerd::diagnosis;
use crate::containerd::hosts_toml::Mirrors;
use crate::containerd::reconciler::MirrorReconciler;
use crate::identity::{Identity, IdentityFiles, TrustedRole};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::proxy::{Browsers, ClientAuth, Clients, Load};
use crate::pull::Pull;
use crate::readiness::Readiness;
use crate::registries::Registries;
use crate::store::Store;
use crate::telemetry;
use crate::trace::Tracer;
use crate::upstream::UpstreamClient;

pub(super) struct Components {
    pub(super) config: Config,
    pub(super) bound: Bound,
    /// What the registry listener shows. None: it speaks plain HTTP.
    pub(super) identity: Option<Arc<Identity>>,
    pub(super) access_log: Arc<AccessLog>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) registries: Arc<Registries>,
    pub(super) memory: Arc<Memory>,
    pub(super) pull: Arc<Pull>,
    pub(super) store: Arc<Store>,
    /// Of clients and of peers: peers, or strangers that find their port, take no room from this node's own clients.
    pub(super) loads: [Arc<Load>; 2],
    pub(super) readiness: Arc<Readiness>,
    pub(super) clients: Arc<Clients>,
    pub(super) browsers: Arc<Browsers>,
    pub(super) gate: Arc<ClientAuth>,
    pub(super) activity: Arc<Activity>,
    pub(super) tracer: Arc<Tracer>,
    pub(super) visitors: Arc<StatusAuth>,
    pub(super) keeping: Option<Arc<MirrorReconciler>>,
}

impl Components {
    /// Opens the cache, and makes the rest. The ports are taken already.
    pub(super) fn new(
        config: Config,
        bound: Bound,
        identity: Option<Arc<Identity>>,
        access_log: AccessLog,
        runtime: &Runtime,
    ) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new());
        metrics.config.with_label_values(&[&config.hash()]).set(1);
        let registries = Arc::new(Registries::new(&config));
        let memory = Arc::new(Memory::of_process());
        let (pull, store) = runtime.block_on(compose(&config, &registries, &memory, &metrics))?;
        warn_of_strangers(&config);
        let tracer = runtime.block_on(async { telemetry::tracer(&config.tracing) }).map_err(StartError::Config)?;
        Ok(Self {
            bound,
            identity,
            access_log: Arc::new(access_log),
            loads: [(); 2].map(|()| Arc::new(Load::new(memory.clone()))),
            readiness: Arc::default(),
            clients: Arc::new(Clients::new(&config.access)),
            browsers: Arc::new(Browsers::new(&config)),
            gate: gate(&config, bound.registry, &registries)?,
            activity: Arc::default(),
            tracer: Arc::new(tracer),
            visitors: Arc::new(visitors(&config)?),
            keeping: keeping(&config, bound.registry, &metrics)?,
            pull,
            store,
            memory,
            registries,
            metrics,
            config,
        })
    }
}

/// Reads and makes all that [`run`] would refuse to start without, except for the cache and the ports.
pub fn check(config: &Config) -> Result<(), StartError> {
    let (metrics, registries) = (Arc::new(Metrics::new()), Registries::new(config));
    identity(&config.tls)?;
    UpstreamClient::new(config, &registries, Arc::new(Memory::new(0)), metrics.clone()).map_err(StartError::Config)?;
    Peers::new(config, metrics.clone()).map_err(StartError::Config)?;
    gate(config, config.listen, &registries)?;
    telemetry::tracer(&config.tracing).map_err(StartError::Config)?;
    visitors(config)?;
    keeping(config, config.listen, &metrics)?;
    Ok(())
}

async fn compose(
    config: &Config,
    registries: &Arc<Registries>,
    memory: &Arc<Memory>,
    metrics: &Arc<Metrics>,
) -> Result<(Arc<Pull>, Arc<Store>), StartError> {
    let cache = &config.cache;
    let store = Store::open(&cache.dir, cache.disk, cache.keep_free, cache.memory.0, metrics)
        .await
        .map_err(|e| StartError::Failed(e.to_string()))?;
    let store = Arc::new(store);
    let upstream =
        UpstreamClient::new(config, registries, memory.clone(), metrics.clone()).map_err(StartError::Config)?;
    let peers = Peers::new(config, metrics.clone()).map_err(StartError::Config)?;
    Ok((
        Arc::new(Pull::new(registries.clone(), store.clone(), upstream, peers, memory.clone(), metrics.clone())),
        store,
    ))
}

/// Says what peers that prove nothing cost, and whom they let in.
fn warn_of_strangers(config: &Config) {
    if config.peers.listen.is_none() || config.peers.are_proven() {
        return;
    }
    tracing::warn!("peers without key_file or mtls: tags and images that need credentials are not shared");
    let (access, tls) = (&config.access, &config.tls);
    if !access.clients.is_empty() || access.logins_file.is_some() || tls.client_ca.is_some() {
        tracing::warn!(
            "access.clients, access.logins_file and tls.client_ca guard the registry port only: without peers.key_file or \
             peers.mtls whoever reaches the peers' port gets what is public"
        );
    }
}

/// Who gets what only some may have.
fn gate(config: &Config, listen: SocketAddr, registries: &Registries) -> Result<Arc<ClientAuth>, StartError> {
    let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
    let are_asked = registries.ask_who() || config.access.logins_file.is_some();
    if are_asked && scheme == "http" && !listen.ip().is_loopback() {
        tracing::warn!(%listen, "clients will send their secrets here in the clear: set [tls], or listen on loopback");
    }
    ClientAuth::new(config, scheme, listen).map(Arc::new).map_err(StartError::Config)
}

fn visitors(config: &Config) -> Result<StatusAuth, StartError> {
    StatusAuth::new(config.admin_token_file.as_deref()).map_err(StartError::Config)
}

/// Whom containerd is pointed at while this process is ready. None: nobody asked for that.
#[expect(clippy::disallowed_methods, reason = "runs at the start")]
fn keeping(
    config: &Config,
    listen: SocketAddr,
    metrics: &Metrics,
) -> Result<Option<Arc<MirrorReconciler>>, StartError> {
    let Some(hosts_dir) = config.containerd.hosts_dir.clone() else { return Ok(None) };
    if !hosts_dir.is_dir() {
        let problem = "is no directory: it has to be containerd's config_path, which `dray containerd check` tells";
        return Err(StartError::Config(format!("containerd.hosts_dir = \"{}\": {problem}", hosts_dir.display())));
    }
    let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
    let own = || format!("{scheme}://{}", reachable(listen)).parse::<Mirror>();
    let mirror = config.containerd.mirror.clone().map_or_else(own, Ok);
    let mirror = mirror.map_err(|e| StartError::Config(format!("containerd.{e}")))?;
    if let Some(file) = &config.containerd.config_file {
        for finding in diagnosis::of_node(file, &hosts_dir) {
            tracing::warn!(code = finding.code, remedy = finding.remedy.join(" "), "containerd: {}", finding.what);
        }
    }
    let pointed = metrics.containerd_pointed.with_label_values(&[&*hosts_dir.to_string_lossy()]);
    Ok(Some(Arc::new(MirrorReconciler::new(hosts_dir, Mirrors::one(mirror), move |is_so| pointed.set(is_so.into())))))
}

/// What the registry listener shows. None: it speaks plain HTTP.
pub(super) fn identity(tls: &TlsConfig) -> Result<Option<Arc<Identity>>, StartError> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let ca = tls.client_ca.clone().map(|path| ("client_ca", path));
    let files = IdentityFiles { table: "tls", cert: cert.clone(), key: key.clone(), ca, welcome: TrustedRole::Anybody };
    Identity::load(files).map(Some).map_err(StartError::Config)
}
