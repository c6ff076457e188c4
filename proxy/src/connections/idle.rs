//! Connections that wait for a request, oldest first. If no slot is free, one of them is closed for a new connection.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

#[derive(Default)]
pub(super) struct Idle(Mutex<IdleState>);

#[derive(Default)]
struct IdleState {
    next: u64,
    connections: BTreeMap<u64, (Option<IpAddr>, oneshot::Sender<()>)>,
}

/// The entry of an idle connection, removed on drop.
pub(super) struct IdleEntry {
    idle: Arc<Idle>,
    nth: u64,
    closed: oneshot::Receiver<()>,
}

/// Which connection is to be closed.
#[derive(Clone, Copy)]
pub(super) enum CloseTarget {
    Any,
    Client(Option<IpAddr>),
}

impl Idle {
    pub(super) fn enter(self: &Arc<Self>, client: Option<IpAddr>) -> IdleEntry {
        let (sender, closed) = oneshot::channel();
        let mut waiting = self.0.lock();
        let nth = waiting.next;
        waiting.next += 1;
        waiting.connections.insert(nth, (client, sender));
        IdleEntry { idle: self.clone(), nth, closed }
    }

    /// Closes the connection that has been idle longest. False: none is idle.
    pub(super) fn close_oldest(&self, target: CloseTarget) -> bool {
        let mut waiting = self.0.lock();
        let is_target = |client: Option<IpAddr>| match target {
            CloseTarget::Any => true,
            CloseTarget::Client(of) => client == of,
        };
        let oldest = waiting.connections.iter().find(|(_, (client, _))| is_target(*client)).map(|(nth, _)| *nth);
        let closed = oldest.and_then(|nth| waiting.connections.remove(&nth));
        closed.is_some_and(|(_, close)| close.send(()).is_ok())
    }
}

impl IdleEntry {
    /// Returns when the connection is to be closed.
    pub(super) async fn closed(&mut self) {
        if (&mut self.closed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for IdleEntry {
    fn drop(&mut self) {
        self.idle.0.lock().connections.remove(&self.nth);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn oldest_idle_connection_is_closed_first() {
        let idle = Arc::new(Idle::default());
        let client = |nth: u8| Some(IpAddr::from([192, 0, 2, nth]));
        let mut entries = [1, 2, 2, 1].map(|nth| idle.enter(client(nth)));
        assert!(idle.close_oldest(CloseTarget::Client(client(2))) && idle.close_oldest(CloseTarget::Any));
        let closed = entries.each_mut().map(|entry| entry.closed().now_or_never().is_some());
        assert_eq!(closed, [true, true, false, false]);
        assert!(!idle.close_oldest(CloseTarget::Client(client(3))));
        drop(entries);
        assert!(!idle.close_oldest(CloseTarget::Any) && idle.0.lock().connections.is_empty());
    }
}
