//! What operators do on all nodes at once: authenticated requests to every other member, also to those that are down.
//!
//! `GET /peers/v1/names?image=`, `POST /peers/v1/purge?image=|digest=|registry=[&digests=]`, `POST /peers/v1/revalidate?image=` and `GET /peers/v1/summary`, each
//! with a JSON response whose digest is signed with its head.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt};
use http::Method;
use reqwest::Response;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Peers, wire};
use crate::oci::Digest;
use crate::source::root_cause;

/// The prefix of the paths.
pub const PEER_OPERATIONS: &str = "/peers/v1/";

/// Requests at the same time. More: a burst of connections in a large cluster. Fewer: all nodes together take longer.
const MAX_CONCURRENT: usize = 64;

/// Longest response, in bytes. A summary of a node has a KiB; the names of an image with thousands of layers have more.
const MAX_RESPONSE_BYTES: usize = 1024 * 1024;

/// What an operation did on one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeResult<T> {
    /// Its address as a peer; null: the node that the operator sent the request to.
    pub node: Option<SocketAddr>,
    /// Null: the node was not reached, or failed.
    pub result: Option<T>,
    pub error: Option<String>,
}

impl<T> NodeResult<T> {
    /// `node`: None: this node.
    pub fn new(node: Option<SocketAddr>, result: Result<T, String>) -> Self {
        let (result, error) = match result {
            Ok(result) => (Some(result), None),
            Err(error) => (None, Some(error)),
        };
        Self { node, result, error }
    }
}

impl Peers {
    /// Sends a request to each other member, and yields the results as they come.
    pub fn request_all<T: DeserializeOwned + Send + 'static>(
        self: &Arc<Self>,
        method: Method,
        path: String,
        time_limit: Duration,
    ) -> impl Stream<Item = NodeResult<T>> + Send + use<T> {
        let members = self.members.load();
        let others: Vec<_> = members.iter().map(|(member, _)| member).filter(|member| *member != members.own).collect();
        let peers = self.clone();
        let requests = stream::iter(others).map(move |peer| {
            let (peers, method, path) = (peers.clone(), method.clone(), path.clone());
            async move {
                let result = timeout(time_limit, peers.request_operation(peer, method, &path)).await;
                NodeResult::new(Some(peer), result.unwrap_or_else(|_| Err("no response in time".to_owned())))
            }
        });
        requests.buffer_unordered(MAX_CONCURRENT)
    }

    async fn request_operation<T: DeserializeOwned>(
        &self,
        peer: SocketAddr,
        method: Method,
        path: &str,
    ) -> Result<T, String> {
        let request = self.client.request(method, format!("{}://{peer}{path}", self.auth.scheme())).build();
        let mut request = request.map_err(|error| root_cause(&error))?;
        let method = request.method().clone();
        let seal = self.auth.sign(peer, &method, path, request.headers_mut());
        let mut response = self.client.execute(request).await.map_err(|error| root_cause(&error.without_url()))?;
        let status = response.status().as_u16();
        if seal.is_some_and(|seal| !seal.verifies(status, response.headers())) {
            return Err(format!("{status}, not signed with a key of peers.key_file"));
        }
        let digest: Option<Digest> = wire::read(response.headers(), &wire::CONTENT_DIGEST);
        let body = read(&mut response).await?;
        match status {
            200 if digest.is_some_and(|digest| digest.matches(&body)) => {
                serde_json::from_slice(&body).map_err(|error| format!("the response is not valid: {error}"))
            }
            200 => Err("the response does not match its signed digest".to_owned()),
            404 | 405 => Err(format!("{status}: its release does not know this request")),
            _ => Err(format!("{status}: {}", String::from_utf8_lossy(&body).trim())),
        }
    }
}

async fn read(response: &mut Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| root_cause(&error.without_url()))? {
        body.extend_from_slice(&piece);
        if body.len() > MAX_RESPONSE_BYTES {
            return Err(format!("a response of more than {MAX_RESPONSE_BYTES} bytes"));
        }
    }
    Ok(body)
}
