//! stock-svc: sales, the stock ledger, and the only writer of permits.
//!
//! SQL holds stock; permits are the right to ask for it. What must hold here:
//!
//! - I1: A + H + D = T for every sale, none negative. The schema checks it, [`domain::ledger`] keeps it.
//! - I2: free permits and grants on their way never exceed A. At rest R = A. [`domain`] says by which equation.
//! - I7: no buyer holds or owns more of a sale than its limit, by permits and again by the ledger.
//! - I8: SOLD_OUT is said only when it is final; not knowing is UNAVAILABLE.
//! - I10: every rpc and every refund can be repeated.
//!
//! ```text
//!   AcquirePermits ──> permits                      (no SQL)
//!   Lock, Release, Deduct ──> ledger ──> outbox ──> relay ──> permits
//!   guard:     lost or replaced permits ──> rebuild from the ledger
//!   sweep:     grants that became nothing ──> tombstone + outbox
//!   reconcile: permits beside the ledger, corrected without guessing
//! ```
//!
//! Several processes may do all of this at once: every step is decided in SQL under the sale's row lock, or in one
//! indivisible step on its permits.

#![deny(missing_docs)]

use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle};
use proto::{internal::stock_server::StockServer, subjects};

mod config;
pub mod domain;
mod engine;
pub mod permits;
mod service;
pub mod store;

pub use config::Config;

/// What it stands on.
#[derive(Clone, Debug)]
pub struct Backends {
    /// Sales, the ledger and the outbox.
    pub store: store::SharedStore,
    /// The permits, shared by all of its processes or this one's own.
    pub permits: permits::SharedPermits,
    /// Tells how far the funnel has come, and carries signals.
    pub bus: SharedBus,
    /// Says when sales start and end.
    pub clock: Clock,
}

/// Starts the role; it serves as soon as this returns. Permits that are missing are rebuilt in the background, which
/// may wait for the coordinator's funnel; their buyers are told STOCK_REBUILDING meanwhile.
pub async fn start(config: Config, backends: Backends, life: &Lifecycle) -> anyhow::Result<tonic::service::Routes> {
    let Backends { store, permits, bus, clock } = backends;
    bus.ensure_stream(&subjects::ORDERS_STREAM.into()).await?;
    let engine = engine::Engine::start(config, store, permits, bus, clock, life).await?;
    Ok(tonic::service::Routes::new(StockServer::new(service::Service::new(engine, life))))
}
