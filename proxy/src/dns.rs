//! DNS resolvers: the system's name servers or those of `[dns]`.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Resolver, TokioResolver};

/// Uses `servers`, or the system's name servers if there are none. Must run inside a tokio runtime.
pub fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, String> {
    resolver_of(servers, LookupIpStrategy::default())
}

/// A resolver for some address families only.
pub fn resolver_of(servers: &[SocketAddr], families: LookupIpStrategy) -> Result<TokioResolver, String> {
    let mut builder = if servers.is_empty() {
        TokioResolver::builder_tokio().map_err(|e| {
            format!("the system's name servers cannot be read: {e}; add one to /etc/resolv.conf or to servers of [dns]")
        })?
    } else {
        let servers = servers.iter().map(|server| {
            let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
            for connection in &mut connections {
                connection.port = server.port();
            }
            NameServerConfig::new(server.ip(), true, connections)
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        Resolver::builder_with_config(config, TokioRuntimeProvider::default())
    };
    let options = builder.options_mut();
    options.timeout = Duration::from_secs(1);
    options.attempts = 2;
    options.ip_strategy = families;
    // Kubernetes sets ndots to 5, which causes five useless lookups before a name is tried as written.
    options.ndots = 1;
    options.positive_max_ttl = Some(Duration::from_secs(300));
    options.negative_max_ttl = Some(Duration::from_secs(2));
    builder.build().map_err(|e| e.to_string())
}
