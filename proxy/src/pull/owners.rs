//! The owners of a digest, asked one after another: the loop that manifests, tags, lengths and blobs share.

use std::fmt::Display;
use std::net::SocketAddr;

use crate::peers::{OwnerRoute, PeerRequestMode};
use crate::source::SourceError;

/// What an owner's error means for the others.
#[derive(Debug, PartialEq, Eq)]
enum AfterOwner {
    AskNextOwner,
    /// It is the upstream's word, which no other node needs to hear again.
    Fail,
}

/// What owners that could be reached responded.
#[derive(Default)]
struct OwnerErrors {
    upstream_failures: u32,
}

impl OwnerErrors {
    /// What an owner has requested in vain one successor may try as well, since its way to the upstream is another one.
    fn judge(&mut self, error: &SourceError) -> AfterOwner {
        match error {
            SourceError::NotFound(_) | SourceError::Denied(_) => AfterOwner::Fail,
            // The request itself is refused, by whichever node it reaches the upstream.
            SourceError::Failed(upstream) if (400..500).contains(&upstream.status) => AfterOwner::Fail,
            SourceError::Failed(_) => {
                self.upstream_failures += 1;
                if self.upstream_failures > 1 { AfterOwner::Fail } else { AfterOwner::AskNextOwner }
            }
            _ => AfterOwner::AskNextOwner,
        }
    }
}

/// What the first owner responds that has it. None: this node is the owner, or no owner can be reached. A silent owner is
/// followed by its successor, so that not every node goes to the upstream. `what` is for the log.
pub(super) async fn ask_owners<T, F>(
    lead: OwnerRoute,
    what: impl Display,
    ask: impl Fn(SocketAddr, PeerRequestMode) -> F,
) -> Result<Option<T>, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut errors = OwnerErrors::default();
    for owner in lead.leaders {
        let error = match ask(owner, PeerRequestMode::As(lead.asked_as)).await {
            Ok(given) => return Ok(Some(given)),
            Err(SourceError::NotKept) => continue,
            Err(error) => error,
        };
        tracing::info!(peer = %owner, role = "owner", %what, %error, "peer request failed");
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

    fn ask(responses: &[Result<&'static str, SourceError>]) -> (Result<Option<&'static str>, SourceError>, usize) {
        let owners = (0..3).map(|nth| SocketAddr::from(([192, 0, 2, nth], 5052))).collect();
        let lead = OwnerRoute { role: Role::Client, leaders: owners, asked_as: Role::Global };
        let asked = std::cell::Cell::new(0);
        let given = ask_owners(lead, "a digest", |owner, manner| {
            let nth = asked.replace(asked.get() + 1);
            assert_eq!((owner.ip().to_string(), manner), (format!("192.0.2.{nth}"), PeerRequestMode::As(Role::Global)));
            std::future::ready(responses[nth].clone())
        });
        (given.now_or_never().expect("nothing waits"), asked.get())
    }

    #[test]
    fn owners_are_asked_until_one_has_it_or_the_upstream_has_spoken() {
        let down = || Err(SourceError::TimedOut);
        let failed = |status| Err(SourceError::failed(status));
        let cases = [
            (vec![Ok("first")], Ok(Some("first")), 1),
            (vec![down(), Err(SourceError::NotKept), Ok("third")], Ok(Some("third")), 3),
            (vec![down(), down(), Err(SourceError::Busy)], Ok(None), 3),
            (vec![Err(SourceError::not_found())], Err(SourceError::not_found()), 1),
            (vec![down(), Err(SourceError::denied())], Err(SourceError::denied()), 2),
            (vec![failed(413)], failed(413).map(|_: &str| None), 1),
            (vec![failed(500), Ok("second")], Ok(Some("second")), 2),
            (vec![failed(500), failed(503)], failed(503).map(|_: &str| None), 2),
        ];
        for (responses, given, asked) in cases {
            assert_eq!(ask(&responses), (given, asked), "{responses:?}");
        }
    }
}
