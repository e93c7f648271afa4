//! order-svc from outside: its store's contract on every database, and the role as a caller meets it.

use std::{collections::HashSet, sync::Arc, time::Duration};

use mesh::{
    bus::{Bus, sqlite::SqliteBus},
    clock::Clock,
    layers::{ClientConfig, ServerConfig},
    lifecycle::Lifecycle,
    link::Link,
    testing::{self, TestDatabase},
};
use order_svc::{
    Backends, Config,
    domain::{Record, Transition},
    store::{Page, Position, Store, sql::SqlStore},
};
use proto::{
    BuyerId, Error, Money, OrderId, Reason, RequestId, SaleId,
    internal::{
        Amount, CreateOrdersRequest, GetOrdersRequest, ItemResult, ListBuyerOrdersRequest, OrderRecord, OrdersChanged,
        TransitionOrder, TransitionOrdersRequest, get_order_result, item_result,
        order_records_client::OrderRecordsClient,
    },
    subjects,
    v1::{Order, OrderState},
};

async fn migrated() -> Vec<TestDatabase> {
    let databases = testing::databases().await;
    for database in &databases {
        migrations::up(migrations::Service::Order, &database.connection).await.unwrap();
    }
    databases
}

// The store's contract: every test on every database.

fn record(buyer: &str, create_at_ms: i64) -> Record {
    let buyer = BuyerId::parse(buyer).unwrap();
    Record {
        order_id: OrderId::derive(&buyer, &RequestId::random()),
        buyer,
        sale_id: SaleId::parse("sale", "spring").unwrap(),
        quantity: 2,
        amount: Money::from_parts("amount", "EUR", 39, 980_000_001).unwrap(),
        state: OrderState::AwaitingPayment,
        reject_reason: None,
        create_at_ms,
        expire_at_ms: create_at_ms + 900_000,
        pay_at_ms: None,
        close_at_ms: None,
        version: 1,
        saga_version: 0,
    }
}

fn to(record: &Record, to: OrderState, saga_version: i64) -> Transition {
    Transition { order_id: record.order_id, to, at_ms: record.create_at_ms + saga_version, saga_version }
}

async fn read(store: &dyn Store, record: &Record) -> Option<Record> {
    store.get(vec![record.order_id]).await.unwrap().remove(&record.order_id)
}

#[tokio::test]
async fn e32_what_was_written_is_read_back_to_the_nano() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let open = record("alice", 1_000);
        let rejected = Record {
            state: OrderState::Rejected,
            reject_reason: Some(Reason::SoldOut),
            close_at_ms: Some(1_001),
            ..record("żółć 🛒", 1_000)
        };
        let written = store.create(vec![open.clone(), rejected.clone()]).await.unwrap();
        assert_eq!(written.len(), 2, "{}", database.kind);
        assert_eq!(read(&store, &open).await, Some(open), "{}", database.kind);
        assert_eq!(read(&store, &rejected).await, Some(rejected), "{}", database.kind);
        assert_eq!(read(&store, &record("nobody", 1)).await, None, "{}", database.kind);
    }
}

#[tokio::test]
async fn e6_a_closed_order_that_is_created_again_stays_closed() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let order = record("alice", 1_000);
        store.create(vec![order.clone()]).await.unwrap();
        store.transition(vec![to(&order, OrderState::Expired, 1)]).await.unwrap();
        let fresh = record("bob", 1_000);
        let created = store.create(vec![order.clone(), fresh.clone(), fresh.clone()]).await.unwrap();
        assert_eq!(created, [fresh], "only what was missing is new, and once: {}", database.kind);
        assert_eq!(read(&store, &order).await.unwrap().state, OrderState::Expired, "{}", database.kind);
    }
}

#[tokio::test]
async fn e3_closing_an_order_twice_changes_it_once() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let order = record("alice", 1_000);
        store.create(vec![order.clone()]).await.unwrap();
        let expire = to(&order, OrderState::Expired, 1);
        let first = store.transition(vec![expire, expire]).await.unwrap();
        assert_eq!((first.results, first.moved.len()), (vec![Ok(()), Ok(())], 1), "{}", database.kind);
        let again = store.transition(vec![expire]).await.unwrap();
        assert_eq!((again.results, again.moved.len()), (vec![Ok(())], 0), "{}", database.kind);
        let closed = read(&store, &order).await.unwrap();
        assert_eq!((closed.version, closed.close_at_ms), (2, Some(1_001)), "{}", database.kind);
    }
}

#[tokio::test]
async fn e22_replaying_everything_changes_nothing() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let orders: Vec<_> = (0..6).map(|i| record("alice", 1_000 + i)).collect();
        use OrderState::{AwaitingPayment, Cancelled, Expired, Paid, Paying, Refunded};
        let lives: [&[OrderState]; 6] = [
            &[Paying, Paid],
            &[Paying, AwaitingPayment, Paying, Paid],
            &[Expired],
            &[Cancelled, Paid],
            &[Paying, Expired, Refunded],
            &[],
        ];
        let mut history = Vec::new();
        for (order, life) in orders.iter().zip(lives) {
            history.extend((1..).zip(life).map(|(version, state)| to(order, *state, version)));
        }
        store.create(orders.clone()).await.unwrap();
        let moved = store.transition(history.clone()).await.unwrap();
        assert!(moved.results.iter().all(Result::is_ok), "{}: {moved:?}", database.kind);
        let ids: Vec<_> = orders.iter().map(|o| o.order_id).collect();
        let end = store.get(ids.clone()).await.unwrap();

        assert!(store.create(orders.clone()).await.unwrap().is_empty(), "{}", database.kind);
        for replay in [history.clone(), history.iter().rev().copied().collect()] {
            let replayed = store.transition(replay).await.unwrap();
            assert!(replayed.results.iter().all(Result::is_ok), "{}: {replayed:?}", database.kind);
            assert!(replayed.moved.is_empty(), "{}", database.kind);
        }
        assert_eq!(store.get(ids).await.unwrap(), end, "{}", database.kind);
    }
}

#[tokio::test]
async fn a_refused_transition_hurts_no_neighbour() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let (good, paid, absent) = (record("a", 1), record("b", 2), record("c", 3));
        store.create(vec![good.clone(), paid.clone()]).await.unwrap();
        store.transition(vec![to(&paid, OrderState::Paid, 2)]).await.unwrap();
        let mixed = store
            .transition(vec![
                to(&paid, OrderState::Expired, 3),
                to(&absent, OrderState::Paid, 1),
                to(&good, OrderState::Paying, 1),
            ])
            .await
            .unwrap();
        let reasons: Vec<_> = mixed.results.iter().map(|r| r.as_ref().err().map(|e| e.reason)).collect();
        assert_eq!(reasons, [Some(Reason::IllegalState), Some(Reason::NotFound), None], "{}", database.kind);
        assert_eq!(mixed.moved.len(), 1, "{}", database.kind);
        assert_eq!(read(&store, &paid).await.unwrap().state, OrderState::Paid, "{}", database.kind);
    }
}

#[tokio::test]
async fn e10_batches_that_cross_each_other_all_arrive() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        // More than one statement's rows, written by four at once in different orders.
        let orders: Arc<Vec<_>> = Arc::new((0..1_200).map(|i| record("alice", i)).collect());
        let created = futures_all((0..4).map(|i| {
            let (store, mut mine) = (store.clone(), orders.to_vec());
            mine.rotate_left(i * 300);
            async move { store.create(mine).await.unwrap().len() }
        }))
        .await;
        assert!(created.iter().sum::<usize>() >= 1_200, "{}", database.kind);
        let moved = futures_all((0..4).map(|i| {
            let (store, mut mine) = (store.clone(), orders.to_vec());
            mine.rotate_left(i * 300);
            let moves = mine.iter().map(|o| to(o, OrderState::Paying, 1)).collect();
            async move { store.transition(moves).await.unwrap().moved.len() }
        }))
        .await;
        assert_eq!(moved.iter().sum::<usize>(), 1_200, "each moves once: {}", database.kind);
        let end = store.get(orders.iter().map(|o| o.order_id).collect()).await.unwrap();
        assert!(end.len() == 1_200 && end.values().all(|r| r.version == 2), "{}", database.kind);
    }
}

async fn futures_all<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = futures.map(tokio::spawn).collect();
    let mut all = Vec::new();
    for task in tasks {
        all.push(task.await.unwrap());
    }
    all
}

#[tokio::test]
async fn e39_a_list_holds_its_buyers_orders_only_newest_first() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        // Buyers who differ in case, accent or trailing space only are different buyers; some share a millisecond.
        let buyers = ["alice", "Alice", "àlice", "alice "];
        for buyer in buyers {
            store.create((0..7).map(|i| record(buyer, 1_000 + i / 2)).collect()).await.unwrap();
        }
        for buyer in buyers {
            let buyer = BuyerId::parse(buyer).unwrap();
            let (mut seen, mut after) = (Vec::new(), None);
            loop {
                let page = Page { buyer: buyer.clone(), sale_id: None, after, limit: 2 };
                let records = store.list(page).await.unwrap();
                let Some(last) = records.last() else { break };
                after = Some(Position { create_at_ms: last.create_at_ms, order_id: last.order_id });
                seen.extend(records);
            }
            assert_eq!(seen.len(), 7, "{buyer} on {}", database.kind);
            assert!(seen.iter().all(|r| r.buyer == buyer), "{buyer} on {}", database.kind);
            assert!(seen.windows(2).all(|w| w[0].create_at_ms >= w[1].create_at_ms), "{}", database.kind);
            assert_eq!(seen.iter().map(|r| r.order_id).collect::<HashSet<_>>().len(), 7, "{}", database.kind);
        }
        let other = Some(SaleId::parse("sale", "autumn").unwrap());
        let page = Page { buyer: BuyerId::parse("alice").unwrap(), sale_id: other, after: None, limit: 2 };
        assert!(store.list(page).await.unwrap().is_empty(), "{}", database.kind);
    }
}

// The role as a caller meets it, through a link.

struct Role {
    client: OrderRecordsClient<Link>,
    bus: Arc<SqliteBus>,
    _database: TestDatabase,
    life: Lifecycle,
}

async fn role() -> Role {
    let database = testing::sqlite().await;
    migrations::up(migrations::Service::Order, &database.connection).await.unwrap();
    let life = Lifecycle::new();
    let clock = Clock::system();
    let bus = Arc::new(SqliteBus::in_memory(clock.clone(), life.tasks()).await.unwrap());
    let store = Arc::new(SqlStore::new(database.connection.clone()));
    let backends = Backends { store, bus: bus.clone(), clock };
    let routes = order_svc::start(Config::default(), backends, &life).await.unwrap();
    let server = mesh::layers::server(routes, ServerConfig::default());
    let client = OrderRecordsClient::new(Link::local(server, ClientConfig::default()));
    Role { client, bus, _database: database, life }
}

fn item(buyer: &str, create_at_ms: i64) -> OrderRecord {
    let record = record(buyer, create_at_ms);
    OrderRecord {
        order_id: record.order_id.to_string(),
        sale_id: record.sale_id.to_string(),
        buyer: record.buyer.to_string(),
        quantity: record.quantity,
        amount: Some((&record.amount).into()),
        state: OrderState::AwaitingPayment.into(),
        reject_reason: Reason::Unspecified.into(),
        create_at_ms,
        expire_at_ms: record.expire_at_ms,
    }
}

fn reason(result: &ItemResult) -> Option<Reason> {
    match result.result.as_ref().expect("a result") {
        item_result::Result::Done(()) => None,
        item_result::Result::Refused(refusal) => Some(refusal.reason()),
    }
}

impl Role {
    /// Everything that it spawned ends with it.
    async fn stop(self) {
        let Self { client, bus, _database, life } = self;
        drop((client, bus));
        assert!(life.stop(Duration::from_secs(10)).await);
    }

    async fn create(&self, items: Vec<OrderRecord>) -> Vec<Option<Reason>> {
        let created = self.client.clone().create_orders(CreateOrdersRequest { items }).await.unwrap();
        created.into_inner().results.iter().map(reason).collect()
    }

    async fn transition(&self, items: Vec<TransitionOrder>) -> Vec<Option<Reason>> {
        let moved = self.client.clone().transition_orders(TransitionOrdersRequest { items }).await.unwrap();
        moved.into_inner().results.iter().map(reason).collect()
    }

    async fn get(&self, order_ids: &[&str]) -> Vec<Option<Order>> {
        let order_ids = order_ids.iter().map(ToString::to_string).collect();
        let got = self.client.clone().get_orders(GetOrdersRequest { order_ids }).await.unwrap();
        let results = got.into_inner().results.into_iter();
        results
            .map(|r| match r.result.expect("a result") {
                get_order_result::Result::Order(order) => Some(order),
                get_order_result::Result::Absent(()) => None,
            })
            .collect()
    }
}

#[tokio::test]
async fn an_order_goes_from_created_to_paid_and_is_read_as_clients_see_it() {
    let role = role().await;
    let order = item("alice", 1_700_000_000_123);
    assert_eq!(role.create(vec![order.clone()]).await, [None]);
    let move_to = |to: OrderState, saga_version| TransitionOrder {
        order_id: order.order_id.clone(),
        to: to.into(),
        at_ms: 1_700_000_001_456,
        saga_version,
    };
    assert_eq!(role.transition(vec![move_to(OrderState::Paying, 1)]).await, [None]);
    assert_eq!(role.transition(vec![move_to(OrderState::Paid, 2)]).await, [None]);
    let got = role.get(&[&order.order_id, "0123456789abcdef0123456789abcdef", "nonsense"]).await;
    assert_eq!(got[1..], [None, None]);
    let got = got[0].clone().expect("the order");
    assert_eq!(got.name, format!("orders/{}", order.order_id));
    assert_eq!((got.sale.as_str(), got.state(), got.etag.as_str()), ("sales/spring", OrderState::Paid, "3"));
    let money = got.amount.unwrap();
    assert_eq!((money.currency_code.as_str(), money.units, money.nanos), ("EUR", 39, 980_000_001), "E32");
    assert_eq!(got.create_time.unwrap().to_string(), "2023-11-14T22:13:20.123Z");
    assert_eq!(got.pay_time.unwrap().to_string(), "2023-11-14T22:13:21.456Z");
    assert_eq!(got.close_time, None);
    role.stop().await;
}

#[tokio::test]
async fn bad_items_name_their_field_and_change_nothing() {
    let role = role().await;
    let good = item("alice", 1_000);
    type Spoil = fn(&mut OrderRecord);
    let bad: [(&str, Spoil); 8] = [
        ("state", |i| i.state = OrderState::Paid.into()),
        ("quantity", |i| i.quantity = 0),
        ("amount", |i| i.amount = None),
        ("amount.nanos", |i| i.amount = Some(Amount { currency: "EUR".into(), units: 1, nanos: -1 })),
        ("buyer", |i| i.buyer = String::new()),
        ("sale_id", |i| i.sale_id = "No Sale".into()),
        ("reject_reason", |i| i.state = OrderState::Rejected.into()),
        ("expire_at_ms", |i| i.expire_at_ms = i.create_at_ms - 1),
    ];
    let mut items = vec![good.clone()];
    for (_, spoil) in &bad {
        let mut item = item("mallory", 1_000);
        spoil(&mut item);
        items.push(item);
    }
    items.push(item("bob", 1_000));
    let results = role.client.clone().create_orders(CreateOrdersRequest { items: items.clone() }).await.unwrap();
    let results = results.into_inner().results;
    assert_eq!((reason(&results[0]), reason(&results[9])), (None, None));
    for ((field, _), result) in bad.iter().zip(&results[1..9]) {
        let Some(item_result::Result::Refused(refusal)) = &result.result else { panic!("{field} was let in") };
        assert_eq!(refusal.reason(), Reason::InvalidField);
        assert!(refusal.message.starts_with(&format!("{field}:")), "{field}: {}", refusal.message);
    }
    let ids: Vec<_> = items[1..9].iter().map(|i| i.order_id.as_str()).collect();
    assert!(role.get(&ids).await.iter().all(Option::is_none));

    let placed = TransitionOrder { order_id: good.order_id, to: 1, at_ms: 1, saga_version: 1 };
    let unknown = TransitionOrder { to: 77, ..placed.clone() };
    assert_eq!(role.transition(vec![placed, unknown]).await, [Some(Reason::InvalidField); 2]);
    role.stop().await;
}

#[tokio::test]
async fn pages_follow_their_tokens_and_bad_ones_are_refused() {
    let role = role().await;
    role.create((0..120).map(|i| item("alice", 1_000 + i)).collect()).await;
    role.create(vec![item("bob", 5_000)]).await;
    let list = |page_size, page_token: &str| {
        let request = ListBuyerOrdersRequest {
            buyer: "alice".into(),
            page_size,
            page_token: page_token.into(),
            sale_id: String::new(),
        };
        let mut client = role.client.clone();
        async move { client.list_orders(request).await.map(tonic::Response::into_inner).map_err(Error::from) }
    };
    let first = list(0, "").await.unwrap();
    assert_eq!(first.orders.len(), 50, "the default");
    let second = list(1_000, &first.next_page_token).await.unwrap();
    assert_eq!(second.orders.len(), 70, "the rest: at most 100");
    assert_eq!(second.next_page_token, "", "the end");
    let names: HashSet<_> = first.orders.iter().chain(&second.orders).map(|o| o.name.clone()).collect();
    assert_eq!(names.len(), 120);
    assert!(first.orders.iter().chain(&second.orders).all(|o| o.buyer == "alice"), "E39");

    assert_eq!(list(-1, "").await.unwrap_err().field.as_deref(), Some("page_size"));
    for bad in ["x", "0", &"f".repeat(48), &first.next_page_token[1..], &format!("{}ä", &first.next_page_token[2..])] {
        assert_eq!(list(0, bad).await.unwrap_err().field.as_deref(), Some("page_token"), "{bad}");
    }
    role.stop().await;
}

#[tokio::test]
async fn every_change_is_signalled_after_it_happened() {
    let role = role().await;
    let mut signals = role.bus.listen(subjects::ORDERS_CHANGED).await.unwrap();
    let orders: Vec<_> = (0..600).map(|i| item("alice", 1_000 + i)).collect();
    role.create(orders.clone()).await;
    let mut seen = Vec::new();
    while seen.len() < orders.len() {
        let payload = tokio::time::timeout(Duration::from_secs(10), signals.recv()).await.expect("a signal").unwrap();
        let changed: OrdersChanged = prost::Message::decode(payload).unwrap();
        assert!(changed.orders.len() <= 256, "{}", changed.orders.len());
        seen.extend(changed.orders);
    }
    assert_eq!(seen[0].state(), OrderState::AwaitingPayment);

    let paying = TransitionOrder {
        order_id: orders[0].order_id.clone(),
        to: OrderState::Paying.into(),
        at_ms: 2_000,
        saga_version: 1,
    };
    // Written again, moved, moved again: one change, one signal.
    role.create(orders.clone()).await;
    role.transition(vec![paying.clone()]).await;
    role.transition(vec![paying]).await;
    let payload = tokio::time::timeout(Duration::from_secs(10), signals.recv()).await.expect("a signal").unwrap();
    let changed: OrdersChanged = prost::Message::decode(payload).unwrap();
    assert_eq!(changed.orders.len(), 1);
    assert_eq!((changed.orders[0].state(), changed.orders[0].etag.as_str()), (OrderState::Paying, "2"));
    assert!(signals.try_recv().is_err());
    role.stop().await;
}
