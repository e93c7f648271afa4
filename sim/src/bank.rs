//! The payment provider: outside of every role, with books of its own.
//!
//! | method | the call | and then |
//! | --- | --- | --- |
//! | `good` | captured at once | a webhook, sometimes twice |
//! | `bad` | declined at once | |
//! | `slow` | answered after a while: captured | a webhook |
//! | `late` | never answered | captured some seconds later, unless it was cancelled before; its webhook comes twice |
//! | `never` | never answered | decided only when all is calm |
//!
//! Now and then it contradicts itself: what it has cancelled it captures all the same.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use mesh::clock::Clock;
use payment_svc::{
    domain::PaymentId,
    provider::{
        CancelOutcome, ChargeRequest, Provider, ProviderError, ProviderOutcome, ProviderStatus, RefundOutcome,
        WebhookEvent,
        signature::{self, Body, BodyAmount},
    },
};
use proto::{
    Money, OrderId,
    error::Result,
    internal::{HandleWebhookRequest, payments_client::PaymentsClient},
};
use tokio::time::sleep;

use crate::{
    faults::{Hands, Port},
    net::{Net, Role},
};

const SECRET: &[u8] = b"a secret of the simulation";

/// The methods that buyers pay by.
pub const METHODS: [&str; 5] = ["good", "bad", "slow", "late", "never"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Pending,
    Declined,
    Cancelled,
    Captured,
    Refunded,
}

#[derive(Clone, Debug)]
struct Account {
    order: Option<OrderId>,
    amount: Option<Money>,
    state: State,
}

/// See the module.
pub struct Bank {
    hands: Hands,
    net: Net,
    clock: Clock,
    accounts: Mutex<BTreeMap<PaymentId, Account>>,
}

impl fmt::Debug for Bank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bank")
    }
}

impl Bank {
    pub fn new(hands: Hands, net: Net, clock: Clock) -> Arc<Self> {
        Arc::new(Self { hands, net, clock, accounts: Mutex::default() })
    }

    fn accounts(&self) -> MutexGuard<'_, BTreeMap<PaymentId, Account>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Money that was taken and kept, and money that went back, by order.
    pub fn taken(&self) -> BTreeMap<String, (u32, u32)> {
        let mut taken = BTreeMap::new();
        for account in self.accounts().values() {
            let Some(order) = account.order else { continue };
            let (kept, returned): &mut (u32, u32) = taken.entry(order.to_string()).or_default();
            match account.state {
                State::Captured => *kept += 1,
                State::Refunded => *returned += 1,
                _ => {}
            }
        }
        taken
    }

    /// Decides what it never would have.
    pub fn decide_all(self: &Arc<Self>) {
        let pending: Vec<PaymentId> = {
            let accounts = self.accounts();
            accounts.iter().filter(|(_, a)| a.state == State::Pending).map(|(id, _)| id.clone()).collect()
        };
        for id in pending {
            let state = if self.hands.run().below(2) == 0 { State::Captured } else { State::Declined };
            self.settle(&id, State::Pending, state);
        }
    }

    /// Moves a payment, where it still is what it was.
    fn settle(self: &Arc<Self>, id: &PaymentId, from: State, state: State) {
        let Some(account) = self.accounts().get_mut(id).filter(|a| a.state == from).map(|account| {
            account.state = state;
            account.clone()
        }) else {
            return;
        };
        self.hands.note(|| format!("{id} of {:?} is now {state:?}", account.order));
        if state == State::Captured {
            let times = if self.hands.run().below(3) == 0 { 2 } else { 1 };
            for _ in 0..times {
                self.announce(id.clone(), account.clone());
            }
        }
    }

    /// Posts a webhook until it is taken.
    fn announce(self: &Arc<Self>, id: PaymentId, account: Account) {
        let (Some(order), Some(amount)) = (account.order, account.amount) else { return };
        let body = Body {
            r#type: "payment.captured".to_owned(),
            payment_id: id.to_string(),
            order_id: order.to_string(),
            amount: BodyAmount {
                currency_code: amount.currency().to_owned(),
                units: amount.units().to_string(),
                nanos: amount.nanos(),
            },
            time: "2026-01-01T00:00:00Z".to_owned(),
            decline_code: None,
        };
        let body = Bytes::from(serde_json::to_vec(&body).expect("it has a JSON form"));
        let bank = self.clone();
        tokio::spawn(async move {
            let mut payments = PaymentsClient::new(bank.net.link(&bank.hands, Role::Payment));
            loop {
                sleep(Duration::from_millis(bank.hands.run().below(2_000) as u64)).await;
                let signature = signature::sign(SECRET, &body, bank.clock.now_ms() / 1_000);
                let request = HandleWebhookRequest { body: body.clone(), signature };
                if payments.handle_webhook(request).await.is_ok() {
                    return;
                }
            }
        });
    }

    fn capture_after(self: &Arc<Self>, id: PaymentId, from: State, wait: Duration) {
        let bank = self.clone();
        tokio::spawn(async move {
            sleep(wait).await;
            bank.settle(&id, from, State::Captured);
        });
    }
}

/// One life's line to the bank.
#[derive(Debug)]
pub struct Line {
    hands: Hands,
    bank: Arc<Bank>,
}

impl Line {
    pub fn to(bank: &Arc<Bank>, hands: &Hands) -> Arc<Self> {
        Arc::new(Self { hands: hands.clone(), bank: bank.clone() })
    }

    async fn call<T: fmt::Debug>(
        &self,
        operation: &'static str,
        id: &PaymentId,
        effect: impl FnOnce(&Arc<Bank>) -> std::result::Result<T, ProviderError> + Send,
    ) -> std::result::Result<T, ProviderError> {
        let broken = |what: &'static str| ProviderError::Unknown(what.to_owned());
        let effect = async { effect(&self.bank) };
        self.hands.call(Port::Provider, operation, || id.to_string(), effect, broken).await
    }
}

fn reference(id: &PaymentId) -> String {
    format!("bank-{id}")
}

/// What a charge is answered with; `None` while it is not decided.
fn outcome(id: &PaymentId, account: &Account) -> Option<std::result::Result<ProviderOutcome, ProviderError>> {
    Some(match account.state {
        State::Pending => return None,
        State::Captured => Ok(ProviderOutcome::Captured { reference: reference(id) }),
        State::Declined => Ok(ProviderOutcome::Declined { code: "no".to_owned() }),
        State::Cancelled => Err(ProviderError::Refused("it was cancelled".to_owned())),
        State::Refunded => Err(ProviderError::Unknown("it was refunded".to_owned())),
    })
}

#[async_trait]
impl Provider for Line {
    fn accepts(&self, method: &str) -> bool {
        METHODS.contains(&method)
    }

    async fn charge(&self, request: ChargeRequest) -> std::result::Result<ProviderOutcome, ProviderError> {
        let ChargeRequest { payment_id: id, order_id, amount, method } = request;
        let decided = self
            .call("charge", &id, |bank| {
                let known = bank.accounts().get(&id).cloned();
                if let Some(account) = known {
                    return Ok(outcome(&id, &account));
                }
                let account = Account { order: Some(order_id), amount: Some(amount), state: State::Pending };
                bank.accounts().insert(id.clone(), account);
                match method.as_str() {
                    "good" => bank.settle(&id, State::Pending, State::Captured),
                    "bad" => bank.settle(&id, State::Pending, State::Declined),
                    "slow" => bank.capture_after(id.clone(), State::Pending, Duration::from_millis(1_200)),
                    "late" => {
                        let wait = bank.hands.run().below(8_000) as u64;
                        bank.capture_after(id.clone(), State::Pending, Duration::from_millis(wait));
                    }
                    _ => {}
                }
                let account = bank.accounts()[&id].clone();
                Ok(outcome(&id, &account))
            })
            .await?;
        if let Some(decided) = decided {
            return decided;
        }
        if method == "slow" {
            self.hands.pause(Duration::from_millis(1_250)).await;
            let account = self.bank.accounts()[&id].clone();
            return outcome(&id, &account).unwrap_or(Ok(ProviderOutcome::Pending));
        }
        std::future::pending().await
    }

    async fn status(&self, id: &PaymentId) -> std::result::Result<ProviderStatus, ProviderError> {
        self.call("status", id, |bank| {
            Ok(match bank.accounts().get(id).map(|account| account.state) {
                None => ProviderStatus::NotFound,
                Some(State::Pending) => ProviderStatus::Pending,
                Some(State::Declined) => ProviderStatus::Declined { code: "no".to_owned() },
                Some(State::Cancelled) => ProviderStatus::Cancelled,
                Some(State::Captured) => ProviderStatus::Captured { reference: reference(id) },
                Some(State::Refunded) => ProviderStatus::Refunded,
            })
        })
        .await
    }

    async fn cancel(&self, id: &PaymentId) -> std::result::Result<CancelOutcome, ProviderError> {
        self.call("cancel", id, |bank| {
            let mut accounts = bank.accounts();
            let cancelled = Account { order: None, amount: None, state: State::Cancelled };
            let account = accounts.entry(id.clone()).or_insert(cancelled);
            Ok(match account.state {
                State::Captured | State::Refunded => CancelOutcome::AlreadyCaptured,
                State::Declined => CancelOutcome::Cancelled,
                State::Cancelled => CancelOutcome::Cancelled,
                State::Pending => {
                    account.state = State::Cancelled;
                    if !bank.hands.run().is_calm() && bank.hands.run().below(3) == 0 {
                        let wait = Duration::from_millis(bank.hands.run().below(4_000) as u64);
                        bank.capture_after(id.clone(), State::Cancelled, wait);
                    }
                    CancelOutcome::Cancelled
                }
            })
        })
        .await
    }

    async fn refund(&self, id: &PaymentId, _: &Money) -> std::result::Result<RefundOutcome, ProviderError> {
        self.call("refund", id, |bank| match bank.accounts().get_mut(id) {
            Some(account) if matches!(account.state, State::Captured | State::Refunded) => {
                account.state = State::Refunded;
                Ok(RefundOutcome::Refunded)
            }
            _ => Err(ProviderError::Refused("nothing was captured".to_owned())),
        })
        .await
    }

    fn verify_webhook(&self, body: &[u8], signature: &str, now_ms: i64) -> Result<WebhookEvent> {
        signature::verify(SECRET, body, signature, now_ms / 1_000)
    }
}
