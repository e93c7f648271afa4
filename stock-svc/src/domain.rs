//! The stock protocol, pure: no I/O, no clock, no randomness. What time it is and what is stored are arguments.
//!
//! SQL holds stock ([`ledger`]); permits are the right to ask for it ([`permits`]). A permit can be lost or withheld
//! without harm and is never invented. [`rebuild`] and [`reconcile`] say how the one follows the other after a loss.
//! The crate `model` drives these very modules through every interleaving, and shows that each of [`rules`] is needed.
//!
//! One equation ties the two together, and reconciliation rests on it:
//!
//! ```text
//!   permits:  free + granted          (R + units granted in this epoch, less those refunded as permits)
//!   ledger:   available + persisted   (A + units locked by grants of this epoch)
//! ```
//!
//! Acquiring, locking and refunding a permit leave both sums alone; a release raises the ledger's first and the
//! permits' after. So `free + granted <= available + persisted` at every instant (I2), their difference is the slack,
//! and no comparison needs to know which grants are on their way. `granted - persisted` is what is on its way.

pub mod ledger;
pub mod permits;
pub mod rebuild;
pub mod reconcile;
pub mod rules;
pub mod sale;

/// A hold's id: the order's, or one derived from it.
pub type HoldId = proto::OrderId;

/// The most units a sale can have. Keeps every sum of quantities far from overflow.
pub const MAX_STOCK: i64 = 1_000_000_000;

#[cfg(test)]
mod walk;
