//! Purchases: permits, locks, releases and deductions, on every database.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use mesh::{clock::Clock, testing::eventually};
use prost::Message as _;
use proto::{
    OrderId, Reason, RequestId, SaleId,
    filter::Filter,
    internal::{Grant, LockItem, LookupGrantsRequest, LookupResult, SaleChanged, lookup_result},
    subjects, v1,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use stock_svc::{
    Config,
    domain::permits::{Opening, Phase},
    store::Store,
};

use crate::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e1_a_rush_of_buyers_ends_in_exactly_as_many_holds_as_units() {
    // Patient: on a busy machine a grant may well wait a moment for its lock.
    for world in worlds_with(Config::default(), Clock::system()).await {
        let sale = world.sale(100, 1).await;
        let buyers: Vec<_> = (0..10_000).map(|i| wanted(&sale, &format!("buyer-{i}"), 1)).collect();
        let attempts = buyers.chunks(50).map(|buyers| {
            let (client, buyers) = (world.client.clone(), buyers.to_vec());
            tokio::spawn(async move {
                let mut items = Vec::new();
                for (wanted, got) in buyers.iter().zip(acquire_all(&client, &buyers).await) {
                    match got {
                        Got::Granted(grant) => items.push(lock_item(wanted, &grant)),
                        Got::Refused(Reason::AllHeld) => {}
                        other => panic!("{other:?}"),
                    }
                }
                if items.is_empty() { Vec::new() } else { lock_all(&client, items).await }
            })
        });
        let locked: Vec<_> = join_all(attempts).await.into_iter().flat_map(|attempt| attempt.unwrap()).collect();
        assert_eq!(locked, [LockedAs::Locked; 100], "{}", world.name);
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.sold, report.total), (0, 100, 0, 100), "{}", world.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_one_request_fifty_times_in_parallel_is_one_order_and_one_unit() {
    for world in worlds().await {
        let sale = world.sale(1, 1).await;
        let wanted = wanted(&sale, "alice", 1);
        let attempts = (0..50).map(|_| {
            let (client, wanted) = (world.client.clone(), wanted.clone());
            tokio::spawn(async move {
                let grant = granted(&client, &wanted).await;
                assert_eq!(lock(&client, &wanted, &grant).await, LockedAs::Locked);
                grant
            })
        });
        let grants: Vec<_> = join_all(attempts).await.into_iter().map(|grant| grant.unwrap()).collect();
        assert_eq!(grants.iter().filter(|grant| grant.fresh).count(), 1, "{}", world.name);
        assert!(grants.iter().all(|grant| grant.granted_at_ms == grants[0].granted_at_ms), "{}", world.name);
        assert_eq!(world.at_rest(&sale).await.held, 1, "{}", world.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e3_e6_e36_a_release_repeated_returns_one_unit_and_the_buyer_can_buy_again() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let wanted_first = wanted(&sale, "alice", 1);
        hold(&world.client, &wanted_first).await;
        let releases = (0..20).map(|_| {
            let (client, wanted) = (world.client.clone(), wanted_first.clone());
            tokio::spawn(async move { release_all(&client, vec![release_item(&wanted), release_item(&wanted)]).await })
        });
        for results in join_all(releases).await {
            assert_eq!(results.unwrap(), [Ok(()), Ok(())], "{}", world.name);
        }
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits), (2, 2), "{}", world.name);
        assert_eq!(acquire(&world.client, &wanted_first).await, Got::Released, "{}: E6", world.name);
        hold(&world.client, &wanted(&sale, "alice", 1)).await;
        assert_eq!(release(&world.client, &wanted_first).await, Ok(()), "long after");
        assert_eq!(world.at_rest(&sale).await.available, 1, "{}", world.name);
        assert_eq!(deduct(&world.client, &wanted_first).await, Err(Reason::IllegalState), "{}", world.name);
    }
}

#[tokio::test]
async fn e4_e5_a_release_before_the_lock_makes_the_lock_fail_and_changes_no_counter() {
    for world in worlds().await {
        let sale = world.sale(5, 1).await;
        let early = wanted(&sale, "alice", 1);
        let grant = granted(&world.client, &early).await;
        let before = world.standing(&sale).await.record.ledger;
        assert_eq!(release(&world.client, &early).await, Ok(()), "{}", world.name);
        assert_eq!(world.standing(&sale).await.record.ledger, before, "{}: E5", world.name);
        let locked = lock(&world.client, &early, &grant).await;
        assert_eq!(locked, LockedAs::Refused(Reason::PermitLapsed), "{}: E4", world.name);
        // Its permit comes back all the same.
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits), (5, 5), "{}", world.name);
        assert_eq!(acquire(&world.client, &early).await, Got::Released, "{}", world.name);
    }
}

#[tokio::test]
async fn a_lock_and_a_deduction_can_be_repeated_and_a_sold_unit_never_comes_back() {
    for world in worlds().await {
        let sale = world.sale(5, 3).await;
        let bought = wanted(&sale, "alice", 3);
        let grant = granted(&world.client, &bought).await;
        let twice = vec![lock_item(&bought, &grant), lock_item(&bought, &grant)];
        assert_eq!(lock_all(&world.client, twice).await, [LockedAs::Locked; 2], "{}", world.name);
        for _ in 0..2 {
            assert_eq!(deduct(&world.client, &bought).await, Ok(()), "{}", world.name);
        }
        assert_eq!(release(&world.client, &bought).await, Err(Reason::IllegalState), "{}", world.name);
        assert_eq!(lock(&world.client, &bought, &grant).await, LockedAs::Locked, "{}", world.name);
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.sold), (2, 0, 3), "{}", world.name);
        let never = wanted(&sale, "bob", 1);
        assert_eq!(deduct(&world.client, &never).await, Err(Reason::IllegalState), "{}", world.name);
    }
}

#[tokio::test]
async fn the_ledger_keeps_the_limit_and_its_stock_even_against_forged_grants() {
    for world in worlds().await {
        let sale = world.sale(2, 2).await;
        let first = wanted(&sale, "alice ", 2);
        let grant = hold(&world.client, &first).await;
        // A grant that permits never gave.
        let forged = |name: &str| wanted(&sale, name, 1);
        let (over, stranger) = (forged("alice "), forged("alice"));
        let items = vec![lock_item(&over, &grant), lock_item(&stranger, &grant)];
        let expected = [LockedAs::Refused(Reason::PurchaseLimitReached), LockedAs::Refused(Reason::AllHeld)];
        assert_eq!(lock_all(&world.client, items).await, expected, "{}", world.name);
        // What was refused once stays so, for the same reason, though there is stock again.
        release(&world.client, &first).await.unwrap();
        let again = lock(&world.client, &stranger, &grant).await;
        assert_eq!(again, LockedAs::Refused(Reason::AllHeld), "{}", world.name);
        deduct_all_of(&world, &sale).await;
        let late = lock(&world.client, &forged("carol"), &grant).await;
        assert_eq!(late, LockedAs::Refused(Reason::SoldOut), "{}", world.name);
        assert_eq!(world.at_rest(&sale).await.sold, 2, "{}", world.name);
    }
}

async fn deduct_all_of(world: &World, sale: &SaleId) {
    let rest = wanted(sale, "dave", 2);
    world.at_rest(sale).await;
    hold(&world.client, &rest).await;
    deduct(&world.client, &rest).await.unwrap();
}

#[tokio::test]
async fn e7_e35_e37_quantities_are_whole_and_limits_hold() {
    for world in worlds().await {
        let sale = world.sale(3, 2).await;
        let attempts = join_all((0..30).map(|_| {
            let (client, wanted) = (world.client.clone(), wanted(&sale, "alice", 1));
            async move { (acquire(&client, &wanted).await, wanted) }
        }))
        .await;
        let won: Vec<_> = attempts.iter().filter(|(got, _)| matches!(got, Got::Granted(_))).collect();
        assert_eq!(won.len(), 2, "{}: E35", world.name);
        let newest = |hold: &str| won.iter().any(|(_, wanted)| wanted.hold.to_string() == hold);
        for (got, _) in &attempts {
            assert!(matches!(got, Got::Granted(_)) || matches!(got, Got::AtLimit(last) if newest(last)), "{got:?}");
        }
        let many = acquire(&world.client, &wanted(&sale, "bob", 3)).await;
        assert_eq!(many, Got::Refused(Reason::PurchaseLimitReached), "{}", world.name);
        let two = acquire(&world.client, &wanted(&sale, "bob", 2)).await;
        assert_eq!(two, Got::Refused(Reason::AllHeld), "{}: E7, one is left", world.name);
        for bad in [0, -1, i64::MAX, i64::MIN] {
            let got = acquire(&world.client, &wanted(&sale, "bob", bad)).await;
            assert_eq!(got, Got::Refused(Reason::InvalidField), "{}", world.name);
        }
        let unknown = SaleId::generate(&RequestId::random());
        let got = acquire(&world.client, &wanted(&unknown, "bob", 1)).await;
        assert_eq!(got, Got::Refused(Reason::NotFound), "{}", world.name);
    }
}

#[tokio::test]
async fn e34_the_servers_clock_decides_when_a_sale_runs() {
    let (clock, now) = Clock::manual(1_000_000);
    for world in worlds_with(impatient(), clock).await {
        now.store(1_000_000, Ordering::SeqCst);
        let time = |ms: i64| Some(prost_types::Timestamp { seconds: ms / 1000, nanos: (ms % 1000) as i32 * 1_000_000 });
        let request =
            v1::CreateSaleRequest { start_time: time(2_000_000), end_time: time(3_000_000), ..create_request(5) };
        let sale = world.create(request).await;
        for (at, expected) in [
            (1_999_999, Err(Reason::SaleNotStarted)),
            (2_000_000, Ok(())),
            (2_999_999, Ok(())),
            (3_000_000, Err(Reason::SaleEnded)),
        ] {
            now.store(at, Ordering::SeqCst);
            let got = match acquire(&world.client, &wanted(&sale, &format!("buyer-{at}"), 1)).await {
                Got::Granted(grant) => {
                    assert_eq!(grant.granted_at_ms, at, "{}", world.name);
                    Ok(())
                }
                Got::Refused(reason) => Err(reason),
                other => panic!("{other:?}"),
            };
            assert_eq!(got, expected, "{} at {at}", world.name);
        }
    }
}

/// Permits cost memory for every order, and live on for a day after the last one must have been paid. Without them nobody
/// knows who has won: then gateways hear that everybody may have (E2).
#[tokio::test]
async fn the_permits_of_a_sale_that_is_over_are_dropped_running_or_at_the_next_start() {
    const WEEK: i64 = 7 * 24 * 3600 * 1000;
    const OVER: i64 = 2_000_000 + WEEK + 24 * 3600 * 1000;
    let (clock, now) = Clock::manual(1_000_000);
    for mut world in worlds_with(impatient(), clock).await {
        for restarts in [false, true] {
            now.store(1_000_000, Ordering::SeqCst);
            let until = |end_ms: i64| v1::CreateSaleRequest {
                end_time: Some(prost_types::Timestamp { seconds: end_ms / 1000, nanos: 0 }),
                payment_window: Some(prost_types::Duration { seconds: WEEK / 1000, nanos: 0 }),
                ..create_request(5)
            };
            let over = world.create(until(2_000_000)).await;
            let running = world.create(until(2_001_000)).await;
            let winner = wanted(&over, "alice", 1);
            hold(&world.client, &winner).await;
            now.store(OVER - 1, Ordering::SeqCst);
            world.permits_are_back(&over).await;
            assert!(matches!(acquire(&world.client, &winner).await, Got::Granted(_)), "{}", world.name);
            assert!(world.permits().header(&over).await.unwrap().is_some(), "{}", world.name);
            if restarts {
                world.life.kill();
            }
            now.store(OVER, Ordering::SeqCst);
            if restarts {
                world.restart().await;
            }
            eventually("they are dropped", async || {
                world.permits().header(&over).await.unwrap().is_none().then_some(())
            })
            .await;
            let late = acquire(&world.client, &wanted(&over, "bob", 1)).await;
            assert_eq!(late, Got::Refused(Reason::SaleEnded), "{}", world.name);
            world.permits_are_back(&running).await;
            assert!(world.permits().header(&running).await.unwrap().is_some(), "{}", world.name);

            let rebuild = v1::RebuildStockRequest { sale: over.to_string(), ..Default::default() };
            let refused = world.client.clone().rebuild_stock(rebuild).await.unwrap_err();
            assert_eq!(proto::Error::from(refused).reason, Reason::IllegalState, "{}", world.name);
            let mut signals = world.bus.listen(subjects::SALES_CHANGED).await.unwrap();
            let lower = v1::AdjustStockRequest {
                sale: over.to_string(),
                delta: -4,
                request_id: RequestId::random().to_string(),
                ..Default::default()
            };
            let lowered = world.client.clone().adjust_stock(lower).await.unwrap().into_inner();
            assert_eq!((lowered.total, lowered.available), (1, 0), "{}", world.name);
            let told = async {
                loop {
                    let signal = SaleChanged::decode(signals.recv().await.unwrap()).unwrap();
                    if signal.sale.as_ref().is_some_and(|sale| sale.name == over.name()) {
                        return signal;
                    }
                }
            };
            let told = tokio::time::timeout(Duration::from_secs(10), told).await.expect("gateways are told");
            assert!(Filter::from_bytes(&told.buyers).may_contain("alice"), "{}", world.name);
            assert_eq!(world.permits().header(&over).await.unwrap(), None, "{}", world.name);
        }
    }
}

#[tokio::test]
async fn e38_all_held_becomes_a_purchase_when_a_hold_lapses_and_sold_out_never_does() {
    for world in worlds().await {
        let sale = world.sale(1, 1).await;
        let first = wanted(&sale, "alice", 1);
        hold(&world.client, &first).await;
        let second = wanted(&sale, "bob", 1);
        assert_eq!(acquire(&world.client, &second).await, Got::Refused(Reason::AllHeld), "{}", world.name);
        release(&world.client, &first).await.unwrap();
        world.at_rest(&sale).await;
        hold(&world.client, &second).await;
        deduct(&world.client, &second).await.unwrap();
        let third = wanted(&sale, "carol", 1);
        eventually("sold out is known", async || {
            let got = acquire(&world.client, &third).await;
            (got == Got::Refused(Reason::SoldOut)).then_some(())
        })
        .await;
        assert_eq!(release(&world.client, &second).await, Err(Reason::IllegalState), "{}", world.name);
        assert_eq!(acquire(&world.client, &third).await, Got::Refused(Reason::SoldOut), "{}", world.name);
        // E2: the winner is never told so.
        assert!(matches!(acquire(&world.client, &second).await, Got::Granted(_)), "{}", world.name);
    }
}

#[tokio::test]
async fn one_request_id_for_two_sales_holds_in_one_and_costs_the_other_nothing() {
    for world in worlds().await {
        let (spring, autumn) = (world.sale(1, 1).await, world.sale(1, 1).await);
        let here = wanted(&spring, "alice", 1);
        let there = Wanted { sale: autumn.clone(), ..here.clone() };
        let grants = (granted(&world.client, &here).await, granted(&world.client, &there).await);
        let items = vec![lock_item(&here, &grants.0), lock_item(&there, &grants.1)];
        let expected = [LockedAs::Locked, LockedAs::Refused(Reason::PermitLapsed)];
        assert_eq!(lock_all(&world.client, items).await, expected, "{}", world.name);
        assert_eq!(world.at_rest(&autumn).await.permits, 1, "{}", world.name);
        assert_eq!(world.at_rest(&spring).await.held, 1, "{}", world.name);
    }
}

/// I1 and E37 in a batch that meets many sales: each one's counters and buyers stay its own.
#[tokio::test]
async fn one_batch_over_many_sales_moves_each_ones_own_counters() {
    const SALES: i64 = 70;
    for world in worlds().await {
        let mut sales = Vec::new();
        for n in 0..SALES {
            sales.push((world.sale(3 + n, 2).await, 3 + n));
        }
        // Of each sale Alice takes two in two orders, and in all of them Bob takes one.
        let wishes: Vec<_> = sales
            .iter()
            .flat_map(|(sale, _)| [wanted(sale, "alice", 1), wanted(sale, "alice", 1), wanted(sale, "bob", 1)])
            .collect();
        let grants = acquire_all(&world.client, &wishes).await.into_iter().map(|got| match got {
            Got::Granted(grant) => grant,
            other => panic!("{other:?}"),
        });
        let items = wishes.iter().zip(grants).map(|(wish, grant)| lock_item(wish, &grant)).collect();
        assert_eq!(lock_all(&world.client, items).await, vec![LockedAs::Locked; wishes.len()], "{}", world.name);
        // Later batches know what they have: a third is over the limit in every sale that has one left.
        let grant = granted(&world.client, &wishes[0]).await;
        let more: Vec<_> = sales[1..].iter().map(|(sale, _)| lock_item(&wanted(sale, "alice", 1), &grant)).collect();
        let over = vec![LockedAs::Refused(Reason::PurchaseLimitReached); more.len()];
        assert_eq!(lock_all(&world.client, more).await, over, "{}", world.name);
        for (sale, stock) in &sales {
            let report = world.at_rest(sale).await;
            let counted = (report.available, report.held, report.sold, report.total);
            assert_eq!(counted, (stock - 3, 3, 0, *stock), "{}", world.name);
        }
    }
}

/// What buyers have is looked up by their keys, by the plan of a table that was empty when it was made too. Comparing
/// every hold of the sale instead cost a mesh of five processes four fifths of its rate.
#[tokio::test]
async fn postgres_does_not_look_at_a_sales_other_holds_for_a_batch_of_buyers() {
    const BATCH: i64 = 512;
    // As many as it takes until the connection of the first, whose plan knew nothing, gets another.
    const BATCHES: i64 = 20;
    for mut world in worlds_with(Config::default(), Clock::system()).await {
        if world.connection.get_database_backend() != DbBackend::Postgres {
            continue;
        }
        let sale = world.sale(BATCHES * BATCH, 1).await;
        let batch = async |n: i64| {
            let wishes: Vec<_> = (0..BATCH).map(|i| wanted(&sale, &format!("buyer-{n}-{i}"), 1)).collect();
            let grants = acquire_all(&world.client, &wishes).await.into_iter().map(|got| match got {
                Got::Granted(grant) => grant,
                other => panic!("{other:?}"),
            });
            let items = wishes.iter().zip(grants).map(|(wish, grant)| lock_item(wish, &grant)).collect();
            assert_eq!(lock_all(&world.client, items).await, vec![LockedAs::Locked; wishes.len()]);
        };
        for n in 0..BATCHES {
            batch(n).await;
        }
        // A connection tells what it counted when it ends, at the latest.
        world.lose_database().await;
        world.find_database().await;
        let count = async |sql: &str| {
            let row = world.connection.query_one_raw(Statement::from_string(DbBackend::Postgres, sql)).await.unwrap();
            row.unwrap().try_get::<i64>("", "n").unwrap()
        };
        eventually("the counts of every batch", async || {
            let inserted = "SELECT n_tup_ins AS n FROM pg_stat_user_tables WHERE relname = 'stock_hold'";
            (count(inserted).await >= BATCHES * BATCH).then_some(())
        })
        .await;
        // Every buyer and every order was new, so that there was next to nothing to be found.
        let looked_at =
            "SELECT seq_tup_read + idx_tup_fetch AS n FROM pg_stat_user_tables WHERE relname = 'stock_hold'";
        let as_the_sales =
            "SELECT idx_tup_read AS n FROM pg_stat_user_indexes WHERE indexrelname = 'stock_hold_by_sale'";
        let (looked_at, as_the_sales) = (count(looked_at).await, count(as_the_sales).await);
        assert!(looked_at < BATCH && as_the_sales < BATCH, "{looked_at} rows, {as_the_sales} of the sale's index");
    }
}

#[tokio::test]
async fn grants_are_found_by_hold_and_not_knowing_is_said() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let known = wanted(&sale, "alice", 1);
        let grant = granted(&world.client, &known).await;
        let stranger = OrderId::derive(&known.buyer, &RequestId::random());
        let lookup = async || {
            let hold_ids = vec![known.hold.to_string(), stranger.to_string(), "nonsense".to_owned()];
            let answer = world.client.clone().lookup_grants(LookupGrantsRequest { hold_ids }).await.unwrap();
            answer.into_inner().results.into_iter().map(|result| result.result.unwrap()).collect::<Vec<_>>()
        };
        let again = proto::internal::Grant { fresh: false, ..grant };
        let expected = [
            lookup_result::Result::Granted(again),
            lookup_result::Result::Absent(()),
            lookup_result::Result::Absent(()),
        ];
        assert_eq!(lookup().await, expected, "{}", world.name);
        // Claimed by a rebuild that never ends.
        let facts = world.standing(&sale).await.record.facts();
        world.permits().claim(&sale, 99, &facts, "elsewhere").await.unwrap();
        let expected = [lookup_result::Result::Unknown(()), lookup_result::Result::Unknown(())];
        assert_eq!(lookup().await[..2], expected, "{}", world.name);
    }
}

/// A late capture's hold has an id of its own, which somebody may take for an order's.
#[tokio::test]
async fn a_hold_is_of_one_order() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let known = wanted(&sale, "alice", 1);
        let grant = granted(&world.client, &known).await;
        let order = OrderId::derive(&known.buyer, &RequestId::random());
        let late = LockItem { order_id: order.to_string(), ..lock_item(&known, &grant) };
        let both = vec![late.clone(), lock_item(&known, &grant), late];
        let refused = LockedAs::Refused(Reason::PermitLapsed);
        assert_eq!(
            lock_all(&world.client, both).await,
            [LockedAs::Locked, refused, LockedAs::Locked],
            "{}",
            world.name
        );
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.permits), (1, 1, 1), "{}", world.name);
    }
}

/// What became of each of these holds' grants, by name.
pub async fn look_up(client: &Client, holds: &[OrderId]) -> Vec<&'static str> {
    let hold_ids = holds.iter().map(OrderId::to_string).collect();
    let answer = client.clone().lookup_grants(LookupGrantsRequest { hold_ids }).await.unwrap();
    let name = |result: LookupResult| match result.result.unwrap() {
        lookup_result::Result::Granted(_) => "granted",
        lookup_result::Result::Absent(()) => "absent",
        lookup_result::Result::Unknown(()) => "unknown",
    };
    answer.into_inner().results.into_iter().map(name).collect()
}

#[tokio::test]
async fn a_grant_in_a_sale_that_another_process_has_just_created_is_found() {
    for world in worlds().await {
        let (other, life) = world.another().await;
        let sale = world.sale(2, 1).await;
        let known = wanted(&sale, "alice", 1);
        // The other one's first look may meet the sale's permits before they are open, and begin them anew.
        eventually("a grant", async || matches!(acquire(&world.client, &known).await, Got::Granted(_)).then_some(()))
            .await;
        let stranger = OrderId::derive(&known.buyer, &RequestId::random());
        assert_eq!(look_up(&other, &[known.hold, stranger]).await, ["granted", "absent"], "{}", world.name);
        life.kill();
    }
}

#[tokio::test]
async fn e14_nobody_says_that_a_grant_is_absent_from_permits_that_were_put_back_in_time() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let placed = wanted(&sale, "alice", 1);
        world.place(&placed).await.unwrap();
        // As if a server that never saw the grant had taken over, an instant ago.
        let facts = world.standing(&sale).await.record.facts();
        let opening = Opening { epoch: 50, available: 2, snapshot_seq: 0, facts: facts.clone() };
        world.permits().claim(&sale, 50, &facts, "another server").await.unwrap();
        assert!(world.permits().open(&sale, &opening).await.unwrap(), "{}", world.name);
        assert_eq!(look_up(&world.client, &[placed.hold]).await, ["unknown"], "{}", world.name);
        assert_eq!(world.funnel().await.run().await, 1, "{}", world.name);
        world.at_rest(&sale).await;
        assert_eq!(look_up(&world.client, &[placed.hold]).await, ["granted"], "{}", world.name);
    }
}

#[tokio::test]
async fn an_order_that_the_ledger_has_just_refused_is_not_absent() {
    for world in worlds().await {
        let sale = world.sale(1, 1).await;
        let (held, refused) = (wanted(&sale, "alice", 1), wanted(&sale, "bob", 1));
        hold(&world.client, &held).await;
        let stale = Grant { epoch: 0, ..Grant::default() };
        let item = LockItem { refusal: Reason::AllHeld.into(), ..lock_item(&refused, &stale) };
        assert_eq!(lock_all(&world.client, vec![item]).await, [LockedAs::Refused(Reason::AllHeld)], "{}", world.name);
        // Its permit is back, its record is yet to be written by whoever asked.
        assert_eq!(look_up(&world.client, &[refused.hold]).await, ["unknown"], "{}", world.name);
    }
}

/// Buyers, retries, payments, releases, adjustments and lost messages all at once, while I1 and I2 are sampled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e10_the_invariants_hold_at_every_sampled_instant() {
    let seed: u64 = std::env::var("SECKILL_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("to repeat it: SECKILL_TEST_SEED={seed}");
    for world in worlds().await {
        let world = Arc::new(world);
        let sale = world.sale(20, 2).await;
        world.funnel().await.run().await;
        let stop = Arc::new(AtomicBool::new(false));
        let samples = Arc::new(AtomicUsize::new(0));
        let sampler = tokio::spawn({
            let (world, sale, stop, samples) = (world.clone(), sale.clone(), stop.clone(), samples.clone());
            async move {
                while !stop.load(Ordering::SeqCst) {
                    // The permits first: what the ledger offers can only have grown since.
                    let header = world.permits().header(&sale).await.unwrap().unwrap();
                    let ledger = world.standing(&sale).await.record.ledger;
                    assert_eq!(ledger.available + ledger.held + ledger.sold, ledger.total, "I1");
                    if header.phase == Phase::Open && header.epoch == ledger.epoch {
                        assert!(header.offered() <= ledger.offerable(), "I2: {header:?} {ledger:?}");
                        samples.fetch_add(1, Ordering::SeqCst);
                    }
                }
            }
        });
        let buyers = (0..16_u64).map(|i| {
            let (world, sale, samples) = (world.clone(), sale.clone(), samples.clone());
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(i));
            tokio::spawn(async move {
                let mut rounds = 0;
                // At least so often, and until it was looked at often enough.
                while rounds < 25 || samples.load(Ordering::SeqCst) <= 10 {
                    rounds += 1;
                    let wanted = wanted(&sale, &format!("buyer-{}", rng.random_range(0..24)), rng.random_range(1..=2));
                    let client = world.client.clone();
                    let Got::Granted(grant) = acquire(&client, &wanted).await else { continue };
                    // One in ten dies here: the sweep's business.
                    if rng.random_bool(0.1) || lock(&client, &wanted, &grant).await != LockedAs::Locked {
                        continue;
                    }
                    assert_eq!(
                        acquire(&client, &wanted).await,
                        Got::Granted(proto::internal::Grant { fresh: false, ..grant })
                    );
                    if rng.random_bool(0.2) {
                        deduct(&client, &wanted).await.unwrap();
                    } else {
                        release(&client, &wanted).await.unwrap();
                    }
                }
            })
        });
        for buyer in join_all(buyers).await {
            buyer.unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        sampler.await.unwrap();
        let report = world.at_rest(&sale).await;
        assert_eq!((report.held, report.slack), (0, 0), "{}", world.name);
        tokio::time::timeout(Duration::from_secs(5), world.store().outbox(0, &[], 10)).await.unwrap().unwrap();
    }
}
