//! Accepting orders: a permit, a durable message, an answer.
//!
//! A retry of a request is the same order, whatever became of it and whatever was forgotten meanwhile (E2, E6): what the
//! permits do not remember, the sagas and the stream do. A publish whose outcome is unknown is not undone (E17): the
//! buyer tries again with the same request_id, and the sweep returns the permit when nothing was stored.

use std::{sync::Arc, time::Duration};

use mesh::{
    batch::{Batcher, Limits},
    bus,
    lifecycle::Lifecycle,
};
use prost::Message as _;
use proto::{
    Error, FIRST_EPOCH, Money, OrderId, Reason,
    error::Result,
    internal::{
        AcceptOrder, AcquirePermit, Grant, LimitReached, OrderPlaced, acquire_result::Result as Acquired,
        lookup_result::Result as Looked,
    },
    subjects,
    v1::{Order, Sale},
};
use tokio::sync::Semaphore;

use crate::{
    calls::{Calls, is_fault},
    config::Config,
    domain::{Placed, Wanted, is_open},
    lanes::Lanes,
    pace::Pace,
    sagas::Sagas,
    store::Row,
    wire::placed_order,
};

/// How long a granted order may be without a saga: longer than any backlog of the funnel that is not an outage.
const UNWRITTEN: Duration = Duration::from_secs(600);

/// See [`Accept::refused`]. One read's worth of a batch.
const SECOND_LOOKS: usize = 128;

/// Takes orders. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accept {
    calls: Calls,
    sagas: Sagas,
    lanes: Lanes,
    permits: Batcher<AcquirePermit, Result<Acquired>>,
    messages: Batcher<bus::Message, Result<bus::Published, bus::Error>>,
    pace: Pace,
    /// Refused orders that may be looked up at once.
    second_looks: Arc<Semaphore>,
}

impl Accept {
    /// Starts the batches.
    pub fn start(config: &Config, calls: Calls, sagas: Sagas, lanes: Lanes, life: &Lifecycle) -> Self {
        let limits = Limits { max_items: config.saga_batch, in_flight: config.accept_calls, ..Limits::default() };
        let permits = {
            let calls = calls.clone();
            Batcher::start("permits", limits, life.tasks(), move |items: Vec<AcquirePermit>| {
                let calls = calls.clone();
                async move {
                    let count = items.len();
                    match calls.acquire(items).await {
                        Ok(results) => results,
                        Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
                    }
                }
            })
        };
        let messages = {
            let calls = calls.clone();
            Batcher::start("orders_placed", limits, life.tasks(), move |messages: Vec<bus::Message>| {
                let calls = calls.clone();
                async move { calls.publish(subjects::ORDERS, messages).await }
            })
        };
        let pace = Pace::start(calls.bus.clone(), config.accept_backlog.max(1), life);
        Self { calls, sagas, lanes, permits, messages, pace, second_looks: Arc::new(Semaphore::new(SECOND_LOOKS)) }
    }

    /// Accepts one order. `PLACED` is answered only for what is durable (I5).
    pub async fn accept(&self, item: &AcceptOrder) -> Result<Order> {
        let wanted = Wanted::parse(item)?;
        self.pace.pass().await?;
        match self.permits.submit(wanted.permit()).await?? {
            Acquired::Granted(grant) => self.granted(&wanted, &grant).await,
            Acquired::Released(()) => self.released(&wanted).await,
            Acquired::LimitReached(limit) => self.at_limit(&wanted, &limit).await,
            Acquired::Refused(refusal) => self.refused(&wanted, refusal.into()).await,
        }
    }

    async fn granted(&self, wanted: &Wanted, grant: &Grant) -> Result<Order> {
        let placed = Placed::from_grant(grant)?;
        wanted.check_same(&placed.sale_id, placed.quantity)?;
        // Nothing of that epoch was ever lost.
        let nobody_has_seen_it = grant.fresh && grant.epoch <= FIRST_EPOCH;
        if !nobody_has_seen_it && let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(wanted, &row).await;
        }
        self.place(wanted, &placed).await
    }

    /// The permit was given back: with its closed order, or because no message of it was ever seen. Then the funnel
    /// says so, and the buyer finds a rejected order instead of none.
    async fn released(&self, wanted: &Wanted) -> Result<Order> {
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(wanted, &row).await;
        }
        let sale = self.calls.sale(&wanted.sale_id).await?;
        let placed = lapsed(wanted, &sale, self.calls.clock.now_ms())?;
        self.place(wanted, &placed).await
    }

    /// A buyer with an open order gets that one back, not a refusal (E37).
    async fn at_limit(&self, wanted: &Wanted, limit: &LimitReached) -> Result<Order> {
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(wanted, &row).await;
        }
        let reached = || Error::new(Reason::PurchaseLimitReached, "the purchase limit of this sale is reached");
        let last: OrderId = limit.last_hold_id.parse().map_err(|_| reached())?;
        let is_theirs = |row: &Row| row.buyer == wanted.buyer && row.sale_id == wanted.sale_id;
        if let Some(row) = self.sagas.get(last).await? {
            return if is_theirs(&row) && is_open(&row) { Ok(self.sagas.view(&row).await) } else { Err(reached()) };
        }
        match self.calls.lookup(&[last]).await?.pop() {
            Some(Ok(Looked::Granted(grant))) => {
                // An order without a saga is a young one. An old grant without a saga is a late capture's own hold,
                // which is nobody's order.
                let young = self.calls.clock.now_ms() < grant.granted_at_ms + UNWRITTEN.as_millis() as i64;
                let placed = Placed::from_grant(&grant)?;
                let theirs = placed.buyer == wanted.buyer && placed.sale_id == wanted.sale_id;
                if !theirs || !young {
                    return Err(reached());
                }
                // Granted is not accepted: its own publish may have failed. It is PLACED once it is there (I5).
                self.place(&placed.wanted(), &placed).await
            }
            _ => Err(reached()),
        }
    }

    /// No permit. Who asks again for an order that is closed is answered with it, even when the permits forgot (E6).
    /// Only as far as that costs little: a storm of refusals must not become a storm of reads on the database that
    /// the funnel writes to. Holds that are open or sold outlive a loss of the permits, so no winner depends on this.
    async fn refused(&self, wanted: &Wanted, error: Error) -> Result<Order> {
        if is_fault(&error) {
            return Err(error);
        }
        let Ok(_look) = self.second_looks.try_acquire() else { return Err(error) };
        match self.sagas.get(wanted.order_id).await {
            Ok(Some(row)) => self.known(wanted, &row).await,
            Ok(None) => Err(error),
            Err(unread) => {
                tracing::debug!(error = %unread, "a refused order was not looked up");
                Err(error)
            }
        }
    }

    /// The order as it is now.
    async fn known(&self, wanted: &Wanted, row: &Row) -> Result<Order> {
        wanted.check_same(&row.sale_id, row.quantity)?;
        Ok(self.sagas.view(row).await)
    }

    /// Makes it durable.
    async fn place(&self, wanted: &Wanted, placed: &Placed) -> Result<Order> {
        let window = placed.window();
        // A message that no lane waits for would have the sweep for its only deadline.
        self.lanes.ensure(window).await?;
        let mut headers = bus::Headers::new();
        mesh::telemetry::inject_current(&mut headers);
        let message = bus::Message {
            subject: subjects::orders_placed(window),
            id: placed.order_id.to_string(),
            headers,
            payload: placed.message().encode_to_vec().into(),
        };
        let published = self.messages.submit(message).await?.map_err(|error| {
            metrics::counter!("seckill_publish_unknown_total").increment(1);
            tracing::warn!(order = %placed.order_id, %error, "it is not known whether an order was accepted");
            Error::new(Reason::DependencyDown, "the order may or may not be placed: try again with the same request_id")
                .with_retry_after(Duration::from_secs(1))
        })?;
        if published.duplicate {
            self.stored(wanted, placed, published.sequence).await
        } else {
            Ok(placed_order(placed))
        }
    }

    /// The message was there before: that one is the order.
    async fn stored(&self, wanted: &Wanted, placed: &Placed, sequence: u64) -> Result<Order> {
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(wanted, &row).await;
        }
        let Some(message) = self.calls.bus.read(subjects::ORDERS, sequence).await? else {
            return Ok(placed_order(placed));
        };
        let first =
            OrderPlaced::decode(message.payload).map_err(|e| Error::internal(format!("message {sequence}: {e}")))?;
        let first = Placed::from_message(&first)?;
        wanted.check_same(&first.sale_id, first.quantity)?;
        Ok(placed_order(&first))
    }
}

/// An order whose permit is gone for good: the ledger's tombstone will refuse it.
fn lapsed(wanted: &Wanted, sale: &Sale, now: i64) -> Result<Placed> {
    let price = sale.price.as_ref().ok_or_else(|| Error::internal("a sale without a price"))?;
    let window = sale.payment_window.as_ref().map_or(0, |w| w.seconds * 1_000 + i64::from(w.nanos) / 1_000_000);
    Ok(Placed {
        order_id: wanted.order_id,
        sale_id: wanted.sale_id.clone(),
        buyer: wanted.buyer.clone(),
        quantity: wanted.quantity,
        amount: Money::parse("price", price)?.times(wanted.quantity)?,
        grant_epoch: 0,
        create_at: now,
        expire_at: now.saturating_add(window),
    })
}
