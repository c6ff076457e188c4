//! Decides from which source an object is requested next, and requests it. Manifests, tags, lengths and parts of blobs
//! share this decision and this loop.
//!
//! | step | condition | next step after a failure |
//! |---|---|---|
//! | holders | the object is requested from peers that have it before others | owners |
//! | owners, best first | this node is not the owner | [`SourceSearch::after`] an owner's error |
//! | act as the owner | no owner could be reached | the caller starts the search of an owner |
//! | upstream | this node is the owner, or need not act as the owner | any peer, after an outage; else the upstream's error |
//! | any peer | the upstream is out of service, by [`SourceError::is_outage`] | the upstream's error |

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
    extent: SearchExtent,
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

/// How much of an object is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SearchExtent {
    Whole,
    /// An error may be about the range alone: then the upstream is in service.
    Range,
}

/// Whether bytes of the object have come before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchProgress {
    NotBegun,
    /// An owner that is silent may be changing its own source: the caller repeats the search.
    Begun,
}

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
            extent: SearchExtent::Whole,
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

    /// A range of a blob is requested.
    #[must_use]
    pub fn of_range(self) -> Self {
        Self { extent: SearchExtent::Range, ..self }
    }

    /// The first decision.
    pub fn first(&mut self) -> Decision {
        match self.holders {
            HolderStep::First if self.has_peers => Decision::Request(Source::Holders),
            HolderStep::First | HolderStep::Skipped => self.next_owner(),
        }
    }

    /// The decision after a source has failed. `progress` is that of this moment.
    pub fn after(&mut self, source: Source, error: SourceError, progress: SearchProgress) -> Decision {
        match source {
            Source::Holders => self.next_owner(),
            Source::Owner { .. } if self.is_final(&error, progress) => Decision::Fail(error),
            Source::Owner { .. } => self.next_owner(),
            Source::Upstream if self.has_peers && self.is_outage(&error) => {
                self.upstream_error = Some(error);
                Decision::Request(Source::AnyPeer)
            }
            Source::Upstream => Decision::Fail(error),
            Source::AnyPeer => Decision::Fail(self.upstream_error.take().unwrap_or(error)),
        }
    }

    fn is_outage(&self, error: &SourceError) -> bool {
        error.is_outage() && !(self.extent == SearchExtent::Range && error.is_about_ranges())
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
    fn is_final(&mut self, error: &SourceError, progress: SearchProgress) -> bool {
        match error {
            SourceError::NotFound(_) | SourceError::Denied(_) => true,
            // A 4xx depends on the request, not on the node that sends it.
            SourceError::Failed(upstream) if (400..500).contains(&upstream.status) => true,
            // After an owner's 5xx of the upstream, one successor tries as well: its network path may differ.
            SourceError::Failed(_) => {
                self.upstream_failures += 1;
                self.upstream_failures > 1
            }
            SourceError::TimedOut => progress == SearchProgress::Begun,
            _ => false,
        }
    }
}

/// Why a source brought nothing.
#[derive(Debug)]
pub(super) enum SourceFailure {
    /// Another source may have it.
    Next(SourceError),
    /// No source may be used instead: the content itself is the problem.
    Final(SourceError),
}

impl From<SourceError> for SourceFailure {
    fn from(error: SourceError) -> Self {
        Self::Next(error)
    }
}

/// How a search ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SearchResult<T> {
    Found(T),
    /// No owner can be reached: this node has to act as the owner.
    ActAsOwner,
}

/// Requests one object from sources.
#[async_trait]
pub(super) trait ObjectSource: Sync {
    type Object: Send;

    async fn request(&self, source: Source) -> Result<Self::Object, SourceFailure>;

    /// Whether bytes of the object have come.
    fn progress(&self) -> SearchProgress {
        SearchProgress::NotBegun
    }

    /// The object, for the log.
    fn name(&self) -> impl fmt::Display + Send;
}

/// Requests an object from one source after another.
pub(super) async fn search<S: ObjectSource>(
    mut state: SourceSearch,
    sources: &S,
) -> Result<SearchResult<S::Object>, SourceError> {
    let mut decision = state.first();
    loop {
        let source = match decision {
            Decision::Request(source) => source,
            Decision::ActAsOwner => return Ok(SearchResult::ActAsOwner),
            Decision::Fail(error) => return Err(error),
        };
        let error = match sources.request(source).await {
            Ok(object) => return Ok(SearchResult::Found(object)),
            Err(SourceFailure::Final(error)) => return Err(error),
            Err(SourceFailure::Next(error)) => error,
        };
        if let Source::Owner { peer, .. } = source
            && error != SourceError::NotCached
        {
            tracing::info!(%peer, role = "owner", object = %sources.name(), %error, "peer request failed");
        }
        decision = state.after(source, error, sources.progress());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use parking_lot::Mutex;

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

    /// Fails with these errors in turn, then has the object.
    struct Script {
        errors: Mutex<VecDeque<SourceFailure>>,
        requests: Mutex<Vec<String>>,
        progress: SearchProgress,
    }

    #[async_trait]
    impl ObjectSource for Script {
        type Object = ();

        async fn request(&self, source: Source) -> Result<(), SourceFailure> {
            self.requests.lock().push(match source {
                Source::Holders => "holders".to_owned(),
                Source::Owner { peer, .. } => format!("owner{}", peer.ip().to_string().trim_start_matches("192.0.2.")),
                Source::Upstream => "upstream".to_owned(),
                Source::AnyPeer => "any".to_owned(),
            });
            self.errors.lock().pop_front().map_or(Ok(()), Err)
        }

        fn progress(&self) -> SearchProgress {
            self.progress
        }

        fn name(&self) -> impl fmt::Display + Send {
            "an object"
        }
    }

    type Outcome = Result<SearchResult<()>, SourceError>;

    /// What a search requests, in short, and how it ends, if the sources fail with these errors in turn.
    fn run(state: SourceSearch, errors: Vec<SourceError>) -> (String, Outcome) {
        run_with(state, errors.into_iter().map(SourceFailure::Next).collect(), SearchProgress::NotBegun)
    }

    fn run_with(state: SourceSearch, errors: Vec<SourceFailure>, progress: SearchProgress) -> (String, Outcome) {
        let script = Script { errors: Mutex::new(errors.into()), requests: Mutex::default(), progress };
        let outcome = search(state, &script).now_or_never().expect("nothing waits");
        (script.requests.into_inner().join(" "), outcome)
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
        assert_eq!(run(follower(), vec![miss(); 3]).1, Ok(SearchResult::ActAsOwner));
    }

    #[test]
    fn owners_are_tried_until_an_upstream_error() {
        let (down, failed) = (|| SourceError::TimedOut, SourceError::failed);
        let cases = [
            (vec![down(), SourceError::Busy, down()], "owner0 owner1 owner2", Ok(SearchResult::ActAsOwner)),
            (vec![SourceError::not_found()], "owner0", Err(SourceError::not_found())),
            (vec![down(), SourceError::denied()], "owner0 owner1", Err(SourceError::denied())),
            (vec![failed(413)], "owner0", Err(failed(413))),
            (vec![failed(500), failed(503)], "owner0 owner1", Err(failed(503))),
            (vec![failed(500), down(), failed(503)], "owner0 owner1 owner2", Err(failed(503))),
        ];
        for (errors, requests, end) in cases {
            assert_eq!(run(follower(), errors), (requests.to_owned(), end));
        }
        let begun = run_with(follower(), vec![SourceFailure::Next(down())], SearchProgress::Begun);
        assert_eq!(begun, ("owner0".to_owned(), Err(down())));
    }

    #[test]
    fn any_peer_is_requested_only_in_an_outage_of_the_upstream() {
        let global = || SourceSearch::new(Role::Global, route(0), HolderStep::Skipped, WithoutOwner::ActAsOwner);
        let [down, page] = [SourceError::TimedOut, SourceError::Malformed("a web page".into())];
        let cases = [
            (global(), down.clone(), "upstream any"),
            (global().of_range(), down.clone(), "upstream any"),
            // The upstream serves a login page, or refuses what it serves otherwise.
            (global(), page.clone(), "upstream any"),
            (global(), SourceError::failed(400), "upstream any"),
            (global(), SourceError::failed(501), "upstream any"),
            // The same may be about the range alone.
            (global().of_range(), page, "upstream"),
            (global().of_range(), SourceError::failed(416), "upstream"),
            (global(), SourceError::not_found(), "upstream"),
            (global(), SourceError::denied(), "upstream"),
            (SourceSearch::upstream_only(), down, "upstream"),
        ];
        for (state, error, requests) in cases {
            let errors = vec![error.clone(), SourceError::NotCached];
            assert_eq!(run(state, errors), (requests.to_owned(), Err(error)));
        }
    }

    #[test]
    fn final_failure_of_the_upstream_ends_the_search() {
        let global = SourceSearch::new(Role::Global, route(0), HolderStep::Skipped, WithoutOwner::ActAsOwner);
        let blocked = || SourceError::Blocked("10.0.0.1".into());
        let outcome = run_with(global, vec![SourceFailure::Final(blocked())], SearchProgress::NotBegun);
        assert_eq!(outcome, ("upstream".to_owned(), Err(blocked())));
    }

    #[test]
    fn owner_that_waits_for_this_node_is_not_requested() {
        let behind = |peer: SocketAddr| Downstream::parse(&peer.to_string());
        let requests = |peer| run(follower().for_downstream(&behind(peer)), vec![]);
        assert_eq!(requests(owner(0)), (String::new(), Ok(SearchResult::ActAsOwner)));
        assert_eq!(requests(owner(7)).0, "owner0");
    }
}
