//! Whether this process may be sent work: named conditions, all of which must hold.
//!
//! Nothing is damped here: a condition is what its keeper last said. A condition that nobody has met yet, and a process
//! without any condition, are not ready. Belongs to one mesh; two in one process do not share it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The conditions of one mesh. Cheap to clone; clones are the same conditions.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    conditions: Mutex<Vec<Condition>>,
    all_met: watch::Sender<bool>,
}

#[derive(Debug)]
struct Condition {
    name: String,
    met: bool,
}

/// Keeps one condition. What it last said stays true when it is dropped.
#[derive(Debug)]
pub struct ReadyFlag {
    readiness: Readiness,
    index: usize,
}

impl Default for Readiness {
    fn default() -> Self {
        Self(Arc::new(Inner { conditions: Mutex::default(), all_met: watch::Sender::new(false) }))
    }
}

impl Readiness {
    /// No conditions yet, hence not ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition, not met.
    pub fn register(&self, name: impl Into<String>) -> ReadyFlag {
        let mut conditions = self.conditions();
        conditions.push(Condition { name: name.into(), met: false });
        self.publish(&conditions);
        ReadyFlag { readiness: self.clone(), index: conditions.len() - 1 }
    }

    /// Ready, or the names of what is not.
    pub fn ready(&self) -> Result<(), Vec<String>> {
        let conditions = self.conditions();
        if conditions.is_empty() {
            return Err(vec!["start".to_owned()]);
        }
        let unmet: Vec<_> = conditions.iter().filter(|c| !c.met).map(|c| c.name.clone()).collect();
        if unmet.is_empty() { Ok(()) } else { Err(unmet) }
    }

    /// Follows whether all conditions are met. Notified only when that changes.
    pub fn changed(&self) -> watch::Receiver<bool> {
        self.0.all_met.subscribe()
    }

    /// Waits until all conditions are met.
    pub async fn until_ready(&self) {
        // The sender lives in self, so it cannot be gone.
        let _ = self.changed().wait_for(|ready| *ready).await;
    }

    fn conditions(&self) -> MutexGuard<'_, Vec<Condition>> {
        self.0.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called with the lock held, so that two changes cannot be published in the wrong order.
    fn publish(&self, conditions: &[Condition]) {
        let ready = !conditions.is_empty() && conditions.iter().all(|c| c.met);
        self.0.all_met.send_if_modified(|was| std::mem::replace(was, ready) != ready);
    }
}

impl ReadyFlag {
    /// Says whether the condition holds now.
    pub fn set(&self, met: bool) {
        let mut conditions = self.readiness.conditions();
        conditions[self.index].met = met;
        self.readiness.publish(&conditions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_is_all_conditions_and_says_which_are_not() {
        let readiness = Readiness::new();
        assert_eq!(readiness.ready(), Err(vec!["start".to_owned()]));
        let store = readiness.register("store");
        let bus = readiness.register("bus");
        let mut changed = readiness.changed();
        store.set(true);
        assert!(!changed.has_changed().unwrap(), "half ready is not a change");
        assert_eq!(readiness.ready(), Err(vec!["bus".to_owned()]));
        bus.set(true);
        readiness.until_ready().await;
        assert!(*changed.borrow_and_update());
        drop(bus);
        store.set(false);
        assert!(!*changed.borrow_and_update());
        assert_eq!(readiness.ready(), Err(vec!["store".to_owned()]));
    }
}
