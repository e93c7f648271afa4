//! Tells whoever watches that orders changed: at most once, best effort, never in anybody's way.
//!
//! A change that is lost here is found by reading the order; the row is the truth.

use bytes::Bytes;
use mesh::{bus::SharedBus, lifecycle::Lifecycle};
use prost::Message;
use proto::{internal::OrdersChanged, subjects::ORDERS_CHANGED};
use tokio::sync::mpsc;

use crate::{domain::Record, wire};

/// Orders of one signal: about 50 KiB, far below what a bus takes as one message.
const ORDERS: usize = 256;

/// Orders waiting to be signalled. When the bus is away longer than that lasts, watchers fall back on reading.
const QUEUE: usize = 65_536;

/// The way to those who watch. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    queue: mpsc::Sender<Record>,
}

impl Signals {
    /// Sends until the soft stop.
    pub(crate) fn start(bus: SharedBus, life: &Lifecycle) -> Self {
        let (queue, mut changed) = mpsc::channel(QUEUE);
        let stopping = life.soft_token();
        // Ends with the service in it, which in one process may go before this role is told to stop.
        life.spawn(async move {
            let mut records: Vec<Record> = Vec::with_capacity(ORDERS);
            loop {
                tokio::select! {
                    // What is queued goes out before the stop is looked at.
                    biased;
                    received = changed.recv_many(&mut records, ORDERS) => if received == 0 { return },
                    () = stopping.cancelled() => return,
                }
                let changed = OrdersChanged { orders: records.drain(..).map(|r| wire::order(&r)).collect() };
                if let Err(error) = bus.signal(ORDERS_CHANGED, Bytes::from(changed.encode_to_vec())).await {
                    metrics::counter!("seckill_order_signals_lost_total").increment(changed.orders.len() as u64);
                    tracing::warn!(%error, orders = changed.orders.len(), "changed orders were not signalled");
                }
            }
        });
        Self { queue }
    }

    /// Queues what changed.
    pub(crate) fn send(&self, changed: Vec<Record>) {
        let mut lost = 0;
        for record in changed {
            if self.queue.try_send(record).is_err() {
                lost += 1;
            }
        }
        if lost > 0 {
            metrics::counter!("seckill_order_signals_lost_total").increment(lost);
            tracing::warn!(orders = lost, "changed orders were not signalled: too many are waiting");
        }
    }
}
