//! What this gateway accepted a moment ago, so that the buyer who waits for it to be locked costs no database a read.
//!
//! Nearly every accepted order is asked about at once, by a reader who waits until it leaves PLACED. Its first state is
//! known here, and its next one comes by a signal. What is promised:
//!
//! - An entry is what the coordinator answered, or newer: signals replace it. So a waiting reader never sees an order
//!   go back, and nobody is told of an order that is not there.
//! - It is only looked at by readers who wait, and forgotten once its buyer goes on to pay or cancel here, or has seen
//!   it leave PLACED: from then on the record is asked.
//! - It can be lost at any moment: then the order is read like any other. Its size is bounded.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use proto::{
    OrderId,
    v1::{Order, OrderState},
};
use tokio::time::Instant;

/// Some 5 MiB. A rush that is asked about later than this many orders after is read from the records.
const ORDERS: usize = 8_192;

/// A buyer who was not back by then is not waiting.
const KEPT_FOR: Duration = Duration::from_secs(30);

/// See the module. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Accepted(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    orders: HashMap<OrderId, Arc<Order>>,
    /// Oldest first. What was forgotten meanwhile is passed over.
    ages: VecDeque<(Instant, OrderId)>,
}

impl Accepted {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an order that was just accepted. One that is known already stays as the signals have it.
    pub fn keep(&self, id: OrderId, order: &Order) {
        if order.state() != OrderState::Placed {
            return;
        }
        let now = Instant::now();
        let mut inner = self.lock();
        while inner.ages.len() >= ORDERS || inner.ages.front().is_some_and(|(at, _)| now - *at > KEPT_FOR) {
            let Some((_, oldest)) = inner.ages.pop_front() else { break };
            inner.orders.remove(&oldest);
        }
        let Inner { orders, ages } = &mut *inner;
        if let Entry::Vacant(place) = orders.entry(id) {
            place.insert(Arc::new(order.clone()));
            ages.push_back((now, id));
        }
    }

    /// Takes note of a signal.
    pub fn learn(&self, id: &OrderId, order: &Arc<Order>) {
        if let Some(known) = self.lock().orders.get_mut(id) {
            *known = order.clone();
        }
    }

    /// The order as it is known here. One that has left PLACED is told once and forgotten.
    pub fn find(&self, id: &OrderId) -> Option<Arc<Order>> {
        let mut inner = self.lock();
        let order = inner.orders.get(id)?.clone();
        if order.state() != OrderState::Placed {
            inner.orders.remove(id);
        }
        Some(order)
    }

    /// Its buyer goes on.
    pub fn forget(&self, id: &OrderId) {
        self.lock().orders.remove(id);
    }
}

#[cfg(test)]
mod tests {
    use proto::{BuyerId, RequestId};

    use super::*;

    fn order(id: OrderId, state: OrderState) -> Order {
        Order { name: id.name(), state: state.into(), ..Default::default() }
    }

    fn id(n: u128) -> OrderId {
        let request = RequestId::parse("request_id", &uuid::Uuid::from_u128(n + 1).to_string()).unwrap();
        OrderId::derive(&BuyerId::parse("alice").unwrap(), &request)
    }

    #[tokio::test]
    async fn a_signal_replaces_what_was_accepted_and_is_told_once() {
        let (accepted, id) = (Accepted::default(), id(1));
        accepted.learn(&id, &Arc::new(order(id, OrderState::AwaitingPayment)));
        assert_eq!(accepted.find(&id), None, "only what was accepted here is kept");
        accepted.keep(id, &order(id, OrderState::Placed));
        for _ in 0..2 {
            assert_eq!(accepted.find(&id).unwrap().state(), OrderState::Placed);
        }
        accepted.learn(&id, &Arc::new(order(id, OrderState::AwaitingPayment)));
        // The answer of a second call with the same key, which left before the signal did.
        accepted.keep(id, &order(id, OrderState::Placed));
        assert_eq!(accepted.find(&id).unwrap().state(), OrderState::AwaitingPayment);
        assert_eq!(accepted.find(&id), None, "from then on the record is asked");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded_in_size_and_in_time() {
        let accepted = Accepted::default();
        for n in 0..ORDERS as u128 + 10 {
            accepted.keep(id(n), &order(id(n), OrderState::Placed));
        }
        assert_eq!(accepted.lock().orders.len(), ORDERS);
        assert_eq!(accepted.find(&id(0)), None);
        tokio::time::advance(KEPT_FOR + Duration::from_secs(1)).await;
        accepted.keep(id(0), &order(id(0), OrderState::Placed));
        let inner = accepted.lock();
        assert_eq!((inner.orders.len(), inner.ages.len()), (1, 1));
    }
}
