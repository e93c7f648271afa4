//! Whoever takes the money: the port, with the simulated provider [`sim`] behind it.
//!
//! A provider is outside of our process and of our trust: it answers late, twice or not at all, and may contradict
//! itself. What is asked of one:
//!
//! - `charge`, `cancel` and `refund` are idempotent by payment id and safe to repeat at any time.
//! - Once `cancel` has answered `Cancelled`, the payment is not captured any more, also when its charge arrives later.
//! - `status` tells what a lost answer would have said.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use mesh::lifecycle::Lifecycle;
use proto::{Money, OrderId, error::Result};

use crate::domain::{Event, PaymentId};

pub mod signature;
pub mod sim;

/// A charge to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChargeRequest {
    /// The idempotency key.
    pub payment_id: PaymentId,
    /// What it is for.
    pub order_id: OrderId,
    /// How much.
    pub amount: Money,
    /// By which method.
    pub method: String,
}

/// What a charge came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProviderOutcome {
    /// The provider has the money.
    Captured {
        /// Its own id of it.
        reference: String,
    },
    /// It said no.
    Declined {
        /// Why.
        code: String,
    },
    /// It has not decided.
    Pending,
}

/// What has become of a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProviderStatus {
    /// The provider has the money.
    Captured {
        /// Its own id of it.
        reference: String,
    },
    /// It said no.
    Declined {
        /// Why.
        code: String,
    },
    /// It has not decided.
    Pending,
    /// It will never charge it.
    Cancelled,
    /// The money went back.
    Refunded,
    /// It never heard of it.
    NotFound,
}

/// What a cancellation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It will never be captured.
    Cancelled,
    /// Too late: the provider has the money.
    AlreadyCaptured,
    /// Not known yet.
    Pending,
}

/// What a refund came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefundOutcome {
    /// The money went back.
    Refunded,
    /// It is on its way.
    Pending,
}

/// The provider did not do it, or did not say that it did.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProviderError {
    /// No answer: it may have happened or not.
    #[error("the provider did not answer: {0}")]
    Unknown(String),
    /// It was refused and had no effect.
    #[error("the provider refused: {0}")]
    Refused(String),
}

/// A webhook whose signature and time are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebhookEvent {
    /// Which payment.
    pub payment_id: PaymentId,
    /// Of which order.
    pub order_id: OrderId,
    /// Of how much, to be compared.
    pub amount: Money,
    /// What happened.
    pub event: Event,
}

/// A webhook as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedWebhook {
    /// JSON, exactly as it was signed.
    pub body: Bytes,
    /// The header Seckill-Signature.
    pub signature: String,
}

/// What the receiver of a webhook answers.
pub type Delivered = BoxFuture<'static, Result<()>>;

/// Where webhooks go that do not come in over HTTP.
pub type WebhookSink = Arc<dyn Fn(SignedWebhook) -> Delivered + Send + Sync>;

/// A payment provider. See the module for what it must keep to.
#[async_trait]
pub trait Provider: Send + Sync + fmt::Debug {
    /// Whether it knows this payment method. Asked before anything is written.
    fn accepts(&self, method: &str) -> bool;

    /// Takes the money, once per payment id.
    async fn charge(&self, request: ChargeRequest) -> Result<ProviderOutcome, ProviderError>;

    /// What became of a payment.
    async fn status(&self, payment_id: &PaymentId) -> Result<ProviderStatus, ProviderError>;

    /// Makes sure that a payment is not captured any more, also one that was not charged yet.
    async fn cancel(&self, payment_id: &PaymentId) -> Result<CancelOutcome, ProviderError>;

    /// Gives the money of a payment back, once.
    async fn refund(&self, payment_id: &PaymentId, amount: &Money) -> Result<RefundOutcome, ProviderError>;

    /// Reads a webhook. UNAUTHENTICATED when signature or time are not good, INVALID_FIELD when the body is not.
    fn verify_webhook(&self, body: &[u8], signature: &str, now_ms: i64) -> Result<WebhookEvent>;

    /// Called once when the role starts: a provider inside this process delivers its webhooks here, as long as `life`
    /// lasts. One outside of it posts them to the gateway.
    fn deliver_webhooks(&self, sink: WebhookSink, life: &Lifecycle) {
        let _ = (sink, life);
    }
}
