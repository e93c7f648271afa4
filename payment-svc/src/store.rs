//! Where an order's money is written down: the port, with [`sql`] behind it.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use proto::{OrderId, error::Result};

use crate::domain::{Answer, Charge, Command, PaymentId, Step, Times};

pub mod sql;

/// A command for an order.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whose book.
    pub order_id: OrderId,
    /// What to do.
    pub command: Command,
    /// The trace it is part of, for whoever hears of the outcome.
    pub traceparent: Option<String>,
}

/// An open charge and how to ask about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// As it is.
    pub charge: Charge,
    /// What to ask the provider.
    pub step: Step,
}

/// An announcement on its way to the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Its place.
    pub seq: i64,
    /// Payment and state: the bus's dedupe key.
    pub message_id: String,
    /// An encoded PaymentSettled.
    pub payload: Bytes,
    /// The trace that it came from.
    pub traceparent: Option<String>,
}

/// Keeps books. Every call is one transaction: all of it happens, or an error says that none did.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Does commands on the books of their orders, in the order given, one answer each. An order's book is locked
    /// meanwhile, so that whoever comes next sees what was done.
    async fn run(&self, requests: Vec<Request>, times: Times) -> Result<Vec<Result<Answer>>>;

    /// Reads charges, one result each, in order.
    async fn read(&self, payment_ids: Vec<PaymentId>) -> Result<Vec<Option<Open>>>;

    /// Takes up to `limit` open charges whose time to ask has come. They are due again at `lease_until_ms`, for
    /// whoever takes them then, should the taker die.
    async fn take_due(&self, now_ms: i64, lease_until_ms: i64, limit: u64) -> Result<Vec<Open>>;

    /// The oldest announcements that were not forgotten yet.
    async fn announcements(&self, limit: u64) -> Result<Vec<Announcement>>;

    /// Forgets announcements that the bus has.
    async fn forget(&self, seqs: Vec<i64>) -> Result<()>;
}
