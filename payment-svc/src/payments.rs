//! Taking money and giving it back: written down first, then asked of the provider, then written down again.
//!
//! What writes shares transactions with whoever writes at the same time; what waits for the provider waits alone, so
//! that one slow payment delays nobody else's. Once begun, a payment is driven on even if its caller goes away.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use mesh::{
    batch::{Batcher, Limits},
    clock::Clock,
    lifecycle::Lifecycle,
    telemetry::propagation,
};
use proto::{Error, OrderId, Reason, error::Result};
use tracing::Instrument;

use crate::{
    config::Config,
    domain::{Answer, Charge, Command, Event, NewCharge, PaymentId, Step, Times, is_open},
    provider::{CancelOutcome, ChargeRequest, Provider, ProviderError, ProviderOutcome, ProviderStatus, RefundOutcome},
    relay::Relay,
    store::{Open, Request, Store},
};

/// Commands in one transaction, and transactions at once: in a rush a second hides the database's round trip.
const LIMITS: Limits = Limits { overlap_from: 128, ..Limits::DEFAULT };

/// What was done with an order's money. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Payments {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) clock: Clock,
    provider: Arc<dyn Provider>,
    timeout: Duration,
    books: Batcher<Request, Result<Answer>>,
    life: Lifecycle,
}

impl Payments {
    /// Starts the batches.
    pub(crate) fn start(
        config: &Config,
        store: Arc<dyn Store>,
        provider: Arc<dyn Provider>,
        clock: Clock,
        relay: Relay,
        life: &Lifecycle,
    ) -> Self {
        let timeout = config.provider_timeout;
        let books = {
            let (store, clock) = (store.clone(), clock.clone());
            Batcher::start("payment_books", LIMITS, life.tasks(), move |requests: Vec<Request>| {
                let (store, relay) = (store.clone(), relay.clone());
                let times = Times { now_ms: clock.now_ms(), call_ms: timeout.as_millis() as i64 };
                async move {
                    let count = requests.len();
                    match store.run(requests, times).await {
                        Ok(answers) => {
                            relay.wake();
                            answers
                        }
                        Err(error) => {
                            tracing::warn!(%error, count, "a batch of payments failed");
                            (0..count).map(|_| Err(error.clone())).collect()
                        }
                    }
                }
            })
        };
        Self { store, clock, provider, timeout, books, life: life.clone() }
    }

    /// Charges, once per payment id. PENDING when the provider has not said in time.
    pub(crate) async fn charge(&self, order_id: OrderId, new: NewCharge) -> Result<Answer> {
        if !self.provider.accepts(&new.method) {
            return Err(Error::invalid("payment_method", "is not one that the payment provider takes"));
        }
        let payments = self.clone();
        self.detached(async move {
            let begun = payments.run(order_id, Command::Begin(new)).await?;
            match begun.todo.first() {
                Some(charge) => {
                    let said = payments.ask_to_charge(charge).await;
                    payments.note(charge, said).await
                }
                None => Ok(begun),
            }
        })
        .await
    }

    /// What is known of charges, after asking the provider about those that are open. One result each, in order.
    pub(crate) async fn resolve(&self, payment_ids: Vec<PaymentId>) -> Result<Vec<Result<Answer>>> {
        let found = self.store.read(payment_ids).await?;
        Ok(join_all(found.into_iter().map(|open| async move {
            match open {
                Some(open) if is_open(open.charge.state) => self.drive(open, false).await,
                Some(Open { charge, .. }) => Ok(Answer { state: charge.state, charge: Some(charge), todo: vec![] }),
                None => Err(Error::not_found("payment")),
            }
        }))
        .await)
    }

    /// Makes sure that an order can no longer be charged, as far as the provider says so now.
    pub(crate) async fn void(&self, order_id: OrderId) -> Result<Answer> {
        let payments = self.clone();
        self.detached(async move {
            let voided = payments.run(order_id, Command::Void).await?;
            if voided.todo.is_empty() {
                return Ok(voided);
            }
            for noted in join_all(voided.todo.iter().map(|charge| payments.cancel(charge))).await {
                noted?;
            }
            payments.run(order_id, Command::Void).await
        })
        .await
    }

    /// Gives an order's captured money back, once.
    pub(crate) async fn refund(&self, order_id: OrderId) -> Result<Answer> {
        let payments = self.clone();
        self.detached(async move {
            let requested = payments.run(order_id, Command::Refund).await?;
            match requested.todo.first() {
                Some(charge) => payments.give_back(charge).await,
                None => Ok(requested),
            }
        })
        .await
    }

    /// Takes the provider's word from a webhook. Every refusal is logged: somebody may be trying.
    pub(crate) async fn webhook(&self, body: &[u8], signature: &str) -> Result<()> {
        let taken = async {
            let webhook = self.provider.verify_webhook(body, signature, self.clock.now_ms())?;
            let command = Command::Webhook(webhook.payment_id, webhook.amount, webhook.event);
            self.run(webhook.order_id, command).await
        };
        let (outcome, result) = match taken.await {
            Ok(_) => ("taken", Ok(())),
            Err(error) => {
                tracing::warn!(%error, "a payment webhook was refused");
                (error.reason.as_str_name(), Err(error))
            }
        };
        metrics::counter!("seckill_payment_webhooks_total", "outcome" => outcome).increment(1);
        result
    }

    /// Asks the provider about an open charge and notes what it says. One that the provider never heard of is charged
    /// if it `may_start`: it was written down, and the call was lost with the process that was to make it.
    pub(crate) async fn drive(&self, open: Open, may_start: bool) -> Result<Answer> {
        let Open { charge, step } = open;
        match step {
            Step::Rest => Ok(Answer { state: charge.state, charge: Some(charge), todo: vec![] }),
            Step::Cancel => self.cancel(&charge).await,
            Step::Refund => self.give_back(&charge).await,
            Step::Ask => {
                let said = match self.call("status", self.provider.status(&charge.payment_id)).await {
                    Ok(ProviderStatus::Captured { reference }) => Some(Event::Captured { reference: Some(reference) }),
                    Ok(ProviderStatus::Declined { code }) => Some(Event::Declined { code }),
                    Ok(ProviderStatus::Cancelled) => Some(Event::Cancelled),
                    Ok(ProviderStatus::Refunded) => Some(Event::Refunded),
                    Ok(ProviderStatus::NotFound) if may_start => self.ask_to_charge(&charge).await,
                    Ok(ProviderStatus::Pending | ProviderStatus::NotFound) | Err(_) => None,
                };
                self.note(&charge, said).await
            }
        }
    }

    /// `None` while the provider has not said.
    async fn ask_to_charge(&self, charge: &Charge) -> Option<Event> {
        let request = ChargeRequest {
            payment_id: charge.payment_id.clone(),
            order_id: charge.order_id,
            amount: charge.amount.clone(),
            method: charge.method.clone(),
        };
        match self.call("charge", self.provider.charge(request)).await {
            Ok(ProviderOutcome::Captured { reference }) => Some(Event::Captured { reference: Some(reference) }),
            Ok(ProviderOutcome::Declined { code }) => Some(Event::Declined { code }),
            // No money moved, and none will.
            Err(ProviderError::Refused(_)) => Some(Event::Declined { code: "refused".to_owned() }),
            Ok(ProviderOutcome::Pending) | Err(ProviderError::Unknown(_)) => None,
        }
    }

    async fn cancel(&self, charge: &Charge) -> Result<Answer> {
        let said = match self.call("cancel", self.provider.cancel(&charge.payment_id)).await {
            Ok(CancelOutcome::Cancelled) => Some(Event::Cancelled),
            Ok(CancelOutcome::AlreadyCaptured) => Some(Event::Captured { reference: None }),
            Ok(CancelOutcome::Pending) | Err(_) => None,
        };
        self.note(charge, said).await
    }

    async fn give_back(&self, charge: &Charge) -> Result<Answer> {
        let said = match self.call("refund", self.provider.refund(&charge.payment_id, &charge.amount)).await {
            Ok(RefundOutcome::Refunded) => Some(Event::Refunded),
            Ok(RefundOutcome::Pending) | Err(_) => None,
        };
        self.note(charge, said).await
    }

    async fn note(&self, charge: &Charge, said: Option<Event>) -> Result<Answer> {
        let payment_id = charge.payment_id.clone();
        let command = match said {
            Some(event) => Command::Settle(payment_id, event),
            None => Command::Unsettled(payment_id),
        };
        self.run(charge.order_id, command).await
    }

    async fn run(&self, order_id: OrderId, command: Command) -> Result<Answer> {
        let traceparent = propagation::current_traceparent();
        self.books.submit(Request { order_id, command, traceparent }).await?
    }

    /// One call to the provider, for no longer than it may take.
    async fn call<T>(
        &self,
        name: &'static str,
        call: impl Future<Output = Result<T, ProviderError>>,
    ) -> Result<T, ProviderError> {
        let begun = tokio::time::Instant::now();
        let answer = match tokio::time::timeout(self.timeout, call).await {
            Ok(answer) => answer,
            Err(_) => Err(ProviderError::Unknown(format!("{name} took longer than {:?}", self.timeout))),
        };
        let outcome = match &answer {
            Ok(_) => "ok",
            Err(ProviderError::Unknown(_)) => "unknown",
            Err(ProviderError::Refused(_)) => "refused",
        };
        metrics::histogram!("seckill_payment_provider_seconds", "call" => name, "outcome" => outcome)
            .record(begun.elapsed());
        if let Err(error) = &answer {
            tracing::info!(%error, call = name, "the payment provider did not do as asked");
        }
        answer
    }

    /// Runs to its end even if the caller goes away: between two writes there is somebody's money.
    async fn detached<T: Send + 'static>(&self, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        let (reply, result) = tokio::sync::oneshot::channel();
        let work = async move {
            // Nobody waits any more: what was done stands, and is found by asking again.
            let _ = reply.send(work.await);
        };
        self.life.spawn(work.in_current_span());
        result.await.unwrap_or_else(|_| Err(Error::new(Reason::DependencyDown, "shutting down")))
    }
}
