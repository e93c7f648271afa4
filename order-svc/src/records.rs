//! The use of order records: calls that come together share a transaction, and every change is signalled after it.

use std::{collections::HashMap, sync::Arc};

use mesh::{
    batch::{Batcher, Limits},
    lifecycle::Lifecycle,
};
use proto::{Error, OrderId, error::Result};

use crate::{
    config::Config,
    domain::{Record, Transition},
    signals::Signals,
    store::{Page, Store},
};

/// One call's items, and what became of each.
type Calls<T, R> = Batcher<Vec<T>, Result<R>>;

/// Order records, batched. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    create: Calls<Record, ()>,
    transition: Calls<Transition, Vec<Result<()>>>,
    get: Calls<OrderId, Vec<Option<Record>>>,
    store: Arc<dyn Store>,
}

impl Records {
    /// Starts the batches.
    pub(crate) fn start(config: &Config, store: Arc<dyn Store>, signals: Signals, life: &Lifecycle) -> Self {
        // Calls, not records: the funnel's calls are large already.
        let limits = Limits {
            max_items: config.order_batch_calls,
            in_flight: config.order_writers,
            queue: 4_096,
            ..Limits::default()
        };
        let create = {
            let (store, signals) = (store.clone(), signals.clone());
            Batcher::start("order_create", limits, life.tasks(), move |calls| {
                create(store.clone(), signals.clone(), calls)
            })
        };
        let transition = {
            let store = store.clone();
            Batcher::start("order_transition", limits, life.tasks(), move |calls| {
                transition(store.clone(), signals.clone(), calls)
            })
        };
        let get = {
            let store = store.clone();
            let limits = Limits { max_items: 512, ..limits };
            Batcher::start("order_get", limits, life.tasks(), move |calls| get(store.clone(), calls))
        };
        Self { create, transition, get, store }
    }

    /// Writes those that are not there yet.
    pub(crate) async fn create(&self, records: Vec<Record>) -> Result<()> {
        self.create.submit(records).await?
    }

    /// Moves records; one result each, in order.
    pub(crate) async fn transition(&self, transitions: Vec<Transition>) -> Result<Vec<Result<()>>> {
        self.transition.submit(transitions).await?
    }

    /// Reads records; one result each, in order.
    pub(crate) async fn get(&self, order_ids: Vec<OrderId>) -> Result<Vec<Option<Record>>> {
        self.get.submit(order_ids).await?
    }

    /// Reads a page of one buyer's.
    pub(crate) async fn list(&self, page: Page) -> Result<Vec<Record>> {
        self.store.list(page).await
    }
}

async fn create(store: Arc<dyn Store>, signals: Signals, calls: Vec<Vec<Record>>) -> Vec<Result<()>> {
    let count = calls.len();
    match store.create(calls.into_iter().flatten().collect()).await {
        Ok(created) => {
            count_states(&created);
            signals.send(created);
            vec![Ok(()); count]
        }
        Err(error) => failed(error, count),
    }
}

async fn transition(
    store: Arc<dyn Store>,
    signals: Signals,
    calls: Vec<Vec<Transition>>,
) -> Vec<Result<Vec<Result<()>>>> {
    let sizes: Vec<_> = calls.iter().map(Vec::len).collect();
    match store.transition(calls.into_iter().flatten().collect()).await {
        Ok(transitioned) => {
            count_states(&transitioned.moved);
            signals.send(transitioned.moved);
            let mut results = transitioned.results.into_iter();
            sizes.into_iter().map(|size| Ok(results.by_ref().take(size).collect())).collect()
        }
        Err(error) => failed(error, sizes.len()),
    }
}

async fn get(store: Arc<dyn Store>, calls: Vec<Vec<OrderId>>) -> Vec<Result<Vec<Option<Record>>>> {
    let records: HashMap<_, _> = match store.get(calls.iter().flatten().copied().collect()).await {
        Ok(records) => records,
        Err(error) => return failed(error, calls.len()),
    };
    calls.into_iter().map(|ids| Ok(ids.iter().map(|id| records.get(id).cloned()).collect())).collect()
}

/// One transaction, one outcome: every call of a batch that failed is told so, and has changed nothing.
fn failed<T>(error: Error, calls: usize) -> Vec<Result<T>> {
    tracing::warn!(%error, calls, "a batch of order records failed");
    (0..calls).map(|_| Err(error.clone())).collect()
}

fn count_states(records: &[Record]) {
    for record in records {
        metrics::counter!("seckill_order_states_total", "state" => record.state.as_str_name()).increment(1);
    }
}
