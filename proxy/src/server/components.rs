//! The components that the listeners and background tasks of a process share.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::runtime::Runtime;

use super::StartError;
use super::ports::{Bound, reachable};
use crate::access_log::AccessLog;
use crate::activity::Activity;
use crate::admin::StatusAuth;
use crate::bandwidth::RateLimiter;
use crate::config::{ByteRate, Config, Mirror, TlsConfig};
use crate::containerd::diagnosis;
use crate::containerd::hosts_toml::Mirrors;
use crate::containerd::reconciler::MirrorReconciler;
use crate::identity::{Identity, IdentityFiles, TrustedRole};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::proxy::{Browsers, ClientAuth, ClientPolicy, Clients, Load};
use crate::pull::Pull;
use crate::readiness::Readiness;
use crate::registries::Registries;
use crate::store::Store;
use crate::telemetry::{self, Log};
use crate::trace::Tracer;
use crate::upstream::UpstreamClient;

pub(super) struct Components {
    /// The running configuration: a reload replaces it.
    pub(super) config: Arc<ArcSwap<Config>>,
    pub(super) bound: Bound,
    pub(super) started: Instant,
    /// Certificate of the registry listener. None: plain HTTP.
    pub(super) identity: Option<Arc<Identity>>,
    pub(super) access_log: Arc<AccessLog>,
    pub(super) log: Arc<Log>,
    pub(super) metrics: Arc<Metrics>,
    /// What clients may do by the running configuration: a reload replaces it.
    pub(super) policy: Arc<ArcSwap<ClientPolicy>>,
    pub(super) memory: Arc<Memory>,
    /// The limit of what this process sends to peers.
    pub(super) peer_upload: Arc<RateLimiter>,
    pub(super) pull: Arc<Pull>,
    pub(super) store: Arc<Store>,
    /// Separate for clients and peers: load on the peer port takes nothing from this node's own clients.
    pub(super) loads: [Arc<Load>; 2],
    pub(super) readiness: Arc<Readiness>,
    pub(super) clients: Arc<Clients>,
    pub(super) browsers: Arc<Browsers>,
    pub(super) client_auth: Arc<ClientAuth>,
    pub(super) activity: Arc<Activity>,
    pub(super) tracer: Arc<Tracer>,
    pub(super) status_auth: Arc<StatusAuth>,
    pub(super) reconciler: Option<Arc<MirrorReconciler>>,
}

impl Components {
    /// Opens the cache and creates the components. The ports are already bound.
    pub(super) fn new(
        config: Config,
        bound: Bound,
        identity: Option<Arc<Identity>>,
        access_log: AccessLog,
        log: Arc<Log>,
        runtime: &Runtime,
    ) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new());
        metrics.config.with_label_values(&[&config.hash()]).set(1);
        let registries = Arc::new(Registries::new(&config));
        let memory = Arc::new(Memory::of_process());
        let (pull, store) = runtime.block_on(compose(&config, &registries, &memory, &metrics))?;
        warn_of_unauthenticated_peers(&config);
        let client_auth = client_auth(&config, bound.registry, &registries)?;
        let logins = client_auth.load_logins(&config.access).map_err(StartError::Config)?;
        let tracer = runtime.block_on(async { telemetry::tracer(&config.tracing) }).map_err(StartError::Config)?;
        Ok(Self {
            bound,
            started: Instant::now(),
            identity,
            access_log: Arc::new(access_log),
            log,
            loads: [(); 2].map(|()| Arc::new(Load::new(memory.clone()))),
            readiness: Arc::default(),
            policy: Arc::new(ArcSwap::from_pointee(ClientPolicy::new(&config, registries.rules(), logins))),
            clients: Arc::default(),
            peer_upload: Arc::new(RateLimiter::new(config.limits.peer_upload.map(ByteRate::bytes_per_second))),
            browsers: Arc::new(Browsers::new(&config)),
            client_auth,
            activity: Arc::default(),
            tracer: Arc::new(tracer),
            status_auth: Arc::new(status_auth(&config)?),
            reconciler: reconciler(&config, bound.registry, &metrics)?,
            pull,
            store,
            memory,
            metrics,
            config: Arc::new(ArcSwap::from_pointee(config)),
        })
    }
}

/// Creates everything that could keep [`run`](super::run) from starting, except for the cache and the ports.
pub fn check(config: &Config) -> Result<(), StartError> {
    let (metrics, registries) = (Arc::new(Metrics::new()), Arc::new(Registries::new(config)));
    identity(&config.tls)?;
    UpstreamClient::new(config, &registries, Arc::new(Memory::new(0)), metrics.clone()).map_err(StartError::Config)?;
    Peers::new(config, metrics.clone()).map_err(StartError::Config)?;
    client_auth(config, config.listen, &registries)?.load_logins(&config.access).map_err(StartError::Config)?;
    telemetry::tracer(&config.tracing).map_err(StartError::Config)?;
    status_auth(config)?;
    reconciler(config, config.listen, &metrics)?;
    Ok(())
}

/// The same for a reload: only what differs from the start. Its rules, logins and sessions are checked by creating them.
pub(super) fn check_changed(started: &Config, next: &Config) -> Result<(), StartError> {
    let metrics = Arc::new(Metrics::new());
    if next.tls != started.tls || next.dns != started.dns {
        identity(&next.tls)?;
        let registries = Arc::new(Registries::new(next));
        UpstreamClient::new(next, &registries, Arc::new(Memory::new(0)), metrics.clone())
            .map_err(StartError::Config)?;
    }
    if next.peers != started.peers {
        Peers::new(next, metrics.clone()).map_err(StartError::Config)?;
    }
    if next.access.token_key_file != started.access.token_key_file {
        client_auth(next, next.listen, &Registries::new(next))?;
    }
    if next.tracing != started.tracing {
        telemetry::tracer(&next.tracing).map_err(StartError::Config)?;
    }
    if next.admin_token_file != started.admin_token_file {
        status_auth(next)?;
    }
    if next.containerd != started.containerd {
        reconciler(next, next.listen, &metrics)?;
    }
    Ok(())
}

async fn compose(
    config: &Config,
    registries: &Arc<Registries>,
    memory: &Arc<Memory>,
    metrics: &Arc<Metrics>,
) -> Result<(Arc<Pull>, Arc<Store>), StartError> {
    let cache = &config.cache;
    let store = Store::open(&cache.dir, cache.disk, cache.min_free, cache.memory.0, metrics)
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

/// Warns of what unauthenticated peers cannot share, and which limits their port bypasses.
fn warn_of_unauthenticated_peers(config: &Config) {
    if config.peers.listen.is_none() || config.peers.are_authenticated() {
        return;
    }
    tracing::warn!("peers without key_file or mtls: tags and images that need credentials are not shared");
    let (access, tls) = (&config.access, &config.tls);
    if !access.allowed_cidrs.is_empty() || access.users_file.is_some() || tls.client_ca.is_some() {
        tracing::warn!(
            "access.allowed_cidrs, access.users_file and tls.client_ca guard the registry port only: without \
             peers.key_file or peers.mtls, every client that reaches the peer port can pull public images"
        );
    }
}

/// Also warns if clients would send credentials unencrypted.
fn client_auth(config: &Config, listen: SocketAddr, registries: &Registries) -> Result<Arc<ClientAuth>, StartError> {
    let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
    let must_authenticate = registries.any_passthrough() || config.access.users_file.is_some();
    if must_authenticate && scheme == "http" && !listen.ip().is_loopback() {
        tracing::warn!(%listen, "clients send credentials unencrypted: set [tls], or listen on loopback");
    }
    ClientAuth::new(config, scheme, listen).map(Arc::new).map_err(StartError::Config)
}

fn status_auth(config: &Config) -> Result<StatusAuth, StartError> {
    StatusAuth::new(config.admin_token_file.as_deref()).map_err(StartError::Config)
}

/// Maintains containerd's mirror configuration while this process is ready. None: not configured.
#[expect(clippy::disallowed_methods, reason = "runs at the start")]
fn reconciler(
    config: &Config,
    listen: SocketAddr,
    metrics: &Metrics,
) -> Result<Option<Arc<MirrorReconciler>>, StartError> {
    let Some(hosts_dir) = config.containerd.hosts_dir.clone() else { return Ok(None) };
    if !hosts_dir.is_dir() {
        let problem = "is not a directory: use containerd's config_path, which `dray containerd check` prints";
        return Err(StartError::Config(format!("containerd.hosts_dir = \"{}\": {problem}", hosts_dir.display())));
    }
    let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
    let own = || format!("{scheme}://{}", reachable(listen)).parse::<Mirror>();
    let mirror = config.containerd.mirror.clone().map_or_else(own, Ok);
    let mirror = mirror.map_err(|e| StartError::Config(format!("containerd.{e}")))?;
    if let Some(file) = &config.containerd.config_file {
        for finding in diagnosis::of_node(file, &hosts_dir) {
            tracing::warn!(
                code = finding.code,
                error = finding.what,
                remedy = finding.remedy.join(" "),
                "containerd misconfigured"
            );
        }
    }
    let is_configured = metrics.containerd_mirror_configured.with_label_values(&[&*hosts_dir.to_string_lossy()]);
    Ok(Some(Arc::new(MirrorReconciler::new(hosts_dir, Mirrors::one(mirror), move |is_so| {
        is_configured.set(is_so.into());
    }))))
}

/// Certificate of the registry listener. None: plain HTTP.
pub(super) fn identity(tls: &TlsConfig) -> Result<Option<Arc<Identity>>, StartError> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let ca = tls.client_ca.clone().map(|path| ("client_ca", path));
    let files =
        IdentityFiles { table: "tls", cert: cert.clone(), key: key.clone(), ca, welcome: TrustedRole::AnyCertificate };
    Identity::load(files).map(Some).map_err(StartError::Config)
}
