//! Live updates, over SSE and gRPC.

use std::{sync::atomic::Ordering, time::Duration};

use mesh::testing::eventually;
use proto::{
    Reason,
    internal::SaleChanged,
    v1::{
        Availability, Order, OrderState, SaleState, WatchOrderRequest, WatchSaleRequest, orders_client::OrdersClient,
        sales_client::SalesClient,
    },
};
use tonic::Code;

use crate::door::{Door, Events};

#[tokio::test]
async fn an_orders_events_are_its_states_until_the_last() {
    let door = Door::open().await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let id = door.place("alice").await;
    let mut events = Events::of(door.get(&format!("/v1/orders/{id}/events")).buyer("alice")).await;
    let first = events.next().await.unwrap();
    assert_eq!((first.id.as_str(), first.kind.as_str(), first.state().as_str()), ("0", "order", "PLACED"));

    let awaiting = door.fakes.write(&id);
    door.signal_orders([awaiting.clone()]).await;
    let second = events.next().await.unwrap();
    assert_eq!((second.id.as_str(), second.state().as_str()), ("1", "AWAITING_PAYMENT"));

    let paid = door.fakes.transition(&id, OrderState::Paid);
    // Old news in between, and news of another order, are nobody's news.
    let other = Order { name: format!("orders/{}", "0".repeat(32)), ..paid.clone() };
    door.signal_orders([awaiting, other, paid]).await;
    let last = events.next().await.unwrap();
    assert_eq!((last.id.as_str(), last.state().as_str()), ("2", "PAID"));
    assert_eq!(events.next().await, None, "it ends after a terminal state");
}

#[tokio::test]
async fn e48_whoever_reconnects_sees_the_final_state() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let path = format!("/v1/orders/{id}/events");
    let seen = Events::of(door.get(&path).buyer("alice")).await.next().await.unwrap();
    assert_eq!(seen.state(), "AWAITING_PAYMENT");
    // Between two connections, and without a signal.
    door.fakes.transition(&id, OrderState::Expired);
    let mut again = Events::of(door.get(&path).buyer("alice").header("last-event-id", &seen.id)).await;
    assert_eq!(again.next().await.unwrap().state(), "EXPIRED");
    assert_eq!(again.next().await, None);
}

#[tokio::test]
async fn e48_a_lost_signal_is_made_up_for_by_reading() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let mut events = Events::of(door.get(&format!("/v1/orders/{id}/events")).buyer("alice")).await;
    assert_eq!(events.next().await.unwrap().state(), "AWAITING_PAYMENT");
    // From here on waiting costs no time.
    tokio::time::pause();
    door.fakes.transition(&id, OrderState::Cancelled);
    assert_eq!(events.next().await.unwrap().state(), "CANCELLED");
}

#[tokio::test]
async fn e48_a_slow_reader_is_cut_off() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let mut orders = OrdersClient::new(door.channel().await);
    let watch = |id: &str| door.grpc("alice", WatchOrderRequest { order: id.to_owned() });
    let mut slow = orders.watch_order(watch(&id)).await.unwrap().into_inner();
    // More than the window of an HTTP/2 stream holds, and more than the places behind it.
    let order = door.fakes.records.lock().unwrap()[&id].clone();
    for version in 2..4_000_u64 {
        let title = "x".repeat(200);
        door.signal_orders([Order { etag: version.to_string(), reject_reason: title, ..order.clone() }]).await;
        if version % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let mut read = 0;
    let status = loop {
        match slow.message().await {
            Ok(Some(_)) => read += 1,
            Ok(None) => panic!("the stream ended well after {read}"),
            Err(status) => break status,
        }
    };
    assert!(read < 3_000, "{read} were buffered");
    assert_eq!(proto::Error::from(status).reason, Reason::Overloaded);
    // Coming back, it is told the state as it is.
    let mut again = orders.watch_order(watch(&id)).await.unwrap().into_inner();
    assert_eq!(again.message().await.unwrap().unwrap().state(), OrderState::AwaitingPayment);
}

#[tokio::test]
async fn streams_end_when_the_gateway_stops() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let mut grpc = OrdersClient::new(door.channel().await);
    let mut orders =
        grpc.watch_order(door.grpc("alice", WatchOrderRequest { order: id.clone() })).await.unwrap().into_inner();
    let mut events = Events::of(door.get(&format!("/v1/orders/{id}/events")).buyer("alice")).await;
    assert!(orders.message().await.unwrap().is_some());
    assert!(events.next().await.is_some());
    door.life.soft_token().cancel();
    assert_eq!(orders.message().await.unwrap_err().code(), Code::Unavailable);
    let last = events.next().await.unwrap();
    assert_eq!(last.kind, "error");
    assert!(last.data.contains("DEPENDENCY_DOWN"), "{}", last.data);
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_sales_events_are_its_changes_until_it_ends() {
    let door = Door::open().await;
    let mut events = Events::of(door.get("/v1/sales/spring/events")).await;
    let mut stream = SalesClient::new(door.channel().await)
        .watch_sale(WatchSaleRequest { sale: "spring".into() })
        .await
        .unwrap()
        .into_inner();
    let first = events.next().await.unwrap();
    assert_eq!((first.id.as_str(), first.kind.as_str(), first.state().as_str()), ("1", "sale", "OPEN"));
    assert_eq!(stream.message().await.unwrap().unwrap().state(), SaleState::Open);

    let mut sale = door.fakes.sales.lock().unwrap()["spring"].clone();
    let mut announce = async |version, change: &dyn Fn(&mut proto::v1::Sale)| {
        change(&mut sale);
        door.signal_sale(SaleChanged { sale: Some(sale.clone()), version, ..Default::default() }).await;
    };
    announce(7, &|sale| sale.set_availability(Availability::SoldOut)).await;
    announce(6, &|sale| sale.set_availability(Availability::AllHeld)).await;
    announce(8, &|sale| sale.set_state(SaleState::Ended)).await;
    let second = events.next().await.unwrap();
    assert!(second.data.contains(r#""availability":"SOLD_OUT""#), "{}", second.data);
    let last = events.next().await.unwrap();
    assert_eq!((last.id.as_str(), last.state().as_str()), ("3", "ENDED"), "the older signal was dropped");
    assert_eq!(events.next().await, None);
    assert_eq!(stream.message().await.unwrap().unwrap().availability(), Availability::SoldOut);
    assert_eq!(stream.message().await.unwrap().unwrap().state(), SaleState::Ended);
    assert!(stream.message().await.unwrap().is_none());

    let mut resumed = Events::of(door.get("/v1/sales/spring/events").header("last-event-id", "3")).await;
    assert_eq!(resumed.next().await.unwrap().id, "4", "ids go on where they were");
    assert_eq!(door.get("/v1/sales/winter/events").send().await.refusal().1, "NOT_FOUND");
}

#[tokio::test]
async fn watchers_beyond_the_limit_are_refused() {
    let door = Door::with(gateway::Config { max_watchers: 1, ..Default::default() }).await;
    let id = door.place("alice").await;
    let path = format!("/v1/orders/{id}/events");
    let first = Events::of(door.get(&path).buyer("alice")).await;
    assert_eq!(door.get(&path).buyer("alice").send().await.refusal().1, "OVERLOADED");
    drop(first);
    eventually("the place to be free again", async || {
        door.get(&path).buyer("alice").response().await.status().is_success().then_some(())
    })
    .await;
}

#[tokio::test]
async fn whoever_waits_is_answered_when_the_gateway_stops() {
    let door = Door::with(gateway::Config { max_watchers: 1, ..Default::default() }).await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let id = door.place("alice").await;
    let path = format!("/v1/orders/{id}?wait=30s");
    let stop = async {
        eventually("the reader to wait", async || {
            let other = door.get(&format!("/v1/orders/{id}/events")).buyer("alice").response().await;
            (other.status() == 503).then_some(())
        })
        .await;
        door.life.soft_token().cancel();
    };
    let (answer, ()) = tokio::join!(door.get(&path).buyer("alice").send(), stop);
    assert_eq!(answer.json()["state"], "PLACED");
}
