//! The API of the cache: what it holds, and its removal.
//!
//! A change is a POST with a JSON body: a page of another site cannot send one, because a browser first asks dray
//! whether it may. The response has a line of JSON for each node, as soon as that node is done: [`NodeResult`].

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use http::Method;
use http::header::CONTENT_TYPE;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use pingora::apps::ReusedHttpStream;
use pingora::protocols::http::ServerSession;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Admin, StatusResponse, begin_stream};
use crate::oci::route::query_value;
use crate::oci::{Digest, ImageName};
use crate::peers::{NodeResult, PEER_OPERATIONS, Peers};
use crate::pull::{CacheOrder, Pull, PurgeTarget, Purged};
use crate::times::{DEFAULT_TTL, STALL_TIMEOUT};

/// `POST /api/v1/cache/purge`: exactly one of `image`, `digest` and `registry`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PurgeRequest {
    image: Option<String>,
    digest: Option<String>,
    registry: Option<String>,
    /// Whether all other nodes do the same.
    #[serde(default)]
    cluster: bool,
}

/// `POST /api/v1/cache/revalidate`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RevalidateRequest {
    image: String,
}

/// The results of an operation, as lines of JSON.
type Lines = BoxStream<'static, String>;

/// Longest body of a request, in bytes: a name has at most a few hundred.
const MAX_BODY_BYTES: usize = 16 * 1024;

/// How long another node may take. Longer: a node that hangs delays the answer. Shorter: a purge of a registry with many
/// blobs counts as not done.
const OPERATION_TIMEOUT: Duration = DEFAULT_TTL;

/// Digests in one request. More: the path exceeds what HTTP servers accept. Fewer: more requests for each node.
const MAX_DIGESTS: usize = 64;

/// Blobs of a list without `limit`, and the most that can be asked for.
const DEFAULT_LISTED: usize = 100;
const MAX_LISTED: usize = 100_000;

impl Admin {
    /// `GET /api/v1/cache?registry=&sort=size|used&limit=`
    pub(super) async fn list_cache(&self, query: Option<&str>) -> StatusResponse {
        let registry = match query_value(query, "registry").map(|registry| registry.parse()).transpose() {
            Ok(registry) => registry,
            Err(_) => return StatusResponse::text(400, "registry is not valid: expected HOST[:PORT]\n"),
        };
        let order = match query_value(query, "sort").as_deref() {
            None | Some("size") => CacheOrder::Size,
            Some("used") => CacheOrder::Used,
            Some(_) => return StatusResponse::text(400, "sort is not valid: expected size or used\n"),
        };
        let limit = match query_value(query, "limit").map(|limit| limit.parse::<usize>()).transpose() {
            Ok(limit) => limit.unwrap_or(DEFAULT_LISTED).min(MAX_LISTED),
            Err(_) => return StatusResponse::text(400, "limit is not valid: expected a number\n"),
        };
        StatusResponse::json(200, &self.sources.pull.cache_admin.list(registry, order, limit).await)
    }

    /// `POST /api/v1/cache/purge` and `revalidate`, from an authorized client.
    pub(super) async fn change_cache(&self, mut session: ServerSession) -> Option<ReusedHttpStream> {
        let result = match body(&mut session).await {
            Ok(body) => self.operation(session.req_header().uri.path(), &body),
            Err(response) => Err(response),
        };
        session.set_keepalive(None);
        match result {
            Ok(lines) => send_lines(session, lines).await,
            Err(response) => {
                session.write_response_header(Box::new(response.head()?)).await.ok()?;
                session.write_response_body(response.body, true).await.ok()?;
                None
            }
        }
    }

    fn operation(&self, path: &str, body: &[u8]) -> Result<Lines, StatusResponse> {
        let malformed = |problem: String| StatusResponse::text(400, problem + "\n");
        let pull = self.sources.pull.clone();
        let peers = || self.sources.pull.peers().filter(|peers| peers.are_authenticated()).cloned();
        if path.ends_with("/revalidate") {
            let request: RevalidateRequest = serde_json::from_slice(body).map_err(|e| malformed(e.to_string()))?;
            let image: ImageName = request.image.parse().map_err(malformed)?;
            let own = async move { NodeResult::new(None, Ok(pull.cache_admin.revalidate(&image).await)) };
            // The owner of the tag resolves it for the others, so its TTL has to end as well.
            return Ok(results(own, peers(), format!("{PEER_OPERATIONS}revalidate?image={}", encoded(&request.image))));
        }
        let request: PurgeRequest = serde_json::from_slice(body).map_err(|e| malformed(e.to_string()))?;
        let given = [("image", request.image), ("digest", request.digest), ("registry", request.registry)];
        let mut given = given.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let (Some((key, value)), None) = (given.next(), given.next()) else {
            return Err(malformed("expected exactly one of image, digest and registry".to_owned()));
        };
        let target = PurgeTarget::parse(key, &value).map_err(malformed)?;
        let others = peers();
        if request.cluster && others.is_none() {
            let problem = "cluster: the other nodes accept this only from authenticated peers: set peers.key_file or \
                           peers.mtls, or purge each node";
            return Err(StatusResponse::text(409, format!("{problem}\n")));
        }
        let path = format!("{PEER_OPERATIONS}purge?{key}={}", encoded(&value));
        match (others.filter(|_| request.cluster), target) {
            // Which layers an image has is known only to nodes that have its manifest.
            (Some(peers), PurgeTarget::Image(image)) => {
                Ok(stream::once(purge_image_everywhere(pull, peers, image, path)).flatten().boxed())
            }
            (others, target) => {
                let own = async move { NodeResult::new(None, pull.cache_admin.purge(target, HashSet::new()).await) };
                Ok(results(own, others, path))
            }
        }
    }
}

/// Purges an image with all digests that any node knows of it.
async fn purge_image_everywhere(pull: Arc<Pull>, peers: Arc<Peers>, image: ImageName, path: String) -> Lines {
    let names = format!("{PEER_OPERATIONS}names?image={}", encoded(&image.to_string()));
    let of_others = peers.request_all(Method::GET, names, OPERATION_TIMEOUT);
    let mut digests = pull.cache_admin.names(&image).await;
    let of_others: Vec<NodeResult<Vec<String>>> = of_others.collect().await;
    let names = of_others.iter().filter_map(|node| node.result.as_ref()).flatten();
    digests.extend(names.filter_map(|digest| digest.parse().ok()));
    let mut purged: BTreeMap<Option<SocketAddr>, NodeResult<Purged>> = BTreeMap::new();
    let digests: Vec<Digest> = digests.into_iter().collect();
    // Also without a digest: a node may know the tag alone.
    for some in digests.chunks(MAX_DIGESTS).chain(digests.is_empty().then_some(&[][..])) {
        let list: Vec<&str> = some.iter().map(Digest::as_str).collect();
        let path = format!("{path}&digests={}", encoded(&list.join("+")));
        let own = pull.cache_admin.purge(PurgeTarget::Image(image.clone()), some.iter().cloned().collect()).await;
        let others = peers.request_all(Method::POST, path, OPERATION_TIMEOUT).collect::<Vec<_>>().await;
        for next in std::iter::once(NodeResult::new(None, own)).chain(others) {
            let sum = match purged.remove(&next.node) {
                Some(NodeResult { result: Some(before), .. }) => {
                    NodeResult { result: next.result.map(|next| before.and(next)), ..next }
                }
                Some(failed) => failed,
                None => next,
            };
            purged.insert(sum.node, sum);
        }
    }
    stream::iter(purged.into_values()).map(|result| line(&result)).boxed()
}

fn line<T: Serialize>(result: &NodeResult<T>) -> String {
    serde_json::to_string(result).unwrap_or_default() + "\n"
}

/// The results of this node and of the others, as they come.
fn results<T>(
    own: impl Future<Output = NodeResult<T>> + Send + 'static,
    peers: Option<Arc<Peers>>,
    path: String,
) -> Lines
where
    T: Serialize + DeserializeOwned + Send + 'static,
{
    let others = match peers {
        Some(peers) => peers.request_all(Method::POST, path, OPERATION_TIMEOUT).boxed(),
        None => stream::empty().boxed(),
    };
    stream::select(stream::once(own), others).map(|result| line(&result)).boxed()
}

fn encoded(value: &str) -> String {
    utf8_percent_encode(value, NON_ALPHANUMERIC).to_string()
}

async fn body(session: &mut ServerSession) -> Result<BytesMut, StatusResponse> {
    let content_type = session.req_header().headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if content_type.is_none_or(|value| !value.starts_with("application/json")) {
        return Err(StatusResponse::text(415, "expected a body of content-type application/json\n"));
    }
    let mut body = BytesMut::new();
    loop {
        match timeout(STALL_TIMEOUT, session.read_request_body()).await {
            Ok(Ok(Some(piece))) if body.len() + piece.len() <= MAX_BODY_BYTES => body.extend_from_slice(&piece),
            Ok(Ok(Some(_))) => return Err(StatusResponse::text(413, "the body exceeds 16 KiB\n")),
            Ok(Ok(None)) => return Ok(body),
            Ok(Err(_)) | Err(_) => return Err(StatusResponse::text(400, "the body is incomplete\n")),
        }
    }
}

async fn send_lines(mut session: ServerSession, mut lines: Lines) -> Option<ReusedHttpStream> {
    begin_stream(&mut session, "application/x-ndjson").await?;
    while let Some(line) = lines.next().await {
        session.write_response_body(line.into(), false).await.ok()?;
    }
    session.write_response_body(Bytes::new(), true).await.ok()?;
    None
}
