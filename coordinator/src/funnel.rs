//! The funnel: accepted orders become locked ones, in batches, at the rate the databases like.
//!
//! For a batch: one call locks it in the ledger, one writes its order records, one transaction its sagas; then its
//! messages are acknowledged. Whatever dies in between, the messages come again, and every part answers the same again
//! (I5, I10). A message that can never become an order goes to the dead letters at once and blocks nobody (E20); a
//! dependency that is away is nobody's fault, and is waited for without end.
//!
//! A batch costs much and an order in it little. So a second one is begun beside the first only where the first was large:
//! in a rush they overlap, and when it is quieter all that came during one goes together in the next, but does not wait for
//! it longer than buyers would mind.

use std::{collections::HashSet, sync::Arc, time::Duration};

use mesh::{
    batch::Limits,
    bus::{self, Consumer, ConsumerSpec, Delivery, Settlement},
    lifecycle::Lifecycle,
};
use prost::Message as _;
use proto::{Error, internal::OrderPlaced, subjects};
use tokio::sync::{Mutex, MutexGuard};

use crate::{
    config::Config,
    domain::Placed,
    engine::{
        Saga,
        plan::Outcome,
        runner::{Engine, count},
    },
    order_saga::{Event, OrderSaga},
    store::{Entry, Patch, Row},
    wire::traceparent,
};

/// Delivered and not settled, at most.
const MAX_PENDING: usize = 10_000;
/// How long a fetch waits for the first message.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// Beside a small batch another is begun after this. Embedded, most are done by then; on servers they are not, and whoever
/// came just after one was fetched would wait for all of it and then for its own.
const LONGEST_TURN: Duration = Duration::from_millis(30);
/// An order that cannot be dealt with is told of after so many attempts, and again after as many: a minute or two each.
const TOLD_EVERY: u32 = 32;

/// Opens the funnel's consumer and starts its workers.
pub async fn start(config: &Config, engine: Arc<Engine<OrderSaga>>, life: &Lifecycle) -> Result<(), Error> {
    let spec = ConsumerSpec {
        stream: subjects::ORDERS,
        name: subjects::FUNNEL.to_owned(),
        filter: subjects::ORDERS_PLACED_ALL.to_owned(),
        ack_wait: Duration::from_millis(config.ack_wait_ms),
        // A database that is away for an hour must not turn accepted orders into dead letters.
        max_attempts: None,
        // Room for orders that wait for their sale's permits to be rebuilt, beside those of other sales.
        max_pending: MAX_PENDING.max(config.funnel_batch * (config.funnel_workers + 1)),
    };
    let consumer = engine.context().calls.bus.consumer(spec).await?;
    let turn = Arc::new(Mutex::new(()));
    let max_items = config.funnel_batch.max(1);
    let limits =
        Limits { max_items, overlap_from: max_items.div_ceil(2), longest_turn: LONGEST_TURN, ..Limits::DEFAULT };
    for _ in 0..config.funnel_workers {
        let funnel = Funnel {
            consumer: consumer.clone(),
            engine: engine.clone(),
            turn: turn.clone(),
            limits,
            retry: Duration::from_millis(config.funnel_retry_ms),
        };
        let stopping = life.clone();
        life.spawn_essential("funnel", async move { funnel.work(&stopping).await });
    }
    Ok(())
}

struct Funnel {
    consumer: Arc<dyn Consumer>,
    engine: Arc<Engine<OrderSaga>>,
    /// To fetch.
    turn: Arc<Mutex<()>>,
    limits: Limits,
    retry: Duration,
}

impl Funnel {
    async fn work(&self, life: &Lifecycle) {
        loop {
            let (turn, fetched) = tokio::select! {
                biased;
                () = life.stopping() => return,
                fetched = self.fetch() => fetched,
            };
            match fetched {
                Ok(deliveries) if deliveries.is_empty() => {}
                Ok(deliveries) => {
                    self.limits.in_turn(turn, deliveries.len(), self.deal_with(deliveries)).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "the funnel cannot fetch");
                    tokio::time::sleep(self.retry).await;
                }
            }
        }
    }

    /// What comes next, and the turn that nobody else fetches in.
    async fn fetch(&self) -> (MutexGuard<'_, ()>, Result<Vec<Delivery>, bus::Error>) {
        let turn = self.turn.lock().await;
        (turn, self.consumer.fetch(self.limits.max_items, FETCH_WAIT).await)
    }

    async fn deal_with(&self, deliveries: Vec<Delivery>) {
        let settlements = self.settle(deliveries).await;
        if let Err(error) = self.consumer.settle(settlements).await {
            tracing::warn!(%error, "a funnelled batch could not be settled, it comes again");
        }
    }

    /// What becomes of every delivery.
    async fn settle(&self, deliveries: Vec<Delivery>) -> Vec<(Delivery, Settlement)> {
        let span = tracing::info_span!("funnel", items = deliveries.len());
        let mut rows = Vec::with_capacity(deliveries.len());
        let mut wanted = HashSet::with_capacity(deliveries.len());
        let mut again = Vec::new();
        let read: Vec<_> = deliveries
            .into_iter()
            .map(|delivery| {
                let placed = read(&delivery);
                if let Ok(placed) = &placed {
                    let traceparent = traceparent(&delivery.headers);
                    mesh::telemetry::link(&span, &traceparent);
                    // The same order twice in one batch: the first one counts.
                    if wanted.insert(placed.order_id) {
                        rows.push(placed.row(traceparent));
                        if delivery.attempt > 1 {
                            again.push(placed.order_id);
                        }
                    }
                }
                (delivery, placed)
            })
            .collect();
        let locked = tracing::Instrument::instrument(self.lock(rows, &again), span).await;
        let failed = match &locked {
            Ok(failed) => failed.clone(),
            Err(error) => {
                tracing::warn!(%error, orders = wanted.len(), "a batch could not be locked, it comes again");
                wanted
            }
        };
        let settlement = |delivery: &Delivery, placed: Result<Placed, Error>| match placed {
            Err(error) => {
                tracing::error!(sequence = delivery.sequence, id = delivery.id, %error, "a message that is no order");
                Settlement::DeadLetter(error.to_string())
            }
            Ok(placed) if failed.contains(&placed.order_id) => {
                if delivery.attempt.is_multiple_of(TOLD_EVERY) {
                    let (order, attempt) = (placed.order_id, delivery.attempt);
                    tracing::error!(%order, attempt, "an order is neither locked nor refused, it is tried on");
                }
                let doublings = delivery.attempt.saturating_sub(1).min(5);
                Settlement::Nak(self.retry * (1 << doublings))
            }
            Ok(_) => Settlement::Ack,
        };
        read.into_iter()
            .map(|(delivery, placed)| {
                let settlement = settlement(&delivery, placed);
                (delivery, settlement)
            })
            .collect()
    }

    /// Locks, records and writes the orders that have no saga yet. Answers those that must come again.
    ///
    /// Only what was delivered before (`again`) is looked for among the sagas, to spare its repetition: every step is
    /// idempotent by the order's id, so an order that was published twice passes through here and changes nothing
    /// (I10).
    async fn lock(&self, mut rows: Vec<Row>, again: &[proto::OrderId]) -> Result<HashSet<proto::OrderId>, Error> {
        let context = self.engine.context();
        if !again.is_empty() {
            let known = context.calls.store.load(again).await?;
            rows.retain(|row| !known.contains_key(&row.saga_id));
        }
        let mut failed = HashSet::new();
        if rows.is_empty() {
            return Ok(failed);
        }

        let outcomes = self.engine.plan().action("lock").run(context, &rows).await;
        let mut decided: Vec<(Row, Entry)> = Vec::with_capacity(rows.len());
        for (row, outcome) in rows.iter().zip(outcomes) {
            match self.decide(row, outcome) {
                Ok(taken) => decided.push(taken),
                Err(error) => {
                    tracing::debug!(order = %row.saga_id, %error, "an order could not be locked yet");
                    failed.insert(row.saga_id);
                }
            }
        }

        // Before the sagas: where a saga is, its record is.
        let locked: Vec<Row> = decided.iter().map(|(row, _)| row.clone()).collect();
        let recorded = self.engine.plan().action("record").run(context, &locked).await;
        let mut written = Vec::with_capacity(decided.len());
        for ((row, entry), outcome) in decided.into_iter().zip(recorded) {
            if matches!(outcome, Outcome::Done(_)) {
                written.push((row, entry));
            } else {
                tracing::debug!(order = %row.saga_id, ?outcome, "an order could not be recorded yet");
                failed.insert(row.saga_id);
            }
        }

        context.calls.store.insert(written.clone()).await?;
        let now = context.calls.clock.now_ms();
        let waited = metrics::histogram!("seckill_placed_to_locked_seconds");
        for (row, _) in &written {
            waited.record((now - row.create_at).max(0) as f64 / 1000.0);
        }
        count::<OrderSaga>(written.iter().map(|(row, entry)| (entry.from.as_str(), row.state.as_str())));
        Ok(failed)
    }

    fn decide(&self, row: &Row, outcome: Outcome<Event>) -> Result<(Row, Entry), Error> {
        let (event, patch): (Event, Patch) = match outcome {
            Outcome::Done(patch) => (Event::Locked, patch),
            Outcome::Refused(event, patch) => (event, patch),
            Outcome::InProgress => return Err(Error::dependency("the stock service", "lock in progress")),
            Outcome::Unknown(error) => return Err(error),
        };
        let illegal = || Error::internal(format!("{event:?} is not legal in {:?}", OrderSaga::START));
        self.engine.take(row, event, &patch).ok_or_else(illegal)
    }
}

fn read(delivery: &Delivery) -> Result<Placed, Error> {
    let message = OrderPlaced::decode(delivery.payload.clone())
        .map_err(|error| Error::invalid("payload", format!("is no OrderPlaced: {error}")))?;
    Placed::from_message(&message)
}
