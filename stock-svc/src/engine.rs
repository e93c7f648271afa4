//! What the service does, between its rpcs and its ports: the calls of a purchase here, operators' calls in [`sales`],
//! and one module per loop.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use mesh::{bus::SharedBus, clock::Clock, lifecycle::Lifecycle};
use proto::{Error, FIRST_EPOCH, Money, Reason, SaleId, error::Result, subjects};
use tokio::{sync::Notify, time::Instant};

use self::{catalog::Catalog, rebuild::Rebuilds, signals::Signals};
use crate::{
    Config,
    domain::{
        HoldId,
        ledger::Locked,
        permits::{Acquire, Acquired, Grant},
        sale::Sale,
    },
    permits::SharedPermits,
    store::{Operation, Outcome, Record, SharedStore},
};

mod catalog;
mod guard;
mod rebuild;
mod reconcile;
mod relay;
mod sales;
mod signals;
mod sweep;

/// A unit that is held may be released any moment: this soon a buyer may come back.
const ALL_HELD_RETRY: Duration = Duration::from_secs(1);

/// How long a reader waits for the funnel to pass what was accepted before: several times what it takes when all is well.
const FUNNEL_PATIENCE: Duration = Duration::from_millis(500);
const FUNNEL_POLL: Duration = Duration::from_millis(20);

/// Sales that a loop looks after at the same time.
const AT_ONCE: usize = 16;

/// See the module. Cheap to clone; clones are the same engine.
#[derive(Clone, Debug)]
pub(crate) struct Engine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Config,
    store: SharedStore,
    permits: SharedPermits,
    bus: SharedBus,
    clock: Clock,
    life: Lifecycle,
    catalog: Catalog,
    signals: Signals,
    rebuilds: Rebuilds,
    /// Something was put in the outbox.
    refunds: Notify,
    /// Permits were found missing.
    suspicion: Notify,
}

/// What a wish for permits came to, with what the caller needs to write an order.
#[derive(Clone, Debug)]
pub(crate) enum Admission {
    Granted { grant: Grant, fresh: bool, amount: Money, payment_window: i64 },
    Released,
    AtLimit(Option<HoldId>),
    Refused(Error),
}

/// Whether some live sale has granted a permit to a hold.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    Granted { sale: SaleId, grant: Grant, amount: Money, payment_window: i64 },
    Absent,
    Unknown,
}

impl Engine {
    /// Reads the sales and starts the loops.
    pub(crate) async fn start(
        config: Config,
        store: SharedStore,
        permits: SharedPermits,
        bus: SharedBus,
        clock: Clock,
        life: &Lifecycle,
    ) -> Result<Self> {
        let engine = Self(Arc::new(Inner {
            config,
            store,
            permits,
            bus,
            clock,
            life: life.clone(),
            catalog: Catalog::default(),
            signals: Signals::default(),
            rebuilds: Rebuilds::default(),
            refunds: Notify::new(),
            suspicion: Notify::new(),
        }));
        let live = engine.0.store.live_sales(engine.0.clock.now_ms()).await?;
        engine.0.catalog.refresh(live);
        // There from the start: an alert can tell zero from absent.
        metrics::counter!("seckill_admitted_but_refused_total").increment(0);
        engine.start_guard();
        engine.start_relay();
        engine.start_sweep();
        engine.start_reconcile();
        engine.start_signals();
        Ok(engine)
    }

    /// Takes permits: one call per sale, and no SQL for sales that are known.
    pub(crate) async fn acquire(&self, wishes: Vec<(SaleId, Acquire)>) -> Vec<Admission> {
        let sales: BTreeSet<&SaleId> = wishes.iter().map(|(sale, _)| sale).collect();
        let records = match self.records(sales).await {
            Ok(records) => records,
            Err(error) => return wishes.iter().map(|_| Admission::Refused(error.clone())).collect(),
        };
        let now = self.0.clock.now_ms();
        let mut admissions: Vec<Option<Admission>> = vec![None; wishes.len()];
        let mut by_sale: BTreeMap<SaleId, Vec<(usize, Acquire, Money)>> = BTreeMap::new();
        for (index, (sale, wish)) in wishes.into_iter().enumerate() {
            // What cannot be priced is refused before it takes anything (I9).
            let amount = match records.get(&sale) {
                // Its permits are dropped, or about to be: that they are missing is no reason to look after them.
                Some(record) if !record.sale.is_live(now) => Err(ended()),
                Some(record) => record.sale.price.times(wish.quantity),
                None => Err(Error::not_found("sale")),
            };
            match amount {
                Ok(amount) => by_sale.entry(sale).or_default().push((index, wish, amount)),
                Err(error) => admissions[index] = Some(Admission::Refused(error)),
            }
        }
        let calls = by_sale.into_iter().map(|(sale, wishes)| {
            let record = records[&sale].clone();
            async move { self.acquire_of(&record, now, wishes).await }
        });
        for (index, admission) in join_all(calls).await.into_iter().flatten() {
            admissions[index] = Some(admission);
        }
        admissions.into_iter().map(|a| a.unwrap_or_else(|| Admission::Refused(Error::internal("no answer")))).collect()
    }

    async fn acquire_of(
        &self,
        record: &Record,
        now: i64,
        wishes: Vec<(usize, Acquire, Money)>,
    ) -> Vec<(usize, Admission)> {
        let sale = &record.sale;
        let batch = wishes.iter().map(|(_, wish, _)| wish.clone()).collect();
        let answered = self.0.permits.acquire(&sale.id, now, batch).await;
        let batch = match answered {
            Ok(batch) => batch,
            Err(error) => {
                // Whatever was taken is found again by the same request, or swept.
                tracing::warn!(sale = %sale.id, %error, "permits gave no answer");
                count("unknown", wishes.len());
                return wishes.into_iter().map(|(i, ..)| (i, Admission::Refused(error.clone()))).collect();
            }
        };
        let (mut taken, mut refused) = (false, false);
        let mut admissions = Vec::with_capacity(wishes.len());
        for ((index, _, amount), acquired) in wishes.into_iter().zip(batch.results) {
            count(outcome(&acquired), 1);
            taken |= matches!(acquired, Acquired::Fresh(_));
            refused |= matches!(acquired, Acquired::AllHeld | Acquired::SoldOut);
            if acquired == Acquired::Unavailable {
                self.0.suspicion.notify_one();
            }
            admissions.push((index, admission(sale, acquired, amount, now)));
        }
        if refused {
            self.0.signals.refused(&sale.id);
        }
        if taken && batch.free == 0 {
            self.0.signals.changed(&sale.id);
        }
        admissions
    }

    /// Finds grants by hold alone, over all live sales. Only what is surely nobody's is absent.
    pub(crate) async fn lookup(&self, holds: &[HoldId]) -> Vec<Found> {
        let mut found = self.look_among(self.0.catalog.live(self.0.clock.now_ms()), holds).await;
        let places: Vec<_> = (0..found.len()).filter(|&place| matches!(found[place], Found::Absent)).collect();
        let missing: Vec<_> = places.iter().map(|&place| holds[place]).collect();
        if !missing.is_empty() {
            let again = self.look_twice(&missing).await.unwrap_or_else(|error| {
                tracing::debug!(%error, "whether a grant is there cannot be said");
                vec![Found::Unknown; missing.len()]
            });
            for (place, again) in places.into_iter().zip(again) {
                found[place] = again;
            }
        }
        found
    }

    /// Looks for what this process has not found. Another one may have created the sale a moment ago; the permits may
    /// be those of a server that was put back in time, before anybody has noticed; and who was refused by the ledger
    /// has lost its permit before its record is written.
    async fn look_twice(&self, holds: &[HoldId]) -> Result<Vec<Found>> {
        let live = self.0.store.live_sales(self.0.clock.now_ms()).await?;
        let mut found = self.look_among(live.clone(), holds).await;
        // Taken before permits were lost and published after they were rebuilt: no permits know of that grant, and what
        // comes of the order is found when the funnel has been by.
        let was_rebuilt = live.iter().any(|record| record.ledger.epoch > FIRST_EPOCH);
        let all_written = !was_rebuilt || self.all_is_written().await?;
        // After the look: permits that were put back before it show now.
        let server = self.0.permits.fingerprint().await?;
        let mut all_current = true;
        for (header, record) in self.headers(live).await {
            all_current &= guard::is_current(header?.as_ref(), &record, &server);
        }
        let known = self.0.store.known_holds(holds).await?;
        for (found, hold) in found.iter_mut().zip(holds) {
            if matches!(found, Found::Absent) && (!all_written || !all_current || known.contains(hold)) {
                *found = Found::Unknown;
            }
        }
        Ok(found)
    }

    /// Whether all that was accepted by now is settled: locked, or refused for good. Waits for it a little.
    async fn all_is_written(&self) -> Result<bool> {
        let end = self.0.bus.last_sequence(subjects::ORDERS).await?;
        let until = Instant::now() + FUNNEL_PATIENCE;
        while !self.funnel_has_passed(end).await? {
            if Instant::now() >= until {
                return Ok(false);
            }
            tokio::time::sleep(FUNNEL_POLL).await;
        }
        Ok(true)
    }

    /// Asks the permits of these sales. Where some do not answer, what the others do not know is unknown.
    async fn look_among(&self, sales: Vec<Record>, holds: &[HoldId]) -> Vec<Found> {
        let answers = futures::stream::iter(sales)
            .map(|record| async move { (self.0.permits.lookup(&record.sale.id, holds).await, record.sale) })
            .buffer_unordered(AT_ONCE)
            .collect::<Vec<_>>()
            .await;
        let mut found = vec![Found::Absent; holds.len()];
        let mut somebody_does_not_know = false;
        for (answer, sale) in answers {
            let Ok(Some(grants)) = answer else {
                somebody_does_not_know = true;
                continue;
            };
            for (found, grant) in found.iter_mut().zip(grants) {
                // An unpriceable grant cannot be: it was priced before it was taken.
                if let Some(grant) = grant
                    && let Ok(amount) = sale.price.times(grant.quantity)
                {
                    let payment_window = sale.payment_window;
                    *found = Found::Granted { sale: sale.id.clone(), grant, amount, payment_window };
                }
            }
        }
        if somebody_does_not_know {
            for found in found.iter_mut().filter(|found| matches!(found, Found::Absent)) {
                *found = Found::Unknown;
            }
        }
        found
    }

    /// Applies one transaction's worth of operations, and tells the permits what they may know earlier for it.
    pub(crate) async fn apply(&self, items: Vec<(SaleId, Operation)>) -> Result<Vec<Result<Outcome>>> {
        let mut persisted: BTreeMap<(SaleId, i64), Vec<HoldId>> = BTreeMap::new();
        let locks: Vec<_> = items
            .iter()
            .map(|(sale, operation)| match operation {
                // Who comes to be refused was not admitted.
                Operation::Lock(lock) if lock.refusal == Reason::Unspecified => {
                    Some((sale.clone(), lock.grant_epoch, lock.hold))
                }
                _ => None,
            })
            .collect();
        let sells = items.iter().any(|(_, operation)| matches!(operation, Operation::Deduct { .. }));
        let applied = self.0.store.apply(items, self.0.clock.now_ms()).await?;
        if applied.has_refunds {
            self.0.refunds.notify_one();
        }
        for (lock, result) in locks.into_iter().zip(&applied.results) {
            match (lock, result) {
                (Some((sale, epoch, hold)), Ok(Outcome::Locked(Locked::Yes))) => {
                    persisted.entry((sale, epoch)).or_default().push(hold);
                }
                (Some((sale, ..)), Ok(Outcome::Locked(Locked::Refused(Reason::AllHeld | Reason::SoldOut)))) => {
                    // Zero as long as no permits are lost or forged.
                    tracing::warn!(%sale, "admitted, and refused by the ledger");
                    metrics::counter!("seckill_admitted_but_refused_total").increment(1);
                }
                _ => {}
            }
        }
        for record in applied.records.values() {
            self.0.catalog.put(record.clone());
        }
        self.tell_permits(persisted, if sells { applied.records.into_values().collect() } else { Vec::new() });
        Ok(applied.results)
    }

    /// Hints, in the background: the sweep and the guard find out by themselves.
    fn tell_permits(&self, persisted: BTreeMap<(SaleId, i64), Vec<HoldId>>, sold: Vec<Record>) {
        if persisted.is_empty() && sold.is_empty() {
            return;
        }
        let engine = self.clone();
        self.0.life.spawn(async move {
            for ((sale, epoch), holds) in persisted {
                if let Err(error) = engine.0.permits.persisted(&sale, epoch, holds).await {
                    tracing::debug!(%sale, %error, "marking grants as persisted failed");
                }
            }
            for record in sold {
                let told = engine.0.permits.set_facts(&record.sale.id, &record.facts()).await;
                match told {
                    Ok(_) if record.ledger.sold == record.ledger.total => engine.0.signals.changed(&record.sale.id),
                    Ok(_) => {}
                    Err(error) => tracing::debug!(sale = %record.sale.id, %error, "telling what is sold failed"),
                }
            }
        });
    }

    /// The sales that exist among these, from memory where they are known.
    async fn records(&self, ids: impl IntoIterator<Item = &SaleId>) -> Result<HashMap<SaleId, Record>> {
        let (mut known, mut unknown) = (HashMap::new(), Vec::new());
        for id in ids {
            match self.0.catalog.get(id) {
                Some(record) => drop(known.insert(id.clone(), record)),
                None => unknown.push(id.clone()),
            }
        }
        if !unknown.is_empty() {
            for record in self.0.store.sales(&unknown).await? {
                self.0.catalog.put(record.clone());
                known.insert(record.sale.id.clone(), record);
            }
        }
        Ok(known)
    }

    /// Runs `work` every so often and whenever it is woken, until the soft stop.
    fn spawn_loop<F, Fut>(&self, name: &'static str, every: Duration, wake: fn(&Inner) -> Option<&Notify>, mut work: F)
    where
        F: FnMut(Engine) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let engine = self.clone();
        self.0.life.spawn_essential(name, async move {
            loop {
                work(engine.clone()).await;
                let woken = async {
                    match wake(&engine.0) {
                        Some(notify) => notify.notified().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    () = engine.0.life.stopping() => return,
                    () = woken => {}
                    () = tokio::time::sleep(every) => {}
                }
            }
        });
    }
}

fn admission(sale: &Sale, acquired: Acquired, amount: Money, now: i64) -> Admission {
    let refused = |reason, message: &str| Admission::Refused(Error::new(reason, message));
    let payment_window = sale.payment_window;
    match acquired {
        Acquired::Fresh(grant) => Admission::Granted { grant, fresh: true, amount, payment_window },
        Acquired::Again(grant) => Admission::Granted { grant, fresh: false, amount, payment_window },
        Acquired::Released => Admission::Released,
        Acquired::AtLimit(last) => Admission::AtLimit(last),
        Acquired::OverLimit => refused(Reason::PurchaseLimitReached, "one buyer may not have that many"),
        Acquired::Reused => refused(Reason::RequestIdReused, "the request id was used for another purchase"),
        Acquired::NotStarted => {
            let wait = Duration::from_millis(sale.start_at.saturating_sub(now).max(0).unsigned_abs());
            let error = Error::new(Reason::SaleNotStarted, "the sale has not started");
            Admission::Refused(error.with_retry_after(wait))
        }
        Acquired::Paused => refused(Reason::SalePaused, "the sale is paused"),
        Acquired::Ended => Admission::Refused(ended()),
        Acquired::SoldOut => refused(Reason::SoldOut, "sold out"),
        Acquired::AllHeld => {
            let error = Error::new(Reason::AllHeld, "all units are held, some may come back");
            Admission::Refused(error.with_retry_after(ALL_HELD_RETRY))
        }
        Acquired::Unavailable => refused(Reason::StockRebuilding, "the stock is being rebuilt"),
    }
}

fn ended() -> Error {
    Error::new(Reason::SaleEnded, "the sale has ended")
}

fn outcome(acquired: &Acquired) -> &'static str {
    match acquired {
        Acquired::Unavailable => "unavailable",
        Acquired::Fresh(_) => "granted",
        Acquired::Again(_) => "again",
        Acquired::Reused => "request_id_reused",
        Acquired::Released => "released",
        Acquired::NotStarted => "not_started",
        Acquired::Paused => "paused",
        Acquired::Ended => "ended",
        Acquired::AtLimit(_) | Acquired::OverLimit => "limit_reached",
        Acquired::AllHeld => "all_held",
        Acquired::SoldOut => "sold_out",
    }
}

fn count(outcome: &'static str, how_many: usize) {
    metrics::counter!("seckill_permits_total", "outcome" => outcome).increment(how_many as u64);
}
