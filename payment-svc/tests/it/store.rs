//! The store's contract: every test on every database.

use std::{collections::HashSet, sync::Arc};

use mesh::testing::{self, TestDatabase};
use payment_svc::{
    domain::{Answer, Command, Event, NewCharge, PaymentId, State, Step, Times},
    store::{Request, Store, sql::SqlStore},
};
use proto::{BuyerId, Money, OrderId, Reason, error::Result, internal::PaymentSettled};

use crate::role::order;

const TIMES: Times = Times { now_ms: 1_700_000_000_000, call_ms: 1_500 };

async fn migrated() -> Vec<TestDatabase> {
    let databases = testing::databases().await;
    for database in &databases {
        migrations::up(migrations::Service::Payment, &database.connection).await.unwrap();
    }
    databases
}

fn id(text: &str) -> PaymentId {
    text.parse().unwrap()
}

fn begin(payment_id: &str) -> Command {
    Command::Begin(NewCharge {
        payment_id: id(payment_id),
        buyer: BuyerId::parse("żółć 🛒").unwrap(),
        amount: Money::from_parts("amount", "EUR", 9_000_000_000_000, 999_999_999).unwrap(),
        method: "sim_approve".into(),
    })
}

fn captured(payment_id: &str) -> Command {
    Command::Settle(id(payment_id), Event::Captured { reference: Some("r".into()) })
}

async fn run(store: &dyn Store, commands: Vec<(OrderId, Command)>) -> Vec<Result<Answer>> {
    let traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
    let requests = commands
        .into_iter()
        .map(|(order_id, command)| Request { order_id, command, traceparent: traceparent.clone() })
        .collect();
    store.run(requests, TIMES).await.unwrap()
}

async fn run_one(store: &dyn Store, order: OrderId, command: Command) -> Result<Answer> {
    run(store, vec![(order, command)]).await.remove(0)
}

#[tokio::test]
async fn e32_a_charge_is_read_back_as_it_was_written() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let order = order();
        let begun = run_one(&store, order, begin("p")).await.unwrap().charge.unwrap();
        let read = store.read(vec![id("p"), id("P"), id("p")]).await.unwrap();
        assert!(read[1].is_none(), "ids are case-sensitive: {}", database.kind);
        for index in [0, 2] {
            let open = read[index].clone().unwrap();
            assert_eq!((open.charge, open.step), (begun.clone(), Step::Ask), "{}", database.kind);
        }
        let settled = run_one(&store, order, captured("p")).await.unwrap().charge.unwrap();
        assert_eq!((settled.version, settled.ask_at_ms), (2, None), "{}", database.kind);
        let read = store.read(vec![id("p")]).await.unwrap().remove(0).unwrap();
        assert_eq!((read.charge, read.step), (settled, Step::Rest), "{}", database.kind);
    }
}

#[tokio::test]
async fn e28_of_many_clicks_at_once_one_begins() {
    for database in migrated().await {
        let order = order();
        let store: Arc<dyn Store> = Arc::new(SqlStore::new(database.connection.clone()));
        let clicks: Vec<_> = (0..16)
            .map(|i| {
                let store = store.clone();
                // Eight different clicks, each sent twice.
                tokio::spawn(async move { run_one(store.as_ref(), order, begin(&format!("p{}", i % 8))).await })
            })
            .collect();
        let (mut begun, mut refused) = (HashSet::new(), 0);
        let mut calls = 0;
        for click in clicks {
            match click.await.unwrap() {
                Ok(answer) => {
                    begun.insert(answer.charge.unwrap().payment_id);
                    calls += answer.todo.len();
                }
                Err(error) => {
                    assert_eq!(error.reason, Reason::IllegalState, "{}", database.kind);
                    refused += 1;
                }
            }
        }
        assert_eq!((begun.len(), calls, refused), (1, 1, 14), "{}", database.kind);
    }
}

#[tokio::test]
async fn a_void_and_a_charge_at_once_never_both_pass() {
    for database in migrated().await {
        let store: Arc<dyn Store> = Arc::new(SqlStore::new(database.connection.clone()));
        for round in 0..10 {
            let order = order();
            let charge = tokio::spawn({
                let store = store.clone();
                async move { run_one(store.as_ref(), order, begin(&format!("p{round}"))).await }
            });
            let void = run_one(store.as_ref(), order, Command::Void).await.unwrap();
            match charge.await.unwrap() {
                // The charge was first: the void has seen it, or a later look does.
                Ok(_) => {
                    assert_eq!((void.state, void.todo.len()), (State::Pending, 1), "{}", database.kind);
                }
                Err(error) => {
                    assert_eq!(error.reason, Reason::IllegalState, "{}", database.kind);
                    assert_eq!((void.state, void.charge), (State::Cancelled, None), "{}", database.kind);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_payment_id_belongs_to_one_order() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let (first, second, third) = (order(), order(), order());
        let answers = run(&store, vec![(first, begin("p")), (second, begin("p")), (second, begin("q"))]).await;
        assert!(answers[0].is_ok() && answers[2].is_ok(), "{}: {answers:?}", database.kind);
        assert_eq!(answers[1].as_ref().unwrap_err().reason, Reason::RequestIdReused, "{}", database.kind);
        let later = run_one(&store, third, begin("q")).await.unwrap_err();
        assert_eq!(later.reason, Reason::RequestIdReused, "{}", database.kind);
    }
}

#[tokio::test]
async fn e25_an_outcome_is_announced_once_and_with_its_trace() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let orders: Vec<_> = (0..40).map(|i| (order(), format!("p{i}"))).collect();
        run(&store, orders.iter().map(|(o, p)| (*o, begin(p))).collect()).await;
        for _ in 0..2 {
            run(&store, orders.iter().map(|(o, p)| (*o, captured(p))).collect()).await;
        }
        let announcements = store.announcements(1_000).await.unwrap();
        assert_eq!(announcements.len(), 40, "{}", database.kind);
        let first = &announcements[0];
        assert!(first.message_id.ends_with("-CAPTURED") && first.traceparent.is_some(), "{}", database.kind);
        let settled: PaymentSettled = prost::Message::decode(first.payload.clone()).unwrap();
        assert_eq!(settled.status.unwrap().amount.unwrap().nanos, 999_999_999, "{}", database.kind);
        assert_eq!(store.announcements(3).await.unwrap(), announcements[..3], "oldest first: {}", database.kind);
        store.forget(announcements[..39].iter().map(|a| a.seq).collect()).await.unwrap();
        assert_eq!(store.announcements(1_000).await.unwrap(), announcements[39..], "{}", database.kind);
    }
}

#[tokio::test]
async fn e31_what_is_open_is_taken_when_due_and_by_one_at_a_time() {
    for database in migrated().await {
        let store = SqlStore::new(database.connection.clone());
        let orders: Vec<_> = (0..4).map(|i| (order(), format!("p{i}"))).collect();
        run(&store, orders.iter().map(|(o, p)| (*o, begin(p))).collect()).await;
        run_one(&store, orders[0].0, captured("p0")).await.unwrap();
        run_one(&store, orders[1].0, Command::Void).await.unwrap();
        run_one(&store, orders[2].0, captured("p2")).await.unwrap();
        run_one(&store, orders[2].0, Command::Refund).await.unwrap();

        let due = TIMES.now_ms + TIMES.call_ms;
        assert!(store.take_due(due - 1, due, 10).await.unwrap().is_empty(), "whoever began it has its time");
        let taken = store.take_due(due, due + 100, 10).await.unwrap();
        let steps: HashSet<_> =
            taken.iter().map(|open| (open.charge.payment_id.as_str(), format!("{:?}", open.step))).collect();
        let expected = [("p1", "Cancel"), ("p2", "Refund"), ("p3", "Ask")];
        assert_eq!(steps, expected.map(|(p, s)| (p, s.to_owned())).into(), "{}", database.kind);
        assert!(store.take_due(due + 99, due + 200, 10).await.unwrap().is_empty(), "leased: {}", database.kind);
        assert_eq!(store.take_due(due + 100, due + 200, 2).await.unwrap().len(), 2, "{}", database.kind);
        run_one(&store, orders[3].0, Command::Unsettled(id("p3"))).await.unwrap();
        let asked = store.read(vec![id("p3")]).await.unwrap().remove(0).unwrap().charge;
        assert_eq!((asked.asked, asked.ask_at_ms), (1, Some(TIMES.now_ms + 250)), "{}", database.kind);
    }
}

#[tokio::test]
async fn batches_that_cross_each_other_all_arrive() {
    for database in migrated().await {
        let store: Arc<dyn Store> = Arc::new(SqlStore::new(database.connection.clone()));
        let orders: Arc<Vec<_>> = Arc::new((0..300).map(|i| (order(), format!("p{i}"))).collect());
        for command in [begin as fn(&str) -> Command, captured] {
            let tasks: Vec<_> = (0..4)
                .map(|turn| {
                    let (store, mut mine) = (store.clone(), orders.to_vec());
                    mine.rotate_left(turn * 75);
                    tokio::spawn(async move {
                        run(store.as_ref(), mine.iter().map(|(o, p)| (*o, command(p))).collect()).await
                    })
                })
                .collect();
            for task in tasks {
                assert!(task.await.unwrap().iter().all(Result::is_ok), "{}", database.kind);
            }
        }
        let announcements = store.announcements(1_000).await.unwrap();
        assert_eq!(announcements.len(), 300, "each once: {}", database.kind);
    }
}
