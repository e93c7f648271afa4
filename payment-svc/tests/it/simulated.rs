//! The role with the simulated provider.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use payment_svc::{
    domain::{Command, Event, NewCharge, PaymentId, Times},
    provider::{
        CancelOutcome, ChargeRequest, Delivered, ProviderError, ProviderOutcome, ProviderStatus, RefundOutcome,
        SignedWebhook, WebhookSink, signature,
    },
    store::{Request, Store, sql::SqlStore},
};
use proto::{
    BuyerId, Money, Reason,
    internal::{self, PaymentState as State, payment_result},
    subjects,
};

use mesh::bus::Bus;

use crate::role::{SECRET, config, item, migrated, order, start, state};

#[tokio::test]
async fn an_approved_charge_is_captured_and_announced_once_however_often_it_is_sent() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let item = item(order(), "p", "sim_approve");
    for _ in 0..3 {
        let status = role.charge(item.clone()).await.unwrap();
        assert_eq!(status.state(), State::Captured);
        assert_eq!(status.amount, item.amount, "E32: to the nano");
    }
    assert_eq!(role.resolve(&item.payment_id).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e30_a_declined_payment_lets_the_buyer_try_again() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let order = order();
    let declined = role.charge(item(order, "first", "sim_decline")).await.unwrap();
    assert_eq!((declined.state(), declined.decline_code.as_str()), (State::Declined, "card_declined"));
    let again = role.charge(item(order, "first", "sim_decline")).await.unwrap();
    assert_eq!(again.state(), State::Declined, "the same attempt stays declined");
    assert_eq!(role.charge(item(order, "second", "sim_approve")).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(2).await, [State::Declined, State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e28_two_clicks_on_pay_make_one_charge() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let order = order();
    let clicks = (0..20).map(|i| role.charge(item(order, &format!("p{}", i % 10), "sim_approve")));
    let answers = futures::future::join_all(clicks).await;
    let captured: std::collections::HashSet<_> =
        answers.iter().filter_map(|a| a.as_ref().ok()).map(|s| s.payment_id.clone()).collect();
    assert_eq!(captured.len(), 1);
    let refused = answers.iter().filter(|a| state(a) == Err(Reason::IllegalState)).count();
    assert_eq!(refused, 18);
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e25_a_lost_answer_is_found_and_two_webhooks_change_state_once() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let item = item(order(), "p", "sim_timeout");
    assert_eq!(
        role.charge(item.clone()).await.unwrap().state(),
        State::Pending,
        "answered, though the provider is not"
    );
    assert_eq!(role.resolve(&item.payment_id).await.unwrap().state(), State::Pending);
    role.until(&item.payment_id, State::Captured).await;
    // Both webhooks have been delivered when the provider has none left to deliver.
    mesh::testing::eventually("both webhooks", async || {
        use sea_orm::{ConnectionTrait, Statement};
        let sql = "SELECT payment_id FROM payment_sim_charge WHERE webhooks = 0 AND webhook_at IS NULL";
        let statement = Statement::from_string(sea_orm::DbBackend::Sqlite, sql);
        database.connection.query_one_raw(statement).await.unwrap().map(|_| ())
    })
    .await;
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn a_slow_charge_delays_nobody_else_and_is_found_soon() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let slow = item(order(), "slow", "sim_slow_2s");
    let answers = Mutex::new(Vec::new());
    let charge = async |item: internal::ChargeItem| {
        let answer = role.charge(item).await.unwrap().state();
        answers.lock().unwrap().push(answer);
    };
    tokio::join!(charge(slow.clone()), charge(item(order(), "fast", "sim_approve")));
    assert_eq!(*answers.lock().unwrap(), [State::Captured, State::Pending], "the fast one first");
    assert_eq!(role.announced(2).await, [State::Captured; 2]);
    assert_eq!(role.resolve(&slow.payment_id).await.unwrap().state(), State::Captured);
    role.stop().await;
}

#[tokio::test]
async fn a_slow_charge_is_answered_by_the_call_when_there_is_time() {
    let database = migrated().await;
    let patient = payment_svc::Config { provider_timeout: Duration::from_secs(5), ..config() };
    let role = start(&database, patient, None).await;
    let begun = Instant::now();
    assert_eq!(role.charge(item(order(), "p", "sim_slow_2s")).await.unwrap().state(), State::Captured);
    assert!(begun.elapsed() >= Duration::from_secs(2));
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn a_silent_provider_has_heard_what_it_does_not_answer() {
    let database = migrated().await;
    let folder = tempfile::tempdir().unwrap();
    let outage = folder.path().join("outage");
    std::fs::write(&outage, "").unwrap();
    let role = start(&database, payment_svc::Config { sim_silent_while: Some(outage.clone()), ..config() }, None).await;
    let item = item(order(), "p", "sim_approve");
    assert_eq!(role.charge(item.clone()).await.unwrap().state(), State::Pending);
    assert_eq!(role.resolve(&item.payment_id).await.unwrap().state(), State::Pending, "status calls hang as well");
    std::fs::remove_file(&outage).unwrap();
    assert_eq!(role.resolve(&item.payment_id).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e29_a_voided_order_is_never_charged() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let (pending, untouched, paid) = (order(), order(), order());
    let item_of = |order| item(order, "p", "sim_timeout");
    assert_eq!(role.charge(item_of(pending)).await.unwrap().state(), State::Pending);
    let voided = role.void(pending).await.unwrap();
    assert_eq!((voided.state(), voided.payment_id), (State::Cancelled, item_of(pending).payment_id.clone()));
    let voided = role.void(untouched).await.unwrap();
    assert_eq!((voided.state(), voided.payment_id.as_str()), (State::Cancelled, ""));
    assert_eq!(voided.order_id, untouched.to_string());
    for order in [pending, untouched] {
        let refused = role.charge(item(order, "q", "sim_approve")).await;
        assert_eq!(state(&refused), Err(Reason::IllegalState));
    }
    role.charge(item(paid, "p", "sim_approve")).await.unwrap();
    assert_eq!(role.void(paid).await.unwrap().state(), State::Captured, "money that is there is not hidden");
    // Past the time of the late capture: it did not happen.
    tokio::time::sleep(config().sim_late_capture + Duration::from_millis(500)).await;
    assert_eq!(role.resolve(&item_of(pending).payment_id).await.unwrap().state(), State::Cancelled);
    assert_eq!(role.announced(2).await, [State::Cancelled, State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e24_captured_money_goes_back_once() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let (paid, unpaid) = (order(), order());
    role.charge(item(paid, "p", "sim_approve")).await.unwrap();
    for _ in 0..3 {
        assert_eq!(role.refund(paid).await.unwrap().state(), State::Refunded);
    }
    assert_eq!(role.void(paid).await.unwrap().state(), State::Refunded);
    assert_eq!(state(&role.refund(unpaid).await), Err(Reason::IllegalState));
    let again = role.charge(item(paid, "q", "sim_approve")).await;
    assert_eq!(state(&again), Err(Reason::IllegalState), "an order's money is taken once (I4)");
    assert_eq!(role.announced(2).await, [State::Captured, State::Refunded]);
    role.stop().await;
}

#[tokio::test]
async fn bad_items_are_refused_alone_and_write_nothing() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    let good = item(order(), "p", "sim_approve");
    let bad_method = item(order(), "p", "cash");
    let mut no_amount = item(order(), "p", "sim_approve");
    no_amount.amount = None;
    let mut negative = item(order(), "p", "sim_approve");
    negative.amount.as_mut().unwrap().units = -1;
    let mut bad_id = item(order(), "p", "sim_approve");
    bad_id.payment_id = "p q".into();
    let mut reused = good.clone();
    reused.amount.as_mut().unwrap().nanos = 0;
    let items = vec![good.clone(), bad_method.clone(), no_amount, negative, bad_id];
    let results = role.client.clone().charge(internal::ChargeRequest { items }).await.unwrap().into_inner().results;
    let fields = ["payment_method:", "amount:", "amount.units:", "payment_id:"];
    for (result, field) in results[1..].iter().zip(fields) {
        let Some(payment_result::Result::Refused(refusal)) = &result.result else { panic!("{field} was let in") };
        assert_eq!(refusal.reason(), Reason::InvalidField);
        assert!(refusal.message.starts_with(field), "{field}: {}", refusal.message);
    }
    assert_eq!(state(&role.charge(reused).await), Err(Reason::RequestIdReused));
    assert_eq!(state(&role.resolve(&bad_method.payment_id).await), Err(Reason::NotFound));
    assert_eq!(state(&role.resolve("p q").await), Err(Reason::NotFound));
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e27_forged_stale_and_deviating_webhooks_change_nothing() {
    let database = migrated().await;
    let slow = payment_svc::Config { sim_late_capture: Duration::from_secs(600), ..config() };
    let role = start(&database, slow, None).await;
    let item = item(order(), "p", "sim_timeout");
    role.charge(item.clone()).await.unwrap();
    let body = |currency: &str, units: &str, payment: &str, order: &str| {
        format!(
            r#"{{"type":"payment.captured","paymentId":"{payment}","orderId":"{order}","amount":{{"currencyCode":"{currency}","units":"{units}","nanos":990000000}},"time":"2026-01-01T00:00:00Z"}}"#
        )
    };
    let (payment, order_id) = (item.payment_id.as_str(), item.order_id.as_str());
    let good = body("EUR", "19", payment, order_id);
    let now = mesh::clock::Clock::system().now_ms() / 1_000;
    let sign = |body: &str, now| signature::sign(SECRET.as_bytes(), body.as_bytes(), now);
    let reason = |result: Result<(), proto::Error>| result.unwrap_err().reason;

    let forged = signature::sign(b"not the secret", good.as_bytes(), now);
    assert_eq!(reason(role.webhook(&good, &forged).await), Reason::Unauthenticated);
    assert_eq!(reason(role.webhook(&good, "").await), Reason::Unauthenticated);
    assert_eq!(reason(role.webhook(&good, &sign(&good, now - 301)).await), Reason::Unauthenticated);
    for (deviating, expected) in [
        (body("EUR", "20", payment, order_id), Reason::InvalidField),
        (body("USD", "19", payment, order_id), Reason::InvalidField),
        (body("EUR", "19", "other", order_id), Reason::NotFound),
        (body("EUR", "19", payment, &order().to_string()), Reason::NotFound),
        ("[]".to_owned(), Reason::InvalidField),
    ] {
        assert_eq!(reason(role.webhook(&deviating, &sign(&deviating, now)).await), expected, "{deviating}");
    }
    assert_eq!(role.resolve(payment).await.unwrap().state(), State::Pending);

    for _ in 0..2 {
        role.webhook(&good, &sign(&good, now)).await.unwrap();
    }
    assert_eq!(role.resolve(payment).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e31_a_second_life_takes_up_what_the_first_left_open() {
    let database = migrated().await;
    let role = start(&database, config(), None).await;
    // Its call is lost with the process …
    let lost = item(order(), "lost", "sim_timeout");
    let charging = tokio::spawn({
        let (mut client, item) = (role.client.clone(), lost.clone());
        async move { client.charge(internal::ChargeRequest { items: vec![item] }).await }
    });
    mesh::testing::eventually("the charge is at the provider", async || {
        use sea_orm::{ConnectionTrait, Statement};
        let statement = Statement::from_string(sea_orm::DbBackend::Sqlite, "SELECT 1 FROM payment_sim_charge");
        database.connection.query_one_raw(statement).await.unwrap().map(|_| ())
    })
    .await;
    role.life.kill();
    charging.abort();
    // … and this one was written down, and never reached the provider.
    let unsent = item(order(), "unsent", "sim_approve");
    let request = Request {
        order_id: unsent.order_id.parse().unwrap(),
        command: Command::Begin(NewCharge {
            payment_id: unsent.payment_id.parse().unwrap(),
            buyer: BuyerId::parse("alice").unwrap(),
            amount: Money::try_from(unsent.amount.as_ref().unwrap()).unwrap(),
            method: unsent.payment_method.clone(),
        }),
        traceparent: None,
    };
    let now_ms = mesh::clock::Clock::system().now_ms();
    SqlStore::new(database.connection.clone())
        .run(vec![request], Times { now_ms, call_ms: 0 })
        .await
        .unwrap()
        .remove(0)
        .unwrap();

    let role = start(&database, config(), None).await;
    // Nobody asks: it resolves by itself.
    mesh::testing::eventually("both are announced", async || {
        (role.bus.last_sequence(subjects::PAYMENTS).await.unwrap() == 2).then_some(())
    })
    .await;
    for payment_id in [&lost.payment_id, &unsent.payment_id] {
        assert_eq!(role.resolve(payment_id).await.unwrap().state(), State::Captured);
    }
    assert_eq!(role.announced(2).await, [State::Captured; 2]);
    role.stop().await;
}

/// What every provider must keep to, and what only this one does; on every database, because its books are in one.
#[tokio::test]
async fn the_simulated_provider_keeps_its_word_on_every_database() {
    for database in mesh::testing::databases().await {
        migrations::up(migrations::Service::Payment, &database.connection).await.unwrap();
        let (life, kind) = (mesh::lifecycle::Lifecycle::new(), database.kind);
        let (clock, now) = mesh::clock::Clock::manual(1_700_000_000_000);
        let sim = config().provider(database.connection.clone(), clock.clone(), &life).unwrap();
        let order = order();
        let id = |name: &str| -> PaymentId { format!("{name}-{order}").parse().unwrap() };
        let amount = Money::from_parts("amount", "EUR", 19, 990_000_000).unwrap();
        let charge = |name: &str, method: &str| {
            let amount = amount.clone();
            sim.charge(ChargeRequest { payment_id: id(name), order_id: order, amount, method: method.into() })
        };

        let first = charge("a", "sim_approve").await.unwrap();
        assert!(matches!(first, ProviderOutcome::Captured { .. }), "{kind}");
        assert_eq!(charge("a", "sim_decline").await.unwrap(), first, "the first call decides: {kind}");
        assert!(matches!(charge("d", "sim_decline").await, Ok(ProviderOutcome::Declined { .. })), "{kind}");
        assert!(matches!(charge("x", "cash").await, Err(ProviderError::Refused(_))), "{kind}");
        assert_eq!(sim.status(&id("x")).await.unwrap(), ProviderStatus::NotFound, "{kind}");

        for _ in 0..2 {
            assert_eq!(sim.refund(&id("a"), &amount).await.unwrap(), RefundOutcome::Refunded, "{kind}");
        }
        assert_eq!(sim.status(&id("a")).await.unwrap(), ProviderStatus::Refunded, "{kind}");
        assert!(matches!(sim.refund(&id("d"), &amount).await, Err(ProviderError::Refused(_))), "{kind}");

        // A cancellation that comes before its charge makes the charge fail.
        assert_eq!(sim.cancel(&id("early")).await.unwrap(), CancelOutcome::Cancelled, "{kind}");
        assert!(matches!(charge("early", "sim_approve").await, Err(ProviderError::Refused(_))), "{kind}");
        assert_eq!(sim.cancel(&id("a")).await.unwrap(), CancelOutcome::AlreadyCaptured, "{kind}");

        // Two calls that are not answered, of which one is cancelled. The clock stands still until we move it.
        for name in ["late", "cancelled"] {
            let never = tokio::time::timeout(Duration::from_millis(200), charge(name, "sim_timeout")).await;
            assert!(never.is_err(), "{kind}");
            assert_eq!(sim.status(&id(name)).await.unwrap(), ProviderStatus::Pending, "{kind}");
        }
        assert_eq!(sim.cancel(&id("cancelled")).await.unwrap(), CancelOutcome::Cancelled, "{kind}");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink: WebhookSink = {
            let (heard, sim, clock) = (heard.clone(), sim.clone(), clock.clone());
            Arc::new(move |webhook: SignedWebhook| -> Delivered {
                let event = sim.verify_webhook(&webhook.body, &webhook.signature, clock.now_ms()).unwrap();
                heard.lock().unwrap().push(event);
                Box::pin(async { Ok(()) })
            })
        };
        sim.deliver_webhooks(sink, &life);
        now.fetch_add(config().sim_late_capture.as_millis() as i64, Ordering::SeqCst);
        mesh::testing::eventually("the late capture", async || {
            matches!(sim.status(&id("late")).await.unwrap(), ProviderStatus::Captured { .. }).then_some(())
        })
        .await;
        for count in [1, 2] {
            mesh::testing::eventually("the webhook", async || (heard.lock().unwrap().len() == count).then_some(()))
                .await;
            now.fetch_add(1_000, Ordering::SeqCst);
        }
        let heard = heard.lock().unwrap().clone();
        assert_eq!(heard[0], heard[1], "the same twice: {kind}");
        assert_eq!((&heard[0].payment_id, &heard[0].amount), (&id("late"), &amount), "{kind}");
        assert_eq!(heard[0].event, Event::Captured { reference: None }, "{kind}");
        assert_eq!(sim.status(&id("cancelled")).await.unwrap(), ProviderStatus::Cancelled, "{kind}");
        drop(sim);
        assert!(life.stop(Duration::from_secs(10)).await, "{kind}");
    }
}
