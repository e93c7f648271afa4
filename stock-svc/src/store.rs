//! Where sales, the ledger, holds and the outbox live. The ledger's rules are [`crate::domain::ledger`]'s; a store
//! locks the rows, hands them to those functions and writes what they say, in one transaction a batch.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use proto::{BuyerId, OrderId, RequestId, SaleId, error::Result};

use crate::domain::{
    HoldId,
    ledger::{Ledger, Lock, Locked, Swept},
    permits::{Facts, Pending, Refund},
    sale::{NewSale, Sale, Verb},
};

pub use crate::domain::rebuild::Fenced;

pub mod sql;

/// Any store.
pub type SharedStore = Arc<dyn Store>;

/// A sale and its stock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The sale; many have it at hand, and it hardly ever changes.
    pub sale: Arc<Sale>,
    /// Its stock.
    pub ledger: Ledger,
}

impl Record {
    /// What admission needs to know.
    pub fn facts(&self) -> Facts {
        self.sale.facts(&self.ledger)
    }
}

/// One item of a batch.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Sets units aside.
    Lock(Lock),
    /// Puts units back on sale.
    Release {
        /// Which hold.
        hold: HoldId,
        /// Whose order.
        order: OrderId,
        /// Whose.
        buyer: BuyerId,
    },
    /// Sells what is held.
    Deduct {
        /// Which hold.
        hold: HoldId,
    },
    /// Decides about a grant that the funnel has passed.
    Sweep(Pending),
}

/// What one item came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of a lock.
    Locked(Locked),
    /// Of a release or a deduction.
    Done,
    /// Of a sweep.
    Swept(Swept),
}

/// What a batch came to.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// One per item, in order. NOT_FOUND where there is no such sale.
    pub results: Vec<Result<Outcome>>,
    /// The batch's sales, afterwards.
    pub records: BTreeMap<SaleId, Record>,
    /// Whether refunds wait in the outbox.
    pub has_refunds: bool,
}

/// A refund that waits to be relayed.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Its place in the outbox.
    pub id: i64,
    /// Of which sale.
    pub sale: SaleId,
    /// The refund.
    pub refund: Refund,
    /// When it was written, Unix milliseconds.
    pub create_at: i64,
}

/// A sale's ledger, and then its outbox.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The sale.
    pub record: Record,
    /// Whether nothing waits to be relayed for it.
    pub outbox_is_empty: bool,
}

/// A ledger's sums beside its holds', of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// The ledger's.
    pub held: i64,
    /// The ledger's.
    pub sold: i64,
    /// Units of holds that are locked.
    pub locked_in_holds: i64,
    /// Units of holds that are sold.
    pub sold_in_holds: i64,
}

/// What is done elsewhere while a sale's row is locked. May run again when the transaction does.
pub type Hook = Arc<dyn Fn(Standing) -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// See the module.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Creates a sale. The same request again answers the same sale; REQUEST_ID_REUSED with another payload.
    async fn create_sale(&self, new: NewSale, payload_hash: String) -> Result<Record>;

    /// Those of these sales that exist.
    async fn sales(&self, ids: &[SaleId]) -> Result<Vec<Record>>;

    /// Sales by id, after this one.
    async fn sales_page(&self, after: Option<&SaleId>, limit: u64) -> Result<Vec<Record>>;

    /// Sales for which permits are kept.
    async fn live_sales(&self, now: i64) -> Result<Vec<Record>>;

    /// Applies an operator's verb.
    async fn apply_verb(&self, sale: &SaleId, verb: Verb, now: i64) -> Result<Record>;

    /// Applies a batch in one transaction. Items see what the items before them did.
    async fn apply(&self, items: Vec<(SaleId, Operation)>, now: i64) -> Result<Applied>;

    /// Raises or lowers the stock once per request. `before` runs with the row locked, when the ledger would allow it
    /// and it was not done before; its error undoes everything.
    async fn adjust(&self, sale: &SaleId, request: RequestId, delta: i64, now: i64, before: Hook) -> Result<Record>;

    /// Step 1 of a rebuild.
    async fn allocate_epoch(&self, sale: &SaleId, above: i64) -> Result<i64>;

    /// Step 4 of a rebuild; none when the fence is further already.
    async fn fence(&self, sale: &SaleId, epoch: i64) -> Result<Option<Fenced>>;

    /// Those of these holds that have a row, whatever its state.
    async fn known_holds(&self, holds: &[HoldId]) -> Result<BTreeSet<HoldId>>;

    /// Runs `work` with the sale's row locked, so that nothing of the ledger changes meanwhile.
    async fn under_lock(&self, sale: &SaleId, work: Hook) -> Result<()>;

    /// The ledger, and then the outbox: when that is empty, every release that the ledger shows has been relayed.
    async fn standing(&self, sale: &SaleId) -> Result<Standing>;

    /// Adds up a sale's holds. Reads all of them, and locks nothing.
    async fn count_holds(&self, sale: &SaleId) -> Result<Counted>;

    /// The outbox in order, after this id, without these sales.
    async fn outbox(&self, after: i64, without: &[SaleId], limit: u64) -> Result<Vec<Outgoing>>;

    /// Forgets what was relayed.
    async fn forget_outgoing(&self, ids: &[i64]) -> Result<()>;
}
