//! The contract of [`Permits`], on the memory and on Redis, and a random equivalence of the two.

use std::sync::Arc;

use fred::interfaces::{ClientLike, LuaInterface};
use proto::{BuyerId, OrderId, RequestId, SaleId};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use stock_svc::{
    domain::{
        HoldId,
        permits::{
            Acquire, Acquired, Claimed, Facts, Grant, Held, Opening, Phase, Raise, Refund, Refunded, Release, Return,
            Withdrawn,
        },
        sale::Verb,
    },
    permits::{Permits, SharedPermits, memory::Memory, redis::Redis},
};

pub async fn implementations() -> Vec<(&'static str, SharedPermits)> {
    let mut all: Vec<(&'static str, SharedPermits)> = vec![("memory", Arc::new(Memory::new()))];
    if let Some(url) = mesh::testing::server("SECKILL_TEST_REDIS_URL") {
        all.push(("redis", Arc::new(Redis::connect(&url).await.expect("redis answers"))));
    }
    all
}

/// A sale that no other test knows: the server is shared and never emptied.
pub fn unique_sale() -> SaleId {
    SaleId::generate(&RequestId::random())
}

fn buyer(name: &str) -> BuyerId {
    BuyerId::parse(name).unwrap()
}

fn new_hold() -> HoldId {
    OrderId::derive(&buyer("x"), &RequestId::random())
}

fn facts(total: i64, limit: i64) -> Facts {
    Facts { version: 1, verb: Verb::Open, start_at: 1000, end_at: 2000, limit, total, sold: 0 }
}

fn wish(hold: HoldId, name: &str, quantity: i64) -> Acquire {
    Acquire { hold, buyer: buyer(name), quantity }
}

fn opening(epoch: i64, available: i64, facts: Facts) -> Opening {
    Opening { epoch, available, snapshot_seq: 0, facts }
}

async fn opened(permits: &dyn Permits, available: i64, limit: i64) -> SaleId {
    let sale = unique_sale();
    let facts = facts(available, limit);
    assert_eq!(permits.claim(&sale, 1, &facts, "server").await.unwrap(), Claimed::Yes);
    assert!(permits.open(&sale, &opening(1, available, facts)).await.unwrap());
    sale
}

async fn acquire(permits: &dyn Permits, sale: &SaleId, now: i64, wish: Acquire) -> Acquired {
    permits.acquire(sale, now, vec![wish]).await.unwrap().results.remove(0)
}

async fn free(permits: &dyn Permits, sale: &SaleId) -> i64 {
    permits.header(sale).await.unwrap().unwrap().free
}

fn release(hold: HoldId, name: &str, quantity: i64, seq: i64) -> Refund {
    Refund::Release(Release { hold, buyer: Some(buyer(name)), quantity, seq, grant_epoch: 1 })
}

#[tokio::test]
async fn e2_the_winner_of_the_last_unit_gets_the_same_answer_again() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 1, 1).await;
        let hold = new_hold();
        let wishes = vec![wish(hold, "alice", 1), wish(hold, "alice", 1), wish(new_hold(), "bob", 1)];
        let batch = permits.acquire(&sale, 1500, wishes).await.unwrap();
        let grant = Grant { epoch: 1, quantity: 1, at: 1500, buyer: buyer("alice") };
        let expected = [Acquired::Fresh(grant.clone()), Acquired::Again(grant.clone()), Acquired::AllHeld];
        assert_eq!(batch.results, expected, "{kind}");
        assert_eq!(batch.free, 0, "{kind}");
        // Later than the end, too: it has its grant.
        assert_eq!(acquire(&*permits, &sale, 9999, wish(hold, "alice", 1)).await, Acquired::Again(grant), "{kind}");
        assert_eq!(acquire(&*permits, &sale, 1500, wish(hold, "alice", 2)).await, Acquired::Reused, "{kind}");
        assert_eq!(acquire(&*permits, &sale, 1500, wish(hold, "mallory", 1)).await, Acquired::Reused, "{kind}");
    }
}

#[tokio::test]
async fn e3_releasing_twice_returns_one_unit() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 2, 1).await;
        let hold = new_hold();
        acquire(&*permits, &sale, 1500, wish(hold, "alice", 1)).await;
        let twice = vec![release(hold, "alice", 1, 1), release(hold, "alice", 1, 1)];
        let batch = permits.refund(&sale, twice).await.unwrap();
        assert_eq!(batch.results, [Refunded::Applied, Refunded::Ignored], "{kind}");
        assert_eq!((batch.before, batch.after), (1, 2), "{kind}");
        // E6: the order that was released takes no unit.
        assert_eq!(acquire(&*permits, &sale, 1500, wish(hold, "alice", 1)).await, Acquired::Released, "{kind}");
        // E36: its buyer can buy again.
        let again = acquire(&*permits, &sale, 1500, wish(new_hold(), "alice", 1)).await;
        assert!(matches!(again, Acquired::Fresh(_)), "{kind}: {again:?}");
    }
}

#[tokio::test]
async fn a_permit_refund_counts_only_for_the_very_grant_that_is_listed() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 2, 1).await;
        let (hold, stranger) = (new_hold(), new_hold());
        acquire(&*permits, &sale, 1500, wish(hold, "alice", 1)).await;
        let back = |hold, epoch| Refund::Return(Return { hold, epoch });
        let refunds = vec![back(hold, 7), back(stranger, 1), back(hold, 1), back(hold, 1)];
        let batch = permits.refund(&sale, refunds).await.unwrap();
        let expected = [Refunded::Ignored, Refunded::Ignored, Refunded::Applied, Refunded::Ignored];
        assert_eq!(batch.results, expected, "{kind}");
        assert_eq!(batch.after, 2, "{kind}");
        let header = permits.header(&sale).await.unwrap().unwrap();
        assert_eq!(header.offered(), 2, "{kind}: nothing is granted any more");
        for hold in [hold, stranger] {
            assert_eq!(acquire(&*permits, &sale, 1500, wish(hold, "alice", 1)).await, Acquired::Released, "{kind}");
        }
        // The two kinds share no key: a stock release after a permit refund still counts.
        let late = permits.refund(&sale, vec![release(hold, "alice", 1, 5)]).await.unwrap();
        assert_eq!(late.results, [Refunded::Applied], "{kind}");
    }
}

#[tokio::test]
async fn e7_a_quantity_is_all_or_nothing() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 3, 10).await;
        assert_eq!(acquire(&*permits, &sale, 1500, wish(new_hold(), "alice", 4)).await, Acquired::SoldOut, "{kind}");
        let two = acquire(&*permits, &sale, 1500, wish(new_hold(), "alice", 2)).await;
        assert!(matches!(two, Acquired::Fresh(_)), "{kind}");
        assert_eq!(acquire(&*permits, &sale, 1500, wish(new_hold(), "bob", 2)).await, Acquired::AllHeld, "{kind}");
        assert_eq!(free(&*permits, &sale).await, 1, "{kind}");
    }
}

#[tokio::test]
async fn e34_one_millisecond_before_the_start_or_after_the_end_is_refused() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 3, 1).await;
        let at = |now| acquire(&*permits, &sale, now, wish(new_hold(), "alice", 1));
        assert_eq!(at(999).await, Acquired::NotStarted, "{kind}");
        assert_eq!(at(2000).await, Acquired::Ended, "{kind}");
        assert!(matches!(at(1000).await, Acquired::Fresh(_)), "{kind}");
    }
}

#[tokio::test]
async fn e35_e37_the_limit_holds_and_names_the_newest_hold() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 10, 3).await;
        let (first, second) = (new_hold(), new_hold());
        acquire(&*permits, &sale, 1500, wish(first, "alice", 2)).await;
        let over = acquire(&*permits, &sale, 1500, wish(new_hold(), "alice", 2)).await;
        assert_eq!(over, Acquired::OverLimit, "{kind}");
        acquire(&*permits, &sale, 1500, wish(second, "alice", 1)).await;
        let at = acquire(&*permits, &sale, 1500, wish(new_hold(), "alice", 1)).await;
        assert_eq!(at, Acquired::AtLimit(Some(second)), "{kind}");
        assert_eq!(permits.buyers(&sale).await.unwrap(), [buyer("alice")], "{kind}");
        permits.refund(&sale, vec![release(second, "alice", 1, 1), release(first, "alice", 2, 2)]).await.unwrap();
        assert!(permits.buyers(&sale).await.unwrap().is_empty(), "{kind}");
    }
}

#[tokio::test]
async fn e38_sold_out_is_final_and_all_held_is_not() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 1, 1).await;
        let hold = new_hold();
        acquire(&*permits, &sale, 1500, wish(hold, "alice", 1)).await;
        let other = wish(new_hold(), "bob", 1);
        assert_eq!(acquire(&*permits, &sale, 1500, other.clone()).await, Acquired::AllHeld, "{kind}");
        permits.refund(&sale, vec![release(hold, "alice", 1, 1)]).await.unwrap();
        assert!(matches!(acquire(&*permits, &sale, 1500, other).await, Acquired::Fresh(_)), "{kind}");
        permits.set_facts(&sale, &Facts { sold: 1, ..facts(1, 1) }).await.unwrap();
        let late = acquire(&*permits, &sale, 1500, wish(new_hold(), "carol", 1)).await;
        assert_eq!(late, Acquired::SoldOut, "{kind}");
    }
}

#[tokio::test]
async fn e13_lost_permits_fail_closed_and_no_refund_makes_them() {
    for (kind, permits) in implementations().await {
        let sale = unique_sale();
        assert_eq!(acquire(&*permits, &sale, 1500, wish(new_hold(), "a", 1)).await, Acquired::Unavailable, "{kind}");
        let batch = permits.refund(&sale, vec![release(new_hold(), "a", 1, 1)]).await.unwrap();
        assert_eq!(batch.results, [Refunded::Deferred], "{kind}");
        assert_eq!(permits.withdraw(&sale, 1).await.unwrap(), Withdrawn::Unavailable, "{kind}");
        assert!(!permits.set_facts(&sale, &facts(1, 1)).await.unwrap(), "{kind}");
        assert_eq!(permits.lookup(&sale, &[new_hold()]).await.unwrap(), None, "{kind}");
        assert_eq!(permits.pending(&sale, 9999, 10).await.unwrap(), None, "{kind}");
        assert_eq!(permits.header(&sale).await.unwrap(), None, "{kind}");
    }
}

#[tokio::test]
async fn what_is_forgotten_is_as_if_it_were_lost() {
    for (kind, permits) in implementations().await {
        let (sale, other) = (opened(&*permits, 2, 1).await, opened(&*permits, 2, 1).await);
        let (kept, lost) = (wish(new_hold(), "a", 1), wish(new_hold(), "b", 1));
        assert!(matches!(acquire(&*permits, &sale, 1500, lost.clone()).await, Acquired::Fresh(_)), "{kind}");
        assert!(matches!(acquire(&*permits, &other, 1500, kept.clone()).await, Acquired::Fresh(_)), "{kind}");
        for _ in 0..2 {
            permits.forget(&sale).await.unwrap();
            assert_eq!(permits.header(&sale).await.unwrap(), None, "{kind}");
            assert_eq!(permits.buyers(&sale).await.unwrap(), [], "{kind}");
            assert_eq!(acquire(&*permits, &sale, 1500, lost.clone()).await, Acquired::Unavailable, "{kind}");
        }
        assert!(matches!(acquire(&*permits, &other, 1500, kept).await, Acquired::Again(_)), "{kind}");
    }
}

#[tokio::test]
async fn a_rebuild_claims_loads_and_opens_in_its_own_epoch_only() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 5, 1).await;
        let held = new_hold();
        let facts = facts(5, 1);
        assert_eq!(permits.claim(&sale, 1, &facts, "b").await.unwrap(), Claimed::No(1), "{kind}");
        assert_eq!(permits.claim(&sale, 3, &facts, "b").await.unwrap(), Claimed::Yes, "{kind}");
        assert_eq!(acquire(&*permits, &sale, 1500, wish(held, "a", 1)).await, Acquired::Unavailable, "{kind}");
        assert_eq!(permits.header(&sale).await.unwrap().unwrap().phase, Phase::Rebuilding, "{kind}");
        let grant = Grant { epoch: 1, quantity: 1, at: 1400, buyer: buyer("a|b ä") };
        let snapshot = vec![Held { hold: held, grant: grant.clone() }];
        assert!(!permits.load(&sale, 2, snapshot.clone()).await.unwrap(), "{kind}: overtaken");
        for _ in 0..2 {
            assert!(permits.load(&sale, 3, snapshot.clone()).await.unwrap(), "{kind}");
        }
        assert!(!permits.open(&sale, &opening(2, 4, facts.clone())).await.unwrap(), "{kind}: overtaken");
        let opening = Opening { snapshot_seq: 7, ..opening(3, 4, facts) };
        assert!(permits.open(&sale, &opening).await.unwrap(), "{kind}");
        // The order keeps its old grant, and its buyer's limit counts.
        let again = acquire(&*permits, &sale, 1500, wish(held, "a|b ä", 1)).await;
        assert_eq!(again, Acquired::Again(grant.clone()), "{kind}");
        let more = acquire(&*permits, &sale, 1500, wish(new_hold(), "a|b ä", 1)).await;
        assert_eq!(more, Acquired::AtLimit(Some(held)), "{kind}");
        let found = permits.lookup(&sale, &[new_hold(), held]).await.unwrap();
        assert_eq!(found, Some(vec![None, Some(grant)]), "{kind}");
        // What the snapshot contains does not count again; what came after it does.
        let other = release(new_hold(), "z", 1, 7);
        let batch = permits.refund(&sale, vec![other, release(held, "a|b ä", 1, 8)]).await.unwrap();
        assert_eq!(batch.results, [Refunded::Ignored, Refunded::Applied], "{kind}");
        assert_eq!(batch.after, 5, "{kind}");
    }
}

#[tokio::test]
async fn corrections_are_decided_on_what_is_still_so() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 5, 1).await;
        let raise = Raise { epoch: 1, version: 0, offered: 5, missing: 2, release_seq: 3 };
        let outdated = Raise { offered: 4, ..raise };
        assert!(!permits.raise(&sale, &outdated).await.unwrap(), "{kind}: a release was counted since");
        assert!(permits.raise(&sale, &raise).await.unwrap(), "{kind}");
        assert!(!permits.raise(&sale, &raise).await.unwrap(), "{kind}: once");
        let late = permits.refund(&sale, vec![release(new_hold(), "a", 1, 3)]).await.unwrap();
        assert_eq!(late.results, [Refunded::Ignored], "{kind}: counted in by the raise");
        assert_eq!(permits.clamp(&sale, 1, 0, 1).await.unwrap(), None, "{kind}");
        assert_eq!(permits.clamp(&sale, 1, 1, 100).await.unwrap(), Some(7), "{kind}");
        assert_eq!(permits.withdraw(&sale, 1).await.unwrap(), Withdrawn::TooFew, "{kind}");
        assert_eq!(free(&*permits, &sale).await, 0, "{kind}");
    }
}

#[tokio::test]
async fn pending_lists_old_grants_until_they_are_marked() {
    for (kind, permits) in implementations().await {
        let sale = opened(&*permits, 5, 5).await;
        let holds = [new_hold(), new_hold(), new_hold()];
        for (hold, now) in holds.iter().zip([1300, 1100, 1200]) {
            acquire(&*permits, &sale, now, wish(*hold, "a", 1)).await;
        }
        let listed = |before, limit| {
            let (permits, sale) = (&permits, &sale);
            async move {
                let pending = permits.pending(sale, before, limit).await.unwrap().unwrap();
                pending.iter().map(|p| p.hold).collect::<Vec<_>>()
            }
        };
        assert_eq!(listed(1300, 10).await, [holds[1], holds[2]], "{kind}");
        assert_eq!(listed(9999, 1).await, [holds[1]], "{kind}");
        permits.persisted(&sale, 7, vec![holds[0]]).await.unwrap();
        permits.persisted(&sale, 1, vec![holds[1], new_hold()]).await.unwrap();
        assert_eq!(listed(9999, 10).await, [holds[2], holds[0]], "{kind}");
    }
}

#[tokio::test]
async fn a_server_that_forgot_the_scripts_is_told_them_again() {
    let Some(url) = mesh::testing::server("SECKILL_TEST_REDIS_URL") else { return };
    let permits = Redis::connect(&url).await.unwrap();
    let sale = opened(&permits, 2, 1).await;
    let operator = fred::types::Builder::from_config(fred::types::config::Config::from_url(&url).unwrap());
    let operator = operator.build().unwrap();
    operator.init().await.unwrap();
    operator.script_flush(false).await.unwrap();
    let acquired = acquire(&permits, &sale, 1500, wish(new_hold(), "alice", 1)).await;
    assert!(matches!(acquired, Acquired::Fresh(_)), "{acquired:?}");
    assert_eq!(free(&permits, &sale).await, 1);
}

#[tokio::test]
async fn memory_and_redis_answer_the_same_whatever_is_asked() {
    let all = implementations().await;
    let [(_, memory), (_, redis)] = all.as_slice() else { return };
    let seed: u64 = std::env::var("SECKILL_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("to repeat it: SECKILL_TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let sale = unique_sale();
    let holds: Vec<HoldId> = (0..12).map(|_| new_hold()).collect();
    let names = ["a", "b|c", "ü 1|2|3"];
    macro_rules! both {
        ($method:ident($($arg:expr),*)) => {{
            let (ours, theirs) = tokio::join!(memory.$method(&sale, $($arg),*), redis.$method(&sale, $($arg),*));
            let (ours, theirs) = (ours.unwrap(), theirs.unwrap());
            assert_eq!(ours, theirs, "{} with seed {seed}", stringify!($method));
        }};
    }
    for step in 0..3000_i64 {
        let picks: Vec<HoldId> = (0..3).map(|_| *holds.choose(&mut rng).unwrap()).collect();
        let name = *names.choose(&mut rng).unwrap();
        let epoch = rng.random_range(1..6);
        let header = memory.header(&sale).await.unwrap();
        let (now_epoch, version, offered) = header.map_or((0, 0, 0), |h| (h.epoch, h.version, h.offered()));
        let quantity = rng.random_range(1..3);
        let facts = Facts {
            version: rng.random_range(0..50),
            verb: *[Verb::Open, Verb::Open, Verb::Open, Verb::Paused, Verb::Closed].choose(&mut rng).unwrap(),
            start_at: 1_700_000_000_000,
            end_at: 1_700_000_002_900,
            limit: 3,
            total: rng.random_range(5..9),
            sold: rng.random_range(0..6),
        };
        let now = 1_700_000_000_000 + step;
        match rng.random_range(0..100) {
            0..40 => {
                let wishes: Vec<_> = picks.iter().map(|hold| wish(*hold, name, quantity)).collect();
                both!(acquire(now, wishes.clone()));
            }
            40..70 => {
                let refunds: Vec<_> = picks
                    .iter()
                    .map(|hold| match rng.random_bool(0.5) {
                        true => Refund::Return(Return {
                            hold: *hold,
                            epoch: rng.random_range(now_epoch - 1..=now_epoch).max(0),
                        }),
                        false => Refund::Release(Release {
                            hold: *hold,
                            buyer: rng.random_bool(0.9).then(|| buyer(name)),
                            quantity,
                            seq: rng.random_range(1..20),
                            grant_epoch: now_epoch,
                        }),
                    })
                    .collect();
                both!(refund(refunds.clone()));
            }
            70..74 => both!(persisted(now_epoch, picks[..2].to_vec())),
            74..76 => both!(claim((now_epoch + epoch - 3).max(1), &facts, "server")),
            76..80 => {
                let grant = Grant { epoch: 1, quantity, at: now, buyer: buyer(name) };
                let held: Vec<_> = picks.iter().map(|hold| Held { hold: *hold, grant: grant.clone() }).collect();
                both!(load(now_epoch, held.clone()));
            }
            80..86 => {
                let opening = Opening {
                    epoch: now_epoch,
                    available: rng.random_range(0..9),
                    snapshot_seq: rng.random_range(0..9),
                    facts,
                };
                both!(open(&opening));
            }
            86..88 => {
                let version = version - rng.random_range(0..2);
                both!(clamp(now_epoch, version, quantity));
            }
            88..91 => {
                let offered = offered - rng.random_range(0..2);
                let raise = Raise { epoch: now_epoch, version, offered, missing: quantity, release_seq: 4 };
                both!(raise(&raise));
            }
            91..94 => both!(withdraw(quantity)),
            94..96 => both!(set_facts(&facts)),
            _ => both!(lookup(&holds)),
        }
        both!(header());
        both!(pending(now, 50));
        let (mut ours, mut theirs) = (memory.buyers(&sale).await.unwrap(), redis.buyers(&sale).await.unwrap());
        ours.sort();
        theirs.sort();
        assert_eq!(ours, theirs, "buyers with seed {seed}");
    }
}
