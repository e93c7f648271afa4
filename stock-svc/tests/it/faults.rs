//! Crashes and lost dependencies, on every database.

use std::time::Duration;

use futures::future::join_all;
use mesh::testing::eventually;
use proto::{
    Reason,
    internal::{Grant, LockItem, LookupGrantsRequest, lookup_result},
    v1,
};
use stock_svc::{
    domain::permits::{Claimed, Header, Opening, Raise, Withdrawn},
    store::{Operation, Store},
};

use crate::{purchases::look_up, world::*};

#[tokio::test]
async fn e11_a_grant_that_became_nothing_is_back_within_the_sweeps_bound() {
    for world in worlds().await {
        let sale = world.sale(3, 1).await;
        let (lost, placed) = (wanted(&sale, "alice", 1), wanted(&sale, "bob", 1));
        let grant = granted(&world.client, &lost).await;
        // Whoever is quicker than that is never overtaken by the sweep.
        let kept_for = grant.kept_until_ms - grant.granted_at_ms;
        assert_eq!(kept_for as u128, world.config.grant_grace.as_millis() / 2, "{}", world.name);
        world.place(&placed).await.unwrap();
        // The funnel has not passed: bob's order is on its way, and nothing is given back however old it is.
        tokio::time::sleep(world.config.grant_grace * 2).await;
        assert_eq!(world.report(&sale).await.permits, 1, "{}", world.name);
        assert_eq!(world.funnel().await.run().await, 1, "{}", world.name);
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held), (2, 1), "{}", world.name);
        // Too late: the tombstone has won.
        let late = lock(&world.client, &lost, &grant).await;
        assert_eq!(late, LockedAs::Refused(Reason::PermitLapsed), "{}", world.name);
        assert_eq!(acquire(&world.client, &lost).await, Got::Released, "{}", world.name);
        // Its message may have been accepted all the same, and its record not be written yet.
        let hold_ids = vec![lost.hold.to_string()];
        let answer = world.client.clone().lookup_grants(LookupGrantsRequest { hold_ids }).await.unwrap().into_inner();
        assert_eq!(answer.results[0].result, Some(lookup_result::Result::Unknown(())), "{}", world.name);
        hold(&world.client, &wanted(&sale, "alice", 1)).await;
    }
}

#[tokio::test]
async fn e12_a_release_whose_refund_was_not_sent_catches_up_after_a_restart() {
    for mut world in worlds().await {
        let sale = world.sale(1, 1).await;
        let held = wanted(&sale, "alice", 1);
        let grant = hold(&world.client, &held).await;
        // Dead between the ledger's release and the refund.
        world.life.kill();
        let release = Operation::Release { hold: held.hold, order: held.hold, buyer: held.buyer.clone() };
        let applied = world.store().apply(vec![(sale.clone(), release)], 0).await.unwrap();
        assert!(applied.has_refunds, "{}", world.name);
        assert_eq!(world.permits().header(&sale).await.unwrap().unwrap().free, 0, "{}", world.name);
        world.restart().await;
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits), (1, 1), "{}", world.name);
        let late = lock(&world.client, &held, &grant).await;
        assert_eq!(late, LockedAs::Refused(Reason::PermitLapsed), "{}: no oversell", world.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e13_permits_lost_mid_sale_cost_no_accepted_order_its_unit() {
    for world in worlds().await {
        let sale = world.sale(30, 1).await;
        let funnel = world.funnel().await;
        let mut accepted = Vec::new();
        for i in 0..10 {
            let wanted = wanted(&sale, &format!("early-{i}"), 1);
            accepted.push((wanted.clone(), world.place(&wanted).await.unwrap()));
        }
        funnel.run().await;
        // Five more are accepted and not locked; one was granted and its order never stored.
        for i in 10..15 {
            let wanted = wanted(&sale, &format!("early-{i}"), 1);
            accepted.push((wanted.clone(), world.place(&wanted).await.unwrap()));
        }
        granted(&world.client, &wanted(&sale, "vanished", 1)).await;
        world.lose_permits(&sale).await;
        // Nobody is told "sold out", and nothing opens before the accepted orders have their units.
        for i in 0..20 {
            let got = acquire(&world.client, &wanted(&sale, &format!("waiting-{i}"), 1)).await;
            assert_eq!(got, Got::Refused(Reason::StockRebuilding), "{}", world.name);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(world.report(&sale).await.state(), v1::PermitState::Rebuilding, "{}", world.name);
        funnel.run().await;
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held), (15, 15), "{}", world.name);
        // Accepted orders find their grants again, with the answer they had (E2), and limits still count (E37).
        for (wanted, grant) in &accepted {
            let again = Got::Granted(Grant { fresh: false, ..grant.clone() });
            assert_eq!(acquire(&world.client, wanted).await, again, "{}", world.name);
        }
        let more = acquire(&world.client, &crate::world::wanted(&sale, "early-3", 1)).await;
        assert_eq!(more, Got::AtLimit(accepted[3].0.hold.to_string()), "{}", world.name);
        // Exactly the rest can be sold.
        let late = join_all((0..40).map(|i| {
            let (world, wanted) = (&world, wanted(&sale, &format!("late-{i}"), 1));
            async move { world.place(&wanted).await.is_some() }
        }))
        .await;
        assert_eq!(late.iter().filter(|won| **won).count(), 15, "{}", world.name);
        funnel.run().await;
        assert_eq!(world.at_rest(&sale).await.held, 30, "{}", world.name);
        // A hold from before the loss comes back once.
        for _ in 0..2 {
            release(&world.client, &accepted[0].0).await.unwrap();
        }
        assert_eq!(world.at_rest(&sale).await.permits, 1, "{}", world.name);
    }
}

#[tokio::test]
async fn e13_a_stale_grant_is_acquired_anew_and_locked() {
    for world in worlds().await {
        let sale = world.sale(1, 1).await;
        let wanted = wanted(&sale, "alice", 1);
        let stale = granted(&world.client, &wanted).await;
        world.lose_permits(&sale).await;
        world.permits_are_back(&sale).await;
        assert_eq!(lock(&world.client, &wanted, &stale).await, LockedAs::Stale, "{}", world.name);
        let fresh = granted(&world.client, &wanted).await;
        assert!(fresh.epoch > stale.epoch, "{}", world.name);
        assert_eq!(lock(&world.client, &wanted, &fresh).await, LockedAs::Locked, "{}", world.name);
        assert_eq!(world.at_rest(&sale).await.held, 1, "{}", world.name);
    }
}

#[tokio::test]
async fn e39_an_order_of_lost_permits_is_not_said_to_be_absent_before_the_funnel_has_passed() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let funnel = world.funnel().await;
        let late = wanted(&sale, "alice", 1);
        let stale = granted(&world.client, &late).await;
        world.lose_permits(&sale).await;
        world.permits_are_back(&sale).await;
        let stranger = wanted(&sale, "nobody", 1);
        let both = [late.hold, stranger.hold];
        assert_eq!(look_up(&world.client, &both).await, ["absent", "absent"], "{}: not accepted yet", world.name);
        world.publish(&late, &stale).await;
        assert_eq!(look_up(&world.client, &both).await, ["unknown", "unknown"], "{}: it is on its way", world.name);
        // Its reader waits for the funnel, which takes a moment.
        let (told, locked) = tokio::join!(look_up(&world.client, &both), funnel.run());
        assert_eq!(locked, 1, "{}", world.name);
        assert_eq!(told[1], "absent", "{}", world.name);
        assert!(["granted", "unknown"].contains(&told[0]), "{}: {told:?}", world.name);
        assert_eq!(look_up(&world.client, &both).await, ["granted", "absent"], "{}", world.name);
    }
}

#[tokio::test]
async fn e13_an_order_that_waits_for_permits_holds_up_no_rebuild_and_one_that_can_be_locked_does() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let funnel = world.funnel().await;
        // Granted before a loss, and published after it: only an opening can let it through.
        let late = wanted(&sale, "alice", 1);
        let stale = granted(&world.client, &late).await;
        world.lose_permits(&sale).await;
        world.permits_are_back(&sale).await;
        world.publish(&late, &stale).await;
        // Behind it, one that was accepted in time.
        let placed = wanted(&sale, "bob", 1);
        let good = world.place(&placed).await.unwrap();
        world.lose_permits(&sale).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(world.report(&sale).await.state(), v1::PermitState::Rebuilding, "{}: bob has no unit", world.name);
        // The funnel locks bob's and cannot lock alice's: it is not done with what is in the stream.
        let waiting = funnel.consumer.fetch(10, Duration::from_secs(1)).await.unwrap();
        assert_eq!(waiting.len(), 2, "{}", world.name);
        assert_eq!(lock(&world.client, &late, &stale).await, LockedAs::Stale, "{}", world.name);
        assert_eq!(lock(&world.client, &placed, &good).await, LockedAs::Locked, "{}", world.name);
        world.permits_are_back(&sale).await;
        let renewed = granted(&world.client, &late).await;
        assert_eq!(lock(&world.client, &late, &renewed).await, LockedAs::Locked, "{}", world.name);
        assert_eq!(world.at_rest(&sale).await.held, 2, "{}", world.name);
    }
}

#[tokio::test]
async fn what_is_refused_once_is_never_held_and_what_is_held_is_not_refused() {
    for world in worlds().await {
        let sale = world.sale(2, 1).await;
        let refuse = |wanted: &Wanted| LockItem {
            refusal: Reason::AllHeld.into(),
            ..lock_item(wanted, &Grant { epoch: 0, ..Grant::default() })
        };
        let (refused, held) = (wanted(&sale, "alice", 1), wanted(&sale, "bob", 1));
        let all = lock_all(&world.client, vec![refuse(&refused)]).await;
        assert_eq!(all, [LockedAs::Refused(Reason::AllHeld)], "{}", world.name);
        // A unit is there, and another coordinator has got a permit for it.
        let grant = granted(&world.client, &refused).await;
        let late = lock(&world.client, &refused, &grant).await;
        assert_eq!(late, LockedAs::Refused(Reason::AllHeld), "{}: the same answer again", world.name);
        hold(&world.client, &held).await;
        assert_eq!(lock_all(&world.client, vec![refuse(&held)]).await, [LockedAs::Locked], "{}", world.name);
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held), (1, 1), "{}: and the permit has gone back", world.name);
    }
}

#[tokio::test]
async fn e14_permits_of_another_server_are_rebuilt() {
    for world in worlds().await {
        let sale = world.sale(3, 1).await;
        // As if a server with other data had taken over: permits that this ledger never opened.
        let facts = world.standing(&sale).await.record.facts();
        let claimed = world.permits().claim(&sale, 50, &facts, "another server").await.unwrap();
        assert_eq!(claimed, Claimed::Yes, "{}", world.name);
        let forged = Opening { epoch: 50, available: 1000, snapshot_seq: 0, facts };
        assert!(world.permits().open(&sale, &forged).await.unwrap(), "{}", world.name);
        let report = world.at_rest(&sale).await;
        assert_eq!(report.permits, 3, "{}", world.name);
        assert!(report.epoch > 50, "{}", world.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e15_two_rebuilders_at_once_leave_r_equal_to_a() {
    for world in worlds().await {
        let sale = world.sale(10, 1).await;
        let (other, other_life) = world.another().await;
        let funnel = world.funnel().await;
        let held = wanted(&sale, "alice", 1);
        world.place(&held).await.unwrap();
        let request = || v1::RebuildStockRequest { sale: sale.to_string(), ..Default::default() };
        for _ in 0..5 {
            let (mut one, mut two) = (world.client.clone(), other.clone());
            let (one, two) = tokio::join!(one.rebuild_stock(request()), async {
                funnel.run().await;
                two.rebuild_stock(request()).await
            });
            // Who was overtaken is told that it goes on, not that it is done.
            for told in [one, two] {
                let reason = told.err().map(|status| proto::Error::from(status).reason);
                assert!(matches!(reason, None | Some(Reason::StockRebuilding)), "{}: {reason:?}", world.name);
            }
        }
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.permits), (9, 1, 9), "{}", world.name);
        other_life.kill();
    }
}

#[tokio::test]
async fn e15_a_rebuild_whose_process_died_is_taken_over() {
    for world in worlds().await {
        let sale = world.sale(4, 1).await;
        let epoch = world.store().allocate_epoch(&sale, 0).await.unwrap();
        let server = world.permits().fingerprint().await.unwrap();
        let facts = world.standing(&sale).await.record.facts();
        world.permits().claim(&sale, epoch, &facts, &server).await.unwrap();
        let report = world.at_rest(&sale).await;
        assert_eq!(report.permits, 4, "{}", world.name);
        assert!(report.epoch > epoch, "{}", world.name);
    }
}

#[tokio::test]
async fn e16_a_restart_adds_and_loses_no_unit() {
    for mut world in worlds().await {
        let sale = world.sale(10, 1).await;
        let funnel = world.funnel().await;
        let (held, sold, placed) = (wanted(&sale, "a", 1), wanted(&sale, "b", 1), wanted(&sale, "c", 1));
        hold(&world.client, &held).await;
        hold(&world.client, &sold).await;
        deduct(&world.client, &sold).await.unwrap();
        world.place(&placed).await.unwrap();
        granted(&world.client, &wanted(&sale, "d", 1)).await;
        world.restart().await;
        world.restart().await;
        drop(funnel);
        world.funnel().await.run().await;
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.sold), (7, 2, 1), "{}", world.name);
        let again = acquire(&world.client, &held).await;
        assert!(matches!(again, Got::Granted(Grant { fresh: false, .. })), "{}: {again:?}", world.name);
        // A further process at the same time.
        let (other, life) = world.another().await;
        hold(&other, &wanted(&sale, "e", 1)).await;
        release(&other, &held).await.unwrap();
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.held, report.sold), (7, 2, 1), "{}", world.name);
        life.kill();
    }
}

#[tokio::test]
async fn e21_with_sql_away_locks_fail_and_no_permit_stays_lost() {
    for mut world in worlds().await {
        let sale = world.sale(2, 1).await;
        let wanted = wanted(&sale, "alice", 1);
        let grant = granted(&world.client, &wanted).await;
        world.lose_database().await;
        let items = vec![lock_item(&wanted, &grant)];
        let failed = world.client.clone().lock_stock(proto::internal::LockStockRequest { items }).await;
        assert_eq!(proto::Error::from(failed.unwrap_err()).reason, Reason::DependencyDown, "{}", world.name);
        world.find_database().await;
        world.restart().await;
        let report = world.at_rest(&sale).await;
        assert_eq!((report.available, report.permits), (2, 2), "{}", world.name);
    }
}

#[tokio::test]
async fn reconciliation_clamps_what_is_too_much_and_raises_what_is_too_little() {
    for world in worlds().await {
        let sale = world.sale(10, 1).await;
        let on_its_way = granted(&world.client, &wanted(&sale, "alice", 1)).await;
        assert_eq!(on_its_way.epoch, 1, "{}", world.name);
        let header = world.permits().header(&sale).await.unwrap().unwrap();
        let Header { epoch, version, .. } = header;
        let forged = Raise { epoch, version, offered: header.offered(), missing: 5, release_seq: 0 };
        assert!(world.permits().raise(&sale, &forged).await.unwrap(), "{}", world.name);
        eventually("clamped", async || (world.report(&sale).await.permits == 9).then_some(())).await;
        // Lost: a withdrawal whose adjustment never came.
        assert_eq!(world.permits().withdraw(&sale, 4).await.unwrap(), Withdrawn::Done, "{}", world.name);
        assert_eq!(world.report(&sale).await.slack, 4, "{}", world.name);
        eventually("raised", async || (world.report(&sale).await.slack == 0).then_some(())).await;
        assert_eq!(world.at_rest(&sale).await.permits, 10, "{}: and the orphan is swept", world.name);
    }
}
