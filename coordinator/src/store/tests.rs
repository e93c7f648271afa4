//! The store's contract, on every database there is.

use std::sync::Arc;

use proto::{BuyerId, Money, OrderId, Reason, RequestId, SaleId, v1::action::Outcome};

use super::{
    Action, Decide, Entry, Filter, Patch, Payment, Postponed, Rejected, Row, SharedStore, Turn, Which, sql::SqlStore,
};

/// A saga as the funnel writes it.
pub(crate) fn new_row(id: OrderId) -> Row {
    Row {
        saga_id: id,
        kind: "order_saga".to_owned(),
        state: "AWAITING_PAYMENT".to_owned(),
        version: 1,
        stuck: false,
        attempts: 0,
        next_attempt_at: None,
        last_error: String::new(),
        order_id: id,
        sale_id: SaleId::parse("sale", "spring").unwrap(),
        buyer: BuyerId::parse("Ålice 'quoted'").unwrap(),
        quantity: 2,
        amount: Money::from_parts("amount", "EUR", 19, 990_000_000).unwrap(),
        hold_id: id,
        grant_epoch: 1,
        expire_at: 60_000,
        reject_reason: Reason::Unspecified,
        payment_id: None,
        payment_method: String::new(),
        payment_request_id: String::new(),
        decline_code: String::new(),
        traceparent: String::new(),
        close_at: None,
        create_at: 1_000,
        update_at: 1_000,
    }
}

fn orders(states: &[&'static str]) -> Which {
    Which { kind: "order_saga", states: states.to_vec() }
}

fn new_id() -> OrderId {
    OrderId::derive(&BuyerId::parse("b").unwrap(), &RequestId::random())
}

fn first(row: &Row) -> Entry {
    Entry {
        version: row.version,
        event: "LOCKED".to_owned(),
        from: "PLACED".to_owned(),
        to: row.state.clone(),
        detail: String::new(),
        at: row.create_at,
    }
}

/// Moves a row from one state to another and writes the patch; anything else is refused.
fn moving(from: &'static str, to: &'static str, patch: impl Fn(usize) -> Patch + Send + Sync + 'static) -> Decide {
    Arc::new(move |index, row| {
        if row.state != from {
            return None;
        }
        let mut next = row.clone();
        patch(index).write(&mut next);
        next.state = to.to_owned();
        next.version += 1;
        let entry = Entry {
            version: next.version,
            event: "MOVED".to_owned(),
            from: from.to_owned(),
            to: to.to_owned(),
            detail: "x".repeat(2_000),
            at: 2_000,
        };
        Some((next, entry))
    })
}

async fn on_each(test: impl AsyncFn(SharedStore, &'static str)) {
    for db in mesh::testing::databases().await {
        migrations::up(migrations::Service::Coordinator, &db.connection).await.unwrap();
        test(Arc::new(SqlStore::new(db.connection.clone())), db.kind).await;
    }
}

async fn insert(store: &SharedStore, rows: &[Row]) {
    store.insert(rows.iter().map(|row| (row.clone(), first(row))).collect()).await.unwrap();
}

async fn load(store: &SharedStore, id: OrderId) -> Row {
    store.load(&[id]).await.unwrap().remove(&id).unwrap()
}

#[tokio::test]
async fn e22_inserting_again_changes_nothing() {
    on_each(async |store, kind| {
        let row = new_row(new_id());
        insert(&store, std::slice::from_ref(&row)).await;
        assert_eq!(load(&store, row.saga_id).await, row, "{kind}");
        store.change(vec![row.saga_id], moving("AWAITING_PAYMENT", "PAYING", |_| Patch::default())).await.unwrap();
        let moved = load(&store, row.saga_id).await;
        let other = new_row(new_id());
        insert(&store, &[row.clone(), other.clone()]).await;
        assert_eq!(load(&store, row.saga_id).await, moved, "{kind}: what is there stays");
        assert_eq!(load(&store, other.saga_id).await, other, "{kind}: what is not is written");
        let log = store.log(row.saga_id).await.unwrap();
        assert_eq!(log.iter().map(|e| e.version).collect::<Vec<_>>(), [1, 2], "{kind}");
        assert_eq!(log[1].detail.len(), 500, "{kind}: clipped, not refused");
    })
    .await;
}

#[tokio::test]
async fn a_batch_changes_each_saga_in_its_own_way() {
    on_each(async |store, kind| {
        let rows: Vec<Row> = (0..1_200).map(|_| new_row(new_id())).collect();
        insert(&store, &rows).await;
        let ids: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
        let patch = |index: usize| Patch {
            payment: Some(Payment {
                payment_id: Some(new_id()),
                method: format!("card {index}"),
                request_id: "r".to_owned(),
            }),
            ..Patch::default()
        };
        let verdicts = store.change(ids.clone(), moving("AWAITING_PAYMENT", "PAYING", patch)).await.unwrap();
        let stored = store.load(&ids).await.unwrap();
        for (index, (id, verdict)) in ids.iter().zip(&verdicts).enumerate() {
            let row = verdict.as_ref().unwrap();
            assert_eq!((row.version, row.payment_method.clone()), (2, format!("card {index}")));
            assert_eq!(stored[id], *row, "{kind}");
        }
        let stranger = new_id();
        let verdicts = store
            .change(vec![ids[0], stranger, ids[1]], moving("AWAITING_PAYMENT", "EXPIRING", |_| Patch::default()))
            .await
            .unwrap();
        assert_eq!(verdicts[1], Err(Rejected { current: None }), "{kind}");
        assert_eq!(verdicts[0], Err(Rejected { current: Some(stored[&ids[0]].clone()) }), "{kind}");
    })
    .await;
}

#[tokio::test]
async fn e23_of_many_rivals_exactly_one_makes_the_transition() {
    on_each(async |store, kind| {
        for _ in 0..10 {
            let row = new_row(new_id());
            insert(&store, std::slice::from_ref(&row)).await;
            let rivals = (0..8).map(|n| {
                let (store, id) = (store.clone(), row.saga_id);
                let to = if n % 2 == 0 { "PAYING" } else { "EXPIRING" };
                tokio::spawn(async move {
                    store.change(vec![id, id], moving("AWAITING_PAYMENT", to, |_| Patch::default())).await.unwrap()
                })
            });
            let mut won = 0;
            for rival in rivals.collect::<Vec<_>>() {
                won += rival.await.unwrap().iter().filter(|v| v.is_ok()).count();
            }
            assert_eq!((won, load(&store, row.saga_id).await.version), (1, 2), "{kind}");
        }
    })
    .await;
}

/// A move that was decided on the row as it was seen.
fn guess(seen: &Row, to: &'static str) -> (Row, Entry) {
    let from = if seen.state == "AWAITING_PAYMENT" { "AWAITING_PAYMENT" } else { "PAYING" };
    moving(from, to, |_| Patch::default())(0, seen).unwrap()
}

#[tokio::test]
async fn what_was_seen_advances_as_a_whole_or_not_at_all() {
    on_each(async |store, kind| {
        let rows: Vec<Row> = (0..600).map(|_| new_row(new_id())).collect();
        insert(&store, &rows).await;
        let ids: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
        let moves: Vec<(Row, Entry)> = rows.iter().map(|row| guess(row, "PAYING")).collect();
        assert!(store.advance(moves.clone()).await.unwrap(), "{kind}");
        let stored = store.load(&ids).await.unwrap();
        assert!(moves.iter().all(|(row, _)| stored[&row.saga_id] == *row), "{kind}");
        assert_eq!(store.log(ids[7]).await.unwrap().len(), 2, "{kind}");

        assert!(!store.advance(moves).await.unwrap(), "{kind}: done before");
        // Seen before somebody else moved it, once and twice.
        let behind = guess(&rows[0], "EXPIRING");
        let ahead = guess(&stored[&ids[1]], "CAPTURED");
        assert!(!store.advance(vec![ahead.clone(), behind.clone()]).await.unwrap(), "{kind}");
        assert!(store.advance(vec![guess(&stored[&ids[0]], "CAPTURED")]).await.unwrap(), "{kind}");
        assert!(!store.advance(vec![behind]).await.unwrap(), "{kind}");
        assert_eq!(load(&store, ids[1]).await, stored[&ids[1]], "{kind}: none of them");
        assert_eq!(store.log(ids[1]).await.unwrap().len(), 2, "{kind}");
        assert_eq!(load(&store, ids[0]).await.state, "CAPTURED", "{kind}");
        // Leased, or reported stuck, since it was seen: no transition.
        let leased = store.claim(orders(&["PAYING"]), 0, 5_000, 1).await.unwrap();
        assert!(leased.is_empty(), "{kind}");
        assert!(store.advance(vec![ahead.clone()]).await.unwrap(), "{kind}");
        assert_eq!(load(&store, ids[1]).await, ahead.0, "{kind}");
    })
    .await;
}

#[tokio::test]
async fn e23_of_rivals_who_read_and_rivals_who_have_seen_exactly_one_makes_the_transition() {
    on_each(async |store, kind| {
        for _ in 0..10 {
            let rows: Vec<Row> = (0..20).map(|_| new_row(new_id())).collect();
            insert(&store, &rows).await;
            let rivals = (0..8).map(|n| {
                let (store, mut rows) = (store.clone(), rows.clone());
                // Whatever the order in which they come.
                rows.rotate_left(n * 2);
                tokio::spawn(async move {
                    if n % 2 == 0 {
                        let moves = rows.iter().map(|row| guess(row, "PAYING")).collect();
                        usize::from(store.advance(moves).await.unwrap()) * rows.len()
                    } else {
                        let ids = rows.iter().map(|row| row.saga_id).collect();
                        let expiring = moving("AWAITING_PAYMENT", "EXPIRING", |_| Patch::default());
                        store.change(ids, expiring).await.unwrap().iter().filter(|verdict| verdict.is_ok()).count()
                    }
                })
            });
            let mut won = 0;
            for rival in rivals.collect::<Vec<_>>() {
                won += rival.await.unwrap();
            }
            assert_eq!(won, rows.len(), "{kind}");
            let ids: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
            let after = store.load(&ids).await.unwrap();
            assert!(after.values().all(|row| row.version == 2 && row.state == after[&ids[0]].state), "{kind}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_claim_leases_what_is_due_to_one_claimant() {
    on_each(async |store, kind| {
        let rows: Vec<Row> = (0..20)
            .map(|n| Row { state: "CAPTURED".to_owned(), next_attempt_at: Some(n * 10), ..new_row(new_id()) })
            .collect();
        let resting = Row { state: "CAPTURED".to_owned(), ..new_row(new_id()) };
        let other = Row { state: "EXPIRING".to_owned(), next_attempt_at: Some(0), ..new_row(new_id()) };
        insert(&store, &[rows.clone(), vec![resting, other]].concat()).await;
        let claims = (0..4).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.claim(orders(&["CAPTURED", "PAYING"]), 95, 5_000, 100).await.unwrap() })
        });
        let mut claimed: Vec<OrderId> = Vec::new();
        for claim in claims.collect::<Vec<_>>() {
            claimed.extend(claim.await.unwrap().iter().map(|row| row.saga_id));
        }
        claimed.sort();
        let mut due: Vec<OrderId> = rows[..10].iter().map(|row| row.saga_id).collect();
        due.sort();
        assert_eq!(claimed, due, "{kind}: each once");
        assert_eq!(load(&store, claimed[0]).await.next_attempt_at, Some(5_000), "{kind}");
        let next = store.claim(orders(&["CAPTURED"]), 1_000, 6_000, 3).await.unwrap();
        let next: Vec<OrderId> = next.iter().map(|row| row.saga_id).collect();
        assert_eq!(next, rows[10..13].iter().map(|row| row.saga_id).collect::<Vec<_>>(), "{kind}: longest due first");
    })
    .await;
}

#[tokio::test]
async fn sagas_of_another_kind_are_not_taken_for_ours_though_a_state_has_the_same_name() {
    on_each(async |store, kind| {
        let ours = Row { next_attempt_at: Some(10), ..new_row(new_id()) };
        let theirs = Row { kind: "refund_saga".to_owned(), ..Row { saga_id: new_id(), ..ours.clone() } };
        insert(&store, &[ours.clone(), theirs.clone()]).await;
        let waiting = orders(&["AWAITING_PAYMENT"]);
        assert_eq!(store.overdue(waiting.clone(), 100_000, 10).await.unwrap(), [ours.saga_id], "{kind}");
        let claimed = store.claim(waiting, 95, 5_000, 10).await.unwrap();
        assert_eq!(claimed, [Row { next_attempt_at: Some(5_000), ..ours }], "{kind}");
        assert_eq!(load(&store, theirs.saga_id).await, theirs, "{kind}: nor leased");
    })
    .await;
}

#[tokio::test]
async fn a_postponement_counts_only_where_it_is_still_its_makers_turn() {
    on_each(async |store, kind| {
        let row = new_row(new_id());
        insert(&store, std::slice::from_ref(&row)).await;
        let later = |turn| Postponed {
            saga_id: row.saga_id,
            turn,
            attempts: 7,
            next_attempt_at: Some(9_000),
            stuck: true,
            last_error: "ü".repeat(3_000),
        };
        let others = [
            Turn { version: 2, ..row.turn() },
            Turn { attempts: row.attempts + 1, ..row.turn() },
            Turn { next_attempt_at: Some(8_000), ..row.turn() },
            Turn { next_attempt_at: None, ..row.turn() },
        ];
        for another in others.into_iter().filter(|turn| *turn != row.turn()) {
            store.postpone(vec![later(another)]).await.unwrap();
            assert_eq!(load(&store, row.saga_id).await, row, "{kind}: {another:?}");
        }
        store.postpone(vec![later(row.turn())]).await.unwrap();
        let after = load(&store, row.saga_id).await;
        assert_eq!((after.attempts, after.next_attempt_at, after.stuck, after.version), (7, Some(9_000), true, 1));
        assert_eq!(after.last_error.chars().count(), 500, "{kind}");
        assert_eq!(store.count_stuck().await.unwrap(), 1, "{kind}");
        let listed = store.list(&Filter::Stuck, "", 10).await.unwrap();
        let listed_turn = after.turn();
        assert_eq!(listed, [after], "{kind}");
        assert!(store.retry(row.saga_id, 4_000).await.unwrap(), "{kind}");
        assert!(!store.retry(row.saga_id, 4_000).await.unwrap(), "{kind}");
        let after = load(&store, row.saga_id).await;
        assert_eq!((after.attempts, after.next_attempt_at, after.stuck), (0, Some(4_000), false), "{kind}");
        // The attempt that was under way when the operator came does not undo it.
        store.postpone(vec![later(listed_turn)]).await.unwrap();
        assert_eq!(load(&store, row.saga_id).await, after, "{kind}");
        // Resting sagas have no time.
        let resting = Postponed { next_attempt_at: None, stuck: false, ..later(after.turn()) };
        store.postpone(vec![resting]).await.unwrap();
        let rested = load(&store, row.saga_id).await;
        assert_eq!((rested.attempts, rested.next_attempt_at), (7, None), "{kind}");
        store.postpone(vec![later(rested.turn())]).await.unwrap();
        assert_eq!(load(&store, row.saga_id).await.next_attempt_at, Some(9_000), "{kind}");
    })
    .await;
}

#[tokio::test]
async fn deadlines_and_lists_come_in_order_and_in_pages() {
    on_each(async |store, kind| {
        let rows: Vec<Row> = (0..6).map(|n| Row { expire_at: 1_000 - n * 100, ..new_row(new_id()) }).collect();
        let paid = Row { state: "PAID".to_owned(), expire_at: 0, ..new_row(new_id()) };
        insert(&store, &[rows.clone(), vec![paid]].concat()).await;
        let overdue = store.overdue(orders(&["AWAITING_PAYMENT"]), 800, 2).await.unwrap();
        assert_eq!(overdue, [rows[5].saga_id, rows[4].saga_id], "{kind}");
        assert_eq!(store.overdue(orders(&["AWAITING_PAYMENT"]), 800, 10).await.unwrap().len(), 3, "{kind}");
        let filter = Filter::State("AWAITING_PAYMENT".to_owned());
        let mut seen = Vec::new();
        let mut after = String::new();
        loop {
            let page = store.list(&filter, &after, 4).await.unwrap();
            let Some(last) = page.last() else { break };
            after = last.saga_id.to_string();
            seen.extend(page.iter().map(|row| row.saga_id));
        }
        let mut ids: Vec<OrderId> = rows.iter().map(|row| row.saga_id).collect();
        ids.sort();
        assert_eq!(seen, ids, "{kind}");
    })
    .await;
}

#[tokio::test]
async fn an_action_is_kept_as_it_began_and_ends_once() {
    on_each(async |store, kind| {
        let begun = |number: i64, target: &str| Action {
            id: format!("{number:028x}"),
            operator: "Ölga".to_owned(),
            verb: "PauseSale".to_owned(),
            target: target.to_owned(),
            detail: String::new(),
            reason: "it's \"odd\"".to_owned(),
            outcome: Outcome::Begun,
            error: String::new(),
            at: number,
        };
        let first = begun(1, "sales/spring");
        let done = Action { outcome: Outcome::Done, ..first.clone() };
        let late = Action { outcome: Outcome::Refused, reason: "another".to_owned(), ..first.clone() };
        for action in [&first, &first, &done, &first, &late] {
            store.record_action(action.clone()).await.unwrap();
        }
        let (second, third) = (begun(2, "sales/summer"), begun(3, "sales/spring"));
        for action in [&third, &second] {
            store.record_action(action.clone()).await.unwrap();
        }
        let all = store.actions(None, "", 10).await.unwrap();
        assert_eq!(all, [third.clone(), second.clone(), done.clone()], "{kind}: newest first");
        assert_eq!(store.actions(Some(&third.id), "", 1).await.unwrap(), [second], "{kind}: a page");
        assert_eq!(store.actions(None, "sales/spring", 10).await.unwrap(), [third, done], "{kind}: of one target");
    })
    .await;
}
