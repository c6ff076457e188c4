//! The listeners: their handlers, connection limits and certificates.

use std::net::SocketAddr;
use std::sync::Arc;

use pingora::apps::ServerApp;
use pingora::listeners::tls::TlsSettings;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::prelude::Server;
use pingora::server::configuration::ServerConf;
use pingora::services::listening::Service;
use tokio::sync::Semaphore;

use super::StartError;
use super::components::Components;
use crate::admin::{Admin, MAX_EVENT_STREAMS, MAX_INQUIRIES};
use crate::connections::Connections;
use crate::identity::Identity;
use crate::proxy::{Listener, RegistryProxy};
use crate::status::StatusSources;

/// Connections of each listener. A further one takes the place of an idle one, or is closed. In a cluster of ten
/// thousand nodes, each may open several connections to one peer.
const MAX_CLIENT_CONNECTIONS: usize = 16_384;
const MAX_PEER_CONNECTIONS: usize = 65_536;
const MAX_ADMIN_CONNECTIONS: usize = 1024;

/// Pingora's buffers of a connection, in bytes. Write: a head and most manifests leave in one packet; larger: more
/// memory for each connection. Read: not needed, since [`Connections`] reads a head as a whole.
const BUFFERS: L4BufferSettings = L4BufferSettings { read: Some(0), write: Some(8 * 1024) };

/// Creates a server with all listeners, without running it.
pub(super) fn server(components: &Components) -> Result<Server, StartError> {
    let conf = ServerConf {
        threads: std::thread::available_parallelism().map_or(2, usize::from),
        // `Stop` has drained before Pingora receives the signal.
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
    let operators = Connections::new(admin(components), MAX_ADMIN_CONNECTIONS, components.memory.clone());
    let mut admin = service("admin", operators, components.bound.admin);
    admin.threads = Some(1);
    server.add_service(admin);
    Ok(server)
}

fn for_clients(components: &Components) -> Result<Connections<RegistryProxy>, StartError> {
    let clients = Connections::new(
        registry_proxy(components, Listener::Clients),
        MAX_CLIENT_CONNECTIONS,
        components.memory.clone(),
    );
    let Some(identity) = &components.identity else { return Ok(clients) };
    let mut settings = tls_settings(identity)?;
    settings.enable_h2();
    Ok(clients.with_tls(settings))
}

fn for_peers(components: &Components) -> Result<Connections<RegistryProxy>, StartError> {
    let peers =
        Connections::new(registry_proxy(components, Listener::Peers), MAX_PEER_CONNECTIONS, components.memory.clone())
            .for_peers();
    match components.pull.peers().and_then(|peers| peers.identity()) {
        Some(identity) => Ok(peers.with_tls(tls_settings(identity)?)),
        None => Ok(peers),
    }
}

/// What the status page and the peers' summaries are collected from.
fn status_sources(components: &Components) -> StatusSources {
    StatusSources {
        pull: components.pull.clone(),
        activity: components.activity.clone(),
        metrics: components.metrics.clone(),
        config: components.config.clone(),
        registry: components.bound.registry,
        peers: components.bound.peers,
        started: components.started,
    }
}

fn registry_proxy(components: &Components, listener: Listener) -> RegistryProxy {
    let [of_clients, of_peers] = &components.loads;
    RegistryProxy {
        pull: components.pull.clone(),
        policy: components.policy.clone(),
        metrics: components.metrics.clone(),
        access_log: components.access_log.clone(),
        load: if listener == Listener::Clients { of_clients.clone() } else { of_peers.clone() },
        readiness: components.readiness.clone(),
        peer_upload: components.peer_upload.clone(),
        status: Arc::new(status_sources(components)),
        clients: components.clients.clone(),
        browsers: components.browsers.clone(),
        client_auth: components.client_auth.clone(),
        activity: components.activity.clone(),
        tracer: components.tracer.clone(),
        listener,
    }
}

fn admin(components: &Components) -> Admin {
    Admin {
        metrics: components.metrics.clone(),
        readiness: components.readiness.clone(),
        status_auth: components.status_auth.clone(),
        sources: status_sources(components),
        event_streams: Arc::new(Semaphore::new(MAX_EVENT_STREAMS)),
        inquiries: Arc::new(Semaphore::new(MAX_INQUIRIES)),
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

/// TLS with this identity. If it has a CA, clients need a certificate of it.
fn tls_settings(identity: &Arc<Identity>) -> Result<TlsSettings, StartError> {
    let mut settings = TlsSettings::intermediate("", "").map_err(|e| StartError::Failed(e.to_string()))?;
    settings.set_cert_resolver(identity.clone());
    if identity.requires_client_certificates() {
        settings.set_client_cert_verifier(identity.verifier());
    }
    Ok(settings)
}
