//! Telling the gateways how sales stand, so that they can refuse from memory.
//!
//! A signal that a sale is empty carries a filter of the buyers who hold or own something of it: they are asked
//! properly, so that a winner who retries is never told "sold out". Permits that are not whole cannot tell who they are:
//! then everybody is asked. It is read after its version was taken, so that a
//! unit that comes back and goes to somebody new meanwhile makes a newer signal. Signals may be lost; whoever is still
//! refusing buyers is told again.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use prost::Message as _;
use proto::{
    BuyerId, SaleId,
    error::Result,
    filter::Filter,
    internal::SaleChanged,
    subjects,
    v1::{Availability, SaleState},
};
use tokio::{sync::Notify, time::Instant};

use super::Engine;
use crate::{
    domain::{
        permits::{Header, Phase},
        sale::availability,
    },
    store::Record,
};

/// An emptied sale is told this long after the signal before, and the longer the dearer its filter was to make.
const DEBOUNCE: Duration = Duration::from_millis(50);
const COST_FACTOR: u32 = 10;

/// Told again while buyers still come in vain: what gateways keep from a signal expires.
const REPEAT: Duration = Duration::from_secs(1);

/// How long the loop sleeps when nobody wakes it.
const EVERY: Duration = Duration::from_millis(50);

/// NATS takes 1 MiB in a message.
const MAX_FILTER: usize = 900_000;

/// Up to so many buyers a filter takes less than handing it to another thread.
const FILTERED_AT_ONCE: usize = 200;

#[derive(Debug, Default)]
pub(super) struct Signals {
    sales: Mutex<HashMap<SaleId, Signalled>>,
    last_version: AtomicI64,
    wake: Notify,
}

/// What was told of a sale, and what is to be told.
#[derive(Debug, Default)]
struct Signalled {
    told: Option<(SaleState, Availability, i64)>,
    told_at: Option<Instant>,
    /// Not before this.
    next: Option<Instant>,
    wanted: bool,
    urgent: bool,
    refusing: bool,
}

impl Signals {
    fn sales(&self) -> MutexGuard<'_, HashMap<SaleId, Signalled>> {
        self.sales.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something changed: to be told soon.
    pub(super) fn changed(&self, sale: &SaleId) {
        self.sales().entry(sale.clone()).or_default().wanted = true;
        self.wake.notify_one();
    }

    /// There is something to be had again: to be told now.
    pub(super) fn became_available(&self, sale: &SaleId) {
        let mut sales = self.sales();
        let signalled = sales.entry(sale.clone()).or_default();
        signalled.wanted = true;
        signalled.urgent = true;
        drop(sales);
        self.wake.notify_one();
    }

    /// A buyer came in vain.
    pub(super) fn refused(&self, sale: &SaleId) {
        if let Some(signalled) = self.sales().get_mut(sale) {
            signalled.refusing = true;
        }
    }

    /// Compares how a sale stands with what was told of it: the net under every other way to notice.
    pub(super) fn notice(&self, record: &Record, header: Option<&Header>, now: i64) {
        let standing = standing(record, header, now);
        let mut sales = self.sales();
        let signalled = sales.entry(record.sale.id.clone()).or_default();
        let is_due = signalled.told_at.is_none_or(|at| at.elapsed() >= REPEAT);
        if signalled.told != Some(standing) || (signalled.refusing && is_due) {
            signalled.wanted = true;
            drop(sales);
            self.wake.notify_one();
        }
    }

    /// The sales to tell of now.
    fn due(&self) -> Vec<SaleId> {
        let now = Instant::now();
        let mut sales = self.sales();
        let due = sales.iter_mut().filter(|(_, s)| s.wanted && (s.urgent || s.next.is_none_or(|next| next <= now)));
        due.map(|(sale, signalled)| {
            signalled.wanted = false;
            signalled.urgent = false;
            signalled.refusing = false;
            sale.clone()
        })
        .collect()
    }

    /// Grows with every signal, here and, as far as clocks agree, over restarts and processes.
    fn next_version(&self, now: i64) -> i64 {
        let floor = now << 10;
        let before = self.last_version.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |v| Some(floor.max(v + 1)));
        floor.max(before.unwrap_or(0) + 1)
    }
}

/// State, availability and stock: what a gateway shows and decides by.
fn standing(record: &Record, header: Option<&Header>, now: i64) -> (SaleState, Availability, i64) {
    let free = header.filter(|header| header.phase == Phase::Open).map(|header| header.free);
    (record.sale.state(now), availability(&record.ledger, free), record.ledger.total)
}

impl Engine {
    pub(super) fn start_signals(&self) {
        self.spawn_loop(
            "signals",
            EVERY,
            |inner| Some(&inner.signals.wake),
            |engine| async move {
                for sale in engine.0.signals.due() {
                    if let Err(error) = engine.tell(&sale).await {
                        tracing::debug!(%sale, %error, "signalling a sale failed");
                        engine.0.signals.sales().entry(sale).or_default().wanted = true;
                    }
                }
            },
        );
    }

    async fn tell(&self, sale: &SaleId) -> Result<()> {
        let started = Instant::now();
        let now = self.0.clock.now_ms();
        let version = self.0.signals.next_version(now);
        let Some(mut record) = self.records([sale]).await?.remove(sale) else { return Ok(()) };
        let header = self.0.permits.header(sale).await?;
        if let Some(header) = &header {
            // The permits may have heard of sold units from a process that this one has not.
            record.ledger.sold = record.ledger.sold.max(header.facts.sold);
        }
        let standing @ (_, availability, total) = standing(&record, header.as_ref(), now);
        let buyers = if availability == Availability::Available {
            Vec::new()
        } else {
            let buyers = self.0.permits.buyers(sale).await?;
            let after = self.0.permits.header(sale).await?;
            if !knows_buyers(header.as_ref(), after.as_ref()) {
                Vec::new()
            } else if buyers.len() <= FILTERED_AT_ONCE {
                filter(&buyers)
            } else {
                // Tens of milliseconds for a hundred thousand buyers.
                tokio::task::spawn_blocking(move || filter(&buyers)).await.unwrap_or_default()
            }
        };
        let signal =
            SaleChanged { sale: Some(record.sale.view(total, availability, now)), version, buyers: buyers.into() };
        self.0.bus.signal(subjects::SALES_CHANGED, signal.encode_to_vec().into()).await?;
        let mut sales = self.0.signals.sales();
        let signalled = sales.entry(sale.clone()).or_default();
        signalled.told = Some(standing);
        signalled.told_at = Some(Instant::now());
        signalled.next = Some(Instant::now() + DEBOUNCE.max(started.elapsed() * COST_FACTOR));
        Ok(())
    }
}

/// Whether permits knew every buyer all the time between two looks: open, and not rebuilt in between.
fn knows_buyers(before: Option<&Header>, after: Option<&Header>) -> bool {
    let epoch = |header: Option<&Header>| header.filter(|h| h.phase == Phase::Open).map(|h| h.epoch);
    epoch(before).is_some() && epoch(before) == epoch(after)
}

/// No bytes say that everybody may be in it.
fn filter(buyers: &[BuyerId]) -> Vec<u8> {
    let filter = Filter::build(buyers.iter().map(BuyerId::as_str)).as_bytes().to_vec();
    if filter.len() > MAX_FILTER { Vec::new() } else { filter }
}
