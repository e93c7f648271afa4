//! Where sagas are kept: a row each, and an append-only log of their transitions. What operators did is kept beside.
//!
//! Knows states and events only by name; what is legal is decided by the caller, inside the transaction that locked
//! the row. Every method is one batch and at most one transaction.

use std::{collections::HashMap, fmt, sync::Arc};

use async_trait::async_trait;
use proto::{BuyerId, Money, OrderId, Reason, SaleId, error::Result, v1::action::Outcome};

pub mod sql;
#[cfg(test)]
pub(crate) mod tests;

/// Any store.
pub type SharedStore = Arc<dyn Store>;

/// A saga as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// Its id; an order saga's is its order's.
    pub saga_id: OrderId,
    /// Which kind of saga.
    pub kind: String,
    /// Its state's name.
    pub state: String,
    /// How many transitions it has made.
    pub version: i64,
    /// Automation has used up its attempts.
    pub stuck: bool,
    /// Attempts at the work of this state.
    pub attempts: i32,
    /// When the work of this state may be taken up (again); none while there is nothing to do.
    pub next_attempt_at: Option<i64>,
    /// What the last failed attempt met. For operators.
    pub last_error: String,
    /// The order it is about.
    pub order_id: OrderId,
    /// The order's sale.
    pub sale_id: SaleId,
    /// The order's buyer.
    pub buyer: BuyerId,
    /// How many units.
    pub quantity: i64,
    /// What they cost together.
    pub amount: Money,
    /// The hold in the ledger: the order's id, or a late capture's own.
    pub hold_id: OrderId,
    /// The epoch of the hold's grant.
    pub grant_epoch: i64,
    /// Until when it can be paid.
    pub expire_at: i64,
    /// Why it was rejected.
    pub reject_reason: Reason,
    /// The last attempt to pay: the provider's idempotency key.
    pub payment_id: Option<OrderId>,
    /// The last attempt to pay: with what.
    pub payment_method: String,
    /// The last attempt to pay: the buyer's idempotency key.
    pub payment_request_id: String,
    /// Why the last attempt to pay was declined; empty when it was not.
    pub decline_code: String,
    /// Where the order's trace began.
    pub traceparent: String,
    /// When it was paid or closed, or when that began: recorded before the steps that pass it on.
    pub close_at: Option<i64>,
    /// When the order was placed.
    pub create_at: i64,
    /// When the row last changed its state.
    pub update_at: i64,
}

impl Row {
    /// Whose turn it was when this was read.
    pub fn turn(&self) -> Turn {
        Turn { version: self.version, attempts: self.attempts, next_attempt_at: self.next_attempt_at }
    }
}

/// What an event or a step found out, to be recorded with the transition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Patch {
    /// A new grant's epoch.
    pub grant_epoch: Option<i64>,
    /// Why it is rejected.
    pub reject_reason: Option<Reason>,
    /// A new attempt to pay.
    pub payment: Option<Payment>,
    /// Why the attempt to pay was declined.
    pub decline_code: Option<String>,
    /// A word for the log.
    pub detail: Option<String>,
}

/// An attempt to pay, recorded before it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Payment {
    /// The provider's idempotency key; none takes an attempt back that the provider never saw.
    pub payment_id: Option<OrderId>,
    /// With what.
    pub method: String,
    /// The buyer's idempotency key.
    pub request_id: String,
}

impl Patch {
    /// Adds what was found out later; the later word counts.
    pub fn merge(&mut self, later: Patch) {
        self.grant_epoch = later.grant_epoch.or(self.grant_epoch);
        self.reject_reason = later.reject_reason.or(self.reject_reason);
        self.payment = later.payment.or(self.payment.take());
        self.decline_code = later.decline_code.or(self.decline_code.take());
        self.detail = later.detail.or(self.detail.take());
    }

    /// Writes what was found out into the row.
    pub fn write(&self, row: &mut Row) {
        if let Some(epoch) = self.grant_epoch {
            row.grant_epoch = epoch;
        }
        if let Some(reason) = self.reject_reason {
            row.reject_reason = reason;
        }
        if let Some(payment) = &self.payment {
            row.payment_id = payment.payment_id;
            row.payment_method.clone_from(&payment.method);
            row.payment_request_id.clone_from(&payment.request_id);
            row.decline_code.clear();
        }
        if let Some(code) = &self.decline_code {
            row.decline_code.clone_from(code);
        }
    }
}

/// One transition in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The version that the saga had after it; the first is 1.
    pub version: i64,
    /// What happened.
    pub event: String,
    /// From which state.
    pub from: String,
    /// To which state.
    pub to: String,
    /// A word for operators.
    pub detail: String,
    /// When.
    pub at: i64,
}

/// Why a change was not made.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejected {
    /// The saga as it is; `None` when there is none.
    pub current: Option<Row>,
}

/// What became of one change: the row after it, or the row that did not take it.
pub type Verdict = std::result::Result<Row, Rejected>;

/// Decides the change with this index on the row as it is, locked: the row and the log entry after it, or `None` to
/// leave it. Pure, since a transaction may begin again.
pub type Decide = Arc<dyn Fn(usize, &Row) -> Option<(Row, Entry)> + Send + Sync>;

/// Whose turn it is with a saga. Whoever has changed it since has the saga now: an operator who put it back to work, a
/// replica that leased it, whoever made a transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Turn {
    /// See [`Row`].
    pub version: i64,
    /// See [`Row`].
    pub attempts: i32,
    /// See [`Row`].
    pub next_attempt_at: Option<i64>,
}

/// A saga whose work did not come to an end.
#[derive(Clone, Debug, PartialEq)]
pub struct Postponed {
    /// Which.
    pub saga_id: OrderId,
    /// Only if it is still this turn.
    pub turn: Turn,
    /// See [`Row`].
    pub attempts: i32,
    /// See [`Row`].
    pub next_attempt_at: Option<i64>,
    /// See [`Row`].
    pub stuck: bool,
    /// See [`Row`].
    pub last_error: String,
}

/// Sagas of one kind in some states: two kinds may well have states of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Which {
    /// The kind's name.
    pub kind: &'static str,
    /// The states' names.
    pub states: Vec<&'static str>,
}

/// Which sagas an operator wants to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Those that are stuck, whatever their state.
    Stuck,
    /// Those in the state with this name.
    State(String),
}

/// What an operator did, as `seckill.v1.Action` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Action {
    /// Its id; ids grow with time.
    pub id: String,
    /// Who.
    pub operator: String,
    /// The rpc.
    pub verb: String,
    /// To what.
    pub target: String,
    /// What else was asked for.
    pub detail: String,
    /// Why.
    pub reason: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it was not done.
    pub error: String,
    /// When.
    pub at: i64,
}

/// Keeps sagas. See the module.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Writes new sagas with their first entries. Those that are there stay as they are (I10).
    async fn insert(&self, sagas: Vec<(Row, Entry)>) -> Result<()>;

    /// The sagas with these ids.
    async fn load(&self, ids: &[OrderId]) -> Result<HashMap<OrderId, Row>>;

    /// Changes sagas: one verdict per id, in order. An id may come twice; the second sees what the first left.
    async fn change(&self, ids: Vec<OrderId>, decide: Decide) -> Result<Vec<Verdict>>;

    /// Writes sagas and their entries as they are to be, without reading them: all of them where each has made no other
    /// transition than those before its entry, otherwise none, and `false`. No saga may come twice.
    async fn advance(&self, moves: Vec<(Row, Entry)>) -> Result<bool>;

    /// Notes when to try again, where it is still the turn of whoever tried. No transition, no entry.
    async fn postpone(&self, postponed: Vec<Postponed>) -> Result<()>;

    /// Takes up to `limit` sagas whose turn it is, longest due first, and leases them to the caller until `until`.
    async fn claim(&self, of: Which, now: i64, until: i64, limit: u64) -> Result<Vec<Row>>;

    /// Ids of sagas whose deadline is before `before`, most overdue first.
    async fn overdue(&self, of: Which, before: i64, limit: u64) -> Result<Vec<OrderId>>;

    /// A saga's log, oldest first.
    async fn log(&self, id: OrderId) -> Result<Vec<Entry>>;

    /// A page of sagas by id, after `after`.
    async fn list(&self, filter: &Filter, after: &str, limit: u64) -> Result<Vec<Row>>;

    /// How many are stuck.
    async fn count_stuck(&self) -> Result<u64>;

    /// Puts a stuck saga back to work; `false` when it is not stuck.
    async fn retry(&self, id: OrderId, now: i64) -> Result<bool>;

    /// Writes down what an operator does. What is known by that id keeps all but its outcome, and that as well once it
    /// has one.
    async fn record_action(&self, action: Action) -> Result<()>;

    /// Actions before this one, newest first; of this target alone unless it is empty.
    async fn actions(&self, before: Option<&str>, target: &str, limit: u64) -> Result<Vec<Action>>;
}
