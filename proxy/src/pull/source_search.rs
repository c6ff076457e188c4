//! Decides from which source an object is requested next, and requests it. Manifests, tags, lengths and parts of blobs
//! share this decision and this loop.
//!
//! | step | condition | next step after a failure |
//! |---|---|---|
//! | holders | the object is requested from peers that have it before others | owners |
//! | owners, best first | this node is not the owner | [`SourceSearch::after`] an owner's error |
//! | act as the owner | no owner could be reached | the caller starts the search of an owner |
//! | upstream | this node is the owner, or need not act as the owner | any peer, if the upstream is down |
//! | any peer | the upstream is down | the upstream's error |

use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;

use async_trait::async_trait;

use crate::peers::{Downstream, OwnerRoute};
use crate::role::Role;
use crate::source::SourceError;

/// The state of one search. It does no I/O: [`search`] requests what it decides.
#[derive(Debug)]
pub struct SourceSearch {
    role: Role,
    /// Whether peers may be sources.
    has_peers: bool,
    holders: HolderStep,
    owners: VecDeque<SocketAddr>,
    request_role: Role,
    without_owner: WithoutOwner,
    /// Errors of the upstream that owners have returned.
    upstream_failures: u32,
    progress: SearchProgress,
    /// Why the upstream could not be used.
    upstream_error: Option<SourceError>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    Request(Source),
    /// No owner can be reached: this node acts as the owner.
    ActAsOwner,
    Fail(SourceError),
}

/// A source of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Peers that are known to have it.
    Holders,
    Owner {
        peer: SocketAddr,
        /// The role in which it is requested.
        role: Role,
    },
    Upstream,
    /// All peers, because the upstream is down.
    AnyPeer,
}

/// Whether holders are requested before the owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolderStep {
    First,
    Skipped,
}

/// What a node does that is not the owner and reaches none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WithoutOwner {
    /// Peers may turn to this node, so the object is downloaded once for all of them.
    ActAsOwner,
    /// The object is small or only this node needs it.
    RequestUpstream,
}

/// Whether bytes of the object have come before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchProgress {
    NotBegun,
    /// An owner that is silent may be changing its own source: the caller repeats the search.
    Begun,
}

/// Holders that are tried for one range before its owner. More: a range waits longer if holders fail. Fewer: more load
/// on the owner.
pub const MAX_HOLDERS_TRIED: usize = 3;

/// Ranges requested from peers at the same time. More: more load on each peer. Fewer: one slow peer slows the blob.
pub const MAX_PEER_RANGES: usize = 4;

impl SourceSearch {
    /// A search without peers.
    pub fn upstream_only() -> Self {
        Self {
            has_peers: false,
            ..Self::new(Role::Global, OwnerRoute::none(), HolderStep::Skipped, WithoutOwner::RequestUpstream)
        }
    }

    /// The search of a node in this role.
    pub fn new(role: Role, route: OwnerRoute, holders: HolderStep, without_owner: WithoutOwner) -> Self {
        Self {
            role,
            has_peers: true,
            holders,
            owners: if role == Role::Global { VecDeque::new() } else { route.owners.into() },
            request_role: route.request_role,
            without_owner,
            upstream_failures: 0,
            progress: SearchProgress::NotBegun,
            upstream_error: None,
        }
    }

    /// No owner is requested if the first one waits for this node: that would be a circle.
    #[must_use]
    pub fn for_downstream(mut self, downstream: &Downstream) -> Self {
        if self.owners.front().is_some_and(|owner| downstream.contains(owner)) {
            self.owners.clear();
        }
        self
    }

    /// The first owner has failed too often: it is skipped, as by its other followers.
    #[must_use]
    pub fn without_first_owner(mut self) -> Self {
        self.owners.pop_front();
        self
    }

    #[must_use]
    pub fn with_progress(self, progress: SearchProgress) -> Self {
        Self { progress, ..self }
    }

    /// The first decision.
    pub fn first(&mut self) -> Decision {
        match self.holders {
            HolderStep::First if self.has_peers => Decision::Request(Source::Holders),
            HolderStep::First | HolderStep::Skipped => self.next_owner(),
        }
    }

    /// The decision after a source has failed.
    pub fn after(&mut self, source: Source, error: SourceError) -> Decision {
        match source {
            Source::Holders => self.next_owner(),
            Source::Owner { .. } if self.is_final(&error) => Decision::Fail(error),
            Source::Owner { .. } => self.next_owner(),
            // An error about the range says that the upstream is reachable.
            Source::Upstream if self.has_peers && error.is_outage() && !error.is_about_ranges() => {
                self.upstream_error = Some(error);
                Decision::Request(Source::AnyPeer)
            }
            Source::Upstream => Decision::Fail(error),
            Source::AnyPeer => Decision::Fail(self.upstream_error.take().unwrap_or(error)),
        }
    }

    /// After a silent owner its successor is requested, so that not every node goes to the upstream.
    fn next_owner(&mut self) -> Decision {
        match self.owners.pop_front() {
            Some(peer) => Decision::Request(Source::Owner { peer, role: self.request_role }),
            None if self.role != Role::Global && self.without_owner == WithoutOwner::ActAsOwner => Decision::ActAsOwner,
            None => Decision::Request(Source::Upstream),
        }
    }

    /// Whether another owner would return an owner's error as well.
    fn is_final(&mut self, error: &SourceError) -> bool {
        match error {
            SourceError::NotFound(_) | SourceError::Denied(_) => true,
            // A 4xx depends on the request, not on the node that sends it.
            SourceError::Failed(upstream) if (400..500).contains(&upstream.status) => true,
            // After an owner's 5xx of the upstream, one successor tries as well: its network path may differ.
            SourceError::Failed(_) => {
                self.upstream_failures += 1;
                self.upstream_failures > 1
            }
            SourceError::TimedOut => self.progress == SearchProgress::Begun,
            _ => false,
        }
    }
}

/// Requests one object from sources.
#[async_trait]
pub(super) trait ObjectSource: Sync {
    type Object: Send;

    async fn request(&self, source: Source) -> Result<Self::Object, SourceError>;

    /// The object, for the log.
    fn name(&self) -> impl fmt::Display + Send;
}

/// Requests an object from one source after another. None: this node has to act as the owner.
pub(super) async fn search<S: ObjectSource>(
    mut state: SourceSearch,
    sources: &S,
) -> Result<Option<S::Object>, SourceError> {
    let mut decision = state.first();
    loop {
        let source = match decision {
            Decision::Request(source) => source,
            Decision::ActAsOwner => return Ok(None),
            Decision::Fail(error) => return Err(error),
        };
        let error = match sources.request(source).await {
            Ok(object) => return Ok(Some(object)),
            Err(error) => error,
        };
        if let Source::Owner { peer, .. } = source
            && error != SourceError::NotCached
        {
            tracing::info!(%peer, role = "owner", object = %sources.name(), %error, "peer request failed");
        }
        decision = state.after(source, error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(nth: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, nth], 5052))
    }

    fn route(owners: u8) -> OwnerRoute {
        let owners = (0..owners).map(owner).collect();
        OwnerRoute { role: Role::Client, owners, request_role: Role::Global }
    }

    fn follower() -> SourceSearch {
        SourceSearch::new(Role::Client, route(3), HolderStep::Skipped, WithoutOwner::ActAsOwner)
    }

    /// What a search requests, in short, and how it ends, if the sources fail with these errors in turn.
    fn run(mut state: SourceSearch, errors: Vec<SourceError>) -> (String, Decision) {
        let (mut requests, mut decision) = (Vec::new(), state.first());
        let mut errors = errors.into_iter();
        loop {
            let Decision::Request(source) = decision else { break (requests.join(" "), decision) };
            requests.push(match source {
                Source::Holders => "holders".to_owned(),
                Source::Owner { peer, .. } => format!("owner{}", peer.ip().to_string().trim_start_matches("192.0.2.")),
                Source::Upstream => "upstream".to_owned(),
                Source::AnyPeer => "any".to_owned(),
            });
            let Some(error) = errors.next() else { break (requests.join(" "), Decision::Request(source)) };
            decision = state.after(source, error);
        }
    }

    #[test]
    fn sources_are_requested_in_the_order_of_the_role() {
        let miss = || SourceError::NotCached;
        let global = |holders| SourceSearch::new(Role::Global, route(3), holders, WithoutOwner::ActAsOwner);
        let with = |holders, without_owner| SourceSearch::new(Role::Zone, route(1), holders, without_owner);
        let cases = [
            (SourceSearch::upstream_only(), vec![], "upstream"),
            (global(HolderStep::First), vec![miss()], "holders upstream"),
            (global(HolderStep::Skipped), vec![], "upstream"),
            (follower(), vec![miss(), miss()], "owner0 owner1 owner2"),
            (with(HolderStep::First, WithoutOwner::ActAsOwner), vec![miss()], "holders owner0"),
            (with(HolderStep::Skipped, WithoutOwner::RequestUpstream), vec![miss()], "owner0 upstream"),
            (follower().without_first_owner(), vec![miss()], "owner1 owner2"),
        ];
        for (state, errors, want) in cases {
            assert_eq!(run(state, errors).0, want);
        }
        assert_eq!(run(follower(), vec![miss(); 3]).1, Decision::ActAsOwner);
    }

    #[test]
    fn owners_are_tried_until_an_upstream_error() {
        let (down, failed) = (|| SourceError::TimedOut, SourceError::failed);
        let cases = [
            (vec![down(), SourceError::Busy, down()], "owner0 owner1 owner2", Decision::ActAsOwner),
            (vec![SourceError::not_found()], "owner0", Decision::Fail(SourceError::not_found())),
            (vec![down(), SourceError::denied()], "owner0 owner1", Decision::Fail(SourceError::denied())),
            (vec![failed(413)], "owner0", Decision::Fail(failed(413))),
            (vec![failed(500), failed(503)], "owner0 owner1", Decision::Fail(failed(503))),
            (vec![failed(500), down(), failed(503)], "owner0 owner1 owner2", Decision::Fail(failed(503))),
        ];
        for (errors, requests, end) in cases {
            assert_eq!(run(follower(), errors), (requests.to_owned(), end));
        }
        let begun = follower().with_progress(SearchProgress::Begun);
        assert_eq!(run(begun, vec![down()]), ("owner0".to_owned(), Decision::Fail(down())));
    }

    #[test]
    fn any_peer_is_requested_only_if_the_upstream_is_down() {
        let global = || SourceSearch::new(Role::Global, route(0), HolderStep::Skipped, WithoutOwner::ActAsOwner);
        let down = || SourceError::TimedOut;
        let cases = [
            (global(), vec![down(), SourceError::NotCached], "upstream any", down()),
            (global(), vec![SourceError::not_found()], "upstream", SourceError::not_found()),
            (global(), vec![SourceError::failed(416)], "upstream", SourceError::failed(416)),
            (SourceSearch::upstream_only(), vec![down()], "upstream", down()),
        ];
        for (state, errors, requests, error) in cases {
            assert_eq!(run(state, errors), (requests.to_owned(), Decision::Fail(error)));
        }
    }

    #[test]
    fn owner_that_waits_for_this_node_is_not_requested() {
        let behind = |peer: SocketAddr| Downstream::parse(&peer.to_string());
        let requests = |peer| run(follower().for_downstream(&behind(peer)), vec![]);
        assert_eq!(requests(owner(0)), (String::new(), Decision::ActAsOwner));
        assert_eq!(requests(owner(7)).0, "owner0");
    }
}
