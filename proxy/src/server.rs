//! Composition: opens the store, starts the listeners, says so, and drains before it stops.

use std::io::IsTerminal;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::apps::ServerApp;
use pingora::listeners::tls::TlsSettings;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::prelude::Server;
use pingora::server::configuration::ServerConf;
use pingora::server::{RunArgs, ShutdownSignal, ShutdownSignalWatch};
use pingora::services::listening::Service;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;

use crate::access_log::AccessLog;
use crate::activity::Activity;
use crate::admin::{Admin, MAX_WATCHING, Visitors};
use crate::config::{Config, Mirror, Share, Tls};
use crate::connections::Connections;
use crate::containerd::diagnosis;
use crate::containerd::hosts_toml::Mirrors;
use crate::containerd::keeping::Keeping;
use crate::identity::{Files, Identity, Welcome};
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::peers::{Peers, RELOAD};
use crate::prefetch;
use crate::proxy::{Browsers, Clients, Front, Gate, Listener, Load};
use crate::pull::Pull;
use crate::readiness::Readiness;
use crate::registries::Registries;
use crate::status::Sources;
use crate::store::{HOUSEKEEPING, Store};
use crate::telemetry;

/// Requests under way get this long after the stop signal.
const DRAIN: Duration = Duration::from_secs(25);

/// After the stop signal the listeners stay open this long, until nobody is sent here any more.
const LINGER: Duration = Duration::from_secs(1);

/// Connections of each listener. A node of a cluster of ten thousand may be asked by all others, by several at a time.
const MOST_CLIENTS: usize = 16_384;
const MOST_PEERS: usize = 65_536;
const MOST_OPERATORS: usize = 1024;

/// What Pingora gathers before it writes to a connection, in bytes: the head of a response and most manifests leave in one
/// packet. More: more memory for each connection. What it reads is not gathered: heads are read as a whole.
const BUFFERS: L4BufferSettings = L4BufferSettings { read: Some(0), write: Some(8 * 1024) };

/// A new process waits this long to hear who its peers are before it is ready.
const MEMBERSHIP: Duration = Duration::from_secs(5);

/// Where a started dray listens.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    pub registry: SocketAddr,
    pub admin: SocketAddr,
    pub peers: Option<SocketAddr>,
}

/// Why dray does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is understood but cannot work here.
    #[error("{0}")]
    Config(String),
    #[error("{0}")]
    Failed(String),
}

/// Runs until a signal stops it. `started` is called once every listener accepts.
pub fn run(
    mut config: Config,
    access_log: AccessLog,
    started: impl FnOnce(Bound) + Send + 'static,
) -> Result<(), StartError> {
    let access_log = Arc::new(access_log);
    raise_descriptor_limit();
    let identity = identity(&config.tls).map_err(StartError::Config)?;
    let ports = Ports::reserve(&mut config)?;
    let bound = ports.bound;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("dray")
        .enable_all()
        .build()
        .map_err(|e| StartError::Failed(format!("no threads: {e}")))?;
    // From here on a signal ends the process in order, however far it has come.
    let signals = runtime.block_on(async { Signals::watch() }).map_err(|e| StartError::Failed(e.to_string()))?;
    if !std::io::stderr().is_terminal() {
        runtime.spawn(ignore_hangups());
    }
    let metrics = Arc::new(Metrics::new());
    metrics.config.with_label_values(&[&config.hash()]).set(1);
    let registries = Arc::new(Registries::new(&config));
    let memory = Arc::new(Memory::of_process());
    let (pull, store) = runtime.block_on(compose(&config, &registries, &memory, &metrics))?;
    warn_of_strangers(&config);

    // Peers, or whoever finds their port, take no room from this node's own clients.
    let [of_clients, of_peers] = [(); 2].map(|()| Arc::new(Load::new(memory.clone())));
    let readiness = Arc::new(Readiness::default());
    let clients = Arc::new(Clients::new(&config.access));
    let gate = gate(&config, bound.registry, &registries)?;
    let activity = Arc::new(Activity::default());
    let tracer = runtime.block_on(async { telemetry::tracer(&config.tracing) }).map_err(StartError::Config)?;
    let tracer = Arc::new(tracer);
    let visitors = Arc::new(Visitors::new(config.admin_token_file.as_deref()).map_err(StartError::Config)?);
    let browsers = Arc::new(Browsers::new(&config));
    let front = |listener| Front {
        pull: pull.clone(),
        registries: registries.clone(),
        metrics: metrics.clone(),
        access_log: access_log.clone(),
        load: if listener == Listener::Clients { of_clients.clone() } else { of_peers.clone() },
        readiness: readiness.clone(),
        clients: clients.clone(),
        browsers: browsers.clone(),
        gate: gate.clone(),
        activity: activity.clone(),
        tracer: tracer.clone(),
        listener,
    };
    let conf = ServerConf {
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        // Draining is done before pingora hears of the signal.
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut clients = Connections::new(front(Listener::Clients), MOST_CLIENTS, memory.clone());
    if let Some(identity) = &identity {
        let mut settings = tls_settings(identity)?;
        settings.enable_h2();
        clients = clients.with_tls(settings);
    }
    server.add_service(service("registry", clients, bound.registry));
    if let Some(address) = bound.peers {
        let mut peers = Connections::new(front(Listener::Peers), MOST_PEERS, memory.clone());
        if let Some(identity) = pull.peers().and_then(|peers| peers.identity()) {
            peers = peers.with_tls(tls_settings(identity)?);
        }
        server.add_service(service("peers", peers, address));
    }
    let sources = Sources {
        pull: pull.clone(),
        activity,
        metrics: metrics.clone(),
        registry: bound.registry,
        peers: bound.peers,
        started: Instant::now(),
    };
    let admin = Admin {
        metrics: metrics.clone(),
        readiness: readiness.clone(),
        visitors: visitors.clone(),
        sources,
        watching: Arc::new(Semaphore::new(MAX_WATCHING)),
    };
    let mut admin = service("admin", Connections::new(admin, MOST_OPERATORS, memory), bound.admin);
    admin.threads = Some(1);
    server.add_service(admin);

    let keeping = keeping(&config, bound.registry, &metrics)?;
    runtime.spawn({
        let (readiness, knowing, keeping) = (readiness.clone(), pull.clone(), keeping.clone());
        async move {
            if !tokio::task::spawn_blocking(move || ports.wait_until_open()).await.unwrap_or(false) {
                tracing::error!("the listeners did not open");
                return;
            }
            // Whoever does not know its peers yet would fetch everything itself.
            if timeout(MEMBERSHIP, knowing.peers_known()).await.is_err() {
                tracing::warn!("the peers are not known yet: starting alone");
            }
            readiness.begin();
            started(bound);
            if let Some(keeping) = keeping {
                keeping.keep().await;
            }
        }
    });
    let following = pull.clone();
    runtime.spawn(async move { following.follow_peers().await });
    runtime.spawn(keep_secrets(identity, pull.clone(), gate, visitors));
    let scrubbing = pull.clone();
    runtime.spawn(async move { scrubbing.scrub(config.cache.scrub.0).await });
    for prefetch in config.prefetch.clone() {
        runtime.spawn(prefetch::keep_warm(pull.clone(), prefetch));
    }
    if !config.pin.is_empty() {
        runtime.spawn(prefetch::keep_pinned(pull.clone(), config.pin.clone()));
    }
    runtime.spawn(keep_house(store.clone(), config.cache.keep_free));
    let loads = [of_clients, of_peers];
    let stop = Stop { signals: Mutex::new(signals), readiness, loads, keeping: keeping.clone() };
    server.run(RunArgs { shutdown_signal: Box::new(stop) });
    if let Some(keeping) = keeping {
        keeping.withdraw();
    }
    tracer.close();
    close(runtime, &store);
    Ok(())
}

/// Reads and makes all that [`run`] would refuse to start without, except for the cache and the ports.
pub fn check(config: &Config) -> Result<(), StartError> {
    let (metrics, registries) = (Arc::new(Metrics::new()), Registries::new(config));
    identity(&config.tls).map_err(StartError::Config)?;
    Origin::new(config, &registries, Arc::new(Memory::new(0)), metrics.clone()).map_err(StartError::Config)?;
    Peers::new(config, metrics.clone()).map_err(StartError::Config)?;
    gate(config, config.listen, &registries)?;
    telemetry::tracer(&config.tracing).map_err(StartError::Config)?;
    Visitors::new(config.admin_token_file.as_deref()).map_err(StartError::Config)?;
    keeping(config, config.listen, &metrics)?;
    Ok(())
}

fn service<A>(name: &str, connections: Connections<A>, listen: SocketAddr) -> Service<Connections<A>>
where
    Connections<A>: ServerApp + Send + Sync + 'static,
{
    let mut service = Service::new(name.to_owned(), connections);
    service.add_listener(ListenerConfig::tcp(listen.to_string()).l4_buffer(BUFFERS));
    service
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
fn gate(config: &Config, listen: SocketAddr, registries: &Registries) -> Result<Arc<Gate>, StartError> {
    let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
    let are_asked = registries.ask_who() || config.access.logins_file.is_some();
    if are_asked && scheme == "http" && !listen.ip().is_loopback() {
        tracing::warn!(%listen, "clients will send their secrets here in the clear: set [tls], or listen on loopback");
    }
    Gate::new(config, scheme, listen).map(Arc::new).map_err(StartError::Config)
}

/// Whom containerd is pointed at while this process is ready. None: nobody asked for that.
#[expect(clippy::disallowed_methods, reason = "runs at the start")]
fn keeping(config: &Config, listen: SocketAddr, metrics: &Metrics) -> Result<Option<Arc<Keeping>>, StartError> {
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
    Ok(Some(Arc::new(Keeping::new(hosts_dir, Mirrors::one(mirror), move |is_so| pointed.set(is_so.into())))))
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
    let origin = Origin::new(config, registries, memory.clone(), metrics.clone()).map_err(StartError::Config)?;
    let peers = Peers::new(config, metrics.clone()).map_err(StartError::Config)?;
    Ok((Arc::new(Pull::new(registries.clone(), store.clone(), origin, peers, memory.clone(), metrics.clone())), store))
}

/// Looks after the disk for as long as the process lives.
async fn keep_house(store: Arc<Store>, keep_free: Share) {
    let records = store.clone();
    tokio::task::spawn_blocking(move || records.records.thin_out());
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let large = store.large.clone();
        let _ = tokio::task::spawn_blocking(move || large.keep_house(keep_free)).await;
        store.measure();
    }
}

/// Reads certificates and keys again, which others replace, for as long as the process lives.
async fn keep_secrets(identity: Option<Arc<Identity>>, pull: Arc<Pull>, gate: Arc<Gate>, visitors: Arc<Visitors>) {
    let mut known = [const { None }; 5];
    loop {
        tokio::time::sleep(RELOAD).await;
        let (identity, pull, gate, visitors) = (identity.clone(), pull.clone(), gate.clone(), visitors.clone());
        let reloaded = tokio::task::spawn_blocking(move || {
            let own = identity.and_then(|identity| identity.reload().err());
            let [upstreams, peers] = pull.reload().map(Result::err);
            [own, upstreams, peers, gate.reload().err(), visitors.reload().err()]
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

fn close(runtime: Runtime, store: &Store) {
    runtime.block_on(store.close());
    // A fill may still be waiting for its origin.
    runtime.shutdown_timeout(Duration::from_millis(100));
}

/// Sockets that hold the ports until pingora listens on them: bound, but not listening, so that
/// the number behind port 0 is known and a taken port is an error before anything starts.
struct Ports {
    bound: Bound,
    held: Vec<std::os::fd::OwnedFd>,
}

impl Ports {
    fn reserve(config: &mut Config) -> Result<Self, StartError> {
        let mut held = Vec::new();
        let mut hold = |key: &str, address: SocketAddr| {
            let (socket, bound) = hold_port(address).map_err(|e| {
                StartError::Failed(format!("{key} = \"{address}\": {e}; choose another address or port"))
            })?;
            held.push(socket);
            Ok(bound)
        };
        let bound = Bound {
            registry: hold("listen", config.listen)?,
            admin: hold("admin", config.admin)?,
            peers: config.peers.listen.map(|address| hold("peers.listen", address)).transpose()?,
        };
        config.listen = bound.registry;
        config.peers.listen = bound.peers;
        Ok(Self { bound, held })
    }

    /// Waits for pingora, which retries for 30 s itself.
    fn wait_until_open(self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(35);
        let open = [Some(self.bound.registry), Some(self.bound.admin), self.bound.peers]
            .into_iter()
            .flatten()
            .all(|address| opens(reachable(address), deadline));
        drop(self.held);
        open
    }
}

fn hold_port(address: SocketAddr) -> Result<(std::os::fd::OwnedFd, SocketAddr), std::io::Error> {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    let bound = SocketAddr::try_from(getsockname(&socket)?)?;
    Ok((socket, bound))
}

/// Where a listener can be reached from this host.
pub fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => SocketAddr::from(([127, 0, 0, 1], v4.port())),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, v6.port())),
        other => other,
    }
}

#[expect(clippy::disallowed_methods, reason = "runs on a thread for blocking work")]
fn opens(address: SocketAddr, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn watch() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }
}

/// Who sends one wants the configuration to be read again. Where there is a terminal it means that this is gone.
async fn ignore_hangups() {
    let Ok(mut hangups) = signal(SignalKind::hangup()) else { return };
    while hangups.recv().await.is_some() {
        tracing::warn!("SIGHUP is ignored: the configuration is read at the start only, restart after a change");
    }
}

/// SIGTERM: stop being ready, let requests end, then stop. SIGINT: stop.
struct Stop {
    signals: Mutex<Signals>,
    readiness: Arc<Readiness>,
    loads: [Arc<Load>; 2],
    keeping: Option<Arc<Keeping>>,
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

/// What the registry listener shows. None: it speaks plain HTTP.
fn identity(tls: &Tls) -> Result<Option<Arc<Identity>>, String> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let ca = tls.client_ca.clone().map(|path| ("client_ca", path));
    let files = Files { table: "tls", cert: cert.clone(), key: key.clone(), ca, welcome: Welcome::Anybody };
    Identity::load(files).map(Some)
}

/// A listener that shows an identity, and holds others against its authority.
fn tls_settings(identity: &Arc<Identity>) -> Result<TlsSettings, StartError> {
    let mut settings = TlsSettings::intermediate("", "").map_err(|e| StartError::Failed(e.to_string()))?;
    settings.set_cert_resolver(identity.clone());
    if identity.wants_certificates() {
        settings.set_client_cert_verifier(identity.verifier());
    }
    Ok(settings)
}

/// Blobs, clients and origins all take descriptors; the usual soft limit of 1,024 is soon reached.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the descriptor limit stays as it is");
    }
}
