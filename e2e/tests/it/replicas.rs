//! Two replicas of every role on real servers: one that wakes when its work was taken over, and all of them restarted
//! one after the other. What is demanded is what `cargo xtask chaos` demands (I5, E16).

use std::path::Path;

use e2e::chaos::{Chaos, faults::Card, fleet::Role};
use seckill::config::StorageArgs;

use crate::kills::{PROGRAM, REAL_BACKENDS, fresh_storage};

/// Buyers a second: enough to have every kind of them at every moment, few enough for a machine that does other things.
const RATE: f64 = 20.0;
const SEED: u64 = 16;

async fn chaos(storage: &StorageArgs, logs: &Path, cards: &[Card]) {
    // Nobody is asked to kill a server here.
    let keeper = logs.join("nobody");
    let mut chaos = Chaos::start(Path::new(PROGRAM), storage, logs, &keeper, SEED).await.expect("the mesh starts");
    let mut cards = cards.iter().copied();
    chaos.faults(RATE, |_| cards.next()).await.expect("the faults are injected");
    assert!(Box::pin(chaos.verdict()).await.expect("a verdict"), "something was violated, see above");
}

#[tokio::test(flavor = "multi_thread")]
async fn e16_a_replica_that_wakes_after_its_work_was_taken_over_changes_nothing() {
    let _turn = REAL_BACKENDS.lock().await;
    let Some(storage) = fresh_storage("SECKILL_TEST_POSTGRES_URL").await else { return };
    let logs = tempfile::tempdir().expect("a temporary folder");
    chaos(&storage, logs.path(), &[Card::Zombie(Role::Coordinator), Card::Zombie(Role::Stock)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e19_ten_thousand_unpaid_orders_expire_on_time() {
    let _turn = REAL_BACKENDS.lock().await;
    let Some(storage) = fresh_storage("SECKILL_TEST_POSTGRES_URL").await else { return };
    let logs = tempfile::tempdir().expect("a temporary folder");
    let keeper = logs.path().join("nobody");
    let start = Chaos::start(Path::new(PROGRAM), &storage, logs.path(), &keeper, SEED);
    let mut chaos = start.await.expect("the mesh starts");
    chaos.expiry(10_000).await.expect("the orders are placed");
    assert!(Box::pin(chaos.verdict()).await.expect("a verdict"), "something was violated, see above");
}

#[tokio::test(flavor = "multi_thread")]
async fn e16_a_rolling_restart_of_every_role_loses_no_request() {
    let _turn = REAL_BACKENDS.lock().await;
    let Some(storage) = fresh_storage("SECKILL_TEST_POSTGRES_URL").await else { return };
    let logs = tempfile::tempdir().expect("a temporary folder");
    chaos(&storage, logs.path(), &[Card::Rolling]).await;
}
