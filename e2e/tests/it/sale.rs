//! Edge cases that are about more than one service, on embedded backends, through the public door.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use e2e::{World, reason};
use mesh::testing::eventually;
use proto::{Reason, v1::OrderState};
use seckill::config::RoleConfigs;
use tokio::task::JoinSet;
use uuid::Uuid;

const LONG: Duration = Duration::from_secs(900);
const SHORT: Duration = Duration::from_secs(2);

/// Whether the answer leaves open what happened.
fn unknown(error: &proto::Error) -> bool {
    matches!(error.reason, Reason::Overloaded | Reason::DeadlineExceeded | Reason::DependencyDown)
}

/// So many buyers at once, each insisting with one key until it is told something it can believe; answers who was told that an
/// order is placed, by its name, and how often each reason was given to the others.
async fn rush(world: &Arc<World>, sale: &str, buyers: usize) -> (HashSet<String>, BTreeMap<String, usize>) {
    let mut visits = JoinSet::new();
    for i in 0..buyers {
        let (buyer, sale) = (world.buyer(&format!("buyer-{i}")), sale.to_owned());
        let key = Uuid::new_v4().to_string();
        visits.spawn(async move {
            loop {
                match buyer.place_as(&sale, 1, &key).await {
                    Err(error) if unknown(&error) => tokio::time::sleep(Duration::from_millis(50)).await,
                    answer => return answer,
                }
            }
        });
    }
    let (mut orders, mut reasons) = (HashSet::new(), BTreeMap::new());
    while let Some(answer) = visits.join_next().await {
        match answer.expect("no panic") {
            Ok(order) if order.state() == OrderState::Rejected => {
                *reasons.entry(order.reject_reason).or_default() += 1;
            }
            Ok(order) => drop(orders.insert(order.name)),
            Err(error) => *reasons.entry(error.to_string()).or_default() += 1,
        }
    }
    (orders, reasons)
}

#[tokio::test(flavor = "multi_thread")]
async fn e1_a_hundred_units_and_ten_thousand_buyers_end_in_a_hundred_held_orders() {
    // Ten thousand buyers share the cores with the mesh: on a slow machine a winner's permit must not lapse meanwhile.
    let mut roles = RoleConfigs::default();
    roles.stock.grant_grace = Duration::from_secs(300);
    let world = Arc::new(World::embedded_as(roles).await);
    let sale = world.sale(100, LONG).await;
    let (orders, reasons) = rush(&world, &sale, 10_000).await;
    assert_eq!(orders.len(), 100, "{reasons:?}");
    // I8: everything is held and nothing is sold, so nobody may be told that it is over.
    assert!(reasons.keys().all(|reason| reason.starts_with("ALL_HELD")), "{reasons:?}");
    let report = eventually("a hundred held", async || {
        let report = world.operator().stock(&sale).await.ok()?;
        (report.held == 100).then_some(report)
    })
    .await;
    assert_eq!((report.available, report.sold, report.permits), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e2_one_request_id_fifty_times_is_one_order_though_it_took_the_last_unit() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let (alice, key) = (world.buyer("alice"), Uuid::new_v4().to_string());
    let mut clicks = JoinSet::new();
    for _ in 0..50 {
        let (alice, sale, key) = (alice.clone(), sale.clone(), key.clone());
        clicks.spawn(async move { alice.place_as(&sale, 1, &key).await });
    }
    let names: HashSet<String> = clicks.join_all().await.into_iter().map(|o| o.expect("an order").name).collect();
    assert_eq!(names.len(), 1);
    let order = names.iter().next().expect("one");
    assert_eq!(alice.leaves(order, OrderState::Placed).await.state(), OrderState::AwaitingPayment);
    // The gateway knows by now that all is held, and still never lies to the winner.
    assert_eq!(reason(world.buyer("bob").place(&sale).await), Reason::AllHeld);
    assert_eq!(alice.place_as(&sale, 1, &key).await.expect("the same order").name, *order);
    assert_eq!(alice.orders(&sale).await.expect("a list").len(), 1);
    assert_eq!(world.operator().stock(&sale).await.expect("a report").held, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn e6_a_request_id_whose_order_was_released_returns_that_closed_order() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let (alice, key) = (world.buyer("alice"), Uuid::new_v4().to_string());
    let order = alice.place_as(&sale, 1, &key).await.expect("an order");
    alice.leaves(&order.name, OrderState::Placed).await;
    alice.cancel(&order.name).await.expect("cancelled");
    let again = alice.place_as(&sale, 1, &key).await.expect("the closed order");
    assert_eq!((again.state(), again.name), (OrderState::Cancelled, order.name));
    let report = world.rest(&sale).await;
    assert_eq!(report.available, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purchase_ends_paid_and_its_watcher_sees_it_end() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let alice = world.buyer("alice");
    let order = alice.hold(&sale).await.expect("a hold");
    let watcher = tokio::spawn({
        let (alice, name) = (alice.clone(), order.name.clone());
        async move { alice.watch(&name).await }
    });
    alice.pay(&order.name, "sim_approve").await.expect("paid or paying");
    alice.becomes(&order.name, OrderState::Paid).await;
    let seen = watcher.await.expect("no panic").expect("a stream");
    assert_eq!(seen.last(), Some(&OrderState::Paid), "{seen:?}");
    let report = world.rest(&sale).await;
    assert_eq!((report.sold, report.available), (1, 0));
    // E38: SOLD_OUT never becomes a purchase.
    eventually("it is sold out for good", async || {
        (world.buyer("bob").place(&sale).await.err()?.reason == Reason::SoldOut).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e28_two_clicks_on_pay_make_one_charge() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let alice = world.buyer("alice");
    let order = alice.hold(&sale).await.expect("a hold");
    let key = Uuid::new_v4().to_string();
    let mut clicks = JoinSet::new();
    for i in 0..20 {
        // Half of them with the same key, half with keys of their own.
        let key = if i % 2 == 0 { key.clone() } else { Uuid::new_v4().to_string() };
        let (alice, order) = (alice.clone(), order.name.clone());
        clicks.spawn(async move { alice.pay_as(&order, "sim_approve", &key).await });
    }
    for answer in clicks.join_all().await {
        let ended = answer.map(|order| order.state()).map_err(|error| error.reason);
        assert!(matches!(ended, Ok(OrderState::Paid | OrderState::Paying) | Err(Reason::IllegalState)), "{ended:?}");
    }
    alice.becomes(&order.name, OrderState::Paid).await;
    // The audit counts charges (I4).
    world.rest(&sale).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e30_a_declined_payment_keeps_the_hold_and_another_method_may_pay() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let alice = world.buyer("alice");
    let order = alice.hold(&sale).await.expect("a hold");
    assert_eq!(reason(alice.pay(&order.name, "sim_decline").await), Reason::PaymentDeclined);
    assert_eq!(alice.order(&order.name).await.expect("an order").state(), OrderState::AwaitingPayment);
    alice.pay(&order.name, "sim_approve").await.expect("paid");
    alice.becomes(&order.name, OrderState::Paid).await;
    world.rest(&sale).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e33_e36_e38_an_unpaid_hold_lapses_on_time_and_its_unit_is_sold_again() {
    let world = World::embedded().await;
    let sale = world.sale(1, SHORT).await;
    let (alice, bob) = (world.buyer("alice"), world.buyer("bob"));
    let order = alice.hold(&sale).await.expect("a hold");
    assert_eq!(reason(bob.place(&sale).await), Reason::AllHeld);
    let closed = alice.becomes(&order.name, OrderState::Expired).await;
    let ms = |t: &Option<prost_types::Timestamp>| t.as_ref().map(|t| t.seconds * 1000 + i64::from(t.nanos) / 1_000_000);
    let late = ms(&closed.close_time).expect("a close time") - ms(&closed.expire_time).expect("an expire time");
    assert!(late >= 0, "E33: expired {} ms early", -late);
    // E38: what was held is a purchase again; E36: also for her who let it lapse.
    let second = bob.hold(&sale).await.expect("bob gets it");
    bob.cancel(&second.name).await.expect("and gives it back");
    let third = alice.hold(&sale).await.expect("alice may buy again");
    alice.pay(&third.name, "sim_approve").await.expect("paid");
    assert_eq!(reason(alice.pay(&order.name, "sim_approve").await), Reason::IllegalState);
    assert_eq!(world.rest(&sale).await.sold, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn e35_e37_the_limit_holds_in_parallel_and_an_open_hold_is_answered_with_itself() {
    let world = World::embedded().await;
    let sale = world.sale(100, LONG).await;
    let alice = world.buyer("alice");
    let mut clicks = JoinSet::new();
    for _ in 0..30 {
        let (alice, sale) = (alice.clone(), sale.clone());
        clicks.spawn(async move { alice.place(&sale).await });
    }
    let names: HashSet<String> = clicks.join_all().await.into_iter().map(|o| o.expect("her order").name).collect();
    assert_eq!(names.len(), 1, "E37: the open order is the answer");
    let order = names.into_iter().next().expect("one");
    alice.leaves(&order, OrderState::Placed).await;
    assert_eq!(alice.place(&sale).await.expect("her order").name, order);
    alice.pay(&order, "sim_approve").await.expect("paid");
    alice.becomes(&order, OrderState::Paid).await;
    assert_eq!(reason(alice.place(&sale).await), Reason::PurchaseLimitReached, "I7");
    assert_eq!(world.rest(&sale).await.sold, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn e39_another_buyers_order_is_not_there() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    let order = world.buyer("alice").hold(&sale).await.expect("a hold").name;
    let mallory = world.buyer("mallory");
    let absent = format!("orders/{}", Uuid::new_v4().simple());
    for answer in [
        mallory.order(&order).await,
        mallory.pay(&order, "sim_approve").await,
        mallory.cancel(&order).await,
        mallory.order(&absent).await,
        mallory.pay(&absent, "sim_approve").await,
        mallory.cancel(&absent).await,
    ] {
        let error = answer.expect_err("not there");
        assert_eq!((error.reason, error.message.as_str()), (Reason::NotFound, "order not found"));
    }
    assert_eq!(mallory.watch(&order).await.expect_err("not there").reason, Reason::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn e9_stock_raised_mid_sale_reaches_buyers_once_and_is_not_lowered_below_what_is_held() {
    let world = World::embedded().await;
    let sale = world.sale(1, LONG).await;
    world.buyer("alice").hold(&sale).await.expect("a hold");
    let operator = world.operator();
    operator.adjust(&sale, 2).await.expect("raised");
    world.buyer("bob").hold(&sale).await.expect("one of the two");
    assert_eq!(reason(operator.adjust(&sale, -2).await), Reason::IllegalState);
    operator.adjust(&sale, -1).await.expect("lowered");
    assert_eq!(reason(world.buyer("carol").place(&sale).await), Reason::AllHeld);
    let report = operator.stock(&sale).await.expect("a report");
    assert_eq!((report.total, report.held, report.available, report.permits), (2, 2, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_a_mesh_that_dies_in_mid_rush_finishes_what_it_accepted() {
    let mut world = World::embedded().await;
    let sale = world.sale(50, SHORT).await;
    let mut accepted = HashSet::new();
    for round in 0..3 {
        let arc = Arc::new(world);
        let mut visits = tokio::spawn({
            let (world, sale) = (arc.clone(), sale.clone());
            async move { rush(&world, &sale, 200).await.0 }
        });
        if round % 2 == 0 {
            accepted.extend(visits.await.expect("no panic"));
        } else {
            // In the middle of it: what was answered by then counts, the rest is unknown.
            if tokio::time::timeout(Duration::from_millis(30), &mut visits).await.is_err() {
                visits.abort();
            }
        }
        world = eventually("the visits have gone", {
            let mut arc = Some(arc);
            async move || match Arc::try_unwrap(arc.take()?) {
                Ok(world) => Some(world),
                Err(still) => {
                    arc = Some(still);
                    None
                }
            }
        })
        .await;
        world = world.crash_and_restart().await;
    }
    let operator = world.operator();
    for order in &accepted {
        eventually(&format!("{order} ends"), async || {
            let state = operator.order(order).await.ok()?.state();
            matches!(state, OrderState::Expired | OrderState::Rejected).then_some(())
        })
        .await;
    }
    assert_eq!(world.rest(&sale).await.available, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn e15_rebuilds_at_the_same_time_leave_every_unit_on_sale() {
    let world = World::embedded().await;
    let sale = world.sale(10, LONG).await;
    let order = world.buyer("alice").hold(&sale).await.expect("a hold").name;
    let operator = world.operator();
    let mut rebuilds = JoinSet::new();
    for _ in 0..4 {
        let (operator, sale) = (operator.clone(), sale.clone());
        rebuilds.spawn(async move { operator.rebuild(&sale).await });
    }
    rebuilds.join_all().await;
    eventually("R = A again", async || {
        let report = operator.stock(&sale).await.ok()?;
        (report.permits == 9 && report.available == 9).then_some(())
    })
    .await;
    // The limit outlives the rebuild, and so does her order.
    assert_eq!(world.buyer("alice").place(&sale).await.expect("her order").name, order);
    world.buyer("alice").pay(&order, "sim_approve").await.expect("paid");
    assert_eq!(world.rest(&sale).await.sold, 1);
}
