//! A name server with the records that a test sets.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::SRV;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// The addresses and services of names.
#[derive(Default)]
struct Records {
    addresses: HashMap<String, Vec<IpAddr>>,
    services: HashMap<String, Vec<(String, u16)>>,
}

/// A running name server.
pub struct Dns {
    pub address: SocketAddr,
    names: Arc<Mutex<Records>>,
    task: JoinHandle<()>,
}

impl Dns {
    pub async fn start(names: &[(&str, &str)]) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = socket.local_addr().expect("a bound address");
        let known: Arc<Mutex<Records>> = Arc::default();
        let task = tokio::spawn(respond(socket, known.clone()));
        let dns = Self { address, names: known, task };
        for (name, ip) in names {
            dns.set(name, &[ip]);
        }
        dns
    }

    /// Replaces the addresses of a name.
    pub fn set(&self, name: &str, ips: &[&str]) {
        let ips = ips.iter().map(|ip| ip.parse().expect("an address")).collect();
        self.names.lock().expect("no panic").addresses.insert(name.to_owned(), ips);
    }

    /// Replaces the SRV records of a name: targets and ports.
    pub fn set_service(&self, name: &str, targets: &[(&str, u16)]) {
        let targets = targets.iter().map(|(target, port)| ((*target).to_owned(), *port)).collect();
        self.names.lock().expect("no panic").services.insert(name.to_owned(), targets);
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn respond(socket: UdpSocket, names: Arc<Mutex<Records>>) {
    let mut buffer = [0; 4096];
    while let Ok((count, client)) = socket.recv_from(&mut buffer).await {
        let Ok(query) = Message::from_vec(&buffer[..count]) else { continue };
        let mut reply = Message::new(query.metadata.id, MessageType::Response, query.metadata.op_code);
        reply.metadata.recursion_available = true;
        for wanted in &query.queries {
            reply.add_query(wanted.clone());
            let name = wanted.name().to_utf8();
            let name = name.trim_end_matches('.');
            let targets = names.lock().expect("no panic").services.get(name).cloned();
            for (target, port) in targets.iter().flatten().filter(|_| wanted.query_type() == RecordType::SRV) {
                let data = RData::SRV(SRV::new(0, 0, *port, Name::from_utf8(target).expect("a name")));
                reply.add_answer(Record::from_rdata(wanted.name().clone(), 1, data));
            }
            if targets.is_some() {
                continue;
            }
            let known = names.lock().expect("no panic").addresses.get(name).cloned();
            match known {
                None => reply.metadata.response_code = ResponseCode::NXDomain,
                Some(ips) => {
                    for ip in ips {
                        let data = match (wanted.query_type(), ip) {
                            (RecordType::A, IpAddr::V4(ip)) => RData::A(ip.into()),
                            (RecordType::AAAA, IpAddr::V6(ip)) => RData::AAAA(ip.into()),
                            _ => continue,
                        };
                        reply.add_answer(Record::from_rdata(wanted.name().clone(), 1, data));
                    }
                }
            }
        }
        if let Ok(bytes) = reply.to_vec() {
            let _ = socket.send_to(&bytes, client).await;
        }
    }
}
