//! payment-svc: charges, refunds and the provider's webhooks.
//!
//! Owns an order's money: every attempt to take it, what became of it, and its way back. What must hold here:
//!
//! - Money is captured at most once per order; what is captured all the same goes back (I4, [`domain`]).
//! - A charge is written before the provider is called, so that no crash loses one; what the provider has not said is
//!   asked for until it has (E29, E31). Not knowing is PENDING, never a guess.
//! - Every outcome is announced on the stream `PAYMENTS` once it is stored, at least once, with payment and state as
//!   message id.
//! - The provider's words may come twice, late and in any order, as answers or as signed webhooks (E24–E27).
//!
//! ```text
//!   Charge ──> PENDING row ──> provider ──> outcome + outbox row ──> PAYMENTS
//!                  ^              │ no answer in time
//!   webhook, Resolve, resolver <──┘ until it is known
//! ```

#![deny(missing_docs)]

use std::sync::Arc;

use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle};
use proto::{internal::payments_server::PaymentsServer, subjects};

mod config;
pub mod domain;
mod payments;
pub mod provider;
mod relay;
mod resolver;
mod service;
pub mod store;
pub mod wire;

pub use config::{Config, ProviderKind};

/// What it stands on.
#[derive(Clone, Debug)]
pub struct Backends {
    /// The books.
    pub store: Arc<dyn store::Store>,
    /// For announcements.
    pub bus: SharedBus,
    /// Tells when webhooks are stale and when to ask again.
    pub clock: Clock,
    /// Who takes the money. See [`Config::provider`].
    pub provider: Arc<dyn provider::Provider>,
}

/// Starts the role; it serves as soon as this returns. What an earlier life left open is taken up again.
pub async fn start(config: Config, backends: Backends, life: &Lifecycle) -> anyhow::Result<tonic::service::Routes> {
    let Backends { store, bus, clock, provider } = backends;
    bus.ensure_stream(&subjects::PAYMENTS_STREAM.into()).await?;
    let relay = relay::start(store.clone(), bus, life);
    let payments = payments::Payments::start(&config, store, provider.clone(), clock, relay, life);
    resolver::start(payments.clone(), life);
    let webhooks = payments.clone();
    let deliver = move |webhook: provider::SignedWebhook| -> provider::Delivered {
        let payments = webhooks.clone();
        Box::pin(async move { payments.webhook(&webhook.body, &webhook.signature).await })
    };
    provider.deliver_webhooks(Arc::new(deliver), life);
    Ok(tonic::service::Routes::new(PaymentsServer::new(service::Service::new(payments))))
}
