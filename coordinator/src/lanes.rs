//! Deadlines: every accepted order comes back when its payment is due, through its lane or, failing that, the sweep.
//!
//! A lane is a durable consumer over the orders of one payment window: first in is first due, so a bounded pending
//! window always has the next one due at its head. A delivery that is not due is sent back with what is left of its
//! time, computed from the order's own deadline. The deadline is a column too, and a sweep of it is the safety net for
//! when the bus is away (E18). Neither expires anything early (E33): the saga's deadline is checked on the locked row.
//!
//! The sweep keeps behind the lanes. In a storm of deadlines a lane is late because the databases are busy; a sweep that
//! took the same orders then would do the work twice, make it later, and have still more to sweep.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh::{
    bus::{Consumer, ConsumerSpec, Delivery, Settlement},
    lifecycle::Lifecycle,
};
use prost::Message as _;
use proto::{OrderId, error::Result, internal::OrderPlaced, subjects};
use tokio::sync::Semaphore;

use crate::{
    config::Config,
    domain::Placed,
    engine::{
        Named, Saga,
        runner::{Change, Engine, Guard},
    },
    order_saga::{Event, OrderSaga, State},
    store::{Patch, Rejected, Row, Verdict, Which},
};

/// How long a fetch waits for the first message.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// What a lane waits when it can do nothing.
const PAUSE: Duration = Duration::from_millis(500);
/// A due order that the funnel has not written yet is asked for again.
const FUNNEL_LAG: Duration = Duration::from_millis(200);
/// For how long it counts that a lane was late.
const LAG_KEPT_MS: i64 = 2_000;
/// So long after its deadline an order without a saga is left to the funnel alone: once it is written, the deadline
/// sweep finds it overdue.
const GIVE_UP_MS: i64 = 10 * 60 * 1000;

/// All lanes of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lanes(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    engine: Arc<Engine<OrderSaga>>,
    batch: usize,
    pending: usize,
    ack_wait: Duration,
    sweep_batch: u64,
    grace_ms: i64,
    /// Expired batches being given back; more wait where they are.
    releasing: Arc<Semaphore>,
    open: Mutex<HashSet<Duration>>,
    lag: Lag,
    /// Taken while a lane is opened, so that it is opened once.
    opening: tokio::sync::Mutex<()>,
    life: Lifecycle,
}

impl Lanes {
    /// No lane is open yet.
    pub fn new(config: &Config, engine: Arc<Engine<OrderSaga>>, life: &Lifecycle) -> Self {
        Self(Arc::new(Inner {
            engine,
            batch: config.lane_batch.max(1),
            pending: config.lane_pending.max(1),
            ack_wait: Duration::from_millis(config.ack_wait_ms),
            sweep_batch: config.deadline_sweep_batch.max(1),
            grace_ms: config.deadline_grace_ms,
            releasing: Arc::new(Semaphore::new(config.saga_compensations.max(1))),
            open: Mutex::default(),
            lag: Lag::default(),
            opening: tokio::sync::Mutex::default(),
            life: life.clone(),
        }))
    }

    /// Makes sure that a window has its lane, before the first message of it is published.
    pub async fn ensure(&self, window: Duration) -> Result<()> {
        if self.is_open(window) {
            return Ok(());
        }
        let _opening = self.0.opening.lock().await;
        if self.is_open(window) {
            return Ok(());
        }
        let spec = ConsumerSpec {
            stream: subjects::ORDERS,
            name: subjects::lane(window),
            filter: subjects::orders_placed(window),
            ack_wait: self.0.ack_wait,
            max_attempts: None,
            max_pending: self.0.pending,
        };
        let consumer = self.0.engine.context().calls.bus.consumer(spec).await?;
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).insert(window);
        tracing::info!(?window, "lane opened");
        let lane = Lane { lanes: self.clone(), consumer };
        self.0.life.spawn_essential("lane", async move { lane.work().await });
        Ok(())
    }

    fn is_open(&self, window: Duration) -> bool {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).contains(&window)
    }

    /// Opens the lanes that others have made.
    pub async fn discover(&self) {
        let consumers = match self.0.engine.context().calls.bus.consumers(subjects::ORDERS).await {
            Ok(consumers) => consumers,
            Err(error) => return tracing::warn!(%error, "lanes cannot be listed"),
        };
        for window in consumers.iter().filter_map(|name| subjects::lane_window(name)) {
            if let Err(error) = self.ensure(window).await {
                tracing::warn!(%error, ?window, "a lane cannot be opened");
            }
        }
    }

    /// Expires what no lane has seen, by the column.
    pub async fn sweep(&self) {
        let calls = &self.0.engine.context().calls;
        loop {
            let now = calls.clock.now_ms();
            let before = now - self.0.grace_ms - self.0.lag.at(now);
            let waiting = Which { kind: OrderSaga::KIND, states: vec![State::AwaitingPayment.name()] };
            let swept = match calls.store.overdue(waiting, before, self.0.sweep_batch).await {
                Ok(ids) if ids.is_empty() => return,
                Ok(ids) => ids,
                Err(error) => return tracing::warn!(%error, "deadlines cannot be swept"),
            };
            metrics::counter!("seckill_deadlines_swept_total").increment(swept.len() as u64);
            let full = swept.len() as u64 == self.0.sweep_batch;
            if let Err(error) = self.expire(swept).await {
                return tracing::warn!(%error, "swept deadlines could not be recorded");
            }
            if !full {
                return;
            }
        }
    }

    /// Moves what is due out of AWAITING_PAYMENT, and has it given back. Answers a verdict per id, in order, as soon as
    /// the expiry is recorded.
    async fn expire(&self, ids: Vec<OrderId>) -> Result<Vec<Verdict>> {
        let engine = &self.0.engine;
        let now = engine.context().calls.clock.now_ms();
        let change = |saga_id| Change {
            saga_id,
            event: Event::DeadlinePassed,
            patch: Patch::default(),
            guard: Guard::Due(now),
            seen: None,
        };
        // Not waiting behind buyers: the engine is asked itself.
        let verdicts = engine.apply(ids.into_iter().map(change).collect()).await?;
        let expired: Vec<Row> = verdicts.iter().filter_map(|v| v.as_ref().ok()).cloned().collect();
        if expired.is_empty() {
            return Ok(verdicts);
        }
        let late = metrics::histogram!("seckill_deadline_lateness_seconds");
        for row in &expired {
            late.record((now - row.expire_at).max(0) as f64 / 1000.0);
        }
        // Never closed. Waiting here holds the lane back while the databases catch up.
        if let Ok(permit) = self.0.releasing.clone().acquire_owned().await {
            let engine = engine.clone();
            self.0.life.spawn(async move {
                engine.drive(expired).await;
                drop(permit);
            });
        }
        Ok(verdicts)
    }
}

/// How late lanes are with orders that they have at hand, in milliseconds: the most that was noted in the last two seconds
/// ([`LAG_KEPT_MS`]).
#[derive(Debug, Default)]
struct Lag(Mutex<Option<Late>>);

#[derive(Clone, Copy, Debug)]
struct Late {
    by: i64,
    noted_at: i64,
}

impl Late {
    fn counts(self, now: i64) -> bool {
        now - self.noted_at < LAG_KEPT_MS
    }
}

impl Lag {
    fn note(&self, now: i64, by: i64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_none_or(|late| late.by <= by || !late.counts(now)) {
            *kept = Some(Late { by, noted_at: now });
        }
    }

    fn at(&self, now: i64) -> i64 {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.filter(|late| late.counts(now)).map_or(0, |late| late.by)
    }
}

struct Lane {
    lanes: Lanes,
    consumer: Arc<dyn Consumer>,
}

impl Lane {
    async fn work(&self) {
        let life = &self.lanes.0.life;
        loop {
            let fetched = tokio::select! {
                biased;
                () = life.stopping() => return,
                fetched = self.consumer.fetch(self.lanes.0.batch, FETCH_WAIT) => fetched,
            };
            let settled = match fetched {
                Ok(deliveries) if deliveries.is_empty() => continue,
                Ok(deliveries) => self.consumer.settle(self.settle(deliveries).await).await,
                Err(error) => Err(error),
            };
            if let Err(error) = settled {
                tracing::warn!(%error, "a lane makes no headway");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// What becomes of every delivery. What is not due costs no SQL.
    async fn settle(&self, deliveries: Vec<Delivery>) -> Vec<(Delivery, Settlement)> {
        let clock = &self.lanes.0.engine.context().calls.clock;
        let now = clock.now_ms();
        // With less than a batch at hand, a lane is late because the bus is, and the sweep is there for that.
        let is_full = deliveries.len() >= self.lanes.0.batch;
        let mut settled = Vec::with_capacity(deliveries.len());
        let mut due = Vec::new();
        for delivery in deliveries {
            match deadline(&delivery) {
                // The funnel makes a dead letter of it; here it only must not block the lane.
                None => settled.push((delivery, Settlement::Ack)),
                Some((_, expire_at)) if expire_at > now => {
                    settled.push((delivery, Settlement::Nak(clock.until(expire_at))));
                }
                Some((id, expire_at)) => due.push((delivery, id, expire_at)),
            }
        }
        if due.is_empty() {
            return settled;
        }
        match self.lanes.expire(due.iter().map(|(_, id, _)| *id).collect()).await {
            Ok(verdicts) => {
                // What others have expired, or nobody has written, says nothing of how late this lane is.
                let expired = due.iter().zip(&verdicts).filter(|(_, verdict)| verdict.is_ok());
                if let Some(late) = expired.map(|((.., expire_at), _)| now - expire_at).max().filter(|_| is_full) {
                    self.lanes.0.lag.note(clock.now_ms(), late);
                }
                let after = due.into_iter().zip(verdicts).map(|((delivery, _, expire_at), verdict)| {
                    let settlement = match verdict {
                        Err(Rejected { current: None }) if now - expire_at < GIVE_UP_MS => Settlement::Nak(FUNNEL_LAG),
                        // The same order, published twice, with a later deadline on its saga.
                        Err(Rejected { current: Some(row) }) if is_waiting(&row) => {
                            Settlement::Nak(clock.until(row.expire_at))
                        }
                        // Expired, or past it: whoever moved it finishes it.
                        _ => Settlement::Ack,
                    };
                    (delivery, settlement)
                });
                settled.extend(after);
            }
            Err(error) => {
                tracing::warn!(%error, "deadlines could not be recorded, they come again");
                settled.extend(due.into_iter().map(|(delivery, ..)| (delivery, Settlement::Nak(PAUSE))));
            }
        }
        settled
    }
}

fn is_waiting(row: &Row) -> bool {
    row.state == State::AwaitingPayment.name()
}

fn deadline(delivery: &Delivery) -> Option<(OrderId, i64)> {
    let message = OrderPlaced::decode(delivery.payload.clone()).ok()?;
    let placed = Placed::from_message(&message).ok()?;
    Some((placed.order_id, placed.expire_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sweep_keeps_behind_the_latest_lane_until_it_has_caught_up() {
        let lag = Lag::default();
        assert_eq!(lag.at(0), 0);
        lag.note(1_000, 800);
        // The other lane is on time.
        lag.note(1_100, 20);
        assert_eq!(lag.at(1_100), 800);
        lag.note(1_200, 900);
        assert_eq!(lag.at(1_200 + LAG_KEPT_MS - 1), 900);
        // Nobody was as late since.
        lag.note(1_200 + LAG_KEPT_MS, 30);
        assert_eq!(lag.at(1_200 + LAG_KEPT_MS), 30);
        assert_eq!(lag.at(1_200 + 2 * LAG_KEPT_MS), 0, "a lane that is silent holds nothing back");
    }
}
