//! The role with a provider that says what the test tells it to: what no well-behaved provider does on demand.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use payment_svc::{
    domain::PaymentId,
    provider::{
        CancelOutcome, ChargeRequest, Provider, ProviderError, ProviderOutcome, ProviderStatus, RefundOutcome,
        WebhookEvent, signature,
    },
};
use proto::{
    Money, Reason,
    error::Result,
    internal::{ChargeItem, PaymentState as State},
};

use crate::role::{Role, SECRET, config, item, migrated, order, start, state};

/// What it says next, and what it was asked to do.
#[derive(Debug)]
struct Script {
    charge: ProviderOutcome,
    status: ProviderStatus,
    cancel: CancelOutcome,
    refund: RefundOutcome,
    charged: Vec<PaymentId>,
    cancelled: Vec<PaymentId>,
    refunded: Vec<PaymentId>,
}

#[derive(Clone, Debug)]
struct Scripted(Arc<Mutex<Script>>);

impl Scripted {
    /// Says nothing of anything.
    fn silent() -> Self {
        Self(Arc::new(Mutex::new(Script {
            charge: ProviderOutcome::Pending,
            status: ProviderStatus::Pending,
            cancel: CancelOutcome::Pending,
            refund: RefundOutcome::Pending,
            charged: Vec::new(),
            cancelled: Vec::new(),
            refunded: Vec::new(),
        })))
    }

    fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.0.lock().unwrap());
    }

    fn read<T>(&self, look: impl FnOnce(&Script) -> T) -> T {
        look(&self.0.lock().unwrap())
    }
}

#[async_trait]
impl Provider for Scripted {
    fn accepts(&self, _method: &str) -> bool {
        true
    }

    async fn charge(&self, request: ChargeRequest) -> Result<ProviderOutcome, ProviderError> {
        let mut script = self.0.lock().unwrap();
        script.charged.push(request.payment_id);
        Ok(script.charge.clone())
    }

    async fn status(&self, _payment_id: &PaymentId) -> Result<ProviderStatus, ProviderError> {
        Ok(self.read(|s| s.status.clone()))
    }

    async fn cancel(&self, payment_id: &PaymentId) -> Result<CancelOutcome, ProviderError> {
        let mut script = self.0.lock().unwrap();
        script.cancelled.push(payment_id.clone());
        Ok(script.cancel)
    }

    async fn refund(&self, payment_id: &PaymentId, amount: &Money) -> Result<RefundOutcome, ProviderError> {
        let mut script = self.0.lock().unwrap();
        assert_eq!((amount.units(), amount.nanos()), (19, 990_000_000), "E32");
        script.refunded.push(payment_id.clone());
        Ok(script.refund)
    }

    fn verify_webhook(&self, body: &[u8], signature: &str, now_ms: i64) -> Result<WebhookEvent> {
        signature::verify(SECRET.as_bytes(), body, signature, now_ms / 1_000)
    }
}

/// The provider's webhook about this charge, delivered.
async fn webhook(role: &Role, item: &ChargeItem, kind: &str) {
    let body = format!(
        r#"{{"type":"payment.{kind}","paymentId":"{}","orderId":"{}","amount":{{"currencyCode":"EUR","units":"19","nanos":990000000}},"time":""}}"#,
        item.payment_id, item.order_id
    );
    let now = mesh::clock::Clock::system().now_ms() / 1_000;
    role.webhook(&body, &signature::sign(SECRET.as_bytes(), body.as_bytes(), now)).await.unwrap();
}

#[tokio::test]
async fn e29_a_void_is_pending_until_the_payment_is_known_to_be_cancelled() {
    let (database, provider) = (migrated().await, Scripted::silent());
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let order = order();
    let item = item(order, "p", "card");
    assert_eq!(role.charge(item.clone()).await.unwrap().state(), State::Pending);
    for _ in 0..3 {
        assert_eq!(role.void(order).await.unwrap().state(), State::Pending, "not known, not resold");
    }
    provider.set(|s| s.cancel = CancelOutcome::Cancelled);
    // Nobody asks: the resolver does.
    assert_eq!(role.announced(1).await, [State::Cancelled]);
    assert_eq!(role.void(order).await.unwrap().state(), State::Cancelled);
    role.stop().await;
}

#[tokio::test]
async fn e29_a_void_that_comes_too_late_says_so() {
    let (database, provider) = (migrated().await, Scripted::silent());
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let order = order();
    role.charge(item(order, "p", "card")).await.unwrap();
    provider.set(|s| s.cancel = CancelOutcome::AlreadyCaptured);
    assert_eq!(role.void(order).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(1).await, [State::Captured]);
    role.stop().await;
}

#[tokio::test]
async fn e24_a_capture_after_the_void_is_announced_and_refunded_exactly_once() {
    let (database, provider) = (migrated().await, Scripted::silent());
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let order = order();
    let item = item(order, "p", "card");
    role.charge(item.clone()).await.unwrap();
    provider.set(|s| s.cancel = CancelOutcome::Cancelled);
    assert_eq!(role.void(order).await.unwrap().state(), State::Cancelled);
    // The provider breaks its word, twice.
    webhook(&role, &item, "captured").await;
    webhook(&role, &item, "captured").await;
    assert_eq!(role.void(order).await.unwrap().state(), State::Captured);
    provider.set(|s| s.refund = RefundOutcome::Refunded);
    let (one, two) = tokio::join!(role.refund(order), role.refund(order));
    assert!(one.is_ok() && two.is_ok());
    assert_eq!(role.refund(order).await.unwrap().state(), State::Refunded);
    webhook(&role, &item, "captured").await;
    assert_eq!(role.announced(3).await, [State::Cancelled, State::Captured, State::Refunded]);
    role.stop().await;
}

#[tokio::test]
async fn e24_a_refund_that_takes_its_time_is_driven_to_its_end() {
    let (database, provider) = (migrated().await, Scripted::silent());
    provider.set(|s| s.charge = ProviderOutcome::Captured { reference: "r".into() });
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let order = order();
    role.charge(item(order, "p", "card")).await.unwrap();
    assert_eq!(role.refund(order).await.unwrap().state(), State::RefundPending);
    provider.set(|s| s.refund = RefundOutcome::Refunded);
    assert_eq!(role.announced(2).await, [State::Captured, State::Refunded]);
    let asked = provider.read(|s| s.refunded.len());
    assert_eq!(role.refund(order).await.unwrap().state(), State::Refunded);
    assert_eq!(provider.read(|s| s.refunded.len()), asked, "what is known is not asked for");
    role.stop().await;
}

#[tokio::test]
async fn e24_money_that_the_provider_took_twice_goes_back_unasked() {
    let (database, provider) = (migrated().await, Scripted::silent());
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let order = order();
    let (first, second) = (item(order, "first", "card"), item(order, "second", "card"));
    provider.set(|s| s.charge = ProviderOutcome::Declined { code: "no".into() });
    assert_eq!(role.charge(first.clone()).await.unwrap().state(), State::Declined);
    provider.set(|s| {
        s.charge = ProviderOutcome::Captured { reference: "r".into() };
        s.refund = RefundOutcome::Refunded;
    });
    assert_eq!(role.charge(second.clone()).await.unwrap().state(), State::Captured);
    webhook(&role, &first, "captured").await;
    role.until(&first.payment_id, State::Refunded).await;
    let refunded = provider.read(|s| s.refunded.clone());
    assert!(refunded.iter().all(|p| p.as_str() == first.payment_id), "{refunded:?}");
    assert_eq!(role.resolve(&second.payment_id).await.unwrap().state(), State::Captured);
    assert_eq!(role.announced(2).await, [State::Declined, State::Captured], "the order is paid, and hears no more");
    role.stop().await;
}

#[tokio::test]
async fn e26_webhooks_out_of_order_converge() {
    let (database, provider) = (migrated().await, Scripted::silent());
    let role = start(&database, config(), Some(Arc::new(provider))).await;
    let mut announced = 0;
    for (words, end, announcements) in [
        (["refunded", "captured", "declined"], State::Refunded, 1),
        (["captured", "refunded", "captured"], State::Refunded, 2),
        (["declined", "captured", "declined"], State::Captured, 2),
        (["captured", "cancelled", "declined"], State::Captured, 1),
    ] {
        let item = item(order(), "p", "card");
        role.charge(item.clone()).await.unwrap();
        for word in words {
            webhook(&role, &item, word).await;
            webhook(&role, &item, word).await;
        }
        assert_eq!(role.resolve(&item.payment_id).await.unwrap().state(), end, "{words:?}");
        announced += announcements;
        assert_eq!(role.announced(announced).await.len(), announced, "{words:?}");
    }
    role.stop().await;
}

#[tokio::test]
async fn e28_the_same_click_sent_in_parallel_reaches_the_provider_once() {
    let (database, provider) = (migrated().await, Scripted::silent());
    provider.set(|s| s.charge = ProviderOutcome::Captured { reference: "r".into() });
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let item = item(order(), "p", "card");
    let answers = futures::future::join_all((0..20).map(|_| role.charge(item.clone()))).await;
    assert!(answers.iter().all(|a| matches!(state(a), Ok(State::Captured | State::Pending))), "{answers:?}");
    assert_eq!(provider.read(|s| s.charged.len()), 1);
    assert_eq!(role.charge(item.clone()).await.unwrap().state(), State::Captured);
    assert_eq!(state(&role.charge(ChargeItem { buyer: "bob".into(), ..item }).await), Err(Reason::RequestIdReused));
    role.stop().await;
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_charge_behind_unnoted() {
    let (database, provider) = (migrated().await, Scripted::silent());
    provider.set(|s| s.charge = ProviderOutcome::Captured { reference: "r".into() });
    let role = start(&database, config(), Some(Arc::new(provider.clone()))).await;
    let item = item(order(), "p", "card");
    // Asked for and dropped at once, at whatever point it has come to.
    for _ in 0..5 {
        let _ = tokio::time::timeout(std::time::Duration::from_micros(200), role.charge(item.clone())).await;
    }
    assert_eq!(role.announced(1).await, [State::Captured]);
    assert_eq!(provider.read(|s| s.cancelled.len()), 0);
    role.stop().await;
}
