//! Single flight: many ask, one goes.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::trace;

/// Questions under way, by key.
pub struct SingleFlight<K, V> {
    under_way: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        Self { under_way: Arc::default() }
    }
}

impl<K, V> SingleFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Waits for the answer of the flight under way, or starts one.
    ///
    /// The flight is a task of its own: callers may leave, it still lands. None: it panicked.
    ///
    /// Not an `async fn`: that would hold a `start` that is not used, and whatever it owns, until the flight has landed.
    pub fn join<F>(&self, key: K, start: impl FnOnce() -> F) -> impl Future<Output = Option<V>>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut answer = {
            // The map is only locked for look-ups, never across an await.
            let mut under_way = self.under_way.lock();
            match under_way.get(&key) {
                Some(answer) => answer.clone(),
                None => {
                    let (sender, receiver) = watch::channel(None);
                    under_way.insert(key.clone(), receiver.clone());
                    let landing = FlightGuard { key, under_way: self.under_way.clone() };
                    let flight = start();
                    tokio::spawn(trace::carried(async move {
                        let answer = flight.await;
                        // Off the map first: whoever comes now sees what the flight has stored.
                        drop(landing);
                        sender.send_replace(Some(answer));
                    }));
                    receiver
                }
            }
        };
        async move {
            let landed = answer.wait_for(Option::is_some).await.ok()?;
            landed.clone()
        }
    }

    /// The same where some answers are only for whoever asked: what somebody else was refused is asked again, once for
    /// all who share the key `own`.
    pub async fn join_or_own<F>(
        &self,
        key: K,
        own: K,
        is_personal: impl Fn(&V) -> bool,
        start: impl Fn() -> F,
    ) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut is_own = false;
        let started = || {
            is_own = true;
            start()
        };
        let landed = self.join(key, started).await?;
        if is_own || !is_personal(&landed) {
            return Some(landed);
        }
        self.join(own, start).await
    }
}

/// Takes a flight off the map, also when it panics.
struct FlightGuard<K: Eq + Hash, V> {
    key: K,
    under_way: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K: Eq + Hash, V> Drop for FlightGuard<K, V> {
    fn drop(&mut self) {
        self.under_way.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn many_ask_one_goes_and_the_next_goes_again() {
        let flights = Arc::new(SingleFlight::<u8, usize>::default());
        let started = Arc::new(AtomicUsize::new(0));
        let ask = || {
            let (flights, started) = (flights.clone(), started.clone());
            async move {
                flights
                    .join(1, || async move {
                        tokio::task::yield_now().await;
                        started.fetch_add(1, Ordering::SeqCst)
                    })
                    .await
            }
        };
        let answers = futures_util::future::join_all((0..50).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| *answer == Some(0)));
        assert_eq!(ask().await, Some(1));
    }

    #[tokio::test]
    async fn the_first_caller_may_leave() {
        let flights = SingleFlight::<u8, u8>::default();
        let (go, gone) = tokio::sync::oneshot::channel::<()>();
        let first = flights.join(1, || async move {
            let _ = gone.await;
            7
        });
        let left = tokio::time::timeout(std::time::Duration::ZERO, first).await;
        assert!(left.is_err());
        let second = flights.join(1, || async { unreachable!("the first is under way") });
        go.send(()).unwrap();
        assert_eq!(second.await, Some(7));
    }

    #[tokio::test]
    async fn what_one_is_refused_another_may_be_given() {
        let flights = SingleFlight::<u8, Result<u8, ()>>::default();
        let (go, gone) = watch::channel(false);
        let started = Arc::new(AtomicUsize::new(0));
        let ask = |who, answer: Result<u8, ()>| {
            let (gone, started) = (gone.clone(), started.clone());
            flights.join_or_own(0, who, Result::is_err, move || {
                let (mut gone, started) = (gone.clone(), started.clone());
                async move {
                    let _ = gone.wait_for(|gone| *gone).await;
                    started.fetch_add(1, Ordering::SeqCst);
                    answer
                }
            })
        };
        let all = async { tokio::join!(ask(1, Err(())), ask(2, Ok(7)), ask(2, Ok(8)), ask(1, Err(()))) };
        let answers = tokio::join!(all, async { go.send_replace(true) }).0;
        assert_eq!(answers, (Some(Err(())), Some(Ok(7)), Some(Ok(7)), Some(Err(()))));
        assert_eq!(started.load(Ordering::SeqCst), 3, "one for all, then one for each of both");
    }

    #[tokio::test]
    async fn a_panic_blocks_nobody() {
        let flights = SingleFlight::<u8, u8>::default();
        assert_eq!(flights.join(1, || async { panic!("on purpose") }).await, None);
        assert_eq!(flights.join(1, || async { 3 }).await, Some(3));
    }
}
