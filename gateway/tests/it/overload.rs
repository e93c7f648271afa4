//! Too much, and too late.

use std::{sync::atomic::Ordering, time::Duration};

use gateway::Config;
use mesh::testing::eventually;
use proto::v1::{OrderState, PlaceOrderRequest, orders_client::OrdersClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::door::Door;

const KEY: &str = "f47ac10b-58cc-4372-a567-0e02b2c3d479";
const GOOD: &str = r#"{"sale":"spring","quantity":1}"#;

#[tokio::test]
async fn e46_e50_what_is_too_much_is_refused_at_once_and_health_answers() {
    let door = Door::with(Config { max_in_flight: 2, ..Config::default() }).await;
    // Nobody's call ends from here.
    door.fakes.turns.forget_permits(usize::MAX >> 4);
    let waiting = async {
        let call = |buyer| door.post("/v1/orders", GOOD).buyer(buyer).key(KEY).send();
        tokio::join!(call("alice"), call("bob"))
    };
    let crowd = async {
        let full = eventually("the gate to be full", async || {
            let answer = door.get("/v1/sales/spring").send().await;
            (!answer.status.is_success()).then_some(answer)
        })
        .await;
        assert_eq!(full.refusal(), (503, "OVERLOADED".to_owned(), String::new()));
        assert_eq!(full.header("retry-after"), Some("1"));
        for _ in 0..100 {
            let answer = door.post("/v1/orders", GOOD).buyer("carol").key(KEY).send().await;
            assert_eq!(answer.refusal().1, "OVERLOADED");
        }
        let request = PlaceOrderRequest { sale: "spring".into(), quantity: 1, request_id: KEY.into() };
        let channel = door.channel().await;
        let status = OrdersClient::new(channel.clone()).place_order(door.grpc("carol", request)).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.metadata().get("grpc-retry-pushback-ms").unwrap(), "500");

        let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(health.status(), ServingStatus::Serving, "E50");
        assert_eq!(door.get("/openapi.json").send().await.status, 200);

        assert_eq!(door.fakes.effects(), 0, "nothing was taken (I9)");
        door.fakes.turns.add_permits(1000);
    };
    let ((alice, bob), ()) = tokio::join!(waiting, crowd);
    assert!(alice.status.is_success() && bob.status.is_success(), "those who were in are served");
    let carol = door.post("/v1/orders", GOOD).buyer("carol").key(KEY).send().await;
    assert!(carol.status.is_success(), "and the others when there is room again");
}

#[tokio::test]
async fn e47_who_announces_a_body_and_does_not_send_it_is_not_waited_for() {
    let door = Door::with(Config { request_timeout: Duration::from_millis(50), ..Config::default() }).await;
    let mut wire = TcpStream::connect(door.address).await.unwrap();
    let head = format!(
        "POST /v1/orders HTTP/1.1\r\nhost: shop\r\nauthorization: Bearer {}\r\ncontent-length: 36\r\n\r\n{{",
        door.token("alice", "buyer")
    );
    wire.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let length = wire.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 504") && answer.contains("DEADLINE_EXCEEDED"), "{answer}");
    assert_eq!(door.fakes.effects(), 0);
}

#[tokio::test]
async fn e47_after_a_missed_deadline_the_order_is_found_under_its_request_id() {
    let door = Door::with(Config { request_timeout: Duration::from_millis(200), ..Config::default() }).await;
    door.fakes.turns.forget_permits(usize::MAX >> 4);
    let late = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).send().await;
    assert_eq!(late.refusal(), (504, "DEADLINE_EXCEEDED".to_owned(), String::new()));

    // A client's own, shorter deadline.
    let mut request =
        door.grpc("alice", PlaceOrderRequest { sale: "spring".into(), quantity: 1, request_id: KEY.into() });
    request.set_timeout(Duration::from_millis(20));
    let status = OrdersClient::new(door.channel().await).place_order(request).await.unwrap_err();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");

    // What was under way goes on without its callers; they find what it came to by asking again.
    door.fakes.turns.add_permits(1000);
    eventually("the order", async || (door.fakes.accept_calls.load(Ordering::SeqCst) > 0).then_some(())).await;
    let found = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).send().await;
    assert!(found.status.is_success(), "{}", found.text);
    assert_eq!(door.fakes.records.lock().unwrap().len(), 1, "one order, however often it was asked for");
    let records = door.fakes.records.lock().unwrap();
    assert_eq!(records.values().next().unwrap().state(), OrderState::AwaitingPayment);
}
