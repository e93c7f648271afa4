//! Money that came after the hold was gone: another unit, or a refund (E24).

use std::sync::Arc;

use super::{Steps, done, refused, stock};
use crate::{
    domain::refund_of,
    engine::{Named, Saga, plan::Outcome},
    order_saga::Event,
    refund_saga::{self, RefundSaga},
    store::{Patch, Row},
};

/// Takes a permit for the late hold, whose id the saga recorded on its way here, and locks it. Locked before is the
/// same answer again; refused once is refused for ever, whoever asks.
pub async fn reacquire(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    stock::acquire_and_lock(&steps.calls, &rows).await.into_iter().map(reacquired).collect()
}

/// What a lock means for money that came late.
pub fn reacquired(lock: stock::Lock) -> Outcome<Event> {
    match lock {
        stock::Lock::Held { epoch } => Outcome::Done(Patch { grant_epoch: Some(epoch), ..Patch::default() }),
        stock::Lock::Refused(error) => refused(Event::NoUnit, error.to_string()),
        stock::Lock::Unknown(error) => Outcome::Unknown(error),
    }
}

/// Starts the refund's saga, once, and waits for its end.
pub async fn refund(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    match refund_states(&steps, &rows).await {
        Ok(states) => states.into_iter().map(|closed| if closed { done() } else { Outcome::InProgress }).collect(),
        Err(error) => rows.iter().map(|_| Outcome::Unknown(error.clone())).collect(),
    }
}

/// An order's refund before its first transition.
pub fn wanted(order: &Row) -> Row {
    Row {
        saga_id: refund_of(order.order_id),
        kind: RefundSaga::KIND.to_owned(),
        state: refund_saga::State::Wanted.name().to_owned(),
        version: 0,
        ..order.clone()
    }
}

/// Whether each order's refund is over.
async fn refund_states(steps: &Steps, rows: &[Row]) -> proto::error::Result<Vec<bool>> {
    let ids: Vec<_> = rows.iter().map(|row| refund_of(row.order_id)).collect();
    let store = &steps.calls.store;
    let known = store.load(&ids).await?;
    let missing = rows.iter().zip(&ids).filter(|(_, id)| !known.contains_key(id));
    let fresh = missing
        .filter_map(|(row, _)| steps.refunds.take(&wanted(row), refund_saga::Event::Requested, &Patch::default()))
        .collect();
    store.insert(fresh).await?;
    let refunds: Vec<Row> = store.load(&ids).await?.into_values().collect();
    let now = steps.calls.clock.now_ms();
    // Those that wait for a later attempt of their own are left to recovery.
    let (waiting, ready): (Vec<Row>, Vec<Row>) =
        refunds.into_iter().partition(|row| row.attempts > 0 && row.next_attempt_at.is_none_or(|at| at > now));
    let refunds: Vec<Row> = steps.refunds.drive(ready).await.into_iter().chain(waiting).collect();
    let closed = refund_saga::State::Closed.name();
    Ok(ids.iter().map(|id| refunds.iter().any(|row| row.saga_id == *id && row.state == closed)).collect())
}
