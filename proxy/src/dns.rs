//! Names to addresses, by the system's name servers or by those of `[dns]`.

use std::net::SocketAddr;
use std::time::Duration;

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Resolver, TokioResolver};

/// Asks these servers, or the system's if there are none. Must run inside a tokio runtime.
pub fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, String> {
    resolver_of(servers, LookupIpStrategy::default())
}

/// One for some families of addresses.
pub fn resolver_of(servers: &[SocketAddr], families: LookupIpStrategy) -> Result<TokioResolver, String> {
    let mut builder = if servers.is_empty() {
        TokioResolver::builder_tokio().map_err(|e| {
            format!(
                "the system's name servers cannot be read: {e}; name one in /etc/resolv.conf, or in servers of [dns]"
            )
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
    // Clusters ask for five dots before a name is tried as it stands: five lookups for nothing.
    options.ndots = 1;
    options.positive_max_ttl = Some(Duration::from_secs(300));
    options.negative_max_ttl = Some(Duration::from_secs(2));
    builder.build().map_err(|e| e.to_string())
}
