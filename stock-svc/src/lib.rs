//! stock-svc: sales, the stock ledger, and the only writer of permits.

#![deny(missing_docs)]

pub mod domain;
pub mod permits;
