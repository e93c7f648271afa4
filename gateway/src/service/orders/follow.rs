//! Following one order from state to state, by signals, with reading now and then as the net below them.

use std::{sync::Arc, time::Duration};

use proto::{
    Error, OrderId,
    v1::{Order, OrderState},
};

use super::find::Finder;
use crate::watch::Watcher;

/// How often an order is read without a signal, which can be lost.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// How soon the first time, for who waits for a change that is due any moment; then doubling. A signal may have come
/// just before the order that it is about was known here.
const FIRST_READ: Duration = Duration::from_millis(250);

/// Follows one order.
pub(super) struct Follower {
    id: OrderId,
    watcher: Watcher<OrderId, Arc<Order>>,
    finder: Finder,
    /// The newest etag that was seen.
    etag: Option<String>,
    read_after: Duration,
}

impl Follower {
    /// From when `watcher` was registered.
    pub(super) fn new(id: OrderId, watcher: Watcher<OrderId, Arc<Order>>, finder: Finder) -> Self {
        Self { id, watcher, finder, etag: None, read_after: READ_AGAIN }
    }

    /// For a change that is due any moment.
    pub(super) fn impatient(self) -> Self {
        Self { read_after: FIRST_READ, ..self }
    }

    /// What was read elsewhere is not news.
    pub(super) fn seen(&mut self, order: &Order) {
        self.etag = Some(order.etag.clone());
    }

    /// The order, once it is newer than what was seen. An error when changes came faster than they were taken.
    pub(super) async fn next(&mut self) -> Result<Order, Error> {
        loop {
            let order = tokio::select! {
                biased;
                changed = self.watcher.changed() => Some(Arc::unwrap_or_clone(changed?)),
                () = tokio::time::sleep(self.read_after) => {
                    self.read_after = (self.read_after * 2).min(READ_AGAIN);
                    self.finder.find(self.id).await.unwrap_or_else(|error| {
                        // A net with a hole now and then is still a net.
                        tracing::debug!(%error, order = %self.id, "a watched order could not be read");
                        None
                    })
                }
            };
            if let Some(order) = order
                && self.etag.as_ref().is_none_or(|seen| is_newer(&order.etag, seen))
            {
                self.seen(&order);
                return Ok(order);
            }
        }
    }
}

/// Etags grow within one order. One that is no number is at least another.
fn is_newer(etag: &str, seen: &str) -> bool {
    match (etag.parse::<u64>(), seen.parse::<u64>()) {
        (Ok(etag), Ok(seen)) => etag > seen,
        _ => etag != seen,
    }
}

/// Whether an order changes no more.
pub(super) fn is_terminal(state: OrderState) -> bool {
    use OrderState::*;
    matches!(state, Paid | Rejected | Expired | Cancelled | Refunded)
}
