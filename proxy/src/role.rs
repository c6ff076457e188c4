//! What a node is for a digest. Questions travel one way only, from client to zone to global to the
//! origin, so that no request ever travels in a circle, whatever the nodes believe of each other.

use std::str::FromStr;
use std::sync::Arc;

use tokio::sync::watch;

/// Which part a node plays, as whoever asks it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// It fetches for its own clients, from the owner of its zone.
    Client,
    /// It owns the digest in its zone, and fetches for that, from the owner of all zones.
    Zone,
    /// It owns the digest, and fetches from the origin: whatever its own view of the members.
    Global,
}

/// The role in which this node downloads a blob. It only rises: when no owner can be reached, this node takes its place,
/// and two nodes that take each other for the owner must not wait for each other.
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
        // It fails only where the sender is gone, which this is.
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
