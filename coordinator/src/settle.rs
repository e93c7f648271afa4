//! The settler: charges that come to an outcome by themselves, as payment-svc announces them.
//!
//! A buyer's own call learns of its charge sooner; an attempt that is seconds old is therefore left to it for a moment.
//! Announcements may come twice, late or out of order (I10): the saga's state decides what they still mean.

use std::{sync::Arc, time::Duration};

use mesh::{
    bus::{Consumer, ConsumerSpec, Delivery, Settlement},
    lifecycle::Lifecycle,
};
use prost::Message as _;
use proto::{
    OrderId,
    error::Result,
    internal::{PaymentSettled, PaymentState, PaymentStatus},
    subjects,
};

use crate::{
    config::Config,
    engine::{
        Named,
        runner::{Change, Engine, Guard},
    },
    order_saga::{Event, OrderSaga, State},
    steps::money,
    store::{Patch, Row},
};

/// How long a fetch waits for the first message.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// Announcements in one go.
const BATCH: usize = 2_048;
/// Announcements delivered and not settled, those left to their buyers included.
const MAX_PENDING: usize = 10_000;
/// Between two rounds. Most announcements are of charges whose buyer's own call is just recording them: a moment later
/// they mean nothing any more, and are read once instead of once more after a NAK.
const PACE: Duration = Duration::from_millis(200);
/// What could not be recorded is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// A payment without a saga means that somebody restored an old database: keep it, look seldom.
const UNKNOWN: Duration = Duration::from_secs(10);

/// Opens the consumer and starts its loop.
pub async fn start(config: &Config, engine: Arc<Engine<OrderSaga>>, life: &Lifecycle) -> Result<()> {
    let spec = ConsumerSpec {
        stream: subjects::PAYMENTS,
        name: subjects::SETTLER.to_owned(),
        filter: subjects::PAYMENTS_SETTLED.to_owned(),
        ack_wait: Duration::from_millis(config.ack_wait_ms),
        max_attempts: None,
        max_pending: MAX_PENDING,
    };
    let consumer = engine.context().calls.bus.consumer(spec).await?;
    let settler = Settler { engine, consumer, grace_ms: config.settle_grace_ms };
    let stopping = life.clone();
    life.spawn_essential("settler", async move { settler.work(&stopping).await });
    Ok(())
}

struct Settler {
    engine: Arc<Engine<OrderSaga>>,
    consumer: Arc<dyn Consumer>,
    grace_ms: i64,
}

/// What an announcement means for its saga.
#[derive(Debug, PartialEq)]
pub enum Meaning {
    /// Nothing any more.
    Nothing,
    /// The buyer's own call is at it: look again after this.
    Later(Duration),
    /// This.
    Happened(Event, Patch, Guard),
}

impl Settler {
    async fn work(&self, life: &Lifecycle) {
        loop {
            let fetched = tokio::select! {
                biased;
                () = life.stopping() => return,
                fetched = self.consumer.fetch(BATCH, FETCH_WAIT) => fetched,
            };
            let settled = match fetched {
                Ok(deliveries) if deliveries.is_empty() => continue,
                Ok(deliveries) => {
                    let (settlements, moved) = self.settle(deliveries).await;
                    let settled = self.consumer.settle(settlements).await;
                    // Recorded already: should we die now, recovery goes on.
                    self.engine.drive(moved).await;
                    settled
                }
                Err(error) => Err(error),
            };
            let pause = match settled {
                Ok(()) => PACE,
                Err(error) => {
                    tracing::warn!(%error, "the settler makes no headway");
                    PAUSE
                }
            };
            tokio::select! {
                biased;
                () = life.stopping() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// What becomes of every delivery, and the sagas that moved.
    async fn settle(&self, deliveries: Vec<Delivery>) -> (Vec<(Delivery, Settlement)>, Vec<Row>) {
        let mut settled = Vec::with_capacity(deliveries.len());
        let mut announced = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            match read(&delivery) {
                Ok((id, status)) => announced.push((delivery, id, status)),
                Err(why) => {
                    tracing::error!(sequence = delivery.sequence, why, "a message that is no payment");
                    settled.push((delivery, Settlement::DeadLetter(why)));
                }
            }
        }
        let again = |announced: Vec<(Delivery, OrderId, PaymentStatus)>| {
            announced.into_iter().map(|(delivery, ..)| (delivery, Settlement::Nak(PAUSE)))
        };
        let calls = &self.engine.context().calls;
        let ids: Vec<OrderId> = announced.iter().map(|(_, id, _)| *id).collect();
        let sagas = match calls.store.load(&ids).await {
            Ok(sagas) => sagas,
            Err(error) => {
                tracing::warn!(%error, "payments cannot be matched to sagas");
                settled.extend(again(announced));
                return (settled, Vec::new());
            }
        };
        let now = calls.clock.now_ms();
        let mut changes = Vec::new();
        let mut changing = Vec::new();
        for (delivery, id, status) in announced {
            let seen = sagas.get(&id);
            let meaning = seen.map(|row| meaning(row, &status, now, self.grace_ms));
            match meaning {
                None => {
                    tracing::error!(order = %id, state = status.state().as_str_name(), "a payment of an order without a saga");
                    settled.push((delivery, Settlement::Nak(UNKNOWN)));
                }
                Some(Meaning::Nothing) => settled.push((delivery, Settlement::Ack)),
                Some(Meaning::Later(delay)) => settled.push((delivery, Settlement::Nak(delay))),
                Some(Meaning::Happened(event, patch, guard)) => {
                    changes.push(Change { saga_id: id, event, patch, guard, seen: seen.cloned() });
                    changing.push((delivery, id, status));
                }
            }
        }
        match self.engine.apply(changes).await {
            Ok(verdicts) => {
                let moved: Vec<Row> = verdicts.iter().filter_map(|v| v.as_ref().ok()).cloned().collect();
                // Who was refused has moved on meanwhile: look again at what it is now.
                settled.extend(changing.into_iter().zip(verdicts).map(|((delivery, ..), verdict)| match verdict {
                    Ok(_) => (delivery, Settlement::Ack),
                    Err(_) => (delivery, Settlement::Nak(PAUSE)),
                }));
                (settled, moved)
            }
            Err(error) => {
                tracing::warn!(%error, "payments could not be recorded, they come again");
                settled.extend(again(changing));
                (settled, Vec::new())
            }
        }
    }
}

/// Decides what an announcement means for its saga. Pure.
pub fn meaning(row: &Row, status: &PaymentStatus, now: i64, grace_ms: i64) -> Meaning {
    let Some(state) = State::parse(&row.state) else { return Meaning::Later(UNKNOWN) };
    let young = row.update_at.saturating_add(grace_ms) - now;
    match status.state() {
        PaymentState::Captured => match state {
            State::Paying if young > 0 => Meaning::Later(Duration::from_millis(young.unsigned_abs())),
            State::AwaitingPayment
            | State::Paying
            | State::Expiring
            | State::Cancelling
            | State::Expired
            | State::Cancelled => Meaning::Happened(Event::Captured, Patch::default(), Guard::Version(row.version)),
            // Known already, or after the end.
            _ => Meaning::Nothing,
        },
        PaymentState::Declined | PaymentState::Cancelled => match state {
            // Another attempt's outcome must not decide this one.
            State::Paying if row.payment_id.is_none_or(|id| id.to_string() != status.payment_id) => Meaning::Nothing,
            State::Paying if young > 0 => Meaning::Later(Duration::from_millis(young.unsigned_abs())),
            State::Paying => {
                let patch = Patch { decline_code: Some(money::decline_code(status)), ..Patch::default() };
                Meaning::Happened(money::declined(row, now), patch, Guard::Version(row.version))
            }
            _ => Meaning::Nothing,
        },
        PaymentState::Pending | PaymentState::Unspecified | PaymentState::RefundPending | PaymentState::Refunded => {
            Meaning::Nothing
        }
    }
}

fn read(delivery: &Delivery) -> std::result::Result<(OrderId, PaymentStatus), String> {
    let message = PaymentSettled::decode(delivery.payload.clone()).map_err(|e| format!("is no PaymentSettled: {e}"))?;
    let status = message.status.ok_or("has no status")?;
    let order = status.order_id.parse().map_err(|e: proto::Error| e.to_string())?;
    Ok((order, status))
}
