//! The gateway: the only door. HTTP/JSON and public gRPC on one port, with health, reflection and the API's document.
//!
//! It holds no truth and touches no database. What it keeps in memory ([`soldout`], [`accepted`], [`watch`]) can be lost at any moment
//! without a wrong answer. It knows who asks (I11), refuses what is malformed, what is too much and what is known to
//! be in vain before anything is taken (I9), and hands on the rest.
//!
//! ```text
//!          JSON ──> transcode ──┐
//!   door ──┤                    ├──> layers (gate, deadline, trace) ──> front ──> service::{sales, orders, operations}
//!          gRPC ────────────────┘
//!          PlaceOrder, either way, once the desk has looked at it (service::orders)
//!          health, reflection ──────> answered at once, whatever the load (E50)
//!          webhook ─────────────────> payment-svc, through places of its own
//! ```

#![deny(missing_docs)]

use std::sync::Arc;

use anyhow::Context;
use mesh::{
    bus::SharedBus,
    clock::Clock,
    identity::Verifier,
    layers::{self, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
};
use prost::Message;
use proto::{
    OrderId,
    internal::{OrdersChanged, SaleChanged},
    subjects::{ORDERS_CHANGED, SALES_CHANGED},
    v1::{operations_server::OperationsServer, orders_server::OrdersServer, sales_server::SalesServer},
};
use tonic::service::Routes;

mod accepted;
mod config;
mod contract;
mod direct;
mod door;
mod failure;
mod front;
pub mod json;
mod openapi;
mod quick;
mod service;
mod soldout;
mod transcode;
mod watch;
mod webhook;

pub use config::Config;
pub use door::Door;

use accepted::Accepted;
use contract::Contract;
use door::Ways;
use front::Front;
use service::{
    Callers,
    actions::Actions,
    operations::Operations,
    orders::{Desk, LONGEST_WAIT, Links, OrderWatchers, Orders},
    sales::{SaleWatchers, Sales},
};
use soldout::SoldOut;
use transcode::Transcoder;
use watch::{Registry, Signal};
use webhook::Webhook;

/// Bytes of one request, at most: an order is some two hundred.
const MAX_BODY: usize = 64 * 1024;

/// What the gateway stands on.
#[derive(Clone)]
pub struct Backends {
    /// Where changes of orders and sales are heard of.
    pub bus: SharedBus,
    /// The wall clock.
    pub clock: Clock,
    /// Tells who calls.
    pub verifier: Arc<Verifier>,
    /// stock-svc.
    pub stock: Link,
    /// order-svc.
    pub order: Link,
    /// payment-svc.
    pub payment: Link,
    /// The coordinator.
    pub coordinator: Link,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backends").field("bus", &self.bus).field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// Starts the gateway: listens to the bus, and answers what to serve with [`mesh::serve`].
pub async fn start(config: Config, backends: Backends, life: &Lifecycle) -> anyhow::Result<Door> {
    let contract = Arc::new(Contract::load().context("the public contract")?);
    let document = openapi::document(&contract);

    metrics::describe_counter!("seckill_refused_from_memory_total", "orders refused without asking, by reason");
    let memory = Arc::new(SoldOut::default());
    let accepted = Accepted::default();
    let orders_watched: OrderWatchers = Registry::new(config.max_watchers);
    let sales_watched: SaleWatchers = Registry::new(config.max_watchers);
    hear_orders(&backends.bus, accepted.clone(), orders_watched.clone(), life).await?;
    hear_sales(&backends.bus, memory.clone(), sales_watched.clone(), life).await?;
    let (fresh, soft) = (backends.verifier.clone().keep_fresh(), life.soft_token());
    life.spawn(async move {
        soft.run_until_cancelled(fresh).await;
    });

    let callers = Callers::new(backends.verifier);
    let links =
        Links { stock: backends.stock.clone(), order: backends.order, coordinator: backends.coordinator.clone() };
    let actions = Actions::new(callers.clone(), backends.coordinator.clone(), backends.clock);
    let sales = Sales::new(callers.clone(), actions.clone(), backends.stock.clone(), sales_watched, life);
    let desk = Desk::new(callers.clone(), memory);
    let orders =
        Orders::new(callers.clone(), (desk.clone(), accepted), orders_watched, links, config.request_timeout, life);
    let orders = Arc::new(orders);
    let operations = Operations::new(callers, actions, backends.coordinator, backends.stock);
    let rpcs = Routes::new(SalesServer::new(sales).max_decoding_message_size(MAX_BODY))
        .add_service(OrdersServer::from_arc(orders.clone()).max_decoding_message_size(MAX_BODY))
        .add_service(OperationsServer::new(operations).max_decoding_message_size(MAX_BODY))
        .prepare();
    // Reading an order takes as long as the reader waits; every other rpc has the shorter deadline of `Front`.
    let limits =
        ServerConfig { max_in_flight: config.max_in_flight, max_timeout: config.request_timeout + LONGEST_WAIT };
    let public = layers::server(Front::new(rpcs, orders, config.request_timeout), limits);
    let json = Arc::new(Transcoder::new(contract, public.clone(), desk.clone(), config.request_timeout));
    let webhook = Webhook::new(backends.payment, config.request_timeout);
    let ways = Ways { json, public, desk, patience: config.request_timeout, tools: tools(life).await? };
    Ok(Door::new(ways, document.into(), webhook))
}

/// Health, and reflection in both versions that clients ask for. Outside of the gate: who asks whether we live must
/// hear it most when we are busy.
async fn tools(life: &Lifecycle) -> anyhow::Result<Routes> {
    let (mut reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<SalesServer<Sales>>().await;
    reporter.set_serving::<OrdersServer<Orders>>().await;
    reporter.set_serving::<OperationsServer<Operations>>().await;
    let soft = life.soft_token();
    life.spawn(async move {
        soft.cancelled().await;
        for service in ["", "seckill.v1.Sales", "seckill.v1.Orders", "seckill.v1.Operations"] {
            reporter.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
            // Ends the streams of those who watch, which the graceful end of the connections would wait for.
            reporter.clear_service_status(service).await;
        }
    });

    let public = contract::public_descriptors()?;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(&public)
            // So that grpcurl can show the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
            .include_reflection_service(false)
    };
    Ok(Routes::new(health).add_service(reflection().build_v1()?).add_service(reflection().build_v1alpha()?).prepare())
}

async fn hear_orders(
    bus: &SharedBus,
    accepted: Accepted,
    watched: OrderWatchers,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    let feed = move |signal| {
        // What is lost is read by its watchers within seconds.
        let Signal::Came(payload) = signal else { return };
        match OrdersChanged::decode(payload) {
            Ok(changed) => {
                for order in changed.orders {
                    match OrderId::parse("order", &order.name) {
                        Ok(id) => {
                            let order = Arc::new(order);
                            accepted.learn(&id, &order);
                            watched.announce(&id, &order);
                        }
                        Err(error) => tracing::warn!(%error, order = order.name, "a signal of no order"),
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "an unreadable signal of orders"),
        }
    };
    watch::listen(bus.clone(), ORDERS_CHANGED, life, feed).await.context("cannot listen for orders")
}

async fn hear_sales(
    bus: &SharedBus,
    memory: Arc<SoldOut>,
    watched: SaleWatchers,
    life: &Lifecycle,
) -> anyhow::Result<()> {
    let feed = move |signal| match signal {
        Signal::Came(payload) => match SaleChanged::decode(payload) {
            Ok(changed) => {
                memory.learn(&changed);
                let name = changed.sale.as_ref().map_or("", |sale| sale.name.as_str());
                let id = name.strip_prefix("sales/").unwrap_or(name).to_owned();
                watched.announce(&id, &Arc::new(changed));
            }
            Err(error) => tracing::warn!(%error, "an unreadable signal of a sale"),
        },
        Signal::Lost => memory.forget(),
    };
    watch::listen(bus.clone(), SALES_CHANGED, life, feed).await.context("cannot listen for sales")
}
