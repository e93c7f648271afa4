//! What operators do about what automation has given up on: the command line, at a real process's door.

use std::time::Duration;

use e2e::{demand_clean, processes::Process};
use mesh::testing::eventually;
use proto::v1::OrderState;
use seckill::{audit, config::StorageArgs};

use crate::kills::PROGRAM;

const LONG: Duration = Duration::from_secs(900);

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_stuck_on_a_silent_provider_is_explained_and_then_finished_by_a_retry() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let outage = dir.path().join("outage");
    let data_dir = dir.path().join("data");
    let (outage_file, data) = (outage.display().to_string(), data_dir.display().to_string());
    // Given up after one attempt, and nobody comes back to it within an hour: what happens then, the operator did.
    let flags = [
        ["--data-dir", &data],
        ["--sim-silent-while", &outage_file],
        ["--saga-attempts", "1"],
        ["--saga-retry-ms", "3600000"],
        ["--saga-retry-cap-ms", "3600000"],
        ["--settle-grace-ms", "3600000"],
    ];
    let mut mesh = Process::start(PROGRAM, flags.concat().into_iter().map(str::to_owned).collect()).await;
    let site = mesh.site();
    let sale = site.sale(3, LONG).await;
    let alice = site.buyer("alice");
    let order = alice.hold(&sale).await.expect("held").name;
    let saga = order.trim_start_matches("orders/").to_owned();

    std::fs::write(&outage, "").expect("written");
    let paying = alice.pay(&order, "sim_approve").await.expect("taken, whatever became of it");
    assert_eq!(paying.state(), OrderState::Paying);
    eventually("the saga is stuck", async || mesh.verb(&["saga", "list"]).0.contains(&saga).then_some(())).await;
    let shown = mesh.verb(&["saga", "show", &saga]).0;
    let told =
        ["STUCK", "units       HELD (1 by", "money       UNCERTAIN (EUR 19.99 by sim_approve", "charge: in progress"];
    assert!(told.iter().all(|told| shown.contains(told)), "{shown}");

    let (explained, _) = mesh.verb(&["saga", "explain", &saga]);
    let retry = "retry    does charge, deduct, mark_paid, announce; then PAID";
    let abandon = "abandon  gives back by void, close, release; then CANCELLED";
    assert!(explained.contains(retry) && explained.contains(abandon), "{explained}");
    assert_eq!(mesh.verb(&["saga", "show", &saga]).0, shown, "explaining changes nothing");

    std::fs::remove_file(&outage).expect("the provider recovers");
    let (retried, _) =
        mesh.verb(&["saga", "retry", &saga, "--reason", "the bank is back", "--operator", "olga", "--output", "json"]);
    let retried: serde_json::Value = serde_json::from_str(&retried).expect("JSON");
    assert_eq!((&retried["stuck"], &retried["name"]), (&false.into(), &format!("sagas/{saga}").into()));
    alice.becomes(&order, OrderState::Paid).await;
    let report = site.settled(&sale).await;
    assert_eq!((report.available, report.held, report.sold), (2, 0, 1));
    // As `saga show` spells the order: the book has one name for it.
    let (_, again) = mesh.verb(&["saga", "retry", &order]);
    assert!(!again.success(), "it is not stuck any more");
    let (rebuilt, _) = mesh.verb(&["stock", "rebuild", &sale, "--output", "json"]);
    let rebuilt: serde_json::Value = serde_json::from_str(&rebuilt).expect("JSON");
    assert_eq!((&rebuilt["permits"], &rebuilt["sold"]), (&"2".into(), &"1".into()));
    assert!(mesh.verb(&["stock", "report", &sale]).0.contains("PERMIT_STATE_OPEN"));
    assert!(mesh.verb(&["stock", "reconcile", &sale]).0.contains("CONSISTENT (0 units)"));
    assert_eq!(mesh.verb(&["dead-letter", "list"]).0.lines().count(), 1, "the heads of columns");
    let target = format!("sagas/{saga}");
    let (actions, _) = mesh.verb(&["actions", "--target", &target, "--output", "json"]);
    let actions: serde_json::Value = serde_json::from_str(&actions).expect("JSON");
    let told =
        |at: usize| ["operator", "outcome", "reason", "error"].map(|field| actions["actions"][at][field].clone());
    assert_eq!(told(0), ["seckill-cli", "REFUSED", "", "ILLEGAL_STATE"]);
    assert_eq!(told(1), ["olga", "DONE", "the bank is back", ""]);
    // Money: captured once, as PAID says.
    mesh.kill();
    let storage = StorageArgs { data_dir, ..Default::default() };
    demand_clean(&audit::Source::new(&storage, None).expect("the audit has sources")).await;
}
