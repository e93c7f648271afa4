//! Order sagas one at a time for callers, in batches for everything below: buyers' calls come singly, and what they
//! need (a row, a transition, a drive to the end, a record) is shared with whoever else needs it now.

use std::sync::Arc;

use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
};
use proto::{OrderId, error::Result, v1::Order};

use crate::{
    config::Config,
    engine::{
        Named, Saga, Work,
        runner::{Change, Engine},
    },
    order_saga::{OrderSaga, State},
    store::{Row, Verdict},
    wire::{order_of, order_state, tells_state},
};

/// Batched access to order sagas. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sagas {
    rows: Batcher<OrderId, Result<Option<Row>>>,
    changes: Batcher<Change<OrderSaga>, Result<Verdict>>,
    forward: Batcher<Row, Row>,
    backward: Batcher<Row, Row>,
    records: Batcher<OrderId, Result<Option<Order>>>,
}

impl Sagas {
    /// Starts the batches.
    pub fn start(config: &Config, engine: &Arc<Engine<OrderSaga>>, life: &Lifecycle) -> Self {
        let limits = Limits { max_items: config.saga_batch, in_flight: config.saga_calls, ..Limits::default() };
        let calls = engine.context().calls.clone();
        let rows = {
            let store = calls.store.clone();
            Batcher::start("saga_rows", limits, life.tasks(), move |ids: Vec<OrderId>| {
                let store = store.clone();
                async move { each(&ids, store.load(&ids).await, |found, id| found.get(id).cloned()) }
            })
        };
        let changes = {
            let engine = engine.clone();
            Batcher::start("saga_changes", limits, life.tasks(), move |changes: Vec<Change<OrderSaga>>| {
                let engine = engine.clone();
                async move {
                    let count = changes.len();
                    match engine.apply(changes).await {
                        Ok(verdicts) => verdicts.into_iter().map(Ok).collect(),
                        Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
                    }
                }
            })
        };
        let drive = |name| {
            let engine = engine.clone();
            Batcher::start(name, limits, life.tasks(), move |rows| {
                let engine = engine.clone();
                async move { engine.drive(rows).await }
            })
        };
        let (forward, backward) = (drive("saga_forward"), drive("saga_backward"));
        let records = Batcher::start("saga_records", limits, life.tasks(), move |ids: Vec<OrderId>| {
            let calls = calls.clone();
            async move {
                match calls.orders(&ids).await {
                    Ok(orders) => orders.into_iter().map(Ok).collect(),
                    Err(error) => ids.iter().map(|_| Err(error.clone())).collect(),
                }
            }
        });
        Self { rows, changes, forward, backward, records }
    }

    /// An order's saga, when there is one.
    pub async fn get(&self, id: OrderId) -> Result<Option<Row>> {
        self.rows.submit(id).await?
    }

    /// Records that something happened to an order.
    pub async fn change(&self, change: Change<OrderSaga>) -> Result<Verdict> {
        self.changes.submit(change).await?
    }

    /// Does what is to be done for an order, and answers it as it is then. Where that cannot be done now, the order is
    /// answered unchanged and recovery does it. Going back does not wait behind going forward.
    pub async fn drive(&self, row: Row) -> Row {
        let work = State::parse(&row.state).map(OrderSaga::work);
        let batch = match work {
            None | Some(Work::Rest) => return row,
            Some(Work::Forward { .. }) => &self.forward,
            Some(Work::Compensate { .. }) => &self.backward,
        };
        batch.submit(row.clone()).await.unwrap_or(row)
    }

    /// The order as its buyer sees it: its record, unless that cannot be read or lags behind the saga.
    pub async fn view(&self, row: &Row) -> Order {
        match self.records.submit(row.order_id).await {
            Ok(Ok(Some(order))) if order.state() == order_state(row) || !tells_state(row) => order,
            _ => order_of(row),
        }
    }
}

/// One result per id, from one answer for all.
fn each<F, R>(ids: &[OrderId], found: Result<F>, read: impl Fn(&F, &OrderId) -> R) -> Vec<Result<R>> {
    match found {
        Ok(found) => ids.iter().map(|id| Ok(read(&found, id))).collect(),
        Err(error) => ids.iter().map(|_| Err(error.clone())).collect(),
    }
}
