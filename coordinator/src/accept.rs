//! Accepting orders: a permit, a durable message, an answer. In batches: one call takes the permits of all that came
//! together, one publishes those that are new; only what is not plainly a new order is looked at by itself.
//!
//! A retry of a request is the same order, whatever became of it and whatever was forgotten meanwhile (E2, E6): what the
//! permits do not remember, the sagas and the stream do. A publish whose outcome is unknown is not undone (E17): the
//! buyer tries again with the same request_id, and the sweep returns the permit when nothing was stored.
//!
//! That sweep goes by age. An order that took so long from permit to stream that the sweep may have come first is not
//! called PLACED before the funnel has locked or refused it: its buyer is asked to try again (E11).

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use mesh::{bus, lifecycle::Lifecycle};
use prost::Message as _;
use proto::{
    Error, FIRST_EPOCH, Money, OrderId, Reason,
    error::Result,
    internal::{
        AcceptOrder, Grant, LimitReached, OrderPlaced, acquire_result::Result as Acquired,
        lookup_result::Result as Looked,
    },
    subjects,
    v1::{Order, Sale},
};
use tokio::sync::Semaphore;
use tracing::{Instrument, Span};

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

/// See [`Accept::refused`]. One read's worth of a batch.
const SECOND_LOOKS: usize = 128;

/// Takes orders. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accept {
    calls: Calls,
    sagas: Sagas,
    lanes: Lanes,
    pace: Pace,
    /// Refused orders that may be looked up at once.
    second_looks: Arc<Semaphore>,
}

impl Accept {
    /// Begins to watch the funnel's backlog.
    pub fn start(config: &Config, calls: Calls, sagas: Sagas, lanes: Lanes, life: &Lifecycle) -> Self {
        let pace = Pace::start(calls.bus.clone(), config.accept_backlog.max(1), life);
        Self { calls, sagas, lanes, pace, second_looks: Arc::new(Semaphore::new(SECOND_LOOKS)) }
    }

    /// Accepts a batch, each order within its span: one answer for each, in order. `PLACED` is answered only for what is
    /// durable (I5).
    pub async fn accept(&self, items: &[AcceptOrder], spans: &[Span]) -> Vec<Result<Order>> {
        let mut answers: Vec<Option<Result<Order>>> = vec![None; items.len()];
        let mut wishes = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match Wanted::parse(item) {
                Ok(wanted) => wishes.push((index, wanted)),
                Err(error) => answers[index] = Some(Err(error)),
            }
        }
        let passed = self.pace.pass(wishes.len()).await;
        for (index, _) in wishes.drain(passed..) {
            let error = Error::new(Reason::Overloaded, "too many orders wait to be locked");
            answers[index] = Some(Err(error.with_retry_after(Duration::from_secs(1))));
        }

        let mut new = Vec::with_capacity(wishes.len());
        let mut others = Vec::new();
        for ((index, wanted), acquired) in self.acquire(wishes).await {
            match acquired {
                Ok(Acquired::Granted(grant)) if grant.fresh && grant.epoch <= FIRST_EPOCH => {
                    // Nothing of that epoch was ever lost: nobody has seen this order.
                    match Placing::new(wanted, &grant) {
                        Ok(placing) => new.push((index, placing)),
                        Err(error) => answers[index] = Some(Err(error)),
                    }
                }
                Ok(acquired) => others
                    .push(async move { (index, self.other(wanted, acquired).instrument(spans[index].clone()).await) }),
                Err(error) => answers[index] = Some(Err(error)),
            }
        }
        // The others may wait for a database; what is plainly new does not wait for them.
        let others = async {
            let mut late = Vec::new();
            let mut known = Vec::new();
            for (index, decided) in join_all(others).await {
                match decided {
                    Ok(Decided::Place(placing)) => late.push((index, placing)),
                    Ok(Decided::Known(order)) => known.push((index, Ok(order))),
                    Err(error) => known.push((index, Err(error))),
                }
            }
            known.extend(self.place(late, spans).await);
            known
        };
        let (placed, known) = futures::future::join(self.place(new, spans), others).await;
        for (index, answer) in placed.into_iter().chain(known) {
            answers[index] = Some(answer);
        }
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(Error::internal("no answer")))).collect()
    }

    /// Permits for all of these in one call.
    async fn acquire(&self, wishes: Vec<(usize, Wanted)>) -> Vec<((usize, Wanted), Result<Acquired>)> {
        if wishes.is_empty() {
            return Vec::new();
        }
        match self.calls.acquire(wishes.iter().map(|(_, wanted)| wanted.permit()).collect()).await {
            Ok(acquired) => wishes.into_iter().zip(acquired).collect(),
            Err(error) => wishes.into_iter().map(|wish| (wish, Err(error.clone()))).collect(),
        }
    }

    /// What is not plainly a new order.
    async fn other(&self, wanted: Wanted, acquired: Acquired) -> Result<Decided> {
        match acquired {
            Acquired::Granted(grant) => self.granted(wanted, &grant).await,
            Acquired::Released(()) => self.released(wanted).await,
            Acquired::LimitReached(limit) => self.at_limit(wanted, &limit).await,
            Acquired::Refused(refusal) => self.refused(&wanted, refusal.into()).await,
        }
    }

    async fn granted(&self, wanted: Wanted, grant: &Grant) -> Result<Decided> {
        let placing = Placing::new(wanted, grant)?;
        match self.sagas.get(placing.wanted.order_id).await? {
            Some(row) => self.known(&placing.wanted, &row).await,
            None => Ok(Decided::Place(placing)),
        }
    }

    /// The permit was given back: with its closed order, or because no message of it was ever seen. Then the funnel
    /// says so, and the buyer finds a rejected order instead of none.
    async fn released(&self, wanted: Wanted) -> Result<Decided> {
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(&wanted, &row).await;
        }
        let sale = self.calls.sale(&wanted.sale_id).await?;
        let placed = lapsed(&wanted, &sale, self.calls.clock.now_ms())?;
        Ok(Decided::Place(Placing { wanted, placed, kept_until_ms: 0 }))
    }

    /// A buyer with an open order gets that one back, not a refusal (E37).
    async fn at_limit(&self, wanted: Wanted, limit: &LimitReached) -> Result<Decided> {
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            return self.known(&wanted, &row).await;
        }
        let reached = || Error::new(Reason::PurchaseLimitReached, "the purchase limit of this sale is reached");
        let last: OrderId = limit.last_hold_id.parse().map_err(|_| reached())?;
        // A late capture's own hold is nobody's order: there is none by its id, and there shall be none.
        if last.is_further() {
            return Err(reached());
        }
        let is_theirs = |row: &Row| row.buyer == wanted.buyer && row.sale_id == wanted.sale_id;
        if let Some(row) = self.sagas.get(last).await? {
            let open = is_theirs(&row) && is_open(&row);
            return if open { Ok(Decided::Known(self.sagas.view(&row).await)) } else { Err(reached()) };
        }
        match self.calls.lookup(&[last]).await?.pop() {
            Some(Ok(Looked::Granted(grant))) => {
                let placed = Placed::from_grant(&grant)?;
                let theirs = placed.buyer == wanted.buyer && placed.sale_id == wanted.sale_id;
                if !theirs {
                    return Err(reached());
                }
                // Granted is not accepted: its own publish may have failed. It is PLACED once it is there (I5).
                let wanted = placed.wanted();
                Ok(Decided::Place(Placing { wanted, placed, kept_until_ms: grant.kept_until_ms }))
            }
            _ => Err(reached()),
        }
    }

    /// No permit. Who asks again for an order that is closed is answered with it, even when the permits forgot (E6).
    /// Only as far as that costs little: a storm of refusals must not become a storm of reads on the database that
    /// the funnel writes to. Holds that are open or sold outlive a loss of the permits, so no winner depends on this
    /// before a day after the last payment is due; then permits are dropped.
    async fn refused(&self, wanted: &Wanted, error: Error) -> Result<Decided> {
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
    async fn known(&self, wanted: &Wanted, row: &Row) -> Result<Decided> {
        wanted.check_same(&row.sale_id, row.quantity)?;
        Ok(Decided::Known(self.sagas.view(row).await))
    }

    /// Makes them durable, all in one call. Answers each by its place in the batch.
    async fn place(&self, orders: Vec<(usize, Placing)>, spans: &[Span]) -> Vec<(usize, Result<Order>)> {
        let mut answers = Vec::with_capacity(orders.len());
        let mut publishing = Vec::with_capacity(orders.len());
        let mut messages = Vec::with_capacity(orders.len());
        // A batch is mostly of one sale, and of one window.
        let mut opened = None;
        for (index, placing) in orders {
            let window = placing.placed.window();
            // A message that no lane waits for would have the sweep for its only deadline.
            if opened != Some(window)
                && let Err(error) = self.lanes.ensure(window).await
            {
                answers.push((index, Err(error)));
                continue;
            }
            opened = Some(window);
            let mut headers = bus::Headers::new();
            spans[index].in_scope(|| mesh::telemetry::inject_current(&mut headers));
            messages.push(bus::Message {
                subject: subjects::orders_placed(window),
                id: placing.placed.order_id.to_string(),
                headers,
                payload: placing.placed.message().encode_to_vec().into(),
            });
            publishing.push((index, placing));
        }
        if messages.is_empty() {
            return answers;
        }
        let published = self.calls.publish(subjects::ORDERS, messages).await;
        let mut before = Vec::new();
        let now = self.calls.clock.now_ms();
        for ((index, placing), published) in publishing.into_iter().zip(published) {
            match published {
                Ok(published) if published.duplicate => before.push(async move {
                    let stored = self.stored(&placing, published.sequence, now);
                    (index, stored.instrument(spans[index].clone()).await)
                }),
                Ok(_) => answers.push((index, placing.answer(&placing.placed, now))),
                Err(error) => answers.push((index, Err(unknown(&placing.placed, &error)))),
            }
        }
        answers.extend(join_all(before).await);
        answers
    }

    /// The message was there before: that one is the order.
    async fn stored(&self, placing: &Placing, sequence: u64, now: i64) -> Result<Order> {
        let Placing { wanted, placed, .. } = placing;
        if let Some(row) = self.sagas.get(wanted.order_id).await? {
            wanted.check_same(&row.sale_id, row.quantity)?;
            return Ok(self.sagas.view(&row).await);
        }
        let Some(message) = self.calls.bus.read(subjects::ORDERS, sequence).await? else {
            return placing.answer(placed, now);
        };
        let first =
            OrderPlaced::decode(message.payload).map_err(|e| Error::internal(format!("message {sequence}: {e}")))?;
        let first = Placed::from_message(&first)?;
        wanted.check_same(&first.sale_id, first.quantity)?;
        placing.answer(&first, now)
    }
}

/// What is to be done about a wish.
enum Decided {
    /// It is an order already, as it is now.
    Known(Order),
    /// It is to be made durable.
    Place(Placing),
}

/// An order on its way into the stream.
struct Placing {
    wanted: Wanted,
    placed: Placed,
    /// Until when being in the stream is as good as being locked; see [`Grant::kept_until_ms`].
    kept_until_ms: i64,
}

impl Placing {
    fn new(wanted: Wanted, grant: &Grant) -> Result<Self> {
        let placed = Placed::from_grant(grant)?;
        wanted.check_same(&placed.sale_id, placed.quantity)?;
        Ok(Self { wanted, placed, kept_until_ms: grant.kept_until_ms })
    }

    /// The order of the message that is in the stream at `now`, where it is sure to keep its permit.
    fn answer(&self, stored: &Placed, now: i64) -> Result<Order> {
        if now < self.kept_until_ms {
            return Ok(placed_order(stored));
        }
        metrics::counter!("seckill_placed_late_total").increment(1);
        Err(Error::new(
            Reason::Overloaded,
            "the order waits to be locked or refused: try again with the same request_id",
        )
        .with_retry_after(Duration::from_secs(1)))
    }
}

fn unknown(placed: &Placed, error: &bus::Error) -> Error {
    metrics::counter!("seckill_publish_unknown_total").increment(1);
    tracing::warn!(order = %placed.order_id, %error, "it is not known whether an order was accepted");
    Error::new(Reason::DependencyDown, "the order may or may not be placed: try again with the same request_id")
        .with_retry_after(Duration::from_secs(1))
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
