//! order-svc: the order as its buyer sees it.
//!
//! Owns one row an order: what was bought, for how much, and its state. The saga is the coordinator's; the record
//! follows it. What must hold here:
//!
//! - The row is written once; writing it again changes nothing, and so does every transition that was seen before or is
//!   older than what the record has seen (I10).
//! - Only legal transitions happen ([`domain`]); a terminal state is left only because of late money (E24).
//! - A buyer's list holds that buyer's orders and no other's (I11).
//!
//! Every change is signalled to whoever watches, at most once and best effort: truth is in the row.

#![deny(missing_docs)]

use std::sync::Arc;

use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle};
use proto::internal::order_records_server::OrderRecordsServer;

mod config;
pub mod domain;
mod records;
mod service;
mod signals;
pub mod store;
pub mod wire;

pub use config::Config;

/// What it stands on.
#[derive(Clone, Debug)]
pub struct Backends {
    /// The records.
    pub store: Arc<dyn store::Store>,
    /// For signals.
    pub bus: SharedBus,
    /// Tells when a record was closed that never was open.
    pub clock: Clock,
}

/// Starts the role; it serves as soon as this returns.
pub async fn start(config: Config, backends: Backends, life: &Lifecycle) -> anyhow::Result<tonic::service::Routes> {
    let signals = signals::Signals::start(backends.bus, life);
    let records = records::Records::start(&config, backends.store, signals, life);
    let service = service::Service::new(records, backends.clock);
    Ok(tonic::service::Routes::new(OrderRecordsServer::new(service)))
}
