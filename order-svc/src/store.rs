//! Where order records are kept: the port, with [`sql`] behind it.

use std::{collections::HashMap, fmt};

use async_trait::async_trait;
use proto::{BuyerId, OrderId, SaleId, error::Result};

use crate::domain::{Record, Transition};

pub mod sql;

/// What a batch of transitions came to.
#[derive(Clone, Debug, Default)]
pub struct Transitioned {
    /// One result per transition, in order.
    pub results: Vec<Result<()>>,
    /// The records that their buyers see changed, as they are now.
    pub moved: Vec<Record>,
}

/// One buyer's orders, newest first.
#[derive(Clone, Debug)]
pub struct Page {
    /// Whose.
    pub buyer: BuyerId,
    /// Only of this sale.
    pub sale_id: Option<SaleId>,
    /// After this one.
    pub after: Option<Position>,
    /// At most so many.
    pub limit: u64,
}

/// An order's place in its buyer's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Newest first …
    pub create_at_ms: i64,
    /// … and by id where that is the same.
    pub order_id: OrderId,
}

/// Keeps order records. Every call is one transaction: all of it happens, or an error says that none did.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Writes the records that are not there yet and answers them.
    async fn create(&self, records: Vec<Record>) -> Result<Vec<Record>>;

    /// Moves records, in the order given, as [`Record::apply`] decides. NOT_FOUND where there is no record.
    async fn transition(&self, transitions: Vec<Transition>) -> Result<Transitioned>;

    /// Reads those of these that are there.
    async fn get(&self, order_ids: Vec<OrderId>) -> Result<HashMap<OrderId, Record>>;

    /// Reads a page.
    async fn list(&self, page: Page) -> Result<Vec<Record>>;
}
