//! The role as a caller meets it, through a link, with a bus to hear its announcements on.

use std::{sync::Arc, time::Duration};

use mesh::{
    bus::{Bus, ConsumerSpec, sqlite::SqliteBus},
    clock::Clock,
    layers::{ClientConfig, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
    testing::{self, TestDatabase},
};
use payment_svc::{Backends, Config, provider::Provider, store::sql::SqlStore};
use proto::{
    BuyerId, Error, OrderId, Reason, RequestId,
    internal::{
        Amount, ChargeItem, ChargeRequest, HandleWebhookRequest, PaymentResult, PaymentSettled, PaymentState,
        PaymentStatus, RefundRequest, ResolveRequest, VoidRequest, payment_result, payments_client::PaymentsClient,
    },
    subjects,
};

pub const SECRET: &str = "a secret of the tests";

pub struct Role {
    pub client: PaymentsClient<Link>,
    pub bus: Arc<SqliteBus>,
    pub life: Lifecycle,
}

/// Settings for impatient tests.
pub fn config() -> Config {
    Config {
        provider_timeout: Duration::from_millis(500),
        provider_webhook_secret: Some(SECRET.to_owned()),
        sim_late_capture: Duration::from_millis(2_500),
        ..Config::default()
    }
}

pub async fn migrated() -> TestDatabase {
    let database = testing::sqlite().await;
    migrations::up(migrations::Service::Payment, &database.connection).await.unwrap();
    database
}

/// Starts the role, with the simulated provider where no other is given.
pub async fn start(database: &TestDatabase, config: Config, provider: Option<Arc<dyn Provider>>) -> Role {
    let (life, clock) = (Lifecycle::new(), Clock::system());
    let bus = Arc::new(SqliteBus::in_memory(clock.clone(), life.tasks()).await.unwrap());
    let db = database.connection.clone();
    let provider = match provider {
        Some(provider) => provider,
        None => config.provider(db.clone(), clock.clone(), &life).unwrap(),
    };
    let store = Arc::new(SqlStore::new(db));
    let backends = Backends { store, bus: bus.clone(), clock, provider };
    let routes = payment_svc::start(config, backends, &life).await.unwrap();
    let server = mesh::layers::server(routes, ServerConfig::default());
    Role { client: PaymentsClient::new(Link::local(server, ClientConfig::default())), bus, life }
}

pub fn order() -> OrderId {
    OrderId::derive(&BuyerId::parse("alice").unwrap(), &RequestId::random())
}

pub fn amount() -> Amount {
    Amount { currency: "EUR".into(), units: 19, nanos: 990_000_000 }
}

pub fn item(order: OrderId, payment_id: &str, method: &str) -> ChargeItem {
    ChargeItem {
        payment_id: format!("{payment_id}-{order}"),
        order_id: order.to_string(),
        buyer: "alice".into(),
        amount: Some(amount()),
        payment_method: method.into(),
    }
}

/// The one result of a call of one item.
fn only(results: Vec<PaymentResult>) -> Result<PaymentStatus, Error> {
    let [result] = <[_; 1]>::try_from(results).expect("one result");
    match result.result.expect("a result") {
        payment_result::Result::Status(status) => Ok(status),
        payment_result::Result::Refused(refusal) => Err(refusal.into()),
    }
}

/// Its state, or why it was refused.
pub fn state(result: &Result<PaymentStatus, Error>) -> Result<PaymentState, Reason> {
    result.as_ref().map(PaymentStatus::state).map_err(|e| e.reason)
}

impl Role {
    pub async fn charge(&self, item: ChargeItem) -> Result<PaymentStatus, Error> {
        let charged = self.client.clone().charge(ChargeRequest { items: vec![item] }).await.unwrap();
        only(charged.into_inner().results)
    }

    pub async fn resolve(&self, payment_id: &str) -> Result<PaymentStatus, Error> {
        let resolved = self.client.clone().resolve(ResolveRequest { payment_ids: vec![payment_id.to_owned()] }).await;
        only(resolved.unwrap().into_inner().results)
    }

    pub async fn void(&self, order: OrderId) -> Result<PaymentStatus, Error> {
        let voided = self.client.clone().void(VoidRequest { order_ids: vec![order.to_string()] }).await.unwrap();
        only(voided.into_inner().results)
    }

    pub async fn refund(&self, order: OrderId) -> Result<PaymentStatus, Error> {
        let refunded = self.client.clone().refund(RefundRequest { order_ids: vec![order.to_string()] }).await.unwrap();
        only(refunded.into_inner().results)
    }

    pub async fn webhook(&self, body: &str, signature: &str) -> Result<(), Error> {
        let request = HandleWebhookRequest { body: body.to_owned().into(), signature: signature.to_owned() };
        self.client.clone().handle_webhook(request).await.map(|_| ()).map_err(Error::from)
    }

    /// Waits for the payment to come to this state, however it does.
    pub async fn until(&self, payment_id: &str, wanted: PaymentState) {
        testing::eventually(&format!("{payment_id} becomes {wanted:?}"), async || {
            (self.resolve(payment_id).await.unwrap().state() == wanted).then_some(())
        })
        .await;
    }

    /// What was announced, in order, once `count` announcements are there.
    pub async fn announced(&self, count: usize) -> Vec<PaymentState> {
        testing::eventually(&format!("{count} announcements"), async || {
            (self.bus.last_sequence(subjects::PAYMENTS).await.unwrap() >= count as u64).then_some(())
        })
        .await;
        let spec = ConsumerSpec {
            stream: subjects::PAYMENTS,
            name: format!("test-{}", RequestId::random()),
            filter: subjects::PAYMENTS_SETTLED.to_owned(),
            ack_wait: Duration::from_secs(30),
            max_attempts: None,
            max_pending: 1_000,
        };
        let consumer = self.bus.consumer(spec).await.unwrap();
        let deliveries = consumer.fetch(1_000, Duration::from_secs(5)).await.unwrap();
        deliveries
            .iter()
            .map(|delivery| {
                let settled: PaymentSettled = prost::Message::decode(delivery.payload.clone()).unwrap();
                let status = settled.status.expect("a status");
                assert_eq!(delivery.id, format!("{}-{}", status.payment_id, status.state().as_str_name()));
                assert_eq!(status.amount, Some(amount()), "E32");
                status.state()
            })
            .collect()
    }

    /// Everything that it spawned ends with it.
    pub async fn stop(self) {
        let Self { client, bus, life } = self;
        drop((client, bus));
        assert!(life.stop(Duration::from_secs(10)).await);
    }
}
