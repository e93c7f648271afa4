//! Units: lock, release, deduct.

use std::sync::Arc;

use proto::{
    Error, Reason,
    internal::{AcquirePermit, DeductItem, LockItem, ReleaseItem, acquire_result, lock_result},
};

use super::{Steps, done, outcomes, refused, unexpected};
use crate::{
    calls::{Calls, is_fault},
    engine::plan::Outcome,
    order_saga::Event,
    store::{Patch, Row},
};

/// What the ledger says to a lock, once stale grants were renewed.
pub(super) enum Lock {
    Held { epoch: i64 },
    Refused(Error),
    Unknown(Error),
}

/// Locks units for granted orders. Locked before is the same answer again.
pub async fn lock(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    lock_rows(&steps.calls, &rows)
        .await
        .into_iter()
        .map(|lock| match lock {
            Lock::Held { epoch } => Outcome::Done(Patch { grant_epoch: Some(epoch), ..Patch::default() }),
            Lock::Refused(error) => {
                let (reject_reason, detail) = (Some(error.reason), Some(error.to_string()));
                Outcome::Refused(Event::LockRefused, Patch { reject_reason, detail, ..Patch::default() })
            }
            Lock::Unknown(error) => Outcome::Unknown(error),
        })
        .collect()
}

/// Locks; whose grant is older than the fence acquires anew and tries again, and only if that finds nothing is it
/// refused.
pub(super) async fn lock_rows(calls: &Calls, rows: &[Row]) -> Vec<Lock> {
    let mut locks = lock_once(calls, rows).await;
    let stale: Vec<usize> = (0..rows.len()).filter(|i| locks[*i].is_none()).collect();
    if !stale.is_empty() {
        metrics::counter!("seckill_stale_grants_total").increment(stale.len() as u64);
        let mut renewed = Vec::with_capacity(stale.len());
        for (index, grant) in stale.iter().zip(acquire_rows(calls, stale.iter().map(|i| &rows[*i])).await) {
            match grant {
                Lock::Held { epoch } => renewed.push((*index, Row { grant_epoch: epoch, ..rows[*index].clone() })),
                other => locks[*index] = Some(other),
            }
        }
        let (indexes, renewed): (Vec<usize>, Vec<Row>) = renewed.into_iter().unzip();
        for (index, lock) in indexes.into_iter().zip(lock_once(calls, &renewed).await) {
            locks[index] = lock;
        }
    }
    let moving = || Lock::Unknown(Error::new(Reason::StockRebuilding, "the fence moved again"));
    locks.into_iter().map(|lock| lock.unwrap_or_else(moving)).collect()
}

/// One try; `None` where the grant's epoch is stale.
async fn lock_once(calls: &Calls, rows: &[Row]) -> Vec<Option<Lock>> {
    if rows.is_empty() {
        return Vec::new();
    }
    let items = rows
        .iter()
        .map(|row| LockItem {
            hold_id: row.hold_id.to_string(),
            order_id: row.order_id.to_string(),
            sale_id: row.sale_id.to_string(),
            buyer: row.buyer.to_string(),
            quantity: row.quantity,
            grant_epoch: row.grant_epoch,
            expire_at_ms: row.expire_at,
        })
        .collect();
    match calls.lock(items).await {
        Err(error) => rows.iter().map(|_| Some(Lock::Unknown(error.clone()))).collect(),
        Ok(results) => results
            .into_iter()
            .zip(rows)
            .map(|(result, row)| match result {
                Ok(lock_result::Result::Locked(())) => Some(Lock::Held { epoch: row.grant_epoch }),
                Ok(lock_result::Result::StaleEpoch(())) => None,
                Ok(lock_result::Result::Refused(refusal)) => Some(no(refusal.into())),
                Err(error) => Some(Lock::Unknown(error)),
            })
            .collect(),
    }
}

/// Takes permits for holds; `Held` here means granted.
pub(super) async fn acquire_rows(calls: &Calls, rows: impl Iterator<Item = &Row>) -> Vec<Lock> {
    let items: Vec<AcquirePermit> = rows
        .map(|row| AcquirePermit {
            hold_id: row.hold_id.to_string(),
            sale_id: row.sale_id.to_string(),
            buyer: row.buyer.to_string(),
            quantity: row.quantity,
        })
        .collect();
    let count = items.len();
    match calls.acquire(items).await {
        Err(error) => (0..count).map(|_| Lock::Unknown(error.clone())).collect(),
        Ok(results) => results
            .into_iter()
            .map(|result| match result {
                Ok(acquire_result::Result::Granted(grant)) => Lock::Held { epoch: grant.epoch },
                Ok(acquire_result::Result::Released(())) => {
                    Lock::Refused(Error::new(Reason::PermitLapsed, "the permit lapsed"))
                }
                Ok(acquire_result::Result::LimitReached(_)) => {
                    Lock::Refused(Error::new(Reason::PurchaseLimitReached, "the buyer is at its limit"))
                }
                Ok(acquire_result::Result::Refused(refusal)) => no(refusal.into()),
                Err(error) => Lock::Unknown(error),
            })
            .collect(),
    }
}

fn no(error: Error) -> Lock {
    if is_fault(&error) { Lock::Unknown(error) } else { Lock::Refused(error) }
}

/// Gives units back. Released before, or never held, is done.
pub async fn release(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let items = rows
        .iter()
        .map(|row| ReleaseItem {
            hold_id: row.hold_id.to_string(),
            order_id: row.order_id.to_string(),
            sale_id: row.sale_id.to_string(),
            buyer: row.buyer.to_string(),
        })
        .collect();
    outcomes(steps.calls.release(items).await, &rows, |_, result| match result {
        Ok(()) => done(),
        // Sold: somebody deducted it meanwhile, and this saga has moved on without us.
        Err(error) => unexpected(error),
    })
}

/// Held becomes sold. Sold before is done; a hold that is gone is not found again here.
pub async fn deduct(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let items = rows
        .iter()
        .map(|row| DeductItem { hold_id: row.hold_id.to_string(), sale_id: row.sale_id.to_string() })
        .collect();
    outcomes(steps.calls.deduct(items).await, &rows, |_, result| match result {
        Ok(()) => done(),
        Err(error) if error.reason == Reason::IllegalState => refused(Event::HoldLost, error.to_string()),
        Err(error) => unexpected(error),
    })
}
