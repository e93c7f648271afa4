//! Permits in this process: the pure state behind a mutex per sale. They die with it and are rebuilt from the ledger
//! at the next start, like after a Redis loss.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use async_trait::async_trait;
use proto::{BuyerId, SaleId, error::Result};

use super::{AcquiredBatch, Permits, RefundedBatch};
use crate::domain::{
    HoldId,
    permits::{self, Acquire, Claimed, Facts, Grant, Header, Held, Opening, Pending, Raise, Refund, Withdrawn},
};

type Slot = Arc<Mutex<permits::Permits>>;

/// See the module.
#[derive(Debug)]
pub struct Memory {
    sales: RwLock<HashMap<SaleId, Slot>>,
    fingerprint: String,
}

impl Default for Memory {
    fn default() -> Self {
        Self { sales: RwLock::default(), fingerprint: uuid::Uuid::new_v4().simple().to_string() }
    }
}

impl Memory {
    /// Empty ones.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets a sale's permits, as a lost server does. For fault tests.
    pub fn wipe(&self, sale: &SaleId) {
        self.with(sale, permits::Permits::wipe);
    }

    /// All sales' permits as they are now. For fault tests.
    pub fn dump(&self) -> BTreeMap<SaleId, permits::Permits> {
        let sales = self.sales.read().unwrap_or_else(PoisonError::into_inner);
        let copy = |slot: &Slot| slot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        sales.iter().map(|(sale, slot)| (sale.clone(), copy(slot))).collect()
    }

    /// A server that was started on a dump: it has another fingerprint than the one before. For fault tests.
    pub fn restored(dump: BTreeMap<SaleId, permits::Permits>) -> Self {
        let sales = dump.into_iter().map(|(sale, permits)| (sale, Slot::new(Mutex::new(permits)))).collect();
        Self { sales: RwLock::new(sales), ..Self::default() }
    }

    /// One indivisible step on one sale. Permits that are not there stay so, whatever is asked of them: only a claim
    /// makes some.
    fn with<T>(&self, sale: &SaleId, step: impl FnOnce(&mut permits::Permits) -> T) -> T {
        let known = self.sales.read().unwrap_or_else(PoisonError::into_inner).get(sale).cloned();
        step(&mut known.unwrap_or_default().lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn free(permits: &permits::Permits) -> i64 {
    permits.header().map_or(0, |header| header.free)
}

#[async_trait]
impl Permits for Memory {
    async fn acquire(&self, sale: &SaleId, now: i64, wishes: Vec<Acquire>) -> Result<AcquiredBatch> {
        Ok(self.with(sale, |permits| {
            let results = wishes.iter().map(|wish| permits.acquire(wish, now)).collect();
            AcquiredBatch { results, free: free(permits) }
        }))
    }

    async fn refund(&self, sale: &SaleId, refunds: Vec<Refund>) -> Result<RefundedBatch> {
        Ok(self.with(sale, |permits| {
            let before = free(permits);
            let results = refunds.iter().map(|refund| permits.refund(refund)).collect();
            RefundedBatch { results, before, after: free(permits) }
        }))
    }

    async fn persisted(&self, sale: &SaleId, epoch: i64, holds: Vec<HoldId>) -> Result<()> {
        self.with(sale, |permits| permits.persisted(epoch, &holds));
        Ok(())
    }

    async fn lookup(&self, sale: &SaleId, holds: &[HoldId]) -> Result<Option<Vec<Option<Grant>>>> {
        Ok(self.with(sale, |permits| permits.lookup(holds)))
    }

    async fn header(&self, sale: &SaleId) -> Result<Option<Header>> {
        Ok(self.with(sale, |permits| permits.header().cloned()))
    }

    async fn claim(&self, sale: &SaleId, epoch: i64, facts: &Facts, server: &str) -> Result<Claimed> {
        let mut sales = self.sales.write().unwrap_or_else(PoisonError::into_inner);
        let slot = sales.entry(sale.clone()).or_default();
        Ok(slot.lock().unwrap_or_else(PoisonError::into_inner).claim(epoch, facts, server))
    }

    async fn load(&self, sale: &SaleId, epoch: i64, holds: Vec<Held>) -> Result<bool> {
        Ok(self.with(sale, |permits| permits.load(epoch, &holds)))
    }

    async fn open(&self, sale: &SaleId, opening: &Opening) -> Result<bool> {
        Ok(self.with(sale, |permits| permits.open(opening)))
    }

    async fn clamp(&self, sale: &SaleId, epoch: i64, version: i64, excess: i64) -> Result<Option<i64>> {
        Ok(self.with(sale, |permits| permits.clamp(epoch, version, excess)))
    }

    async fn raise(&self, sale: &SaleId, raise: &Raise) -> Result<bool> {
        Ok(self.with(sale, |permits| permits.raise(raise)))
    }

    async fn withdraw(&self, sale: &SaleId, quantity: i64) -> Result<Withdrawn> {
        Ok(self.with(sale, |permits| permits.withdraw(quantity)))
    }

    async fn set_facts(&self, sale: &SaleId, facts: &Facts) -> Result<bool> {
        Ok(self.with(sale, |permits| permits.set_facts(facts)))
    }

    async fn pending(&self, sale: &SaleId, before: i64, limit: usize) -> Result<Option<Vec<Pending>>> {
        Ok(self.with(sale, |permits| permits.pending(before, limit)))
    }

    async fn buyers(&self, sale: &SaleId) -> Result<Vec<BuyerId>> {
        Ok(self.with(sale, |permits| permits.buyers()))
    }

    async fn forget(&self, sale: &SaleId) -> Result<bool> {
        Ok(self.sales.write().unwrap_or_else(PoisonError::into_inner).remove(sale).is_some())
    }

    async fn fingerprint(&self) -> Result<String> {
        Ok(self.fingerprint.clone())
    }
}
