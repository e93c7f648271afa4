//! Units: lock, release, deduct.

use std::sync::Arc;

use proto::{
    Error, Reason,
    error::Result,
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
#[derive(Clone, Debug)]
pub enum Lock {
    /// Held now, or before.
    Held {
        /// By the grant of this epoch.
        epoch: i64,
    },
    /// Never.
    Refused(Error),
    /// Nobody knows.
    Unknown(Error),
}

/// Locks units for granted orders. Locked before is the same answer again.
pub async fn lock(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    lock_rows(&steps.calls, &rows).await.into_iter().map(locked).collect()
}

/// What a lock means for an order that begins.
pub fn locked(lock: Lock) -> Outcome<Event> {
    match lock {
        Lock::Held { epoch } => Outcome::Done(Patch { grant_epoch: Some(epoch), ..Patch::default() }),
        Lock::Refused(error) => {
            let (reject_reason, detail) = (Some(error.reason), Some(error.to_string()));
            Outcome::Refused(Event::LockRefused, Patch { reject_reason, detail, ..Patch::default() })
        }
        Lock::Unknown(error) => Outcome::Unknown(error),
    }
}

/// Locks; whose grant is older than the fence acquires anew and tries again, and only if that finds nothing is it
/// refused.
async fn lock_rows(calls: &Calls, rows: &[Row]) -> Vec<Lock> {
    let wishes = rows.iter().map(|row| Wish { row, epoch: row.grant_epoch, refusal: Reason::Unspecified }).collect();
    let mut locks = lock_once(calls, wishes).await;
    let stale: Vec<usize> = (0..rows.len()).filter(|i| locks[*i].is_none()).collect();
    if !stale.is_empty() {
        metrics::counter!("seckill_stale_grants_total").increment(stale.len() as u64);
        let renewed: Vec<Row> = stale.iter().map(|index| rows[*index].clone()).collect();
        for (index, lock) in stale.into_iter().zip(acquire_and_lock(calls, &renewed).await) {
            locks[index] = Some(lock);
        }
    }
    locks.into_iter().map(|lock| lock.unwrap_or_else(moving)).collect()
}

/// Takes permits and locks with them. What the permits refuse the ledger refuses before anybody is told: it leaves a
/// tombstone there, and should another coordinator have found a permit for the same hold meanwhile, exactly one of the
/// two has its way.
pub(super) async fn acquire_and_lock(calls: &Calls, rows: &[Row]) -> Vec<Lock> {
    let mut unknown: Vec<Option<Lock>> = Vec::with_capacity(rows.len());
    let mut wishes = Vec::with_capacity(rows.len());
    for (row, grant) in rows.iter().zip(acquire_rows(calls, rows).await) {
        let (epoch, refusal) = match grant {
            Lock::Held { epoch } => (epoch, Reason::Unspecified),
            Lock::Refused(error) => (row.grant_epoch, error.reason),
            Lock::Unknown(_) => {
                unknown.push(Some(grant));
                continue;
            }
        };
        unknown.push(None);
        wishes.push(Wish { row, epoch, refusal });
    }
    let mut answers = lock_once(calls, wishes).await.into_iter();
    unknown.into_iter().map(|lock| lock.or_else(|| answers.next().flatten()).unwrap_or_else(moving)).collect()
}

/// A row to be locked with the grant of this epoch, or to be refused.
struct Wish<'a> {
    row: &'a Row,
    epoch: i64,
    refusal: Reason,
}

fn moving() -> Lock {
    Lock::Unknown(Error::new(Reason::StockRebuilding, "the fence moved again"))
}

/// One try; `None` where the grant's epoch is stale.
async fn lock_once(calls: &Calls, wishes: Vec<Wish<'_>>) -> Vec<Option<Lock>> {
    if wishes.is_empty() {
        return Vec::new();
    }
    let items = wishes
        .iter()
        .map(|Wish { row, epoch, refusal }| LockItem {
            hold_id: row.hold_id.to_string(),
            order_id: row.order_id.to_string(),
            sale_id: row.sale_id.to_string(),
            buyer: row.buyer.to_string(),
            quantity: row.quantity,
            grant_epoch: *epoch,
            expire_at_ms: row.expire_at,
            refusal: (*refusal).into(),
        })
        .collect();
    match calls.lock(items).await {
        Err(error) => wishes.iter().map(|_| Some(Lock::Unknown(error.clone()))).collect(),
        Ok(results) => results
            .into_iter()
            .zip(wishes)
            .map(|(result, wish)| match result {
                Ok(lock_result::Result::Locked(())) => Some(Lock::Held { epoch: wish.epoch }),
                Ok(lock_result::Result::StaleEpoch(())) => None,
                Ok(lock_result::Result::Refused(refusal)) => Some(no(refusal.into())),
                Err(error) => Some(Lock::Unknown(error)),
            })
            .collect(),
    }
}

/// Takes permits for holds; `Held` here means granted.
async fn acquire_rows(calls: &Calls, rows: &[Row]) -> Vec<Lock> {
    let items: Vec<AcquirePermit> = rows
        .iter()
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
    outcomes(steps.calls.release(items).await, &rows, |_, result| released(result))
}

/// What the answer to a release means.
pub fn released(result: Result<()>) -> Outcome<Event> {
    match result {
        Ok(()) => done(),
        // Sold: somebody deducted it meanwhile, and this saga has moved on without us.
        Err(error) => unexpected(error),
    }
}

/// Held becomes sold. Sold before is done; a hold that is gone is not found again here.
pub async fn deduct(steps: Arc<Steps>, rows: Vec<Row>) -> Vec<Outcome<Event>> {
    let items = rows
        .iter()
        .map(|row| DeductItem { hold_id: row.hold_id.to_string(), sale_id: row.sale_id.to_string() })
        .collect();
    outcomes(steps.calls.deduct(items).await, &rows, |_, result| deducted(result))
}

/// What the answer to a deduction means.
pub fn deducted(result: Result<()>) -> Outcome<Event> {
    match result {
        Ok(()) => done(),
        Err(error) if error.reason == Reason::IllegalState => refused(Event::HoldLost, error.to_string()),
        Err(error) => unexpected(error),
    }
}
