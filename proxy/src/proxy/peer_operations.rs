//! Operations that operators start on another node: purge, revalidation, and the summary of this node.

use std::collections::HashSet;

use http::Method;
use pingora::protocols::http::ServerSession as Session;

use super::RegistryProxy;
use super::exchange::Exchange;
use crate::oci::route::query_value;
use crate::oci::{Digest, ImageName};
use crate::peers::PEER_OPERATIONS;
use crate::pull::{PullError, PurgeTarget};
use crate::respond::PreparedResponse;

impl RegistryProxy {
    /// Serves a path below [`PEER_OPERATIONS`], to authenticated peers only.
    pub(super) async fn peer_operation(&self, session: &Session, exchange: &mut Exchange) -> PreparedResponse {
        let peer_request = match self.peer_request(session) {
            Ok(Some(peer_request)) => peer_request,
            Ok(None) => return PreparedResponse::refusal(&PullError::NotCached),
            Err(unauthenticated) => return PreparedResponse::unauthenticated(unauthenticated),
        };
        if !peer_request.is_authenticated() {
            let message = "only authenticated peers may do this: set peers.key_file or peers.mtls";
            return PreparedResponse::refusal(&PullError::Denied(message.into()));
        }
        exchange.seal = peer_request.seal.clone();
        let request = session.req_header();
        let operation = request.uri.path().strip_prefix(PEER_OPERATIONS).unwrap_or_default();
        match (&request.method, operation) {
            (&Method::POST, "purge") => match target(request.uri.query()) {
                Ok((target, more)) => match self.pull.cache_admin.purge(target, more).await {
                    Ok(purged) => PreparedResponse::operation(&purged),
                    Err(problem) => PreparedResponse::refusal(&PullError::Unavailable(problem)),
                },
                Err(problem) => PreparedResponse::malformed_operation(&problem),
            },
            (&Method::GET, "names") => match image(request.uri.query()) {
                Ok(image) => {
                    let names = self.pull.cache_admin.names(&image).await;
                    PreparedResponse::operation(&names.iter().map(Digest::as_str).collect::<Vec<_>>())
                }
                Err(problem) => PreparedResponse::malformed_operation(&problem),
            },
            (&Method::POST, "revalidate") => match image(request.uri.query()) {
                Ok(image) => PreparedResponse::operation(&self.pull.cache_admin.revalidate(&image).await),
                Err(problem) => PreparedResponse::malformed_operation(&problem),
            },
            (&Method::GET, "summary") => PreparedResponse::operation(&self.status.summary()),
            _ => PreparedResponse::unknown_operation(),
        }
    }
}

/// What to purge, and further digests of an image, which other nodes know.
fn target(query: Option<&str>) -> Result<(PurgeTarget, HashSet<Digest>), String> {
    let given = ["image", "digest", "registry"].into_iter().find_map(|key| Some((key, query_value(query, key)?)));
    let (key, value) = given.ok_or("expected ?image=, ?digest= or ?registry=")?;
    let more = query_value(query, "digests").unwrap_or_default();
    let more = more.split('+').filter(|digest| !digest.is_empty()).map(str::parse).collect::<Result<_, _>>();
    Ok((PurgeTarget::parse(key, &value)?, more.map_err(|_| "digests has one that is not valid")?))
}

fn image(query: Option<&str>) -> Result<ImageName, String> {
    query_value(query, "image").ok_or("expected ?image=")?.parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operation_names_one_target() {
        assert!(matches!(target(Some("registry=ghcr.io")), Ok((PurgeTarget::Registry(_), _))));
        assert!(matches!(target(Some("image=ghcr.io%2Fa%2Fb%3A1")), Ok((PurgeTarget::Image(_), _))));
        let digest = Digest::of(b"x");
        let (_, more) = target(Some(&format!("image=a&digests={digest}%2B{digest}"))).unwrap();
        assert_eq!(more, HashSet::from([digest]));
        for query in [None, Some(""), Some("image=a&digests=x"), Some("registry=a/b"), Some("digest=x"), Some("all=1")]
        {
            assert!(target(query).is_err(), "{query:?}");
        }
        assert!(image(Some("image=alpine")).is_ok() && image(Some("image=")).is_err());
    }
}
