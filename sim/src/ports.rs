//! The ports of the roles, with what may go wrong at each.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
};

use async_trait::async_trait;
use coordinator::store as sagas;
use mesh::testing::{Back, at_once};
use order_svc::{domain::Transition, store as records};
use payment_svc::{
    domain::{Answer, PaymentId, Times},
    store as books,
};
use proto::{BuyerId, Error, OrderId, Reason, RequestId, SaleId, error::Result};
use stock_svc::{
    domain::{
        HoldId,
        ledger::Locked,
        permits::{Acquire, Claimed, Facts, Grant, Header, Held, Opening, Pending, Raise, Refund, Withdrawn},
        sale::{NewSale, Verb},
    },
    permits::{AcquiredBatch, Permits, RefundedBatch},
    store as ledger,
};
use tokio::runtime::Handle;

use crate::{
    faults::{Hands, Port},
    kv::Kv,
};

/// A port of one role's life: what is behind it, and the hands that reach through.
pub struct Faulty<T: ?Sized> {
    hands: Hands,
    behind: Arc<T>,
}

impl<T: ?Sized> Faulty<T> {
    pub fn new(hands: &Hands, behind: Arc<T>) -> Arc<Self> {
        Arc::new(Self { hands: hands.clone(), behind })
    }
}

impl<T: ?Sized> fmt::Debug for Faulty<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("hands", &self.hands).finish_non_exhaustive()
    }
}

fn database(what: &'static str) -> Error {
    Error::dependency("the database", what)
}

fn redis(what: &'static str) -> Error {
    Error::dependency("redis", what)
}

/// One method of a store: a step that is made at once.
macro_rules! stored {
    ($self:ident, $operation:ident($($asked:expr),*), $effect:expr) => {
        $self
            .hands
            .call(Port::Store, stringify!($operation), || format!("{:?}", ($(&$asked,)*)), async { at_once($effect) }, database)
            .await
    };
}

/// Who has a permit gets a unit, as long as no permits were lost. What was refused before is refused again.
fn admitted_must_lock(hands: &Hands, items: &[(SaleId, ledger::Operation)], applied: &ledger::Applied) {
    for ((_, operation), result) in items.iter().zip(&applied.results) {
        let (ledger::Operation::Lock(lock), Ok(ledger::Outcome::Locked(Locked::Refused(reason)))) = (operation, result)
        else {
            continue;
        };
        let is_news = hands.run().is_first_refusal(&lock.order);
        if is_news && lock.refusal == Reason::Unspecified && matches!(reason, Reason::AllHeld | Reason::SoldOut) {
            hands.run().alarm(format!("order {} was admitted, and the ledger refused it: {reason:?}", lock.order));
        }
    }
}

/// A store's callback, on the run's own clock.
fn back(hook: ledger::Hook) -> ledger::Hook {
    let run = Handle::current();
    Arc::new(move |standing| Box::pin(Back::to(run.clone(), hook(standing))))
}

#[async_trait]
impl ledger::Store for Faulty<dyn ledger::Store> {
    async fn create_sale(&self, new: NewSale, payload_hash: String) -> Result<ledger::Record> {
        stored!(self, create_sale(new), self.behind.create_sale(new.clone(), payload_hash))
    }

    async fn sales(&self, ids: &[SaleId]) -> Result<Vec<ledger::Record>> {
        stored!(self, sales(ids), self.behind.sales(ids))
    }

    async fn sales_page(&self, after: Option<&SaleId>, limit: u64) -> Result<Vec<ledger::Record>> {
        stored!(self, sales_page(after, limit), self.behind.sales_page(after, limit))
    }

    async fn live_sales(&self, now: i64) -> Result<Vec<ledger::Record>> {
        stored!(self, live_sales(), self.behind.live_sales(now))
    }

    async fn apply_verb(&self, sale: &SaleId, verb: Verb, now: i64) -> Result<ledger::Record> {
        stored!(self, apply_verb(sale, verb), self.behind.apply_verb(sale, verb, now))
    }

    async fn apply(&self, items: Vec<(SaleId, ledger::Operation)>, now: i64) -> Result<ledger::Applied> {
        stored!(self, apply(items), async {
            let applied = self.behind.apply(items.clone(), now).await?;
            if self.hands.run().permits_are_safe() {
                admitted_must_lock(&self.hands, &items, &applied);
            }
            Ok(applied)
        })
    }

    async fn adjust(
        &self,
        sale: &SaleId,
        request: RequestId,
        delta: i64,
        now: i64,
        before: ledger::Hook,
    ) -> Result<ledger::Record> {
        let before = back(before);
        stored!(self, adjust(sale, request, delta), self.behind.adjust(sale, request, delta, now, before))
    }

    async fn allocate_epoch(&self, sale: &SaleId, above: i64) -> Result<i64> {
        stored!(self, allocate_epoch(sale, above), self.behind.allocate_epoch(sale, above))
    }

    async fn fence(&self, sale: &SaleId, epoch: i64) -> Result<Option<ledger::Fenced>> {
        stored!(self, fence(sale, epoch), self.behind.fence(sale, epoch))
    }

    async fn known_holds(&self, holds: &[HoldId]) -> Result<BTreeSet<HoldId>> {
        stored!(self, known_holds(holds), self.behind.known_holds(holds))
    }

    async fn under_lock(&self, sale: &SaleId, work: ledger::Hook) -> Result<()> {
        let work = back(work);
        stored!(self, under_lock(sale), self.behind.under_lock(sale, work))
    }

    async fn standing(&self, sale: &SaleId) -> Result<ledger::Standing> {
        stored!(self, standing(sale), self.behind.standing(sale))
    }

    async fn count_holds(&self, sale: &SaleId) -> Result<ledger::Counted> {
        stored!(self, count_holds(sale), self.behind.count_holds(sale))
    }

    async fn outbox(&self, after: i64, without: &[SaleId], limit: u64) -> Result<Vec<ledger::Outgoing>> {
        stored!(self, outbox(after, without), self.behind.outbox(after, without, limit))
    }

    async fn forget_outgoing(&self, ids: &[i64]) -> Result<()> {
        stored!(self, forget_outgoing(ids), self.behind.forget_outgoing(ids))
    }
}

#[async_trait]
impl sagas::Store for Faulty<dyn sagas::Store> {
    async fn insert(&self, rows: Vec<(sagas::Row, sagas::Entry)>) -> Result<()> {
        stored!(self, insert(rows), self.behind.insert(rows.clone()))
    }

    async fn load(&self, ids: &[OrderId]) -> Result<HashMap<OrderId, sagas::Row>> {
        stored!(self, load(ids), self.behind.load(ids))
    }

    async fn change(&self, ids: Vec<OrderId>, decide: sagas::Decide) -> Result<Vec<sagas::Verdict>> {
        stored!(self, change(ids), self.behind.change(ids.clone(), decide))
    }

    async fn advance(&self, moves: Vec<(sagas::Row, sagas::Entry)>) -> Result<bool> {
        stored!(self, advance(moves), self.behind.advance(moves.clone()))
    }

    async fn postpone(&self, postponed: Vec<sagas::Postponed>) -> Result<()> {
        stored!(self, postpone(postponed), self.behind.postpone(postponed.clone()))
    }

    async fn claim(&self, of: sagas::Which, now: i64, until: i64, limit: u64) -> Result<Vec<sagas::Row>> {
        stored!(self, claim(of), self.behind.claim(of.clone(), now, until, limit))
    }

    async fn overdue(&self, of: sagas::Which, before: i64, limit: u64) -> Result<Vec<OrderId>> {
        stored!(self, overdue(of), self.behind.overdue(of.clone(), before, limit))
    }

    async fn log(&self, id: OrderId) -> Result<Vec<sagas::Entry>> {
        stored!(self, log(id), self.behind.log(id))
    }

    async fn list(&self, filter: &sagas::Filter, after: &str, limit: u64) -> Result<Vec<sagas::Row>> {
        stored!(self, list(filter, after), self.behind.list(filter, after, limit))
    }

    async fn count_stuck(&self) -> Result<u64> {
        stored!(self, count_stuck(), self.behind.count_stuck())
    }

    async fn retry(&self, id: OrderId, now: i64) -> Result<bool> {
        stored!(self, retry(id), self.behind.retry(id, now))
    }

    async fn record_action(&self, action: sagas::Action) -> Result<()> {
        stored!(self, record_action(action), self.behind.record_action(action.clone()))
    }

    async fn actions(&self, before: Option<&str>, target: &str, limit: u64) -> Result<Vec<sagas::Action>> {
        stored!(self, actions(before, target), self.behind.actions(before, target, limit))
    }
}

#[async_trait]
impl records::Store for Faulty<dyn records::Store> {
    async fn create(&self, new: Vec<order_svc::domain::Record>) -> Result<Vec<order_svc::domain::Record>> {
        stored!(self, create(new), self.behind.create(new.clone()))
    }

    async fn transition(&self, transitions: Vec<Transition>) -> Result<records::Transitioned> {
        stored!(self, transition(transitions), self.behind.transition(transitions.clone()))
    }

    async fn get(&self, order_ids: Vec<OrderId>) -> Result<HashMap<OrderId, order_svc::domain::Record>> {
        stored!(self, get(order_ids), self.behind.get(order_ids.clone()))
    }

    async fn list(&self, page: records::Page) -> Result<Vec<order_svc::domain::Record>> {
        stored!(self, list(page), self.behind.list(page.clone()))
    }
}

#[async_trait]
impl books::Store for Faulty<dyn books::Store> {
    async fn run(&self, requests: Vec<books::Request>, times: Times) -> Result<Vec<Result<Answer>>> {
        stored!(self, run(requests), self.behind.run(requests.clone(), times))
    }

    async fn read(&self, payment_ids: Vec<PaymentId>) -> Result<Vec<Option<books::Open>>> {
        stored!(self, read(payment_ids), self.behind.read(payment_ids.clone()))
    }

    async fn take_due(&self, now_ms: i64, lease_until_ms: i64, limit: u64) -> Result<Vec<books::Open>> {
        stored!(self, take_due(), self.behind.take_due(now_ms, lease_until_ms, limit))
    }

    async fn announcements(&self, limit: u64) -> Result<Vec<books::Announcement>> {
        stored!(self, announcements(), self.behind.announcements(limit))
    }

    async fn forget(&self, seqs: Vec<i64>) -> Result<()> {
        stored!(self, forget(seqs), self.behind.forget(seqs.clone()))
    }
}

/// One method of the permits.
macro_rules! permitted {
    ($self:ident, $operation:ident($($asked:expr),*), $effect:expr) => {
        $self
            .hands
            .call(Port::Permits, stringify!($operation), || format!("{:?}", ($(&$asked,)*)), $effect, redis)
            .await
    };
}

#[async_trait]
impl Permits for Faulty<Kv> {
    async fn acquire(&self, sale: &SaleId, now: i64, wishes: Vec<Acquire>) -> Result<AcquiredBatch> {
        permitted!(self, acquire(wishes), async { self.behind.now().acquire(sale, now, wishes.clone()).await })
    }

    async fn refund(&self, sale: &SaleId, refunds: Vec<Refund>) -> Result<RefundedBatch> {
        permitted!(self, refund(refunds), async { self.behind.now().refund(sale, refunds.clone()).await })
    }

    async fn persisted(&self, sale: &SaleId, epoch: i64, holds: Vec<HoldId>) -> Result<()> {
        permitted!(self, persisted(epoch, holds), async {
            self.behind.now().persisted(sale, epoch, holds.clone()).await
        })
    }

    async fn lookup(&self, sale: &SaleId, holds: &[HoldId]) -> Result<Option<Vec<Option<Grant>>>> {
        permitted!(self, lookup(holds), async { self.behind.now().lookup(sale, holds).await })
    }

    async fn header(&self, sale: &SaleId) -> Result<Option<Header>> {
        permitted!(self, header(), async { self.behind.now().header(sale).await })
    }

    async fn claim(&self, sale: &SaleId, epoch: i64, facts: &Facts, server: &str) -> Result<Claimed> {
        permitted!(self, claim(epoch), async { self.behind.now().claim(sale, epoch, facts, server).await })
    }

    async fn load(&self, sale: &SaleId, epoch: i64, holds: Vec<Held>) -> Result<bool> {
        permitted!(self, load(epoch, holds), async { self.behind.now().load(sale, epoch, holds.clone()).await })
    }

    async fn open(&self, sale: &SaleId, opening: &Opening) -> Result<bool> {
        permitted!(self, open(opening), async { self.behind.now().open(sale, opening).await })
    }

    async fn clamp(&self, sale: &SaleId, epoch: i64, version: i64, excess: i64) -> Result<Option<i64>> {
        permitted!(self, clamp(epoch, version, excess), async {
            let taken = self.behind.now().clamp(sale, epoch, version, excess).await?;
            if taken.is_some_and(|taken| taken > 0) && self.hands.run().permits_are_safe() {
                self.hands.run().alarm(format!("there were {excess} permits too many, and none had been lost"));
            }
            Ok(taken)
        })
    }

    async fn raise(&self, sale: &SaleId, raise: &Raise) -> Result<bool> {
        permitted!(self, raise(raise), async {
            let raised = self.behind.now().raise(sale, raise).await?;
            if raised && self.hands.run().permits_are_safe() {
                self.hands.run().alarm(format!("permits were missing, and none had been lost: {raise:?}"));
            }
            Ok(raised)
        })
    }

    async fn withdraw(&self, sale: &SaleId, quantity: i64) -> Result<Withdrawn> {
        permitted!(self, withdraw(quantity), async { self.behind.now().withdraw(sale, quantity).await })
    }

    async fn set_facts(&self, sale: &SaleId, facts: &Facts) -> Result<bool> {
        permitted!(self, set_facts(facts), async { self.behind.now().set_facts(sale, facts).await })
    }

    async fn pending(&self, sale: &SaleId, before: i64, limit: usize) -> Result<Option<Vec<Pending>>> {
        permitted!(self, pending(), async { self.behind.now().pending(sale, before, limit).await })
    }

    async fn buyers(&self, sale: &SaleId) -> Result<Vec<BuyerId>> {
        permitted!(self, buyers(), async { self.behind.now().buyers(sale).await })
    }

    async fn forget(&self, sale: &SaleId) -> Result<bool> {
        permitted!(self, forget(), async { self.behind.now().forget(sale).await })
    }

    async fn fingerprint(&self) -> Result<String> {
        permitted!(self, fingerprint(), async { self.behind.now().fingerprint().await })
    }
}
