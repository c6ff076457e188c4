//! Single-flight: concurrent identical requests share one execution and its result.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::trace;

/// The flights in progress, by key.
pub struct SingleFlight<K, V> {
    in_progress: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        Self { in_progress: Arc::default() }
    }
}

impl<K, V> SingleFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Waits for the result of the flight in progress, or starts one.
    ///
    /// The flight is a task of its own: it ends also if all waiting requests are cancelled. None: it panicked.
    ///
    /// Not an `async fn`: that would hold an unused `start`, with everything it owns, until the flight ends.
    pub fn join<F>(&self, key: K, start: impl FnOnce() -> F) -> impl Future<Output = Option<V>>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut receiver = {
            // The map is locked only for look-ups, never across an await.
            let mut in_progress = self.in_progress.lock();
            match in_progress.get(&key) {
                Some(receiver) => receiver.clone(),
                None => {
                    let (sender, receiver) = watch::channel(None);
                    in_progress.insert(key.clone(), receiver.clone());
                    let guard = FlightGuard { key, in_progress: self.in_progress.clone() };
                    let flight = start();
                    tokio::spawn(trace::carried(async move {
                        let result = flight.await;
                        // Removed first: a request that comes now finds what the flight has stored.
                        drop(guard);
                        sender.send_replace(Some(result));
                    }));
                    receiver
                }
            }
        };
        async move {
            let result = receiver.wait_for(Option::is_some).await.ok()?;
            result.clone()
        }
    }

    /// The same if some results are for one principal only. After another principal's personal result a second flight
    /// starts, shared by all requests with the key `own`.
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
        let result = self.join(key, started).await?;
        if is_own || !is_personal(&result) {
            return Some(result);
        }
        self.join(own, start).await
    }
}

/// Removes a flight from the map, also when it panics.
struct FlightGuard<K: Eq + Hash, V> {
    key: K,
    in_progress: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K: Eq + Hash, V> Drop for FlightGuard<K, V> {
    fn drop(&mut self) {
        self.in_progress.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn concurrent_requests_share_one_flight() {
        let flights = Arc::new(SingleFlight::<u8, usize>::default());
        let started = Arc::new(AtomicUsize::new(0));
        let request = || {
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
        let results = futures_util::future::join_all((0..50).map(|_| request())).await;
        assert!(results.iter().all(|result| *result == Some(0)));
        assert_eq!(request().await, Some(1));
    }

    #[tokio::test]
    async fn flight_continues_after_its_first_request_is_cancelled() {
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
    async fn personal_result_starts_a_flight_per_principal() {
        let flights = SingleFlight::<u8, Result<u8, ()>>::default();
        let (go, gone) = watch::channel(false);
        let started = Arc::new(AtomicUsize::new(0));
        let request = |principal, result: Result<u8, ()>| {
            let (gone, started) = (gone.clone(), started.clone());
            flights.join_or_own(0, principal, Result::is_err, move || {
                let (mut gone, started) = (gone.clone(), started.clone());
                async move {
                    let _ = gone.wait_for(|gone| *gone).await;
                    started.fetch_add(1, Ordering::SeqCst);
                    result
                }
            })
        };
        let all =
            async { tokio::join!(request(1, Err(())), request(2, Ok(7)), request(2, Ok(8)), request(1, Err(()))) };
        let results = tokio::join!(all, async { go.send_replace(true) }).0;
        assert_eq!(results, (Some(Err(())), Some(Ok(7)), Some(Ok(7)), Some(Err(()))));
        assert_eq!(started.load(Ordering::SeqCst), 3, "a shared flight, then one for each of two principals");
    }

    #[tokio::test]
    async fn panicked_flight_is_removed() {
        let flights = SingleFlight::<u8, u8>::default();
        assert_eq!(flights.join(1, || async { panic!("on purpose") }).await, None);
        assert_eq!(flights.join(1, || async { 3 }).await, Some(3));
    }
}
