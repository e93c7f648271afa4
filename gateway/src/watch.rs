//! Who waits for what to change: one subscription to the bus, many waiters here.
//!
//! ```text
//!   signal ──> feed ──> Registry ──┬──> Watcher of order 1   (a long poll)
//!                                  ├──> Watcher of order 1   (an event stream)
//!                                  └──> Watcher of order 2
//! ```
//!
//! A watcher sees every change announced after it was made, in order, unless it reads so slowly that its few places
//! are full: then it is cut off and told so, and nothing is buffered without limit (E48). Signals can be lost on their
//! way here; whoever watches reads again now and then.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use mesh::{bus::SharedBus, lifecycle::Lifecycle};
use proto::{Error, Reason};
use tokio::sync::{
    broadcast::{self, error::RecvError},
    mpsc,
};

/// Changes that a watcher may be behind. An order has four at most, a sale a few a second.
const PLACES: usize = 16;

/// How long to wait before listening again where the bus is away.
const LISTEN_AGAIN: Duration = Duration::from_millis(500);

/// Watchers by what they watch. Cheap to clone.
#[derive(Debug)]
pub struct Registry<K, V>(Arc<Mutex<Watchers<K, V>>>);

#[derive(Debug)]
struct Watchers<K, V> {
    by_key: HashMap<K, Vec<Place<V>>>,
    count: usize,
    limit: usize,
    next_id: u64,
}

/// Where one watcher's changes go.
#[derive(Debug)]
struct Place<V> {
    id: u64,
    /// None once it was cut off.
    sender: Option<mpsc::Sender<V>>,
}

/// One watcher; leaves the registry when it is dropped.
#[derive(Debug)]
pub struct Watcher<K: Hash + Eq, V> {
    registry: Registry<K, V>,
    key: K,
    id: u64,
    changes: mpsc::Receiver<V>,
}

impl<K, V> Clone for Registry<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Registry<K, V> {
    /// Room for so many watchers; beyond it they are refused.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Watchers { by_key: HashMap::new(), count: 0, limit, next_id: 0 })))
    }

    /// Watches from now on. Register first and read after, or a change in between is missed.
    pub fn watch(&self, key: K) -> Result<Watcher<K, V>, Error> {
        let mut watchers = self.lock();
        if watchers.count >= watchers.limit {
            return Err(Error::new(Reason::Overloaded, "too many are watching"));
        }
        let (sender, changes) = mpsc::channel(PLACES);
        let id = watchers.next_id;
        watchers.next_id += 1;
        watchers.count += 1;
        watchers.by_key.entry(key.clone()).or_default().push(Place { id, sender: Some(sender) });
        drop(watchers);
        Ok(Watcher { registry: self.clone(), key, id, changes })
    }

    /// Tells everyone who watches this key. Whoever has no place left is cut off.
    pub fn announce(&self, key: &K, value: &V) {
        if let Some(watching) = self.lock().by_key.get_mut(key) {
            for place in watching {
                // Without its sender the channel still gives what is in it, and then the end.
                if place.sender.as_ref().is_some_and(|sender| sender.try_send(value.clone()).is_err()) {
                    place.sender = None;
                }
            }
        }
    }
}

impl<K: Hash + Eq, V> Registry<K, V> {
    fn lock(&self) -> MutexGuard<'_, Watchers<K, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq, V> Watcher<K, V> {
    /// The next change. An error when this watcher was too slow and has been cut off. Cancel-safe.
    pub async fn changed(&mut self) -> Result<V, Error> {
        let too_slow = || Error::new(Reason::Overloaded, "cut off: changes were not read fast enough");
        self.changes.recv().await.ok_or_else(too_slow)
    }
}

impl<K: Hash + Eq, V> Drop for Watcher<K, V> {
    fn drop(&mut self) {
        let mut watchers = self.registry.lock();
        watchers.count -= 1;
        if let Some(watching) = watchers.by_key.get_mut(&self.key) {
            watching.retain(|place| place.id != self.id);
            if watching.is_empty() {
                watchers.by_key.remove(&self.key);
            }
        }
    }
}

/// What the bus has to say.
#[derive(Debug)]
pub enum Signal {
    /// A signal came in.
    Came(Bytes),
    /// Signals were lost, nobody knows which.
    Lost,
}

/// Listens to a signal for as long as the role lives. Answers once it listens, so that whoever reads after that
/// misses nothing.
pub async fn listen(
    bus: SharedBus,
    subject: &'static str,
    life: &Lifecycle,
    feed: impl Fn(Signal) + Send + 'static,
) -> Result<(), mesh::bus::Error> {
    let mut signals = bus.listen(subject).await?;
    let soft = life.soft_token();
    life.spawn_essential(subject, async move {
        while let Some(received) = soft.run_until_cancelled(signals.recv()).await {
            match received {
                Ok(payload) => feed(Signal::Came(payload)),
                Err(RecvError::Lagged(count)) => {
                    tracing::warn!(subject, count, "signals were lost");
                    feed(Signal::Lost);
                }
                Err(RecvError::Closed) => {
                    feed(Signal::Lost);
                    let Some(again) = soft.run_until_cancelled(listen_again(&bus, subject)).await else { return };
                    signals = again;
                }
            }
        }
    });
    Ok(())
}

async fn listen_again(bus: &SharedBus, subject: &'static str) -> broadcast::Receiver<Bytes> {
    loop {
        tokio::time::sleep(LISTEN_AGAIN).await;
        match bus.listen(subject).await {
            Ok(signals) => return signals,
            Err(error) => tracing::warn!(subject, %error, "cannot listen"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_reach_those_who_watch_their_key_in_order() {
        let registry = Registry::new(10);
        let mut one = registry.watch(1).unwrap();
        let mut also_one = registry.watch(1).unwrap();
        let mut two = registry.watch(2).unwrap();
        for change in ["a", "b"] {
            registry.announce(&1, &change);
        }
        registry.announce(&2, &"c");
        for watcher in [&mut one, &mut also_one] {
            assert_eq!((watcher.changed().await.unwrap(), watcher.changed().await.unwrap()), ("a", "b"));
        }
        assert_eq!(two.changed().await.unwrap(), "c");
    }

    #[tokio::test]
    async fn e48_a_slow_watcher_is_cut_off_and_a_quick_one_is_not() {
        let registry = Registry::new(10);
        let mut slow = registry.watch(1).unwrap();
        let mut quick = registry.watch(1).unwrap();
        for change in 0..=PLACES {
            registry.announce(&1, &change);
            assert_eq!(quick.changed().await.unwrap(), change);
        }
        for change in 0..PLACES {
            assert_eq!(slow.changed().await.unwrap(), change);
        }
        assert_eq!(slow.changed().await.unwrap_err().reason, Reason::Overloaded);
    }

    #[test]
    fn watchers_are_limited_and_leave_nothing_behind() {
        let registry = Registry::<_, ()>::new(2);
        let (one, two) = (registry.watch(1).unwrap(), registry.watch(1).unwrap());
        assert_eq!(registry.watch(1).unwrap_err().reason, Reason::Overloaded);
        drop(one);
        registry.watch(2).unwrap();
        drop(two);
        assert!(registry.lock().by_key.is_empty());
    }
}
