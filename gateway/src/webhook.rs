//! The payment provider's webhook: taken as it came in, byte for byte, because its signature is over the bytes.
//!
//! It has places of its own: a rush of buyers must not keep the provider's word out.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Request, State},
};
use http::{HeaderValue, Response, header};
use mesh::{layers::Deadline, link::Link};
use proto::{
    Error, Reason,
    internal::{HandleWebhookRequest, payments_client::PaymentsClient},
};
use tokio::{sync::Semaphore, time::timeout_at};

use crate::{failure, transcode::read_any};

/// Where it is.
pub const PATH: &str = "/v1/payments/webhook";

/// The header that holds `t=<unix seconds>,v1=<hex HMAC-SHA256 of t.body>`.
pub const SIGNATURE: &str = "seckill-signature";

/// Webhooks at once. Beyond it the provider tries again, as providers do.
const PLACES: usize = 256;

/// Hands webhooks to payment-svc.
#[derive(Clone)]
pub struct Webhook {
    payments: PaymentsClient<Link>,
    places: Arc<Semaphore>,
    timeout: Duration,
}

impl Webhook {
    /// Over this link.
    pub fn new(payment: Link, timeout: Duration) -> Self {
        Self { payments: PaymentsClient::new(payment), places: Arc::new(Semaphore::new(PLACES)), timeout }
    }

    async fn hand_on(mut self, request: Request) -> Result<(), Error> {
        let busy = |_| Error::new(Reason::Overloaded, "too many webhooks are in progress");
        let _place = self.places.clone().try_acquire_owned().map_err(busy)?;
        let (parts, body) = request.into_parts();
        let signature = parts.headers.get(SIGNATURE).and_then(|signature| signature.to_str().ok());
        let Some(signature) = signature.map(str::to_owned) else {
            return Err(Error::new(Reason::Unauthenticated, "the header Seckill-Signature is required"));
        };
        let body = read_any(&parts.headers, body).await?;
        self.payments.handle_webhook(HandleWebhookRequest { body, signature }).await?;
        Ok(())
    }
}

/// Answers `{}` once payment-svc has it.
pub async fn receive(State(webhook): State<Webhook>, request: Request) -> Response<Body> {
    let deadline = Deadline::after(webhook.timeout);
    let late = |_| Err(Error::new(Reason::DeadlineExceeded, "deadline exceeded"));
    match timeout_at(deadline.0, deadline.scope(webhook.hand_on(request))).await.unwrap_or_else(late) {
        Ok(()) => {
            let mut response = Response::new(Body::from("{}"));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => {
            tracing::debug!(%error, "webhook refused");
            failure::response(&error)
        }
    }
}
