//! The whole mesh in one thread, on paused time, from a seed.
//!
//! Two replicas of every role, started by their own `start`, on real SQL and embedded backends, while buyers come and
//! an operator interferes; and at every port a layer of faults that draws from the seed what goes wrong ([`faults`]).
//! Then all is calm, and within bounded time everything must have come to a good end ([`check`]).
//!
//! The same seed is the same run, to the last message: what fails can be looked at again. That rests on one thread, on
//! tokio's paused clock, on `biased` selects, on one source of chance, and on SQL that happens at once
//! ([`mesh::testing::at_once`]).

mod bank;
mod bus;
mod check;
mod data;
mod faults;
mod kv;
mod net;
mod people;
mod plan;
mod ports;
mod world;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    sync::{Arc, Once},
    time::Duration,
};

use anyhow::Context;
use tokio::time::{Instant, sleep};

use faults::Run;
pub use faults::{Disaster, Fault, Note, Port};
use people::Told;
use plan::{Plan, STORM};
use world::World;

/// How long after the storm everything must have come to its end.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than anything that was sent before is on its way.
const STRAGGLERS: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    /// What is not as it must be.
    pub broken: Vec<String>,
    /// How often what went wrong at which port.
    pub faults: BTreeMap<(Fault, Port), u64>,
    /// How often what struck.
    pub disasters: BTreeMap<Disaster, u64>,
    /// What happened, where notes were asked for.
    pub notes: Vec<Note>,
    /// The same for runs in which the same happened.
    pub fingerprint: u64,
    /// Orders that somebody has seen accepted.
    pub orders: usize,
    /// How long it took, on the run's own clock.
    pub took: Duration,
}

/// Runs one seed in this thread.
pub fn run(seed: u64, detailed: bool) -> anyhow::Result<Outcome> {
    catch_panics();
    mesh::chance::seed(seed);
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().context("a runtime")?;
    let mut outcome = runtime.block_on(simulate(seed, detailed))?;
    drop(runtime);
    outcome.broken.extend(PANICS.take());
    Ok(outcome)
}

async fn simulate(seed: u64, detailed: bool) -> anyhow::Result<Outcome> {
    let plan = Plan::of(seed);
    let run = Arc::new(Run::new(seed, &plan, detailed));
    run.note(&"plan".into(), || format!("{plan:#?}"));
    let world = World::new(run.clone(), plan).await?;
    let told = Arc::new(Told::default());
    let started = Instant::now();
    world.start().await;
    people::open_sale(&world, &told).await;

    let mut people = Vec::new();
    for number in 0..world.plan.buyers {
        let seed = seed.wrapping_mul(1_000).wrapping_add(number as u64);
        people.push(tokio::spawn(people::buyer(world.clone(), told.clone(), number, seed)));
    }
    people.push(tokio::spawn(people::operate(world.clone(), told.clone())));
    let storm = Instant::now();
    for strike in world.plan.strikes.clone() {
        let world = world.clone();
        people.push(tokio::spawn(async move {
            tokio::time::sleep_until(storm + strike.at).await;
            world.strike(strike).await;
        }));
    }
    tokio::time::sleep_until(storm + STORM).await;
    world.calm();
    run.note(&"outside".into(), || "all is calm".to_owned());
    let calm = Instant::now();

    let mut broken = Vec::new();
    // Whoever still wants something gets it now; then nothing more happens from outside.
    for somebody in people {
        if tokio::time::timeout_at(calm + PATIENCE, somebody).await.is_err() {
            broken.push("somebody still waits, long after all is calm".to_owned());
        }
    }
    loop {
        let mut unsettled = check::check(&world, &told);
        if unsettled.is_empty() {
            // Once more, when the last doubled call and the last late word of the bank have come.
            sleep(STRAGGLERS).await;
            unsettled = check::check(&world, &told);
        }
        if unsettled.is_empty() {
            break;
        }
        if calm.elapsed() > PATIENCE {
            broken.extend(unsettled);
            break;
        }
        sleep(LOOK_EVERY).await;
    }
    broken.extend(run.alarms());
    world.net.close();
    let (faults, disasters) = run.counts();
    let (notes, fingerprint) = run.record();
    let orders = told
        .orders
        .lock()
        .map_or(0, |orders| orders.iter().map(|(order, _)| order).collect::<std::collections::BTreeSet<_>>().len());
    Ok(Outcome { broken, faults, disasters, notes, fingerprint, orders, took: started.elapsed() })
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A panic is a bug wherever it happens, also where it is caught.
fn catch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(format!("panic: {info}")));
            usual(info);
        }));
    });
}
