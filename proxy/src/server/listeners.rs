//! The listeners: who is served on which port, how many connections each takes, and with which certificate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use pingora::apps::ServerApp;
use pingora::listeners::tls::TlsSettings;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::prelude::Server;
use pingora::server::configuration::ServerConf;
use pingora::services::listening::Service;
use tokio::sync::Semaphore;

use super::StartError;
use super::components::Components;
use crate::admin::{Admin, MAX_WATCHING};
use crate::connections::Connections;
use crate::identity::Identity;
use crate::proxy::{Listener, RegistryProxy};
use crate::status::StatusSources;

/// Connections of each listener. A node of a cluster of ten thousand may be asked by all others, by several at a time.
const MOST_CLIENTS: usize = 16_384;
const MOST_PEERS: usize = 65_536;
const MOST_OPERATORS: usize = 1024;

/// What Pingora gathers before it writes to a connection, in bytes: the head of a response and most manifests leave in one
/// packet. More: more memory for each connection. What it reads is not gathered: heads are read as a whole.
const BUFFERS: L4BufferSettings = L4BufferSettings { read: Some(0), write: Some(8 * 1024) };

/// A server with all listeners, which does not run yet.
pub(super) fn server(components: &Components) -> Result<Server, StartError> {
    let conf = ServerConf {
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        // Draining is done before pingora hears of the signal.
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    server.add_service(service("registry", for_clients(components)?, components.bound.registry));
    if let Some(address) = components.bound.peers {
        server.add_service(service("peers", for_peers(components)?, address));
    }
    let operators = Connections::new(admin(components), MOST_OPERATORS, components.memory.clone());
    let mut admin = service("admin", operators, components.bound.admin);
    admin.threads = Some(1);
    server.add_service(admin);
    Ok(server)
}

fn for_clients(components: &Components) -> Result<Connections<RegistryProxy>, StartError> {
    let clients = Connections::new(front(components, Listener::Clients), MOST_CLIENTS, components.memory.clone());
    let Some(identity) = &components.identity else { return Ok(clients) };
    let mut settings = tls_settings(identity)?;
    settings.enable_h2();
    Ok(clients.with_tls(settings))
}

fn for_peers(components: &Components) -> Result<Connections<RegistryProxy>, StartError> {
    let peers = Connections::new(front(components, Listener::Peers), MOST_PEERS, components.memory.clone());
    match components.pull.peers().and_then(|peers| peers.identity()) {
        Some(identity) => Ok(peers.with_tls(tls_settings(identity)?)),
        None => Ok(peers),
    }
}

fn front(components: &Components, listener: Listener) -> RegistryProxy {
    let [of_clients, of_peers] = &components.loads;
    RegistryProxy {
        pull: components.pull.clone(),
        registries: components.registries.clone(),
        metrics: components.metrics.clone(),
        access_log: components.access_log.clone(),
        load: if listener == Listener::Clients { of_clients.clone() } else { of_peers.clone() },
        readiness: components.readiness.clone(),
        clients: components.clients.clone(),
        browsers: components.browsers.clone(),
        gate: components.gate.clone(),
        activity: components.activity.clone(),
        tracer: components.tracer.clone(),
        listener,
    }
}

fn admin(components: &Components) -> Admin {
    let sources = StatusSources {
        pull: components.pull.clone(),
        activity: components.activity.clone(),
        metrics: components.metrics.clone(),
        registry: components.bound.registry,
        peers: components.bound.peers,
        started: Instant::now(),
    };
    Admin {
        metrics: components.metrics.clone(),
        readiness: components.readiness.clone(),
        visitors: components.visitors.clone(),
        sources,
        watching: Arc::new(Semaphore::new(MAX_WATCHING)),
    }
}

fn service<A>(name: &str, connections: Connections<A>, listen: SocketAddr) -> Service<Connections<A>>
where
    Connections<A>: ServerApp + Send + Sync + 'static,
{
    let mut service = Service::new(name.to_owned(), connections);
    service.add_listener(ListenerConfig::tcp(listen.to_string()).l4_buffer(BUFFERS));
    service
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
