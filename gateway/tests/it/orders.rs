//! Buying, reading, paying, cancelling.

use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use mesh::testing::eventually;
use prost::Message;
use proto::{
    Error, Reason,
    filter::Filter,
    internal::SaleChanged,
    v1::{Availability, OrderState, PayOrderRequest, Sale, SaleState, action::Outcome, orders_client::OrdersClient},
};
use tokio::time::Instant;

use crate::door::{Answer, Door};

const KEY: &str = "f47ac10b-58cc-4372-a567-0e02b2c3d479";
const SAGA: &str = "f47ac10b58cc4372a5670e02b2c3d479";
const GOOD: &str = r#"{"sale":"spring","quantity":1}"#;

fn state(answer: &Answer) -> String {
    answer.json()["state"].as_str().unwrap_or_else(|| panic!("no order: {}", answer.text)).to_owned()
}

#[tokio::test]
async fn a_purchase_from_placed_to_paid_over_http() {
    let door = Door::open().await;
    let placed = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).send().await;
    assert_eq!(placed.status, 202);
    let order = placed.json();
    assert_eq!(order["state"], "PLACED");
    assert_eq!(order["quantity"], "1");
    assert_eq!(order["sale"], "sales/spring");
    assert_eq!(order["amount"], serde_json::json!({ "currencyCode": "EUR", "units": "10", "nanos": 500_000_000 }));
    assert_eq!(order["createTime"], "2025-06-15T15:06:40Z");
    assert_eq!(order["expireTime"], "2025-06-15T15:21:40Z");
    assert_eq!(order.get("payTime"), None, "not set");
    assert_eq!(order["rejectReason"], "", "set to nothing");

    let again = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).send().await;
    assert_eq!((again.status.as_u16(), state(&again)), (200, "AWAITING_PAYMENT".to_owned()), "the funnel has been by");
    assert_eq!(again.json()["name"], order["name"], "E2");

    let name = order["name"].as_str().unwrap();
    let pay = door.post(&format!("/v1/{name}:pay"), r#"{"paymentMethod":"sim_approve"}"#).buyer("alice").key(KEY);
    assert_eq!(state(&pay.send().await), "PAID");
    let list = door.get("/v1/orders").buyer("alice").send().await.json();
    assert_eq!(list["orders"][0]["name"], name);
    assert_eq!(list["nextPageToken"], "50", "the usual page");
}

#[tokio::test]
async fn the_key_may_come_in_the_body_and_names_in_both_spellings() {
    let door = Door::open().await;
    let ids: Vec<_> = [
        format!(r#"{{"sale":"spring","quantity":1,"requestId":"{KEY}"}}"#),
        format!(r#"{{"sale":"sales/spring","quantity":"1","request_id":"{KEY}"}}"#),
    ]
    .map(|body| door.post("/v1/orders", body).buyer("alice").send())
    .into_iter()
    .collect();
    let mut names = Vec::new();
    for answer in ids {
        names.push(answer.await.json()["name"].clone());
    }
    assert_eq!(names[0], names[1]);
}

#[tokio::test]
async fn e28_two_clicks_on_pay_make_one_charge() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let path = format!("/v1/orders/{id}:pay");
    let click = || door.post(&path, r#"{"paymentMethod":"sim_approve"}"#).buyer("alice").key(KEY).send();
    let (one, other) = tokio::join!(click(), click());
    assert_eq!((state(&one), state(&other)), ("PAID".to_owned(), "PAID".to_owned()));
    assert_eq!(door.fakes.charges.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn e30_a_declined_payment_says_so_with_its_code() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    let pay = door.post(&format!("/v1/orders/{id}:pay"), r#"{"paymentMethod":"sim_decline"}"#).buyer("alice").key(KEY);
    let answer = pay.send().await;
    assert_eq!(answer.refusal().1, "PAYMENT_DECLINED");
    assert_eq!(answer.json()["error"]["details"][0]["metadata"]["declineCode"], "insufficient_funds");
}

#[tokio::test]
async fn e39_anothers_order_and_no_order_are_the_same_on_every_verb() {
    let door = Door::open().await;
    let written = door.place("alice").await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let granted = door.place("alice").await;
    let none = "0123456789abcdef0123456789abcdef";
    let changes = door.fakes.change_calls.load(Ordering::SeqCst);
    for id in [written.as_str(), granted.as_str()] {
        let (read, wait, events) =
            (format!("/v1/orders/{id}"), format!("/v1/orders/{id}?wait=1s"), format!("/v1/orders/{id}/events"));
        for path in [read, wait, events] {
            let theirs = door.get(&path).buyer("mallory").send().await;
            let nothing = door.get(&path.replace(id, none)).buyer("mallory").send().await;
            assert_eq!(theirs.status, 404, "{path}");
            assert_eq!(theirs.text, nothing.text, "{path}");
        }
        for (verb, body) in [("pay", r#"{"paymentMethod":"sim_approve"}"#), ("cancel", "")] {
            let send = |id: &str| door.post(&format!("/v1/orders/{id}:{verb}"), body).buyer("mallory").key(KEY);
            let (theirs, nothing) = (send(id).send().await, send(none).send().await);
            assert_eq!(theirs.status, 404, "{verb}");
            assert_eq!(theirs.text, nothing.text, "{verb}");
        }
    }
    assert!(door.fakes.change_calls.load(Ordering::SeqCst) > changes, "it was the coordinator who said so");
    assert!(door.fakes.charges.lock().unwrap().is_empty());
    assert_eq!(door.get("/v1/orders").buyer("mallory").send().await.json()["orders"], serde_json::json!([]));
    assert_eq!(door.get(&format!("/v1/orders/{written}")).operator().send().await.status, 200, "operators see all");
}

#[tokio::test]
async fn an_order_that_is_not_written_yet_is_read_from_its_grant() {
    let door = Door::open().await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let id = door.place("alice").await;
    let read = door.get(&format!("/v1/orders/{id}")).buyer("alice").send().await;
    assert_eq!((read.status.as_u16(), state(&read)), (200, "PLACED".to_owned()));
    assert_eq!(read.json()["expireTime"], "2025-06-15T15:21:40Z", "the times that it will have");
    assert_eq!(read.json()["etag"], "0");
    door.fakes.write(&id);
    let read = door.get(&format!("/v1/orders/{id}")).buyer("alice").send().await;
    assert_eq!(state(&read), "AWAITING_PAYMENT");
}

#[tokio::test]
async fn i8_while_grants_are_not_known_an_order_is_not_said_to_be_missing() {
    let door = Door::open().await;
    door.fakes.rebuilding.store(true, Ordering::SeqCst);
    let answer = door.get("/v1/orders/0123456789abcdef0123456789abcdef").buyer("alice").send().await;
    assert_eq!(answer.refusal(), (503, "STOCK_REBUILDING".to_owned(), String::new()));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.header("grpc-retry-pushback-ms"), Some("500"));
}

#[tokio::test]
async fn a_reader_who_waits_is_answered_when_the_order_leaves_placed() {
    let door = Door::open().await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let id = door.place("alice").await;
    let started = Instant::now();
    let over = door.get(&format!("/v1/orders/{id}?wait=0.2s")).buyer("alice").send().await;
    assert_eq!(state(&over), "PLACED", "the wait is over, and nothing has changed");
    assert!(started.elapsed() >= Duration::from_millis(200));

    let path = format!("/v1/orders/{id}?wait=30s");
    let write = async {
        // Written and signalled again and again: the reader may come before or after the first of it.
        let order = door.fakes.write(&id);
        loop {
            door.signal_orders([order.clone()]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let read = door.get(&path).buyer("alice").send();
    let answer = tokio::select! {
        answer = read => answer,
        () = write => unreachable!("signals never end"),
    };
    assert_eq!(state(&answer), "AWAITING_PAYMENT");
}

#[tokio::test]
async fn paying_quicker_than_the_funnel_waits_for_it() {
    let door = Door::open().await;
    door.fakes.funnel_stopped.store(true, Ordering::SeqCst);
    let id = door.place("alice").await;
    let path = format!("/v1/orders/{id}:pay");
    let pay = || door.post(&path, r#"{"paymentMethod":"sim_approve"}"#).buyer("alice").key(KEY).send();
    let funnel = async {
        eventually("the first try", async || (door.fakes.change_calls.load(Ordering::SeqCst) > 0).then_some(())).await;
        let order = door.fakes.write(&id);
        loop {
            door.signal_orders([order.clone()]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let answer = tokio::select! {
        answer = pay() => answer,
        () = funnel => unreachable!("signals never end"),
    };
    assert_eq!(state(&answer), "PAID");

    let stuck = door.place("alice").await;
    let cancel = door.post(&format!("/v1/orders/{stuck}:cancel"), "").buyer("alice").send().await;
    assert_eq!(cancel.refusal().1, "OVERLOADED", "the funnel does not come by: try again");
    assert_eq!(cancel.json()["error"]["details"][0]["metadata"]["state"], "PLACED");
}

#[tokio::test]
async fn cancelling_works_once_and_not_after_paying() {
    let door = Door::open().await;
    let id = door.place("alice").await;
    for _ in 0..2 {
        let cancel = door.post(&format!("/v1/orders/{id}:cancel"), "{}").buyer("alice").send().await;
        assert_eq!(state(&cancel), "CANCELLED");
    }
    let id = door.place("alice").await;
    let mut grpc = OrdersClient::new(door.channel().await);
    let pay =
        PayOrderRequest { order: format!("orders/{id}"), payment_method: "sim_approve".into(), request_id: KEY.into() };
    assert_eq!(grpc.pay_order(door.grpc("alice", pay)).await.unwrap().into_inner().state(), OrderState::Paid);
    let cancel = door.post(&format!("/v1/orders/{id}:cancel"), "").buyer("alice").send().await;
    assert_eq!(cancel.refusal().1, "ILLEGAL_STATE");
    assert_eq!(cancel.json()["error"]["details"][0]["metadata"]["state"], "PAID");
}

#[tokio::test]
async fn refusals_of_the_coordinator_reach_the_buyer_as_they_are() {
    let door = Door::open().await;
    let held = Error::new(Reason::AllHeld, "every unit is held").with_retry_after(Duration::from_millis(2500));
    door.fakes.refusals.lock().unwrap().insert("spring".into(), held);
    let answer = door.post("/v1/orders", GOOD).buyer("alice").key(KEY).send().await;
    assert_eq!(answer.refusal(), (429, "ALL_HELD".to_owned(), String::new()));
    assert_eq!(answer.header("retry-after"), Some("3"), "rounded up");
    assert_eq!(answer.json()["error"]["details"][1]["retryDelay"], "2.5s");
}

fn sale_is(version: i64, availability: Availability, buyers: &[&str]) -> SaleChanged {
    let mut sale = Sale { name: "sales/spring".into(), ..Default::default() };
    sale.set_state(SaleState::Open);
    sale.set_availability(availability);
    let buyers = Filter::build(buyers.iter().copied()).as_bytes().to_vec();
    SaleChanged { sale: Some(sale), version, buyers: buyers.into() }
}

#[tokio::test]
async fn e2_from_memory_strangers_are_refused_and_the_winner_gets_the_order_back() {
    let door = Door::open().await;
    let won = door.post("/v1/orders", GOOD).buyer("winner").key(KEY).send().await;
    let sold_out = Error::new(Reason::SoldOut, "asked properly");
    door.fakes.refusals.lock().unwrap().insert("spring".into(), sold_out);
    door.signal_sale(sale_is(1, Availability::SoldOut, &["winner"])).await;

    let try_again = async || {
        let answer = door.post("/v1/orders", GOOD).buyer("stranger").key(KEY).send().await;
        (answer.json()["error"]["message"] == "sold out").then_some(answer)
    };
    let refused = eventually("the memory to learn", try_again).await;
    assert_eq!(refused.refusal(), (400, "SOLD_OUT".to_owned(), String::new()));
    assert_eq!(refused.header("grpc-retry-pushback-ms"), Some("-1"));
    assert_eq!(refused.header("retry-after"), None);

    let asked = door.fakes.accept_calls.load(Ordering::SeqCst);
    for _ in 0..10 {
        assert!(try_again().await.is_some());
    }
    assert_eq!(door.fakes.accept_calls.load(Ordering::SeqCst), asked, "strangers cost no call");
    let again = door.post("/v1/orders", GOOD).buyer("winner").key(KEY).send().await;
    assert_eq!((again.status.as_u16(), again.json()["name"].clone()), (200, won.json()["name"].clone()));

    // Units come back: nobody is refused from memory any more.
    door.fakes.refusals.lock().unwrap().clear();
    door.signal_sale(sale_is(2, Availability::Available, &[])).await;
    eventually("a stranger to be let in", async || {
        let answer = door.post("/v1/orders", GOOD).buyer("stranger").key(KEY).send().await;
        answer.status.is_success().then_some(())
    })
    .await;
}

/// The operators' rpcs of the public contract that change something.
fn verbs_that_change() -> BTreeSet<String> {
    let files = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap();
    let services = files.file.iter().filter(|file| file.package() == "seckill.v1").flat_map(|file| &file.service);
    let operators = services.filter(|service| ["Sales", "Operations"].contains(&service.name()));
    let reads = ["Get", "List", "Watch", "Explain", "Reconcile"];
    let names = operators.flat_map(|service| &service.method).map(|method| method.name().to_owned());
    names.filter(|name| !reads.iter().any(|read| name.starts_with(read))).collect()
}

#[tokio::test]
async fn operators_verbs_are_handed_on_and_internals_are_not() {
    let door = Door::open().await;
    let mut recorded = BTreeSet::new();
    for (path, body, verb) in [
        ("/v1/sales", r#"{"saleId":"summer","price":{"currencyCode":"EUR","units":1},"stock":10}"#, "CreateSale"),
        ("/v1/sales/spring:open", "", "OpenSale"),
        ("/v1/sales/spring:pause", "{}", "PauseSale"),
        ("/v1/sales/spring:close", r#"{"sale":"spring"}"#, "CloseSale"),
        ("/v1/sales/spring:adjustStock", r#"{"delta":"-5"}"#, "AdjustStock"),
        ("/v1/sales/spring:rebuildStock", "", "RebuildStock"),
        (format!("/v1/ops/sagas/{SAGA}:retry").as_str(), "", "RetrySaga"),
        (
            format!("/v1/ops/sagas/orders%2F{SAGA}:abandon").as_str(),
            r#"{"reason":"the buyer was refunded by hand"}"#,
            "AbandonSaga",
        ),
        ("/v1/ops/deadLetters/ORDERS-funnel-7:redrive", "", "RedriveDeadLetter"),
    ] {
        let answer = door.post(path, body).operator().send().await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        assert_eq!(door.fakes.operated.lock().unwrap().last().unwrap(), verb);
        let actions = std::mem::take(&mut *door.fakes.actions.lock().unwrap());
        let outcomes: Vec<_> = actions.iter().map(|action| (action.verb.as_str(), action.outcome())).collect();
        assert_eq!(outcomes, [(verb, Outcome::Begun), (verb, Outcome::Done)], "on the record, before and after");
        assert!(!actions[0].target.contains("orders"), "one name for a saga, however it was spelled: {actions:?}");
        recorded.insert(verb.to_owned());
    }
    assert_eq!(recorded, verbs_that_change(), "a verb that nobody keeps a record of");
    assert_eq!(door.get("/v1/sales/spring/stock").operator().send().await.json()["state"], "PERMIT_STATE_UNSPECIFIED");
    for (path, body, field) in [
        ("/v1/sales/spring:close", r#"{"sale":"summer"}"#, "sale"),
        ("/v1/sales/spring:adjustStock", r#"{"delta":0}"#, "delta"),
        ("/v1/sales", r#"{"saleId":"Summer"}"#, "sale_id"),
        (format!("/v1/ops/sagas/{SAGA}:abandon").as_str(), "", "reason"),
    ] {
        assert_eq!(door.post(path, body).operator().send().await.refusal().2, field, "{path} {body}");
    }
    let explained = door.get("/v1/ops/sagas/7/explanation").operator().send().await;
    assert_eq!((explained.status.as_u16(), explained.json()["saga"].as_str()), (200, Some("sagas/7")));
    assert_eq!(door.get("/v1/ops/sagas/7/explanation").buyer("alice").send().await.refusal().1, "PERMISSION_DENIED");
    let letter = door.get("/v1/ops/deadLetters/ORDERS-funnel-7").operator().send().await;
    assert_eq!(letter.json()["name"], "deadLetters/ORDERS-funnel-7");
    let missing = door.get("/v1/ops/sagas/7").operator().send().await;
    assert_eq!(missing.refusal().1, "NOT_FOUND");
    assert!(!missing.text.contains("secret"), "I11");
}

#[tokio::test]
async fn what_operators_do_is_on_the_record_or_not_done() {
    let door = Door::open().await;
    let adjust = r#"{"delta":"-5","reason":"three were broken, two are lost"}"#;
    assert_eq!(door.post("/v1/sales/spring:adjustStock", adjust).operator().send().await.status, 200);
    assert_eq!(door.post("/v1/sales/winter:pause", "").operator().send().await.status, 404);
    let found = door.get("/v1/ops/actions").operator().send().await.json();
    let actions = found["actions"].as_array().unwrap();
    let told = |at: usize, field: &str| actions[at][field].as_str().unwrap().to_owned();
    let adjusted = ["operator", "verb", "target", "detail", "reason", "outcome"].map(|field| told(1, field));
    assert_eq!(
        adjusted,
        ["root", "AdjustStock", "sales/spring", "delta -5", "three were broken, two are lost", "DONE"]
    );
    assert_eq!(told(0, "name"), told(1, "name"), "one action, before and after");
    assert_eq!(["target", "outcome", "error"].map(|field| told(3, field)), ["sales/winter", "REFUSED", "NOT_FOUND"]);
    assert_eq!(door.get("/v1/ops/actions").buyer("alice").send().await.refusal().1, "PERMISSION_DENIED");

    let done = door.fakes.effects();
    let long = format!(r#"{{"reason":"{}"}}"#, "x".repeat(257));
    assert_eq!(door.post("/v1/sales/spring:pause", long).operator().send().await.refusal().2, "reason");
    door.fakes.is_book_closed.store(true, Ordering::SeqCst);
    assert_eq!(door.post("/v1/sales/spring:pause", "").operator().send().await.refusal().1, "DEPENDENCY_DOWN");
    assert_eq!(door.fakes.effects(), done, "what cannot be written down is not done");
}
