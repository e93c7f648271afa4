//! The coordinator as a whole, by edge case: a real store, a real embedded bus, and the other services as fakes that
//! count every unit and every cent.

mod fakes;
mod proof;
mod world;

use std::time::Duration;

use fakes::{GRACE_MS, HoldState, When};
use futures::future::join_all;
use mesh::{
    bus::{Bus, ConsumerSpec, Message},
    testing::eventually,
};
use proto::{
    OrderId, Reason, RequestId,
    internal::PaymentState,
    subjects,
    v1::{
        self, OrderState,
        saga_holdings::{Money, Units},
    },
};
use world::{Publish, SALE, World, config, order_id};

// Accepting.

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_accepted_locked_paid_and_deducted() {
    let world = World::new().await;
    let request = RequestId::random();
    let placed = world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    assert_eq!((placed.name.as_str(), placed.state()), (id.name().as_str(), OrderState::Placed));
    assert_eq!(placed.amount.unwrap().units, 19);
    world.until(id, "AWAITING_PAYMENT").await;
    assert_eq!(world.record(id), Some(OrderState::AwaitingPayment));
    let paid = world.pay("alice", id, "approve").await.unwrap();
    assert_eq!(paid.state(), OrderState::Paid);
    assert_eq!((world.units(), world.captures(id)), ((9, 0, 0, 1), 1));
    assert_eq!(world.record(id), Some(OrderState::Paid));
    assert_eq!(world.bus.last_sequence(subjects::EVENTS).await.unwrap(), 1, "announced");
    let history: Vec<_> = world.saga(id).await.unwrap().history.into_iter().map(|e| e.to).collect();
    assert_eq!(history, ["AWAITING_PAYMENT", "PAYING", "CAPTURED", "PAID"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn e2_one_request_fifty_times_in_parallel_is_one_order_and_one_unit() {
    let world = World::new().await;
    world.sale(1, 1, 60_000);
    let request = RequestId::random();
    let orders = join_all((0..50).map(|_| world.accept("alice", 1, &request))).await;
    let id = order_id("alice", &request);
    assert!(orders.iter().all(|order| order.as_ref().unwrap().name == id.name()), "also the last unit's");
    world.until(id, "AWAITING_PAYMENT").await;
    assert_eq!((world.units(), world.fakes.state().grants), ((0, 0, 1, 0), 1));
    let again = world.accept("alice", 1, &request).await.unwrap();
    assert_eq!((again.name, world.bus.last_sequence(subjects::ORDERS).await.unwrap()), (id.name(), 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_payload_under_the_same_request_is_refused() {
    let world = World::new().await;
    world.sale(10, 5, 60_000);
    let sale = world.fakes.state().sales[SALE].clone();
    world.fakes.state().sales.insert("autumn".to_owned(), sale);
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let reused = |result: Result<v1::Order, proto::Error>| result.unwrap_err().reason;
    assert_eq!(reused(world.accept("alice", 2, &request).await), Reason::RequestIdReused);
    assert_eq!(reused(world.accept_of("autumn", "alice", 1, &request).await), Reason::RequestIdReused);
    world.until(order_id("alice", &request), "AWAITING_PAYMENT").await;
    assert_eq!(reused(world.accept_of("autumn", "alice", 1, &request).await), Reason::RequestIdReused);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_orders_name_their_field_and_take_nothing() {
    let world = World::new().await;
    let request = RequestId::random();
    for (quantity, sale, field) in
        [(0, SALE, "quantity"), (-1, SALE, "quantity"), (i64::MAX, SALE, "quantity"), (1, "A b", "sale")]
    {
        let error = world.accept_of(sale, "alice", quantity, &request).await.unwrap_err();
        assert_eq!(error.reason, Reason::InvalidField);
        assert!(error.message.starts_with(field), "{error}");
    }
    assert_eq!(world.units(), (10, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e6_a_released_order_is_answered_closed_and_takes_no_unit() {
    let world = World::new().await;
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    world.until(id, "AWAITING_PAYMENT").await;
    assert_eq!(world.cancel("alice", id).await.unwrap().state(), OrderState::Cancelled);
    let again = world.accept("alice", 1, &request).await.unwrap();
    assert_eq!((again.name, again.state), (id.name(), OrderState::Cancelled.into()));
    assert_eq!(world.units(), (10, 0, 0, 0));
    // Redis lost: nothing is remembered there, and a fresh grant is given; nor does the stream remember.
    world.bus.publishing(Publish::Repeats);
    {
        let mut state = world.fakes.state();
        state.holds.clear();
        state.sales.get_mut(SALE).unwrap().epoch = 2;
    }
    let again = world.accept("alice", 1, &request).await.unwrap();
    assert_eq!(again.state(), OrderState::Cancelled, "the saga remembers; the surplus grant is the sweep's");
    assert_eq!(world.bus.last_sequence(subjects::ORDERS).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn e6_a_permit_that_lapsed_unseen_ends_in_a_rejected_order() {
    let world = World::new().await;
    world.bus.publishing(Publish::Fails);
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap_err();
    let id = order_id("alice", &request);
    // The sweep gives the orphan grant back.
    {
        let mut state = world.fakes.state();
        state.holds.get_mut(&id.to_string()).unwrap().state = HoldState::Released;
        state.sales.get_mut(SALE).unwrap().free += 1;
    }
    world.bus.publishing(Publish::Works);
    // Nothing that is sure to be refused is called PLACED.
    assert_eq!(world.accept("alice", 1, &request).await.unwrap_err().reason, Reason::Overloaded);
    world.until(id, "REJECTED").await;
    assert_eq!(world.accept("alice", 1, &request).await.unwrap().state(), OrderState::Rejected);
    let record = world.fakes.state().records[&id.to_string()].clone();
    assert_eq!((record.state, record.reason), (OrderState::Rejected, Reason::PermitLapsed));
    assert_eq!(world.units(), (10, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e11_an_order_that_the_sweep_may_have_overtaken_is_not_called_placed_before_it_is_locked() {
    let world = World::new().await;
    for publish in [Publish::Fails, Publish::Forgets] {
        world.bus.publishing(publish);
        // Before it is published: what the bus forgot to acknowledge, the funnel has at once.
        world.fakes.state().down.insert("lock");
        let request = RequestId::random();
        world.accept("alice", 1, &request).await.unwrap_err();
        let id = order_id("alice", &request);
        // So long ago that the sweep may be at work on it at this moment.
        world.fakes.state().holds.get_mut(&id.to_string()).unwrap().granted_at -= GRACE_MS;
        world.bus.publishing(Publish::Works);
        for _ in 0..2 {
            let error = world.accept("alice", 1, &request).await.unwrap_err();
            assert_eq!(error.reason, Reason::Overloaded, "{publish:?}");
            assert!(error.retry_after.is_some(), "{publish:?}");
        }
        world.fakes.state().down.clear();
        world.until(id, "AWAITING_PAYMENT").await;
        assert_eq!(world.accept("alice", 1, &request).await.unwrap().state(), OrderState::AwaitingPayment);
        world.cancel("alice", id).await.unwrap();
    }
    assert_eq!(world.units(), (10, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e17_a_publish_without_an_answer_is_not_undone() {
    let world = World::new().await;
    for (buyer, fault) in [("alice", Publish::Forgets), ("bob", Publish::Fails)] {
        world.bus.publishing(fault);
        let request = RequestId::random();
        let error = world.accept(buyer, 1, &request).await.unwrap_err();
        assert_eq!(error.reason, Reason::DependencyDown);
        let id = order_id(buyer, &request);
        let hold = world.fakes.state().holds[&id.to_string()].state;
        assert_ne!(hold, HoldState::Released, "{fault:?}: nothing is given back");
        world.bus.publishing(Publish::Works);
        let order = world.accept(buyer, 1, &request).await.unwrap();
        assert_eq!(order.name, id.name(), "{fault:?}: the same request_id is the same order");
        world.until(id, "AWAITING_PAYMENT").await;
    }
    assert_eq!(world.units(), (8, 0, 2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e36_e37_at_the_limit_the_open_order_is_answered_and_a_closed_one_makes_room() {
    let mut world = World::new().await;
    // Not written by the funnel yet: answered from its grant.
    world.fakes.state().down.insert("lock");
    let first = RequestId::random();
    world.accept("alice", 1, &first).await.unwrap();
    let id = order_id("alice", &first);
    let again = world.accept("alice", 1, &RequestId::random()).await.unwrap();
    assert_eq!((again.name, again.state), (id.name(), OrderState::Placed.into()));
    world.fakes.state().down.clear();
    world.until(id, "AWAITING_PAYMENT").await;
    let again = world.accept("alice", 1, &RequestId::random()).await.unwrap();
    assert_eq!((again.name, again.state), (id.name(), OrderState::AwaitingPayment.into()));
    world.cancel("alice", id).await.unwrap();
    let second = world.hold("alice").await;
    assert_ne!(second, id, "E36");
    world.pay("alice", second, "approve").await.unwrap();
    let error = world.accept("alice", 1, &RequestId::random()).await.unwrap_err();
    assert_eq!(error.reason, Reason::PurchaseLimitReached);
    assert_eq!(world.units(), (9, 0, 0, 1));
    world.restart().await;
    assert_eq!(world.accept("alice", 1, &first).await.unwrap().state(), OrderState::Cancelled);
}

/// A grant is no accepted order: its publish may have failed, and only its buyer's next request makes it one (I5).
#[tokio::test(flavor = "multi_thread")]
async fn e37_an_open_order_that_was_never_published_is_before_it_is_answered() {
    let world = World::new().await;
    world.bus.publishing(Publish::Fails);
    let first = RequestId::random();
    world.accept("alice", 1, &first).await.unwrap_err();
    let error = world.accept("alice", 1, &RequestId::random()).await.unwrap_err();
    assert_eq!(error.reason, Reason::DependencyDown, "nothing is PLACED that is not durable");
    world.bus.publishing(Publish::Works);
    let order = world.accept("alice", 1, &RequestId::random()).await.unwrap();
    let id = order_id("alice", &first);
    assert_eq!((&order.name, order.state()), (&id.name(), OrderState::Placed));
    world.until(id, "AWAITING_PAYMENT").await;
    assert_eq!(world.units(), (9, 0, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_winner_who_retries_is_not_told_sold_out_though_the_permits_forgot() {
    let world = World::new().await;
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    world.until(id, "AWAITING_PAYMENT").await;
    {
        let mut state = world.fakes.state();
        state.holds.clear();
        state.sales.get_mut(SALE).unwrap().free = 0;
    }
    assert_eq!(world.accept("alice", 1, &request).await.unwrap().name, id.name());
    let stranger = world.accept("bob", 1, &RequestId::random()).await.unwrap_err();
    assert_eq!(stranger.reason, Reason::SoldOut);
}

// The funnel.

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_grant_is_renewed_and_only_rejected_when_nothing_is_left() {
    let mut world = World::stopped(config()).await;
    world.sale(1, 1, 60_000);
    world.start().await;
    world.fakes.state().down.insert("lock");
    let requests = [RequestId::random(), RequestId::random()];
    world.accept("alice", 1, &requests[0]).await.unwrap();
    // The rebuild forgets alice's grant; bob is given the same unit. The fence is past both grants.
    {
        let mut state = world.fakes.state();
        state.holds.clear();
        state.sales.get_mut(SALE).unwrap().free = 1;
    }
    world.accept("bob", 1, &requests[1]).await.unwrap();
    {
        let mut state = world.fakes.state();
        state.holds.clear();
        let sale = state.sales.get_mut(SALE).unwrap();
        (sale.free, sale.epoch) = (1, 2);
        state.down.clear();
    }
    let ids = [order_id("alice", &requests[0]), order_id("bob", &requests[1])];
    let states = [
        world.until(ids[0], "AWAITING_PAYMENT|REJECTED").await.state,
        world.until(ids[1], "AWAITING_PAYMENT|REJECTED").await.state,
    ];
    assert!(states.contains(&"AWAITING_PAYMENT".to_owned()) && states.contains(&"REJECTED".to_owned()), "{states:?}");
    assert_eq!(world.units(), (0, 0, 1, 0));
    assert_eq!(world.row(ids[usize::from(states[1] == "AWAITING_PAYMENT")]).await.unwrap().grant_epoch, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_was_told_no_stays_rejected_though_a_unit_comes_back_before_it_is_written() {
    let mut world = World::stopped(config()).await;
    world.sale(1, 1, 60_000);
    world.start().await;
    world.fakes.state().down.insert("lock");
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    // A rebuild forgets her grant, and somebody else is quicker.
    {
        let mut state = world.fakes.state();
        state.holds.clear();
        let sale = state.sales.get_mut(SALE).unwrap();
        (sale.free, sale.epoch) = (0, 2);
    }
    // Dead between the record and the saga.
    world.fakes.gate.arm("create", When::After);
    world.fakes.state().down.clear();
    assert!(world.fakes.gate.reached().await);
    assert_eq!(world.record(id), Some(OrderState::Rejected));
    world.fakes.state().sales.get_mut(SALE).unwrap().free = 1;
    world.restart().await;
    world.until(id, "REJECTED").await;
    assert_eq!(world.units(), (1, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_hangs_holds_up_nobody_else() {
    let world = World::new().await;
    world.fakes.gate.arm("lock", When::Before);
    world.accept("alice", 1, &RequestId::random()).await.unwrap();
    assert!(world.fakes.gate.reached().await);
    world.fakes.gate.disarm();
    let asked = std::time::Instant::now();
    world.hold("bob").await;
    let step = Duration::from_millis(world.config.saga_step_timeout_ms);
    assert!(asked.elapsed() < step, "only once the call for alice was given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn e20_a_poison_message_becomes_a_dead_letter_and_blocks_nobody() {
    let world = World::new().await;
    let before = world.hold("alice").await;
    let poison = Message {
        subject: subjects::orders_placed(Duration::from_secs(60)),
        id: "poison".to_owned(),
        headers: Default::default(),
        payload: b"\xff\xffnot an order".as_slice().into(),
    };
    world.bus.publish(subjects::ORDERS, vec![poison]).await.pop().unwrap().unwrap();
    let after = world.hold("bob").await;
    let letters = async || {
        let request = v1::ListDeadLettersRequest::default();
        world.client().list_dead_letters(request).await.unwrap().into_inner().dead_letters
    };
    let letter = eventually("a dead letter", async || letters().await.pop()).await;
    assert_eq!((letter.message_id.as_str(), letter.payload.starts_with(b"\xff\xff")), ("poison", true));
    assert!(letter.reason.contains("OrderPlaced"), "{}", letter.reason);
    let get = v1::GetDeadLetterRequest { dead_letter: letter.name.clone() };
    assert_eq!(world.client().get_dead_letter(get.clone()).await.unwrap().into_inner(), letter);
    let request = v1::RedriveDeadLetterRequest { dead_letter: letter.name.clone(), ..Default::default() };
    world.client().redrive_dead_letter(request.clone()).await.unwrap();
    eventually("the same poison again", async || letters().await.pop().filter(|l| l.name != letter.name)).await;
    assert_eq!(
        proto::Error::from(world.client().redrive_dead_letter(request).await.unwrap_err()).reason,
        Reason::NotFound
    );
    let gone = proto::Error::from(world.client().get_dead_letter(get).await.unwrap_err());
    assert_eq!(gone.reason, Reason::NotFound);
    for id in [before, after] {
        assert_eq!(world.saga(id).await.unwrap().state, "AWAITING_PAYMENT");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e21_while_a_dependency_is_away_orders_wait_and_none_is_lost() {
    let world = World::new().await;
    world.fakes.state().down.extend(["lock", "create"]);
    let requests: Vec<_> = (0..5).map(|_| RequestId::random()).collect();
    for (n, request) in requests.iter().enumerate() {
        world.accept(&format!("buyer-{n}"), 1, request).await.unwrap();
    }
    world.fakes.state().down.remove("lock");
    eventually("locked", async || (world.units() == (5, 0, 5, 0)).then_some(())).await;
    for (n, request) in requests.iter().enumerate() {
        assert!(world.row(order_id(&format!("buyer-{n}"), request)).await.is_none(), "no saga without its record");
    }
    world.fakes.state().down.clear();
    for (n, request) in requests.iter().enumerate() {
        world.until(order_id(&format!("buyer-{n}"), request), "AWAITING_PAYMENT").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e22_replaying_everything_changes_nothing() {
    let mut world = World::new().await;
    let mut ids = Vec::new();
    for buyer in ["paid", "cancelled", "held"] {
        ids.push(world.hold(buyer).await);
    }
    world.pay("paid", ids[0], "approve").await.unwrap();
    world.cancel("cancelled", ids[1]).await.unwrap();
    let snapshot = async |world: &World| {
        let mut rows = Vec::new();
        for id in &ids {
            rows.push(world.row(*id).await.unwrap());
        }
        let state = world.fakes.state();
        (rows, state.holds.clone(), state.records.clone(), state.payments.clone(), state.captures.clone())
    };
    let before = snapshot(&world).await;
    for stream in [subjects::ORDERS, subjects::PAYMENTS] {
        let last = world.bus.last_sequence(stream).await.unwrap();
        for sequence in 1..=last {
            let mut message = world.bus.read(stream, sequence).await.unwrap().unwrap();
            message.id = format!("again-{sequence}");
            world.bus.publish(stream, vec![message]).await.pop().unwrap().unwrap();
        }
    }
    world.restart().await;
    for (stream, consumer) in [(subjects::ORDERS, subjects::FUNNEL), (subjects::PAYMENTS, subjects::SETTLER)] {
        let last = world.bus.last_sequence(stream).await.unwrap();
        eventually("all settled", async || {
            let progress = world.bus.progress(stream, consumer).await.unwrap()?;
            (progress.settled_through >= last).then_some(())
        })
        .await;
    }
    assert_eq!(snapshot(&world).await, before);
}

// Deadlines.

#[tokio::test(flavor = "multi_thread")]
async fn e33_no_order_expires_early_or_late_and_its_unit_comes_back() {
    let world = World::new().await;
    world.sale(40, 1, 1_500);
    let requests: Vec<_> = (0..40).map(|_| RequestId::random()).collect();
    let buyers: Vec<_> = (0..40).map(|n| format!("buyer-{n}")).collect();
    join_all(buyers.iter().zip(&requests).map(|(buyer, request)| world.accept(buyer, 1, request))).await;
    for (buyer, request) in buyers.iter().zip(&requests) {
        let id = order_id(buyer, request);
        world.until(id, "EXPIRED").await;
        let row = world.row(id).await.unwrap();
        let late = row.close_at.unwrap() - row.expire_at;
        assert!((0..1_000).contains(&late), "{late} ms after its deadline");
        assert_eq!(row.expire_at - row.create_at, 1_500);
        world.until_record(id, OrderState::Expired).await;
    }
    assert_eq!(world.units(), (40, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e33_the_sagas_deadline_counts_whatever_a_second_message_says() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    // Somebody opens a quicker lane, and alice's order turns up in it with a deadline that has passed.
    let quick = fakes::Sale { window_ms: 300, ..world.fakes.state().sales[SALE].clone() };
    world.fakes.state().sales.insert("quick".to_owned(), quick);
    let request = RequestId::random();
    world.accept_of("quick", "bob", 1, &request).await.unwrap();
    let first = world.bus.read(subjects::ORDERS, 1).await.unwrap().unwrap();
    let mut order: proto::internal::OrderPlaced = prost::Message::decode(first.payload.clone()).unwrap();
    order.expire_at_ms = order.create_at_ms;
    let again = Message {
        subject: subjects::orders_placed(Duration::from_millis(300)),
        id: "again".to_owned(),
        payload: prost::Message::encode_to_vec(&order).into(),
        ..first
    };
    world.bus.publish(subjects::ORDERS, vec![again]).await.pop().unwrap().unwrap();
    world.until(order_id("bob", &request), "EXPIRED").await;
    assert_eq!(world.saga(id).await.unwrap().state, "AWAITING_PAYMENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn e18_without_any_lane_the_sweep_expires() {
    let mut world = World::stopped(config()).await;
    world.sale(10, 1, 600);
    world.bus.take_lanes_away();
    world.start().await;
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    world.until(id, "EXPIRED").await;
    let row = world.row(id).await.unwrap();
    let late = row.close_at.unwrap() - row.expire_at;
    assert!((0..1_500).contains(&late), "{late} ms after its deadline");
    assert_eq!(world.units(), (10, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_alone_expires_too_and_survives_a_restart() {
    let mut world = World::stopped(coordinator::Config { deadline_sweep_ms: 3_600_000, ..config() }).await;
    world.sale(10, 1, 1_200);
    world.start().await;
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    world.until(id, "AWAITING_PAYMENT").await;
    world.restart().await;
    world.until(id, "EXPIRED").await;
    let row = world.row(id).await.unwrap();
    assert!(row.close_at.unwrap() >= row.expire_at);
    assert_eq!(world.units(), (10, 0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e23_paying_and_expiring_race_and_exactly_one_wins() {
    let world = World::new().await;
    world.sale(1_000, 1, 700);
    let rounds = 60;
    let races = (0..rounds).map(|n| {
        let world = &world;
        async move {
            let buyer = format!("buyer-{n}");
            let request = RequestId::random();
            let placed = world.accept(&buyer, 1, &request).await.unwrap();
            let id = order_id(&buyer, &request);
            world.until(id, "AWAITING_PAYMENT|EXPIRING|EXPIRED").await;
            // Around the deadline, a little earlier or later each time.
            let expire = placed.expire_time.unwrap();
            let due = expire.seconds * 1_000 + i64::from(expire.nanos) / 1_000_000;
            tokio::time::sleep(world.clock.until(due - 30 + n)).await;
            let paid = world.pay(&buyer, id, "approve").await;
            let end = world.until(id, "PAID|EXPIRED|REFUNDED").await;
            (id, paid, end.state)
        }
    });
    let mut ends = std::collections::BTreeMap::<String, i64>::new();
    for (id, paid, end) in join_all(races).await {
        match end.as_str() {
            "PAID" => {
                assert_eq!((world.captures(id), world.refunds(id), paid.unwrap().state()), (1, 0, OrderState::Paid))
            }
            "EXPIRED" => {
                assert_eq!((world.captures(id), paid.unwrap_err().reason), (0, Reason::IllegalState));
            }
            other => panic!("{other}: nobody paid late"),
        }
        *ends.entry(end).or_default() += 1;
    }
    let paid = ends.get("PAID").copied().unwrap_or(0);
    assert_eq!(world.units(), (1_000 - paid, 0, 0, paid), "{ends:?}");
}

// Paying.

#[tokio::test(flavor = "multi_thread")]
async fn e28_two_clicks_make_one_charge() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    let request = RequestId::random();
    let clicks = join_all((0..8).map(|_| world.pay_as("alice", id, "approve", &request))).await;
    for order in clicks {
        assert!(matches!(order.unwrap().state(), OrderState::Paying | OrderState::Paid));
    }
    world.until(id, "PAID").await;
    assert_eq!(world.pay_as("alice", id, "approve", &request).await.unwrap().state(), OrderState::Paid);
    assert_eq!((world.captures(id), world.fakes.state().payments.len()), (1, 1));
    let reused = world.pay_as("alice", id, "hang", &request).await.unwrap_err();
    assert_eq!(reused.reason, Reason::RequestIdReused);
    let other = world.pay("alice", id, "approve").await.unwrap_err();
    assert_eq!((other.reason, other.metadata["state"].as_str()), (Reason::IllegalState, "PAID"));

    let id = world.hold("bob").await;
    let clicks = join_all((0..8).map(|_| world.pay("bob", id, "approve"))).await;
    assert_eq!(clicks.iter().filter(|c| c.is_ok()).count(), 1, "different requests, one charge");
    assert_eq!(world.captures(id), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn e30_a_declined_payment_keeps_the_hold_for_another_try() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    let request = RequestId::random();
    for _ in 0..2 {
        let error = world.pay_as("alice", id, "decline", &request).await.unwrap_err();
        assert_eq!((error.reason, error.metadata["declineCode"].as_str()), (Reason::PaymentDeclined, "no_funds"));
    }
    assert_eq!((world.units(), world.saga(id).await.unwrap().state.as_str()), ((9, 0, 1, 0), "AWAITING_PAYMENT"));
    assert_eq!(world.record(id), Some(OrderState::AwaitingPayment));
    let error = world.pay("alice", id, "seashells").await.unwrap_err();
    assert_eq!(error.reason, Reason::InvalidField);
    assert!(error.message.starts_with("payment_method"), "{error}");
    assert_eq!(world.pay("alice", id, "approve").await.unwrap().state(), OrderState::Paid);
    assert_eq!(world.captures(id), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_payment_answers_paying_and_holds_up_nobody_else() {
    let world = World::new().await;
    let (slow, quick) = (world.hold("slow").await, world.hold("quick").await);
    let slowly = world.pay("slow", slow, "slow");
    let quickly = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = std::time::Instant::now();
        let paid = world.pay("quick", quick, "approve").await.unwrap();
        (paid.state(), begun.elapsed() < Duration::from_millis(250))
    };
    let (slowly, quickly) = futures::join!(slowly, quickly);
    assert_eq!(quickly, (OrderState::Paid, true));
    assert_eq!(slowly.unwrap().state(), OrderState::Paying);
    world.until(slow, "PAID").await;
    assert_eq!((world.captures(slow), world.units()), (1, (8, 0, 0, 2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payment_that_is_decided_later_is_announced_and_finishes_the_order() {
    let world = World::new().await;
    let (yes, no) = (world.hold("yes").await, world.hold("no").await);
    for (buyer, id) in [("yes", yes), ("no", no)] {
        assert_eq!(world.pay(buyer, id, "hang").await.unwrap().state(), OrderState::Paying);
        assert_eq!(world.record(id), Some(OrderState::Paying));
        let busy = world.pay(buyer, id, "approve").await.unwrap_err();
        assert_eq!(busy.metadata["state"], "PAYING");
        assert_eq!(world.cancel(buyer, id).await.unwrap_err().reason, Reason::IllegalState);
    }
    world.fakes.settle(&yes.to_string(), PaymentState::Captured).await;
    world.fakes.settle(&no.to_string(), PaymentState::Declined).await;
    world.until(yes, "PAID").await;
    world.until(no, "AWAITING_PAYMENT").await;
    world.until_record(no, OrderState::AwaitingPayment).await;
    assert_eq!(world.pay("no", no, "approve").await.unwrap().state(), OrderState::Paid);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_payment_is_asked_for_though_no_record_can_show_it() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    world.fakes.state().down.insert("show");
    assert_eq!(world.pay("alice", id, "hang").await.unwrap().state(), OrderState::Paying);
    assert_eq!(world.record(id), Some(OrderState::AwaitingPayment));
    // Not announced: only who asks finds out.
    world.fakes.state().payments.values_mut().for_each(|payment| payment.state = PaymentState::Captured);
    world.until(id, "PAID").await;
    world.until_record(id, OrderState::Paid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_payment_is_shown_by_whoever_takes_it_up() {
    let mut world = World::new().await;
    let id = world.hold("alice").await;
    die_at(&mut world, "charge", When::Before, async |world| drop(world.pay("alice", id, "hang").await)).await;
    world.until_record(id, OrderState::Paying).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e29_a_unit_is_not_resold_while_its_payment_is_unknown() {
    let world = World::new().await;
    world.sale(1, 1, 500);
    let request = RequestId::random();
    world.accept("alice", 1, &request).await.unwrap();
    let id = order_id("alice", &request);
    world.until(id, "AWAITING_PAYMENT").await;
    world.fakes.state().void_answer = Some(PaymentState::Pending);
    world.pay("alice", id, "hang").await.unwrap();
    let due = world.row(id).await.unwrap().expire_at;
    // Long after the deadline, and after the provider was asked to void it.
    eventually("asked again after the deadline", async || {
        let row = world.row(id).await?;
        (world.clock.now_ms() > due + 500 && row.attempts > 1).then_some(())
    })
    .await;
    assert_eq!((world.units(), world.row(id).await.unwrap().state.as_str()), ((0, 0, 1, 0), "PAYING"));
    assert_eq!(world.accept("bob", 1, &RequestId::random()).await.unwrap_err().reason, Reason::AllHeld);
    world.fakes.state().void_answer = Some(PaymentState::Cancelled);
    world.until(id, "EXPIRED").await;
    assert_eq!((world.units(), world.captures(id)), ((1, 0, 0, 0), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn e24_late_money_gets_a_unit_or_goes_back_exactly_once() {
    let world = World::new().await;
    world.sale(2, 1, 500);
    let requests = [RequestId::random(), RequestId::random()];
    let mut ids = Vec::new();
    for (buyer, request) in ["alice", "bob"].into_iter().zip(&requests) {
        world.accept(buyer, 1, request).await.unwrap();
        let id = order_id(buyer, request);
        world.until(id, "AWAITING_PAYMENT").await;
        world.pay(buyer, id, "hang").await.unwrap();
        ids.push(id);
    }
    // The provider says cancelled, and captures all the same.
    world.fakes.state().void_answer = Some(PaymentState::Cancelled);
    for id in &ids {
        world.until(*id, "EXPIRED").await;
    }
    // One unit is gone meanwhile.
    world.fakes.state().sales.get_mut(SALE).unwrap().free = 1;
    for (n, id) in ids.iter().enumerate() {
        world.fakes.settle(&id.to_string(), PaymentState::Captured).await;
        world.until(*id, if n == 0 { "PAID" } else { "REFUNDED" }).await;
    }
    world.until_record(ids[0], OrderState::Paid).await;
    world.until_record(ids[1], OrderState::Refunded).await;
    // And again, as providers do.
    for id in &ids {
        let (payment_id, payment) = {
            let state = world.fakes.state();
            let (id, payment) = state.payments.iter().find(|(_, p)| p.order == id.to_string()).unwrap();
            (id.clone(), payment.clone())
        };
        let status = proto::internal::PaymentStatus {
            order_id: payment.order,
            payment_id,
            state: PaymentState::Captured.into(),
            ..Default::default()
        };
        let last = world.bus.last_sequence(subjects::PAYMENTS).await.unwrap();
        let mut message = world.bus.read(subjects::PAYMENTS, last).await.unwrap().unwrap();
        message.id = format!("late-{}", status.order_id);
        message.payload =
            prost::Message::encode_to_vec(&proto::internal::PaymentSettled { status: Some(status) }).into();
        world.bus.publish(subjects::PAYMENTS, vec![message]).await.pop().unwrap().unwrap();
    }
    let last = world.bus.last_sequence(subjects::PAYMENTS).await.unwrap();
    eventually("all settled", async || {
        let progress = world.bus.progress(subjects::PAYMENTS, subjects::SETTLER).await.unwrap()?;
        (progress.settled_through >= last).then_some(())
    })
    .await;
    assert_eq!((world.captures(ids[0]), world.refunds(ids[0])), (1, 0));
    assert_eq!((world.captures(ids[1]), world.refunds(ids[1])), (1, 1));
    assert_eq!(world.units(), (0, 0, 0, 1));
    // The late capture's own hold fills her limit, and is no order that she could be answered with (E36).
    let before = world.bus.last_sequence(subjects::ORDERS).await.unwrap();
    let error = world.accept("alice", 1, &RequestId::random()).await.unwrap_err();
    assert_eq!(error.reason, Reason::PurchaseLimitReached);
    assert_eq!(world.bus.last_sequence(subjects::ORDERS).await.unwrap(), before, "nothing is placed for it");
    let unknown = v1::ListSagasRequest { state: "CLSOED".to_owned(), ..Default::default() };
    let error = proto::Error::from(world.client().list_sagas(unknown).await.unwrap_err());
    assert_eq!((error.reason, error.field.as_deref()), (Reason::InvalidField, Some("state")));
    let made_up = v1::ListSagasRequest { page_token: "zzz".to_owned(), ..Default::default() };
    let error = proto::Error::from(world.client().list_sagas(made_up).await.unwrap_err());
    assert_eq!((error.reason, error.field.as_deref()), (Reason::InvalidField, Some("page_token")));
    let closed = v1::ListSagasRequest { state: "CLOSED".to_owned(), ..Default::default() };
    let sagas = world.client().list_sagas(closed).await.unwrap().into_inner().sagas;
    assert_eq!((sagas.len(), sagas[0].kind.as_str()), (1, "refund_saga"));
}

#[tokio::test(flavor = "multi_thread")]
async fn e39_anothers_order_is_not_there() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    let missing = order_id("nobody", &RequestId::random());
    for order in [id, missing] {
        assert_eq!(world.pay("mallory", order, "approve").await.unwrap_err().reason, Reason::NotFound);
        assert_eq!(world.cancel("mallory", order).await.unwrap_err().reason, Reason::NotFound);
    }
    assert_eq!(world.saga(id).await.unwrap().version, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_twice_is_cancelling_once() {
    let world = World::new().await;
    let id = world.hold("alice").await;
    let cancels = join_all((0..8).map(|_| world.cancel("alice", id))).await;
    assert!(cancels.iter().all(|c| c.as_ref().unwrap().state() == OrderState::Cancelled));
    world.until(id, "CANCELLED").await;
    assert_eq!(world.units(), (10, 0, 0, 0));
    let error = world.pay("alice", id, "approve").await.unwrap_err();
    assert_eq!((error.reason, error.metadata["state"].as_str()), (Reason::IllegalState, "CANCELLED"));
}

// Death.

/// Kills the coordinator at a call, before or after its effect, while `act` is under way; then starts another.
async fn die_at(world: &mut World, call: &'static str, when: When, act: impl AsyncFn(&World)) {
    world.fakes.gate.arm(call, when);
    {
        let world = &*world;
        tokio::select! {
            () = async { act(world).await; std::future::pending::<()>().await } => {}
            reached = world.fakes.gate.reached() => assert!(reached, "nothing came to {call}"),
        }
    }
    world.restart().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_killed_while_accepting_or_locking_it_ends_held_once() {
    for call in ["acquire", "publish", "lock", "create"] {
        for when in [When::Before, When::After] {
            let mut world = World::new().await;
            let request = RequestId::random();
            die_at(&mut world, call, when, async |world| drop(world.accept("alice", 1, &request).await)).await;
            // The buyer got no answer, or lost it, and tries again.
            world.accept("alice", 1, &request).await.unwrap();
            let id = order_id("alice", &request);
            world.until(id, "AWAITING_PAYMENT").await;
            assert_eq!(
                (world.units(), world.record(id)),
                ((9, 0, 1, 0), Some(OrderState::AwaitingPayment)),
                "{call} {when:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_killed_while_paying_it_ends_paid_once() {
    for call in ["charge", "deduct", "mark_paid", "announce"] {
        for when in [When::Before, When::After] {
            let mut world = World::new().await;
            let id = world.hold("alice").await;
            die_at(&mut world, call, when, async |world| drop(world.pay("alice", id, "approve").await)).await;
            world.until(id, "PAID").await;
            assert_eq!((world.captures(id), world.units()), (1, (9, 0, 0, 1)), "{call} {when:?}");
            assert_eq!(world.record(id), Some(OrderState::Paid));
            assert_eq!(world.bus.last_sequence(subjects::EVENTS).await.unwrap(), 1, "announced once");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_killed_while_giving_back_it_ends_released_once() {
    for call in ["void", "close", "release"] {
        for when in [When::Before, When::After] {
            let mut world = World::new().await;
            let id = world.hold("alice").await;
            // So that there is something to void.
            world.pay("alice", id, "decline").await.unwrap_err();
            die_at(&mut world, call, when, async |world| drop(world.cancel("alice", id).await)).await;
            world.until(id, "CANCELLED").await;
            assert_eq!(
                (world.units(), world.record(id)),
                ((10, 0, 0, 0), Some(OrderState::Cancelled)),
                "{call} {when:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn e31_killed_while_returning_late_money_it_goes_back_once() {
    for call in ["acquire", "refund", "mark_refunded"] {
        for when in [When::Before, When::After] {
            let mut world = World::new().await;
            world.sale(1, 1, 500);
            let request = RequestId::random();
            world.accept("alice", 1, &request).await.unwrap();
            let id = order_id("alice", &request);
            world.until(id, "AWAITING_PAYMENT").await;
            world.pay("alice", id, "hang").await.unwrap();
            world.fakes.state().void_answer = Some(PaymentState::Cancelled);
            world.until(id, "EXPIRED").await;
            world.fakes.state().sales.get_mut(SALE).unwrap().free = 0;
            die_at(&mut world, call, when, async |world| {
                world.fakes.settle(&id.to_string(), PaymentState::Captured).await;
            })
            .await;
            world.until(id, "REFUNDED").await;
            assert_eq!((world.captures(id), world.refunds(id)), (1, 1), "{call} {when:?}");
            assert_eq!(world.record(id), Some(OrderState::Refunded));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_in_the_middle_of_a_rush_ends_every_task_and_loses_no_order() {
    let mut world = World::new().await;
    world.sale(300, 1, 60_000);
    let requests: Vec<_> = (0..300).map(|n| (format!("buyer-{n}"), RequestId::random())).collect();
    join_all(requests.iter().map(|(buyer, request)| world.accept(buyer, 1, request))).await;
    assert!(world.stop().await, "every task ends in time");
    world.start().await;
    for (buyer, request) in &requests {
        world.until(order_id(buyer, request), "AWAITING_PAYMENT").await;
    }
    assert_eq!(world.units(), (0, 0, 300, 0));
}

// Operators.

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_saga_is_listed_and_retried_by_an_operator() {
    let world = World::with(coordinator::Config { saga_attempts: 3, ..config() }).await;
    let id = world.hold("alice").await;
    let record = world.fakes.state().records.remove(&id.to_string()).expect("a record");
    let paying = world.pay("alice", id, "approve").await.unwrap();
    assert_eq!(paying.state(), OrderState::Paying, "money has moved, and nobody can be told");
    let stuck = async || world.client().list_sagas(v1::ListSagasRequest::default()).await.unwrap().into_inner().sagas;
    let saga = eventually("a stuck saga", async || stuck().await.pop()).await;
    assert_eq!((saga.name.clone(), saga.state.as_str(), saga.stuck), (format!("sagas/{id}"), "CAPTURED", true));
    assert!(saga.last_error.starts_with("mark_paid"), "{}", saga.last_error);
    assert_eq!(saga.next_attempt_time, None, "it waits for whoever can mend that");
    let holdings = saga.holdings.clone().unwrap();
    assert_eq!((holdings.units(), holdings.money()), (Units::Moving, Money::Captured));
    assert_eq!((saga.buyer.as_str(), holdings.quantity, holdings.hold), ("alice", 1, id.to_string()));
    let row = world.row(id).await;
    let explain = v1::ExplainSagaRequest { saga: saga.name.clone() };
    let explained = world.client().explain_saga(explain.clone()).await.unwrap().into_inner();
    assert!(explained.past_pivot);
    let (retried, abandoned) = (explained.retry.unwrap(), explained.abandon.unwrap());
    assert_eq!(retried.steps, ["deduct", "mark_paid", "announce"]);
    assert_eq!((retried.resulting_state.as_str(), abandoned.resulting_state.as_str()), ("PAID", "ABANDONED"));
    assert_eq!(world.row(id).await, row, "explaining changes nothing");
    world.fakes.state().records.insert(id.to_string(), record);
    let retry = v1::RetrySagaRequest { saga: saga.name.clone(), ..Default::default() };
    world.client().retry_saga(retry.clone()).await.unwrap();
    world.until(id, "PAID").await;
    let error = proto::Error::from(world.client().retry_saga(retry).await.unwrap_err());
    assert_eq!((error.reason, error.metadata["state"].as_str()), (Reason::IllegalState, "PAID"));
    let error = proto::Error::from(world.client().explain_saga(explain).await.unwrap_err());
    assert_eq!(error.reason, Reason::IllegalState, "neither verb would be taken");
    assert!(stuck().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_is_stuck_while_a_service_is_away_and_goes_on_by_itself_when_it_is_back() {
    let world = World::with(coordinator::Config { saga_attempts: 3, ..config() }).await;
    let id = world.hold("alice").await;
    world.fakes.state().down.insert("deduct");
    world.pay("alice", id, "approve").await.unwrap();
    let saga = eventually("stuck", async || world.saga(id).await.filter(|saga| saga.stuck)).await;
    assert!(saga.last_error.starts_with("deduct"), "{}", saga.last_error);
    world.fakes.state().down.clear();
    assert!(!world.until(id, "PAID").await.stuck);
    assert_eq!(world.units(), (9, 0, 0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_abandons_before_the_pivot_by_compensating_and_after_it_by_taking_over() {
    let world = World::with(coordinator::Config { saga_attempts: 3, ..config() }).await;
    let (before, after) = (world.hold("before").await, world.hold("after").await);
    world.pay("before", before, "hang").await.unwrap();
    world.fakes.state().down.insert("deduct");
    world.pay("after", after, "approve").await.unwrap();
    let abandon = async |id: OrderId, reason: &str| {
        let request = v1::AbandonSagaRequest { saga: id.to_string(), reason: reason.to_owned() };
        world.client().abandon_saga(request).await.map_err(proto::Error::from)
    };
    for id in [before, after] {
        eventually("stuck", async || world.saga(id).await.filter(|saga| saga.stuck)).await;
        assert_eq!(abandon(id, " ").await.unwrap_err().reason, Reason::InvalidField);
        abandon(id, "the bank said so").await.unwrap();
        assert_eq!(abandon(id, "again").await.unwrap_err().reason, Reason::IllegalState);
    }
    let saga = world.until(after, "ABANDONED").await;
    assert!(saga.history.last().unwrap().detail.contains("the bank said so"));
    world.fakes.state().void_answer = Some(PaymentState::Cancelled);
    world.until(before, "CANCELLED").await;
    assert_eq!(world.units(), (9, 0, 1, 0), "what is behind the pivot is the operator's");
}

// Load.

#[tokio::test(flavor = "multi_thread")]
async fn a_rush_is_locked_in_batches() {
    let world = World::new().await;
    world.sale(2_000, 1, 60_000);
    let requests: Vec<_> = (0..2_000).map(|n| (format!("buyer-{n}"), RequestId::random())).collect();
    let accepted = join_all(requests.iter().map(|(buyer, request)| world.accept(buyer, 1, request))).await;
    assert!(accepted.iter().all(Result::is_ok));
    eventually("all locked", async || {
        let state = world.fakes.state();
        (state.records.len() == 2_000).then_some(())
    })
    .await;
    assert_eq!(world.units(), (0, 0, 2_000, 0));
    let spec = ConsumerSpec {
        stream: subjects::ORDERS,
        name: "audit".to_owned(),
        filter: subjects::ORDERS_PLACED_ALL.to_owned(),
        ack_wait: Duration::from_secs(5),
        max_attempts: None,
        max_pending: 10_000,
    };
    let seen = world.bus.consumer(spec).await.unwrap().fetch(3_000, Duration::from_secs(1)).await.unwrap();
    let orders: std::collections::HashSet<_> = seen.iter().map(|d| d.id.clone()).collect();
    assert_eq!((seen.len(), orders.len()), (2_000, 2_000), "one message an order");
}
