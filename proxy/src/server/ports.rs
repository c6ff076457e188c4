//! The ports: bound before anything starts, handed to Pingora, and probed until they accept.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::StartError;
use crate::config::Config;

/// The addresses on which this process listens.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    pub registry: SocketAddr,
    pub admin: SocketAddr,
    pub peers: Option<SocketAddr>,
}

/// Sockets that reserve the ports until Pingora listens on them. They are bound but do not listen: port 0 gets its
/// number, and a port in use is an error before anything starts.
pub(super) struct Ports {
    pub(super) bound: Bound,
    held: Vec<std::os::fd::OwnedFd>,
}

impl Ports {
    pub(super) fn reserve(config: &mut Config) -> Result<Self, StartError> {
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

    /// Waits until all listeners accept. Pingora itself retries for 30 s.
    pub(super) fn wait_until_open(self) -> bool {
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

/// An address by which this host can reach a listener.
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
