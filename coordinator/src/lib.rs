//! coordinator: accepts orders and owns their sagas.
//!
//! Owns the saga of every order: a row with its state, and an append-only log. Accepts orders into the stream, drains it
//! at the rate the databases like, drives lock → pay → deduct, or revert, and survives its own death at any point. What
//! must hold here:
//!
//! - An order whose buyer has seen PLACED ends in a terminal state, whatever dies (I5).
//! - Money is captured at most once per order, and belongs to a PAID order or is refunded exactly once (I4).
//! - No order expires before its deadline, and none outlives it by more than the bound (I6).
//! - Replaying any message or step, any number of times, changes nothing (I10).
//!
//! ```text
//!   accept ──> stream ORDERS ──┬──> funnel ──> sagas <── pay, cancel
//!                              └──> lanes ───> sagas <── settler <── stream PAYMENTS
//!                                              sagas <── recovery, deadline sweep
//! ```
//!
//! It never touches the ledger, the records or the provider itself: those are the other services', behind [`calls`].

#![deny(missing_docs)]

use std::{sync::Arc, time::Duration};

use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle, link::Link};
use proto::{internal::coordinator_server::CoordinatorServer, subjects};

pub mod accept;
pub mod calls;
mod config;
pub mod domain;
pub mod engine;
pub mod funnel;
mod holdings;
pub mod lanes;
pub mod ops;
pub mod order_saga;
mod pace;
pub mod pay;
pub mod refund_saga;
pub mod sagas;
mod service;
pub mod settle;
pub mod steps;
pub mod store;
mod wire;

pub use config::Config;

use crate::{
    engine::{
        plan::Plan,
        runner::{Direction, Engine},
    },
    order_saga::OrderSaga,
    refund_saga::RefundSaga,
};

/// A batch of orders with long names stays far below it.
const MAX_MESSAGE: usize = 16 << 20;
/// How often the gauge of stuck sagas is brought up to date.
const GAUGE_EVERY: Duration = Duration::from_secs(5);

/// What it stands on.
#[derive(Clone, Debug)]
pub struct Backends {
    /// Sagas and their log.
    pub store: store::SharedStore,
    /// Streams.
    pub bus: SharedBus,
    /// The time.
    pub clock: Clock,
    /// stock-svc.
    pub stock: Link,
    /// order-svc.
    pub order: Link,
    /// payment-svc.
    pub payment: Link,
}

/// What each kind of saga does.
#[derive(Debug)]
pub struct Plans {
    /// Orders.
    pub orders: Plan<OrderSaga>,
    /// Refunds.
    pub refunds: Plan<RefundSaga>,
}

impl Plans {
    /// As they are served.
    pub fn new(config: &Config) -> Self {
        let policy = config.policy();
        Self { orders: order_saga::plan(policy), refunds: refund_saga::plan(policy) }
    }
}

/// Starts the role; it serves as soon as this returns.
pub async fn start(config: Config, backends: Backends, life: &Lifecycle) -> anyhow::Result<tonic::service::Routes> {
    start_with(Plans::new(&config), config, backends, life).await
}

/// Starts the role with plans that somebody has put something around: see [`Plan::around`].
pub async fn start_with(
    plans: Plans,
    config: Config,
    backends: Backends,
    life: &Lifecycle,
) -> anyhow::Result<tonic::service::Routes> {
    for stream in [subjects::ORDERS_STREAM, subjects::EVENTS_STREAM, subjects::PAYMENTS_STREAM] {
        backends.bus.ensure_stream(&stream.into()).await?;
    }
    let ms = Duration::from_millis;
    let store = backends.store;
    let links = (backends.stock, backends.order, backends.payment);
    let clock = backends.clock;
    let calls = calls::Calls::new(links, backends.bus, store.clone(), clock.clone(), ms(config.charge_timeout_ms));
    let limits = config.limits();
    let refunds = Arc::new(Engine::new(plans.refunds, Arc::new(calls.clone()), store.clone(), clock.clone(), limits));
    let steps = Arc::new(steps::Steps { calls: calls.clone(), refunds: refunds.clone() });
    let orders = Arc::new(Engine::new(plans.orders, steps, store.clone(), clock, limits));

    let sagas = sagas::Sagas::start(&config, &orders, life);
    let lanes = lanes::Lanes::new(&config, orders.clone(), life);
    let accept = accept::Accept::start(&config, calls.clone(), sagas.clone(), lanes.clone(), life);
    let counter = pay::Counter::start(&config, calls, sagas, life);
    let ops = ops::Ops::new(orders.clone());

    funnel::start(&config, orders.clone(), life).await?;
    settle::start(&config, orders.clone(), life).await?;
    spawn_lanes(&config, &lanes, life);
    let every = ms(config.saga_recovery_ms);
    // A loop for each way, so that compensations never wait behind orders.
    spawn_recovery("order recovery", every, &orders, Direction::Forward, life);
    spawn_recovery("order release", every, &orders, Direction::Backward, life);
    spawn_recovery("refund recovery", every, &refunds, Direction::Forward, life);
    spawn_gauge(store, life);

    let server = CoordinatorServer::new(service::Service { accept, counter, ops });
    Ok(tonic::service::Routes::new(server.max_decoding_message_size(MAX_MESSAGE)))
}

fn spawn_lanes(config: &Config, lanes: &lanes::Lanes, life: &Lifecycle) {
    let found = lanes.clone();
    life.spawn_periodic("lane discovery", Duration::from_millis(config.lane_refresh_ms), move || {
        let lanes = found.clone();
        async move { lanes.discover().await }
    });
    let swept = lanes.clone();
    life.spawn_periodic("deadline sweep", Duration::from_millis(config.deadline_sweep_ms), move || {
        let lanes = swept.clone();
        async move { lanes.sweep().await }
    });
}

fn spawn_recovery<S: engine::Saga>(
    name: &'static str,
    every: Duration,
    engine: &Arc<Engine<S>>,
    direction: Direction,
    life: &Lifecycle,
) {
    let engine = engine.clone();
    life.spawn_periodic(name, every, move || {
        let engine = engine.clone();
        async move {
            if let Err(error) = engine.recover(direction).await {
                tracing::warn!(name, %error, "recovery makes no headway");
            }
        }
    });
}

fn spawn_gauge(store: store::SharedStore, life: &Lifecycle) {
    let stuck = metrics::gauge!("seckill_sagas_stuck");
    life.spawn_periodic("stuck gauge", GAUGE_EVERY, move || {
        let (store, stuck) = (store.clone(), stuck.clone());
        async move {
            match store.count_stuck().await {
                Ok(count) => stuck.set(count as f64),
                Err(error) => tracing::debug!(%error, "stuck sagas cannot be counted"),
            }
        }
    });
}
