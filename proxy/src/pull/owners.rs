//! Requests to the owners of a digest, one after another: the loop that manifests, tags, lengths and blobs share.

use std::fmt::Display;
use std::net::SocketAddr;

use crate::peers::{OwnerRoute, PeerRequestMode};
use crate::source::SourceError;

/// What to do after an owner's error.
#[derive(Debug, PartialEq, Eq)]
enum AfterOwner {
    TryNextOwner,
    /// The upstream itself has responded: another node would get the same error.
    Fail,
}

/// The errors of owners that were reached.
#[derive(Default)]
struct OwnerErrors {
    upstream_failures: u32,
}

impl OwnerErrors {
    /// After an owner's 5xx of the upstream, one successor tries as well: its network path may differ.
    fn judge(&mut self, error: &SourceError) -> AfterOwner {
        match error {
            SourceError::NotFound(_) | SourceError::Denied(_) => AfterOwner::Fail,
            // A 4xx depends on the request, not on the node that sends it.
            SourceError::Failed(upstream) if (400..500).contains(&upstream.status) => AfterOwner::Fail,
            SourceError::Failed(_) => {
                self.upstream_failures += 1;
                if self.upstream_failures > 1 { AfterOwner::Fail } else { AfterOwner::TryNextOwner }
            }
            _ => AfterOwner::TryNextOwner,
        }
    }
}

/// The first successful response of an owner. None: this node is the owner, or no owner can be reached. After a silent
/// owner its successor is tried, so that not every node goes to the upstream. `object` is for the log.
pub(super) async fn request_from_owners<T, F>(
    lead: OwnerRoute,
    object: impl Display,
    request: impl Fn(SocketAddr, PeerRequestMode) -> F,
) -> Result<Option<T>, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut errors = OwnerErrors::default();
    for owner in lead.owners {
        let error = match request(owner, PeerRequestMode::As(lead.request_role)).await {
            Ok(given) => return Ok(Some(given)),
            Err(SourceError::NotCached) => continue,
            Err(error) => error,
        };
        tracing::info!(peer = %owner, role = "owner", %object, %error, "peer request failed");
        if errors.judge(&error) == AfterOwner::Fail {
            return Err(error);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::role::Role;

    fn request(responses: &[Result<&'static str, SourceError>]) -> (Result<Option<&'static str>, SourceError>, usize) {
        let owners = (0..3).map(|nth| SocketAddr::from(([192, 0, 2, nth], 5052))).collect();
        let lead = OwnerRoute { role: Role::Client, owners, request_role: Role::Global };
        let asked = std::cell::Cell::new(0);
        let given = request_from_owners(lead, "a digest", |owner, mode| {
            let nth = asked.replace(asked.get() + 1);
            assert_eq!((owner.ip().to_string(), mode), (format!("192.0.2.{nth}"), PeerRequestMode::As(Role::Global)));
            std::future::ready(responses[nth].clone())
        });
        (given.now_or_never().expect("nothing waits"), asked.get())
    }

    #[test]
    fn owners_are_tried_until_success_or_an_upstream_error() {
        let down = || Err(SourceError::TimedOut);
        let failed = |status| Err(SourceError::failed(status));
        let cases = [
            (vec![Ok("first")], Ok(Some("first")), 1),
            (vec![down(), Err(SourceError::NotCached), Ok("third")], Ok(Some("third")), 3),
            (vec![down(), down(), Err(SourceError::Busy)], Ok(None), 3),
            (vec![Err(SourceError::not_found())], Err(SourceError::not_found()), 1),
            (vec![down(), Err(SourceError::denied())], Err(SourceError::denied()), 2),
            (vec![failed(413)], failed(413).map(|_: &str| None), 1),
            (vec![failed(500), Ok("second")], Ok(Some("second")), 2),
            (vec![failed(500), failed(503)], failed(503).map(|_: &str| None), 2),
        ];
        for (responses, given, asked) in cases {
            assert_eq!(request(&responses), (given, asked), "{responses:?}");
        }
    }
}
