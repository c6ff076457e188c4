//! The role of a node for a digest. Requests go one way only: client, zone, global, upstream. Nodes may disagree about
//! the members of the cluster, but no request can loop.
//!
//! | role | event | next role |
//! |---|---|---|
//! | client | a peer requests the blob as from the owner in its zone | zone |
//! | client, zone | a peer requests the blob as from the owner of all zones, or no owner is reachable | global |

use std::str::FromStr;
use std::sync::Arc;

use tokio::sync::watch;

/// The role of a node for a digest, as stated in the request that it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Downloads for its own clients, from the owner in its zone.
    Client,
    /// Owner in its zone: downloads for the zone, from the owner of all zones.
    Zone,
    /// Owner of all zones: downloads from the upstream, even if it considers another node the owner.
    Global,
}

/// The role in which this node downloads a blob. It only rises: two nodes that consider each other the owner must not
/// wait for each other.
#[derive(Clone)]
pub struct CurrentRole(Arc<watch::Sender<Role>>);

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Zone => "zone",
            Self::Global => "global",
        }
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Client, Self::Zone, Self::Global].into_iter().find(|role| role.as_str() == text).ok_or(())
    }
}

impl CurrentRole {
    pub fn new(role: Role) -> Self {
        Self(Arc::new(watch::Sender::new(role)))
    }

    pub fn get(&self) -> Role {
        *self.0.borrow()
    }

    /// Raises it to `role`. A lower one changes nothing.
    pub fn promote(&self, role: Role) {
        self.0.send_if_modified(|current| {
            let is_higher = role > *current;
            *current = role.max(*current);
            is_higher
        });
    }

    /// Waits until it is `role` or a higher one.
    pub async fn reaches(self, role: Role) {
        // It fails only if the sender is dropped, and `self` holds the sender.
        let _ = self.0.subscribe().wait_for(|current| *current >= role).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn current_role_only_rises() {
        let current = CurrentRole::new(Role::Zone);
        current.promote(Role::Client);
        assert_eq!(current.get(), Role::Zone);
        assert!(current.clone().reaches(Role::Zone).now_or_never().is_some());
        let mut rises = Box::pin(current.clone().reaches(Role::Global));
        assert!(rises.as_mut().now_or_never().is_none());
        current.promote(Role::Global);
        assert!(rises.now_or_never().is_some());
        assert_eq!(current.get(), Role::Global);
    }
}
