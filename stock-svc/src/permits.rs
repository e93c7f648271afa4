//! Permits as a port: [`memory`] in this process, [`redis`] through Lua. Both are [`crate::domain::permits`], applied
//! to one sale in one indivisible step per call, and both pass one contract suite.
//!
//! Everything is in batches: one call is one round trip for one sale, however many items. An error means that the
//! effect is unknown; every operation but [`Permits::withdraw`] can be repeated, and what a repeated withdrawal loses
//! reconciliation offers again.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use proto::{BuyerId, SaleId, error::Result};

use crate::domain::{
    HoldId,
    permits::{
        Acquire, Acquired, Claimed, Facts, Grant, Header, Held, Opening, Pending, Raise, Refund, Refunded, Withdrawn,
    },
};

pub mod memory;
pub mod redis;

/// Any permits.
pub type SharedPermits = Arc<dyn Permits>;

/// What a batch of wishes came to, one result per wish, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcquiredBatch {
    /// One per wish.
    pub results: Vec<Acquired>,
    /// R after the batch.
    pub free: i64,
}

/// What a batch of refunds came to, one result per refund, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefundedBatch {
    /// One per refund.
    pub results: Vec<Refunded>,
    /// R before the batch.
    pub before: i64,
    /// R after the batch.
    pub after: i64,
}

/// The permits of all sales. Each method is the function of the same name in [`crate::domain::permits`].
#[async_trait]
pub trait Permits: Send + Sync + fmt::Debug {
    /// Takes permits.
    async fn acquire(&self, sale: &SaleId, now: i64, wishes: Vec<Acquire>) -> Result<AcquiredBatch>;

    /// Gives units back.
    async fn refund(&self, sale: &SaleId, refunds: Vec<Refund>) -> Result<RefundedBatch>;

    /// Marks grants as persisted.
    async fn persisted(&self, sale: &SaleId, epoch: i64, holds: Vec<HoldId>) -> Result<()>;

    /// Finds grants by hold; none when nobody knows.
    async fn lookup(&self, sale: &SaleId, holds: &[HoldId]) -> Result<Option<Vec<Option<Grant>>>>;

    /// The header; none when the permits are lost.
    async fn header(&self, sale: &SaleId) -> Result<Option<Header>>;

    /// Claims for a rebuild.
    async fn claim(&self, sale: &SaleId, epoch: i64, facts: &Facts, server: &str) -> Result<Claimed>;

    /// Puts a snapshot's holds back.
    async fn load(&self, sale: &SaleId, epoch: i64, holds: Vec<Held>) -> Result<bool>;

    /// Opens after a rebuild.
    async fn open(&self, sale: &SaleId, opening: &Opening) -> Result<bool>;

    /// Corrects downwards.
    async fn clamp(&self, sale: &SaleId, epoch: i64, version: i64, excess: i64) -> Result<Option<i64>>;

    /// Corrects upwards.
    async fn raise(&self, sale: &SaleId, raise: &Raise) -> Result<bool>;

    /// Takes free permits away before the stock is lowered.
    async fn withdraw(&self, sale: &SaleId, quantity: i64) -> Result<Withdrawn>;

    /// Tells facts of the sale.
    async fn set_facts(&self, sale: &SaleId, facts: &Facts) -> Result<bool>;

    /// Lists old grants that are not marked as persisted.
    async fn pending(&self, sale: &SaleId, before: i64, limit: usize) -> Result<Option<Vec<Pending>>>;

    /// Lists everybody who holds or owns something.
    async fn buyers(&self, sale: &SaleId) -> Result<Vec<BuyerId>>;

    /// Drops all that is kept of a sale, as if its permits were lost; false when there was nothing. For sales that are
    /// over: nobody rebuilds theirs.
    async fn forget(&self, sale: &SaleId) -> Result<bool>;

    /// Who the server is: another answer than at a claim means that what was claimed may be lost or old (E14).
    async fn fingerprint(&self) -> Result<String>;
}
